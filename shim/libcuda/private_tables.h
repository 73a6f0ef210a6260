/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The private export tables of cuGetExportTable, without which no CUDA runtime admits a device.
 *
 * A table is a row of 8-byte words: word 0 its size in bytes, words 1 and up functions.  (Context-local storage has no size
 * word.)  Callers do not look at the size and call what they want, so every slot is a real function: one that is not
 * answered returns CUDA_ERROR_NOT_SUPPORTED and is counted under "cuGetExportTable <uuid>[<slot>]".
 *
 * The tables are constant, so their addresses, which the integrity digest covers, never change.
 * The interface to the rest of the shim (vgpu_private_export_table) is in private_hooks.h.
 */
#ifndef VGPU_SHIM_PRIVATE_TABLES_H
#define VGPU_SHIM_PRIVATE_TABLES_H

#include "private_hooks.h"

typedef void (*vgpu_slot)(void);

union vgpu_table_word {
    size_t size_bytes;
    vgpu_slot slot;
};

#endif
