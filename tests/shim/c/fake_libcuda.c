/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A throw-away libcuda.so.1 for tests: the private half of the shim as it is, under the fewest public functions with which
 * a stock libcudart counts devices, allocates and resets.  No GPU, no session; memory is malloc.
 *
 * The environment bends it:
 *   FAKE_DEVICES=n          how many devices (default 1)
 *   FAKE_DRIVER_VERSION=n   what cuDriverGetVersion says (default 13000)
 *   FAKE_SPOIL=version|uuid|pci|count   the private half is told another value than the public API says
 *   FAKE_REFUSE=<hex>       refuse tables whose UUID begins so, with error 1
 *   FAKE_LOG=path           one line per interesting event is appended
 * Exported fake_* functions let tests reach what is not in a table.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "integrity_check.h"
#include "jit_cache.h"
#include "md2.h"
#include "private_hooks.h"
#include "sha256.h"

#define EXPORT __attribute__((visibility("default")))

enum { DEVICES_AT_MOST = 8, REFUSED_NAMES = 256 };

static char context_objects[DEVICES_AT_MOST];
static int retained[DEVICES_AT_MOST];
static _Thread_local CUcontext current;
static int torn_down;
static size_t topology_size = 66;
static uint8_t topology_gpc[256];
static uint8_t topology_index[256];
static int topology_known;

static int number(const char *name, int otherwise)
{
    const char *text = getenv(name);
    return text != NULL ? atoi(text) : otherwise;
}

static int spoiled(const char *what)
{
    const char *text = getenv("FAKE_SPOIL");
    return text != NULL && strcmp(text, what) == 0;
}

