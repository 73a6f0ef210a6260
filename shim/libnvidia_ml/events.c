/* SPDX-License-Identifier: Apache-2.0 */
/*
 * events.c - event sets. Critical errors (Xid) can be registered for, since monitoring programs take a GPU that cannot be
 * asked for them to be ill; none is ever delivered, because a fault on the card is the host's to see. What a waiter does
 * learn is that the GPU has been unplugged.
 *
 * A set is freed while nobody waits on it: that is the interface's own rule.
 */
#include "internal.h"

#include <pthread.h>
#include <stdlib.h>
#include <time.h>

#define LOOK_MILLISECONDS 250u /* how often a waiter looks whether the GPU is still there */

struct nvml_event_set {
    struct nvml_event_set *next;
    bool registered;
};

/* Sets that exist: a pointer that is none of them is refused, not followed. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct nvml_event_set *sets;

static struct nvml_event_set **find(const struct nvml_event_set *set)
{
    for (struct nvml_event_set **at = &sets; *at != NULL; at = &(*at)->next)
        if (*at == set) return at;
    return NULL;
}

EXPORT nvmlReturn_t nvmlEventSetCreate(nvmlEventSet_t *set)
{
    if (!nvml_is_initialized()) return NVML_ERROR_UNINITIALIZED;
    if (set == NULL) return NVML_ERROR_INVALID_ARGUMENT;
    struct nvml_event_set *made = calloc(1, sizeof *made);
    if (made == NULL) return NVML_ERROR_MEMORY;
    pthread_mutex_lock(&lock);
    made->next = sets;
    sets = made;
    pthread_mutex_unlock(&lock);
    *set = made;
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlEventSetFree(nvmlEventSet_t set)
{
    if (!nvml_is_initialized()) return NVML_ERROR_UNINITIALIZED;
    pthread_mutex_lock(&lock);
    struct nvml_event_set **at = find(set), *found = NULL;
    if (at != NULL) {
        found = *at;
        *at = found->next;
    }
    pthread_mutex_unlock(&lock);
    free(found);
    return at != NULL ? NVML_SUCCESS : NVML_ERROR_INVALID_ARGUMENT;
}

ANSWER_CONSTANT(nvmlDeviceGetSupportedEventTypes, unsigned long long, NVML_EVENT_XID)

EXPORT nvmlReturn_t nvmlDeviceRegisterEvents(nvmlDevice_t device, unsigned long long types, nvmlEventSet_t set)
{
    nvmlReturn_t status = nvml_check(device);
    if (status != NVML_SUCCESS) return status;
    if ((types & ~NVML_EVENT_XID) != 0) return NVML_ERROR_NOT_SUPPORTED;
    pthread_mutex_lock(&lock);
    struct nvml_event_set **at = find(set);
    if (at != NULL && types != 0) (*at)->registered = true;
    pthread_mutex_unlock(&lock);
    return at != NULL ? NVML_SUCCESS : NVML_ERROR_INVALID_ARGUMENT;
}

static nvmlReturn_t wait_for(nvmlEventSet_t set, const void *data, unsigned timeout_milliseconds)
{
    if (!nvml_is_initialized()) return NVML_ERROR_UNINITIALIZED;
    if (data == NULL) return NVML_ERROR_INVALID_ARGUMENT;
    pthread_mutex_lock(&lock);
    struct nvml_event_set **at = find(set);
    bool registered = at != NULL && (*at)->registered;
    pthread_mutex_unlock(&lock);
    if (at == NULL) return NVML_ERROR_INVALID_ARGUMENT;
    for (unsigned left = timeout_milliseconds;;) {
        struct vgpu_device_page page;
        nvmlReturn_t status = nvml_read_page(&page);
        if (status == NVML_ERROR_UNINITIALIZED || (registered && status == NVML_ERROR_GPU_IS_LOST)) return status;
        if (left == 0) return NVML_ERROR_TIMEOUT;
        unsigned step = left < LOOK_MILLISECONDS ? left : LOOK_MILLISECONDS;
        struct timespec pause = {.tv_sec = step / 1000, .tv_nsec = (long)(step % 1000) * 1000000};
        nanosleep(&pause, NULL);
        left -= step;
    }
}

EXPORT nvmlReturn_t nvmlEventSetWait_v2(nvmlEventSet_t set, struct nvml_event *event, unsigned timeout_milliseconds)
{
    return wait_for(set, event, timeout_milliseconds);
}
EXPORT nvmlReturn_t nvmlEventSetWait(nvmlEventSet_t set, struct nvml_event_v1 *event, unsigned timeout_milliseconds)
{
    return wait_for(set, event, timeout_milliseconds);
}
