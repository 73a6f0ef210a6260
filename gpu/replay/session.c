/* SPDX-License-Identifier: Apache-2.0 */
/*
 * session.c - the life of a replay: made, mapped, warmed, assigned to a guest, run, ended. session.h says who calls what.
 */
#include "allocations.h"
#include "flight.h"
#include "internal.h"
#include "vm_limits.h"
#include "session.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif
#define LARGE_PAGE (2u << 20)
#define SMALLEST_RING (64u << 10)
#define LARGEST_RING (1u << 30)

/* A slot of a VM's BAR1 (docs/wire.md section 2). */
#define SLOT_ALIGNMENT (64u << 10)
#define SMALLEST_SLOT (1u << 20)
#define WHOLE_SLOT (16u << 20)    /* from here on the parts have their usual sizes */
#define SMALLEST_SLOT_RING (256u << 10) /* room for two records of the largest payload, whatever their place */
#define SMALL_SLOT_COUNT 64
#define SMALL_FENCE_COUNT 1024

static uint64_t aligned(uint64_t value, uint64_t alignment) { return (value + alignment - 1) / alignment * alignment; }

static uint64_t arena_offset(const struct vgpu_replay_options *options, uint64_t alignment)
{
    return aligned(VGPU_DEVICE_PAGE_SIZE + VGPU_SESSION_PAGE_SIZE + options->ring_size +
                       (uint64_t)options->slot_count * VGPU_SLOT_SIZE + (uint64_t)options->fence_count * sizeof(uint64_t),
                   alignment);
}

uint64_t vgpu_segment_size(const struct vgpu_replay_options *options)
{
    if (options->ring_size < SMALLEST_RING || options->ring_size > LARGEST_RING || (options->ring_size & (options->ring_size - 1)) != 0)
        return 0;
    if (options->slot_count == 0 || options->slot_count > 65535 || options->fence_count < 2 || options->fence_count > 1u << 20)
        return 0;
    if (options->arena_size == 0 || options->arena_size % LARGE_PAGE != 0 || options->arena_size > 1ull << 44 ||
        options->arena_registered % LARGE_PAGE != 0 || options->arena_registered > options->arena_size)
        return 0;
    return arena_offset(options, LARGE_PAGE) + options->arena_size;
}

uint64_t vgpu_slot_layout(uint64_t slot_size, struct vgpu_replay_options *options)
{
    if (slot_size < SMALLEST_SLOT || slot_size > 1ull << 44 || slot_size % SLOT_ALIGNMENT != 0)
        return 0;
    options->ring_size = VGPU_DEFAULT_RING_SIZE;
    options->slot_count = VGPU_DEFAULT_SLOT_COUNT;
    options->fence_count = VGPU_DEFAULT_FENCE_COUNT;
    if (slot_size < WHOLE_SLOT) {
        options->ring_size = SMALLEST_SLOT_RING;
        while (options->ring_size < slot_size / 8)
            options->ring_size *= 2;
        options->slot_count = SMALL_SLOT_COUNT;
        options->fence_count = SMALL_FENCE_COUNT;
    }
    uint64_t arena = arena_offset(options, SLOT_ALIGNMENT);
    options->arena_size = slot_size - arena;
    if (options->arena_registered > options->arena_size)
        options->arena_registered = options->arena_size;
    return arena;
}

struct vgpu_replay *vgpu_replay_new(void)
{
    struct vgpu_replay *replay = calloc(1, sizeof *replay);
    if (replay == NULL)
        return NULL;
    replay->driver = vgpu_driver_refusing;
    replay->lifeline = -1;
    replay->private = calloc(1, sizeof *replay->private);
    replay->pending = calloc(1, sizeof *replay->pending);
    if (replay->private != NULL) {
        replay->private->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        replay->private->kick_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        replay->private->context[0].primary = true;
    }
    if (replay->private == NULL || replay->pending == NULL || replay->private->event_fd < 0 || replay->private->kick_fd < 0 ||
        !replay_limits_open(replay) || !replay_handles_open(replay) || !replay_flight_open(replay, -1)) {
        vgpu_replay_free(replay);
        return NULL;
    }
    return replay;
}

