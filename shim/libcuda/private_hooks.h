/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the private half of libcuda (export tables, context-local storage, JIT cache) needs from the rest of the shim,
 * and what it gives back to it.
 *
 * Why it is one small header: the private half is driven in tests by stock libcudart releases against a throw-away
 * libcuda.so.1 that implements nothing but these functions, so everything it depends on has to be visible in one place.
 *
 * Rules for whoever implements the shim_* functions:
 *   - Device facts must be the ones the public API reports (cuDriverGetVersion, cuDeviceGetCount, cuDeviceGetUuid v1,
 *     attributes 50 / 33 / 34): they enter the integrity digest, and the runtime computes the same digest from the
 *     public answers.  One bit of difference is error 103 from every runtime call.
 *   - They may be called from any thread, at any time after the library is loaded, process exit included.
 *   - They are called without any lock of ours held, so they may call back into this half.
 */
#ifndef VGPU_SHIM_PRIVATE_HOOKS_H
#define VGPU_SHIM_PRIVATE_HOOKS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "cuda_types.h"

#define VGPU_HIDDEN __attribute__((visibility("hidden")))

/* ---- implemented by the shim core ------------------------------------------------------------------------------ */

/* What cuDriverGetVersion reports, e.g. 13000. */
VGPU_HIDDEN int shim_driver_version(void);

/* What cuDeviceGetCount reports (CUDA_VISIBLE_DEVICES applied); 0 when there is no device or no cuInit yet. */
VGPU_HIDDEN int shim_device_count(void);

/* What cuDeviceGetUuid (v1) reports for an ordinal below shim_device_count(). */
VGPU_HIDDEN void shim_device_uuid(int ordinal, uint8_t out[16]);

/* What cuDeviceGetAttribute reports for PCI domain (50), bus (33) and device (34). */
VGPU_HIDDEN void shim_device_pci(int ordinal, int32_t *domain, int32_t *bus, int32_t *device);

/* The handle cuDevicePrimaryCtxRetain will return for this device, without retaining or activating the context;
 * NULL for a device that does not exist. */
VGPU_HIDDEN CUcontext shim_primary_context_handle(int device);

/* The calling thread's current context, NULL for none.  Hot: some ten nanoseconds at most. */
VGPU_HIDDEN CUcontext shim_current_context(void);

/* As cuModuleLoadData into the current context: image is a fatbin wrapper, fatbin, cubin or PTX. */
VGPU_HIDDEN CUresult shim_module_load_image(CUmodule *out, const void *image);

/* Calls visit(user, function) for every function of the module, no lock held, and stores how many there were. */
typedef void (*shim_function_visitor)(void *user, CUfunction function);
VGPU_HIDDEN CUresult shim_module_functions(CUmodule module, shim_function_visitor visit, void *user, size_t *count);

/* The GPC of every TPC of the current device and its index there, *n bytes each; the arrays stay the shim's.
 * Returns 0 when there is a device.  Null arrays with *n set (multiprocessors / 2) mean "not known": the private half
 * then hands out an even spread, which libraries accept.  Non-zero: no device. */
VGPU_HIDDEN int shim_topology(const uint8_t **gpc_of_tpc, const uint8_t **index_in_gpc, size_t *n);

/* Something was asked for that this product does not serve.  The string is static or never freed: it may be kept. */
VGPU_HIDDEN void shim_count_refused(const char *what);

/* True once the library has been torn down at process exit; calls then answer CUDA_ERROR_DEINITIALIZED. */
VGPU_HIDDEN bool shim_is_torn_down(void);

/* ---- given to the shim core ------------------------------------------------------------------------------------ */

/* cuGetExportTable.  Works before cuInit, takes no lock on the served tables; the pointers are the same for ever.
 * A table not served: CUDA_ERROR_INVALID_VALUE, *table = NULL, counted. */
VGPU_HIDDEN CUresult vgpu_private_export_table(const void **table, const CUuuid *id);

/* To be called, with no lock held, before a context's modules go: on primary-context reset, on context destroy and
 * when the last retain of a primary context is released.  Runs the destructors of its context-local storage on the
 * calling thread; they may call the driver. */
VGPU_HIDDEN void vgpu_context_storage_drop(CUcontext context);

/* To be called in the child after fork(): forgets the parent's contexts and its in-process cache, running nothing. */
VGPU_HIDDEN void vgpu_private_fork_child(void);

#endif
