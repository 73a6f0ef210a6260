/* SPDX-License-Identifier: Apache-2.0 */
/* What the answered slots of the private tables do.  Everything is answered here in the guest; only loading a module, which
 * goes the way of cuModuleLoadData, reaches the host. */
#include "private_slots.h"

#include <stdlib.h>
#include <string.h>

#include "context_storage.h"

enum {
    /* The runtime wants at least 567 flags today (13.5) and grows by some twenty a release. */
    API_FLAGS = 1024,
    DOMAIN_FLAGS = 14,
    EVEN_SPREAD_GPCS = 8,
};

/* ---- CUDART_INTERFACE ---- */

CUresult vgpu_cudart_load_module(CUmodule *module, const void *wrapper)
{
    if (module == NULL || wrapper == NULL)
        return CUDA_ERROR_INVALID_VALUE;
    if (shim_is_torn_down())
        return CUDA_ERROR_DEINITIALIZED;
    return shim_module_load_image(module, wrapper);
}

CUresult vgpu_cudart_primary_context(CUcontext *context, CUdevice device)
{
    if (context == NULL)
        return CUDA_ERROR_INVALID_VALUE;
    if (shim_is_torn_down())
        return CUDA_ERROR_DEINITIALIZED;
    CUcontext handle = shim_primary_context_handle(device);
    if (handle == NULL)
        return CUDA_ERROR_INVALID_DEVICE;
    *context = handle;
    return CUDA_SUCCESS;
}

CUresult vgpu_cudart_load_module_extended(CUmodule *module, const void *wrapper, const void *variables,
                                          const void *sizes, uint32_t count)
{
    /* Tied to registered host variables, with a meaning nobody has published; the runtime passes zeros. */
    if (variables != NULL || sizes != NULL || count != 0) {
        shim_count_refused("cuGetExportTable 6bd5fb6c5bf4e74a8987d93912fd9df9[6] with host variables");
        return CUDA_ERROR_NOT_SUPPORTED;
    }
    return vgpu_cudart_load_module(module, wrapper);
}

void vgpu_cudart_module_unregistered(size_t module)
{
    (void)module; /* a notice: we keep nothing by module that would have to go */
}

CUresult vgpu_cudart_load_fatbin_extended(const void *fatbin, CUmodule *module, const void *variables,
                                          const void *sizes, uint32_t count)
{
    if (variables != NULL || sizes != NULL || count != 0) {
        shim_count_refused("cuGetExportTable 6bd5fb6c5bf4e74a8987d93912fd9df9[8] with host variables");
        return CUDA_ERROR_NOT_SUPPORTED;
    }
    return vgpu_cudart_load_module(module, fatbin);
}

CUresult vgpu_cudart_load_compilers(void)
{
    return CUDA_SUCCESS; /* PTX is compiled on the host: there is nothing to load here */
}

/* ---- TOOLS_RUNTIME_CALLBACK_HOOKS ---- */

/* One u32 per callback id, all zero: no profiler has subscribed, so the runtime never calls the notification slots. */
static uint32_t api_flags[API_FLAGS];
static uint32_t domain_flags[API_FLAGS];

void vgpu_hooks_api_flags(uint32_t **flags, size_t *count)
{
    if (flags != NULL)
        *flags = api_flags;
    if (count != NULL)
        *count = API_FLAGS;
}

void vgpu_hooks_domain_flags(uint32_t **flags, size_t *count)
{
    if (flags != NULL)
        *flags = domain_flags;
    if (count != NULL)
        *count = DOMAIN_FLAGS;
}

/* ---- TOOLS_TLS ---- */

CUresult vgpu_tools_thread_context(CUcontext *context)
{
    if (context == NULL)
        return CUDA_ERROR_INVALID_VALUE;
    if (shim_is_torn_down())
        return CUDA_ERROR_DEINITIALIZED;
    *context = shim_current_context(); /* NULL is an answer too: cuBLAS takes any error for "not supported" */
    return CUDA_SUCCESS;
}

/* ---- CONTEXT_CHECKS ---- */

