/* SPDX-License-Identifier: Apache-2.0 */
/*
 * page.c - the life of the library, and consistent copies of the device page.
 *
 * The page is shared memory that the host writes at any moment: it is copied once, the copy is made harmless (texts
 * ended, counts in range), and only the copy is looked at. Telemetry is guarded by a sequence number, odd while the host
 * writes. A host that dies while it writes leaves it odd: then the last good copy of this process is the answer until
 * the next mediator has written.
 *
 * A mediator's connection that has ended is noticed at the next question, and a new one is asked for at most once a
 * second. Until there is one, the old page says what was last known.
 *
 * One lock for everything: a question takes microseconds, and NVML promises that any thread may ask at any time.
 */
#include "guard.h"
#include "internal.h"

#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define WRITER_LIMIT_NS 20000000ull /* how long a writer is waited for */
#define RECONNECT_NS 1000000000ull

struct nvml_device nvml_the_device;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static _Atomic unsigned users;
static struct nvml_source source = {.connection = -1};
static bool lost;
static uint64_t next_connect_ns;
static uint32_t expected_processes; /* how many entries a copy takes along */
static struct vgpu_device_page last;
static bool last_is_valid;

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

/* ---- life ---- */

static void before_fork(void) { pthread_mutex_lock(&lock); }
static void after_fork_parent(void) { pthread_mutex_unlock(&lock); }

/* The child may go on asking, with a connection of its own: the parent's ending must not look like the child's. */
static void after_fork_child(void)
{
    pthread_mutex_init(&lock, NULL);
    nvml_guard_close();
    if (source.connection >= 0) close(source.connection);
    source.connection = -1;
    next_connect_ns = 0;
}

static void watch_forks(void) { pthread_atfork(before_fork, after_fork_parent, after_fork_child); }

bool nvml_is_initialized(void) { return users > 0; }

static nvmlReturn_t copy_page(struct vgpu_device_page *page);

/* Is this VM kept away from the GPU? Who has been let in before goes on to read. Under the lock. */
static bool is_quarantined(void)
{
    struct vgpu_device_page page;
    return copy_page(&page) == NVML_SUCCESS && page.device_state != VGPU_UNKNOWN && (page.device_state & VGPU_STATE_QUARANTINED) != 0;
}

nvmlReturn_t nvml_begin(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, watch_forks);
    pthread_mutex_lock(&lock);
    nvmlReturn_t status = NVML_SUCCESS;
    if (users == 0 || lost) {
        struct nvml_source found = {.connection = -1};
        status = nvml_attach(&found, true);
        if (status == NVML_SUCCESS) {
            nvml_detach(&source); /* of a device that was lost */
            source = found;
            lost = last_is_valid = false;
            if (users == 0 && is_quarantined()) {
                nvml_detach(&source);
                last_is_valid = false;
                status = NVML_ERROR_NO_PERMISSION;
            }
        }
    }
    if (status == NVML_SUCCESS) users++;
    pthread_mutex_unlock(&lock);
    return status;
}

nvmlReturn_t nvml_end(void)
{
    pthread_mutex_lock(&lock);
    nvmlReturn_t status = users > 0 ? NVML_SUCCESS : NVML_ERROR_UNINITIALIZED;
    if (users > 0 && --users == 0) {
        nvml_detach(&source);
        nvml_guard_close();
        lost = last_is_valid = false;
    }
    pthread_mutex_unlock(&lock);
    return status;
}

/* ---- is the other side still there? The lock is held. ---- */

static bool connection_ended(void)
{
    char byte;
    ssize_t count = recv(source.connection, &byte, 1, MSG_DONTWAIT | MSG_PEEK);
    return count == 0 || (count < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR);
}

static void renew(void)
{
    if (source.is_pci) {
        char path[PATH_MAX];
        if (!nvml_sysfs_path(&source.address, "vendor", path, sizeof path) || access(path, F_OK) != 0) lost = true;
        return;
    }
    if (source.connection >= 0 && connection_ended()) {
        close(source.connection);
        source.connection = -1;
    }
    if (source.connection >= 0 || now_ns() < next_connect_ns) return;
    struct nvml_source found = {.connection = -1};
    if (nvml_attach(&found, false) == NVML_SUCCESS) {
        nvml_detach(&source);
        source = found;
    }
    next_connect_ns = now_ns() + RECONNECT_NS;
}

/* ---- reading ---- */

static void make_printable(char *text, size_t size)
{
    size_t length = strnlen(text, size - 1);
    for (size_t i = 0; i < length; i++)
        if (text[i] < ' ' || text[i] > '~') text[i] = '?';
    memset(text + length, 0, size - length);
}

/* Programs ask for samples "newer than two seconds ago" by their own clock, which need not be the host's: a sample's time
 * is when this process first saw it. */
