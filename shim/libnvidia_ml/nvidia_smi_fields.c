/* SPDX-License-Identifier: Apache-2.0 */
/*
 * nvidia_smi_fields.c - every property --query-gpu knows, how it is asked for and how it is written. The other forms of
 * output take their values from here too.
 *
 * A property whose function this GPU refuses reads "N/A"; nothing is made up.
 */
#include "nvidia_smi.h"

#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <time.h>

struct smi_field {
    const char *name, *other, *unit;
    void (*read)(const struct smi_field *field, nvmlDevice_t device, struct smi_value *value);
    const char *function; /* of the library */
    unsigned argument;    /* what the reader makes of it */
    bool bare;
};

/* ---- helpers ---- */

static void failed(struct smi_value *value, nvmlReturn_t status)
{
    value->status = status;
    snprintf(value->text, sizeof value->text, "%s", status == NVML_ERROR_NOT_SUPPORTED ? "N/A" : smi_error(status));
}

#define WRITE(...) snprintf(value->text, sizeof value->text, __VA_ARGS__)
#define ARGUMENTS const struct smi_field *field, nvmlDevice_t device, struct smi_value *value

/* Calls a function that fills `count` words behind each other; 0 words on failure, which is then written down. */
typedef nvmlReturn_t (*ask_one)(nvmlDevice_t, unsigned *);
typedef nvmlReturn_t (*ask_with)(nvmlDevice_t, unsigned, unsigned *);
typedef nvmlReturn_t (*ask_two)(nvmlDevice_t, unsigned *, unsigned *);
typedef nvmlReturn_t (*ask_three)(nvmlDevice_t, unsigned *, unsigned *, unsigned *);
typedef nvmlReturn_t (*ask_text)(nvmlDevice_t, char *, unsigned);

static bool worked(struct smi_value *value, nvmlReturn_t status)
{
    if (status != NVML_SUCCESS) failed(value, status);
    return status == NVML_SUCCESS;
}

static const char *name_in(const char *const *names, size_t count, unsigned index) { return index < count && names[index] != NULL ? names[index] : "Unknown"; }
#define NAME_IN(names, index) name_in(names, sizeof names / sizeof names[0], index)

/* ---- readers: one for each shape of call ---- */

static void read_text(ARGUMENTS)
{
    (void)worked(value, ((ask_text)smi_function(field->function))(device, value->text, 256));
}

static void read_number(ARGUMENTS)
{
    unsigned number;
    if (worked(value, ((ask_one)smi_function(field->function))(device, &number))) WRITE("%u", number);
}

static void read_number_of(ARGUMENTS)
{
    unsigned number;
    if (worked(value, ((ask_with)smi_function(field->function))(device, field->argument, &number))) WRITE("%u", number);
}

static void read_enabled(ARGUMENTS)
{
    unsigned state;
    if (worked(value, ((ask_one)smi_function(field->function))(device, &state))) WRITE("%s", state ? "Enabled" : "Disabled");
}

static void read_yes(ARGUMENTS)
{
    unsigned state;
    if (worked(value, ((ask_one)smi_function(field->function))(device, &state))) WRITE("%s", state ? "Yes" : "No");
}

static void read_watts(ARGUMENTS)
{
    unsigned milliwatts;
    if (worked(value, ((ask_one)smi_function(field->function))(device, &milliwatts))) WRITE("%u.%02u", (milliwatts + 5) / 10 / 100, (milliwatts + 5) / 10 % 100);
}

/* argument: which of the two */
static void read_watts_of_two(ARGUMENTS)
{
    unsigned milliwatts[2];
    if (worked(value, ((ask_two)smi_function(field->function))(device, &milliwatts[0], &milliwatts[1])))
        WRITE("%u.%02u", (milliwatts[field->argument] + 5) / 10 / 100, (milliwatts[field->argument] + 5) / 10 % 100);
}

static void read_enabled_of_two(ARGUMENTS)
{
    unsigned state[2];
    if (worked(value, ((ask_two)smi_function(field->function))(device, &state[0], &state[1]))) WRITE("%s", state[field->argument] ? "Enabled" : "Disabled");
}

static void read_first_of_two(ARGUMENTS)
{
    unsigned number[2];
    if (worked(value, ((ask_two)smi_function(field->function))(device, &number[0], &number[1]))) WRITE("%u", number[0]);
}

static void read_of_three(ARGUMENTS)
{
    unsigned number[3];
    if (worked(value, ((ask_three)smi_function(field->function))(device, &number[0], &number[1], &number[2]))) WRITE("%u", number[field->argument]);
}

