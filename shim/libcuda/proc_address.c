/* SPDX-License-Identifier: Apache-2.0 */
/*
 * proc_address.c - cuGetProcAddress and cuGetExportTable. A name means different functions to callers that were compiled
 * against different versions, so the answer depends on name, version and flags together: the newest form that is not newer
 * than the caller. Works before cuInit; takes no lock.
 */
#include "core.h"
#include "_generated_prototypes.h"
#include "proc_address.h"

#include <stdlib.h>

#define PER_THREAD_DEFAULT_STREAM 2u
#define KNOWN_FLAGS 3ull

enum { FOUND = 0, NOT_FOUND = 1, VERSION_TOO_OLD = 2 };

/* The first entry of the run with this base name, or NULL; *count its length. */
static const struct proc_entry *find_base(const char *name, unsigned *count)
{
    unsigned low = 0, high = proc_entry_count;
    while (low < high) {
        unsigned middle = low + (high - low) / 2;
        if (strcmp(proc_entries[middle].base, name) < 0)
            low = middle + 1;
        else
            high = middle;
    }
    *count = 0;
    while (low + *count < proc_entry_count && strcmp(proc_entries[low + *count].base, name) == 0) ++*count;
    return *count != 0 ? &proc_entries[low] : NULL;
}

/* What the real driver does (measured, 580): with the per-thread flag a function that has a twin is only ever its twin; names
 * newer than the driver do not exist. Unlike it, a name that carries its suffix already (runtime 12.1 asks for
 * cuGraphInstantiateWithParams_ptsz) is found here: that can only help. */
static int look_up(const char *name, unsigned version, unsigned long long flags, void **function)
{
    unsigned driver = (unsigned)shim_reported_version(), count;
    const struct proc_entry *entry = find_base(name, &count), *best = NULL;
    bool twins = false, exists = false;
    *function = NULL;
    for (unsigned i = 0; i < count; i++) twins |= entry[i].flags != 0 && (flags & PER_THREAD_DEFAULT_STREAM) != 0;
    for (unsigned i = 0; i < count; i++) {
        unsigned since = (unsigned)entry[i].since;
        if ((entry[i].flags != 0) != twins || since > driver) continue;
        exists = true;
        if (since <= version && (best == NULL || since >= (unsigned)best->since)) best = &entry[i];
    }
    for (unsigned i = 0; count == 0 && i < proc_entry_count; i++) {
        if (strcmp(proc_entries[i].symbol, name) != 0 || (unsigned)proc_entries[i].since > driver) continue;
        exists = true;
        if ((unsigned)proc_entries[i].since <= version) best = &proc_entries[i];
        break;
    }
    if (best == NULL) return exists ? VERSION_TOO_OLD : NOT_FOUND;
    *function = best->function;
    return FOUND;
}

static bool is_proper(const char *symbol, const void *pfn, int version, unsigned long long flags)
{
    return symbol != NULL && pfn != NULL && (flags & ~KNOWN_FLAGS) == 0 && version <= shim_reported_version();
}

CUresult cuGetProcAddress_v2(const char *symbol, void *pfn, int cudaVersion, unsigned long long flags, void *symbolStatus)
{
    if (!is_proper(symbol, pfn, cudaVersion, flags)) return CUDA_ERROR_INVALID_VALUE;
    int result = look_up(symbol, (unsigned)cudaVersion, flags, pfn);
    if (symbolStatus != NULL) *(int *)symbolStatus = result;
    return CUDA_SUCCESS;
}

CUresult cuGetProcAddress(const char *symbol, void *pfn, int cudaVersion, unsigned long long flags)
{
    if (!is_proper(symbol, pfn, cudaVersion, flags)) return CUDA_ERROR_INVALID_VALUE;
    void *function;
    if (look_up(symbol, (unsigned)cudaVersion, flags, &function) != FOUND) return CUDA_ERROR_NOT_FOUND;
    *(void **)pfn = function;
    return CUDA_SUCCESS;
}

CUresult cuGetExportTable(void *ppExportTable, const void *pExportTableId)
{
    if (ppExportTable == NULL || pExportTableId == NULL) return CUDA_ERROR_INVALID_VALUE;
    return vgpu_private_export_table(ppExportTable, pExportTableId);
}
