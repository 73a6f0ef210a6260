/* SPDX-License-Identifier: Apache-2.0 */
/*
 * processes.c - which of this VM's processes use the GPU. A process may hold several sessions; NVML shows it once.
 */
#include "internal.h"

#include <string.h>

unsigned nvml_merge_processes(const struct vgpu_device_page *page, struct nvml_merged_process *merged)
{
    unsigned count = 0;
    for (uint32_t i = 0; i < page->process_count; i++) {
        const struct vgpu_process *one = &page->process[i];
        if (one->pid == 0) continue;
        unsigned at = 0;
        while (at < count && merged[at].pid != one->pid) at++;
        if (at == count) merged[count++] = (struct nvml_merged_process){.pid = one->pid, .sm_percent = VGPU_UNKNOWN};
        merged[at].used_bytes += one->memory_used_bytes;
        if (one->sm_utilization_percent != VGPU_UNKNOWN) {
            uint32_t sum = (merged[at].sm_percent == VGPU_UNKNOWN ? 0 : merged[at].sm_percent) + one->sm_utilization_percent % 101;
            merged[at].sm_percent = sum > 100 ? 100 : sum;
        }
    }
    return count;
}

/* The caller's count is checked and replaced by what there is. SUCCESS: the entries fit and `page` is filled. */
static nvmlReturn_t begin_list(nvmlDevice_t device, unsigned *count, const void *entries, struct nvml_merged_process *merged)
{
    nvmlReturn_t status = nvml_check(device);
    if (status != NVML_SUCCESS) return status;
    if (count == NULL || (entries == NULL && *count != 0)) return NVML_ERROR_INVALID_ARGUMENT;
    struct vgpu_device_page page;
    status = nvml_read_page(&page);
    if (status != NVML_SUCCESS) return status;
    unsigned room = *count;
    *count = nvml_merge_processes(&page, merged);
    return *count > room ? NVML_ERROR_INSUFFICIENT_SIZE : NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetComputeRunningProcesses(nvmlDevice_t device, unsigned *count, struct nvml_process_v1 *infos)
{
    struct nvml_merged_process merged[VGPU_PROCESSES];
    nvmlReturn_t status = begin_list(device, count, infos, merged);
    for (unsigned i = 0; status == NVML_SUCCESS && i < *count; i++)
        infos[i] = (struct nvml_process_v1){merged[i].pid, merged[i].used_bytes};
    return status;
}

EXPORT nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v2(nvmlDevice_t device, unsigned *count, struct nvml_process_v2 *infos)
{
    struct nvml_merged_process merged[VGPU_PROCESSES];
    nvmlReturn_t status = begin_list(device, count, infos, merged);
    for (unsigned i = 0; status == NVML_SUCCESS && i < *count; i++)
        infos[i] = (struct nvml_process_v2){merged[i].pid, merged[i].used_bytes, NO_INSTANCE, NO_INSTANCE};
    return status;
}

/* _v2 and _v3 use one structure. */
EXPORT nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t device, unsigned *count, struct nvml_process_v2 *infos)
{
    return nvmlDeviceGetComputeRunningProcesses_v2(device, count, infos);
}

/* Nothing draws on this GPU, and no MPS server runs in a guest. */
static nvmlReturn_t empty_list(nvmlDevice_t device, unsigned *count)
{
    nvmlReturn_t status = nvml_check(device);
    if (status != NVML_SUCCESS) return status;
    if (count == NULL) return NVML_ERROR_INVALID_ARGUMENT;
    *count = 0;
    return NVML_SUCCESS;
}

#define ANSWER_EMPTY(function)                                                       \
    EXPORT nvmlReturn_t function(nvmlDevice_t device, unsigned *count, void *entries) \
    {                                                                                \
        (void)entries;                                                               \
        return empty_list(device, count);                                            \
    }
ANSWER_EMPTY(nvmlDeviceGetGraphicsRunningProcesses)
ANSWER_EMPTY(nvmlDeviceGetGraphicsRunningProcesses_v2)
ANSWER_EMPTY(nvmlDeviceGetGraphicsRunningProcesses_v3)
ANSWER_EMPTY(nvmlDeviceGetMPSComputeRunningProcesses)
ANSWER_EMPTY(nvmlDeviceGetMPSComputeRunningProcesses_v2)
ANSWER_EMPTY(nvmlDeviceGetMPSComputeRunningProcesses_v3)
ANSWER_EMPTY(nvmlDeviceGetEncoderSessions)
ANSWER_EMPTY(nvmlDeviceGetFBCSessions)
ANSWER_EMPTY(nvmlDeviceGetAccountingPids)