CUresult vgpu_checks_is_derived(CUcontext context, uint32_t *derived, const void **object)
{
    (void)context;
    (void)object; /* never written: cuBLAS breaks on a null put there */
    if (derived == NULL)
        return CUDA_ERROR_INVALID_VALUE;
    if (shim_is_torn_down())
        return CUDA_ERROR_DEINITIALIZED;
    *derived = 0;
    return CUDA_SUCCESS;
}

uint32_t vgpu_checks_at_start(void)
{
    return 0;
}

/* ---- tools context ---- */

CUresult vgpu_tools_context_number(CUcontext context, uint32_t *number)
{
    /* Four bytes: some callers have room for no more. */
    return vgpu_context_storage_number(context, number);
}

/* The default streams are small numbers, or null; their objects must not be null, so each has a byte of its own here. */
static const char default_stream_objects[3];

CUresult vgpu_tools_stream_object(CUcontext context, CUstream stream, const void **object)
{
    (void)context;
    if (object == NULL)
        return CUDA_ERROR_INVALID_VALUE;
    uintptr_t handle = (uintptr_t)stream;
    if (handle == UINTPTR_MAX)
        return CUDA_ERROR_INVALID_HANDLE;
    if (handle < sizeof default_stream_objects)
        *object = &default_stream_objects[handle];
    else
        *object = stream;
    return CUDA_SUCCESS;
}

CUresult vgpu_tools_stream_number(CUcontext context, const void *object, uint32_t *number)
{
    (void)context;
    if (object == NULL || number == NULL)
        return CUDA_ERROR_INVALID_VALUE;
    /* Only passed on by callers, to tell streams apart in a profile. */
    uintptr_t first = (uintptr_t)default_stream_objects;
    uintptr_t value = (uintptr_t)object;
    *number = (uint32_t)(value >= first && value < first + sizeof default_stream_objects ? value - first : value);
    return CUDA_SUCCESS;
}

/* ---- tools module ---- */

struct visit {
    vgpu_tools_function_visitor visit;
    void *user;
    uint64_t owner;
};

static void pass_on(void *user, CUfunction function)
{
    const struct visit *visit = user;
    visit->visit(visit->user, function, visit->owner);
}

uint32_t vgpu_tools_module_functions(CUcontext context, CUmodule module, vgpu_tools_function_visitor visit, void *user)
{
    (void)context; /* a module knows its context */
    if (visit == NULL || shim_is_torn_down())
        return 0;
    struct visit bound = {.visit = visit, .user = user, .owner = (uint64_t)(uintptr_t)module};
    size_t count = 0;
    if (shim_module_functions(module, pass_on, &bound, &count) != CUDA_SUCCESS)
        return 0;
    return count > UINT32_MAX ? UINT32_MAX : (uint32_t)count;
}

/* ---- topology ---- */

CUresult vgpu_topology_get(uint8_t **gpc_of_tpc, uint8_t **index_in_gpc)
{
    if (gpc_of_tpc == NULL || index_in_gpc == NULL)
        return CUDA_ERROR_INVALID_VALUE;
    *gpc_of_tpc = NULL;
    *index_in_gpc = NULL;
    if (shim_is_torn_down())
        return CUDA_ERROR_DEINITIALIZED;
    const uint8_t *known_gpc = NULL;
    const uint8_t *known_index = NULL;
    size_t count = 0;
    if (shim_topology(&known_gpc, &known_index, &count) != 0 || count == 0)
        return CUDA_ERROR_INVALID_CONTEXT;
    uint8_t *gpc = malloc(count);
    uint8_t *index = malloc(count);
    if (gpc == NULL || index == NULL) {
        free(gpc);
        free(index);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    if (known_gpc != NULL && known_index != NULL) {
        memcpy(gpc, known_gpc, count);
        memcpy(index, known_index, count);
    } else {
        for (size_t i = 0; i < count; i++) {
            gpc[i] = (uint8_t)(i % EVEN_SPREAD_GPCS);
            index[i] = (uint8_t)(i / EVEN_SPREAD_GPCS);
        }
    }
    *gpc_of_tpc = gpc;
    *index_in_gpc = index;
    return CUDA_SUCCESS;
}

CUresult vgpu_topology_free(uint8_t *gpc_of_tpc, uint8_t *index_in_gpc)
{
    free(gpc_of_tpc);
    free(index_in_gpc);
    return CUDA_SUCCESS;
}