/* argument: 0 total, 1 reserved, 2 free, 3 used */
static void read_memory(ARGUMENTS)
{
    struct nvml_memory_v2 memory = {.version = NVML_VERSION_OF(struct nvml_memory_v2, 2)};
    (void)field;
    if (!worked(value, SMI_CALL(nvmlDeviceGetMemoryInfo_v2, (nvmlDevice_t, struct nvml_memory_v2 *), device, &memory))) return;
    unsigned long long bytes[] = {memory.total, memory.reserved, memory.free, memory.used};
    WRITE("%llu", nearest_mebibytes(bytes[field->argument]));
}

static void read_aperture(ARGUMENTS)
{
    struct nvml_bar1_memory memory;
    if (!worked(value, SMI_CALL(nvmlDeviceGetBAR1MemoryInfo, (nvmlDevice_t, struct nvml_bar1_memory *), device, &memory))) return;
    unsigned long long bytes[] = {memory.total, 0, memory.free, memory.used};
    WRITE("%llu", nearest_mebibytes(bytes[field->argument]));
}

static void read_utilization(ARGUMENTS)
{
    struct nvml_utilization utilization;
    if (worked(value, SMI_CALL(nvmlDeviceGetUtilizationRates, (nvmlDevice_t, struct nvml_utilization *), device, &utilization)))
        WRITE("%u", field->argument == 0 ? utilization.gpu : utilization.memory);
}

/* argument: the number of a field value */
static bool ask_field(unsigned number, nvmlDevice_t device, struct smi_value *value, struct nvml_field_value *answer)
{
    *answer = (struct nvml_field_value){.field = number};
    nvmlReturn_t status = SMI_CALL(nvmlDeviceGetFieldValues, (nvmlDevice_t, int, struct nvml_field_value *), device, 1, answer);
    return worked(value, status != NVML_SUCCESS ? status : answer->status);
}

static void read_field_number(ARGUMENTS)
{
    struct nvml_field_value answer;
    if (ask_field(field->argument, device, value, &answer)) WRITE("%u", answer.value.whole);
}

static void read_field_watts(ARGUMENTS)
{
    struct nvml_field_value answer;
    if (ask_field(field->argument, device, value, &answer)) WRITE("%u.%02u", (answer.value.whole + 5) / 10 / 100, (answer.value.whole + 5) / 10 % 100);
}

/* argument: the bit; 0: all of them as a number */
static void read_reasons(ARGUMENTS)
{
    unsigned long long reasons;
    if (!worked(value, ((nvmlReturn_t(*)(nvmlDevice_t, unsigned long long *))smi_function(field->function))(device, &reasons))) return;
    if (field->argument == 0)
        WRITE("0x%016llX", reasons);
    else
        WRITE("%s", reasons & field->argument ? "Active" : "Not Active");
}

static void read_pci(ARGUMENTS)
{
    struct nvml_pci_info_ext pci = {.version = NVML_VERSION_OF(struct nvml_pci_info_ext, 1)};
    if (!worked(value, SMI_CALL(nvmlDeviceGetPciInfoExt, (nvmlDevice_t, struct nvml_pci_info_ext *), device, &pci))) return;
    switch (field->argument) {
    case 0: WRITE("%s", pci.bus_id); break;
    case 1: WRITE("0x%04X", pci.domain); break;
    case 2: WRITE("0x%02X", pci.bus); break;
    case 3: WRITE("0x%02X", pci.device); break;
    case 4: WRITE("0x%X", pci.base_class); break;
    case 5: WRITE("0x%X", pci.sub_class); break;
    case 6: WRITE("0x%08X", pci.pci_device_id); break;
    default: WRITE("0x%08X", pci.pci_subsystem_id); break;
    }
}

static void read_state(ARGUMENTS)
{
    unsigned state;
    if (!worked(value, ((ask_one)smi_function(field->function))(device, &state))) return;
    if (state > 15)
        WRITE("Unknown");
    else
        WRITE("P%u", state);
}

static void read_compute_mode(ARGUMENTS)
{
    static const char *const names[] = {"Default", "Exclusive_Thread", "Prohibited", "Exclusive_Process"};
    unsigned mode;
    if (worked(value, ((ask_one)smi_function(field->function))(device, &mode))) WRITE("%s", NAME_IN(names, mode));
}

static void read_capability(ARGUMENTS)
{
    (void)field;
    int major, minor;
    if (worked(value, SMI_CALL(nvmlDeviceGetCudaComputeCapability, (nvmlDevice_t, int *, int *), device, &major, &minor))) WRITE("%d.%d", major, minor);
}

