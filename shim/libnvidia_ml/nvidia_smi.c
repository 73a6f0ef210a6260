/* SPDX-License-Identifier: Apache-2.0 */
/*
 * nvidia_smi.c - the command: options, which GPUs, repeating, exit statuses. Words and numbers are the original's where a
 * script could depend on them.
 *
 * It changes nothing on any GPU: options that would are refused with the status of a lacking permission.
 */
#include "nvidia_smi.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum action { TABLE, LIST, FULL, QUERY, PROCESS_QUERY };

struct command {
    enum action action;
    const char *ids; /* of -i, NULL: all */
    const char *file;
    unsigned long period_milliseconds; /* 0: once */
    bool has_format;
    struct smi_options options;
};

static int usage_error(const char *option, const char *what)
{
    printf("ERROR: Option %s %s. Please run 'nvidia-smi -h'%s\n\n", option, what, strcmp(what, "is not recognized") == 0 ? "." : " for help.");
    return SMI_BAD_OPTION;
}

static void print_help(void)
{
    puts("nvidia-smi [OPTION1 [ARG1]] [OPTION2 [ARG2]] ...\n"
         "\n"
         "    -h,   --help                Print usage information and exit.\n"
         "          --version             Print version information and exit.\n"
         "\n"
         "    <no arguments>              Show a summary of GPUs.\n"
         "    -L,   --list-gpus           Display a list of GPUs.\n"
         "    -q,   --query               Display GPU info.\n"
         "    -d,   --display=            With -q: only selected information, separated by commas: MEMORY,\n"
         "                                UTILIZATION, ECC, TEMPERATURE, POWER, CLOCK, COMPUTE, PIDS, PERFORMANCE,\n"
         "                                PAGE_RETIREMENT, ACCOUNTING, ENCODER_STATS, FBC_STATS, ROW_REMAPPER,\n"
         "                                GSP_FIRMWARE_VERSION.\n"
         "          --query-gpu=          Information about GPU. Call --help-query-gpu for more info.\n"
         "          --query-compute-apps= List of active compute processes. Call --help-query-compute-apps for more info.\n"
         "          --format=             With a selective query: csv[,noheader][,nounits].\n"
         "\n"
         "    -i,   --id=                 Target a specific GPU: index, UUID, serial or bus id; several separated by commas.\n"
         "    -f,   --filename=           Write to a file instead of stdout.\n"
         "    -l,   --loop=               Repeat until Ctrl+C, every so many seconds (5 if none are given).\n"
         "    -lms, --loop-ms=            Repeat until Ctrl+C, every so many milliseconds.");
}

static void print_version(void)
{
    char driver[80] = "N/A", library[80] = "N/A", interface[80];
    int cuda = 0;
    (void)SMI_CALL(nvmlSystemGetDriverVersion, (char *, unsigned), driver, sizeof driver);
    (void)SMI_CALL(nvmlSystemGetNVMLVersion, (char *, unsigned), library, sizeof library);
    (void)SMI_CALL(nvmlSystemGetCudaDriverVersion_v2, (int *), &cuda);
    /* "13.580.159.04" is interface 13 of driver 580.159.04; the original writes "580.159" here. */
    const char *from = strchr(library, '.') != NULL ? strchr(library, '.') + 1 : library;
    snprintf(interface, sizeof interface, "%s", from);
    char *dot = strchr(interface, '.');
    if (dot != NULL && (dot = strchr(dot + 1, '.')) != NULL) *dot = '\0';
    printf("NVIDIA-SMI version  : %s\nNVML version        : %s\nDRIVER version      : %s\nCUDA Version        : %d.%d\n", driver, interface, driver, cuda / 1000,
           cuda % 1000 / 10);
}

int smi_print_list(const struct smi_options *options)
{
    for (unsigned i = 0; i < options->devices; i++) {
        struct smi_value index, name, uuid;
        smi_read("index", options->device[i], &index);
        smi_read("name", options->device[i], &name);
        smi_read("uuid", options->device[i], &uuid);
        printf("GPU %s: %s (UUID: %s)\n", index.text, name.text, uuid.text);
    }
    return SMI_OK;
}

/* ---- which GPUs ---- */

static nvmlReturn_t find_device(const char *id, nvmlDevice_t *device)
{
    char *end;
    errno = 0;
    unsigned long index = strtoul(id, &end, 10);
    if (*id >= '0' && *id <= '9' && *end == '\0' && errno == 0 && index < SMI_DEVICES)
        return SMI_CALL(nvmlDeviceGetHandleByIndex_v2, (unsigned, nvmlDevice_t *), (unsigned)index, device);
    if (strchr(id, ':') != NULL) return SMI_CALL(nvmlDeviceGetHandleByPciBusId_v2, (const char *, nvmlDevice_t *), id, device);
    if (strncasecmp(id, "GPU-", 4) == 0) return SMI_CALL(nvmlDeviceGetHandleByUUID, (const char *, nvmlDevice_t *), id, device);
    return SMI_CALL(nvmlDeviceGetHandleBySerial, (const char *, nvmlDevice_t *), id, device);
}

