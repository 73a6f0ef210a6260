/* SPDX-License-Identifier: Apache-2.0 */
/*
 * accept.c - calls that are accepted because there is nothing behind them here: no profiler is attached, no log line is ever
 * produced, no device changes under the program. Registrations are real (an id that was not given out is refused), they are
 * just never called.
 */
#include "core.h"
#include "_generated_prototypes.h"

/* Deprecated and without effect in every driver of this API version. */
CUresult cuProfilerInitialize(const char *configFile, const char *outputFile, unsigned int outputMode)
{
    (void)configFile;
    (void)outputFile;
    (void)outputMode;
    return CUDA_ERROR_NOT_SUPPORTED;
}

CUresult cuProfilerStart(void) { return shim_enter_context(); }
CUresult cuProfilerStop(void) { return shim_enter_context(); }

/* ---- registrations ---- */

#define REGISTRATIONS 256
static struct {
    struct shim_lock lock;
    uint8_t used[REGISTRATIONS]; /* the address of an element is the id handed out */
} registrations;

static CUresult add_registration(void *out)
{
    CUresult status = CUDA_ERROR_OUT_OF_MEMORY;
    shim_lock_take(&registrations.lock);
    for (unsigned i = 0; i < REGISTRATIONS; i++) {
        if (registrations.used[i] != 0) continue;
        registrations.used[i] = 1;
        *(void **)out = &registrations.used[i];
        status = CUDA_SUCCESS;
        break;
    }
    shim_lock_give(&registrations.lock);
    return status;
}

static CUresult remove_registration(const void *id)
{
    uintptr_t index = (uintptr_t)id - (uintptr_t)registrations.used;
    if (index >= REGISTRATIONS) return CUDA_ERROR_INVALID_VALUE;
    shim_lock_take(&registrations.lock);
    bool was = registrations.used[index] != 0;
    registrations.used[index] = 0;
    shim_lock_give(&registrations.lock);
    return was ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

/* Logs may be asked for before cuInit. */
CUresult cuLogsRegisterCallback(void *callbackFunc, void *userData, void *callback_out)
{
    (void)userData;
    if (shim_is_torn_down()) return CUDA_ERROR_DEINITIALIZED;
    if (callbackFunc == NULL || callback_out == NULL) return CUDA_ERROR_INVALID_VALUE;
    return add_registration(callback_out);
}

CUresult cuLogsUnregisterCallback(void *callback)
{
    if (shim_is_torn_down()) return CUDA_ERROR_DEINITIALIZED;
    return remove_registration(callback);
}

CUresult cuLogsCurrent(void *iterator_out, unsigned int flags)
{
    if (shim_is_torn_down()) return CUDA_ERROR_DEINITIALIZED;
    if (iterator_out == NULL || flags != 0) return CUDA_ERROR_INVALID_VALUE;
    *(unsigned *)iterator_out = 0;
    return CUDA_SUCCESS;
}

CUresult cuDeviceRegisterAsyncNotification(int device, void *callbackFunc, void *userData, void *callback)
{
    SHIM_LOCAL_ENTRY;
    (void)userData;
    if (callbackFunc == NULL || callback == NULL) return CUDA_ERROR_INVALID_VALUE;
    return shim_device_ok(device) ? add_registration(callback) : CUDA_ERROR_INVALID_DEVICE;
}

CUresult cuDeviceUnregisterAsyncNotification(int device, void *callback)
{
    SHIM_LOCAL_ENTRY;
    return shim_device_ok(device) ? remove_registration(callback) : CUDA_ERROR_INVALID_DEVICE;
}