static void read_brand(ARGUMENTS)
{
    static const char *const names[] = {NULL, "Quadro", "Tesla", "NVS", "GRID", "GeForce", "Titan", "NVIDIA Virtual Applications", "NVIDIA Virtual PC",
                                        "NVIDIA Virtual Compute Server", "NVIDIA RTX Virtual Workstation", "NVIDIA Cloud Gaming", "Quadro RTX",
                                        "NVIDIA RTX", "NVIDIA", "GeForce RTX", "Titan RTX"};
    unsigned brand;
    if (worked(value, ((ask_one)smi_function(field->function))(device, &brand))) WRITE("%s", NAME_IN(names, brand));
}

static void read_architecture(ARGUMENTS)
{
    static const char *const names[] = {NULL, NULL, "Kepler", "Maxwell", "Pascal", "Volta", "Turing", "Ampere", "Ada Lovelace", "Hopper", "Blackwell"};
    unsigned architecture;
    if (worked(value, ((ask_one)smi_function(field->function))(device, &architecture))) WRITE("%s", NAME_IN(names, architecture));
}

static void read_addressing(ARGUMENTS)
{
    static const char *const names[] = {"None", "HMM", "ATS"};
    struct nvml_addressing_mode mode = {.version = NVML_VERSION_OF(struct nvml_addressing_mode, 1)};
    (void)field;
    if (worked(value, SMI_CALL(nvmlDeviceGetAddressingMode, (nvmlDevice_t, struct nvml_addressing_mode *), device, &mode))) WRITE("%s", NAME_IN(names, mode.value));
}

static void read_virtualization(ARGUMENTS)
{
    static const char *const names[] = {"None", "Pass-Through", "VGPU", "Host VGPU", "Host VSGA"};
    unsigned mode;
    if (worked(value, ((ask_one)smi_function(field->function))(device, &mode))) WRITE("%s", NAME_IN(names, mode));
}

static void read_board(ARGUMENTS)
{
    unsigned id;
    if (worked(value, ((ask_one)smi_function(field->function))(device, &id))) WRITE("0x%x", id);
}

static void read_driver(ARGUMENTS)
{
    (void)field, (void)device;
    (void)worked(value, SMI_CALL(nvmlSystemGetDriverVersion, (char *, unsigned), value->text, 80));
}

static void read_count(ARGUMENTS)
{
    unsigned count;
    (void)field, (void)device;
    if (worked(value, SMI_CALL(nvmlDeviceGetCount_v2, (unsigned *), &count))) WRITE("%u", count);
}

static void read_time(ARGUMENTS)
{
    (void)field, (void)device;
    smi_timestamp(true, value->text, sizeof value->text);
}

static void read_firmware(ARGUMENTS)
{
    (void)worked(value, ((nvmlReturn_t(*)(nvmlDevice_t, char *))smi_function(field->function))(device, value->text));
}

/* argument: error kind << 8 | life << 4 | location; location 15: all of them */
static void read_errors(ARGUMENTS)
{
    unsigned kind = field->argument >> 8, life = field->argument >> 4 & 15, location = field->argument & 15;
    unsigned long long count;
    nvmlReturn_t status =
        location == 15 ? SMI_CALL(nvmlDeviceGetTotalEccErrors, (nvmlDevice_t, unsigned, unsigned, unsigned long long *), device, kind, life, &count)
                       : SMI_CALL(nvmlDeviceGetMemoryErrorCounter, (nvmlDevice_t, unsigned, unsigned, unsigned, unsigned long long *), device, kind, life, location, &count);
    if (worked(value, status)) WRITE("%llu", count);
}

/* argument: 0 correctable, 1 uncorrectable, 2 pending, 3 failure */
static void read_rows(ARGUMENTS)
{
    unsigned rows[4];
    if (!worked(value, SMI_CALL(nvmlDeviceGetRemappedRows, (nvmlDevice_t, unsigned *, unsigned *, unsigned *, unsigned *), device, &rows[0], &rows[1], &rows[2], &rows[3]))) return;
    if (field->argument < 2)
        WRITE("%u", rows[field->argument]);
    else
        WRITE("%s", rows[field->argument] ? "Yes" : "No");
}

/* argument: 0 sessions, 1 rate, 2 latency */
static void read_capture(ARGUMENTS)
{
    struct nvml_capture_stats stats;
    if (!worked(value, SMI_CALL(nvmlDeviceGetFBCStats, (nvmlDevice_t, struct nvml_capture_stats *), device, &stats))) return;
    unsigned numbers[] = {stats.sessions, stats.average_rate, stats.average_latency};
    WRITE("%u", numbers[field->argument]);
}

