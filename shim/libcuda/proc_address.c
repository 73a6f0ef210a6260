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
#define KNOWN_FLAGS 3u

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

static int look_up(const char *name, int version, uint64_t flags, void **function)
{
    unsigned count;
    const struct proc_entry *entry = find_base(name, &count), *plain = NULL, *twin = NULL;
    *function = NULL;
    for (unsigned i = 0; i < count; i++) {
        const struct proc_entry **best = entry[i].flags != 0 ? &twin : &plain;
        if (entry[i].since <= version && (*best == NULL || entry[i].since >= (*best)->since)) *best = &entry[i];
    }
    if ((flags & PER_THREAD_DEFAULT_STREAM) != 0 && twin != NULL) plain = twin;
    if (plain != NULL) {
        *function = plain->function;
        return FOUND;
    }
    if (count != 0) return VERSION_TOO_OLD;
    /* Some callers name the very symbol: cuGraphInstantiateWithParams_ptsz. */
    for (unsigned i = 0; i < proc_entry_count; i++) {
        if (strcmp(proc_entries[i].symbol, name) != 0) continue;
        if (proc_entries[i].since > version) return VERSION_TOO_OLD;
        *function = proc_entries[i].function;
        return FOUND;
    }
    return NOT_FOUND;
}

CUresult cuGetProcAddress_v2(const char *symbol, void *pfn, int cudaVersion, unsigned long long flags, void *symbolStatus)
{
    if (symbol == NULL || pfn == NULL || (flags & ~(unsigned long long)KNOWN_FLAGS) != 0 || flags == KNOWN_FLAGS)
        return CUDA_ERROR_INVALID_VALUE;
    int result = look_up(symbol, cudaVersion, flags, pfn);
    if (symbolStatus != NULL) *(int *)symbolStatus = result;
    return CUDA_SUCCESS;
}

CUresult cuGetProcAddress(const char *symbol, void *pfn, int cudaVersion, unsigned long long flags)
{
    if (symbol == NULL || pfn == NULL || (flags & ~(unsigned long long)KNOWN_FLAGS) != 0 || flags == KNOWN_FLAGS)
        return CUDA_ERROR_INVALID_VALUE;
    void *function;
    if (look_up(symbol, cudaVersion, flags, &function) != FOUND) return CUDA_ERROR_NOT_FOUND;
    *(void **)pfn = function;
    return CUDA_SUCCESS;
}

CUresult cuGetExportTable(void *ppExportTable, const void *pExportTableId)
{
    if (ppExportTable == NULL || pExportTableId == NULL) return CUDA_ERROR_INVALID_VALUE;
    return vgpu_private_export_table(ppExportTable, pExportTableId);
}
