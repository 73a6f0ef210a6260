/* SPDX-License-Identifier: Apache-2.0 */
/*
 * function.c - kernels and functions as the guest knows them: parameter table, attributes, names (cuFunc*).
 *
 * A look-up brings the whole description along, so that launches can be packed and refused, and attributes answered,
 * without a word to the worker. Setting an attribute is one asynchronous record when the value is sure to be taken, and
 * a round trip when it may be refused. A CUkernel where a CUfunction is asked for is refused here, as the driver does;
 * launches and occupancy take both.
 */
#include "code.h"

#include <stdlib.h>

enum { SHARED_SIZE = 1, MAXIMUM_DYNAMIC_SHARED = 8, CARVEOUT = 9 };
#define DEVICE_SHARED_OPTIN 97 /* CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN */

static unsigned bucket_of(const char *name)
{
    uint32_t hash = 2166136261u; /* FNV-1a */
    for (; *name != 0; name++) hash = (hash ^ (uint8_t)*name) * 16777619u;
    return hash % SHIM_CODE_BUCKETS;
}

static struct shim_function *function_of(CUfunction function)
{
    return vgpu_handle_kind((uint64_t)(uintptr_t)function) == VGPU_KIND_FUNCTION ? shim_function_of(function) : NULL;
}

/* Fills in what the worker said. Under the mutex; a second description of the same function is dropped. */
static bool take_description(struct shim_function *function, const uint8_t *reply, uint32_t length)
{
    struct wire_function wire;
    if (length < sizeof wire) return false;
    memcpy(&wire, reply, sizeof wire);
    if (wire.parameter_count > VGPU_PARAMETER_COUNT_LIMIT || wire.parameters_here > wire.parameter_count) return false;
    if ((length - sizeof wire) / sizeof(struct wire_parameter) < wire.parameters_here) return false;
    struct wire_parameter *parameter = calloc(wire.parameter_count + 1, sizeof *parameter);
    if (parameter == NULL) return false;
    memcpy(parameter, reply + sizeof wire, wire.parameters_here * sizeof *parameter);
    for (uint32_t first = wire.parameters_here; first < wire.parameter_count;) {
        const uint64_t argument[8] = {function->handle, first};
        uint32_t got = 0;
        const CUresult status = shim_reply(VGPU_CALL_wireParameterInfo, argument, NULL, 0, NULL, parameter + first,
                                           (wire.parameter_count - first) * (uint32_t)sizeof *parameter, &got);
        if (status != CUDA_SUCCESS || got < sizeof *parameter) {
            free(parameter);
            return false;
        }
        first += got / (uint32_t)sizeof *parameter;
    }
    for (uint32_t i = 0; i < wire.parameter_count; i++) {
        /* A worker that is not ours to trust blindly: the packing loop writes at these offsets. */
        if (parameter[i].size > VGPU_PARAMETER_BYTES_LIMIT || parameter[i].offset > VGPU_PARAMETER_BYTES_LIMIT ||
            parameter[i].offset + parameter[i].size > wire.parameter_bytes ||
            wire.parameter_bytes > VGPU_PARAMETER_BYTES_LIMIT + 64) {
            free(parameter);
            return false;
        }
    }
    pthread_mutex_lock(&shim_code_mutex);
    if (atomic_load_explicit(&function->described, memory_order_relaxed) != 0) {
        free(parameter);
    } else {
        function->status = (CUresult)wire.status;
        function->parameter_count = wire.parameter_count;
        function->parameter_bytes = wire.parameter_bytes;
        function->parameter = parameter;
        for (unsigned i = 0; i < VGPU_FUNCTION_ATTRIBUTES; i++) {
            atomic_store_explicit(&function->attribute[i], wire.attribute[i], memory_order_relaxed);
            atomic_store_explicit(&function->attribute_status[i], wire.attribute_status[i], memory_order_relaxed);
        }
        atomic_store_explicit(&function->described, 1, memory_order_release);
    }
    pthread_mutex_unlock(&shim_code_mutex);
    return true;
}

CUresult shim_function_describe_slow(struct shim_function *function)
{
    const uint64_t argument[8] = {function->handle};
    uint8_t reply[VGPU_SLOT_PAYLOAD_LIMIT];
    uint32_t length = 0;
    const CUresult status = shim_reply(VGPU_CALL_wireFunctionDescribe, argument, NULL, 0, NULL, reply, sizeof reply, &length);
    if (status != CUDA_SUCCESS) return status;
    return take_description(function, reply, length) ? CUDA_SUCCESS : CUDA_ERROR_UNKNOWN;
}