static void read_extended_memory(ARGUMENTS)
{
    struct nvml_capabilities capabilities = {.version = NVML_VERSION_OF(struct nvml_capabilities, 1)};
    (void)field;
    if (worked(value, SMI_CALL(nvmlDeviceGetCapabilities, (nvmlDevice_t, struct nvml_capabilities *), device, &capabilities)))
        WRITE("%s", capabilities.mask & 1 ? "enabled" : "disabled");
}

/* Deprecated by driver 580, which writes so. */
static void read_deprecated(ARGUMENTS)
{
    (void)field, (void)device;
    failed(value, 26);
}

static void read_no(ARGUMENTS)
{
    (void)field, (void)device;
    WRITE("No");
}

/* Known to driver 580's nvidia-smi; on this GPU always refused by the library. */
static void read_nothing(ARGUMENTS)
{
    (void)field, (void)device;
    failed(value, NVML_ERROR_NOT_SUPPORTED);
}

/* ---- the table, in the order of driver 580's list ---- */

#define NONE(name) {name, NULL, "", read_nothing, NULL, 0, false}
#define NONE_OR(name, other) {name, other, "", read_nothing, NULL, 0, false}
#define NONE_IN(name, unit) {name, NULL, unit, read_nothing, NULL, 0, false}
#define NONE_IN_OR(name, other, unit) {name, other, unit, read_nothing, NULL, 0, false}
#define NONE_BARE(name) {name, NULL, "", read_nothing, NULL, 0, true}
#define ERRORS(name, number) {"ecc.errors." name, NULL, "", read_errors, NULL, number, false}
#define ECC(name, number)                                                                                                              \
    ERRORS(name ".device_memory", (number) | 2), ERRORS(name ".dram", (number) | 2), ERRORS(name ".register_file", (number) | 3),     \
        ERRORS(name ".l1_cache", (number) | 0), ERRORS(name ".l2_cache", (number) | 1), ERRORS(name ".texture_memory", (number) | 4), \
        ERRORS(name ".cbu", (number) | 6), ERRORS(name ".sram", (number) | 7), ERRORS(name ".total", (number) | 15)
#define REASON(name, bit) {"clocks_event_reasons." name, "clocks_throttle_reasons." name, "", read_reasons, "nvmlDeviceGetCurrentClocksEventReasons", bit, false}

