/* SPDX-License-Identifier: Apache-2.0 */
/*
 * function.c - kernels and functions: look-up, the description that goes to the guest with it, attributes, names.
 *
 * The parameter table is the driver's own (cuKernelGetParamInfo, cuFuncGetParamInfo); it is kept here as well, because a
 * launch's parameter bytes are checked against it before the driver reads as many.
 */
#include "code.h"

#define ENUMERATE_LIMIT (1u << 20)

static void *as_real(uintptr_t key) { return (void *)key; }

struct code_function *code_function_of(struct vgpu_replay *replay, uint64_t handle)
{
    void *real;
    bool is_kernel;
    if (!replay_function(replay, handle, &real, &is_kernel) || replay->code == NULL) return NULL;
    return code_map_get(&replay->code->functions, handle);
}

struct code_function *code_function_intern(struct vgpu_replay *replay, void *real, bool is_kernel, struct code_owner *owner)
{
    struct replay_code *code = code_of(replay);
    if (code == NULL || real == NULL) return NULL;
    const uint64_t handle = replay_intern(replay, is_kernel ? VGPU_KIND_KERNEL : VGPU_KIND_FUNCTION, real);
    if (handle == 0) return NULL;
    struct code_function *function = code_map_get(&code->functions, handle);
    if (function != NULL) return function;
    function = calloc(1, sizeof *function);
    if (function == NULL) return NULL;
    *function = (struct code_function){.handle = handle, .owner = owner->handle, .real = real, .is_kernel = is_kernel};
    if (!code_map_put(&code->functions, handle, function)) {
        free(function);
        return NULL;
    }
    if (is_kernel) (void)code_map_put(&code->kernels, (uintptr_t)real, function);
    (void)code_list_add(&owner->functions, handle);
    return function;
}

void code_function_drop(struct vgpu_replay *replay, uint64_t handle)
{
    struct code_function *function = code_map_take(&replay->code->functions, handle);
    if (function == NULL) return;
    if (function->is_kernel && code_map_get(&replay->code->kernels, (uintptr_t)function->real) == function)
        (void)code_map_take(&replay->code->kernels, (uintptr_t)function->real);
    replay_unbind(replay, function->is_kernel ? VGPU_KIND_KERNEL : VGPU_KIND_FUNCTION, handle);
    free(function->parameter);
    free(function);
}

struct code_function *code_function_search(struct vgpu_replay *replay, void *real)
{
    struct replay_code *code = code_of(replay);
    if (code == NULL || real == NULL) return NULL;
    struct code_function *kernel = code_map_get(&code->kernels, (uintptr_t)real);
    if (kernel != NULL) return kernel;
    for (size_t i = 0; i < code->functions.capacity; i++) {
        struct code_function *known = code->functions.slot[i].value;
        if (code->functions.slot[i].key != 0 && !known->is_kernel && known->real == real && code_function_of(replay, known->handle) == known)
            return known;
    }
    for (size_t i = 0; i < code->kernels.capacity; i++) {
        if (code->kernels.slot[i].key == 0) continue;
        void *function = NULL;
        if (replay->driver.cuKernelGetFunction(&function, as_real(code->kernels.slot[i].key)) != 0 || function != real) continue;
        struct code_owner *owner = code_owner_of(replay, ((struct code_function *)code->kernels.slot[i].value)->owner);
        return owner == NULL ? NULL : code_function_intern(replay, real, false, owner);
    }
    return NULL;
}

static CUresult get_attribute(struct vgpu_replay *replay, const struct code_function *function, unsigned attribute, int *value)
{
    return (CUresult)(function->is_kernel ? replay->driver.cuKernelGetAttribute(value, attribute, function->real, replay->device)
                                          : replay->driver.cuFuncGetAttribute(value, attribute, function->real));
}

void code_function_describe(struct vgpu_replay *replay, struct code_function *function)
{
    if (function->described) return;
    int (*const info)(void *, size_t, void *, void *) =
        function->is_kernel ? replay->driver.cuKernelGetParamInfo : replay->driver.cuFuncGetParamInfo;
    uint32_t capacity = 0, count = 0, bytes = 0;
    CUresult status = CUDA_SUCCESS;
    while (count < VGPU_PARAMETER_COUNT_LIMIT) {
        size_t offset = 0, size = 0;
        status = (CUresult)info(function->real, count, &offset, &size);
        if (status != CUDA_SUCCESS) break; /* CUDA_ERROR_INVALID_VALUE past the last */
        if (offset > VGPU_PARAMETER_BYTES_LIMIT || size > VGPU_PARAMETER_BYTES_LIMIT - offset) {
            status = CUDA_ERROR_NOT_SUPPORTED;
            break;
        }
        if (count == capacity) {
            capacity = capacity == 0 ? 16 : capacity * 2;
            struct wire_parameter *grown = realloc(function->parameter, capacity * sizeof *grown);
            if (grown == NULL) {
                status = CUDA_ERROR_OUT_OF_MEMORY;
                break;
            }
            function->parameter = grown;
        }
        function->parameter[count++] = (struct wire_parameter){(uint32_t)offset, (uint32_t)size};
        if (offset + size > bytes) bytes = (uint32_t)(offset + size);
    }
    function->parameter_count = count;
    function->parameter_bytes = bytes;
    function->status = status == CUDA_ERROR_INVALID_VALUE ? CUDA_SUCCESS : status;
    /* Asking for the first attribute makes the driver load the function, as its first launch would. */
    int ignored;
    if (function->status == CUDA_SUCCESS) function->status = get_attribute(replay, function, 0, &ignored);
    if (function->status == CUDA_ERROR_NOT_SUPPORTED) function->status = CUDA_SUCCESS;
    function->described = true;
}

