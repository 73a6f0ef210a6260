/* SPDX-License-Identifier: Apache-2.0 */
/*
 * nvidia_smi.h - what the files of our nvidia-smi share.
 *
 * It is for guests that have no nvidia-smi of NVIDIA's, and prints what that prints (layout of driver 580), because scripts
 * read it. It asks libnvidia-ml.so.1 like any other program, by dlopen, and knows nothing of device pages.
 */
#ifndef VGPU_NVIDIA_SMI_H
#define VGPU_NVIDIA_SMI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>

#include "nvml_types.h"

/* To the nearest, as the original does: a card of 143155.9 MiB has 143156. */
static inline unsigned long long nearest_mebibytes(unsigned long long bytes) { return (bytes >> 20) + (bytes >> 19 & 1); }

/* Exit statuses of the original. */
enum { SMI_OK = 0, SMI_BAD_ARGUMENT = 2, SMI_NOT_FOUND = 6, SMI_NO_DRIVER = 9, SMI_NO_LIBRARY = 12, SMI_BAD_OPTION = 255 };

#define SMI_DEVICES 64
#define SMI_PROCESSES 512

struct smi_options {
    nvmlDevice_t device[SMI_DEVICES]; /* those asked for */
    unsigned devices;
    const char *display;     /* of -d, NULL: all */
    const char *query;       /* of --query-gpu or --query-compute-apps */
    bool header, units;
};

/* ---- the library (nvidia_smi_nvml.c) ---- */

/* SMI_OK, SMI_NO_LIBRARY, SMI_NO_DRIVER, or another status; what is wrong has been printed. */
int smi_open(void);
void smi_close(void);
/* A function of the library by name, as whatever pointer type the caller assigns it to; one that is absent answers
 * FUNCTION_NOT_FOUND to everything. */
void *smi_function(const char *name);
#define SMI_CALL(name, type, ...) (((nvmlReturn_t(*) type)smi_function(#name))(__VA_ARGS__))
const char *smi_error(nvmlReturn_t status);

/* ---- values (nvidia_smi_fields.c) ---- */

struct smi_value {
    nvmlReturn_t status; /* not SUCCESS: text holds "N/A" or the error's text, without brackets */
    char text[4200];
};

struct smi_field;
/* By its name or other name; NULL: there is none. `length` characters of `name` count. */
const struct smi_field *smi_find_field(const char *name, size_t length);
const char *smi_field_name(const struct smi_field *field); /* as a header shows it */
const char *smi_field_unit(const struct smi_field *field); /* "" for none */
bool smi_field_is_bare(const struct smi_field *field);     /* its errors stand without brackets */
void smi_read_field(const struct smi_field *field, nvmlDevice_t device, struct smi_value *value);
/* By name, for the other forms of output. */
void smi_read(const char *name, nvmlDevice_t device, struct smi_value *value);
void smi_timestamp(bool with_milliseconds, char *text, size_t size);

/* The compute processes, by pid; *count is their number. */
nvmlReturn_t smi_processes(nvmlDevice_t device, struct nvml_process_v2 *processes, unsigned *count);
/* What a process was started as; "[Not Found]" where it has gone. */
void smi_process_name(unsigned pid, struct smi_value *value);

/* ---- forms of output ---- */

int smi_print_table(const struct smi_options *options);        /* nvidia_smi_table.c */
int smi_print_list(const struct smi_options *options);         /* -L, nvidia_smi.c */
int smi_print_full(const struct smi_options *options);         /* -q, nvidia_smi_full.c */
bool smi_full_knows(const char *display);                      /* whether each name given to -d is one */
int smi_print_query(const struct smi_options *options);        /* nvidia_smi_csv.c */
int smi_print_process_query(const struct smi_options *options);
void smi_print_field_help(void);
void smi_print_process_field_help(void);

#endif
