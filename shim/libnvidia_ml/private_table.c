/* SPDX-License-Identifier: Apache-2.0 */
/*
 * private_table.c - the one table of unpublished functions that NVIDIA's own nvidia-smi asks for, as far as it needs it.
 *
 * Without the table nvidia-smi (tried: 535, 550, 555 and 580) reports a version mismatch and ends. Word 0 is the table's
 * size in bytes. Four slots are answered, since nvidia-smi uses them in place of public functions: the enforced power limit,
 * and the processes of each kind (compute, graphics, MPS), with names. All others refuse, which it shows as "N/A".
 *
 * Must never: touch an argument of a slot that we do not know.
 */
#include "internal.h"

#include <stdio.h>
#include <string.h>

#define SLOT_ENFORCED_LIMIT 108
#define SLOT_COMPUTE 213
#define SLOT_GRAPHICS 214
#define SLOT_MPS 215
#define TABLE_WORDS 512 /* more than any of them looks at */
#define ROOM 500u /* entries of nvidia-smi's buffer; the call has no argument for it */

struct named_process {
    uint32_t pid;
    uint64_t used_memory;
    uint32_t gpu_instance, compute_instance;
    uint64_t used_protected_memory;
    char name[4096];
};
_Static_assert(sizeof(struct named_process) == 0x1020, "an entry of nvidia-smi's buffer");
_Static_assert(VGPU_PROCESSES <= ROOM, "all processes fit");

extern nvmlReturn_t nvmlDeviceGetEnforcedPowerLimit(nvmlDevice_t device, unsigned *limit);
extern nvmlReturn_t nvmlSystemGetProcessName(unsigned pid, char *name, unsigned length);

static nvmlReturn_t compute_processes(nvmlDevice_t device, unsigned *count, struct named_process *entries)
{
    struct vgpu_device_page page;
    nvmlReturn_t status = nvml_read(device, &page);
    if (status != NVML_SUCCESS) return status;
    if (count == NULL || entries == NULL) return NVML_ERROR_INVALID_ARGUMENT;
    struct nvml_merged_process merged[VGPU_PROCESSES];
    *count = nvml_merge_processes(&page, merged);
    for (unsigned i = 0; i < *count; i++) {
        entries[i] = (struct named_process){.pid = merged[i].pid, .used_memory = merged[i].used_bytes,
                                            .gpu_instance = NO_INSTANCE, .compute_instance = NO_INSTANCE};
        status = nvmlSystemGetProcessName(merged[i].pid, entries[i].name, sizeof entries[i].name);
        if (status != NVML_SUCCESS) snprintf(entries[i].name, sizeof entries[i].name, "[Not Found]");
    }
    return NVML_SUCCESS;
}

static nvmlReturn_t no_processes(nvmlDevice_t device, unsigned *count, struct named_process *entries)
{
    (void)entries;
    nvmlReturn_t status = nvml_check(device);
    if (status != NVML_SUCCESS) return status;
    if (count == NULL) return NVML_ERROR_INVALID_ARGUMENT;
    *count = 0;
    return NVML_SUCCESS;
}

static nvmlReturn_t refused(void) { return NVML_ERROR_NOT_SUPPORTED; }

EXPORT nvmlReturn_t nvmlInternalGetExportTable(const void **table, const void *id)
{
    static const uint8_t known[16] = {0xc4, 0xfe, 0x3e, 0x6c, 0xc9, 0x8f, 0x6c, 0x4e, 0xa3, 0x27, 0xee, 0x69, 0x6e, 0x12, 0xf7, 0xc4};
    /* SAFETY: functions as words, as the table has them; on x86-64 both are 8 bytes. */
    static const void *words[TABLE_WORDS] = {
        [0] = (const void *)(uintptr_t)(TABLE_WORDS * sizeof(void *)),
        [1 ... SLOT_ENFORCED_LIMIT - 1] = (const void *)refused,
        [SLOT_ENFORCED_LIMIT] = (const void *)nvmlDeviceGetEnforcedPowerLimit,
        [SLOT_ENFORCED_LIMIT + 1 ... SLOT_COMPUTE - 1] = (const void *)refused,
        [SLOT_COMPUTE] = (const void *)compute_processes,
        [SLOT_GRAPHICS] = (const void *)no_processes,
        [SLOT_MPS] = (const void *)no_processes,
        [SLOT_MPS + 1 ... TABLE_WORDS - 1] = (const void *)refused,
    };
    if (table == NULL || id == NULL) return NVML_ERROR_INVALID_ARGUMENT;
    if (memcmp(id, known, sizeof known) != 0) return NVML_ERROR_NOT_FOUND;
    *table = words;
    return NVML_SUCCESS;
}
