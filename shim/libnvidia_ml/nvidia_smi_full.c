/* SPDX-License-Identifier: Apache-2.0 */
/*
 * nvidia_smi_full.c - nvidia-smi -q: everything about a GPU, in sections that scripts read line by line. The order and the
 * words are those of driver 580.
 */
#include "nvidia_smi.h"

#include <string.h>

/* What -d selects; REST: what is only in everything. */
enum { REST = 1u << 0, MEMORY = 1u << 1, UTILIZATION = 1u << 2, ECC = 1u << 3, TEMPERATURE = 1u << 4, POWER = 1u << 5, CLOCK = 1u << 6,
       COMPUTE = 1u << 7, PIDS = 1u << 8, PERFORMANCE = 1u << 9, PAGE_RETIREMENT = 1u << 10, ACCOUNTING = 1u << 11, ENCODER_STATS = 1u << 12,
       FBC_STATS = 1u << 13, ROW_REMAPPER = 1u << 14, GSP = 1u << 15, EVERYTHING = ~0u };
static const struct { const char *name; unsigned mask; } displays[] = {
    {"MEMORY", MEMORY}, {"UTILIZATION", UTILIZATION}, {"ECC", ECC}, {"TEMPERATURE", TEMPERATURE}, {"POWER", POWER}, {"CLOCK", CLOCK},
    {"COMPUTE", COMPUTE}, {"PIDS", PIDS}, {"PERFORMANCE", PERFORMANCE}, {"PAGE_RETIREMENT", PAGE_RETIREMENT}, {"ACCOUNTING", ACCOUNTING},
    {"ENCODER_STATS", ENCODER_STATS}, {"FBC_STATS", FBC_STATS}, {"ROW_REMAPPER", ROW_REMAPPER}, {"GSP_FIRMWARE_VERSION", GSP},
};

struct row {
    unsigned section;
    unsigned indent;
    const char *label;
    const char *field;  /* NULL: a heading */
    const char *suffix; /* behind a value that is there */
};

