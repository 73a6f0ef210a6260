/* SPDX-License-Identifier: Apache-2.0 */
/*
 * identity.c - which GPU this is: handles, name, UUID, PCI identity, architecture. All of it agrees with libcuda, which
 * reads the same page.
 */
#include "internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

/* What a virtual GPU shows as a PCI device (docs/vfio-user.md), where no sysfs says otherwise. */
#define VENDOR_NVIDIA 0x10deu
#define VIRTUAL_DEVICE_ID 0x233110deu
#define VIRTUAL_SUBSYSTEM_ID 0x16c110deu
#define PCI_CLASS_DISPLAY 0x03u
#define PCI_SUBCLASS_3D 0x02u

/* ---- facts derived from the page ---- */

bool nvml_attribute(const struct vgpu_device_page *page, unsigned attribute, int *value)
{
    if (attribute >= VGPU_DEVICE_ATTRIBUTES || !page->attribute_valid[attribute]) return false;
    *value = page->attribute[attribute];
    return true;
}

unsigned nvml_architecture(const struct vgpu_device_page *page)
{
    if (page->architecture != VGPU_UNKNOWN) return page->architecture;
    int major, minor;
    if (!nvml_attribute(page, ATTRIBUTE_MAJOR, &major) || !nvml_attribute(page, ATTRIBUTE_MINOR, &minor)) return VGPU_UNKNOWN;
    switch (major) {
    case 7: return minor == 5 ? NVML_ARCHITECTURE_TURING : NVML_ARCHITECTURE_VOLTA;
    case 8: return minor == 9 ? NVML_ARCHITECTURE_ADA : NVML_ARCHITECTURE_AMPERE;
    case 9: return NVML_ARCHITECTURE_HOPPER;
    case 10: case 11: case 12: return NVML_ARCHITECTURE_BLACKWELL;
    default: return VGPU_UNKNOWN;
    }
}

void nvml_uuid_text(const struct vgpu_device_page *page, char text[41])
{
    char *next = text + sprintf(text, "GPU");
    for (unsigned i = 0; i < 16; i++) next += sprintf(next, "%s%02x", i == 0 || i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "", page->uuid[i]);
}

/* ---- handles ---- */

EXPORT nvmlReturn_t nvmlDeviceGetCount_v2(unsigned *count)
{
    if (!nvml_is_initialized()) return NVML_ERROR_UNINITIALIZED;
    if (count == NULL) return NVML_ERROR_INVALID_ARGUMENT;
    *count = 1;
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetCount(unsigned *count) { return nvmlDeviceGetCount_v2(count); }

EXPORT nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t *device)
{
    struct vgpu_device_page page;
    if (!nvml_is_initialized()) return NVML_ERROR_UNINITIALIZED;
    if (device == NULL || index != 0) return NVML_ERROR_INVALID_ARGUMENT;
    nvmlReturn_t status = nvml_read_page(&page); /* a lost GPU is noticed here */
    if (status == NVML_SUCCESS || status == NVML_ERROR_TIMEOUT) *device = &nvml_the_device;
    return status == NVML_ERROR_TIMEOUT ? NVML_SUCCESS : status;
}

EXPORT nvmlReturn_t nvmlDeviceGetHandleByIndex(unsigned index, nvmlDevice_t *device)
{
    return nvmlDeviceGetHandleByIndex_v2(index, device);
}

/* The handle if the answer to `matches` is yes. */
static nvmlReturn_t handle_if(nvmlDevice_t *device, bool (*matches)(const struct vgpu_device_page *, const void *), const void *wanted)
{
    if (!nvml_is_initialized()) return NVML_ERROR_UNINITIALIZED;
    if (device == NULL || wanted == NULL) return NVML_ERROR_INVALID_ARGUMENT;
    struct vgpu_device_page page;
    nvmlReturn_t status = nvml_read_page(&page);
    if (status != NVML_SUCCESS) return status;
    if (!matches(&page, wanted)) return NVML_ERROR_NOT_FOUND;
    *device = &nvml_the_device;
    return NVML_SUCCESS;
}