/* Under shim_code_mutex. */
static struct shim_function *known_by_name(struct shim_code *owner, const char *name)
{
    for (struct shim_function *f = owner->bucket[bucket_of(name)]; f != NULL; f = f->next) {
        const char *own = atomic_load_explicit(&f->name, memory_order_relaxed);
        /* A kernel and its function have one name: a library hands out kernels, a module functions. */
        const unsigned wanted = vgpu_handle_kind(owner->handle) == VGPU_KIND_LIBRARY ? VGPU_KIND_KERNEL : VGPU_KIND_FUNCTION;
        if (own != NULL && vgpu_handle_kind(f->handle) == wanted && strcmp(own, name) == 0) return f;
    }
    return NULL;
}

struct shim_function *shim_function_adopt(uint64_t handle, struct shim_code *owner, const char *name, const uint8_t *reply,
                                          uint32_t length)
{
    const unsigned kind = vgpu_handle_kind(handle);
    if (kind != VGPU_KIND_FUNCTION && kind != VGPU_KIND_KERNEL) return NULL;
    pthread_mutex_lock(&shim_code_mutex);
    struct shim_object *object = shim_object(kind, handle);
    struct shim_function *function = object == NULL ? NULL : object->data;
    if (function == NULL && (function = calloc(1, sizeof *function)) != NULL) {
        function->handle = handle;
        function->owner = owner;
        if (name != NULL) atomic_store_explicit(&function->name, strdup(name), memory_order_relaxed);
        for (unsigned i = 0; i < VGPU_FUNCTION_ATTRIBUTES; i++)
            atomic_store_explicit(&function->attribute_status[i], SHIM_ATTRIBUTE_UNKNOWN, memory_order_relaxed);
        if (shim_handle_adopt(handle, function)) {
            const unsigned bucket = name == NULL ? 0 : bucket_of(name);
            function->next = owner->bucket[bucket];
            owner->bucket[bucket] = function;
        } else {
            free(atomic_load_explicit(&function->name, memory_order_relaxed));
            free(function);
            function = NULL;
        }
    }
    pthread_mutex_unlock(&shim_code_mutex);
    if (function != NULL && reply != NULL && atomic_load_explicit(&function->described, memory_order_acquire) == 0)
        (void)take_description(function, reply, length); /* else it is asked for again when needed */
    return function;
}

