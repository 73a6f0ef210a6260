/* SPDX-License-Identifier: Apache-2.0 */
/*
 * nvml_types.h - the part of NVML's public interface that we answer: result codes, structures, numbers.
 *
 * Written from the documented layouts (driver 580, CUDA 13); tests/shim/nvml compares sizes and offsets with those of
 * nvidia-ml-py. A structure with a `version` field carries its own size in the low 24 bits and a number in the high 8;
 * the caller fills it in, and anything else than a version we know is refused with ARGUMENT_VERSION_MISMATCH.
 *
 * Must never: grow a field that the public structure does not have. Programs allocate these.
 */
#ifndef VGPU_NVML_TYPES_H
#define VGPU_NVML_TYPES_H

#include <stdint.h>

typedef enum {
    NVML_SUCCESS = 0,
    NVML_ERROR_UNINITIALIZED = 1,
    NVML_ERROR_INVALID_ARGUMENT = 2,
    NVML_ERROR_NOT_SUPPORTED = 3,
    NVML_ERROR_NO_PERMISSION = 4,
    NVML_ERROR_NOT_FOUND = 6,
    NVML_ERROR_INSUFFICIENT_SIZE = 7,
    NVML_ERROR_DRIVER_NOT_LOADED = 9,
    NVML_ERROR_TIMEOUT = 10,
    NVML_ERROR_LIBRARY_NOT_FOUND = 12,
    NVML_ERROR_GPU_IS_LOST = 15,
    NVML_ERROR_LIB_RM_VERSION_MISMATCH = 18,
    NVML_ERROR_MEMORY = 20,
    NVML_ERROR_ARGUMENT_VERSION_MISMATCH = 25,
    NVML_ERROR_UNKNOWN = 999,
} nvmlReturn_t;

typedef struct nvml_device *nvmlDevice_t;
typedef struct nvml_event_set *nvmlEventSet_t;

#define NVML_VERSION_OF(type, number) ((unsigned)sizeof(type) | (unsigned)(number) << 24)

/* ---- identity ---- */

#define NVML_UUID_ASCII 1u
#define NVML_UUID_BINARY 2u
struct nvml_uuid {
    unsigned version, type;
    union {
        char text[41];
        unsigned char bytes[16];
    } value;
};

/* Of nvmlDeviceGetPciInfo and _v2, whose callers have room for less than this (see there), and of _v3. */
struct nvml_pci_info {
    char bus_id_legacy[16];
    unsigned domain, bus, device, pci_device_id, pci_subsystem_id;
    char bus_id[32];
};
struct nvml_pci_info_ext {
    unsigned version, domain, bus, device, pci_device_id, pci_subsystem_id, base_class, sub_class;
    char bus_id[32];
};

enum { NVML_ARCHITECTURE_VOLTA = 5, NVML_ARCHITECTURE_TURING, NVML_ARCHITECTURE_AMPERE, NVML_ARCHITECTURE_ADA,
       NVML_ARCHITECTURE_HOPPER, NVML_ARCHITECTURE_BLACKWELL };
#define NVML_BUS_TYPE_PCI_EXPRESS 2u

struct nvml_addressing_mode { unsigned version, value; };
#define NVML_ADDRESSING_NONE 0u

/* ---- memory ---- */

struct nvml_memory { unsigned long long total, free, used; };
struct nvml_memory_v2 {
    unsigned version;
    unsigned long long total, reserved, free, used;
};
struct nvml_bar1_memory { unsigned long long total, free, used; };

/* ---- processes ---- */

