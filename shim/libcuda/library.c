/* SPDX-License-Identifier: Apache-2.0 */
/*
 * library.c - context-independent modules and their kernels (cuLibrary*, cuKernel*).
 *
 * libcudart 12 and 13 load every fatbin this way, and do so before any context exists: nothing here asks for a current
 * context unless the driver does. A kernel's attributes and parameters are answered from what came with its look-up.
 */
#include "code.h"

#include <stdlib.h>

static struct shim_code *library_of(CUlibrary library)
{
    const uint64_t handle = (uint64_t)(uintptr_t)library;
    return vgpu_handle_kind(handle) == VGPU_KIND_LIBRARY ? shim_code_of(handle) : NULL;
}

static struct shim_function *kernel_of(CUkernel kernel)
{
    return vgpu_handle_kind((uint64_t)(uintptr_t)kernel) == VGPU_KIND_KERNEL ? shim_function_of(kernel) : NULL;
}

/* The values array may be NULL (cuBLASLt passes it so); the only option that means something to us is refused. */
static CUresult check_library_options(const int *options, void *const *values, unsigned count)
{
    if (count != 0 && options == NULL) return CUDA_ERROR_INVALID_VALUE;
    for (unsigned i = 0; i < count; i++) {
        if (options[i] < 0 || options[i] > 1) return CUDA_ERROR_INVALID_VALUE;
        /* A table of host addresses that device code would call through: it cannot cross. BINARY_IS_PRESERVED (1) is
         * a promise about the caller's buffer, and the worker keeps a copy of its own for the library's life. */
        if (options[i] == 0 && values != NULL && values[i] != NULL) return CUDA_ERROR_NOT_SUPPORTED;
    }
    return CUDA_SUCCESS;
}

static CUresult load(void *library, const void *code, unsigned jit_count, const int *jit_options, void **jit_values,
                     unsigned count, const int *options, void *const *values)
{
    if (library == NULL || code == NULL) return CUDA_ERROR_INVALID_VALUE;
    CUresult status = check_library_options(options, values, count);
    if (status != CUDA_SUCCESS) return status;
    struct shim_jit jit;
    if ((status = shim_jit_read(&jit, jit_count, jit_options, jit_values)) != CUDA_SUCCESS) return status;
    struct shim_image image;
    if ((status = shim_image_describe(code, &image)) != CUDA_SUCCESS) return status;
    uint64_t handle = 0;
    status = shim_code_load(true, &image, &jit, &handle);
    shim_image_release(&image);
    if (status != CUDA_SUCCESS) return status;
    if (shim_code_new(handle, 0) == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    *(CUlibrary *)library = CODE_HANDLE(CUlibrary, handle);
    return CUDA_SUCCESS;
}

CUresult cuLibraryLoadData(void *library, const void *code, void *jitOptions, void *jitOptionsValues, unsigned int numJitOptions,
                           void *libraryOptions, void *libraryOptionValues, unsigned int numLibraryOptions)
{
    const CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    return load(library, code, numJitOptions, jitOptions, jitOptionsValues, numLibraryOptions, libraryOptions, libraryOptionValues);
}

CUresult cuLibraryLoadFromFile(void *library, const char *fileName, void *jitOptions, void *jitOptionsValues,
                               unsigned int numJitOptions, void *libraryOptions, void *libraryOptionValues,
                               unsigned int numLibraryOptions)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    if (library == NULL || fileName == NULL) return CUDA_ERROR_INVALID_VALUE;
    void *bytes;
    size_t length;
    if ((status = shim_image_read_file(fileName, &bytes, &length)) != CUDA_SUCCESS) return status;
    status = CUDA_ERROR_INVALID_IMAGE;
    if (shim_image_check(bytes, length))
        status = load(library, bytes, numJitOptions, jitOptions, jitOptionsValues, numLibraryOptions, libraryOptions,
                      libraryOptionValues);
    free(bytes);
    return status;
}