CUresult shim_function_get(struct shim_code *owner, const char *name, struct shim_function **out)
{
    pthread_mutex_lock(&shim_code_mutex);
    *out = known_by_name(owner, name);
    pthread_mutex_unlock(&shim_code_mutex);
    if (*out != NULL) return CUDA_SUCCESS;
    const size_t name_length = strlen(name);
    if (name_length > VGPU_INLINE_LIMIT) return CUDA_ERROR_NOT_FOUND;
    const uint64_t argument[8] = {owner->handle};
    uint64_t value[4] = {0};
    uint8_t reply[VGPU_SLOT_PAYLOAD_LIMIT];
    uint32_t length = 0;
    const CUresult status =
        shim_reply(VGPU_CALL_wireFunctionGet, argument, name, (uint32_t)name_length, value, reply, sizeof reply, &length);
    if (status != CUDA_SUCCESS) return status;
    *out = shim_function_adopt(value[0], owner, name, reply, length);
    return *out == NULL ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

CUresult shim_function_enumerate(struct shim_code *owner, unsigned call, void **out, uint32_t capacity)
{
    for (uint32_t first = 0; first < capacity;) {
        const uint64_t argument[8] = {owner->handle, first, capacity};
        uint64_t handles[VGPU_SLOT_PAYLOAD_LIMIT / 8];
        uint32_t length = 0;
        const CUresult status = shim_reply(call, argument, NULL, 0, NULL, handles, sizeof handles, &length);
        if (status != CUDA_SUCCESS) return status;
        if (length < 8) break; /* fewer than asked for: the rest of the caller's array stays as it is */
        for (uint32_t i = 0; i < length / 8 && first < capacity; i++, first++) {
            if (shim_function_adopt(handles[i], owner, NULL, NULL, 0) == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
            out[first] = (void *)(uintptr_t)handles[i];
        }
    }
    return CUDA_SUCCESS;
}

CUresult shim_function_attribute(struct shim_function *function, unsigned attribute, int *value)
{
    if (attribute >= VGPU_FUNCTION_ATTRIBUTES) return CUDA_ERROR_INVALID_VALUE;
    CUresult status = shim_function_describe(function);
    if (status != CUDA_SUCCESS) return status;
    uint32_t known = atomic_load_explicit(&function->attribute_status[attribute], memory_order_acquire);
    if (known == SHIM_ATTRIBUTE_UNKNOWN) { /* somebody set it and the worker may have rounded: ask again */
        const uint64_t argument[8] = {function->handle, attribute};
        const unsigned call = vgpu_handle_kind(function->handle) == VGPU_KIND_KERNEL ? VGPU_CALL_cuKernelGetAttribute
                                                                                      : VGPU_CALL_cuFuncGetAttribute;
        uint64_t answer[4] = {0};
        status = shim_reply(call, argument, NULL, 0, answer, NULL, 0, NULL);
        if (status != CUDA_SUCCESS) return status;
        atomic_store_explicit(&function->attribute[attribute], (int32_t)answer[0], memory_order_relaxed);
        atomic_store_explicit(&function->attribute_status[attribute], CUDA_SUCCESS, memory_order_release);
        known = CUDA_SUCCESS;
    }
    if (known == CUDA_SUCCESS) *value = atomic_load_explicit(&function->attribute[attribute], memory_order_relaxed);
    return (CUresult)known;
}

/* Will the driver take this value? Only what is certain; everything else is asked. */
static bool surely_accepted(struct shim_function *function, unsigned attribute, int value)
{
    if (attribute == CARVEOUT) return value >= -1 && value <= 100;
    if (attribute != MAXIMUM_DYNAMIC_SHARED || value < 0 || shim.device->attribute_valid[DEVICE_SHARED_OPTIN] == 0) return false;
    if (atomic_load_explicit(&function->attribute_status[SHARED_SIZE], memory_order_relaxed) != CUDA_SUCCESS) return false;
    const int64_t fixed = atomic_load_explicit(&function->attribute[SHARED_SIZE], memory_order_relaxed);
    return fixed + value <= shim.device->attribute[DEVICE_SHARED_OPTIN];
}

static void note_attribute(struct shim_function *function, unsigned attribute, int value, bool sure)
{
    if (function == NULL) return;
    if (sure) atomic_store_explicit(&function->attribute[attribute], value, memory_order_relaxed);
    if (atomic_load_explicit(&function->described, memory_order_acquire) != 0)
        atomic_store_explicit(&function->attribute_status[attribute], sure ? (uint32_t)CUDA_SUCCESS : SHIM_ATTRIBUTE_UNKNOWN,
                              memory_order_release);
    shim_function_forget_occupancy(function);
}

CUresult shim_function_set_attribute(struct shim_function *function, unsigned attribute, int value)
{
    if (attribute >= VGPU_FUNCTION_ATTRIBUTES) return CUDA_ERROR_INVALID_VALUE;
    CUresult status = shim_function_describe(function);
    if (status != CUDA_SUCCESS) return status;
    struct shim_function *peer = atomic_load_explicit(&function->peer, memory_order_acquire);
    const bool sure = surely_accepted(function, attribute, value);
    /* Libraries set the same value before every launch: what is so already needs no record. A kernel whose function
     * has been set separately is not skipped, because setting the kernel sets both. */
    if (sure && peer == NULL && atomic_load_explicit(&function->attribute_status[attribute], memory_order_acquire) == CUDA_SUCCESS &&
        atomic_load_explicit(&function->attribute[attribute], memory_order_relaxed) == value)
        return CUDA_SUCCESS;
    const bool is_kernel = vgpu_handle_kind(function->handle) == VGPU_KIND_KERNEL;
    const unsigned call = is_kernel ? VGPU_CALL_cuKernelSetAttribute : VGPU_CALL_cuFuncSetAttribute;
    const uint64_t argument[8] = {function->handle, attribute, (uint64_t)(int64_t)value};
    if (sure)
        status = shim_async(call, argument, NULL, 0);
    else
        status = shim_reply(call, argument, NULL, 0, NULL, NULL, 0, NULL);
    if (status != CUDA_SUCCESS) return status;
    note_attribute(function, attribute, value, sure);
    note_attribute(peer, attribute, value, false);
    return CUDA_SUCCESS;
}

CUresult shim_function_parameter(struct shim_function *function, size_t index, size_t *offset, size_t *size)
{
    if (offset == NULL) return CUDA_ERROR_INVALID_VALUE;
    const CUresult status = shim_function_describe(function);
    if (status != CUDA_SUCCESS) return status;
    if (function->status != CUDA_SUCCESS) return function->status;
    if (index >= function->parameter_count) return CUDA_ERROR_INVALID_VALUE;
    *offset = function->parameter[index].offset;
    if (size != NULL) *size = function->parameter[index].size;
    return CUDA_SUCCESS;
}

CUresult shim_function_name(struct shim_function *function, unsigned call, const char **name)
{
    char *known = atomic_load_explicit(&function->name, memory_order_acquire);
    if (known == NULL) {
        const uint64_t argument[8] = {function->handle};
        char text[VGPU_SLOT_PAYLOAD_LIMIT + 1];
        uint64_t value[4] = {0};
        uint32_t length = 0;
        CUresult status = shim_reply(call, argument, NULL, 0, value, text, VGPU_SLOT_PAYLOAD_LIMIT, &length);
        if (status != CUDA_SUCCESS) return status;
        text[length] = 0;
        char *fresh;
        if (value[0] != 0) { /* longer than a slot: value[0] names a blob of value[1] bytes */
            if (value[1] > VGPU_LOG_LIMIT || (fresh = calloc(1, value[1] + 1)) == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
            status = shim_blob_read(value[0], fresh, value[1]);
            (void)shim_blob_free(value[0]);
            if (status != CUDA_SUCCESS) {
                free(fresh);
                return status;
            }
        } else if ((fresh = strdup(text)) == NULL) {
            return CUDA_ERROR_OUT_OF_MEMORY;
        }
        if (atomic_compare_exchange_strong(&function->name, &known, fresh))
            known = fresh;
        else
            free(fresh);
    }
    *name = known;
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *pi, unsigned int attrib, CUfunction hfunc)
{
    const CUresult status = shim_enter(); /* any context, or none */
    if (status != CUDA_SUCCESS) return status;
    if (pi == NULL) return CUDA_ERROR_INVALID_VALUE;
    struct shim_function *function = function_of(hfunc);
    return function == NULL ? CUDA_ERROR_INVALID_HANDLE : shim_function_attribute(function, attrib, pi);
}

CUresult cuFuncSetAttribute(CUfunction hfunc, unsigned int attrib, int value)
{
    const CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    struct shim_function *function = function_of(hfunc);
    return function == NULL ? CUDA_ERROR_INVALID_HANDLE : shim_function_set_attribute(function, attrib, value);
}

/* Two preferences that the hardware of today ignores or takes as a hint; a wrong value is refused without asking. */
static CUresult set_preference(CUfunction function, unsigned call, unsigned config, unsigned largest)
{
    const CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    if (shim_function_of(function) == NULL) return CUDA_ERROR_INVALID_HANDLE;
    if (config > largest) return CUDA_ERROR_INVALID_VALUE;
    const uint64_t argument[8] = {(uint64_t)(uintptr_t)function, config};
    return shim_async(call, argument, NULL, 0);
}

CUresult cuFuncSetCacheConfig(CUfunction hfunc, unsigned int config)
{
    return set_preference(hfunc, VGPU_CALL_cuFuncSetCacheConfig, config, 3);
}

CUresult cuFuncSetSharedMemConfig(CUfunction hfunc, unsigned int config)
{
    return set_preference(hfunc, VGPU_CALL_cuFuncSetSharedMemConfig, config, 2);
}

CUresult cuFuncGetModule(void *hmod, CUfunction hfunc)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    if (hmod == NULL) return CUDA_ERROR_INVALID_VALUE;
    const struct shim_function *function = function_of(hfunc);
    if (function == NULL) return CUDA_ERROR_INVALID_HANDLE;
    if (vgpu_handle_kind(function->owner->handle) == VGPU_KIND_LIBRARY)
        return cuLibraryGetModule(hmod, CODE_HANDLE(CUlibrary, function->owner->handle));
    *(CUmodule *)hmod = CODE_HANDLE(CUmodule, function->owner->handle);
    return CUDA_SUCCESS;
}

CUresult cuFuncGetName(void *name, CUfunction hfunc)
{
    const CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    if (name == NULL) return CUDA_ERROR_INVALID_VALUE;
    struct shim_function *function = function_of(hfunc);
    if (function == NULL) return CUDA_ERROR_INVALID_HANDLE;
    return shim_function_name(function, VGPU_CALL_cuFuncGetName, name);
}

CUresult cuFuncGetParamInfo(CUfunction func, size_t paramIndex, void *paramOffset, void *paramSize)
{
    const CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    struct shim_function *function = function_of(func);
    return function == NULL ? CUDA_ERROR_INVALID_HANDLE : shim_function_parameter(function, paramIndex, paramOffset, paramSize);
}