static bool has_uuid_text(const struct vgpu_device_page *page, const void *wanted)
{
    char text[41];
    nvml_uuid_text(page, text);
    return strcasecmp(text, wanted) == 0;
}
static bool has_uuid_bytes(const struct vgpu_device_page *page, const void *wanted) { return memcmp(page->uuid, wanted, 16) == 0; }
static bool has_serial(const struct vgpu_device_page *page, const void *wanted)
{
    return page->serial[0] != '\0' && strcmp(page->serial, wanted) == 0;
}

EXPORT nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *device) { return handle_if(device, has_uuid_text, uuid); }
EXPORT nvmlReturn_t nvmlDeviceGetHandleBySerial(const char *serial, nvmlDevice_t *device) { return handle_if(device, has_serial, serial); }

EXPORT nvmlReturn_t nvmlDeviceGetHandleByUUIDV(const struct nvml_uuid *uuid, nvmlDevice_t *device)
{
    if (!nvml_is_initialized()) return NVML_ERROR_UNINITIALIZED;
    if (uuid == NULL) return NVML_ERROR_INVALID_ARGUMENT;
    if (uuid->version != NVML_VERSION_OF(struct nvml_uuid, 1)) return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    if (uuid->type == NVML_UUID_BINARY) return handle_if(device, has_uuid_bytes, uuid->value.bytes);
    if (uuid->type != NVML_UUID_ASCII || memchr(uuid->value.text, '\0', sizeof uuid->value.text) == NULL) return NVML_ERROR_INVALID_ARGUMENT;
    return handle_if(device, has_uuid_text, uuid->value.text);
}

static bool has_pci_address(const struct vgpu_device_page *page, const void *wanted)
{
    const struct nvml_pci_address *address = wanted;
    return (unsigned)page->pci_domain == address->domain && (unsigned)page->pci_bus == address->bus &&
           (unsigned)page->pci_device == address->device && (unsigned)page->pci_function == address->function;
}

/* "domain:bus:device.function"; domain and function may be left out. */
static bool parse_pci_address(const char *text, struct nvml_pci_address *address)
{
    unsigned long part[4];
    unsigned count = 0;
    char separator[4] = {0};
    for (const char *at = text; count < 4;) {
        char *end;
        if (strchr("0123456789abcdefABCDEF", *at) == NULL || *at == '\0') return false;
        part[count] = strtoul(at, &end, 16);
        if (end - at > 8) return false;
        separator[count++] = *end;
        if (*end == '\0') break;
        if (*end != ':' && *end != '.') return false;
        at = end + 1;
    }
    bool has_function = count >= 2 && separator[count - 2] == '.';
    unsigned before = count - has_function; /* bus:device or domain:bus:device */
    if (separator[count - 1] != '\0' || (before != 2 && before != 3)) return false;
    for (unsigned i = 0; i + 1 < before; i++)
        if (separator[i] != ':') return false;
    *address = (struct nvml_pci_address){before == 3 ? (unsigned)part[0] : 0, (unsigned)part[before - 2], (unsigned)part[before - 1],
                                         has_function ? (unsigned)part[count - 1] : 0};
    return true;
}

EXPORT nvmlReturn_t nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, nvmlDevice_t *device)
{
    struct nvml_pci_address address;
    if (!nvml_is_initialized()) return NVML_ERROR_UNINITIALIZED;
    if (bus_id == NULL || !parse_pci_address(bus_id, &address)) return NVML_ERROR_INVALID_ARGUMENT;
    return handle_if(device, has_pci_address, &address);
}

EXPORT nvmlReturn_t nvmlDeviceGetHandleByPciBusId(const char *bus_id, nvmlDevice_t *device)
{
    return nvmlDeviceGetHandleByPciBusId_v2(bus_id, device);
}