static const struct smi_field fields[] = {
    {"timestamp", NULL, "", read_time, NULL, 0, false},
    {"driver_version", NULL, "", read_driver, NULL, 0, false},
    NONE("vgpu_driver_capability.heterogenous_multivGPU"),
    {"count", NULL, "", read_count, NULL, 0, false},
    {"name", "gpu_name", "", read_text, "nvmlDeviceGetName", 0, false},
    {"serial", "gpu_serial", "", read_text, "nvmlDeviceGetSerial", 0, false},
    {"uuid", "gpu_uuid", "", read_text, "nvmlDeviceGetUUID", 0, false},
    {"pci.bus_id", "gpu_bus_id", "", read_pci, NULL, 0, false},
    {"pci.domain", NULL, "", read_pci, NULL, 1, false},
    {"pci.bus", NULL, "", read_pci, NULL, 2, false},
    {"pci.device", NULL, "", read_pci, NULL, 3, false},
    {"pci.baseClass", NULL, "", read_pci, NULL, 4, false},
    {"pci.subClass", NULL, "", read_pci, NULL, 5, false},
    {"pci.device_id", NULL, "", read_pci, NULL, 6, false},
    {"pci.sub_device_id", NULL, "", read_pci, NULL, 7, false},
    NONE("vgpu_device_capability.fractional_multiVgpu"),
    NONE("vgpu_device_capability.heterogeneous_timeSlice_profile"),
    NONE("vgpu_device_capability.heterogeneous_timeSlice_sizes"),
    NONE("vgpu_device_capability.homogeneous_placements"),
    NONE("vgpu_device_capability.mig_timeSlicing"),
    NONE("vgpu_device_capability.mig_timeSlicing_mode"),
    {"pcie.link.gen.current", NULL, "", read_number, "nvmlDeviceGetCurrPcieLinkGeneration", 0, false},
    {"pcie.link.gen.gpucurrent", NULL, "", read_number, "nvmlDeviceGetCurrPcieLinkGeneration", 0, false},
    {"pcie.link.gen.max", NULL, "", read_number, "nvmlDeviceGetMaxPcieLinkGeneration", 0, false},
    {"pcie.link.gen.gpumax", NULL, "", read_number, "nvmlDeviceGetGpuMaxPcieLinkGeneration", 0, false},
    NONE("pcie.link.gen.hostmax"),
    {"pcie.link.width.current", NULL, "", read_number, "nvmlDeviceGetCurrPcieLinkWidth", 0, false},
    {"pcie.link.width.max", NULL, "", read_number, "nvmlDeviceGetMaxPcieLinkWidth", 0, false},
    {"index", NULL, "", read_number, "nvmlDeviceGetIndex", 0, false},
    {"display_mode", NULL, "", read_deprecated, NULL, 0, false},
    {"display_attached", NULL, "", read_no, NULL, 0, false},
    {"display_active", NULL, "", read_enabled, "nvmlDeviceGetDisplayActive", 0, false},
    {"persistence_mode", NULL, "", read_enabled, "nvmlDeviceGetPersistenceMode", 0, false},
    {"addressing_mode", NULL, "", read_addressing, NULL, 0, false},
    {"accounting.mode", NULL, "", read_enabled, "nvmlDeviceGetAccountingMode", 0, false},
    {"accounting.buffer_size", NULL, "", read_number, "nvmlDeviceGetAccountingBufferSize", 0, false},
    NONE("driver_model.current"),
    NONE("driver_model.pending"),
    {"vbios_version", NULL, "", read_text, "nvmlDeviceGetVbiosVersion", 0, false},
    {"inforom.img", "inforom.image", "", read_text, "nvmlDeviceGetInforomImageVersion", 0, false},
    NONE("inforom.oem"),
    NONE("inforom.ecc"),
    NONE_OR("inforom.pwr", "inforom.power"),
    NONE_BARE("inforom.checksum_validation"),
    NONE("gpu_recovery_action"),
    NONE_OR("gom.current", "gpu_operation_mode.current"),
    NONE_OR("gom.pending", "gpu_operation_mode.pending"),
    {"fan.speed", NULL, "%", read_number, "nvmlDeviceGetFanSpeed", 0, false},
    {"pstate", NULL, "", read_state, "nvmlDeviceGetPerformanceState", 0, false},
    {"clocks_event_reasons.supported", "clocks_throttle_reasons.supported", "", read_reasons, "nvmlDeviceGetSupportedClocksEventReasons", 0, false},
    {"clocks_event_reasons.active", "clocks_throttle_reasons.active", "", read_reasons, "nvmlDeviceGetCurrentClocksEventReasons", 0, false},
    REASON("gpu_idle", 0x1),
    REASON("applications_clocks_setting", 0x2),
    REASON("sw_power_cap", 0x4),
    REASON("hw_slowdown", 0x8),
    REASON("hw_thermal_slowdown", 0x40),
    REASON("hw_power_brake_slowdown", 0x80),
    REASON("sw_thermal_slowdown", 0x20),
    REASON("sync_boost", 0x10),
    NONE_IN("clocks_event_reasons_counters.sw_power_cap", "us"),
    NONE_IN("clocks_event_reasons_counters.sync_boost", "us"),
    NONE_IN("clocks_event_reasons_counters.sw_thermal_slowdown", "us"),
    NONE_IN("clocks_event_reasons_counters.hw_thermal_slowdown", "us"),
    NONE_IN("clocks_event_reasons_counters.hw_power_brake_slowdown", "us"),
    {"memory.total", NULL, "MiB", read_memory, NULL, 0, false},
    {"memory.reserved", NULL, "MiB", read_memory, NULL, 1, false},
    {"memory.used", NULL, "MiB", read_memory, NULL, 3, false},
    {"memory.free", NULL, "MiB", read_memory, NULL, 2, false},
    {"compute_mode", NULL, "", read_compute_mode, "nvmlDeviceGetComputeMode", 0, false},
    {"compute_cap", NULL, "", read_capability, NULL, 0, false},
    {"utilization.gpu", NULL, "%", read_utilization, NULL, 0, false},
    {"utilization.memory", NULL, "%", read_utilization, NULL, 1, false},
    {"utilization.encoder", NULL, "%", read_first_of_two, "nvmlDeviceGetEncoderUtilization", 0, false},
    {"utilization.decoder", NULL, "%", read_first_of_two, "nvmlDeviceGetDecoderUtilization", 0, false},
    {"utilization.jpeg", NULL, "%", read_first_of_two, "nvmlDeviceGetJpgUtilization", 0, false},
    {"utilization.ofa", NULL, "%", read_first_of_two, "nvmlDeviceGetOfaUtilization", 0, false},
    {"encoder.stats.sessionCount", NULL, "", read_of_three, "nvmlDeviceGetEncoderStats", 0, false},
    {"encoder.stats.averageFps", NULL, "", read_of_three, "nvmlDeviceGetEncoderStats", 1, false},
    {"encoder.stats.averageLatency", NULL, "", read_of_three, "nvmlDeviceGetEncoderStats", 2, false},
    NONE("dramEncryption.mode.current"),
    NONE("dramEncryption.mode.pending"),
    {"ecc.mode.current", NULL, "", read_enabled_of_two, "nvmlDeviceGetEccMode", 0, false},
    {"ecc.mode.pending", NULL, "", read_enabled_of_two, "nvmlDeviceGetEccMode", 1, false},
    ECC("corrected.volatile", 0x000),
    ECC("corrected.aggregate", 0x010),
    ECC("uncorrected.volatile", 0x100),
    ECC("uncorrected.aggregate", 0x110),
    NONE("ecc.errors.uncorrected.volatile.sram.parity"),
    NONE("ecc.errors.uncorrected.volatile.sram.secded"),
    NONE("ecc.errors.uncorrected.aggregate.sram.parity"),
    NONE("ecc.errors.uncorrected.aggregate.sram.secded"),
    NONE("ecc.errors.uncorrected.aggregate.sram.thresholdExceeded"),
    NONE("ecc.errors.uncorrected.aggregate.sram.l2"),
    NONE("ecc.errors.uncorrected.aggregate.sram.sm"),
    NONE("ecc.errors.uncorrected.aggregate.sram.mcu"),
    NONE("ecc.errors.uncorrected.aggregate.sram.pcie"),
    NONE("ecc.errors.uncorrected.aggregate.sram.other"),
    NONE_OR("retired_pages.single_bit_ecc.count", "retired_pages.sbe"),
    NONE_OR("retired_pages.double_bit.count", "retired_pages.dbe"),
    NONE("retired_pages.pending"),
    {"remapped_rows.correctable", "remapped_rows.sbe", "", read_rows, NULL, 0, false},
    NONE("remapped_rows.correctable_inactive"),
    {"remapped_rows.uncorrectable", "remapped_rows.dbe", "", read_rows, NULL, 1, false},
    NONE("remapped_rows.uncorrectable_inactive"),
    {"remapped_rows.pending", NULL, "", read_rows, NULL, 2, false},
    {"remapped_rows.failure", NULL, "", read_rows, NULL, 3, false},
    NONE("remapped_rows.histogram.max"),
    NONE("remapped_rows.histogram.high"),
    NONE("remapped_rows.histogram.partial"),
    NONE("remapped_rows.histogram.low"),
    NONE("remapped_rows.histogram.none"),
    {"temperature.gpu", NULL, "", read_number_of, "nvmlDeviceGetTemperature", 0, false},
    NONE("temperature.gpu.tlimit"),
    {"temperature.memory", NULL, "", read_field_number, NULL, 82, true},
    {"power.management", NULL, "", read_enabled, "nvmlDeviceGetPowerManagementMode", 0, false},
    {"power.draw", NULL, "W", read_watts, "nvmlDeviceGetPowerUsage", 0, false},
    {"power.draw.average", "gpu.power.draw.average", "W", read_field_watts, NULL, 185, false},
    {"power.draw.instant", "gpu.power.draw.instant", "W", read_field_watts, NULL, 186, false},
    {"power.limit", "gpu.power.requested_limit", "W", read_watts, "nvmlDeviceGetPowerManagementLimit", 0, false},
    {"enforced.power.limit", "gpu.power.current_limit", "W", read_watts, "nvmlDeviceGetEnforcedPowerLimit", 0, false},
    {"power.default_limit", "gpu.power.default_limit", "W", read_watts, "nvmlDeviceGetPowerManagementDefaultLimit", 0, false},
    {"power.min_limit", "gpu.power.min_limit", "W", read_watts_of_two, "nvmlDeviceGetPowerManagementLimitConstraints", 0, false},
    {"power.max_limit", "gpu.power.max_limit", "W", read_watts_of_two, "nvmlDeviceGetPowerManagementLimitConstraints", 1, false},
    NONE_IN("module.power.draw.average", "W"),
    NONE_IN("module.power.draw.instant", "W"),
    NONE_IN_OR("module.power.limit", "module.power.requested_limit", "W"),
    NONE_IN_OR("module.enforced.power.limit", "module.power.current_limit", "W"),
    NONE_IN("module.power.default_limit", "W"),
    NONE_IN("module.power.min_limit", "W"),
    NONE_IN("module.power.max_limit", "W"),
    {"clocks.current.graphics", "clocks.gr", "MHz", read_number_of, "nvmlDeviceGetClockInfo", NVML_CLOCK_GRAPHICS, false},
    {"clocks.current.sm", "clocks.sm", "MHz", read_number_of, "nvmlDeviceGetClockInfo", NVML_CLOCK_SM, false},
    {"clocks.current.memory", "clocks.mem", "MHz", read_number_of, "nvmlDeviceGetClockInfo", NVML_CLOCK_MEMORY, false},
    {"clocks.current.video", "clocks.video", "MHz", read_number_of, "nvmlDeviceGetClockInfo", NVML_CLOCK_VIDEO, false},
    {"clocks.applications.graphics", "clocks.applications.gr", "MHz", read_number_of, "nvmlDeviceGetApplicationsClock", NVML_CLOCK_GRAPHICS, false},
    {"clocks.applications.memory", "clocks.applications.mem", "MHz", read_number_of, "nvmlDeviceGetApplicationsClock", NVML_CLOCK_MEMORY, false},
    {"clocks.default_applications.graphics", "clocks.default_applications.gr", "MHz", read_number_of, "nvmlDeviceGetDefaultApplicationsClock", NVML_CLOCK_GRAPHICS, false},
    {"clocks.default_applications.memory", "clocks.default_applications.mem", "MHz", read_number_of, "nvmlDeviceGetDefaultApplicationsClock", NVML_CLOCK_MEMORY, false},
    {"clocks.max.graphics", "clocks.max.gr", "MHz", read_number_of, "nvmlDeviceGetMaxClockInfo", NVML_CLOCK_GRAPHICS, false},
    {"clocks.max.sm", NULL, "MHz", read_number_of, "nvmlDeviceGetMaxClockInfo", NVML_CLOCK_SM, false},
    {"clocks.max.memory", "clocks.max.mem", "MHz", read_number_of, "nvmlDeviceGetMaxClockInfo", NVML_CLOCK_MEMORY, false},
    {"mig.mode.current", NULL, "", read_enabled_of_two, "nvmlDeviceGetMigMode", 0, false},
    {"mig.mode.pending", NULL, "", read_enabled_of_two, "nvmlDeviceGetMigMode", 1, false},
    {"gsp.mode.current", NULL, "", read_enabled_of_two, "nvmlDeviceGetGspFirmwareMode", 0, false},
    {"gsp.mode.default", NULL, "", read_enabled_of_two, "nvmlDeviceGetGspFirmwareMode", 1, false},
    NONE("c2c.mode"),
    NONE_IN("protected_memory.total", "MiB"),
    NONE_IN("protected_memory.used", "MiB"),
    NONE_IN("protected_memory.free", "MiB"),
    NONE_BARE("fabric.state"),
    NONE_BARE("fabric.status"),
    NONE_BARE("fabric.cliqueId"),
    NONE_BARE("fabric.clusterUuid"),
    NONE_BARE("fabric.health.summary"),
    NONE_BARE("fabric.health.bandwidth"),
    NONE_BARE("fabric.health.route_recovery_in_progress"),
    NONE_BARE("fabric.health.route_unhealthy"),
    NONE_BARE("fabric.health.access_timeout_recovery"),
    NONE_BARE("fabric.health.incorrect_configuration"),
    NONE_BARE("fabric.health.partition_assigned"),
    NONE("platform.chassis_serial_number"),
    NONE("platform.slot_number"),
    NONE("platform.tray_index"),
    NONE("platform.host_id"),
    NONE("platform.peer_type"),
    NONE("platform.module_id"),
    NONE("platform.gpu_fabric_guid"),
    NONE("hostname"),
};

