/* SPDX-License-Identifier: Apache-2.0 */
/*
 * texture.c - texture and surface objects: 64-bit values that a program hands to its kernels.
 *
 * A kernel takes the driver's own value, so that is what the program is given. What an object was made of is kept here, by
 * context and value, since drivers may use a value again in another context; and arrays stay what the program calls them.
 */
#include <stdlib.h>

#include "../../transport/code_wire.h"
#include "_generated_prototypes.h"
#include "shim.h"

#define BUCKETS 1024u /* a power of two */

enum { TEXTURES, SURFACES, SORTS };

struct object {
    struct object *next;
    uint64_t context, value;
    CUDA_RESOURCE_DESC resource;
    CUDA_TEXTURE_DESC texture;
    CUDA_RESOURCE_VIEW_DESC view;
    bool has_view;
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static struct object *buckets[SORTS][BUCKETS];

static size_t home(uint64_t value) { return (size_t)(value * 0x9e3779b97f4a7c15ull >> 40) & (BUCKETS - 1); }

static bool is_it(const struct object *object, uint64_t value) { return object->value == value && object->context == shim_current_context_id(); }

/* Mutex held. Where the pointer to the current context's object is, or to the end of its list. */
static struct object **find(int sort, uint64_t value)
{
    struct object **place = &buckets[sort][home(value)];
    while (*place != NULL && !is_it(*place, value))
        place = &(*place)->next;
    return place;
}

static bool copy_of(int sort, uint64_t value, struct object *copy)
{
    pthread_mutex_lock(&mutex);
    const struct object *object = *find(sort, value);
    if (object != NULL) *copy = *object;
    pthread_mutex_unlock(&mutex);
    return object != NULL;
}

static void forget_context(uint64_t context)
{
    pthread_mutex_lock(&mutex);
    for (int sort = 0; sort < SORTS; sort++)
        for (size_t i = 0; i < BUCKETS; i++)
            for (struct object **place = &buckets[sort][i]; *place != NULL;) {
                struct object *object = *place;
                if (object->context == context) {
                    *place = object->next;
                    free(object);
                } else {
                    place = &object->next;
                }
            }
    pthread_mutex_unlock(&mutex);
}

static pthread_once_t hooked = PTHREAD_ONCE_INIT;
static void hook(void) { shim_on_context_end(forget_context); }

static CUresult make(int sort, unsigned call, uint64_t flags, const struct object *asked, const void *payload, uint32_t length, void *out)
{
    pthread_once(&hooked, hook);
    struct object *object = malloc(sizeof *object);
    if (object == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    const uint64_t argument[8] = {flags};
    uint64_t value[4] = {0};
    const CUresult status = shim_reply(call, argument, payload, length, value, NULL, 0, NULL);
    if (status != CUDA_SUCCESS) {
        free(object);
        return status;
    }
    *object = *asked;
    object->context = shim_current_context_id();
    object->value = value[0];
    pthread_mutex_lock(&mutex);
    struct object **place = find(sort, value[0]), *old = *place;
    object->next = old == NULL ? NULL : old->next;
    *place = object;
    pthread_mutex_unlock(&mutex);
    free(old); /* whatever it was, the driver has given its value to another */
    memcpy(out, &value[0], sizeof value[0]);
    return CUDA_SUCCESS;
}

static CUresult destroy(int sort, unsigned call, uint64_t value)
{
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    /* Taken out first: once the worker has destroyed it, another thread may be given the same value. */
    pthread_mutex_lock(&mutex);
    struct object **place = find(sort, value), *object = *place;
    if (object != NULL) *place = object->next;
    pthread_mutex_unlock(&mutex);
    if (object == NULL) return CUDA_ERROR_INVALID_VALUE;
    const uint64_t argument[8] = {value};
    status = shim_reply(call, argument, NULL, 0, NULL, NULL, 0, NULL);
    free(object);
    return status;
}

/* What the driver would refuse at a glance. */
static CUresult check_resource(const CUDA_RESOURCE_DESC *resource, unsigned call)
{
    if (resource->resType == CU_RESOURCE_TYPE_MIPMAPPED_ARRAY) return shim_refuse(call);
    if (resource->resType > CU_RESOURCE_TYPE_PITCH2D || resource->flags != 0) return CUDA_ERROR_INVALID_VALUE;
    if (resource->resType == CU_RESOURCE_TYPE_ARRAY && resource->res.array.hArray == NULL) return CUDA_ERROR_INVALID_VALUE;
    if (resource->resType == CU_RESOURCE_TYPE_ARRAY)
        return shim_handle_valid(VGPU_KIND_ARRAY, (uint64_t)(uintptr_t)resource->res.array.hArray) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
    /* In a linear resource format and channels lie where they do in one with a pitch. */
    if (resource->res.linear.numChannels != 1 && resource->res.linear.numChannels != 2 && resource->res.linear.numChannels != 4)
        return CUDA_ERROR_INVALID_VALUE;
    return vgpu_format_bytes(resource->res.linear.format) != 0 ? CUDA_SUCCESS : shim_refuse(call);
}

CUresult cuTexObjectCreate(void *pTexObject, const void *pResDesc, const void *pTexDesc, const void *pResViewDesc)
{
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    if (pTexObject == NULL || pResDesc == NULL || pTexDesc == NULL) return CUDA_ERROR_INVALID_VALUE;
    struct object asked = {.has_view = pResViewDesc != NULL};
    memcpy(&asked.resource, pResDesc, sizeof asked.resource);
    memcpy(&asked.texture, pTexDesc, sizeof asked.texture);
    if (asked.has_view) memcpy(&asked.view, pResViewDesc, sizeof asked.view);
    status = check_resource(&asked.resource, VGPU_CALL_cuTexObjectCreate);
    if (status != CUDA_SUCCESS) return status;
    /* CUDA documents views for arrays only; 580 takes one of device memory and reads the memory as its resource says. */
    const bool sends_view = asked.has_view && asked.resource.resType == CU_RESOURCE_TYPE_ARRAY;
    struct { CUDA_RESOURCE_DESC resource; CUDA_TEXTURE_DESC texture; CUDA_RESOURCE_VIEW_DESC view; } payload = {asked.resource, asked.texture, asked.view};
    const uint32_t length = (uint32_t)(sends_view ? sizeof payload : sizeof payload - sizeof payload.view);
    return make(TEXTURES, VGPU_CALL_cuTexObjectCreate, sends_view ? VGPU_TEXTURE_HAS_VIEW : 0, &asked, &payload, length, pTexObject);
}

CUresult cuTexObjectDestroy(unsigned long long texObject) { return destroy(TEXTURES, VGPU_CALL_cuTexObjectDestroy, texObject); }

CUresult cuSurfObjectCreate(void *pSurfObject, const void *pResDesc)
{
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    if (pSurfObject == NULL || pResDesc == NULL) return CUDA_ERROR_INVALID_VALUE;
    struct object asked = {0};
    memcpy(&asked.resource, pResDesc, sizeof asked.resource);
    if (asked.resource.resType != CU_RESOURCE_TYPE_ARRAY) return CUDA_ERROR_INVALID_VALUE;
    status = check_resource(&asked.resource, VGPU_CALL_cuSurfObjectCreate);
    if (status != CUDA_SUCCESS) return status;
    return make(SURFACES, VGPU_CALL_cuSurfObjectCreate, 0, &asked, &asked.resource, sizeof asked.resource, pSurfObject);
}

CUresult cuSurfObjectDestroy(unsigned long long surfObject) { return destroy(SURFACES, VGPU_CALL_cuSurfObjectDestroy, surfObject); }

/* What every Get call begins with. */
static CUresult describe(int sort, const void *out, uint64_t value, struct object *found)
{
    const CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    return out != NULL && copy_of(sort, value, found) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuTexObjectGetResourceDesc(void *pResDesc, unsigned long long texObject)
{
    struct object found;
    const CUresult status = describe(TEXTURES, pResDesc, texObject, &found);
    if (status == CUDA_SUCCESS) memcpy(pResDesc, &found.resource, sizeof found.resource);
    return status;
}

CUresult cuTexObjectGetTextureDesc(void *pTexDesc, unsigned long long texObject)
{
    struct object found;
    const CUresult status = describe(TEXTURES, pTexDesc, texObject, &found);
    if (status == CUDA_SUCCESS) memcpy(pTexDesc, &found.texture, sizeof found.texture);
    return status;
}

/* Documented to fail for an object that was made without one. */
CUresult cuTexObjectGetResourceViewDesc(void *pResViewDesc, unsigned long long texObject)
{
    struct object found;
    const CUresult status = describe(TEXTURES, pResViewDesc, texObject, &found);
    if (status != CUDA_SUCCESS) return status;
    if (!found.has_view) return CUDA_ERROR_INVALID_VALUE;
    memcpy(pResViewDesc, &found.view, sizeof found.view);
    return CUDA_SUCCESS;
}

CUresult cuSurfObjectGetResourceDesc(void *pResDesc, unsigned long long surfObject)
{
    struct object found;
    const CUresult status = describe(SURFACES, pResDesc, surfObject, &found);
    if (status == CUDA_SUCCESS) memcpy(pResDesc, &found.resource, sizeof found.resource);
    return status;
}