void code_function_answer(struct vgpu_replay *replay, struct code_function *function, struct vgpu_result *result, uint8_t *reply)
{
    code_function_describe(replay, function);
    struct wire_function wire = {
        .status = function->status,
        .parameter_count = function->parameter_count,
        .parameter_bytes = function->parameter_bytes,
    };
    for (unsigned i = 0; i < VGPU_FUNCTION_ATTRIBUTES; i++) {
        int value = 0;
        wire.attribute_status[i] = (uint16_t)get_attribute(replay, function, i, &value);
        wire.attribute[i] = value;
    }
    const uint32_t room = (VGPU_SLOT_PAYLOAD_LIMIT - (uint32_t)sizeof wire) / (uint32_t)sizeof(struct wire_parameter);
    wire.parameters_here = function->parameter_count < room ? function->parameter_count : room;
    memcpy(reply, &wire, sizeof wire);
    if (wire.parameters_here != 0) memcpy(reply + sizeof wire, function->parameter, wire.parameters_here * sizeof *function->parameter);
    result->payload_length = (uint16_t)(sizeof wire + wire.parameters_here * sizeof *function->parameter);
}

/* arguments: module or library; payload: the name */
CUresult replay_wireFunctionGet(REPLAY_PARAMETERS)
{
    struct code_owner *owner = code_owner_of(replay, call->argument[0]);
    if (owner == NULL) return CUDA_ERROR_INVALID_HANDLE;
    char *name = code_name(payload, call->payload_length);
    if (name == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    void *real = NULL;
    const CUresult status = (CUresult)(owner->is_library ? replay->driver.cuLibraryGetKernel(&real, owner->real, name)
                                                         : replay->driver.cuModuleGetFunction(&real, owner->real, name));
    free(name);
    if (status != CUDA_SUCCESS) return status;
    struct code_function *function = code_function_intern(replay, real, owner->is_library, owner);
    if (function == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    result->value[0] = function->handle;
    code_function_answer(replay, function, result, reply);
    return CUDA_SUCCESS;
}

struct replay_pace *replay_pace_of(struct vgpu_replay *replay, uint64_t handle)
{
    struct code_function *function = code_function_of(replay, handle);
    return function != NULL ? &function->pace : NULL;
}

CUresult replay_wireFunctionDescribe(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    struct code_function *function = code_function_of(replay, call->argument[0]);
    if (function == NULL) return CUDA_ERROR_INVALID_HANDLE;
    code_function_answer(replay, function, result, reply);
    return CUDA_SUCCESS;
}

CUresult replay_wireParameterInfo(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    struct code_function *function = code_function_of(replay, call->argument[0]);
    if (function == NULL) return CUDA_ERROR_INVALID_HANDLE;
    code_function_describe(replay, function);
    if (call->argument[1] >= function->parameter_count) return CUDA_ERROR_INVALID_VALUE;
    const uint32_t first = (uint32_t)call->argument[1], left = function->parameter_count - first;
    const uint32_t room = VGPU_SLOT_PAYLOAD_LIMIT / (uint32_t)sizeof(struct wire_parameter);
    const uint32_t here = left < room ? left : room;
    memcpy(reply, function->parameter + first, here * sizeof(struct wire_parameter));
    result->payload_length = (uint16_t)(here * sizeof(struct wire_parameter));
    return CUDA_SUCCESS;
}

CUresult replay_cuKernelGetFunction(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    const struct code_function *kernel = code_function_of(replay, call->argument[0]);
    struct code_owner *owner = kernel == NULL || !kernel->is_kernel ? NULL : code_owner_of(replay, kernel->owner);
    if (owner == NULL) return CUDA_ERROR_INVALID_HANDLE;
    void *real = NULL;
    const CUresult status = (CUresult)replay->driver.cuKernelGetFunction(&real, kernel->real);
    if (status != CUDA_SUCCESS) return status;
    struct code_function *function = code_function_intern(replay, real, false, owner);
    if (function == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    result->value[0] = function->handle;
    code_function_answer(replay, function, result, reply);
    return CUDA_SUCCESS;
}

/* arguments: owner, first, how many the guest has room for */
static CUresult enumerate(struct vgpu_replay *replay, const struct vgpu_call *call, struct vgpu_result *result, uint8_t *reply,
                          bool is_library, int (*list)(void *, unsigned, void *))
{
    struct code_owner *owner = code_owner_of(replay, call->argument[0]);
    if (owner == NULL || owner->is_library != is_library) return CUDA_ERROR_INVALID_HANDLE;
    const uint64_t first = call->argument[1], count = call->argument[2];
    if (count == 0 || count > ENUMERATE_LIMIT || first >= count) return CUDA_ERROR_INVALID_VALUE;
    void **real = calloc(count, sizeof *real);
    if (real == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    CUresult status = (CUresult)list(real, (unsigned)count, owner->real);
    uint32_t here = 0;
    for (uint64_t i = first; status == CUDA_SUCCESS && i < count && here < VGPU_SLOT_PAYLOAD_LIMIT / 8 && real[i] != NULL; i++) {
        const struct code_function *function = code_function_intern(replay, real[i], is_library, owner);
        if (function == NULL)
            status = CUDA_ERROR_OUT_OF_MEMORY;
        else
            memcpy(reply + 8 * here++, &function->handle, 8);
    }
    free(real);
    result->payload_length = (uint16_t)(8 * here);
    return status;
}

CUresult replay_cuModuleEnumerateFunctions(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    return enumerate(replay, call, result, reply, false, replay->driver.cuModuleEnumerateFunctions);
}

CUresult replay_cuLibraryEnumerateKernels(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    return enumerate(replay, call, result, reply, true, replay->driver.cuLibraryEnumerateKernels);
}

static struct code_function *of_kind(struct vgpu_replay *replay, uint64_t handle, bool is_kernel)
{
    struct code_function *function = code_function_of(replay, handle);
    return function != NULL && function->is_kernel == is_kernel ? function : NULL;
}

CUresult replay_cuKernelGetAttribute(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    const struct code_function *kernel = of_kind(replay, call->argument[0], true);
    if (kernel == NULL) return CUDA_ERROR_INVALID_HANDLE;
    int value = 0;
    const CUresult status = get_attribute(replay, kernel, (unsigned)call->argument[1], &value);
    result->value[0] = (uint32_t)value;
    return status;
}

CUresult replay_cuFuncGetAttribute(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    const struct code_function *function = of_kind(replay, call->argument[0], false);
    if (function == NULL) return CUDA_ERROR_INVALID_HANDLE;
    int value = 0;
    const CUresult status = get_attribute(replay, function, (unsigned)call->argument[1], &value);
    result->value[0] = (uint32_t)value;
    return status;
}

CUresult replay_cuKernelSetAttribute(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    const struct code_function *kernel = of_kind(replay, call->argument[0], true);
    if (kernel == NULL) return CUDA_ERROR_INVALID_HANDLE;
    return (CUresult)replay->driver.cuKernelSetAttribute((unsigned)call->argument[1], (int)call->argument[2], kernel->real, replay->device);
}

CUresult replay_cuFuncSetAttribute(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    const struct code_function *function = of_kind(replay, call->argument[0], false);
    if (function == NULL) return CUDA_ERROR_INVALID_HANDLE;
    return (CUresult)replay->driver.cuFuncSetAttribute(function->real, (unsigned)call->argument[1], (int)call->argument[2]);
}

CUresult replay_cuFuncSetCacheConfig(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    const struct code_function *function = code_function_of(replay, call->argument[0]);
    if (function == NULL) return CUDA_ERROR_INVALID_HANDLE;
    const unsigned config = (unsigned)call->argument[1];
    return (CUresult)(function->is_kernel ? replay->driver.cuKernelSetCacheConfig(function->real, config, replay->device)
                                          : replay->driver.cuFuncSetCacheConfig(function->real, config));
}

CUresult replay_cuFuncSetSharedMemConfig(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    const struct code_function *function = of_kind(replay, call->argument[0], false);
    if (function == NULL) return CUDA_ERROR_INVALID_HANDLE;
    return (CUresult)replay->driver.cuFuncSetSharedMemConfig(function->real, (unsigned)call->argument[1]);
}

CUresult replay_cuKernelGetName(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    const struct code_function *kernel = of_kind(replay, call->argument[0], true);
    if (kernel == NULL) return CUDA_ERROR_INVALID_HANDLE;
    const char *name = NULL;
    const CUresult status = (CUresult)replay->driver.cuKernelGetName(&name, kernel->real);
    return status != CUDA_SUCCESS ? status : code_text_answer(replay, name, result, reply);
}

CUresult replay_cuFuncGetName(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    const struct code_function *function = of_kind(replay, call->argument[0], false);
    if (function == NULL) return CUDA_ERROR_INVALID_HANDLE;
    const char *name = NULL;
    const CUresult status = (CUresult)replay->driver.cuFuncGetName(&name, function->real);
    return status != CUDA_SUCCESS ? status : code_text_answer(replay, name, result, reply);
}
