/* SPDX-License-Identifier: Apache-2.0 */
/*
 * module.c - modules, and what modules and libraries share: loading an image, the guest's object for what was loaded.
 *
 * Files are read here, in the guest, with the guest's permissions. Images go to the worker whole and untouched; the
 * host's driver decompresses and compiles. A module belongs to a context and ends with it; a library (library.c) does
 * not.
 */
#include "code.h"

#include <stdlib.h>

pthread_mutex_t shim_code_mutex = PTHREAD_MUTEX_INITIALIZER;

struct shim_code *shim_code_of(uint64_t handle)
{
    const unsigned kind = vgpu_handle_kind(handle);
    if (kind != VGPU_KIND_MODULE && kind != VGPU_KIND_LIBRARY) return NULL;
    struct shim_object *object = shim_object(kind, handle);
    return object == NULL ? NULL : object->data;
}

static struct shim_code *module_of(CUmodule module)
{
    const uint64_t handle = (uint64_t)(uintptr_t)module;
    return vgpu_handle_kind(handle) == VGPU_KIND_MODULE ? shim_code_of(handle) : NULL;
}

static void end_context_once(void);

struct shim_code *shim_code_new(uint64_t handle, uint64_t context)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, end_context_once);
    struct shim_code *code = calloc(1, sizeof *code);
    if (code == NULL) return NULL;
    code->handle = handle;
    code->context = context;
    if (!shim_handle_adopt(handle, code)) {
        free(code);
        return NULL;
    }
    return code;
}

static void free_function(struct shim_function *function)
{
    shim_handle_free(function->handle);
    shim_function_forget_occupancy(function);
    free(atomic_load_explicit(&function->name, memory_order_relaxed));
    free(function->parameter);
    free(function);
}

/* Everything looked up in it becomes invalid, as in CUDA. The record to the worker is the caller's. */
void shim_code_unload(struct shim_code *code)
{
    struct shim_code *module = atomic_load_explicit(&code->module, memory_order_acquire);
    if (module != NULL) shim_code_unload(module);
    if (code->parent != NULL) atomic_store_explicit(&code->parent->module, NULL, memory_order_release);
    shim_handle_free(code->handle);
    for (unsigned i = 0; i < SHIM_CODE_BUCKETS; i++) {
        struct shim_function *function = code->bucket[i];
        while (function != NULL) {
            struct shim_function *next = function->next;
            struct shim_function *peer = atomic_load_explicit(&function->peer, memory_order_relaxed);
            if (peer != NULL) atomic_store_explicit(&peer->peer, NULL, memory_order_relaxed);
            free_function(function);
            function = next;
        }
    }
    while (code->global != NULL) {
        struct shim_global *global = code->global;
        struct shim_range range;
        code->global = global->next;
        (void)shim_range_remove(global->base, &range);
        free(global);
    }
    free(code);
}

struct leaving { uint64_t context; struct shim_code *found[64]; unsigned count; };

static void collect(struct shim_object *object, void *user)
{
    struct leaving *leaving = user;
    struct shim_code *code = object->data;
    if (code != NULL && code->context == leaving->context && leaving->count < 64) leaving->found[leaving->count++] = code;
}

struct leaving_functions { uint64_t context; struct shim_function *found[64]; unsigned count; };

static void collect_function(struct shim_object *object, void *user)
{
    struct leaving_functions *leaving = user;
    if (object->context == leaving->context && object->data != NULL && leaving->count < 64)
        leaving->found[leaving->count++] = object->data;
}

/* Takes a kernel's function out of its library. */
static void drop_function(struct shim_function *function)
{
    struct shim_function *kernel = atomic_load_explicit(&function->peer, memory_order_relaxed);
    pthread_mutex_lock(&shim_code_mutex);
    for (unsigned i = 0; i < SHIM_CODE_BUCKETS; i++)
        for (struct shim_function **at = &function->owner->bucket[i]; *at != NULL; at = &(*at)->next)
            if (*at == function) {
                *at = function->next;
                break;
            }
    if (kernel != NULL) atomic_store_explicit(&kernel->peer, NULL, memory_order_release);
    pthread_mutex_unlock(&shim_code_mutex);
    free_function(function);
}

/* The context is gone on the worker's side, and with it its modules and the functions that kernels had there; libraries
 * and kernels stay. */
static void end_context(uint64_t context)
{
    struct leaving leaving = {.context = context};
    do {
        leaving.count = 0;
        shim_handle_each(VGPU_KIND_MODULE, collect, &leaving);
        for (unsigned i = 0; i < leaving.count; i++) shim_code_unload(leaving.found[i]);
    } while (leaving.count != 0);
    struct leaving_functions functions = {.context = context};
    do {
        functions.count = 0;
        shim_handle_each(VGPU_KIND_FUNCTION, collect_function, &functions);
        for (unsigned i = 0; i < functions.count; i++) drop_function(functions.found[i]);
    } while (functions.count != 0);
}