#define NO "-none"
static const struct row rows[] = {
    {REST, 4, "Product Name", "name", ""},
    {REST, 4, "Product Brand", "-brand", ""},
    {REST, 4, "Product Architecture", "-architecture", ""},
    {REST, 4, "Display Mode", "display_mode", ""},
    {REST, 4, "Display Attached", "display_attached", ""},
    {REST, 4, "Display Active", "display_active", ""},
    {REST, 4, "Persistence Mode", "persistence_mode", ""},
    {REST, 4, "Addressing Mode", "addressing_mode", ""},
    {REST, 4, "MIG Mode", NULL, NULL},
    {REST, 8, "Current", "mig.mode.current", ""},
    {REST, 8, "Pending", "mig.mode.pending", ""},
    {ACCOUNTING, 4, "Accounting Mode", "accounting.mode", ""},
    {ACCOUNTING, 4, "Accounting Mode Buffer Size", "accounting.buffer_size", ""},
    {REST, 4, "Driver Model", NULL, NULL},
    {REST, 8, "Current", "driver_model.current", ""},
    {REST, 8, "Pending", "driver_model.pending", ""},
    {REST, 4, "Serial Number", "serial", ""},
    {REST, 4, "GPU UUID", "uuid", ""},
    {REST, 4, "GPU PDI", NO, ""},
    {REST, 4, "Minor Number", "-minor", ""},
    {REST, 4, "VBIOS Version", "vbios_version", ""},
    {REST, 4, "MultiGPU Board", "-multi_gpu", ""},
    {REST, 4, "Board ID", "-board_id", ""},
    {REST, 4, "Board Part Number", "-board_part", ""},
    {REST, 4, "GPU Part Number", NO, ""},
    {REST, 4, "FRU Part Number", NO, ""},
    {REST, 4, "Platform Info", NULL, NULL},
    {REST, 8, "Chassis Serial Number", "platform.chassis_serial_number", ""},
    {REST, 8, "Slot Number", "platform.slot_number", ""},
    {REST, 8, "Tray Index", "platform.tray_index", ""},
    {REST, 8, "Host ID", "platform.host_id", ""},
    {REST, 8, "Peer Type", "platform.peer_type", ""},
    {REST, 8, "Module Id", "platform.module_id", ""},
    {REST, 8, "GPU Fabric GUID", "platform.gpu_fabric_guid", ""},
    {REST, 4, "Inforom Version", NULL, NULL},
    {REST, 8, "Image Version", "inforom.img", ""},
    {REST, 8, "OEM Object", "inforom.oem", ""},
    {REST, 8, "ECC Object", "inforom.ecc", ""},
    {REST, 8, "Power Management Object", "inforom.pwr", ""},
    {REST, 4, "Inforom BBX Object Flush", NULL, NULL},
    {REST, 8, "Latest Timestamp", NO, ""},
    {REST, 8, "Latest Duration", NO, ""},
    {REST, 4, "GPU Operation Mode", NULL, NULL},
    {REST, 8, "Current", "gom.current", ""},
    {REST, 8, "Pending", "gom.pending", ""},
    {REST, 4, "GPU C2C Mode", "c2c.mode", ""},
    {REST, 4, "GPU Virtualization Mode", NULL, NULL},
    {REST, 8, "Virtualization Mode", "-virtualization", ""},
    {REST, 8, "Host VGPU Mode", NO, ""},
    {REST, 8, "vGPU Heterogeneous Mode", NO, ""},
    {REST, 4, "GPU Recovery Action", "gpu_recovery_action", ""},
    {GSP, 4, "GSP Firmware Version", "-gsp", ""},
    {REST, 4, "IBMNPU", NULL, NULL},
    {REST, 8, "Relaxed Ordering Mode", NO, ""},
    {REST, 4, "PCI", NULL, NULL},
    {REST, 8, "Bus", "pci.bus", ""},
    {REST, 8, "Device", "pci.device", ""},
    {REST, 8, "Domain", "pci.domain", ""},
    {REST, 8, "Base Classcode", "pci.baseClass", ""},
    {REST, 8, "Sub Classcode", "pci.subClass", ""},
    {REST, 8, "Device Id", "pci.device_id", ""},
    {REST, 8, "Bus Id", "pci.bus_id", ""},
    {REST, 8, "Sub System Id", "pci.sub_device_id", ""},
    {REST, 8, "GPU Link Info", NULL, NULL},
    {REST, 12, "PCIe Generation", NULL, NULL},
    {REST, 16, "Max", "pcie.link.gen.max", ""},
    {REST, 16, "Current", "pcie.link.gen.current", ""},
    {REST, 16, "Device Current", "pcie.link.gen.gpucurrent", ""},
    {REST, 16, "Device Max", "pcie.link.gen.gpumax", ""},
    {REST, 16, "Host Max", "pcie.link.gen.hostmax", ""},
    {REST, 12, "Link Width", NULL, NULL},
    {REST, 16, "Max", "pcie.link.width.max", "x"},
    {REST, 16, "Current", "pcie.link.width.current", "x"},
    {REST, 8, "Bridge Chip", NULL, NULL},
    {REST, 12, "Type", NO, ""},
    {REST, 12, "Firmware", NO, ""},
    {REST, 8, "Replays Since Reset", NO, ""},
    {REST, 8, "Replay Number Rollovers", NO, ""},
    {REST, 8, "Tx Throughput", "-tx", " KB/s"},
    {REST, 8, "Rx Throughput", "-rx", " KB/s"},
    {REST, 8, "Atomic Caps Outbound", NO, ""},
    {REST, 8, "Atomic Caps Inbound", NO, ""},
    {REST, 4, "Fan Speed", "fan.speed", " %"},
    {PERFORMANCE, 4, "Performance State", "pstate", ""},
    {PERFORMANCE, 4, "Clocks Event Reasons", NULL, NULL},
    {PERFORMANCE, 8, "Idle", "clocks_event_reasons.gpu_idle", ""},
    {PERFORMANCE, 8, "Applications Clocks Setting", "clocks_event_reasons.applications_clocks_setting", ""},
    {PERFORMANCE, 8, "SW Power Cap", "clocks_event_reasons.sw_power_cap", ""},
    {PERFORMANCE, 8, "HW Slowdown", "clocks_event_reasons.hw_slowdown", ""},
    {PERFORMANCE, 12, "HW Thermal Slowdown", "clocks_event_reasons.hw_thermal_slowdown", ""},
    {PERFORMANCE, 12, "HW Power Brake Slowdown", "clocks_event_reasons.hw_power_brake_slowdown", ""},
    {PERFORMANCE, 8, "Sync Boost", "clocks_event_reasons.sync_boost", ""},
    {PERFORMANCE, 8, "SW Thermal Slowdown", "clocks_event_reasons.sw_thermal_slowdown", ""},
    {PERFORMANCE, 8, "Display Clock Setting", "-display_clock", ""},
    {PERFORMANCE, 4, "Clocks Event Reasons Counters", NULL, NULL},
    {PERFORMANCE, 8, "SW Power Capping", "clocks_event_reasons_counters.sw_power_cap", " us"},
    {PERFORMANCE, 8, "Sync Boost", "clocks_event_reasons_counters.sync_boost", " us"},
    {PERFORMANCE, 8, "SW Thermal Slowdown", "clocks_event_reasons_counters.sw_thermal_slowdown", " us"},
    {PERFORMANCE, 8, "HW Thermal Slowdown", "clocks_event_reasons_counters.hw_thermal_slowdown", " us"},
    {PERFORMANCE, 8, "HW Power Braking", "clocks_event_reasons_counters.hw_power_brake_slowdown", " us"},
    {PERFORMANCE, 4, "Sparse Operation Mode", NO, ""},
    {MEMORY, 4, "FB Memory Usage", NULL, NULL},
    {MEMORY, 8, "Total", "memory.total", " MiB"},
    {MEMORY, 8, "Reserved", "memory.reserved", " MiB"},
    {MEMORY, 8, "Used", "memory.used", " MiB"},
    {MEMORY, 8, "Free", "memory.free", " MiB"},
    {MEMORY, 4, "BAR1 Memory Usage", NULL, NULL},
    {MEMORY, 8, "Total", "-bar1.total", " MiB"},
    {MEMORY, 8, "Used", "-bar1.used", " MiB"},
    {MEMORY, 8, "Free", "-bar1.free", " MiB"},
    {MEMORY, 4, "Conf Compute Protected Memory Usage", NULL, NULL},
    {MEMORY, 8, "Total", "protected_memory.total", " MiB"},
    {MEMORY, 8, "Used", "protected_memory.used", " MiB"},
    {MEMORY, 8, "Free", "protected_memory.free", " MiB"},
    {COMPUTE, 4, "Compute Mode", "compute_mode", ""},
    {UTILIZATION, 4, "Utilization", NULL, NULL},
    {UTILIZATION, 8, "GPU", "utilization.gpu", " %"},
    {UTILIZATION, 8, "Memory", "utilization.memory", " %"},
    {UTILIZATION, 8, "Encoder", "utilization.encoder", " %"},
    {UTILIZATION, 8, "Decoder", "utilization.decoder", " %"},
    {UTILIZATION, 8, "JPEG", "utilization.jpeg", " %"},
    {UTILIZATION, 8, "OFA", "utilization.ofa", " %"},
    {ENCODER_STATS, 4, "Encoder Stats", NULL, NULL},
    {ENCODER_STATS, 8, "Active Sessions", "encoder.stats.sessionCount", ""},
    {ENCODER_STATS, 8, "Average FPS", "encoder.stats.averageFps", ""},
    {ENCODER_STATS, 8, "Average Latency", "encoder.stats.averageLatency", ""},
    {FBC_STATS, 4, "FBC Stats", NULL, NULL},
    {FBC_STATS, 8, "Active Sessions", "-fbc.sessions", ""},
    {FBC_STATS, 8, "Average FPS", "-fbc.rate", ""},
    {FBC_STATS, 8, "Average Latency", "-fbc.latency", ""},
    {REST, 4, "DRAM Encryption Mode", NULL, NULL},
    {REST, 8, "Current", "dramEncryption.mode.current", ""},
    {REST, 8, "Pending", "dramEncryption.mode.pending", ""},
    {ECC, 4, "ECC Mode", NULL, NULL},
    {ECC, 8, "Current", "ecc.mode.current", ""},
    {ECC, 8, "Pending", "ecc.mode.pending", ""},
    {ECC, 4, "ECC Errors", NULL, NULL},
    {ECC, 8, "Volatile", NULL, NULL},
    {ECC, 12, "SRAM Correctable", "ecc.errors.corrected.volatile.sram", ""},
    {ECC, 12, "SRAM Uncorrectable Parity", "ecc.errors.uncorrected.volatile.sram.parity", ""},
    {ECC, 12, "SRAM Uncorrectable SEC-DED", "ecc.errors.uncorrected.volatile.sram.secded", ""},
    {ECC, 12, "DRAM Correctable", "ecc.errors.corrected.volatile.dram", ""},
    {ECC, 12, "DRAM Uncorrectable", "ecc.errors.uncorrected.volatile.dram", ""},
    {ECC, 8, "Aggregate", NULL, NULL},
    {ECC, 12, "SRAM Correctable", "ecc.errors.corrected.aggregate.sram", ""},
    {ECC, 12, "SRAM Uncorrectable Parity", "ecc.errors.uncorrected.aggregate.sram.parity", ""},
    {ECC, 12, "SRAM Uncorrectable SEC-DED", "ecc.errors.uncorrected.aggregate.sram.secded", ""},
    {ECC, 12, "DRAM Correctable", "ecc.errors.corrected.aggregate.dram", ""},
    {ECC, 12, "DRAM Uncorrectable", "ecc.errors.uncorrected.aggregate.dram", ""},
    {ECC, 12, "SRAM Threshold Exceeded", "ecc.errors.uncorrected.aggregate.sram.thresholdExceeded", ""},
    {ECC, 8, "Aggregate Uncorrectable SRAM Sources", NULL, NULL},
    {ECC, 12, "SRAM L2", "ecc.errors.uncorrected.aggregate.sram.l2", ""},
    {ECC, 12, "SRAM SM", "ecc.errors.uncorrected.aggregate.sram.sm", ""},
    {ECC, 12, "SRAM Microcontroller", "ecc.errors.uncorrected.aggregate.sram.mcu", ""},
    {ECC, 12, "SRAM PCIE", "ecc.errors.uncorrected.aggregate.sram.pcie", ""},
    {ECC, 12, "SRAM Other", "ecc.errors.uncorrected.aggregate.sram.other", ""},
    {ECC, 8, "Channel Repair Pending", NO, ""},
    {ECC, 8, "TPC Repair Pending", NO, ""},
    {ECC, 8, "Unrepairable Memory", NO, ""},
    {PAGE_RETIREMENT, 4, "Retired Pages", NULL, NULL},
    {PAGE_RETIREMENT, 8, "Single Bit ECC", "retired_pages.sbe", ""},
    {PAGE_RETIREMENT, 8, "Double Bit ECC", "retired_pages.dbe", ""},
    {PAGE_RETIREMENT, 8, "Pending Page Blacklist", "retired_pages.pending", ""},
    {ROW_REMAPPER, 4, "Remapped Rows", NO, ""},
    {TEMPERATURE, 4, "Temperature", NULL, NULL},
    {TEMPERATURE, 8, "GPU Current Temp", "temperature.gpu", " C"},
    {TEMPERATURE, 8, "GPU T.Limit Temp", "temperature.gpu.tlimit", " C"},
    {TEMPERATURE, 8, "GPU Shutdown Temp", "-shutdown", " C"},
    {TEMPERATURE, 8, "GPU Slowdown Temp", "-slowdown", " C"},
    {TEMPERATURE, 8, "GPU Max Operating Temp", NO, " C"},
    {TEMPERATURE, 8, "GPU Target Temperature", NO, " C"},
    {TEMPERATURE, 8, "Memory Current Temp", "temperature.memory", " C"},
    {TEMPERATURE, 8, "Memory Max Operating Temp", NO, " C"},
    {POWER, 4, "GPU Power Readings", NULL, NULL},
    {POWER, 8, "Average Power Draw", "power.draw.average", " W"},
    {POWER, 8, "Instantaneous Power Draw", "power.draw.instant", " W"},
    {POWER, 8, "Current Power Limit", "enforced.power.limit", " W"},
    {POWER, 8, "Requested Power Limit", "power.limit", " W"},
    {POWER, 8, "Default Power Limit", "power.default_limit", " W"},
    {POWER, 8, "Min Power Limit", "power.min_limit", " W"},
    {POWER, 8, "Max Power Limit", "power.max_limit", " W"},
    {POWER, 4, "GPU Memory Power Readings ", NULL, NULL},
    {POWER, 8, "Average Power Draw", NO, " W"},
    {POWER, 8, "Instantaneous Power Draw", NO, " W"},
    {POWER, 4, "Module Power Readings", NULL, NULL},
    {POWER, 8, "Average Power Draw", "module.power.draw.average", " W"},
    {POWER, 8, "Instantaneous Power Draw", "module.power.draw.instant", " W"},
    {POWER, 8, "Current Power Limit", "module.enforced.power.limit", " W"},
    {POWER, 8, "Requested Power Limit", "module.power.limit", " W"},
    {POWER, 8, "Default Power Limit", "module.power.default_limit", " W"},
    {POWER, 8, "Min Power Limit", "module.power.min_limit", " W"},
    {POWER, 8, "Max Power Limit", "module.power.max_limit", " W"},
    {REST, 4, "Power Smoothing", NO, ""},
    {REST, 4, "Workload Power Profiles", NULL, NULL},
    {REST, 8, "Requested Profiles", NO, ""},
    {REST, 8, "Enforced Profiles", NO, ""},
    {CLOCK, 4, "Clocks", NULL, NULL},
    {CLOCK, 8, "Graphics", "clocks.gr", " MHz"},
    {CLOCK, 8, "SM", "clocks.sm", " MHz"},
    {CLOCK, 8, "Memory", "clocks.mem", " MHz"},
    {CLOCK, 8, "Video", "clocks.video", " MHz"},
    {CLOCK, 4, "Applications Clocks", NULL, NULL},
    {CLOCK, 8, "Graphics", "clocks.applications.gr", " MHz"},
    {CLOCK, 8, "Memory", "clocks.applications.mem", " MHz"},
    {CLOCK, 4, "Default Applications Clocks", NULL, NULL},
    {CLOCK, 8, "Graphics", "clocks.default_applications.gr", " MHz"},
    {CLOCK, 8, "Memory", "clocks.default_applications.mem", " MHz"},
    {CLOCK, 4, "Deferred Clocks", NULL, NULL},
    {CLOCK, 8, "Memory", NO, " MHz"},
    {CLOCK, 4, "Max Clocks", NULL, NULL},
    {CLOCK, 8, "Graphics", "clocks.max.gr", " MHz"},
    {CLOCK, 8, "SM", "clocks.max.sm", " MHz"},
    {CLOCK, 8, "Memory", "clocks.max.mem", " MHz"},
    {CLOCK, 8, "Video", "-video_max", " MHz"},
    {CLOCK, 4, "Max Customer Boost Clocks", NULL, NULL},
    {CLOCK, 8, "Graphics", "-boost_max", " MHz"},
    {CLOCK, 4, "Clock Policy", NULL, NULL},
    {CLOCK, 8, "Auto Boost", NO, ""},
    {CLOCK, 8, "Auto Boost Default", NO, ""},
    {REST, 4, "Fabric", NULL, NULL},
    {REST, 8, "State", "fabric.state", ""},
    {REST, 8, "Status", "fabric.status", ""},
    {REST, 8, "CliqueId", "fabric.cliqueId", ""},
    {REST, 8, "ClusterUUID", "fabric.clusterUuid", ""},
    {REST, 8, "Health", NULL, NULL},
    {REST, 12, "Summary", "fabric.health.summary", ""},
    {REST, 12, "Bandwidth", "fabric.health.bandwidth", ""},
    {REST, 12, "Route Recovery in progress", "fabric.health.route_recovery_in_progress", ""},
    {REST, 12, "Route Unhealthy", "fabric.health.route_unhealthy", ""},
    {REST, 12, "Access Timeout Recovery", "fabric.health.access_timeout_recovery", ""},
    {REST, 12, "Incorrect Configuration", "fabric.health.incorrect_configuration", ""},
    {REST, 12, "Partition Assigned", "fabric.health.partition_assigned", ""},
};

