/* SPDX-License-Identifier: Apache-2.0 */
/*
 * array.c - CUDA arrays: memory whose layout is the driver's own, read and written by copies, textures and surfaces.
 *
 * What an array was made of is kept here, so its description and the bounds of copies are answered without asking. Nothing
 * else of it is known: a program has no address of it.
 */
#include "array.h"

#include <stdlib.h>

#include "../../transport/code_wire.h"
#include "_generated_prototypes.h"

static struct shim_object *object_of(CUarray array) { return shim_object(VGPU_KIND_ARRAY, (uint64_t)(uintptr_t)array); }

static const CUDA_ARRAY3D_DESCRIPTOR *description_of(CUarray array)
{
    const struct shim_object *object = object_of(array);
    return object == NULL ? NULL : object->data;
}

static void forget(struct shim_object *object)
{
    void *description = object->data;
    shim_handle_free(object->handle);
    free(description);
}

static void collect(struct shim_object *object, void *context)
{
    if (object->context == *(uint64_t *)context) forget(object);
}

static void forget_context(uint64_t context) { shim_handle_each(VGPU_KIND_ARRAY, collect, &context); }

static pthread_once_t hooked = PTHREAD_ONCE_INIT;
static void hook(void) { shim_on_context_end(forget_context); }

/* What the driver would refuse at a glance; sizes it knows best itself. */
static CUresult check_description(const CUDA_ARRAY3D_DESCRIPTOR *asked)
{
    if (asked->Width == 0 || (asked->NumChannels != 1 && asked->NumChannels != 2 && asked->NumChannels != 4)) return CUDA_ERROR_INVALID_VALUE;
    if (vgpu_format_bytes(asked->Format) == 0 || (asked->Flags & ~VGPU_ARRAY_FLAGS) != 0) return shim_refuse(VGPU_CALL_cuArray3DCreate_v2);
    return CUDA_SUCCESS;
}

