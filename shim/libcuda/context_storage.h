/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Context-local storage: what the CUDA runtime (each copy of it in the process) hangs on a context, keyed by an
 * address of its own, with a destructor that must run when the context goes.
 *
 * Why it matters: libcudart keeps its loaded modules there.  Were a destructor not to run on a reset, it would go on
 * using handles of a context that no longer exists.
 *
 * Locking: one process-wide mutex, never held while a destructor runs.  A destructor may call anything here.
 */
#ifndef VGPU_SHIM_CONTEXT_STORAGE_H
#define VGPU_SHIM_CONTEXT_STORAGE_H

#include "private_hooks.h"

typedef void (*vgpu_storage_destructor)(CUcontext context, void *key, void *value);

/* In all four, context NULL (or all ones) is the calling thread's current context, and without one the answer is
 * CUDA_ERROR_INVALID_CONTEXT.  After teardown the answer is CUDA_ERROR_DEINITIALIZED. */

/* Inserts or overwrites; the overwritten value's destructor does not run.  CUDA_ERROR_OUT_OF_MEMORY leaves all as was. */
VGPU_HIDDEN CUresult vgpu_context_storage_put(CUcontext context, void *key, void *value,
                                              vgpu_storage_destructor destructor);

/* Removes without running the destructor: the caller frees its value.  A miss is CUDA_ERROR_INVALID_HANDLE. */
VGPU_HIDDEN CUresult vgpu_context_storage_delete(CUcontext context, void *key);

/* A miss is CUDA_ERROR_INVALID_HANDLE and leaves *value alone: libcudart crashes on a success without a value. */
VGPU_HIDDEN CUresult vgpu_context_storage_get(void **value, CUcontext context, void *key);

/* A small number, unique to the context in this process, given out at the first question and gone with the context. */
VGPU_HIDDEN CUresult vgpu_context_storage_number(CUcontext context, uint32_t *number);

VGPU_HIDDEN void vgpu_context_storage_fork_child(void);

#endif