EXPORT nvmlReturn_t nvmlDeviceGetRunningProcessDetailList(nvmlDevice_t device, struct nvml_process_detail_list *list)
{
    nvmlReturn_t status = nvml_check(device);
    if (status != NVML_SUCCESS) return status;
    if (list == NULL) return NVML_ERROR_INVALID_ARGUMENT;
    if (list->version != NVML_VERSION_OF(struct nvml_process_detail_list, 1)) return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    if (list->mode > 2) return NVML_ERROR_INVALID_ARGUMENT;
    if (list->mode != 0) return empty_list(device, &list->count);
    struct nvml_merged_process merged[VGPU_PROCESSES];
    status = begin_list(device, &list->count, list->entries, merged);
    for (unsigned i = 0; status == NVML_SUCCESS && i < list->count; i++)
        list->entries[i] = (struct nvml_process_detail){merged[i].pid, merged[i].used_bytes, NO_INSTANCE, NO_INSTANCE, 0};
    return status;
}

/* ---- utilisation by process: one sample, the host's latest ---- */

/* Entries newer than last_seen into `busy`; their number. */
static unsigned busy_processes(const struct vgpu_device_page *page, unsigned long long last_seen, struct nvml_merged_process *busy)
{
    if (page->telemetry_ns / 1000 <= last_seen) return 0;
    unsigned count = nvml_merge_processes(page, busy), kept = 0;
    for (unsigned i = 0; i < count; i++)
        if (busy[i].sm_percent != VGPU_UNKNOWN) busy[kept++] = busy[i];
    return kept;
}

EXPORT nvmlReturn_t nvmlDeviceGetProcessUtilization(nvmlDevice_t device, struct nvml_process_sample *samples, unsigned *count,
                                                    unsigned long long last_seen)
{
    struct vgpu_device_page page;
    nvmlReturn_t status = nvml_read(device, &page);
    if (status != NVML_SUCCESS) return status;
    if (count == NULL) return NVML_ERROR_INVALID_ARGUMENT;
    struct nvml_merged_process busy[VGPU_PROCESSES];
    unsigned found = busy_processes(&page, last_seen, busy), room = *count;
    *count = found;
    if (samples == NULL) { /* how many there may be; 0 would look as if it never could be more */
        *count = VGPU_PROCESSES;
        return NVML_ERROR_INSUFFICIENT_SIZE;
    }
    if (found == 0) return NVML_ERROR_NOT_FOUND;
    if (found > room) return NVML_ERROR_INSUFFICIENT_SIZE;
    for (unsigned i = 0; i < found; i++)
        samples[i] = (struct nvml_process_sample){.pid = busy[i].pid, .microseconds = page.telemetry_ns / 1000, .sm = busy[i].sm_percent};
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetProcessesUtilizationInfo(nvmlDevice_t device, struct nvml_processes_utilization *info)
{
    struct vgpu_device_page page;
    nvmlReturn_t status = nvml_read(device, &page);
    if (status != NVML_SUCCESS) return status;
    if (info == NULL) return NVML_ERROR_INVALID_ARGUMENT;
    if (info->version != NVML_VERSION_OF(struct nvml_processes_utilization, 1)) return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    struct nvml_merged_process busy[VGPU_PROCESSES];
    unsigned found = busy_processes(&page, info->last_seen, busy), room = info->count;
    info->count = found;
    if (info->entries == NULL) {
        info->count = VGPU_PROCESSES;
        return NVML_ERROR_INSUFFICIENT_SIZE;
    }
    if (found == 0) return NVML_ERROR_NOT_FOUND;
    if (found > room) return NVML_ERROR_INSUFFICIENT_SIZE;
    for (unsigned i = 0; i < found; i++)
        info->entries[i] = (struct nvml_process_utilization){.microseconds = page.telemetry_ns / 1000, .pid = busy[i].pid, .sm = busy[i].sm_percent};
    return NVML_SUCCESS;
}

/* Accounting is off (modes.c), so there is nothing about anybody. */
EXPORT nvmlReturn_t nvmlDeviceGetAccountingStats(nvmlDevice_t device, unsigned pid, struct nvml_accounting_stats *stats)
{
    (void)pid;
    return nvml_refuse_device(device, stats == NULL ? NVML_ERROR_INVALID_ARGUMENT : NVML_ERROR_NOT_FOUND);
}