/* The sections named; 0: a name is none. */
static unsigned parse_display(const char *list)
{
    if (list == NULL) return EVERYTHING;
    unsigned mask = 0;
    for (const char *at = list; *at != '\0';) {
        size_t length = strcspn(at, ","), i = 0;
        while (i < sizeof displays / sizeof displays[0] && !(strlen(displays[i].name) == length && strncasecmp(displays[i].name, at, length) == 0)) i++;
        if (i == sizeof displays / sizeof displays[0]) return 0;
        mask |= displays[i].mask;
        at += length + (at[length] == ',');
    }
    return mask;
}

bool smi_full_knows(const char *display) { return parse_display(display) != 0; }

static void print_row(unsigned indent, unsigned width, const char *label, const char *text) { printf("%*s%-*s: %s\n", (int)indent, "", (int)(width - indent), label, text); }

static void print_processes(nvmlDevice_t device)
{
    struct nvml_process_v2 processes[SMI_PROCESSES];
    unsigned count;
    struct smi_value value;
    (void)smi_processes(device, processes, &count);
    if (count == 0) {
        print_row(4, 55, "Processes", "None");
        return;
    }
    puts("    Processes");
    for (unsigned i = 0; i < count; i++) {
        char text[64];
        print_row(8, 42, "GPU instance ID", "N/A");
        print_row(8, 42, "Compute instance ID", "N/A");
        snprintf(text, sizeof text, "%u", processes[i].pid);
        print_row(8, 42, "Process ID", text);
        print_row(12, 42, "Type", "C");
        smi_process_name(processes[i].pid, &value);
        print_row(12, 42, "Name", value.text);
        snprintf(text, sizeof text, "%llu MiB", nearest_mebibytes(processes[i].used_memory));
        print_row(12, 42, "Used GPU Memory", text);
    }
}

