/* SPDX-License-Identifier: Apache-2.0 */
/*
 * nvidia_smi_table.c - the table that nvidia-smi prints when asked nothing, in the layout of driver 580: 91 columns, each
 * value at a fixed place. What is too long is cut, and ends in dots.
 */
#include "nvidia_smi.h"

#include <string.h>

#define WIDTH 91
struct line { char text[WIDTH + 1]; };

static struct line template(const char *text)
{
    struct line line;
    snprintf(line.text, sizeof line.text, "%-91s", text);
    return line;
}

enum align { LEFT, RIGHT };

/* Writes `text` into columns [column, column + width). */
static void put(struct line *line, unsigned column, unsigned width, enum align align, const char *text)
{
    char cut[WIDTH + 1];
    if (strlen(text) > width)
        snprintf(cut, sizeof cut, "%.*s...", (int)width - 3, text);
    else
        snprintf(cut, sizeof cut, "%s", text);
    size_t length = strlen(cut);
    memcpy(line->text + column + (align == RIGHT ? width - length : 0), cut, length);
}

/* The value, or what the table has for an error. */
static const char *or_error(const struct smi_value *value)
{
    return value->status == NVML_SUCCESS || value->status == NVML_ERROR_NOT_SUPPORTED ? value->text : "ERR!";
}

static void print_head(void)
{
    char version[80] = "N/A", cuda[16] = "N/A";
    int number;
    (void)SMI_CALL(nvmlSystemGetDriverVersion, (char *, unsigned), version, sizeof version);
    if (SMI_CALL(nvmlSystemGetCudaDriverVersion_v2, (int *), &number) == NVML_SUCCESS) snprintf(cuda, sizeof cuda, "%d.%d", number / 1000, number % 1000 / 10);
    char now[64];
    smi_timestamp(false, now, sizeof now);
    printf("%-31s\n", now);
    puts("+-----------------------------------------------------------------------------------------+");
    struct line line = template("| NVIDIA-SMI                        Driver Version:                CUDA Version:          |");
    put(&line, 13, 20, LEFT, version); /* the original carries the driver's number too */
    put(&line, 52, 14, LEFT, version);
    put(&line, 81, 8, LEFT, cuda);
    puts(line.text);
    puts("+-----------------------------------------+------------------------+----------------------+\n"
         "| GPU  Name                 Persistence-M | Bus-Id          Disp.A | Volatile Uncorr. ECC |\n"
         "| Fan  Temp   Perf          Pwr:Usage/Cap |           Memory-Usage | GPU-Util  Compute M. |\n"
         "|                                         |                        |               MIG M. |\n"
         "|=========================================+========================+======================|");
}

static void print_first_line(nvmlDevice_t device)
{
    struct line line = template("|                                         |                        |                      |");
    struct smi_value value, mode;
    smi_read("index", device, &value);
    put(&line, 2, 3, RIGHT, or_error(&value));
    smi_read("name", device, &value);
    put(&line, 7, 27, LEFT, or_error(&value));
    smi_read("persistence_mode", device, &value);
    if (value.status == NVML_SUCCESS)
        put(&line, 38, 3, LEFT, strcmp(value.text, "Enabled") == 0 ? "On" : "Off");
    else
        put(&line, 37, 4, LEFT, or_error(&value));
    smi_read("pci.bus_id", device, &value);
    put(&line, 46, 16, LEFT, or_error(&value));
    smi_read("display_active", device, &value);
    put(&line, 63, 4, LEFT, value.status != NVML_SUCCESS ? or_error(&value) : strcmp(value.text, "Enabled") == 0 ? "On" : "Off");
    smi_read("ecc.mode.current", device, &mode);
    smi_read("ecc.errors.uncorrected.volatile.total", device, &value);
    put(&line, 69, 20, RIGHT, mode.status == NVML_SUCCESS && strcmp(mode.text, "Disabled") == 0 ? "Off" : or_error(&value));
    puts(line.text);
}

/* A number with its unit, ending before column `end`; an error stands `shift` columns further left, as in the original. */
static void put_number(struct line *line, unsigned end, const char *field, const char *unit, unsigned shift, nvmlDevice_t device)
{
    struct smi_value value;
    char text[64];
    smi_read(field, device, &value);
    bool known = value.status == NVML_SUCCESS && strcmp(value.text, "Unknown") != 0;
    if (known)
        snprintf(text, sizeof text, "%.20s%s", value.text, unit);
    else
        snprintf(text, sizeof text, "%.20s", value.status == NVML_ERROR_NOT_SUPPORTED ? "N/A" : "ERR!");
    put(line, end - 5 - (known ? 0 : shift), 5, RIGHT, text);
}

