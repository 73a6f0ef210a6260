/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fields.c - nvmlDeviceGetFieldValues and nvmlDeviceGetSamples: the same telemetry by number.
 *
 * A field we do not have is NOT_SUPPORTED in its own entry, and the call succeeds.
 */
#include "internal.h"

/* The numbers of the public interface. */
enum {
    FIELD_ECC_CURRENT = 1, FIELD_ECC_PENDING = 2, FIELD_MEMORY_TEMPERATURE = 82, FIELD_TOTAL_ENERGY = 83, FIELD_NVLINK_LINKS = 91,
    FIELD_C2C_LINKS = 170, FIELD_POWER_AVERAGE = 185, FIELD_POWER_INSTANT = 186, FIELD_POWER_MIN = 187, FIELD_POWER_MAX = 188,
    FIELD_POWER_DEFAULT = 189, FIELD_POWER_CURRENT = 190, FIELD_ENERGY = 191, FIELD_POWER_REQUESTED = 192,
};
#define SCOPE_GPU 0u

static const struct {
    unsigned field, offset;
    bool wide;
} known[] = {
    {FIELD_ECC_CURRENT, offsetof(struct vgpu_device_page, ecc_enabled), false},
    {FIELD_ECC_PENDING, offsetof(struct vgpu_device_page, ecc_enabled), false},
    {FIELD_MEMORY_TEMPERATURE, offsetof(struct vgpu_device_page, memory_temperature_celsius), false},
    {FIELD_TOTAL_ENERGY, offsetof(struct vgpu_device_page, energy_millijoules), true},
    {FIELD_ENERGY, offsetof(struct vgpu_device_page, energy_millijoules), true},
    {FIELD_POWER_AVERAGE, offsetof(struct vgpu_device_page, power_milliwatts), false},
    {FIELD_POWER_INSTANT, offsetof(struct vgpu_device_page, power_milliwatts), false},
    {FIELD_POWER_MIN, offsetof(struct vgpu_device_page, power_limit_min_milliwatts), false},
    {FIELD_POWER_MAX, offsetof(struct vgpu_device_page, power_limit_max_milliwatts), false},
    {FIELD_POWER_DEFAULT, offsetof(struct vgpu_device_page, power_limit_default_milliwatts), false},
    {FIELD_POWER_CURRENT, offsetof(struct vgpu_device_page, power_limit_milliwatts), false},
    {FIELD_POWER_REQUESTED, offsetof(struct vgpu_device_page, power_limit_milliwatts), false},
};

static void answer(const struct vgpu_device_page *page, struct nvml_field_value *value)
{
    value->microseconds = (long long)(page->telemetry_ns / 1000);
    value->latency = 0;
    value->status = NVML_ERROR_NOT_SUPPORTED;
    value->type = NVML_VALUE_UNSIGNED_INT;
    value->value.wide = 0;
    if (value->field == FIELD_NVLINK_LINKS || value->field == FIELD_C2C_LINKS) { /* none */
        value->status = NVML_SUCCESS;
        return;
    }
    for (unsigned i = 0; i < sizeof known / sizeof known[0]; i++) {
        if (known[i].field != value->field) continue;
        bool power = known[i].field >= FIELD_POWER_AVERAGE;
        if (power && value->scope != SCOPE_GPU) return; /* a module or its memory: nobody told us */
        const uint8_t *at = (const uint8_t *)page + known[i].offset;
        if (known[i].wide) {
            uint64_t found = *(const uint64_t *)(const void *)at;
            if (found == UNKNOWN_64) return;
            value->type = NVML_VALUE_UNSIGNED_LONG_LONG;
            value->value.wide = found;
        } else {
            uint32_t found = *(const uint32_t *)(const void *)at;
            if (found == VGPU_UNKNOWN) return;
            value->value.whole = found;
        }
        value->status = NVML_SUCCESS;
        return;
    }
}

EXPORT nvmlReturn_t nvmlDeviceGetFieldValues(nvmlDevice_t device, int count, struct nvml_field_value *values)
{
    struct vgpu_device_page page;
    nvmlReturn_t status = nvml_read(device, &page);
    if (status != NVML_SUCCESS) return status;
    if (values == NULL || count <= 0) return NVML_ERROR_INVALID_ARGUMENT;
    for (int i = 0; i < count; i++) answer(&page, &values[i]);
    return NVML_SUCCESS;
}

/* One sample, the host's latest; NOT_FOUND when the caller has seen it already. */
EXPORT nvmlReturn_t nvmlDeviceGetSamples(nvmlDevice_t device, unsigned kind, unsigned long long last_seen, unsigned *type,
                                         unsigned *count, struct nvml_sample *samples)
{
    static const size_t offsets[NVML_SAMPLES_COUNT] = {
        [NVML_SAMPLES_POWER] = offsetof(struct vgpu_device_page, power_milliwatts),
        [NVML_SAMPLES_GPU] = offsetof(struct vgpu_device_page, gpu_utilization_percent),
        [NVML_SAMPLES_MEMORY] = offsetof(struct vgpu_device_page, memory_utilization_percent),
        [NVML_SAMPLES_ENCODER] = offsetof(struct vgpu_device_page, encoder_utilization_percent),
        [NVML_SAMPLES_DECODER] = offsetof(struct vgpu_device_page, decoder_utilization_percent),
        [NVML_SAMPLES_PROCESSOR_CLOCK] = offsetof(struct vgpu_device_page, sm_clock_mhz),
        [NVML_SAMPLES_MEMORY_CLOCK] = offsetof(struct vgpu_device_page, memory_clock_mhz),
    };
    struct vgpu_device_page page;
    nvmlReturn_t status = nvml_read(device, &page);
    if (status != NVML_SUCCESS) return status;
    if (kind >= NVML_SAMPLES_COUNT || type == NULL || count == NULL || (samples != NULL && *count == 0)) return NVML_ERROR_INVALID_ARGUMENT;
    if (offsets[kind] == 0) return NVML_ERROR_NOT_SUPPORTED;
    uint32_t found = *(const uint32_t *)(const void *)((const uint8_t *)&page + offsets[kind]);
    if (found == VGPU_UNKNOWN) return NVML_ERROR_NOT_SUPPORTED;
    *type = NVML_VALUE_UNSIGNED_INT;
    if (samples != NULL && page.telemetry_ns / 1000 <= last_seen) return NVML_ERROR_NOT_FOUND;
    *count = 1;
    if (samples != NULL) samples[0] = (struct nvml_sample){.microseconds = page.telemetry_ns / 1000, .value.whole = found};
    return NVML_SUCCESS;
}
