/* SPDX-License-Identifier: Apache-2.0 */
/*
 * process_memory.c - what this process holds of the device's memory, as the driver's management library (NVML) tells it.
 *
 * cuMemGetInfo knows the whole device, where others allocate at the same time; NVML knows processes apart. It knows them by the
 * number that they have on the host, which in a container may be another's, and not every system tells it. So it is believed only
 * once it has been seen to follow an allocation of ours to the byte.
 *
 * The library is opened when it is first needed (some 20 ms), for most sessions never need it.
 */
#include "internal.h"
#include "session.h"

#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define NVML_INSUFFICIENT_SIZE 7
#define PROCESSES_AT_FIRST 64u
#define PROCESSES_AT_MOST 65536u /* more than this is no count */

/* nvmlProcessInfo_t of nvmlDeviceGetComputeRunningProcesses_v3 */
struct process {
    unsigned pid;
    unsigned long long used;
    unsigned gpu_instance, compute_instance;
};
_Static_assert(sizeof(struct process) == 24, "nvmlProcessInfo_t");

struct replay_nvml {
    char *path;
    bool has_tried;
    void *device; /* NULL: not to be asked */
    int (*processes)(void *device, unsigned *count, struct process *found);
    struct process *found;
    unsigned capacity;
};

int vgpu_replay_use_nvml(struct vgpu_replay *replay, const char *path)
{
    struct replay_nvml *nvml = calloc(1, sizeof *nvml);
    if (nvml == NULL || (nvml->path = strdup(path)) == NULL) {
        free(nvml);
        return ENOMEM;
    }
    replay_process_memory_close(replay);
    replay->private->nvml = nvml;
    return 0;
}

void replay_process_memory_close(struct vgpu_replay *replay)
{
    struct replay_nvml *nvml = replay->private->nvml;
    if (nvml == NULL) return;
    free(nvml->path);
    free(nvml->found);
    free(nvml);
    replay->private->nvml = NULL;
}

static bool ask(struct replay_nvml *nvml, uint64_t *bytes)
{
    const unsigned pid = (unsigned)getpid();
    for (int attempt = 0; attempt < 3; attempt++) { /* processes begin between two questions */
        unsigned count = nvml->capacity;
        const int status = nvml->processes(nvml->device, &count, nvml->found);
        if (status == 0) {
            for (unsigned i = 0; i < count && i < nvml->capacity; i++)
                if (nvml->found[i].pid == pid) {
                    *bytes = nvml->found[i].used;
                    return true;
                }
            return false;
        }
        if (status != NVML_INSUFFICIENT_SIZE || count >= PROCESSES_AT_MOST) return false;
        const unsigned capacity = count + PROCESSES_AT_FIRST;
        struct process *more = realloc(nvml->found, capacity * sizeof *more);
        if (more == NULL) return false;
        nvml->found = more;
        nvml->capacity = capacity;
    }
    return false;
}

/* NVML's name for the device; one that is a part of a card (MIG) has another, and is not found. */
static void *device_of(struct vgpu_replay *replay, void *library)
{
    int (*begin)(void), (*by_uuid)(const char *, void **);
    *(void **)&begin = dlsym(library, "nvmlInit_v2");
    *(void **)&by_uuid = dlsym(library, "nvmlDeviceGetHandleByUUID");
    unsigned char id[16];
    char name[48];
    void *device = NULL;
    if (begin == NULL || by_uuid == NULL || replay->driver.cuDeviceGetUuid_v2(id, replay->device) != 0 || begin() != 0) return NULL;
    int length = snprintf(name, sizeof name, "GPU-");
    for (int i = 0; i < 16; i++)
        length += snprintf(name + length, sizeof name - (size_t)length, i == 4 || i == 6 || i == 8 || i == 10 ? "-%02x" : "%02x", id[i]);
    return by_uuid(name, &device) == 0 ? device : NULL;
}

/* Whether the number follows what this process allocates. */
static bool follows(struct vgpu_replay *replay, struct replay_nvml *nvml)
{
    const CUmemAllocationProp pinned_here = replay_pinned_here(replay);
    uint64_t memory, before, with, after;
    if (!ask(nvml, &before) || replay->driver.cuMemCreate(&memory, replay->memory_unit, &pinned_here, 0) != 0) return false;
    const bool was_told = ask(nvml, &with);
    return replay->driver.cuMemRelease(memory) == 0 && was_told && ask(nvml, &after) && with == before + replay->memory_unit && after == before;
}

static void try(struct vgpu_replay *replay, struct replay_nvml *nvml)
{
    nvml->has_tried = true;
    void *library = dlopen(nvml->path, RTLD_NOW | RTLD_LOCAL); /* stays for the life of the process */
    if (library == NULL) return;
    *(void **)&nvml->processes = dlsym(library, "nvmlDeviceGetComputeRunningProcesses_v3");
    nvml->found = calloc(PROCESSES_AT_FIRST, sizeof *nvml->found);
    nvml->capacity = PROCESSES_AT_FIRST;
    if (nvml->processes == NULL || nvml->found == NULL || (nvml->device = device_of(replay, library)) == NULL) return;
    if (!follows(replay, nvml)) nvml->device = NULL;
}

bool replay_process_memory(struct vgpu_replay *replay, uint64_t *bytes)
{
    struct replay_nvml *nvml = replay->private->nvml;
    if (nvml == NULL) return false;
    if (!nvml->has_tried) try(replay, nvml);
    return nvml->device != NULL && ask(nvml, bytes);
}