static int add_device(struct smi_options *options, nvmlDevice_t device)
{
    for (unsigned i = 0; i < options->devices; i++)
        if (options->device[i] == device) return SMI_OK;
    if (options->devices < SMI_DEVICES) options->device[options->devices++] = device;
    return SMI_OK;
}

static int find_devices(struct command *command)
{
    struct smi_options *options = &command->options;
    unsigned count = 0;
    nvmlDevice_t device;
    nvmlReturn_t status = SMI_CALL(nvmlDeviceGetCount_v2, (unsigned *), &count);
    for (unsigned i = 0; status == NVML_SUCCESS && command->ids == NULL && i < count; i++) {
        status = SMI_CALL(nvmlDeviceGetHandleByIndex_v2, (unsigned, nvmlDevice_t *), i, &device);
        if (status == NVML_SUCCESS) (void)add_device(options, device);
    }
    if (status != NVML_SUCCESS) {
        printf("Unable to determine the device handle for GPU %u: %s\n", options->devices, smi_error(status));
        return (int)status;
    }
    char list[4096];
    snprintf(list, sizeof list, "%s", command->ids != NULL ? command->ids : "");
    for (char *rest = list, *id; (id = strsep(&rest, ",")) != NULL;)
        if (*id != '\0' && find_device(id, &device) == NVML_SUCCESS) (void)add_device(options, device);
    if (options->devices == 0) {
        puts("No devices were found");
        return SMI_NOT_FOUND;
    }
    return SMI_OK;
}

/* ---- options ---- */

struct option {
    const char *brief, *full;
    enum { NO_VALUE, VALUE, MAYBE_VALUE } takes;
    char kind;
};
static const struct option known[] = {
    {"-L", "--list-gpus", NO_VALUE, 'L'}, {"-q", "--query", NO_VALUE, 'q'}, {"-d", "--display", VALUE, 'd'}, {"-i", "--id", VALUE, 'i'},
    {"-f", "--filename", VALUE, 'f'}, {"-l", "--loop", MAYBE_VALUE, 'l'}, {"-lms", "--loop-ms", VALUE, 'm'}, {NULL, "--query-gpu", VALUE, 'g'},
    {NULL, "--query-compute-apps", VALUE, 'a'}, {NULL, "--format", VALUE, 'F'}, {"-h", "--help", NO_VALUE, 'h'}, {NULL, "--version", NO_VALUE, 'v'},
    {NULL, "--help-query-gpu", NO_VALUE, 'G'}, {NULL, "--help-query-compute-apps", NO_VALUE, 'A'},
    /* These change the GPU. */
    {"-pm", "--persistence-mode", VALUE, '!'}, {"-e", "--ecc-config", VALUE, '!'}, {"-p", "--reset-ecc-errors", VALUE, '!'}, {"-c", "--compute-mode", VALUE, '!'},
    {"-r", "--gpu-reset", NO_VALUE, '!'}, {"-lgc", "--lock-gpu-clocks", VALUE, '!'}, {"-rgc", "--reset-gpu-clocks", NO_VALUE, '!'},
    {"-lmc", "--lock-memory-clocks", VALUE, '!'}, {"-rmc", "--reset-memory-clocks", NO_VALUE, '!'}, {"-ac", "--applications-clocks", VALUE, '!'},
    {"-rac", "--reset-applications-clocks", NO_VALUE, '!'}, {"-pl", "--power-limit", VALUE, '!'}, {"-am", "--accounting-mode", VALUE, '!'}, {"-mig", "--multi-instance-gpu", VALUE, '!'},
};

static bool parse_format(const char *text, struct command *command)
{
    char list[256];
    command->has_format = true;
    snprintf(list, sizeof list, "%s", text);
    for (char *rest = list, *word; (word = strsep(&rest, ",")) != NULL;) {
        word += strspn(word, " ");
        word[strcspn(word, " ")] = '\0';
        if (strcmp(word, "noheader") == 0)
            command->options.header = false;
        else if (strcmp(word, "nounits") == 0)
            command->options.units = false;
        else if (strcmp(word, "csv") != 0)
            return false;
    }
    return true;
}

static bool parse_period(const char *text, unsigned long unit, unsigned long *milliseconds)
{
    char *end;
    errno = 0;
    unsigned long value = strtoul(text, &end, 10);
    if (errno != 0 || end == text || *end != '\0' || text[0] == '-' || value == 0 || value > ULONG_MAX / 1000000) return false;
    *milliseconds = value * unit;
    return true;
}

