/* SPDX-License-Identifier: Apache-2.0 */
/*
 * device.c - everything a program may ask about the device, read from the device page. No ring traffic, no lock.
 *
 * The session stands for one device, ordinal 0; CUDA_VISIBLE_DEVICES may hide it (visible.c), and then cuInit has failed.
 */
#include "core.h"
#include "_generated_prototypes.h"

#include <stdio.h>
#include <stdlib.h>

int shim_devices;

/* Numbers of CUdevice_attribute used below. */
enum {
    MAX_THREADS_PER_BLOCK = 1, MAX_BLOCK_DIM_X = 2, MAX_GRID_DIM_X = 5, MAX_SHARED_MEMORY_PER_BLOCK = 8, TOTAL_CONSTANT_MEMORY = 9,
    WARP_SIZE = 10, MAX_PITCH = 11, MAX_REGISTERS_PER_BLOCK = 12, CLOCK_RATE = 13, TEXTURE_ALIGNMENT = 14,
    MULTIPROCESSOR_COUNT = 16, PCI_BUS_ID = 33, PCI_DEVICE_ID = 34, PCI_DOMAIN_ID = 50, COMPUTE_CAPABILITY_MAJOR = 75,
    COMPUTE_CAPABILITY_MINOR = 76
};

static bool attribute(unsigned number, int *value)
{
    if (number >= VGPU_DEVICE_ATTRIBUTES || shim.device->attribute_valid[number] == 0) return false;
    *value = shim.device->attribute[number];
    return true;
}

static int attribute_or_zero(unsigned number)
{
    int value = 0;
    (void)attribute(number, &value);
    return value;
}