ANSWER_CONSTANT(nvmlDeviceGetIndex, unsigned, 0)
ANSWER_CONSTANT(nvmlDeviceGetMinorNumber, unsigned, 0)
ANSWER_CONSTANT(nvmlDeviceGetMultiGpuBoard, unsigned, 0)
ANSWER_CONSTANT(nvmlDeviceGetBusType, unsigned, NVML_BUS_TYPE_PCI_EXPRESS)

/* ---- texts ---- */

static nvmlReturn_t give_field(nvmlDevice_t device, size_t offset, char *buffer, unsigned length)
{
    nvmlReturn_t status = nvml_check(device);
    if (status != NVML_SUCCESS) return status;
    if (buffer == NULL) return NVML_ERROR_INVALID_ARGUMENT;
    struct vgpu_device_page page;
    status = nvml_read_page(&page);
    return status == NVML_SUCCESS ? nvml_give_text((const char *)&page + offset, buffer, length) : status;
}

EXPORT nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t device, char *name, unsigned length)
{
    return give_field(device, offsetof(struct vgpu_device_page, name), name, length);
}
EXPORT nvmlReturn_t nvmlDeviceGetSerial(nvmlDevice_t device, char *serial, unsigned length)
{
    return give_field(device, offsetof(struct vgpu_device_page, serial), serial, length);
}
EXPORT nvmlReturn_t nvmlDeviceGetVbiosVersion(nvmlDevice_t device, char *version, unsigned length)
{
    return give_field(device, offsetof(struct vgpu_device_page, vbios_version), version, length);
}
EXPORT nvmlReturn_t nvmlDeviceGetBoardPartNumber(nvmlDevice_t device, char *number, unsigned length)
{
    return give_field(device, offsetof(struct vgpu_device_page, board_part_number), number, length);
}

EXPORT nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t device, char *uuid, unsigned length)
{
    struct vgpu_device_page page;
    nvmlReturn_t status = nvml_read(device, &page);
    if (status != NVML_SUCCESS) return status;
    char text[41];
    nvml_uuid_text(&page, text);
    return nvml_give_text(text, uuid, length);
}

/* ---- PCI ---- */

static unsigned pci_id(const struct vgpu_device_page *page, const char *vendor_name, const char *device_name, unsigned otherwise)
{
    struct nvml_pci_address address = {(unsigned)page->pci_domain, (unsigned)page->pci_bus, (unsigned)page->pci_device, (unsigned)page->pci_function};
    long long card, vendor, device;
    if (!nvml_sysfs_number(&address, "vendor", &card) || card != VENDOR_NVIDIA) return otherwise;
    if (!nvml_sysfs_number(&address, vendor_name, &vendor) || !nvml_sysfs_number(&address, device_name, &device)) return otherwise;
    return ((unsigned)device & 0xffff) << 16 | ((unsigned)vendor & 0xffff);
}