CUresult cuLibraryUnload(CUlibrary library)
{
    const CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    struct shim_code *code = library_of(library);
    if (code == NULL) return CUDA_ERROR_INVALID_HANDLE;
    const uint64_t argument[8] = {code->handle};
    shim_code_unload(code);
    return shim_async(VGPU_CALL_cuLibraryUnload, argument, NULL, 0);
}

CUresult cuLibraryGetKernel(void *pKernel, CUlibrary library, const char *name)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    if (pKernel == NULL || name == NULL) return CUDA_ERROR_INVALID_VALUE;
    struct shim_code *code = library_of(library);
    if (code == NULL) return CUDA_ERROR_INVALID_HANDLE;
    struct shim_function *kernel;
    status = shim_function_get(code, name, &kernel);
    if (status == CUDA_SUCCESS) *(CUkernel *)pKernel = CODE_HANDLE(CUkernel, kernel->handle);
    return status;
}

CUresult cuLibraryGetKernelCount(unsigned int *count, CUlibrary lib)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    if (count == NULL) return CUDA_ERROR_INVALID_VALUE;
    struct shim_code *code = library_of(lib);
    if (code == NULL) return CUDA_ERROR_INVALID_HANDLE;
    const uint64_t argument[8] = {code->handle};
    uint64_t value[4] = {0};
    status = shim_reply(VGPU_CALL_cuLibraryGetKernelCount, argument, NULL, 0, value, NULL, 0, NULL);
    if (status == CUDA_SUCCESS) *count = (unsigned)value[0];
    return status;
}

CUresult cuLibraryEnumerateKernels(void *kernels, unsigned int numKernels, CUlibrary lib)
{
    const CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    if (kernels == NULL || numKernels == 0) return CUDA_ERROR_INVALID_VALUE;
    struct shim_code *code = library_of(lib);
    if (code == NULL) return CUDA_ERROR_INVALID_HANDLE;
    return shim_function_enumerate(code, VGPU_CALL_cuLibraryEnumerateKernels, kernels, numKernels);
}