/* Whole watts, not rounded. */
static void put_watts(struct line *line, unsigned end, nvmlReturn_t (*ask)(nvmlDevice_t, unsigned *), nvmlDevice_t device)
{
    unsigned milliwatts;
    char text[32];
    nvmlReturn_t status = ask(device, &milliwatts);
    if (status == NVML_SUCCESS)
        snprintf(text, sizeof text, "%uW", milliwatts / 1000);
    else
        snprintf(text, sizeof text, "%s ", status == NVML_ERROR_NOT_SUPPORTED ? "N/A" : "ERR!");
    put(line, end - 6, 6, RIGHT, text);
}

static const char *short_mode(const char *mode)
{
    return strcmp(mode, "Exclusive_Thread") == 0 ? "E. Thread" : strcmp(mode, "Exclusive_Process") == 0 ? "E. Process" : mode;
}

static void print_second_line(nvmlDevice_t device)
{
    struct line line = template("|                                 /       |                        |                      |");
    struct smi_value value, total;
    char text[128];
    smi_read("fan.speed", device, &value);
    snprintf(text, sizeof text, value.status == NVML_SUCCESS ? "%.8s%%" : "%.8s", or_error(&value));
    put(&line, 1, 4, RIGHT, text);
    put_number(&line, 11, "temperature.gpu", "C", 0, device);
    put_number(&line, 17, "pstate", "", 1, device);
    put_watts(&line, 33, smi_function("nvmlDeviceGetPowerUsage"), device);
    put_watts(&line, 41, smi_function("nvmlDeviceGetEnforcedPowerLimit"), device);
    smi_read("memory.used", device, &value);
    smi_read("memory.total", device, &total);
    if (value.status == NVML_SUCCESS && total.status == NVML_SUCCESS)
        snprintf(text, sizeof text, " %6.20sMiB / %6.20sMiB", value.text, total.text);
    else
        snprintf(text, sizeof text, "%.9s / %.9s", or_error(&value), or_error(&total));
    put(&line, 44, 22, RIGHT, text);
    smi_read("utilization.gpu", device, &value);
    snprintf(text, sizeof text, value.status == NVML_SUCCESS ? "%.8s%%" : "%.9s", or_error(&value));
    put(&line, 68, 8, RIGHT, text);
    smi_read("compute_mode", device, &value);
    put(&line, 77, 12, RIGHT, short_mode(or_error(&value)));
    puts(line.text);
}

static void print_device(nvmlDevice_t device)
{
    print_first_line(device);
    print_second_line(device);
    struct line line = template("|                                         |                        |                      |");
    struct smi_value value;
    smi_read("mig.mode.current", device, &value);
    put(&line, 69, 20, RIGHT, or_error(&value));
    puts(line.text);
    puts("+-----------------------------------------+------------------------+----------------------+");
}

/* The end of a path says more than its beginning. */
static void put_name(struct line *line, const char *name)
{
    char text[64];
    size_t length = strlen(name);
    if (length > 32)
        snprintf(text, sizeof text, "...%s", name + length - 29);
    else
        snprintf(text, sizeof text, "%s", name);
    put(line, 43, 32, LEFT, text);
}

static unsigned print_processes(nvmlDevice_t device)
{
    struct nvml_process_v2 processes[SMI_PROCESSES];
    unsigned count;
    struct smi_value index, name;
    (void)smi_processes(device, processes, &count);
    smi_read("index", device, &index);
    for (unsigned i = 0; i < count; i++) {
        struct line line = template("|        N/A  N/A                      C                                                  |");
        char text[32];
        put(&line, 2, 4, RIGHT, or_error(&index));
        snprintf(text, sizeof text, "%u", processes[i].pid);
        put(&line, 22, 11, RIGHT, text);
        smi_process_name(processes[i].pid, &name);
        put_name(&line, name.text);
        snprintf(text, sizeof text, "%lluMiB", nearest_mebibytes(processes[i].used_memory));
        put(&line, 77, 12, RIGHT, text);
        puts(line.text);
    }
    return count;
}

int smi_print_table(const struct smi_options *options)
{
    print_head();
    for (unsigned i = 0; i < options->devices; i++) print_device(options->device[i]);
    puts("\n"
         "+-----------------------------------------------------------------------------------------+\n"
         "| Processes:                                                                              |\n"
         "|  GPU   GI   CI              PID   Type   Process name                        GPU Memory |\n"
         "|        ID   ID                                                               Usage      |\n"
         "|=========================================================================================|");
    unsigned count = 0;
    for (unsigned i = 0; i < options->devices; i++) count += print_processes(options->device[i]);
    if (count == 0) puts("|  No running processes found                                                             |");
    puts("+-----------------------------------------------------------------------------------------+");
    return SMI_OK;
}
