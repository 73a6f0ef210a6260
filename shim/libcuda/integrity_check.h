/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The answer to libcudart's self-test of runtime and driver ("software validity", error 103).
 *
 * libcudart asks three times at start, each copy of it by itself; the answer covers only values of this process and
 * what our public API reports, so it is computed here and never crosses to the host.
 */
#ifndef VGPU_SHIM_INTEGRITY_CHECK_H
#define VGPU_SHIM_INTEGRITY_CHECK_H

#include <stdint.h>

/* The fixed part of the message; devices follow, asked for by ordinal. */
struct vgpu_integrity_inputs {
    uint32_t driver_version;
    uint32_t asked_version; /* runtime version plus 0, 1 or 2 */
    uint32_t process_id;
    uint32_t thread_id; /* low 32 bits of pthread_self() */
    uint64_t cudart_table;
    uint64_t integrity_table;
    uint64_t integrity_slot_1;
    uint64_t unix_seconds;
    uint32_t device_count;
};

struct vgpu_integrity_device {
    uint8_t uuid[16];
    int32_t pci_domain;
    int32_t pci_bus;
    int32_t pci_device;
};

/* Fills answer[2] for inputs; device(user, ordinal, out) is called for each ordinal below device_count, in order. */
__attribute__((visibility("hidden"))) void
vgpu_integrity_answer(const struct vgpu_integrity_inputs *inputs,
                      void (*device)(void *user, uint32_t ordinal, struct vgpu_integrity_device *out), void *user,
                      uint64_t answer[2]);

#endif