/* -1: go on; otherwise the status to exit with, everything said. */
static int take_option(const struct option *option, const char *value, struct command *command)
{
    switch (option->kind) {
    case 'L': command->action = LIST; break;
    case 'q': command->action = FULL; break;
    case 'd': command->options.display = value; break;
    case 'i': command->ids = value; break;
    case 'f': command->file = value; break;
    case 'g': command->action = QUERY; command->options.query = value; break;
    case 'a': command->action = PROCESS_QUERY; command->options.query = value; break;
    case 'l':
    case 'm':
        if (value == NULL)
            command->period_milliseconds = 5000;
        else if (!parse_period(value, option->kind == 'l' ? 1000 : 1, &command->period_milliseconds)) {
            puts("Provided [-l(ms) | --loop(-ms)=] value is incorrect. Loop frequency must be greater than 0.\n");
            return SMI_BAD_ARGUMENT;
        }
        break;
    case 'F':
        if (!parse_format(value, command)) {
            puts("Format modifier is not recognized.");
            return SMI_BAD_ARGUMENT;
        }
        break;
    case 'h': print_help(); return SMI_OK;
    case 'v': print_version(); return SMI_OK;
    case 'G': smi_print_field_help(); return SMI_OK;
    case 'A': smi_print_process_field_help(); return SMI_OK;
    default: puts("The current user does not have permission to change the settings of this GPU: it is shared.\nTerminating early due to previous errors."); return NVML_ERROR_NO_PERMISSION;
    }
    return -1;
}

static int parse(int count, char **words, struct command *command)
{
    for (int i = 1; i < count; i++) {
        const char *word = words[i], *value = strchr(word, '=');
        size_t length = strcspn(word, "=");
        const struct option *option = NULL;
        for (size_t k = 0; k < sizeof known / sizeof known[0] && option == NULL; k++)
            for (unsigned n = 0; n < 2; n++) {
                const char *name = n == 0 ? known[k].brief : known[k].full;
                if (name != NULL && strlen(name) == length && strncmp(name, word, length) == 0) option = &known[k];
            }
        if (option == NULL) return usage_error(word, "is not recognized");
        char name[64];
        snprintf(name, sizeof name, "%.*s", (int)(length < 60 ? length : 60), word);
        if (value != NULL)
            value++;
        else if (option->takes != NO_VALUE && i + 1 < count && words[i + 1][0] != '-')
            value = words[++i];
        if (value == NULL && option->takes == VALUE) return usage_error(name, "is missing its value");
        int status = take_option(option, value, command);
        if (status >= 0) return status;
    }
    if (command->options.display != NULL && command->action != FULL) {
        puts("Invalid combination of input arguments. Specify -q/--query and -d/--display to run a filtered query.  Please run 'nvidia-smi -h' for help.\n");
        return SMI_BAD_ARGUMENT;
    }
    if (command->options.display != NULL && !smi_full_knows(command->options.display)) {
        puts("Failed to parse --display/-d flags");
        return SMI_BAD_ARGUMENT;
    }
    return -1;
}

/* ---- doing it ---- */

static int print_once(const struct command *command)
{
    switch (command->action) {
    case LIST: return smi_print_list(&command->options);
    case FULL: return smi_print_full(&command->options);
    case QUERY: return smi_print_query(&command->options);
    case PROCESS_QUERY: return smi_print_process_query(&command->options);
    default: return smi_print_table(&command->options);
    }
}

static int run(struct command *command)
{
    if (command->file != NULL && freopen(command->file, "w", stdout) == NULL) {
        fprintf(stderr, "Failed to open %s: %s\n", command->file, strerror(errno));
        return SMI_BAD_ARGUMENT;
    }
    int status = find_devices(command);
    struct timespec next;
    clock_gettime(CLOCK_MONOTONIC, &next);
    while (status == SMI_OK) {
        status = print_once(command);
        if (fflush(stdout) != 0) return SMI_BAD_OPTION; /* nobody reads any more */
        if (command->period_milliseconds == 0) break;
        command->options.header = false; /* once is enough */
        next.tv_sec += (time_t)(command->period_milliseconds / 1000);
        next.tv_nsec += (long)(command->period_milliseconds % 1000) * 1000000;
        if (next.tv_nsec >= 1000000000) {
            next.tv_nsec -= 1000000000;
            next.tv_sec++;
        }
        while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &next, NULL) == EINTR) continue;
    }
    return status;
}

int main(int count, char **words)
{
    static struct command command = {.options = {.header = true, .units = true}};
    setvbuf(stdout, NULL, _IOFBF, 1 << 16); /* one write for a whole table */
    if (count > 1 && (strcmp(words[1], "-h") == 0 || strcmp(words[1], "--help") == 0)) {
        print_help(); /* also where there is no driver */
        return SMI_OK;
    }
    int status = smi_open();
    if (status != SMI_OK) return status;
    status = parse(count, words, &command);
    if (status < 0) status = run(&command);
    smi_close();
    return status;
}