struct nvml_process_v1 {
    unsigned pid;
    unsigned long long used_memory;
};
struct nvml_process_v2 {
    unsigned pid;
    unsigned long long used_memory;
    unsigned gpu_instance, compute_instance; /* all ones: none */
};
struct nvml_process_detail {
    unsigned pid;
    unsigned long long used_memory;
    unsigned gpu_instance, compute_instance;
    unsigned long long used_protected_memory;
};
struct nvml_process_detail_list {
    unsigned version, mode, count; /* mode: 0 compute, 1 graphics, 2 MPS */
    struct nvml_process_detail *entries;
};
struct nvml_process_sample {
    unsigned pid;
    unsigned long long microseconds;
    unsigned sm, memory, encoder, decoder; /* percent */
};
struct nvml_process_utilization {
    unsigned long long microseconds;
    unsigned pid, sm, memory, encoder, decoder, jpeg, optical_flow;
};
struct nvml_processes_utilization {
    unsigned version, count;
    unsigned long long last_seen;
    struct nvml_process_utilization *entries;
};
struct nvml_accounting_stats {
    unsigned gpu_utilization, memory_utilization;
    unsigned long long max_memory, time, start_time;
    unsigned is_running, reserved[5];
};

/* ---- telemetry ---- */

struct nvml_utilization { unsigned gpu, memory; };
struct nvml_temperature {
    unsigned version, sensor;
    int celsius;
};
enum { NVML_CLOCK_GRAPHICS = 0, NVML_CLOCK_SM, NVML_CLOCK_MEMORY, NVML_CLOCK_VIDEO };
enum { NVML_THRESHOLD_SHUTDOWN = 0, NVML_THRESHOLD_SLOWDOWN = 1, NVML_THRESHOLD_COUNT = 8 };
#define NVML_PSTATE_UNKNOWN 32u
#define NVML_DYNAMIC_PSTATE_DOMAINS 8
struct nvml_dynamic_pstates {
    unsigned flags;
    struct { unsigned present, percentage, increase_threshold, decrease_threshold; } domain[NVML_DYNAMIC_PSTATE_DOMAINS];
};

enum { NVML_VALUE_DOUBLE = 0, NVML_VALUE_UNSIGNED_INT = 1, NVML_VALUE_UNSIGNED_LONG_LONG = 3 };
union nvml_value {
    double floating;
    unsigned int whole;
    unsigned long long wide;
};
struct nvml_sample {
    unsigned long long microseconds;
    union nvml_value value;
};
enum { NVML_SAMPLES_POWER = 0, NVML_SAMPLES_GPU, NVML_SAMPLES_MEMORY, NVML_SAMPLES_ENCODER, NVML_SAMPLES_DECODER,
       NVML_SAMPLES_PROCESSOR_CLOCK, NVML_SAMPLES_MEMORY_CLOCK, NVML_SAMPLES_COUNT = 10 };

struct nvml_field_value {
    unsigned field, scope;
    long long microseconds, latency;
    unsigned type;
    nvmlReturn_t status;
    union nvml_value value;
};

/* ---- features a virtual GPU does not have, said in their own structures ---- */

struct nvml_fabric {
    unsigned char cluster[16];
    nvmlReturn_t status;
    unsigned clique;
    unsigned char state; /* 0: not supported */
};
struct nvml_fabric_v2 {
    unsigned version;
    unsigned char cluster[16];
    nvmlReturn_t status;
    unsigned clique;
    unsigned char state;
    unsigned health_mask;
};
struct nvml_fabric_v3 {
    unsigned version;
    unsigned char cluster[16];
    nvmlReturn_t status;
    unsigned clique;
    unsigned char state;
    unsigned health_mask;
    unsigned char health_summary;
};
struct nvml_confidential_state { unsigned environment, feature, tools_mode; };
struct nvml_confidential_settings { unsigned version, environment, feature, tools_mode, multi_gpu_mode; };
struct nvml_capture_stats { unsigned sessions, average_rate, average_latency; };
struct nvml_gpm_support { unsigned version, supported; };
struct nvml_capabilities { unsigned version, mask; };
struct nvml_licence_head {
    int supported;
    unsigned count; /* features follow, none are filled in */
};

/* ---- events ---- */

#define NVML_EVENT_XID 0x8ull
struct nvml_event_v1 {
    nvmlDevice_t device;
    unsigned long long type, data;
};
struct nvml_event {
    nvmlDevice_t device;
    unsigned long long type, data;
    unsigned gpu_instance, compute_instance;
};

#endif
