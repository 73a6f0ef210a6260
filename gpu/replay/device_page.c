/* SPDX-License-Identifier: Apache-2.0 */
/*
 * device_page.c - everything a guest may ask about the device, asked of the driver once, while the worker is warm. The
 * guest answers from this page with no call at all.
 *
 * Abilities that this system does not carry (sharing memory with other processes or devices, reaching unregistered host
 * memory from a kernel) are reported as absent, so that programs choose the ways that work.
 */
#include "internal.h"

#include <stdio.h>

#define MULTIPROCESSORS 16u
#define TOPOLOGY_SLOT 4
#define EVEN_SPREAD 8u /* TPC i in GPC i mod 8: gave the same results as the real map (measured) */

/* CUdevice_attribute numbers of abilities that end at the VM's border. */
static const uint8_t absent[] = {
    83,  /* managed memory: needs the page faults of a real driver in the guest */
    88,  /* pageable memory access */
    91,  /* memory a program registered, at its host address: such memory is staged */
    89,  /* concurrent managed access */
    100, /* ... through the host's page tables */
    101, /* direct managed access from the host */
    103, /* memory handles as file descriptors */
    104, 105, /* ... as Windows handles */
    110, 116, 117, /* GPUDirect RDMA, and its flushes */
    112, 113, 114, /* sparse arrays, read-only registration, timeline semaphores */
    119, /* pool handle types */
    124, /* dma-buf */
    125, /* inter-process events */
    128, /* fabric handles */
    132, /* multicast */
    136, 137, /* decompression */
    141, 142, 143, 144, 145, 146, /* memory on host NUMA nodes and host pools */
};

static void fill_attributes(struct vgpu_replay *replay, struct vgpu_device_page *page)
{
    for (unsigned i = 0; i < VGPU_DEVICE_ATTRIBUTES; i++) {
        int value = 0;
        page->attribute_valid[i] = i != 0 && replay->driver.cuDeviceGetAttribute(&value, i, replay->device) == 0;
        page->attribute[i] = page->attribute_valid[i] ? value : 0;
    }
    for (unsigned i = 0; i < sizeof absent; i++)
        page->attribute[absent[i]] = 0;
}

static void fill_bus(struct vgpu_replay *replay, struct vgpu_device_page *page)
{
    char text[32] = "";
    unsigned domain, bus, device, function;
    if (replay->driver.cuDeviceGetPCIBusId(text, sizeof text, replay->device) != 0)
        return;
    text[sizeof text - 1] = '\0';
    if (sscanf(text, "%x:%x:%x.%x", &domain, &bus, &device, &function) != 4)
        return;
    page->pci_domain = (int32_t)domain;
    page->pci_bus = (int32_t)bus;
    page->pci_device = (int32_t)device;
    page->pci_function = (int32_t)function;
}

/* The private table that cuBLASLt reads: two byte arrays, a byte for each TPC (two multiprocessors). */
static bool ask_topology(struct vgpu_replay *replay, const uint8_t **gpc, const uint8_t **index)
{
    static const uint8_t id[16] = {0x17, 0x34, 0xdc, 0x26, 0x80, 0x0d, 0x47, 0x45, 0x87, 0x26, 0xc0, 0xf1, 0xe7, 0xdd, 0x8b, 0xca};
    const void *const *table = NULL;
    if (replay->driver.cuGetExportTable(&table, id) != 0 || table == NULL)
        return false;
    /* SAFETY: a table begins with its size in bytes; slot n is word n. */
    size_t bytes = (size_t)(uintptr_t)table[0];
    if (bytes < (TOPOLOGY_SLOT + 1) * sizeof(void *) || table[TOPOLOGY_SLOT] == NULL)
        return false;
    int (*get)(const uint8_t **, const uint8_t **) = (int (*)(const uint8_t **, const uint8_t **))(uintptr_t)table[TOPOLOGY_SLOT];
    return get(gpc, index) == 0 && *gpc != NULL && *index != NULL;
}

static void fill_topology(struct vgpu_replay *replay, struct vgpu_device_page *page)
{
    uint32_t count = (uint32_t)(page->attribute[MULTIPROCESSORS] > 0 ? page->attribute[MULTIPROCESSORS] : 2) / 2;
    if (count == 0)
        count = 1;
    if (count > VGPU_TOPOLOGY_MAX)
        count = VGPU_TOPOLOGY_MAX;
    page->topology_count = count;
    const uint8_t *gpc = NULL, *index = NULL;
    bool known = (page->device_flags & VGPU_DEVICE_SOFTWARE) == 0 && ask_topology(replay, &gpc, &index);
    for (uint32_t i = 0; i < count; i++) {
        page->gpc_of_tpc[i] = known ? gpc[i] : (uint8_t)(i % EVEN_SPREAD);
        page->index_in_gpc[i] = known ? index[i] : (uint8_t)(i / EVEN_SPREAD);
    }
}

static void fill_granularity(struct vgpu_replay *replay, struct vgpu_device_page *page)
{
    const CUmemAllocationProp pinned_here = replay_pinned_here(replay);
    size_t size = 0;
    if (replay->driver.cuMemGetAllocationGranularity(&size, &pinned_here, 0) == 0)
        page->vmm_granularity_minimum = size;
    if (replay->driver.cuMemGetAllocationGranularity(&size, &pinned_here, 1) == 0)
        page->vmm_granularity_recommended = size;
}

CUresult replay_fill_device_page(struct vgpu_replay *replay, uint32_t flags)
{
    struct vgpu_device_page *page = (struct vgpu_device_page *)(void *)replay->segment;
    struct vgpu_driver *driver = &replay->driver;
    page->layout_version = VGPU_LAYOUT_VERSION;
    page->device_flags = flags | (replay->gpu_fences ? VGPU_DEVICE_GPU_FENCES : 0);
    int version = 0, status;
    size_t total = 0;
    if ((status = driver->cuDriverGetVersion(&version)) != 0 ||
        (status = driver->cuDeviceGetName(page->name, sizeof page->name, replay->device)) != 0 ||
        (status = driver->cuDeviceGetUuid_v2(page->uuid, replay->device)) != 0 ||
        (status = driver->cuDeviceTotalMem_v2(&total, replay->device)) != 0)
        return (CUresult)status;
    page->driver_version = (uint32_t)version;
    page->name[sizeof page->name - 1] = '\0';
    page->total_memory_bytes = total;
    fill_attributes(replay, page);
    fill_bus(replay, page);
    fill_topology(replay, page);
    fill_granularity(replay, page);
    int least = 0, greatest = 0;
    if (driver->cuCtxGetStreamPriorityRange(&least, &greatest) == 0) {
        page->stream_priority_least = least;
        page->stream_priority_greatest = greatest;
    }
    page->magic = VGPU_SEGMENT_MAGIC;
    return CUDA_SUCCESS;
}
