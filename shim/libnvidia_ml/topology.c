/* SPDX-License-Identifier: Apache-2.0 */
/*
 * topology.c - which processors and memory of this machine are near the GPU, and how its GPUs (one) reach each other.
 *
 * From sysfs where the GPU is a PCI device here. Where sysfs says nothing, every processor is as near as any other.
 */
#include "internal.h"

#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define WORD_BITS (8 * sizeof(unsigned long))

/* Sets the bits of a list such as "0-3,8" that fit into `words`; false if it is none. */
static bool parse_list(const char *text, unsigned long *set, unsigned words)
{
    bool any = false;
    for (const char *at = text; *at >= '0' && *at <= '9';) {
        char *end;
        unsigned long first = strtoul(at, &end, 10), last = first;
        if (*end == '-') last = strtoul(end + 1, &end, 10);
        for (unsigned long bit = first; bit <= last && bit < words * WORD_BITS; bit++) set[bit / WORD_BITS] |= 1ul << bit % WORD_BITS;
        any = true;
        at = *end == ',' ? end + 1 : end;
    }
    return any;
}

static bool read_list(const char *path, unsigned long *set, unsigned words)
{
    char text[4096];
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return false;
    ssize_t count = read(file, text, sizeof text - 1);
    close(file);
    if (count <= 0) return false;
    text[count] = '\0';
    return parse_list(text, set, words);
}

static nvmlReturn_t near_gpu(nvmlDevice_t device, unsigned words, unsigned long *set, const char *in_device, const char *everywhere)
{
    struct vgpu_device_page page;
    nvmlReturn_t status = nvml_read(device, &page);
    if (status != NVML_SUCCESS) return status;
    if (set == NULL || words == 0) return NVML_ERROR_INVALID_ARGUMENT;
    memset(set, 0, words * sizeof *set);
    struct nvml_pci_address address = {(unsigned)page.pci_domain, (unsigned)page.pci_bus, (unsigned)page.pci_device, (unsigned)page.pci_function};
    char path[PATH_MAX];
    long long node = -1;
    if (in_device != NULL) {
        if (nvml_sysfs_path(&address, in_device, path, sizeof path) && read_list(path, set, words)) return NVML_SUCCESS;
    } else if (nvml_sysfs_number(&address, "numa_node", &node) && node >= 0 && (unsigned long long)node < words * WORD_BITS) {
        set[node / WORD_BITS] = 1ul << node % WORD_BITS;
        return NVML_SUCCESS;
    }
    return read_list(everywhere, set, words) ? NVML_SUCCESS : NVML_ERROR_NOT_SUPPORTED;
}

EXPORT nvmlReturn_t nvmlDeviceGetCpuAffinity(nvmlDevice_t device, unsigned words, unsigned long *set)
{
    return near_gpu(device, words, set, "local_cpulist", "/sys/devices/system/cpu/online");
}

EXPORT nvmlReturn_t nvmlDeviceGetCpuAffinityWithinScope(nvmlDevice_t device, unsigned words, unsigned long *set, unsigned scope)
{
    return scope > 1 ? nvml_refuse_device(device, NVML_ERROR_INVALID_ARGUMENT) : nvmlDeviceGetCpuAffinity(device, words, set);
}

EXPORT nvmlReturn_t nvmlDeviceGetMemoryAffinity(nvmlDevice_t device, unsigned words, unsigned long *set, unsigned scope)
{
    if (scope > 1) return nvml_refuse_device(device, NVML_ERROR_INVALID_ARGUMENT);
    return near_gpu(device, words, set, NULL, "/sys/devices/system/node/online");
}

/* Of the calling thread, as documented. */
static nvmlReturn_t run_on(const unsigned long *words)
{
    return sched_setaffinity(0, sizeof(cpu_set_t), (const cpu_set_t *)words) == 0 ? NVML_SUCCESS : NVML_ERROR_UNKNOWN;
}

EXPORT nvmlReturn_t nvmlDeviceSetCpuAffinity(nvmlDevice_t device)
{
    unsigned long set[sizeof(cpu_set_t) / sizeof(unsigned long)];
    nvmlReturn_t status = nvmlDeviceGetCpuAffinity(device, sizeof set / sizeof set[0], set);
    return status == NVML_SUCCESS ? run_on(set) : status;
}

EXPORT nvmlReturn_t nvmlDeviceClearCpuAffinity(nvmlDevice_t device)
{
    unsigned long set[sizeof(cpu_set_t) / sizeof(unsigned long)];
    nvmlReturn_t status = nvml_check(device);
    if (status != NVML_SUCCESS) return status;
    memset(set, 0xff, sizeof set);
    return run_on(set);
}

/* ---- GPUs among themselves ---- */

static nvmlReturn_t both(nvmlDevice_t first, nvmlDevice_t second, const void *out)
{
    nvmlReturn_t status = nvml_check(first);
    if (status == NVML_SUCCESS) status = nvml_check(second);
    return status == NVML_SUCCESS && out == NULL ? NVML_ERROR_INVALID_ARGUMENT : status;
}

EXPORT nvmlReturn_t nvmlDeviceGetTopologyCommonAncestor(nvmlDevice_t first, nvmlDevice_t second, unsigned *level)
{
    nvmlReturn_t status = both(first, second, level);
    if (status == NVML_SUCCESS) *level = 0; /* one and the same */
    return status;
}

EXPORT nvmlReturn_t nvmlDeviceGetTopologyNearestGpus(nvmlDevice_t device, unsigned level, unsigned *count, nvmlDevice_t *devices)
{
    (void)level;
    (void)devices;
    nvmlReturn_t status = both(device, device, count);
    if (status == NVML_SUCCESS) *count = 0;
    return status;
}

EXPORT nvmlReturn_t nvmlDeviceGetP2PStatus(nvmlDevice_t first, nvmlDevice_t second, unsigned capability, unsigned *result)
{
    nvmlReturn_t status = both(first, second, result);
    if (status != NVML_SUCCESS) return status;
    if (capability > 5) return NVML_ERROR_INVALID_ARGUMENT;
    *result = capability == 2 ? 5 : 0; /* a GPU reaches its own memory, but not over NVLink (5: not supported) */
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlSystemGetTopologyGpuSet(unsigned cpu, unsigned *count, nvmlDevice_t *devices)
{
    unsigned long set[sizeof(cpu_set_t) / sizeof(unsigned long)];
    if (count == NULL) return nvml_refuse(NVML_ERROR_INVALID_ARGUMENT);
    nvmlReturn_t status = nvmlDeviceGetCpuAffinity(&nvml_the_device, sizeof set / sizeof set[0], set);
    if (status != NVML_SUCCESS) return status;
    if (cpu >= 8 * sizeof set) return NVML_ERROR_INVALID_ARGUMENT;
    unsigned room = *count;
    *count = (set[cpu / WORD_BITS] >> cpu % WORD_BITS) & 1;
    if (devices != NULL && *count > room) return NVML_ERROR_INSUFFICIENT_SIZE;
    if (devices != NULL && *count == 1) devices[0] = &nvml_the_device;
    return NVML_SUCCESS;
}
