/* SPDX-License-Identifier: Apache-2.0 */
/*
 * internal.h - what the files of libnvidia-ml.so.1 share.
 *
 * Everything this library says about the GPU it reads from one page that the host writes (struct vgpu_device_page in
 * transport/wire.h). attach.c finds the page, page.c reads it, all other files turn fields into answers. A field the
 * host marked unknown is answered NOT_SUPPORTED, as the real library answers for a card that lacks the sensor.
 */
#ifndef VGPU_NVML_INTERNAL_H
#define VGPU_NVML_INTERNAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../../transport/wire.h"
#include "nvml_types.h"

#define EXPORT __attribute__((visibility("default")))
#define UNKNOWN_64 UINT64_MAX
#define NO_INSTANCE 0xffffffffu

/* ---- where the page is (attach.c) ---- */

struct nvml_pci_address { unsigned domain, bus, device, function; };

struct nvml_source {
    const uint8_t *mapping; /* the device page; NULL: none */
    size_t mapped;
    int connection;         /* to the mediator; -1 when the page is a PCI device's, or the mediator has gone */
    bool is_pci;
    struct nvml_pci_address address; /* with is_pci: where this machine sees the device */
};

/* Finds the page and maps it. Waits for a mediator that is just being restarted, for less than a second; `patient` false:
 * does not wait at all. On failure `source` is unchanged and the result says why. */
nvmlReturn_t nvml_attach(struct nvml_source *source, bool patient);
void nvml_detach(struct nvml_source *source);
/* The path of something in the device's sysfs folder, e.g. "numa_node"; false if it does not fit. */
bool nvml_sysfs_path(const struct nvml_pci_address *address, const char *name, char *path, size_t size);
/* The first number in a sysfs file (0x.. or decimal); false if there is none. */
bool nvml_sysfs_number(const struct nvml_pci_address *address, const char *name, long long *value);

/* ---- reading it (page.c) ---- */

/* The one device. The handle programs hold is its address. */
extern struct nvml_device { char nothing; } nvml_the_device;

nvmlReturn_t nvml_begin(void); /* nvmlInit */
nvmlReturn_t nvml_end(void);   /* nvmlShutdown */
bool nvml_is_initialized(void);

/* A whole, consistent copy of the page: texts end in NUL and hold printable characters only, counts are in range, and the
 * address is the one this machine sees. Waits for a writer for at most some milliseconds.
 * UNINITIALIZED, GPU_IS_LOST (the device has been unplugged), TIMEOUT (the host died while writing, and there is no older copy). */
nvmlReturn_t nvml_read_page(struct vgpu_device_page *page);
/* The same, after checking the handle: INVALID_ARGUMENT. */
nvmlReturn_t nvml_read(nvmlDevice_t device, struct vgpu_device_page *page);
/* SUCCESS, UNINITIALIZED or INVALID_ARGUMENT, without reading the page. */
nvmlReturn_t nvml_check(nvmlDevice_t device);

/* One 32-bit field into *value; NOT_SUPPORTED if unknown. */
nvmlReturn_t nvml_read_u32(nvmlDevice_t device, size_t offset, unsigned *value);
nvmlReturn_t nvml_read_u64(nvmlDevice_t device, size_t offset, unsigned long long *value);
/* A text into a caller's buffer; INSUFFICIENT_SIZE if it does not fit, NOT_SUPPORTED if it is empty. */
nvmlReturn_t nvml_give_text(const char *text, char *buffer, unsigned length);

/* Defines a call whose answer is one field of the page. */
#define ANSWER_U32(function, field)                                                               \
    EXPORT nvmlReturn_t function(nvmlDevice_t device, unsigned *value)                            \
    {                                                                                             \
        return nvml_read_u32(device, offsetof(struct vgpu_device_page, field), value);            \
    }
/* Defines a call whose answer is always the same number, because the device is what it is. */
#define ANSWER_CONSTANT(function, type, constant)                                                 \
    EXPORT nvmlReturn_t function(nvmlDevice_t device, type *value)                                \
    {                                                                                             \
        nvmlReturn_t status = nvml_check(device);                                                 \
        if (status != NVML_SUCCESS) return status;                                                \
        if (value == NULL) return NVML_ERROR_INVALID_ARGUMENT;                                    \
        *value = (constant);                                                                      \
        return NVML_SUCCESS;                                                                      \
    }

/* ---- facts derived from the page (identity.c) ---- */

/* A CUdevice_attribute as libcuda answers it; false if the host did not say. */
bool nvml_attribute(const struct vgpu_device_page *page, unsigned attribute, int *value);
unsigned nvml_architecture(const struct vgpu_device_page *page); /* VGPU_UNKNOWN: not known */
void nvml_uuid_text(const struct vgpu_device_page *page, char text[41]);

/* CUdevice_attribute numbers used here. */
enum { ATTRIBUTE_MULTIPROCESSORS = 16, ATTRIBUTE_MEMORY_BUS_WIDTH = 37, ATTRIBUTE_MAJOR = 75, ATTRIBUTE_MINOR = 76 };

/* ---- this VM's processes (processes.c) ---- */

struct nvml_merged_process {
    uint32_t pid, sm_percent; /* VGPU_UNKNOWN: not known */
    uint64_t used_bytes;
};
/* One entry per pid (a process may hold several sessions); `merged` has room for VGPU_PROCESSES. */
unsigned nvml_merge_processes(const struct vgpu_device_page *page, struct nvml_merged_process *merged);

/* ---- refusals (page.c, called by _generated_refusals.c) ---- */

nvmlReturn_t nvml_refuse(nvmlReturn_t code);
nvmlReturn_t nvml_refuse_device(nvmlDevice_t device, nvmlReturn_t code);

#endif