CUresult cuDeviceGet(int *device, int ordinal)
{
    SHIM_LOCAL_ENTRY;
    if (device == NULL) return CUDA_ERROR_INVALID_VALUE;
    if (!shim_device_ok(ordinal)) return CUDA_ERROR_INVALID_DEVICE;
    *device = ordinal;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int *count)
{
    SHIM_LOCAL_ENTRY;
    if (count == NULL) return CUDA_ERROR_INVALID_VALUE;
    *count = shim_devices;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(void *name, int len, int dev)
{
    SHIM_LOCAL_ENTRY;
    if (name == NULL || len <= 0) return CUDA_ERROR_INVALID_VALUE;
    if (!shim_device_ok(dev)) return CUDA_ERROR_INVALID_DEVICE;
    size_t length = strnlen(shim.device->name, sizeof shim.device->name - 1);
    if (length > (size_t)len - 1) length = (size_t)len - 1;
    memcpy(name, shim.device->name, length);
    ((char *)name)[length] = '\0';
    return CUDA_SUCCESS;
}

static CUresult get_uuid(void *uuid, int dev)
{
    SHIM_LOCAL_ENTRY;
    if (uuid == NULL) return CUDA_ERROR_INVALID_VALUE;
    if (!shim_device_ok(dev)) return CUDA_ERROR_INVALID_DEVICE;
    memcpy(uuid, shim.device->uuid, sizeof shim.device->uuid);
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetUuid(void *uuid, int dev) { return get_uuid(uuid, dev); }
CUresult cuDeviceGetUuid_v2(void *uuid, int dev) { return get_uuid(uuid, dev); }

/* Locally unique identifiers are a thing of Windows. */
CUresult cuDeviceGetLuid(void *luid, void *deviceNodeMask, int dev)
{
    SHIM_LOCAL_ENTRY;
    if (luid == NULL || deviceNodeMask == NULL) return CUDA_ERROR_INVALID_VALUE;
    return shim_device_ok(dev) ? CUDA_ERROR_NOT_SUPPORTED : CUDA_ERROR_INVALID_DEVICE;
}

CUresult cuDeviceTotalMem_v2(size_t *bytes, int dev)
{
    SHIM_LOCAL_ENTRY;
    if (bytes == NULL) return CUDA_ERROR_INVALID_VALUE;
    if (!shim_device_ok(dev)) return CUDA_ERROR_INVALID_DEVICE;
    *bytes = shim.device->total_memory_bytes;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *pi, unsigned int attrib, int dev)
{
    SHIM_LOCAL_ENTRY;
    if (pi == NULL) return CUDA_ERROR_INVALID_VALUE;
    if (!shim_device_ok(dev)) return CUDA_ERROR_INVALID_DEVICE;
    return attribute(attrib, pi) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

/* CUdevprop, deprecated since CUDA 5. */
struct device_properties {
    int max_threads_per_block, max_threads_dim[3], max_grid_size[3], shared_memory_per_block, total_constant_memory;
    int warp_size, max_pitch, registers_per_block, clock_rate, texture_alignment;
};

CUresult cuDeviceGetProperties(void *prop, int dev)
{
    SHIM_LOCAL_ENTRY;
    if (prop == NULL) return CUDA_ERROR_INVALID_VALUE;
    if (!shim_device_ok(dev)) return CUDA_ERROR_INVALID_DEVICE;
    struct device_properties *out = prop;
    out->max_threads_per_block = attribute_or_zero(MAX_THREADS_PER_BLOCK);
    for (unsigned axis = 0; axis < 3; axis++) {
        out->max_threads_dim[axis] = attribute_or_zero(MAX_BLOCK_DIM_X + axis);
        out->max_grid_size[axis] = attribute_or_zero(MAX_GRID_DIM_X + axis);
    }
    out->shared_memory_per_block = attribute_or_zero(MAX_SHARED_MEMORY_PER_BLOCK);
    out->total_constant_memory = attribute_or_zero(TOTAL_CONSTANT_MEMORY);
    out->warp_size = attribute_or_zero(WARP_SIZE);
    out->max_pitch = attribute_or_zero(MAX_PITCH);
    out->registers_per_block = attribute_or_zero(MAX_REGISTERS_PER_BLOCK);
    out->clock_rate = attribute_or_zero(CLOCK_RATE);
    out->texture_alignment = attribute_or_zero(TEXTURE_ALIGNMENT);
    return CUDA_SUCCESS;
}

CUresult cuDeviceComputeCapability(int *major, int *minor, int dev)
{
    SHIM_LOCAL_ENTRY;
    if (major == NULL || minor == NULL) return CUDA_ERROR_INVALID_VALUE;
    if (!shim_device_ok(dev)) return CUDA_ERROR_INVALID_DEVICE;
    *major = attribute_or_zero(COMPUTE_CAPABILITY_MAJOR);
    *minor = attribute_or_zero(COMPUTE_CAPABILITY_MINOR);
    return CUDA_SUCCESS;
}

/* "[domain:]bus:device[.function]", hexadecimal. */
CUresult cuDeviceGetByPCIBusId(int *dev, const char *pciBusId)
{
    SHIM_LOCAL_ENTRY;
    if (dev == NULL || pciBusId == NULL) return CUDA_ERROR_INVALID_VALUE;
    unsigned domain = 0, bus, device, function = 0;
    int end = 0;
    bool parsed = sscanf(pciBusId, "%x:%x:%x.%x%n", &domain, &bus, &device, &function, &end) == 4 && pciBusId[end] == '\0';
    if (!parsed) {
        function = 0;
        end = 0;
        parsed = sscanf(pciBusId, "%x:%x:%x%n", &domain, &bus, &device, &end) == 3 && pciBusId[end] == '\0';
    }
    if (!parsed) {
        domain = 0;
        end = 0;
        parsed = sscanf(pciBusId, "%x:%x.%x%n", &bus, &device, &function, &end) == 3 && pciBusId[end] == '\0';
    }
    if (!parsed) {
        domain = function = 0;
        end = 0;
        parsed = sscanf(pciBusId, "%x:%x%n", &bus, &device, &end) == 2 && pciBusId[end] == '\0';
    }
    if (!parsed) return CUDA_ERROR_INVALID_VALUE;
    const struct vgpu_device_page *page = shim.device;
    if (function != 0 || (int)domain != page->pci_domain || (int)bus != page->pci_bus || (int)device != page->pci_device)
        return CUDA_ERROR_INVALID_DEVICE;
    *dev = 0;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetPCIBusId(void *pciBusId, int len, int dev)
{
    SHIM_LOCAL_ENTRY;
    if (pciBusId == NULL || len <= 0) return CUDA_ERROR_INVALID_VALUE;
    if (!shim_device_ok(dev)) return CUDA_ERROR_INVALID_DEVICE;
    char text[32];
    int length = snprintf(text, sizeof text, "%04X:%02X:%02X.0", (unsigned)shim.device->pci_domain & 0xffffu,
                          (unsigned)shim.device->pci_bus & 0xffu, (unsigned)shim.device->pci_device & 0xffu);
    if (len <= length) return CUDA_ERROR_INVALID_VALUE;
    memcpy(pciBusId, text, (size_t)length + 1);
    return CUDA_SUCCESS;
}

/* A device is not its own peer, and there is no other. */
CUresult cuDeviceCanAccessPeer(int *canAccessPeer, int dev, int peerDev)
{
    SHIM_LOCAL_ENTRY;
    if (canAccessPeer == NULL) return CUDA_ERROR_INVALID_VALUE;
    if (!shim_device_ok(dev) || !shim_device_ok(peerDev)) return CUDA_ERROR_INVALID_DEVICE;
    *canAccessPeer = 0;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetP2PAttribute(int *value, unsigned int attrib, int srcDevice, int dstDevice)
{
    SHIM_LOCAL_ENTRY;
    (void)attrib;
    if (value == NULL) return CUDA_ERROR_INVALID_VALUE;
    (void)srcDevice;
    (void)dstDevice;
    return CUDA_ERROR_INVALID_DEVICE;
}

CUresult cuDeviceGetExecAffinitySupport(int *pi, unsigned int type, int dev)
{
    SHIM_LOCAL_ENTRY;
    (void)type;
    if (pi == NULL) return CUDA_ERROR_INVALID_VALUE;
    if (!shim_device_ok(dev)) return CUDA_ERROR_INVALID_DEVICE;
    *pi = 0; /* it would need MPS */
    return CUDA_SUCCESS;
}

/* Asked of the host: an answer for each operation. */
CUresult cuDeviceGetHostAtomicCapabilities(void *capabilities, const void *operations, unsigned int count, int dev)
{
    CUresult status = shim_enter();
    if (status != CUDA_SUCCESS) return status;
    if (capabilities == NULL || operations == NULL || count == 0 || count > VGPU_SLOT_PAYLOAD_LIMIT / sizeof(uint32_t))
        return CUDA_ERROR_INVALID_VALUE;
    if (!shim_device_ok(dev)) return CUDA_ERROR_INVALID_DEVICE;
    const uint64_t argument[8] = {count};
    uint32_t bytes = count * (uint32_t)sizeof(uint32_t), got = 0;
    uint32_t answer[VGPU_SLOT_PAYLOAD_LIMIT / sizeof(uint32_t)];
    status = shim_reply(VGPU_CALL_cuDeviceGetHostAtomicCapabilities, argument, operations, bytes, NULL, answer, bytes, &got);
    if (status != CUDA_SUCCESS) return status;
    if (got != bytes) return CUDA_ERROR_UNKNOWN;
    memcpy(capabilities, answer, bytes);
    return CUDA_SUCCESS;
}

/* ---- for the private tables ---- */

int shim_driver_version(void) { return shim_reported_version(); }

int shim_device_count(void) { return shim_enter_local() == CUDA_SUCCESS ? shim_devices : 0; }

void shim_device_uuid(int ordinal, uint8_t out[16])
{
    memset(out, 0, 16);
    if (ordinal < shim_device_count()) memcpy(out, shim.device->uuid, 16);
}

void shim_device_pci(int ordinal, int32_t *domain, int32_t *bus, int32_t *device)
{
    *domain = *bus = *device = 0;
    if (ordinal >= shim_device_count()) return;
    *domain = attribute_or_zero(PCI_DOMAIN_ID);
    *bus = attribute_or_zero(PCI_BUS_ID);
    *device = attribute_or_zero(PCI_DEVICE_ID);
}

int shim_topology(const uint8_t **gpc_of_tpc, const uint8_t **index_in_gpc, size_t *n)
{
    if (shim_device_count() == 0) return 1;
    uint32_t known = shim.device->topology_count;
    if (known == 0 || known > VGPU_TOPOLOGY_MAX) {
        *gpc_of_tpc = *index_in_gpc = NULL;
        *n = (size_t)(attribute_or_zero(MULTIPROCESSOR_COUNT) / 2);
        return 0;
    }
    *gpc_of_tpc = shim.device->gpc_of_tpc;
    *index_in_gpc = shim.device->index_in_gpc;
    *n = known;
    return 0;
}
