/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pci_map.c - a slot of BAR1 as this process's segment: which part is mapped how, and how it is given up.
 *
 * sysfs offers BAR1 twice: `resource1` maps it uncacheable (UC-), `resource1_wc` write-combining; there is no cacheable one.
 * What the processor makes of that is the host's affair. Under Intel's nested paging KVM has the guest's memory type ignored
 * unless a real device is assigned, and BAR1, which is memory of the host, is simply cached; likewise under emulation. Under
 * AMD's nested paging the guest's type counts. There, as both manuals have it:
 *   - Loads and stores of UC memory are done one by one, in the order of the program, nothing ahead of time. A store of 8
 *     bytes is a bus transaction, so a record of 100 bytes would be a dozen of them.
 *   - Stores to WC memory are gathered in buffers of a line and leave in any order. SFENCE, MFENCE, a locked instruction or an
 *     access to UC memory sends them off; only a fence promises it by the manual. A load may be done ahead of time, and is
 *     no faster than one of UC memory, except MOVNTDQA, which fetches a whole line. What a fetched line holds may be old
 *     unless an MFENCE stands before the load.
 *   - A locked instruction on either kind locks the whole bus.
 * Hence: the ring and the arena, into which bytes go in bulk, are mapped WC. The pages, the slots and the fences, which are
 * words that one side polls and few stores go to, are UC: polling then sees stores in the order they were made, and nothing
 * there needs a fence. `tail` is published between two SFENCEs (ring.c), a wait that has seen its fence word ends with an
 * MFENCE (fence.c), bytes are fetched from the arena by MOVNTDQA (shared_copy.c), nothing of a slot is changed by locked
 * instructions in the course of a call, counters are kept in ordinary memory, and device attributes come from a copy. The
 * session's state, which every call asks for, comes from a copy too where a look at the page would cost more than the call; an
 * error that nobody waits for is then seen within a heartbeat.
 *
 * The kernel gives each physical page one type: where two processes ask for different ones, the second gets the first's,
 * silently. So whoever maps BAR1 must agree: device page and directory UC, slots as here. For the same reason a mapping is
 * made and given up whole, never by halves: the kernel's accounts of types know no halves.
 *
 * Whether the type is heeded is measured once, by reading; fetching lines in an odd way pays only where it is.
 */
#include "pci.h"

#include <sys/mman.h>
#include <unistd.h>

#define HEAD (VGPU_DEVICE_PAGE_SIZE + VGPU_SESSION_PAGE_SIZE)
#define MEASURED_WORDS 256
#define MEASURED_TURNS 5
#define UNCACHED_RATIO 16 /* cached: about 1; uncached: hundreds */

static struct vgpu_device_page device_page; /* a copy, with this machine's PCI address in it */
static struct shim_counters counters;
static struct vgpu_session_page told; /* only what shim_look_at_page_now copies */
static uint8_t *segment;
static uint64_t segment_size;

/* A range of addresses for the whole slot, with nothing there yet; at the worker's address if that is free. */
static uint8_t *reserve(uint64_t wanted, uint64_t size)
{
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void *at = MAP_FAILED;
    if (wanted != 0 && wanted % PCI_PAGE == 0) {
        at = mmap((void *)(uintptr_t)wanted, size, PROT_NONE, flags | MAP_FIXED_NOREPLACE, -1, 0);
        if (at != MAP_FAILED && (uintptr_t)at != wanted) { /* a kernel that takes the flag for a hint */
            munmap(at, size);
            at = MAP_FAILED;
        }
    }
    if (at == MAP_FAILED) at = mmap(NULL, size, PROT_NONE, flags, -1, 0);
    return at == MAP_FAILED ? NULL : at;
}

/* [from, to) of the slot, over what was reserved. */
static bool place(uint32_t slot, uint64_t from, uint64_t to, int file)
{
    if (from == to) return true;
    void *at = mmap(segment + from, to - from, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, (off_t)(pci_slot_offset(slot) + from));
    if (at == MAP_FAILED) return false;
    (void)madvise(at, to - from, MADV_DONTFORK); /* a forked child must not write into its parent's session */
    return true;
}

static bool place_parts(uint32_t slot)
{
    uint64_t ring = (uint64_t)(shim.ring - segment), after_ring = ring + shim.ring_mask + 1;
    uint64_t arena = shim.arena_offset, end = arena + shim.arena_size;
    bool usual = ring == HEAD && after_ring <= arena && (arena | end) % PCI_PAGE == 0 && pci.combining_fd >= 0 &&
                 (uint8_t *)shim.slots >= segment + after_ring && (uint8_t *)shim.fences >= segment + after_ring;
    if (!usual) return place(slot, HEAD, pci.slot_size, pci.memory_fd);
    shim.combining = true;
    return place(slot, HEAD, after_ring, pci.combining_fd) && place(slot, after_ring, arena, pci.memory_fd) &&
           place(slot, arena, end, pci.combining_fd);
}