/* What -q shows and --query-gpu has no name for. */
static const struct smi_field further[] = {
    {"-brand", NULL, "", read_brand, "nvmlDeviceGetBrand", 0, false},
    {"-architecture", NULL, "", read_architecture, "nvmlDeviceGetArchitecture", 0, false},
    {"-minor", NULL, "", read_number, "nvmlDeviceGetMinorNumber", 0, false},
    {"-multi_gpu", NULL, "", read_yes, "nvmlDeviceGetMultiGpuBoard", 0, false},
    {"-board_id", NULL, "", read_board, "nvmlDeviceGetBoardId", 0, false},
    {"-board_part", NULL, "", read_text, "nvmlDeviceGetBoardPartNumber", 0, false},
    {"-virtualization", NULL, "", read_virtualization, "nvmlDeviceGetVirtualizationMode", 0, false},
    {"-gsp", NULL, "", read_firmware, "nvmlDeviceGetGspFirmwareVersion", 0, false},
    {"-tx", NULL, "", read_number_of, "nvmlDeviceGetPcieThroughput", 0, false},
    {"-rx", NULL, "", read_number_of, "nvmlDeviceGetPcieThroughput", 1, false},
    {"-bar1.total", NULL, "", read_aperture, NULL, 0, false},
    {"-bar1.used", NULL, "", read_aperture, NULL, 3, false},
    {"-bar1.free", NULL, "", read_aperture, NULL, 2, false},
    {"-display_clock", NULL, "", read_reasons, "nvmlDeviceGetCurrentClocksEventReasons", 0x100, false},
    {"-shutdown", NULL, "", read_number_of, "nvmlDeviceGetTemperatureThreshold", NVML_THRESHOLD_SHUTDOWN, false},
    {"-slowdown", NULL, "", read_number_of, "nvmlDeviceGetTemperatureThreshold", NVML_THRESHOLD_SLOWDOWN, false},
    {"-video_max", NULL, "", read_number_of, "nvmlDeviceGetMaxClockInfo", NVML_CLOCK_VIDEO, false},
    {"-boost_max", NULL, "", read_number_of, "nvmlDeviceGetMaxCustomerBoostClock", NVML_CLOCK_GRAPHICS, false},
    {"-fbc.sessions", NULL, "", read_capture, NULL, 0, false},
    {"-fbc.rate", NULL, "", read_capture, NULL, 1, false},
    {"-fbc.latency", NULL, "", read_capture, NULL, 2, false},
    {"-egm", NULL, "", read_extended_memory, NULL, 0, false},
    {"-none", NULL, "", read_nothing, NULL, 0, false},
};

