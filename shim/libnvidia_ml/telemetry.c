/* SPDX-License-Identifier: Apache-2.0 */
/*
 * telemetry.c - what changes from second to second: utilisation, temperature, power, clocks, the PCIe link.
 *
 * All of it is the physical card's except memory (memory.c): a VM sees how warm and how busy the card is that it shares.
 */
#include "internal.h"

#include <string.h>

/* ---- utilisation ---- */

EXPORT nvmlReturn_t nvmlDeviceGetUtilizationRates(nvmlDevice_t device, struct nvml_utilization *utilization)
{
    struct vgpu_device_page page;
    nvmlReturn_t status = nvml_read(device, &page);
    if (status != NVML_SUCCESS) return status;
    if (utilization == NULL) return NVML_ERROR_INVALID_ARGUMENT;
    if (page.gpu_utilization_percent == VGPU_UNKNOWN) return NVML_ERROR_NOT_SUPPORTED;
    utilization->gpu = page.gpu_utilization_percent;
    utilization->memory = page.memory_utilization_percent == VGPU_UNKNOWN ? 0 : page.memory_utilization_percent;
    return NVML_SUCCESS;
}

/* The period is not known here; 0 says so. */
static nvmlReturn_t read_engine(nvmlDevice_t device, size_t offset, unsigned *utilization, unsigned *period)
{
    if (utilization != NULL && period == NULL) return nvml_refuse_device(device, NVML_ERROR_INVALID_ARGUMENT);
    nvmlReturn_t status = nvml_read_u32(device, offset, utilization);
    if (status == NVML_SUCCESS) *period = 0;
    return status;
}

EXPORT nvmlReturn_t nvmlDeviceGetEncoderUtilization(nvmlDevice_t device, unsigned *utilization, unsigned *period)
{
    return read_engine(device, offsetof(struct vgpu_device_page, encoder_utilization_percent), utilization, period);
}
EXPORT nvmlReturn_t nvmlDeviceGetDecoderUtilization(nvmlDevice_t device, unsigned *utilization, unsigned *period)
{
    return read_engine(device, offsetof(struct vgpu_device_page, decoder_utilization_percent), utilization, period);
}

EXPORT nvmlReturn_t nvmlDeviceGetDynamicPstatesInfo(nvmlDevice_t device, struct nvml_dynamic_pstates *states)
{
    struct vgpu_device_page page;
    nvmlReturn_t status = nvml_read(device, &page);
    if (status != NVML_SUCCESS) return status;
    if (states == NULL) return NVML_ERROR_INVALID_ARGUMENT;
    if (page.gpu_utilization_percent == VGPU_UNKNOWN) return NVML_ERROR_NOT_SUPPORTED;
    uint32_t percent[] = {page.gpu_utilization_percent, page.memory_utilization_percent, page.decoder_utilization_percent}; /* GPU, memory, video */
    memset(states, 0, sizeof *states);
    for (unsigned i = 0; i < sizeof percent / sizeof percent[0]; i++) {
        if (percent[i] == VGPU_UNKNOWN) continue;
        states->domain[i].present = 1;
        states->domain[i].percentage = percent[i];
    }
    return NVML_SUCCESS;
}

/* ---- temperature ---- */

EXPORT nvmlReturn_t nvmlDeviceGetTemperature(nvmlDevice_t device, unsigned sensor, unsigned *celsius)
{
    if (sensor != 0) return nvml_refuse_device(device, NVML_ERROR_INVALID_ARGUMENT);
    return nvml_read_u32(device, offsetof(struct vgpu_device_page, temperature_celsius), celsius);
}

EXPORT nvmlReturn_t nvmlDeviceGetTemperatureV(nvmlDevice_t device, struct nvml_temperature *temperature)
{
    nvmlReturn_t status = nvml_check(device);
    if (status != NVML_SUCCESS) return status;
    if (temperature == NULL) return NVML_ERROR_INVALID_ARGUMENT;
    if (temperature->version != NVML_VERSION_OF(struct nvml_temperature, 1)) return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    unsigned celsius;
    status = nvmlDeviceGetTemperature(device, temperature->sensor, &celsius);
    if (status == NVML_SUCCESS) temperature->celsius = (int)celsius;
    return status;
}

EXPORT nvmlReturn_t nvmlDeviceGetTemperatureThreshold(nvmlDevice_t device, unsigned kind, unsigned *celsius)
{
    if (kind >= NVML_THRESHOLD_COUNT) return nvml_refuse_device(device, NVML_ERROR_INVALID_ARGUMENT);
    if (kind == NVML_THRESHOLD_SHUTDOWN) return nvml_read_u32(device, offsetof(struct vgpu_device_page, temperature_shutdown_celsius), celsius);
    if (kind == NVML_THRESHOLD_SLOWDOWN) return nvml_read_u32(device, offsetof(struct vgpu_device_page, temperature_slowdown_celsius), celsius);
    return nvml_refuse_device(device, NVML_ERROR_NOT_SUPPORTED);
}

/* ---- fans: those of the card, where it has any ---- */

ANSWER_U32(nvmlDeviceGetFanSpeed, fan_percent)

