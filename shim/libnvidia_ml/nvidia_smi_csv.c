/* SPDX-License-Identifier: Apache-2.0 */
/* nvidia_smi_csv.c - --query-gpu and --query-compute-apps: a header and a line for each GPU or process. */
#include "nvidia_smi.h"

#include <string.h>

#define FIELDS 512

static void print_separator(unsigned index)
{
    if (index > 0) fputs(", ", stdout);
}

static void print_head(unsigned index, const char *name, const char *unit)
{
    print_separator(index);
    fputs(name, stdout);
    if (unit[0] != '\0') printf(" [%s]", unit);
}

/* ---- --query-gpu ---- */

/* The fields asked for; -1: one of them is none, which has been said. */
static int parse_fields(const char *list, const struct smi_field **fields)
{
    int count = 0;
    for (const char *at = list; *at != '\0' && count < FIELDS;) {
        at += strspn(at, " ");
        size_t length = strcspn(at, ",");
        size_t kept = length;
        while (kept > 0 && at[kept - 1] == ' ') kept--;
        if (kept > 0 && (fields[count++] = smi_find_field(at, kept)) == NULL) {
            printf("Field \"%.*s\" is not a valid field to query.\n\n", (int)kept, at);
            return -1;
        }
        at += length + (at[length] == ',');
    }
    return count;
}

int smi_print_query(const struct smi_options *options)
{
    const struct smi_field *fields[FIELDS];
    int count = parse_fields(options->query, fields);
    if (count < 0) return SMI_BAD_ARGUMENT;
    if (options->header) {
        for (int i = 0; i < count; i++) print_head((unsigned)i, smi_field_name(fields[i]), smi_field_unit(fields[i]));
        putchar('\n');
    }
    for (unsigned d = 0; d < options->devices; d++) {
        for (int i = 0; i < count; i++) {
            struct smi_value value;
            smi_read_field(fields[i], options->device[d], &value);
            print_separator((unsigned)i);
            const char *unit = smi_field_unit(fields[i]);
            if (value.status != NVML_SUCCESS)
                printf(smi_field_is_bare(fields[i]) ? "%s" : "[%s]", value.text);
            else
                printf(options->units && unit[0] != '\0' ? "%s %s" : "%s", value.text, unit);
        }
        putchar('\n');
    }
    return SMI_OK;
}

/* ---- --query-compute-apps ---- */

enum process_field { AT_TIME, AT_GPU, AT_PID, AT_NAME, AT_MEMORY };
static const struct {
    const char *name, *other, *unit, *of_gpu;
    enum process_field kind;
} process_fields[] = {
    {"timestamp", NULL, "", NULL, AT_TIME},
    {"gpu_name", NULL, "", "name", AT_GPU},
    {"gpu_bus_id", NULL, "", "pci.bus_id", AT_GPU},
    {"gpu_serial", NULL, "", "serial", AT_GPU},
    {"gpu_uuid", NULL, "", "uuid", AT_GPU},
    {"pid", NULL, "", NULL, AT_PID},
    {"process_name", "name", "", NULL, AT_NAME},
    {"used_gpu_memory", "used_memory", "MiB", NULL, AT_MEMORY},
};
#define PROCESS_FIELDS (sizeof process_fields / sizeof process_fields[0])

static int parse_process_fields(const char *list, unsigned *fields)
{
    int count = 0;
    for (const char *at = list; *at != '\0' && count < FIELDS;) {
        at += strspn(at, " ");
        size_t length = strcspn(at, ","), kept = length;
        while (kept > 0 && at[kept - 1] == ' ') kept--;
        unsigned found = 0;
        for (; found < PROCESS_FIELDS; found++) {
            const char *names[] = {process_fields[found].name, process_fields[found].other};
            bool matches = false;
            for (unsigned n = 0; n < 2; n++) matches |= names[n] != NULL && strlen(names[n]) == kept && strncmp(names[n], at, kept) == 0;
            if (matches) break;
        }
        if (kept > 0 && found == PROCESS_FIELDS) {
            printf("Field \"%.*s\" is not a valid field to query.\n\n", (int)kept, at);
            return -1;
        }
        if (kept > 0) fields[count++] = found;
        at += length + (at[length] == ',');
    }
    return count;
}

static void print_process_field(unsigned field, const struct smi_options *options, nvmlDevice_t device, const struct nvml_process_v2 *process)
{
    struct smi_value value = {.status = NVML_SUCCESS};
    switch (process_fields[field].kind) {
    case AT_TIME: smi_timestamp(true, value.text, sizeof value.text); break;
    case AT_GPU:
        smi_read(process_fields[field].of_gpu, device, &value);
        if (value.status != NVML_SUCCESS) {
            printf("[%s]", value.text);
            return;
        }
        break;
    case AT_PID: snprintf(value.text, sizeof value.text, "%u", process->pid); break;
    case AT_NAME: smi_process_name(process->pid, &value); break;
    case AT_MEMORY: snprintf(value.text, sizeof value.text, "%llu%s", nearest_mebibytes(process->used_memory), options->units ? " MiB" : ""); break;
    }
    fputs(value.text, stdout);
}

int smi_print_process_query(const struct smi_options *options)
{
    unsigned fields[FIELDS];
    int count = parse_process_fields(options->query, fields);
    if (count < 0) return SMI_BAD_ARGUMENT;
    if (options->header) {
        for (int i = 0; i < count; i++) print_head((unsigned)i, process_fields[fields[i]].name, process_fields[fields[i]].unit);
        putchar('\n');
    }
    for (unsigned d = 0; d < options->devices; d++) {
        struct nvml_process_v2 processes[SMI_PROCESSES];
        unsigned running;
        if (smi_processes(options->device[d], processes, &running) != NVML_SUCCESS) continue;
        for (unsigned p = 0; p < running; p++) {
            for (int i = 0; i < count; i++) {
                print_separator((unsigned)i);
                print_process_field(fields[i], options, options->device[d], &processes[p]);
            }
            putchar('\n');
        }
    }
    return SMI_OK;
}

void smi_print_process_field_help(void)
{
    puts("List of valid properties to query for the switch \"--query-compute-apps\":\n");
    for (unsigned i = 0; i < PROCESS_FIELDS; i++) {
        printf("\"%s\"", process_fields[i].name);
        if (process_fields[i].other != NULL) printf(" or \"%s\"", process_fields[i].other);
        putchar('\n');
    }
}