/* A library's module in the current context; the worker names it, always the same. */
static CUresult module_of_library(struct shim_code *library, struct shim_code **out)
{
    struct shim_code *module = atomic_load_explicit(&library->module, memory_order_acquire);
    if (module != NULL) {
        *out = module;
        return CUDA_SUCCESS;
    }
    const uint64_t argument[8] = {library->handle};
    uint64_t value[4] = {0};
    CUresult status = shim_reply(VGPU_CALL_cuLibraryGetModule, argument, NULL, 0, value, NULL, 0, NULL);
    if (status != CUDA_SUCCESS) return status;
    pthread_mutex_lock(&shim_code_mutex);
    module = atomic_load_explicit(&library->module, memory_order_relaxed);
    if (module == NULL) {
        module = shim_code_new(value[0], shim_current_context_id());
        if (module != NULL) module->parent = library;
        atomic_store_explicit(&library->module, module, memory_order_release);
    }
    pthread_mutex_unlock(&shim_code_mutex);
    *out = module;
    return module == NULL ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

CUresult cuLibraryGetModule(void *pMod, CUlibrary library)
{
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    if (pMod == NULL) return CUDA_ERROR_INVALID_VALUE;
    struct shim_code *code = library_of(library), *module;
    if (code == NULL) return CUDA_ERROR_INVALID_HANDLE;
    status = module_of_library(code, &module);
    if (status == CUDA_SUCCESS) *(CUmodule *)pMod = CODE_HANDLE(CUmodule, module->handle);
    return status;
}

static CUresult get_variable(void *dptr, void *bytes, CUlibrary library, const char *name, unsigned call)
{
    if (name == NULL || (dptr == NULL && bytes == NULL)) return CUDA_ERROR_INVALID_VALUE;
    struct shim_code *code = library_of(library);
    if (code == NULL) return CUDA_ERROR_INVALID_HANDLE;
    uint64_t address, size;
    const CUresult status = shim_code_global(code, call, name, &address, &size);
    if (status != CUDA_SUCCESS) return status;
    if (dptr != NULL) *(CUdeviceptr *)dptr = address;
    if (bytes != NULL) *(size_t *)bytes = size;
    return CUDA_SUCCESS;
}

CUresult cuLibraryGetGlobal(void *dptr, void *bytes, CUlibrary library, const char *name)
{
    const CUresult status = shim_enter_context();
    return status != CUDA_SUCCESS ? status : get_variable(dptr, bytes, library, name, VGPU_CALL_cuLibraryGetGlobal);
}

CUresult cuLibraryGetManaged(void *dptr, void *bytes, CUlibrary library, const char *name)
{
    const CUresult status = shim_enter_context();
    return status != CUDA_SUCCESS ? status : get_variable(dptr, bytes, library, name, VGPU_CALL_cuLibraryGetManaged);
}

CUresult cuKernelGetFunction(void *pFunc, CUkernel kernel)
{
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    if (pFunc == NULL) return CUDA_ERROR_INVALID_VALUE;
    struct shim_function *self = kernel_of(kernel);
    if (self == NULL) return CUDA_ERROR_INVALID_HANDLE;
    struct shim_function *function = atomic_load_explicit(&self->peer, memory_order_acquire);
    if (function == NULL) {
        const uint64_t argument[8] = {self->handle};
        uint64_t value[4] = {0};
        uint8_t reply[VGPU_SLOT_PAYLOAD_LIMIT];
        uint32_t length = 0;
        status = shim_reply(VGPU_CALL_cuKernelGetFunction, argument, NULL, 0, value, reply, sizeof reply, &length);
        if (status != CUDA_SUCCESS) return status;
        function = shim_function_adopt(value[0], self->owner, NULL, reply, length);
        if (function == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
        atomic_store_explicit(&function->peer, self, memory_order_release);
        atomic_store_explicit(&self->peer, function, memory_order_release);
    }
    *(CUfunction *)pFunc = CODE_HANDLE(CUfunction, function->handle);
    return CUDA_SUCCESS;
}

CUresult cuKernelGetLibrary(void *pLib, CUkernel kernel)
{
    const CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    if (pLib == NULL) return CUDA_ERROR_INVALID_VALUE;
    const struct shim_function *self = kernel_of(kernel);
    if (self == NULL) return CUDA_ERROR_INVALID_HANDLE;
    *(CUlibrary *)pLib = CODE_HANDLE(CUlibrary, self->owner->handle);
    return CUDA_SUCCESS;
}

CUresult cuKernelGetAttribute(int *pi, unsigned int attrib, CUkernel kernel, int dev)
{
    const CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    if (pi == NULL) return CUDA_ERROR_INVALID_VALUE;
    if (dev != 0) return CUDA_ERROR_INVALID_DEVICE;
    struct shim_function *self = kernel_of(kernel);
    return self == NULL ? CUDA_ERROR_INVALID_HANDLE : shim_function_attribute(self, attrib, pi);
}

CUresult cuKernelSetAttribute(unsigned int attrib, int val, CUkernel kernel, int dev)
{
    const CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    if (dev != 0) return CUDA_ERROR_INVALID_DEVICE;
    struct shim_function *self = kernel_of(kernel);
    return self == NULL ? CUDA_ERROR_INVALID_HANDLE : shim_function_set_attribute(self, attrib, val);
}

CUresult cuKernelGetName(void *name, CUkernel hfunc)
{
    const CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    if (name == NULL) return CUDA_ERROR_INVALID_VALUE;
    struct shim_function *self = kernel_of(hfunc);
    if (self == NULL) return CUDA_ERROR_INVALID_HANDLE;
    return shim_function_name(self, VGPU_CALL_cuKernelGetName, name);
}

CUresult cuKernelGetParamInfo(CUkernel kernel, size_t paramIndex, void *paramOffset, void *paramSize)
{
    const CUresult status = shim_enter_context(); /* unlike the other questions about kernels */
    if (status != CUDA_SUCCESS) return status;
    struct shim_function *self = kernel_of(kernel);
    return self == NULL ? CUDA_ERROR_INVALID_HANDLE : shim_function_parameter(self, paramIndex, paramOffset, paramSize);
}