static nvmlReturn_t read_pci(nvmlDevice_t device, const void *caller, struct nvml_pci_info *info)
{
    nvmlReturn_t status = nvml_check(device);
    if (status != NVML_SUCCESS) return status;
    if (caller == NULL) return NVML_ERROR_INVALID_ARGUMENT;
    struct vgpu_device_page page;
    status = nvml_read_page(&page);
    if (status != NVML_SUCCESS) return status;
    *info = (struct nvml_pci_info){
        .domain = (unsigned)page.pci_domain,
        .bus = (unsigned)page.pci_bus,
        .device = (unsigned)page.pci_device,
        .pci_device_id = pci_id(&page, "vendor", "device", VIRTUAL_DEVICE_ID),
        .pci_subsystem_id = pci_id(&page, "subsystem_vendor", "subsystem_device", VIRTUAL_SUBSYSTEM_ID),
    };
    snprintf(info->bus_id_legacy, sizeof info->bus_id_legacy, "%04X:%02X:%02X.0", info->domain & 0xffff, info->bus & 0xff, info->device & 0xff);
    snprintf(info->bus_id, sizeof info->bus_id, "%08X:%02X:%02X.0", info->domain, info->bus & 0xff, info->device & 0xff);
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetPciInfo_v3(nvmlDevice_t device, struct nvml_pci_info *pci)
{
    struct nvml_pci_info info;
    nvmlReturn_t status = read_pci(device, pci, &info);
    if (status == NVML_SUCCESS) *pci = info;
    return status;
}

/* Its structure ends in four reserved words instead of the long bus id. */
EXPORT nvmlReturn_t nvmlDeviceGetPciInfo_v2(nvmlDevice_t device, struct nvml_pci_info *pci)
{
    struct nvml_pci_info info;
    nvmlReturn_t status = read_pci(device, pci, &info);
    if (status == NVML_SUCCESS) memcpy(pci, &info, offsetof(struct nvml_pci_info, bus_id));
    return status;
}

/* Its structure ends with the device id. */
EXPORT nvmlReturn_t nvmlDeviceGetPciInfo(nvmlDevice_t device, struct nvml_pci_info *pci)
{
    struct nvml_pci_info info;
    nvmlReturn_t status = read_pci(device, pci, &info);
    if (status == NVML_SUCCESS) memcpy(pci, &info, offsetof(struct nvml_pci_info, pci_subsystem_id));
    return status;
}

EXPORT nvmlReturn_t nvmlDeviceGetPciInfoExt(nvmlDevice_t device, struct nvml_pci_info_ext *pci)
{
    struct nvml_pci_info info;
    nvmlReturn_t status = read_pci(device, pci, &info);
    if (status != NVML_SUCCESS) return status;
    if (pci->version != NVML_VERSION_OF(struct nvml_pci_info_ext, 1)) return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    *pci = (struct nvml_pci_info_ext){pci->version, info.domain, info.bus, info.device, info.pci_device_id, info.pci_subsystem_id,
                                      PCI_CLASS_DISPLAY, PCI_SUBCLASS_3D, ""};
    memcpy(pci->bus_id, info.bus_id, sizeof pci->bus_id);
    return NVML_SUCCESS;
}

/* A number that tells boards apart, made from the bus address. */
EXPORT nvmlReturn_t nvmlDeviceGetBoardId(nvmlDevice_t device, unsigned *id)
{
    struct nvml_pci_info info;
    nvmlReturn_t status = read_pci(device, id, &info);
    if (status == NVML_SUCCESS) *id = info.domain << 16 | (info.bus & 0xff) << 8 | (info.device & 0x1f) << 3;
    return status;
}

EXPORT nvmlReturn_t nvmlDeviceOnSameBoard(nvmlDevice_t first, nvmlDevice_t second, int *same)
{
    nvmlReturn_t status = nvml_check(first);
    if (status == NVML_SUCCESS) status = nvml_check(second);
    if (status != NVML_SUCCESS) return status;
    if (same == NULL) return NVML_ERROR_INVALID_ARGUMENT;
    *same = 1;
    return NVML_SUCCESS;
}

/* ---- what kind of GPU ---- */

ANSWER_U32(nvmlDeviceGetBrand, brand)

EXPORT nvmlReturn_t nvmlDeviceGetArchitecture(nvmlDevice_t device, unsigned *architecture)
{
    struct vgpu_device_page page;
    nvmlReturn_t status = nvml_read(device, &page);
    if (status != NVML_SUCCESS) return status;
    if (architecture == NULL) return NVML_ERROR_INVALID_ARGUMENT;
    *architecture = nvml_architecture(&page); /* the number for "unknown" is NVML's too */
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetCudaComputeCapability(nvmlDevice_t device, int *major, int *minor)
{
    struct vgpu_device_page page;
    nvmlReturn_t status = nvml_read(device, &page);
    if (status != NVML_SUCCESS) return status;
    if (major == NULL || minor == NULL) return NVML_ERROR_INVALID_ARGUMENT;
    int a, b;
    if (!nvml_attribute(&page, ATTRIBUTE_MAJOR, &a) || !nvml_attribute(&page, ATTRIBUTE_MINOR, &b)) return NVML_ERROR_NOT_SUPPORTED;
    *major = a;
    *minor = b;
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetNumGpuCores(nvmlDevice_t device, unsigned *cores)
{
    struct vgpu_device_page page;
    nvmlReturn_t status = nvml_read(device, &page);
    if (status != NVML_SUCCESS) return status;
    if (cores == NULL) return NVML_ERROR_INVALID_ARGUMENT;
    int multiprocessors, major, minor;
    if (!nvml_attribute(&page, ATTRIBUTE_MULTIPROCESSORS, &multiprocessors) || !nvml_attribute(&page, ATTRIBUTE_MAJOR, &major) ||
        !nvml_attribute(&page, ATTRIBUTE_MINOR, &minor) || multiprocessors <= 0 || major < 7 || major > 12)
        return NVML_ERROR_NOT_SUPPORTED;
    *cores = (unsigned)multiprocessors * (major == 7 || (major == 8 && minor == 0) ? 64u : 128u); /* as in the CUDA programming guide */
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetMemoryBusWidth(nvmlDevice_t device, unsigned *bits)
{
    struct vgpu_device_page page;
    nvmlReturn_t status = nvml_read(device, &page);
    if (status != NVML_SUCCESS) return status;
    if (bits == NULL) return NVML_ERROR_INVALID_ARGUMENT;
    int width;
    if (page.memory_bus_width_bits != VGPU_UNKNOWN)
        *bits = page.memory_bus_width_bits;
    else if (nvml_attribute(&page, ATTRIBUTE_MEMORY_BUS_WIDTH, &width) && width > 0)
        *bits = (unsigned)width;
    else
        return NVML_ERROR_NOT_SUPPORTED;
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetAddressingMode(nvmlDevice_t device, struct nvml_addressing_mode *mode)
{
    struct vgpu_device_page page;
    nvmlReturn_t status = nvml_read(device, &page);
    if (status != NVML_SUCCESS) return status;
    if (mode == NULL) return NVML_ERROR_INVALID_ARGUMENT;
    if (mode->version != NVML_VERSION_OF(struct nvml_addressing_mode, 1)) return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    mode->value = NVML_ADDRESSING_NONE; /* kernels run on the host and see nothing of a guest's ordinary memory */
    return NVML_SUCCESS;
}

/* Since Hopper a GPU cannot do without its GSP firmware, and that always has the driver's version. */
EXPORT nvmlReturn_t nvmlDeviceGetGspFirmwareMode(nvmlDevice_t device, unsigned *enabled, unsigned *by_default)
{
    struct vgpu_device_page page;
    nvmlReturn_t status = nvml_read(device, &page);
    if (status != NVML_SUCCESS) return status;
    if (enabled == NULL || by_default == NULL) return NVML_ERROR_INVALID_ARGUMENT;
    unsigned architecture = nvml_architecture(&page);
    if (architecture == VGPU_UNKNOWN || architecture < NVML_ARCHITECTURE_HOPPER) return NVML_ERROR_NOT_SUPPORTED;
    *enabled = *by_default = 1;
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetGspFirmwareVersion(nvmlDevice_t device, char *version)
{
    struct vgpu_device_page page;
    nvmlReturn_t status = nvml_read(device, &page);
    if (status != NVML_SUCCESS) return status;
    unsigned architecture = nvml_architecture(&page);
    if (architecture == VGPU_UNKNOWN || architecture < NVML_ARCHITECTURE_HOPPER) return NVML_ERROR_NOT_SUPPORTED;
    return nvml_give_text(page.driver_version_text, version, 64); /* the documented size of callers' buffers */
}