EXPORT nvmlReturn_t nvmlDeviceGetFanSpeed_v2(nvmlDevice_t device, unsigned fan, unsigned *percent)
{
    unsigned speed;
    nvmlReturn_t status = nvmlDeviceGetFanSpeed(device, percent == NULL ? NULL : &speed);
    if (status != NVML_SUCCESS) return status;
    if (fan != 0) return NVML_ERROR_INVALID_ARGUMENT;
    *percent = speed;
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetNumFans(nvmlDevice_t device, unsigned *count)
{
    unsigned speed;
    nvmlReturn_t status = nvmlDeviceGetFanSpeed(device, count == NULL ? NULL : &speed);
    if (status != NVML_SUCCESS && status != NVML_ERROR_NOT_SUPPORTED) return status;
    *count = status == NVML_SUCCESS ? 1 : 0;
    return NVML_SUCCESS;
}

/* ---- power ---- */

ANSWER_U32(nvmlDeviceGetPowerUsage, power_milliwatts)
ANSWER_U32(nvmlDeviceGetPowerManagementLimit, power_limit_milliwatts)
ANSWER_U32(nvmlDeviceGetEnforcedPowerLimit, power_limit_milliwatts)
ANSWER_U32(nvmlDeviceGetPowerManagementDefaultLimit, power_limit_default_milliwatts)
ANSWER_CONSTANT(nvmlDeviceGetPowerSource, unsigned, 0) /* mains */

EXPORT nvmlReturn_t nvmlDeviceGetPowerManagementMode(nvmlDevice_t device, unsigned *mode)
{
    unsigned limit;
    nvmlReturn_t status = nvmlDeviceGetPowerManagementLimit(device, mode == NULL ? NULL : &limit);
    if (status == NVML_SUCCESS) *mode = 1;
    return status;
}

EXPORT nvmlReturn_t nvmlDeviceGetPowerManagementLimitConstraints(nvmlDevice_t device, unsigned *least, unsigned *most)
{
    struct vgpu_device_page page;
    nvmlReturn_t status = nvml_read(device, &page);
    if (status != NVML_SUCCESS) return status;
    if (least == NULL || most == NULL) return NVML_ERROR_INVALID_ARGUMENT;
    if (page.power_limit_min_milliwatts == VGPU_UNKNOWN || page.power_limit_max_milliwatts == VGPU_UNKNOWN) return NVML_ERROR_NOT_SUPPORTED;
    *least = page.power_limit_min_milliwatts;
    *most = page.power_limit_max_milliwatts;
    return NVML_SUCCESS;
}

nvmlReturn_t nvml_read_u64(nvmlDevice_t device, size_t offset, unsigned long long *value)
{
    struct vgpu_device_page page;
    nvmlReturn_t status = nvml_read(device, &page);
    if (status != NVML_SUCCESS) return status;
    if (value == NULL) return NVML_ERROR_INVALID_ARGUMENT;
    uint64_t found;
    memcpy(&found, (const uint8_t *)&page + offset, sizeof found);
    if (found == UNKNOWN_64) return NVML_ERROR_NOT_SUPPORTED;
    *value = found;
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetTotalEnergyConsumption(nvmlDevice_t device, unsigned long long *millijoules)
{
    return nvml_read_u64(device, offsetof(struct vgpu_device_page, energy_millijoules), millijoules);
}

/* ---- clocks ---- */

static nvmlReturn_t read_clock(nvmlDevice_t device, unsigned kind, const size_t offset[4], unsigned *mhz)
{
    return kind > NVML_CLOCK_VIDEO ? nvml_refuse_device(device, NVML_ERROR_INVALID_ARGUMENT) : nvml_read_u32(device, offset[kind], mhz);
}

EXPORT nvmlReturn_t nvmlDeviceGetClockInfo(nvmlDevice_t device, unsigned kind, unsigned *mhz)
{
    static const size_t now[] = {
        [NVML_CLOCK_GRAPHICS] = offsetof(struct vgpu_device_page, graphics_clock_mhz),
        [NVML_CLOCK_SM] = offsetof(struct vgpu_device_page, sm_clock_mhz),
        [NVML_CLOCK_MEMORY] = offsetof(struct vgpu_device_page, memory_clock_mhz),
        [NVML_CLOCK_VIDEO] = offsetof(struct vgpu_device_page, video_clock_mhz),
    };
    return read_clock(device, kind, now, mhz);
}

EXPORT nvmlReturn_t nvmlDeviceGetMaxClockInfo(nvmlDevice_t device, unsigned kind, unsigned *mhz)
{
    static const size_t most[] = {
        [NVML_CLOCK_GRAPHICS] = offsetof(struct vgpu_device_page, graphics_clock_max_mhz),
        [NVML_CLOCK_SM] = offsetof(struct vgpu_device_page, sm_clock_max_mhz),
        [NVML_CLOCK_MEMORY] = offsetof(struct vgpu_device_page, memory_clock_max_mhz),
        [NVML_CLOCK_VIDEO] = offsetof(struct vgpu_device_page, video_clock_max_mhz),
    };
    return read_clock(device, kind, most, mhz);
}

/* Which clock: 0 the current one, 1 and 2 those set for applications, which a VM cannot set, 3 the highest to be chosen. */
EXPORT nvmlReturn_t nvmlDeviceGetClock(nvmlDevice_t device, unsigned kind, unsigned which, unsigned *mhz)
{
    if (which == 0) return nvmlDeviceGetClockInfo(device, kind, mhz);
    if (which == 3) return nvmlDeviceGetMaxClockInfo(device, kind, mhz);
    return nvml_refuse_device(device, which > 3 || kind > NVML_CLOCK_VIDEO || mhz == NULL ? NVML_ERROR_INVALID_ARGUMENT : NVML_ERROR_NOT_SUPPORTED);
}

EXPORT nvmlReturn_t nvmlDeviceGetMaxCustomerBoostClock(nvmlDevice_t device, unsigned kind, unsigned *mhz)
{
    return nvmlDeviceGetMaxClockInfo(device, kind, mhz);
}

EXPORT nvmlReturn_t nvmlDeviceGetCurrentClocksEventReasons(nvmlDevice_t device, unsigned long long *reasons)
{
    return nvml_read_u64(device, offsetof(struct vgpu_device_page, throttle_reasons), reasons);
}
EXPORT nvmlReturn_t nvmlDeviceGetCurrentClocksThrottleReasons(nvmlDevice_t device, unsigned long long *reasons)
{
    return nvmlDeviceGetCurrentClocksEventReasons(device, reasons);
}

/* Every reason the interface knows, where the host reports reasons at all. */
EXPORT nvmlReturn_t nvmlDeviceGetSupportedClocksEventReasons(nvmlDevice_t device, unsigned long long *reasons)
{
    unsigned long long now;
    nvmlReturn_t status = nvmlDeviceGetCurrentClocksEventReasons(device, reasons == NULL ? NULL : &now);
    if (status == NVML_SUCCESS) *reasons = 0x1ff;
    return status;
}
EXPORT nvmlReturn_t nvmlDeviceGetSupportedClocksThrottleReasons(nvmlDevice_t device, unsigned long long *reasons)
{
    return nvmlDeviceGetSupportedClocksEventReasons(device, reasons);
}

EXPORT nvmlReturn_t nvmlDeviceGetPerformanceState(nvmlDevice_t device, unsigned *state)
{
    nvmlReturn_t status = nvml_read_u32(device, offsetof(struct vgpu_device_page, performance_state), state);
    if (status == NVML_SUCCESS && *state > 15) *state = NVML_PSTATE_UNKNOWN;
    return status;
}
EXPORT nvmlReturn_t nvmlDeviceGetPowerState(nvmlDevice_t device, unsigned *state) { return nvmlDeviceGetPerformanceState(device, state); }

/* ---- the card's PCIe link: its bandwidth is what copies are bound by, also in a VM ---- */

ANSWER_U32(nvmlDeviceGetCurrPcieLinkGeneration, pcie_generation)
ANSWER_U32(nvmlDeviceGetMaxPcieLinkGeneration, pcie_generation_max)
ANSWER_U32(nvmlDeviceGetGpuMaxPcieLinkGeneration, pcie_generation_max)
ANSWER_U32(nvmlDeviceGetCurrPcieLinkWidth, pcie_width)
ANSWER_U32(nvmlDeviceGetMaxPcieLinkWidth, pcie_width_max)

EXPORT nvmlReturn_t nvmlDeviceGetPcieThroughput(nvmlDevice_t device, unsigned direction, unsigned *kilobytes)
{
    if (direction > 1) return nvml_refuse_device(device, NVML_ERROR_INVALID_ARGUMENT);
    return nvml_read_u32(device, direction == 0 ? offsetof(struct vgpu_device_page, pcie_tx_kilobytes) : offsetof(struct vgpu_device_page, pcie_rx_kilobytes), kilobytes);
}

EXPORT nvmlReturn_t nvmlDeviceGetPcieSpeed(nvmlDevice_t device, unsigned *megabits)
{
    static const unsigned of_generation[] = {0, 2500, 5000, 8000, 16000, 32000, 64000};
    unsigned generation;
    nvmlReturn_t status = nvmlDeviceGetCurrPcieLinkGeneration(device, megabits == NULL ? NULL : &generation);
    if (status != NVML_SUCCESS) return status;
    if (generation == 0 || generation >= sizeof of_generation / sizeof of_generation[0]) return NVML_ERROR_NOT_SUPPORTED;
    *megabits = of_generation[generation];
    return NVML_SUCCESS;
}

/* Numbers 1 to 6 stand for the speeds of generations 1 to 6. */
EXPORT nvmlReturn_t nvmlDeviceGetPcieLinkMaxSpeed(nvmlDevice_t device, unsigned *speed)
{
    unsigned generation;
    nvmlReturn_t status = nvmlDeviceGetMaxPcieLinkGeneration(device, speed == NULL ? NULL : &generation);
    if (status != NVML_SUCCESS) return status;
    if (generation == 0 || generation > 6) return NVML_ERROR_NOT_SUPPORTED;
    *speed = generation;
    return NVML_SUCCESS;
}