static void translate_time(struct vgpu_device_page *page)
{
    static uint64_t host_ns, seen_ns; /* under the lock */
    if (page->telemetry_ns == 0) return; /* none was taken yet */
    if (page->telemetry_ns != host_ns) {
        struct timespec now;
        clock_gettime(CLOCK_REALTIME, &now);
        host_ns = page->telemetry_ns;
        seen_ns = (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
    }
    page->telemetry_ns = seen_ns;
}

static void make_harmless(struct vgpu_device_page *page)
{
    translate_time(page);
    make_printable(page->name, sizeof page->name);
    make_printable(page->driver_version_text, sizeof page->driver_version_text);
    make_printable(page->vbios_version, sizeof page->vbios_version);
    make_printable(page->nvml_version, sizeof page->nvml_version);
    make_printable(page->serial, sizeof page->serial);
    make_printable(page->board_part_number, sizeof page->board_part_number);
    if (page->process_count == VGPU_UNKNOWN) page->process_count = 0;
    if (page->process_count > VGPU_PROCESSES) page->process_count = VGPU_PROCESSES;
    if (page->memory_used_bytes > page->total_memory_bytes) page->memory_used_bytes = page->total_memory_bytes;
    if (source.is_pci) {
        page->pci_domain = (int32_t)source.address.domain;
        page->pci_bus = (int32_t)source.address.bus;
        page->pci_device = (int32_t)source.address.device;
        page->pci_function = (int32_t)source.address.function;
    }
}

enum outcome { COPIED, WRITER_ACTIVE, MORE_PROCESSES, UNREADABLE };

/* One attempt. */
static enum outcome copy_once(struct vgpu_device_page *page)
{
    size_t used = offsetof(struct vgpu_device_page, process) + expected_processes * sizeof page->process[0];
    uint32_t before, after;
    uint8_t bytes[sizeof before + sizeof *page + sizeof after];
    uint8_t *base = (uint8_t *)(uintptr_t)source.mapping;
    struct iovec sequence = {base + offsetof(struct vgpu_device_page, telemetry_sequence), sizeof before};
    struct iovec parts[] = {sequence, {base, used}, sequence};
    if (!nvml_guarded_copy(bytes, parts, 3)) return UNREADABLE;
    memcpy(&before, bytes, sizeof before);
    memcpy(&after, bytes + sizeof before + used, sizeof after);
    if (before != after || before % 2 != 0) return WRITER_ACTIVE;
    memset(page, 0, sizeof *page);
    memcpy(page, bytes + sizeof before, used);
    if (page->magic != VGPU_SEGMENT_MAGIC || page->layout_version != VGPU_LAYOUT_VERSION) return UNREADABLE;
    make_harmless(page);
    if (page->process_count <= expected_processes) return COPIED;
    expected_processes = page->process_count;
    return MORE_PROCESSES;
}

static nvmlReturn_t copy_page(struct vgpu_device_page *page)
{
    uint64_t began = 0;
    for (unsigned attempt = 0;; attempt++) {
        enum outcome outcome = copy_once(page);
        if (outcome == COPIED) {
            last = *page;
            last_is_valid = true;
            return NVML_SUCCESS;
        }
        if (outcome == UNREADABLE) {
            if (source.is_pci) lost = true;
            return NVML_ERROR_GPU_IS_LOST;
        }
        if (attempt < 16) {
            sched_yield();
            continue;
        }
        if (began == 0) began = now_ns();
        if (now_ns() - began > WRITER_LIMIT_NS) break;
        struct timespec pause = {.tv_nsec = 50000};
        nanosleep(&pause, NULL);
    }
    if (!last_is_valid) return NVML_ERROR_TIMEOUT;
    *page = last;
    return NVML_SUCCESS;
}

nvmlReturn_t nvml_read_page(struct vgpu_device_page *page)
{
    if (users == 0) return NVML_ERROR_UNINITIALIZED; /* without waiting for somebody's nvmlInit */
    pthread_mutex_lock(&lock);
    nvmlReturn_t status = NVML_ERROR_UNINITIALIZED;
    if (users > 0) {
        if (!lost) renew();
        status = lost ? NVML_ERROR_GPU_IS_LOST : copy_page(page);
    }
    pthread_mutex_unlock(&lock);
    return status;
}

nvmlReturn_t nvml_check(nvmlDevice_t device)
{
    if (users == 0) return NVML_ERROR_UNINITIALIZED;
    return device == &nvml_the_device ? NVML_SUCCESS : NVML_ERROR_INVALID_ARGUMENT;
}

nvmlReturn_t nvml_read(nvmlDevice_t device, struct vgpu_device_page *page)
{
    nvmlReturn_t status = nvml_check(device);
    return status == NVML_SUCCESS ? nvml_read_page(page) : status;
}

nvmlReturn_t nvml_read_u32(nvmlDevice_t device, size_t offset, unsigned *value)
{
    nvmlReturn_t status = nvml_check(device);
    if (status != NVML_SUCCESS) return status;
    if (value == NULL) return NVML_ERROR_INVALID_ARGUMENT;
    struct vgpu_device_page page;
    status = nvml_read_page(&page);
    if (status != NVML_SUCCESS) return status;
    uint32_t found;
    memcpy(&found, (const uint8_t *)&page + offset, sizeof found);
    if (found == VGPU_UNKNOWN) return NVML_ERROR_NOT_SUPPORTED;
    *value = found;
    return NVML_SUCCESS;
}

nvmlReturn_t nvml_give_text(const char *text, char *buffer, unsigned length)
{
    if (buffer == NULL) return NVML_ERROR_INVALID_ARGUMENT;
    size_t size = strlen(text) + 1;
    if (size == 1) return NVML_ERROR_NOT_SUPPORTED;
    if (size > length) return NVML_ERROR_INSUFFICIENT_SIZE;
    memcpy(buffer, text, size);
    return NVML_SUCCESS;
}

nvmlReturn_t nvml_refuse(nvmlReturn_t code) { return users == 0 ? NVML_ERROR_UNINITIALIZED : code; }

nvmlReturn_t nvml_refuse_device(nvmlDevice_t device, nvmlReturn_t code)
{
    nvmlReturn_t status = nvml_check(device);
    return status == NVML_SUCCESS ? code : status;
}
