/* SPDX-License-Identifier: Apache-2.0 */
/*
 * user_object.c - reference-counted objects of the program whose lives are tied to graphs (cuUserObject*).
 *
 * The counting is all here: the worker never sees an object. A graph holds references, its clones and instances hold
 * their own; when the last reference of all goes, the program's destroy function runs. References of an instance that
 * has been launched go only after the GPU has finished what was submitted, because a node may still use the object.
 */
#include "code.h"

#include <stdlib.h>

struct user_object {
    uint64_t handle;
    _Atomic uint64_t references;
    CUhostFn destroy;
    void *user;
};

struct shim_reference {
    struct shim_reference *next;
    struct user_object *object;
    uint64_t count;
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER; /* lists of references */

static struct user_object *object_of(uint64_t handle)
{
    struct shim_object *object = shim_object(VGPU_KIND_USEROBJECT, handle);
    return object == NULL ? NULL : object->data;
}

static void release(struct user_object *object, uint64_t count)
{
    if (atomic_fetch_sub(&object->references, count) != count) return;
    shim_handle_free(object->handle);
    object->destroy(object->user);
    free(object);
}

struct shim_reference *shim_references_copy(const struct shim_reference *from)
{
    struct shim_reference *copy = NULL;
    shim_references_join(&copy, from);
    return copy;
}

void shim_references_join(struct shim_reference **to, const struct shim_reference *from)
{
    pthread_mutex_lock(&mutex);
    for (; from != NULL; from = from->next) {
        struct shim_reference *copy = calloc(1, sizeof *copy);
        if (copy == NULL) break; /* the object may go early, which is the lesser evil than a leak for ever */
        atomic_fetch_add(&from->object->references, 1);
        *copy = (struct shim_reference){.next = *to, .object = from->object, .count = 1};
        *to = copy;
    }
    pthread_mutex_unlock(&mutex);
}

static void drop_all(void *list)
{
    struct shim_reference *reference = list;
    while (reference != NULL) {
        struct shim_reference *next = reference->next;
        release(reference->object, reference->count);
        free(reference);
        reference = next;
    }
}

void shim_references_drop(struct shim_reference *reference, bool deferred)
{
    if (reference == NULL) return;
    if (deferred)
        shim_callbacks_defer(drop_all, reference);
    else
        drop_all(reference);
}

CUresult cuUserObjectCreate(void *object_out, void *ptr, void *destroy, unsigned int initialRefcount, unsigned int flags)
{
    const CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    /* CU_USER_OBJECT_NO_DESTRUCTOR_SYNC (1) is the only flag, and must be given. */
    if (object_out == NULL || destroy == NULL || initialRefcount == 0 || flags != 1) return CUDA_ERROR_INVALID_VALUE;
    struct user_object *object = calloc(1, sizeof *object);
    if (object == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    atomic_store(&object->references, initialRefcount);
    memcpy(&object->destroy, &destroy, sizeof destroy);
    object->user = ptr;
    object->handle = shim_handle_new(VGPU_KIND_USEROBJECT, object, NULL);
    if (object->handle == 0) {
        free(object);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    *(CUuserObject *)object_out = CODE_HANDLE(CUuserObject, object->handle);
    return CUDA_SUCCESS;
}

CUresult cuUserObjectRetain(unsigned long long object, unsigned int count)
{
    const CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    struct user_object *found = object_of(object);
    if (found == NULL || count == 0) return CUDA_ERROR_INVALID_VALUE;
    atomic_fetch_add(&found->references, count);
    return CUDA_SUCCESS;
}

CUresult cuUserObjectRelease(unsigned long long object, unsigned int count)
{
    const CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    struct user_object *found = object_of(object);
    if (found == NULL || count == 0 || atomic_load(&found->references) < count) return CUDA_ERROR_INVALID_VALUE;
    release(found, count);
    return CUDA_SUCCESS;
}

CUresult cuGraphRetainUserObject(CUgraph graph, unsigned long long object, unsigned int count, unsigned int flags)
{
    const CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    struct shim_graph *owner = shim_graph_of(graph);
    struct user_object *found = object_of(object);
    /* CU_GRAPH_USER_OBJECT_MOVE (1): the caller's references become the graph's. */
    if (owner == NULL || found == NULL || count == 0 || flags > 1) return CUDA_ERROR_INVALID_VALUE;
    if (flags == 1 && atomic_load(&found->references) < count) return CUDA_ERROR_INVALID_VALUE;
    struct shim_reference *reference = calloc(1, sizeof *reference);
    if (reference == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    if (flags == 0) atomic_fetch_add(&found->references, count);
    pthread_mutex_lock(&mutex);
    *reference = (struct shim_reference){.next = owner->reference, .object = found, .count = count};
    owner->reference = reference;
    pthread_mutex_unlock(&mutex);
    return CUDA_SUCCESS;
}

CUresult cuGraphReleaseUserObject(CUgraph graph, unsigned long long object, unsigned int count)
{
    const CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    struct shim_graph *owner = shim_graph_of(graph);
    struct user_object *found = object_of(object);
    if (owner == NULL || found == NULL || count == 0) return CUDA_ERROR_INVALID_VALUE;
    pthread_mutex_lock(&mutex);
    uint64_t held = 0;
    for (const struct shim_reference *r = owner->reference; r != NULL; r = r->next)
        if (r->object == found) held += r->count;
    uint64_t left = held < count ? 0 : count;
    for (struct shim_reference **at = &owner->reference; left != 0 && *at != NULL;) {
        struct shim_reference *reference = *at;
        if (reference->object != found) {
            at = &reference->next;
            continue;
        }
        const uint64_t taken = reference->count < left ? reference->count : left;
        reference->count -= taken;
        left -= taken;
        if (reference->count == 0) {
            *at = reference->next;
            free(reference);
        } else {
            at = &reference->next;
        }
    }
    pthread_mutex_unlock(&mutex);
    if (held < count) return CUDA_ERROR_INVALID_VALUE;
    release(found, count);
    return CUDA_SUCCESS;
}
