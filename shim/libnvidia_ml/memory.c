/* SPDX-License-Identifier: Apache-2.0 */
/* memory.c - this VM's memory: its quota and what its sessions hold. What other VMs use is none of its business. */
#include "internal.h"

/* Total, reserved, used by programs, free: they always add up, whatever order the host wrote them in. */
static struct nvml_memory_v2 account(const struct vgpu_device_page *page)
{
    uint64_t total = page->total_memory_bytes;
    uint64_t reserved = page->memory_reserved_bytes == UNKNOWN_64 ? 0 : page->memory_reserved_bytes;
    uint64_t used = page->memory_used_bytes; /* at most total, see page.c */
    if (reserved > total - used) reserved = total - used;
    return (struct nvml_memory_v2){.total = total, .reserved = reserved, .used = used, .free = total - used - reserved};
}

/* The old structure has no word for reserved memory and counts it as used. */
EXPORT nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t device, struct nvml_memory *memory)
{
    struct vgpu_device_page page;
    nvmlReturn_t status = nvml_read(device, &page);
    if (status != NVML_SUCCESS) return status;
    if (memory == NULL) return NVML_ERROR_INVALID_ARGUMENT;
    struct nvml_memory_v2 whole = account(&page);
    *memory = (struct nvml_memory){.total = whole.total, .free = whole.free, .used = whole.used + whole.reserved};
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t device, struct nvml_memory_v2 *memory)
{
    struct vgpu_device_page page;
    nvmlReturn_t status = nvml_read(device, &page);
    if (status != NVML_SUCCESS) return status;
    if (memory == NULL) return NVML_ERROR_INVALID_ARGUMENT;
    if (memory->version != NVML_VERSION_OF(struct nvml_memory_v2, 2)) return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    unsigned version = memory->version;
    *memory = account(&page);
    memory->version = version;
    return NVML_SUCCESS;
}

/* How much of the aperture is mapped is the host's affair; a VM maps none of it. */
EXPORT nvmlReturn_t nvmlDeviceGetBAR1MemoryInfo(nvmlDevice_t device, struct nvml_bar1_memory *memory)
{
    struct vgpu_device_page page;
    nvmlReturn_t status = nvml_read(device, &page);
    if (status != NVML_SUCCESS) return status;
    if (memory == NULL) return NVML_ERROR_INVALID_ARGUMENT;
    if (page.bar1_total_bytes == UNKNOWN_64) return NVML_ERROR_NOT_SUPPORTED;
    *memory = (struct nvml_bar1_memory){.total = page.bar1_total_bytes, .free = page.bar1_total_bytes};
    return NVML_SUCCESS;
}

/* kind: 0 corrected, 1 uncorrected; counter: 0 volatile, 1 aggregate. */
EXPORT nvmlReturn_t nvmlDeviceGetTotalEccErrors(nvmlDevice_t device, unsigned kind, unsigned counter, unsigned long long *count)
{
    static const size_t offset[2][2] = {
        {offsetof(struct vgpu_device_page, ecc_corrected_volatile), offsetof(struct vgpu_device_page, ecc_corrected_aggregate)},
        {offsetof(struct vgpu_device_page, ecc_uncorrected_volatile), offsetof(struct vgpu_device_page, ecc_uncorrected_aggregate)},
    };
    if (kind > 1 || counter > 1) return nvml_refuse_device(device, NVML_ERROR_INVALID_ARGUMENT);
    return nvml_read_u64(device, offset[kind][counter], count);
}

EXPORT nvmlReturn_t nvmlDeviceGetEccMode(nvmlDevice_t device, unsigned *current, unsigned *pending)
{
    if (current != NULL && pending == NULL) return nvml_refuse_device(device, NVML_ERROR_INVALID_ARGUMENT);
    nvmlReturn_t status = nvml_read_u32(device, offsetof(struct vgpu_device_page, ecc_enabled), current);
    if (status == NVML_SUCCESS) *pending = *current = *current != 0;
    return status;
}