static uint64_t reading_takes_ns(const volatile uint64_t *words)
{
    uint64_t least = UINT64_MAX;
    for (unsigned turn = 0; turn < MEASURED_TURNS; turn++) {
        uint64_t began = shim_now_ns();
        for (unsigned i = 0; i < MEASURED_WORDS; i++) (void)words[i];
        uint64_t took = shim_now_ns() - began;
        if (took < least) least = took;
    }
    return least;
}

static bool measure_uncached(void)
{
#ifdef SHIM_ASSUME_UNCACHED /* tests, on machines where it is not */
    return true;
#endif
    static volatile uint64_t ordinary[MEASURED_WORDS];
    if (shim.arena_size < sizeof ordinary) return false;
    uint64_t here = reading_takes_ns(ordinary) + 1;
    return reading_takes_ns((void *)shim.arena) / here >= UNCACHED_RATIO;
}

void shim_look_at_page_now(void)
{
    const struct vgpu_session_page *page = shim.page;
    __atomic_store_n(&told.device_lost, __atomic_load_n(&page->device_lost, __ATOMIC_RELAXED), __ATOMIC_RELAXED);
    uint32_t state = __atomic_load_n(&page->state, __ATOMIC_ACQUIRE);
    __atomic_store_n(&told.sticky_error, __atomic_load_n(&page->sticky_error, __ATOMIC_RELAXED), __ATOMIC_RELAXED);
    __atomic_store_n(&told.state, state, __ATOMIC_RELEASE);
}

void pci_tell_lost(void) { __atomic_store_n(&told.device_lost, 1, __ATOMIC_RELEASE); }

static void set_attribute(unsigned number, unsigned value)
{
    device_page.attribute[number] = (int32_t)value;
    device_page.attribute_valid[number] = 1;
}

/* What a program asks the device about is answered from a copy. Its address is the one it has in this machine, so that it
 * agrees with lspci and with the device's folder in sysfs. */
static void copy_device_page(void)
{
    enum { PCI_BUS_ID = 33, PCI_DEVICE_ID = 34, PCI_DOMAIN_ID = 50 };
    memcpy(&device_page, segment, sizeof device_page);
    device_page.pci_domain = (int32_t)pci.domain;
    device_page.pci_bus = (int32_t)pci.bus;
    device_page.pci_device = (int32_t)pci.device;
    device_page.pci_function = (int32_t)pci.function;
    set_attribute(PCI_DOMAIN_ID, pci.domain);
    set_attribute(PCI_BUS_ID, pci.bus);
    set_attribute(PCI_DEVICE_ID, pci.device);
    shim.device = &device_page;
}

CUresult pci_map_slot(uint32_t slot, uint64_t worker_address)
{
    segment_size = pci.slot_size;
    segment = reserve(worker_address, segment_size);
    if (segment == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    if (!place(slot, 0, HEAD, pci.memory_fd)) {
        pci_unmap_slot();
        return CUDA_ERROR_DEVICE_UNAVAILABLE;
    }
    pci_watch_region(PCI_REGION_SLOT, segment, segment_size);
    CUresult status = CUDA_ERROR_DEVICE_UNAVAILABLE;
    if (shim_wait_until_ready((const void *)(segment + VGPU_DEVICE_PAGE_SIZE))) {
        bool sound = shim_adopt_segment(segment, segment_size, worker_address);
        if (!sound) shim_log(SHIM_ERROR, "what lies in slot %u is no segment of layout %u", slot, VGPU_LAYOUT_VERSION);
        status = !sound ? CUDA_ERROR_SYSTEM_DRIVER_MISMATCH : place_parts(slot) ? CUDA_SUCCESS : CUDA_ERROR_DEVICE_UNAVAILABLE;
    }
    if (status != CUDA_SUCCESS) {
        pci_unmap_slot();
        return shim_device_is_lost() ? CUDA_ERROR_DEVICE_UNAVAILABLE : status;
    }
    copy_device_page();
    memset(&counters, 0, sizeof counters);
    shim.counters = &counters;
    shim.uncached = shim.combining && measure_uncached();
    shim_look_at_page_now();
    if (shim.uncached) shim.told = &told;
    shim.page->guest_pid = (uint32_t)getpid();
    return CUDA_SUCCESS;
}

void pci_unmap_slot(void)
{
    pci_watch_region(PCI_REGION_SLOT, NULL, 0);
    if (segment != NULL) munmap(segment, segment_size);
    segment = NULL;
}

void pci_forget_slot(void) { segment = NULL; }

void pci_abandon_slot(void)
{
    pci_watch_region(PCI_REGION_SLOT, NULL, 0);
    if (segment == NULL) return;
    /* Threads of the program still run: what they do to their buffers now must neither fail nor reach the slot's next owner. */
    (void)mmap(segment, segment_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}
