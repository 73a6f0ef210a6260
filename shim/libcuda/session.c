/* SPDX-License-Identifier: Apache-2.0 */
/*
 * session.c - which way to the host: over sockets, or through a PCI device; and what both ways lead to, the segment.
 *
 * Where VGPU_RUN_DIR is set, the mediator of that folder and nothing else. Otherwise the virtual GPU of this machine
 * (session_pci.c), which is there in a VM; otherwise the usual sockets (session_unix.c). Without any of them the process sees
 * what a machine without a GPU shows: CUDA_ERROR_NO_DEVICE, at once, and not a word of output.
 *
 * Must never: block a process that has no host.
 */
#include "session.h"

#include <errno.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define READY_LIMIT_NS 30000000000ull

struct shim_session shim = {.lifeline = -1};

CUresult shim_refusal_code(uint32_t status)
{
    return status == WELCOME_NO_DEVICE ? CUDA_ERROR_NO_DEVICE
           : status == WELCOME_REFUSED ? CUDA_ERROR_DEVICE_UNAVAILABLE
                                       : CUDA_ERROR_SYSTEM_DRIVER_MISMATCH;
}

const char *shim_refusal_words(uint32_t status)
{
    return status == WELCOME_NO_DEVICE ? "it has no device for this VM"
           : status == WELCOME_REFUSED ? "refused; its log says why"
                                       : "it is of another version than this library";
}

void shim_nap(uint64_t ns)
{
    struct timespec left = {.tv_sec = (time_t)(ns / 1000000000ull), .tv_nsec = (long)(ns % 1000000000ull)};
    while (nanosleep(&left, &left) != 0 && errno == EINTR) continue;
}

uint64_t shim_jittered(uint64_t ns)
{
    uint64_t random = (shim_now_ns() ^ (uint64_t)getpid() << 20) * 0x9e3779b97f4a7c15ull;
    return ns / 2 + (uint64_t)((unsigned __int128)ns * random >> 64);
}

static bool lies_within(uint64_t offset, uint64_t size, uint64_t whole) { return offset <= whole && size <= whole - offset; }

bool shim_adopt_segment(uint8_t *base, uint64_t size, uint64_t worker_address)
{
    const struct vgpu_device_page *device = (const void *)base;
    struct vgpu_session_page *page = (void *)(base + VGPU_DEVICE_PAGE_SIZE);
    if (device->magic != VGPU_SEGMENT_MAGIC || page->magic != VGPU_SEGMENT_MAGIC || device->layout_version != VGPU_LAYOUT_VERSION ||
        page->layout_version != VGPU_LAYOUT_VERSION || page->segment_size > size)
        return false;
    uint64_t ring = page->ring_size, whole = page->segment_size;
    /* A ring must hold two records of the largest payload, each with the gap it may need before it. */
    if (ring < 4 * VGPU_INLINE_LIMIT || (ring & (ring - 1)) != 0 || !lies_within(page->ring_offset, ring, whole) ||
        page->slot_count == 0 || !lies_within(page->slots_offset, (uint64_t)page->slot_count * VGPU_SLOT_SIZE, whole) ||
        page->fence_count < 2 || !lies_within(page->fences_offset, (uint64_t)page->fence_count * 8, whole) ||
        !lies_within(page->arena_offset, page->arena_size, whole))
        return false;
    shim.base = base;
    shim.device = device;
    shim.page = page;
    shim.told = page;
    shim.counters = (void *)&page->local_calls;
    shim.ring = base + page->ring_offset;
    shim.ring_mask = ring - 1;
    shim.slots = (void *)(base + page->slots_offset);
    shim.fences = (void *)(base + page->fences_offset);
    shim.arena = base + page->arena_offset;
    shim.arena_offset = page->arena_offset;
    shim.arena_size = page->arena_size;
    shim.worker_address = worker_address;
    shim.identical = worker_address == (uint64_t)(uintptr_t)base;
    return true;
}

bool shim_wait_until_ready(const struct vgpu_session_page *page)
{
    for (uint64_t began = shim_now_ns(); shim_now_ns() - began < READY_LIMIT_NS;) {
        uint32_t state = __atomic_load_n(&page->state, __ATOMIC_ACQUIRE);
        if (state != VGPU_SESSION_EMPTY) return state == VGPU_SESSION_READY;
        shim_nap(100000);
    }
    return false;
}

static bool sockets_only(void)
{
    const char *run_dir = secure_getenv("VGPU_RUN_DIR");
    return run_dir != NULL && run_dir[0] != '\0';
}

CUresult shim_session_attach(void)
{
    CUresult status = sockets_only() ? CUDA_ERROR_NO_DEVICE : shim_pci_attach();
    return status == CUDA_ERROR_NO_DEVICE ? shim_unix_attach() : status;
}

int shim_session_probe_version(void)
{
    int version = sockets_only() ? 0 : shim_pci_probe_version();
    return version != 0 ? version : shim_unix_probe_version();
}

void shim_session_fork_child(void)
{
    shim_unix_fork_child();
    shim_pci_fork_child();
}

void shim_session_started(void) { shim_pci_started(); }

void shim_session_release(void) { shim_pci_release(); }

void shim_session_detach(void)
{
    shim_unix_detach();
    shim_pci_detach();
    shim = (struct shim_session){.lifeline = -1};
}