void vgpu_replay_free(struct vgpu_replay *replay)
{
    if (replay == NULL)
        return;
    replay_code_close(replay);
    replay_allocations_close(replay);
    replay_handles_close(replay);
    if (replay->pending != NULL)
        free(replay->pending->entry);
    free(replay->pending);
    if (replay->private != NULL) {
        replay_callbacks_close(replay);
        replay_pulse_close(replay);
        replay_flight_close(replay);
        if (replay->private->event_fd >= 0)
            close(replay->private->event_fd);
        if (replay->private->kick_fd >= 0)
            close(replay->private->kick_fd);
        free(replay->private->dirty);
        free(replay->private->event);
        free(replay->private->event_context);
        replay_limits_close(replay);
        replay_process_memory_close(replay);
    }
    if (replay->segment != NULL)
        munmap(replay->segment, replay->segment_size);
    if (replay->private != NULL && replay->private->turn != NULL)
        munmap((void *)replay->private->turn, VGPU_TURN_FILE_SIZE);
    if (replay->private != NULL && replay->private->trace_map != NULL)
        munmap(replay->private->trace_map, VGPU_TRACE_FILE_SIZE);
    if (replay->grant != NULL)
        munmap(replay->grant, VGPU_GRANT_PAGE_SIZE);
    free(replay->private);
    free(replay);
}

struct vgpu_driver *vgpu_replay_driver(struct vgpu_replay *replay) { return &replay->driver; }

/* Maps the range at exactly that address (0: anywhere). NULL and errno if it cannot be had. */
static void *map_at(uint64_t address, uint64_t size, int descriptor, uint64_t offset)
{
    int flags = MAP_SHARED | MAP_NORESERVE | (address != 0 ? MAP_FIXED_NOREPLACE : 0);
    void *mapped = mmap((void *)(uintptr_t)address, size, PROT_READ | PROT_WRITE, flags, descriptor, (off_t)offset);
    if (mapped == MAP_FAILED)
        return NULL;
    if (address != 0 && (uint64_t)(uintptr_t)mapped != address) { /* a kernel that takes it for a hint */
        munmap(mapped, size);
        errno = EEXIST;
        return NULL;
    }
    return mapped;
}

/* The segment is there: remember where its parts are, and tell the guest. The magic number is left for last. */
static void lay_out(struct vgpu_replay *replay, void *segment, uint64_t size, const struct vgpu_replay_options *options, uint64_t arena)
{
    replay->segment = segment;
    replay->segment_size = size;
    replay->page = (struct vgpu_session_page *)(void *)(replay->segment + VGPU_DEVICE_PAGE_SIZE);
    replay->ring_offset = VGPU_DEVICE_PAGE_SIZE + VGPU_SESSION_PAGE_SIZE;
    replay->ring_size = options->ring_size;
    replay->slots_offset = replay->ring_offset + replay->ring_size;
    replay->slot_count = options->slot_count;
    replay->fences_offset = replay->slots_offset + (uint64_t)options->slot_count * VGPU_SLOT_SIZE;
    replay->fence_count = options->fence_count;
    replay->arena_offset = arena;
    replay->arena_size = options->arena_size;
    replay->arena_registered = options->arena_registered; /* wanted; replay_register says what became of it */

    struct vgpu_session_page *page = replay->page;
    page->layout_version = VGPU_LAYOUT_VERSION;
    page->segment_size = size;
    page->ring_offset = replay->ring_offset;
    page->ring_size = replay->ring_size;
    page->slots_offset = replay->slots_offset;
    page->slot_count = replay->slot_count;
    page->fence_count = replay->fence_count;
    page->fences_offset = replay->fences_offset;
    page->arena_offset = replay->arena_offset;
    page->arena_size = replay->arena_size;
    page->worker_address = (uint64_t)(uintptr_t)replay->segment;
    page->magic = VGPU_SEGMENT_MAGIC;
}