static CUresult create(void *pHandle, const CUDA_ARRAY3D_DESCRIPTOR *asked)
{
    CUresult status = check_description(asked);
    if (status != CUDA_SUCCESS) return status;
    pthread_once(&hooked, hook);
    CUDA_ARRAY3D_DESCRIPTOR *description = malloc(sizeof *description);
    if (description == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    *description = *asked;
    const uint64_t argument[8] = {asked->Width, asked->Height, asked->Depth, asked->Format, asked->NumChannels, asked->Flags};
    uint64_t value[4] = {0};
    status = shim_reply(VGPU_CALL_cuArray3DCreate_v2, argument, NULL, 0, value, NULL, 0, NULL);
    if (status == CUDA_SUCCESS && (vgpu_handle_kind(value[0]) != VGPU_KIND_ARRAY || !shim_handle_adopt(value[0], description)))
        status = CUDA_ERROR_OUT_OF_MEMORY;
    if (status != CUDA_SUCCESS) {
        free(description);
        return status;
    }
    *(CUarray *)pHandle = (CUarray)(uintptr_t)value[0];
    return CUDA_SUCCESS;
}

/* What every call that makes an array begins with. */
static CUresult enter(const void *pHandle, const void *pAllocateArray)
{
    CUresult status = shim_enter_context();
    if (status == CUDA_SUCCESS) status = shim_capture_check();
    if (status != CUDA_SUCCESS) return status;
    return pHandle == NULL || pAllocateArray == NULL ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuArray3DCreate_v2(void *pHandle, const void *pAllocateArray)
{
    CUresult status = enter(pHandle, pAllocateArray);
    if (status != CUDA_SUCCESS) return status;
    CUDA_ARRAY3D_DESCRIPTOR asked;
    memcpy(&asked, pAllocateArray, sizeof asked);
    return create(pHandle, &asked);
}

CUresult cuArrayCreate_v2(void *pHandle, const void *pAllocateArray)
{
    CUresult status = enter(pHandle, pAllocateArray);
    if (status != CUDA_SUCCESS) return status;
    CUDA_ARRAY_DESCRIPTOR flat;
    memcpy(&flat, pAllocateArray, sizeof flat);
    const CUDA_ARRAY3D_DESCRIPTOR asked = {flat.Width, flat.Height, 0, flat.Format, flat.NumChannels, 0};
    return create(pHandle, &asked);
}

CUresult cuArrayDestroy(CUarray hArray)
{
    CUresult status = shim_enter_context();
    if (status == CUDA_SUCCESS) status = shim_capture_check();
    if (status != CUDA_SUCCESS) return status;
    /* Taken out first: once the worker has destroyed it, another thread may be given an array at its place. */
    static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    pthread_mutex_lock(&mutex);
    const struct shim_object *object = object_of(hArray);
    const uint64_t handle = (uint64_t)(uintptr_t)hArray;
    uint64_t context = 0;
    void *description = NULL; /* every array has one */
    if (object != NULL) {
        context = object->context;
        description = object->data;
        shim_handle_free(handle);
    }
    pthread_mutex_unlock(&mutex);
    if (description == NULL) return CUDA_ERROR_INVALID_HANDLE;
    const uint64_t argument[8] = {handle};
    status = shim_reply(VGPU_CALL_cuArrayDestroy, argument, NULL, 0, NULL, NULL, 0, NULL);
    if (status != CUDA_SUCCESS && shim_handle_adopt(handle, description))
        object_of(hArray)->context = context; /* it is still there, and so is its place */
    else
        free(description);
    return status;
}

CUresult cuArray3DGetDescriptor_v2(void *pArrayDescriptor, CUarray hArray)
{
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    if (pArrayDescriptor == NULL) return CUDA_ERROR_INVALID_VALUE;
    const CUDA_ARRAY3D_DESCRIPTOR *description = description_of(hArray);
    if (description == NULL) return CUDA_ERROR_INVALID_HANDLE;
    memcpy(pArrayDescriptor, description, sizeof *description);
    return CUDA_SUCCESS;
}

/* It is defined for arrays that are given memory later (CUDA_ARRAY3D_DEFERRED_MAPPING), and there are none here. */
CUresult cuArrayGetMemoryRequirements(void *memoryRequirements, CUarray array, int device)
{
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    if (memoryRequirements == NULL) return CUDA_ERROR_INVALID_VALUE;
    if (device != 0) return CUDA_ERROR_INVALID_DEVICE;
    return description_of(array) == NULL ? CUDA_ERROR_INVALID_HANDLE : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuArrayGetDescriptor_v2(void *pArrayDescriptor, CUarray hArray)
{
    CUDA_ARRAY3D_DESCRIPTOR whole;
    CUresult status = cuArray3DGetDescriptor_v2(pArrayDescriptor == NULL ? NULL : &whole, hArray);
    if (status != CUDA_SUCCESS) return status;
    const CUDA_ARRAY_DESCRIPTOR flat = {whole.Width, whole.Height, whole.Format, whole.NumChannels};
    memcpy(pArrayDescriptor, &flat, sizeof flat);
    return CUDA_SUCCESS;
}

static bool fits(uint64_t at, uint64_t size, uint64_t whole) { return size <= whole && at <= whole - size; }

CUresult array_check(const struct array_box *box, uint64_t width, uint64_t height, uint64_t depth)
{
    if (box->array == NULL) return CUDA_ERROR_INVALID_VALUE; /* as the driver says (measured on 580) */
    const CUDA_ARRAY3D_DESCRIPTOR *whole = description_of(box->array);
    if (whole == NULL) return CUDA_ERROR_INVALID_HANDLE;
    const uint64_t element = (uint64_t)vgpu_format_bytes(whole->Format) * whole->NumChannels;
    if (box->x % element != 0 || width % element != 0) return CUDA_ERROR_INVALID_VALUE;
    return fits(box->x, width, whole->Width * element) && fits(box->y, height, whole->Height != 0 ? whole->Height : 1) &&
                   fits(box->z, depth, whole->Depth != 0 ? whole->Depth : 1)
               ? CUDA_SUCCESS
               : CUDA_ERROR_INVALID_VALUE;
}

/* ---- copies of a row, between an array of one dimension and memory ---- */

struct line { /* CUDA_MEMCPY3D's fields of one side */
    unsigned int type;
    uint64_t x;
    const void *host;
    CUdeviceptr device;
    CUarray array;
};

static CUresult check_line(const struct line *line)
{
    if (line->type != CU_MEMORYTYPE_ARRAY) return CUDA_SUCCESS;
    if (line->array == NULL) return CUDA_ERROR_INVALID_VALUE;
    const CUDA_ARRAY3D_DESCRIPTOR *description = description_of(line->array);
    if (description == NULL) return CUDA_ERROR_INVALID_HANDLE;
    return description->Height > 1 || description->Depth > 1 ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

static CUresult copy_line(const struct line *to, const struct line *from, size_t count, bool blocking, CUstream stream)
{
    CUresult status = shim_enter_context();
    if (status == CUDA_SUCCESS) status = check_line(to);
    if (status == CUDA_SUCCESS) status = check_line(from);
    if (status != CUDA_SUCCESS) return status;
    CUDA_MEMCPY3D copy;
    memset(&copy, 0, sizeof copy);
    copy.srcMemoryType = from->type;
    copy.srcXInBytes = from->x;
    copy.srcHost = from->host;
    copy.srcDevice = from->device;
    copy.srcArray = from->array;
    copy.dstMemoryType = to->type;
    copy.dstXInBytes = to->x;
    copy.dstHost = (void *)(uintptr_t)to->host;
    copy.dstDevice = to->device;
    copy.dstArray = to->array;
    copy.WidthInBytes = count;
    copy.Height = copy.Depth = 1;
    return blocking ? cuMemcpy3D_v2(&copy) : cuMemcpy3DAsync_v2(&copy, stream);
}

static struct line of_array(CUarray array, size_t offset) { return (struct line){.type = CU_MEMORYTYPE_ARRAY, .x = offset, .array = array}; }
static struct line of_host(const void *host) { return (struct line){.type = CU_MEMORYTYPE_HOST, .host = host}; }
static struct line of_device(CUdeviceptr device) { return (struct line){.type = CU_MEMORYTYPE_DEVICE, .device = device}; }

CUresult cuMemcpyHtoA_v2(CUarray dstArray, size_t dstOffset, const void *srcHost, size_t ByteCount)
{
    const struct line to = of_array(dstArray, dstOffset), from = of_host(srcHost);
    return copy_line(&to, &from, ByteCount, true, NULL);
}

CUresult cuMemcpyAtoH_v2(void *dstHost, CUarray srcArray, size_t srcOffset, size_t ByteCount)
{
    const struct line to = of_host(dstHost), from = of_array(srcArray, srcOffset);
    return copy_line(&to, &from, ByteCount, true, NULL);
}

CUresult cuMemcpyDtoA_v2(CUarray dstArray, size_t dstOffset, CUdeviceptr srcDevice, size_t ByteCount)
{
    const struct line to = of_array(dstArray, dstOffset), from = of_device(srcDevice);
    return copy_line(&to, &from, ByteCount, true, NULL);
}

CUresult cuMemcpyAtoD_v2(CUdeviceptr dstDevice, CUarray srcArray, size_t srcOffset, size_t ByteCount)
{
    const struct line to = of_device(dstDevice), from = of_array(srcArray, srcOffset);
    return copy_line(&to, &from, ByteCount, true, NULL);
}

CUresult cuMemcpyAtoA_v2(CUarray dstArray, size_t dstOffset, CUarray srcArray, size_t srcOffset, size_t ByteCount)
{
    const struct line to = of_array(dstArray, dstOffset), from = of_array(srcArray, srcOffset);
    return copy_line(&to, &from, ByteCount, true, NULL);
}

CUresult cuMemcpyHtoAAsync_v2(CUarray dstArray, size_t dstOffset, const void *srcHost, size_t ByteCount, CUstream hStream)
{
    const struct line to = of_array(dstArray, dstOffset), from = of_host(srcHost);
    return copy_line(&to, &from, ByteCount, false, hStream);
}

CUresult cuMemcpyAtoHAsync_v2(void *dstHost, CUarray srcArray, size_t srcOffset, size_t ByteCount, CUstream hStream)
{
    const struct line to = of_host(dstHost), from = of_array(srcArray, srcOffset);
    return copy_line(&to, &from, ByteCount, false, hStream);
}