/* ---- looking up ---- */

static bool is_named(const char *name, const char *wanted, size_t length) { return name != NULL && strlen(name) == length && strncmp(name, wanted, length) == 0; }

const struct smi_field *smi_find_field(const char *name, size_t length)
{
    for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++)
        if (is_named(fields[i].name, name, length) || is_named(fields[i].other, name, length)) return &fields[i];
    return NULL;
}

const char *smi_field_name(const struct smi_field *field) { return field->name; }
const char *smi_field_unit(const struct smi_field *field) { return field->unit; }
bool smi_field_is_bare(const struct smi_field *field) { return field->bare; }

void smi_read_field(const struct smi_field *field, nvmlDevice_t device, struct smi_value *value)
{
    value->status = NVML_SUCCESS;
    value->text[0] = '\0';
    field->read(field, device, value);
}

void smi_read(const char *name, nvmlDevice_t device, struct smi_value *value)
{
    const struct smi_field *field = smi_find_field(name, strlen(name));
    for (size_t i = 0; field == NULL && i < sizeof further / sizeof further[0]; i++)
        if (strcmp(further[i].name, name) == 0) field = &further[i];
    if (field == NULL) abort(); /* a name in our own layouts */
    smi_read_field(field, device, value);
}

void smi_print_field_help(void)
{
    puts("List of valid properties to query for the switch \"--query-gpu\":\n");
    for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++) {
        printf("\"%s\"", fields[i].name);
        if (fields[i].other != NULL) printf(" or \"%s\"", fields[i].other);
        putchar('\n');
    }
}