int vgpu_replay_map(struct vgpu_replay *replay, int segment_fd, int grant_fd, const struct vgpu_replay_options *options)
{
    uint64_t size = vgpu_segment_size(options);
    struct stat segment, grant;
    if (size == 0 || replay->segment != NULL)
        return EINVAL;
    if (fstat(segment_fd, &segment) != 0 || fstat(grant_fd, &grant) != 0)
        return errno;
    if ((uint64_t)segment.st_size < size || grant.st_size < (off_t)VGPU_GRANT_PAGE_SIZE)
        return EINVAL;
    void *mapped = map_at(options->address, size, segment_fd, 0);
    if (mapped == NULL)
        return errno;
    /* Fewer, longer pages where the system grants them to shared memory: the GPU translates fewer addresses. */
    (void)madvise(mapped, size, MADV_HUGEPAGE);
    void *grant_page = mmap(NULL, VGPU_GRANT_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, grant_fd, 0);
    if (grant_page == MAP_FAILED) {
        int error = errno;
        munmap(mapped, size);
        return error;
    }
    replay->grant = grant_page;
    (void)replay_flight_open(replay, grant_fd); /* without room in the file the private one stays */
    replay->grant->magic = VGPU_GRANT_MAGIC;
    replay->grant->worker_pid = (uint32_t)getpid();
    replay->private->spin_ns = options->spin_ns;
    lay_out(replay, mapped, size, options, arena_offset(options, LARGE_PAGE));
    return 0;
}

int vgpu_replay_rebase(struct vgpu_replay *replay, int bar1_fd, uint64_t offset, uint64_t size, uint64_t registered, const char **step)
{
    struct vgpu_replay_options options = {.arena_registered = aligned(registered, SLOT_ALIGNMENT)};
    uint64_t arena = vgpu_slot_layout(size, &options);
    struct stat bar1;
    *step = "the slot";
    if (replay->segment == NULL || arena == 0 || offset % SLOT_ALIGNMENT != 0)
        return -EINVAL;
    if (fstat(bar1_fd, &bar1) != 0)
        return -errno;
    if (bar1.st_size < 0 || offset > (uint64_t)bar1.st_size || size > (uint64_t)bar1.st_size - offset)
        return -EINVAL;
    struct vgpu_device_page *device = malloc(VGPU_DEVICE_PAGE_SIZE);
    if (device == NULL)
        return -ENOMEM;
    memcpy(device, replay->segment, VGPU_DEVICE_PAGE_SIZE);

    *step = "cuMemHostUnregister";
    CUresult status = replay_unregister_all(replay);
    if (status != CUDA_SUCCESS) {
        free(device);
        return (int)status;
    }
    *step = "mapping the slot";
    uint64_t address = (uint64_t)(uintptr_t)replay->segment;
    munmap(replay->segment, replay->segment_size);
    replay->segment = NULL;
    replay->page = NULL;
    void *mapped = map_at(address, size, bar1_fd, offset);
    if (mapped == NULL) {
        free(device);
        return -errno;
    }
    /* The slot is zero unless its guest writes where it must not yet; what it finds shall be ours all the same. */
    memset((uint8_t *)mapped + VGPU_DEVICE_PAGE_SIZE, 0, VGPU_SESSION_PAGE_SIZE);
    lay_out(replay, mapped, size, &options, arena);
    memset(replay->segment + replay->fences_offset, 0, (size_t)replay->fence_count * sizeof(uint64_t));
    memcpy(replay->segment, device, VGPU_DEVICE_PAGE_SIZE);
    free(device);
    replay->private->in_vm = true;

    *step = "cuMemHostRegister";
    status = replay_register(replay, 0, replay->arena_offset + replay->arena_registered);
    if (status != CUDA_SUCCESS)
        return (int)status;
    replay->page->arena_registered = replay->arena_registered;
    *step = "";
    return 0;
}

/* In what the driver takes device memory: it is asked for one byte. If it has room for that somewhere it takes nothing; and
 * others allocate at the same time. So only what can be true is believed. */