static void end_context_once(void) { shim_on_context_end(end_context); }

CUresult shim_code_load(bool is_library, const struct shim_image *image, struct shim_jit *jit, uint64_t *handle)
{
    const uint32_t option_bytes = jit->count * (uint32_t)sizeof(struct wire_option);
    const struct wire_image head = {.part_count = image->part_count, .is_wrapper = image->is_wrapper};
    const uint64_t head_bytes = vgpu_align16(sizeof head + 8 * (uint64_t)image->part_count);
    uint64_t total = head_bytes;
    for (uint32_t i = 0; i < image->part_count; i++) total += vgpu_align16(image->length[i]);
    const bool is_inline = option_bytes + total <= VGPU_INLINE_LIMIT;
    /* One buffer: options, head and, when inline, the parts. */
    uint8_t *payload = calloc(1, option_bytes + (is_inline ? total : head_bytes));
    if (payload == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    memcpy(payload, jit->wire, option_bytes);
    uint8_t *at = payload + option_bytes;
    memcpy(at, &head, sizeof head);
    memcpy(at + sizeof head, image->length, 8 * (size_t)image->part_count);
    CUresult status = CUDA_SUCCESS;
    struct shim_blob blob = {0};
    if (is_inline) {
        at += head_bytes;
        for (uint32_t i = 0; i < image->part_count; i++) {
            memcpy(at, image->part[i], image->length[i]);
            at += vgpu_align16(image->length[i]);
        }
    } else {
        static const uint8_t zero[16];
        shim_blob_begin(&blob, total);
        status = shim_blob_append(&blob, at, head_bytes);
        for (uint32_t i = 0; i < image->part_count && status == CUDA_SUCCESS; i++) {
            status = shim_blob_append(&blob, image->part[i], image->length[i]);
            const uint64_t padding = vgpu_align16(image->length[i]) - image->length[i];
            if (status == CUDA_SUCCESS) status = shim_blob_append(&blob, zero, padding);
        }
    }
    if (status == CUDA_SUCCESS) {
        const uint64_t argument[8] = {is_library, blob.id, total, jit->count};
        uint8_t reply[VGPU_SLOT_PAYLOAD_LIMIT];
        uint32_t reply_length = 0;
        uint64_t value[4] = {0};
        status = shim_reply(VGPU_CALL_wireModuleLoad, argument, payload, option_bytes + (is_inline ? (uint32_t)total : 0),
                            value, reply, sizeof reply, &reply_length);
        shim_jit_finish(jit, reply, reply_length);
        *handle = value[0];
    }
    free(payload);
    return status;
}

static CUresult load_module(void *module, const void *bytes, unsigned count, const int *options, void **values)
{
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    if (module == NULL) return CUDA_ERROR_INVALID_VALUE;
    struct shim_jit jit;
    if ((status = shim_jit_read(&jit, count, options, values)) != CUDA_SUCCESS) return status;
    struct shim_image image;
    if ((status = shim_image_describe(bytes, &image)) != CUDA_SUCCESS) return status;
    uint64_t handle = 0;
    status = shim_code_load(false, &image, &jit, &handle);
    shim_image_release(&image);
    if (status != CUDA_SUCCESS) return status;
    if (shim_code_new(handle, shim_current_context_id()) == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    *(CUmodule *)module = CODE_HANDLE(CUmodule, handle);
    return CUDA_SUCCESS;
}

CUresult shim_module_load_image(CUmodule *out, const void *image) { return load_module(out, image, 0, NULL, NULL); }

CUresult cuModuleLoadData(void *module, const void *image) { return load_module(module, image, 0, NULL, NULL); }

CUresult cuModuleLoadFatBinary(void *module, const void *fatCubin) { return load_module(module, fatCubin, 0, NULL, NULL); }

CUresult cuModuleLoadDataEx(void *module, const void *image, unsigned int numOptions, void *options, void *optionValues)
{
    return load_module(module, image, numOptions, options, optionValues);
}

CUresult cuModuleLoad(void *module, const char *fname)
{
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    if (module == NULL || fname == NULL) return CUDA_ERROR_INVALID_VALUE;
    void *bytes;
    size_t length;
    if ((status = shim_image_read_file(fname, &bytes, &length)) != CUDA_SUCCESS) return status;
    status = shim_image_check(bytes, length) ? load_module(module, bytes, 0, NULL, NULL) : CUDA_ERROR_INVALID_IMAGE;
    free(bytes);
    return status;
}

CUresult cuModuleUnload(CUmodule hmod)
{
    CUresult status = shim_enter(); /* any context, or none */
    if (status != CUDA_SUCCESS) return status;
    struct shim_code *code = module_of(hmod);
    if (code == NULL) return CUDA_ERROR_INVALID_HANDLE;
    if ((status = shim_capture_check()) != CUDA_SUCCESS) return status;
    if (code->parent != NULL) return CUDA_ERROR_NOT_PERMITTED; /* it belongs to its library */
    const uint64_t argument[8] = {code->handle};
    shim_code_unload(code);
    return shim_async(VGPU_CALL_cuModuleUnload, argument, NULL, 0);
}

CUresult cuModuleGetLoadingMode(unsigned int *mode)
{
    const CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    if (mode == NULL) return CUDA_ERROR_INVALID_VALUE;
    /* The worker's driver loads lazily whatever the guest asks; what the runtime does with its fatbins is decided here. */
    const char *wanted = getenv("CUDA_MODULE_LOADING");
    *mode = wanted != NULL && strcmp(wanted, "EAGER") == 0 ? 1 : 2;
    return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(void *hfunc, CUmodule hmod, const char *name)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    if (hfunc == NULL || name == NULL) return CUDA_ERROR_INVALID_VALUE;
    struct shim_code *code = module_of(hmod);
    if (code == NULL) return CUDA_ERROR_INVALID_HANDLE;
    struct shim_function *function;
    status = shim_function_get(code, name, &function);
    if (status == CUDA_SUCCESS) *(CUfunction *)hfunc = CODE_HANDLE(CUfunction, function->handle);
    return status;
}

CUresult cuModuleEnumerateFunctions(void *functions, unsigned int numFunctions, CUmodule mod)
{
    const CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    if (functions == NULL || numFunctions == 0) return CUDA_ERROR_INVALID_VALUE;
    struct shim_code *code = module_of(mod);
    if (code == NULL) return CUDA_ERROR_INVALID_HANDLE;
    return shim_function_enumerate(code, VGPU_CALL_cuModuleEnumerateFunctions, functions, numFunctions);
}

CUresult shim_module_functions(CUmodule module, shim_function_visitor visit, void *user, size_t *count)
{
    unsigned total = 0;
    CUresult status = cuModuleGetFunctionCount(&total, module);
    if (status != CUDA_SUCCESS) return status;
    CUfunction *functions = calloc(total + 1, sizeof *functions);
    if (functions == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    status = total == 0 ? CUDA_SUCCESS : cuModuleEnumerateFunctions(functions, total, module);
    /* Under lazy loading an enumerated function may not be loaded yet; who gets it here launches it as it is (cuFFT). */
    for (unsigned i = 0; i < total && status == CUDA_SUCCESS; i++) status = cuFuncLoad(functions[i]);
    for (unsigned i = 0; i < total && status == CUDA_SUCCESS; i++) visit(user, functions[i]);
    free(functions);
    if (status == CUDA_SUCCESS && count != NULL) *count = total;
    return status;
}

CUresult shim_code_global(struct shim_code *code, unsigned call, const char *name, uint64_t *address, uint64_t *size)
{
    const uint64_t argument[8] = {code->handle};
    const size_t length = strlen(name);
    uint64_t value[4] = {0};
    if (length > VGPU_INLINE_LIMIT) return CUDA_ERROR_NOT_FOUND;
    const CUresult status = shim_reply(call, argument, name, (uint32_t)length, value, NULL, 0, NULL);
    if (status != CUDA_SUCCESS) return status;
    *address = value[0];
    *size = value[1];
    /* Copies must know that this address is device memory; the runtime copies to symbols without saying so. */
    struct shim_range known;
    struct shim_global *global = calloc(1, sizeof *global);
    if (global == NULL || value[1] == 0 || shim_range_find(value[0], &known)) {
        free(global);
        return CUDA_SUCCESS;
    }
    const struct shim_range range = {
        .base = value[0],
        .size = value[1],
        .device_address = value[0],
        .context = code->context != 0 ? code->context : shim_current_context_id(),
        .kind = call == VGPU_CALL_cuLibraryGetManaged ? SHIM_RANGE_MANAGED : SHIM_RANGE_DEVICE,
        .owner = code->handle, /* it goes with the module and cannot be freed by itself */
    };
    shim_range_add(&range);
    global->base = value[0];
    pthread_mutex_lock(&shim_code_mutex);
    global->next = code->global;
    code->global = global;
    pthread_mutex_unlock(&shim_code_mutex);
    return CUDA_SUCCESS;
}

CUresult cuModuleGetGlobal_v2(void *dptr, void *bytes, CUmodule hmod, const char *name)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    if (name == NULL || (dptr == NULL && bytes == NULL)) return CUDA_ERROR_INVALID_VALUE;
    struct shim_code *code = module_of(hmod);
    if (code == NULL) return CUDA_ERROR_INVALID_HANDLE;
    uint64_t address, size;
    status = shim_code_global(code, VGPU_CALL_cuModuleGetGlobal_v2, name, &address, &size);
    if (status != CUDA_SUCCESS) return status;
    if (dptr != NULL) *(CUdeviceptr *)dptr = address;
    if (bytes != NULL) *(size_t *)bytes = size;
    return CUDA_SUCCESS;
}