void smi_timestamp(bool with_milliseconds, char *text, size_t size)
{
    struct timeval now;
    struct tm local;
    gettimeofday(&now, NULL);
    localtime_r(&now.tv_sec, &local);
    size_t length = strftime(text, size, with_milliseconds ? "%Y/%m/%d %H:%M:%S" : "%a %b %e %H:%M:%S %Y", &local);
    if (with_milliseconds) snprintf(text + length, size - length, ".%03d", (int)(now.tv_usec / 1000));
}

/* ---- processes ---- */

static int by_pid(const void *a, const void *b)
{
    unsigned first = ((const struct nvml_process_v2 *)a)->pid, second = ((const struct nvml_process_v2 *)b)->pid;
    return first < second ? -1 : first > second;
}

nvmlReturn_t smi_processes(nvmlDevice_t device, struct nvml_process_v2 *processes, unsigned *count)
{
    *count = SMI_PROCESSES;
    nvmlReturn_t status = SMI_CALL(nvmlDeviceGetComputeRunningProcesses_v3, (nvmlDevice_t, unsigned *, struct nvml_process_v2 *), device, count, processes);
    if (status != NVML_SUCCESS) *count = 0;
    qsort(processes, *count, sizeof *processes, by_pid);
    return status;
}

void smi_process_name(unsigned pid, struct smi_value *value)
{
    value->status = SMI_CALL(nvmlSystemGetProcessName, (unsigned, char *, unsigned), pid, value->text, 4096);
    if (value->status != NVML_SUCCESS) WRITE("[%s]", smi_error(value->status));
}