static void find_memory_unit(struct vgpu_replay *replay, uint32_t device_flags)
{
    const CUmemAllocationProp pinned_here = replay_pinned_here(replay);
    size_t unit = 0, before = 0, after = 0, total = 0;
    uint64_t address = 0;
    replay->memory_unit = 1;
    if ((device_flags & VGPU_DEVICE_SOFTWARE) != 0 || replay->driver.cuMemGetAllocationGranularity(&unit, &pinned_here, 0) != 0)
        return;
    if (unit > 1u << 30 || (unit & (unit - 1)) != 0 || replay->driver.cuMemGetInfo_v2(&before, &total) != 0 ||
        replay->driver.cuMemAlloc_v2(&address, 1) != 0)
        return;
    int status = replay->driver.cuMemGetInfo_v2(&after, &total);
    replay->driver.cuMemFree_v2(address);
    if (status == 0 && unit != 0 && (after >= before || before - after >= unit))
        replay->memory_unit = unit;
}

int vgpu_replay_warm(struct vgpu_replay *replay, int ordinal, uint32_t device_flags, const char *driver_version_text, const char **step)
{
    int status;
    *step = "cuInit";
    if ((status = replay->driver.cuInit(0)) != 0)
        return status;
    *step = "cuDeviceGet";
    if ((status = replay->driver.cuDeviceGet(&replay->device, ordinal)) != 0)
        return status;
    *step = "cuDevicePrimaryCtxRetain";
    if ((status = (int)replay_primary_open(replay)) != 0)
        return status;
    *step = "cuMemHostRegister";
    if ((status = (int)replay_register(replay, 0, replay->arena_offset + replay->arena_registered)) != 0)
        return status;
    replay->page->arena_registered = replay->arena_registered;
    *step = "cuStreamWriteValue64";
    replay->gpu_fences = replay_probe_gpu_fence(replay);
    replay_pulse_open(replay);
    *step = "reading the device's properties";
    find_memory_unit(replay, device_flags);
    if ((status = (int)replay_fill_device_page(replay, device_flags)) != 0)
        return status;
    struct vgpu_device_page *page = (struct vgpu_device_page *)(void *)replay->segment;
    strncpy(page->driver_version_text, driver_version_text, sizeof page->driver_version_text - 1);
    *step = "";
    return 0;
}

void vgpu_replay_assign(struct vgpu_replay *replay, int lifeline, uint64_t session_id, uint64_t memory_limit)
{
    replay->lifeline = lifeline;
    replay->page->session_id = session_id;
    replay->grant->session_id = session_id;
    replay_limits_assign(replay, memory_limit);
    /* SAFETY: release: a guest that sees READY sees the rest of the pages. */
    atomic_store_explicit(replay_word(&replay->page->state), VGPU_SESSION_READY, memory_order_release);
}

void vgpu_replay_kick(struct vgpu_replay *replay)
{
    uint64_t one = 1;
    (void)!write(replay->private->kick_fd, &one, sizeof one);
}

void vgpu_replay_stop(struct vgpu_replay *replay)
{
    atomic_store(&replay->private->stop, 1);
    vgpu_replay_kick(replay);
}

int vgpu_replay_event_fd(struct vgpu_replay *replay) { return replay->private->event_fd; }

uint64_t vgpu_replay_events(struct vgpu_replay *replay)
{
    uint64_t count;
    (void)!read(replay->private->event_fd, &count, sizeof count);
    return atomic_exchange(&replay->private->events, 0);
}

const char *vgpu_call_name(uint32_t call)
{
    return call < VGPU_CALL_COUNT && replay_entries[call].name != NULL ? replay_entries[call].name : "";
}

uint64_t vgpu_replay_address(struct vgpu_replay *replay) { return (uint64_t)(uintptr_t)replay->segment; }
uint64_t vgpu_replay_mapped(struct vgpu_replay *replay) { return replay->segment_size; }
uint32_t vgpu_replay_error(struct vgpu_replay *replay) { return replay->private->error; }