static void print_device(nvmlDevice_t device, unsigned mask)
{
    struct smi_value value;
    smi_read("pci.bus_id", device, &value);
    printf("GPU %s\n", value.text);
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        if (!(rows[i].section & mask)) continue;
        if (rows[i].field == NULL) {
            const struct row *heading = &rows[i];
            /* Reasons that are not known are one line. */
            bool folded = strcmp(heading->label, "Clocks Event Reasons") == 0 && (smi_read(rows[i + 1].field, device, &value), value.status != NVML_SUCCESS);
            if (folded)
                print_row(heading->indent, 55, heading->label, value.text);
            else
                printf("%*s%s\n", (int)heading->indent, "", heading->label);
            while (folded && rows[i + 1].indent > heading->indent) i++;
            continue;
        }
        smi_read(rows[i].field, device, &value);
        if (value.status == NVML_SUCCESS) strncat(value.text, rows[i].suffix, sizeof value.text - strlen(value.text) - 1);
        print_row(rows[i].indent, 55, rows[i].label, value.text);
    }
    if (mask & PIDS) print_processes(device);
    if (mask == EVERYTHING) {
        puts("    Capabilities");
        smi_read("-egm", device, &value);
        print_row(8, 55, "EGM", value.text);
    }
    putchar('\n');
}

int smi_print_full(const struct smi_options *options)
{
    unsigned mask = parse_display(options->display);
    char text[128], version[80] = "N/A";
    int cuda;
    puts("\n==============NVSMI LOG==============\n");
    smi_timestamp(false, text, sizeof text);
    print_row(0, 55, "Timestamp", text);
    (void)SMI_CALL(nvmlSystemGetDriverVersion, (char *, unsigned), version, sizeof version);
    print_row(0, 55, "Driver Version", version);
    bool known = SMI_CALL(nvmlSystemGetCudaDriverVersion_v2, (int *), &cuda) == NVML_SUCCESS;
    snprintf(text, sizeof text, known ? "%d.%d" : "N/A", known ? cuda / 1000 : 0, known ? cuda % 1000 / 10 : 0);
    print_row(0, 55, "CUDA Version", text);
    unsigned count = 0;
    (void)SMI_CALL(nvmlDeviceGetCount_v2, (unsigned *), &count);
    snprintf(text, sizeof text, "%u", count);
    putchar('\n');
    print_row(0, 55, "Attached GPUs", text);
    for (unsigned i = 0; i < options->devices; i++) print_device(options->device[i], mask);
    return SMI_OK;
}