static void note(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void note(const char *format, ...)
{
    const char *path = getenv("FAKE_LOG");
    FILE *file = path != NULL ? fopen(path, "a") : NULL;
    if (file == NULL)
        return;
    va_list arguments;
    va_start(arguments, format);
    vfprintf(file, format, arguments);
    va_end(arguments);
    fputc('\n', file);
    fclose(file);
}

static int device_of(CUcontext context)
{
    for (int i = 0; i < DEVICES_AT_MOST; i++) {
        if ((char *)context == &context_objects[i])
            return i;
    }
    return -1;
}

/* ---- the hooks ---- */

int shim_driver_version(void)
{
    return number("FAKE_DRIVER_VERSION", 13000) + (spoiled("version") ? 10 : 0);
}

int shim_device_count(void)
{
    return number("FAKE_DEVICES", 1) + (spoiled("count") ? 1 : 0);
}

static void true_uuid(int ordinal, uint8_t out[16])
{
    for (int i = 0; i < 16; i++)
        out[i] = (uint8_t)(0x10 * (ordinal + 1) + i);
}

void shim_device_uuid(int ordinal, uint8_t out[16])
{
    true_uuid(ordinal, out);
    if (spoiled("uuid"))
        out[7] ^= 1;
}

void shim_device_pci(int ordinal, int32_t *domain, int32_t *bus, int32_t *device)
{
    *domain = 0;
    *bus = 0x40 + ordinal;
    *device = spoiled("pci") ? 1 : 0;
}

CUcontext shim_primary_context_handle(int device)
{
    if (device < 0 || device >= number("FAKE_DEVICES", 1) || device >= DEVICES_AT_MOST)
        return NULL;
    return (CUcontext)(void *)&context_objects[device];
}

CUcontext shim_current_context(void)
{
    return current;
}

CUresult shim_module_load_image(CUmodule *out, const void *image)
{
    *out = (CUmodule)(void *)((const char *)image + 1);
    return CUDA_SUCCESS;
}

CUresult shim_module_functions(CUmodule module, shim_function_visitor visit, void *user, size_t *count)
{
    *count = 0;
    if ((uintptr_t)module != 0x3000)
        return CUDA_ERROR_INVALID_HANDLE;
    for (uintptr_t i = 1; i <= 3; i++) {
        visit(user, (CUfunction)((uintptr_t)module + i));
        ++*count;
    }
    return CUDA_SUCCESS;
}

int shim_topology(const uint8_t **gpc_of_tpc, const uint8_t **index_in_gpc, size_t *n)
{
    *gpc_of_tpc = topology_known ? topology_gpc : NULL;
    *index_in_gpc = topology_known ? topology_index : NULL;
    *n = topology_size;
    return topology_size > 0 ? 0 : CUDA_ERROR_INVALID_CONTEXT;
}

static pthread_mutex_t refused_lock = PTHREAD_MUTEX_INITIALIZER;
static const char *refused[REFUSED_NAMES];
static int refused_count;

void shim_count_refused(const char *what)
{
    pthread_mutex_lock(&refused_lock);
    refused[refused_count++ % REFUSED_NAMES] = what;
    pthread_mutex_unlock(&refused_lock);
    note("refused %s", what);
}

bool shim_is_torn_down(void)
{
    return torn_down;
}

/* ---- what tests call ---- */

EXPORT void fake_md2(const void *data, size_t size, uint8_t *digest)
{
    struct vgpu_md2 state;
    vgpu_md2_start(&state);
    /* Two uneven pieces, so that buffering across blocks is part of every vector. */
    size_t first = size / 3;
    vgpu_md2_add(&state, data, first);
    vgpu_md2_add(&state, (const char *)data + first, size - first);
    vgpu_md2_finish(&state, digest);
}

EXPORT void fake_hmac_md2(const void *key, size_t key_size, const void *data, size_t size, uint8_t *digest)
{
    struct vgpu_hmac_md2 state;
    vgpu_hmac_md2_start(&state, key, key_size);
    vgpu_hmac_md2_add(&state, data, size);
    vgpu_hmac_md2_finish(&state, digest);
}

EXPORT void fake_sha256(const void *data, size_t size, uint8_t *digest)
{
    struct vgpu_sha256 state;
    vgpu_sha256_start(&state);
    size_t first = size / 3;
    vgpu_sha256_add(&state, data, first);
    vgpu_sha256_add(&state, (const char *)data + first, size - first);
    vgpu_sha256_finish(&state, digest);
}

static void given_device(void *user, uint32_t ordinal, struct vgpu_integrity_device *out)
{
    *out = ((const struct vgpu_integrity_device *)user)[ordinal];
}

EXPORT void fake_integrity_answer(const struct vgpu_integrity_inputs *inputs,
                                  struct vgpu_integrity_device *devices, uint64_t answer[2])
{
    vgpu_integrity_answer(inputs, given_device, devices, answer);
}

EXPORT void fake_set_current(void *context)
{
    current = context;
}

EXPORT void fake_tear_down(int value)
{
    torn_down = value;
}

EXPORT void fake_set_topology(const uint8_t *gpc, const uint8_t *index, size_t size)
{
    topology_known = gpc != NULL;
    topology_size = size;
    if (gpc != NULL) {
        memcpy(topology_gpc, gpc, size);
        memcpy(topology_index, index, size);
    }
}

EXPORT int fake_refused_count(void)
{
    return refused_count;
}

EXPORT const char *fake_refused_name(int back)
{
    return refused_count > back ? refused[(refused_count - 1 - back) % REFUSED_NAMES] : "";
}

EXPORT void fake_context_dropped(void *context)
{
    vgpu_context_storage_drop(context);
}

EXPORT void fake_fork_child(void)
{
    vgpu_private_fork_child();
}

EXPORT void fake_jit_statistics(struct vgpu_jit_cache_statistics *out)
{
    vgpu_jit_cache_read_statistics(out);
}

/* ---- the public functions ---- */

EXPORT CUresult cuInit(unsigned flags)
{
    (void)flags;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDriverGetVersion(int *version)
{
    *version = number("FAKE_DRIVER_VERSION", 13000);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuGetExportTable(const void **table, const CUuuid *id)
{
    char uuid[33];
    for (int i = 0; id != NULL && i < 16; i++)
        snprintf(uuid + 2 * i, 3, "%02x", (unsigned)(unsigned char)id->bytes[i]);
    const char *denied = getenv("FAKE_REFUSE");
    if (id != NULL && denied != NULL && strncmp(uuid, denied, strlen(denied)) == 0) {
        *table = NULL;
        return CUDA_ERROR_INVALID_VALUE;
    }
    CUresult result = vgpu_private_export_table(table, id);
    if (id != NULL)
        note("table %s %d", uuid, (int)result);
    return result;
}

EXPORT CUresult cuModuleGetLoadingMode(int *mode)
{
    *mode = 2;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetCount(int *count)
{
    *count = number("FAKE_DEVICES", 1);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGet(CUdevice *device, int ordinal)
{
    *device = ordinal;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetName(char *name, int length, CUdevice device)
{
    snprintf(name, (size_t)length, "Fake %d", (int)device);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device)
{
    (void)device;
    *bytes = (size_t)1 << 30;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetUuid(CUuuid *uuid, CUdevice device)
{
    true_uuid((int)device, (uint8_t *)uuid->bytes);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device)
{
    switch (attribute) {
    case 33: *value = 0x40 + (int)device; break; /* PCI bus */
    case 34: case 50: *value = 0; break;         /* PCI device, domain */
    case 75: *value = 9; break;                  /* compute capability */
    case 76: *value = 0; break;
    case 16: *value = 132; break; /* multiprocessors */
    case 10: *value = 32; break;  /* warp size */
    default: *value = 1; break;
    }
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetCurrent(CUcontext *context)
{
    *context = current;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxSetCurrent(CUcontext context)
{
    current = context;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxPushCurrent_v2(CUcontext context)
{
    current = context;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxPopCurrent_v2(CUcontext *context)
{
    *context = current;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetDevice_v2(CUdevice *device, CUcontext context)
{
    int found = device_of(context != NULL ? context : current);
    *device = found;
    return found >= 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

EXPORT CUresult cuCtxGetDevice(CUdevice *device)
{
    return cuCtxGetDevice_v2(device, NULL);
}

EXPORT CUresult cuCtxGetApiVersion(CUcontext context, unsigned *version)
{
    (void)context;
    *version = 3020;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device)
{
    *context = shim_primary_context_handle((int)device);
    if (*context == NULL)
        return CUDA_ERROR_INVALID_DEVICE;
    retained[device]++;
    note("retain %d", (int)device);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device)
{
    note("release %d", (int)device);
    if (retained[device] > 0 && --retained[device] == 0)
        vgpu_context_storage_drop(shim_primary_context_handle((int)device));
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxReset_v2(CUdevice device)
{
    note("reset %d", (int)device);
    vgpu_context_storage_drop(shim_primary_context_handle((int)device));
    retained[device] = 0;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active)
{
    *flags = 0;
    *active = retained[device] > 0;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemAlloc_v2(void **pointer, size_t size)
{
    note("alloc %zu", size);
    *pointer = malloc(size);
    return *pointer != NULL ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

EXPORT CUresult cuMemFree_v2(void *pointer)
{
    free(pointer);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status);
EXPORT CUresult cuGetProcAddress(const char *name, void **function, int version, uint64_t flags);

/* From `since` on, a name means this function. Later rows win. */
static const struct {
    const char *name;
    int since;
    void *function;
} names[] = {
    {"cuInit", 2000, cuInit},
    {"cuDriverGetVersion", 2020, cuDriverGetVersion},
    {"cuGetExportTable", 3000, cuGetExportTable},
    {"cuGetProcAddress", 11030, cuGetProcAddress},
    {"cuGetProcAddress", 12000, cuGetProcAddress_v2},
    {"cuModuleGetLoadingMode", 11070, cuModuleGetLoadingMode},
    {"cuDeviceGetCount", 2000, cuDeviceGetCount},
    {"cuDeviceGet", 2000, cuDeviceGet},
    {"cuDeviceGetName", 2000, cuDeviceGetName},
    {"cuDeviceTotalMem", 3020, cuDeviceTotalMem_v2},
    {"cuDeviceGetUuid", 9020, cuDeviceGetUuid},
    {"cuDeviceGetAttribute", 2000, cuDeviceGetAttribute},
    {"cuCtxGetCurrent", 4000, cuCtxGetCurrent},
    {"cuCtxSetCurrent", 4000, cuCtxSetCurrent},
    {"cuCtxPushCurrent", 4000, cuCtxPushCurrent_v2},
    {"cuCtxPopCurrent", 4000, cuCtxPopCurrent_v2},
    {"cuCtxGetDevice", 2000, cuCtxGetDevice},
    {"cuCtxGetDevice", 13000, cuCtxGetDevice_v2},
    {"cuCtxGetApiVersion", 3020, cuCtxGetApiVersion},
    {"cuDevicePrimaryCtxRetain", 7000, cuDevicePrimaryCtxRetain},
    {"cuDevicePrimaryCtxRelease", 7000, cuDevicePrimaryCtxRelease_v2},
    {"cuDevicePrimaryCtxReset", 7000, cuDevicePrimaryCtxReset_v2},
    {"cuDevicePrimaryCtxGetState", 7000, cuDevicePrimaryCtxGetState},
    {"cuMemAlloc", 3020, cuMemAlloc_v2},
    {"cuMemFree", 3020, cuMemFree_v2},
};

EXPORT CUresult cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status)
{
    (void)flags;
    void *found = NULL;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (strcmp(name, names[i].name) == 0 && names[i].since <= version)
            found = names[i].function;
    }
    *function = found;
    if (status != NULL)
        *status = found != NULL ? 0 : 1;
    return found != NULL ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

EXPORT CUresult cuGetProcAddress(const char *name, void **function, int version, uint64_t flags)
{
    return cuGetProcAddress_v2(name, function, version, flags, NULL);
}
