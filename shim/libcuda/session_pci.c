/* SPDX-License-Identifier: Apache-2.0 */
/*
 * session_pci.c - claiming a slot of the virtual GPU, and giving it back. docs/registers.md, docs/wire.md section 2.
 *
 * There is nobody in the guest to arbitrate, and no interrupt. A process takes the lock of a free slot, stores a token of its
 * own into the slot's OWNER register (the only free slot takes it), and watches in memory what becomes of it. Leaving the VM
 * is dear: a session does it three times (MAGIC, OWNER, RELEASE), and to ring for a worker that sleeps.
 *
 * Waiting: for a slot as long as others live that hold them all; for a host that is not there 60 seconds; for a host that is
 * there as long as it takes. A host may also answer BUSY, which means the same as over sockets.
 *
 * The lock lives as long as the process: a process that is killed, or leaves by _exit, is found out by it.
 *
 * Must never: hold a claim it has given up; write to a slot after releasing it.
 */
#include "pci.h"

#include <errno.h>
#include <sys/random.h>
#include <unistd.h>

#define SPINS 2000                    /* about 100 us: a host that has a warm worker may answer that fast */
#define FIRST_NAP_NS 20000ull
#define LONGEST_NAP_NS 10000000ull
#define TAKEN_LIMIT_NS 2000000000ull  /* for the host to take notice of a claim at all */
#ifndef HOST_LIMIT_NS                 /* tests are less patient */
#define HOST_LIMIT_NS 60000000000ull  /* for a host that is not there to come back */
#endif
#define HOPEFUL_RETRY_NS 80000000ull  /* a slot is about to be free */
#define DEATHS_MOST 3                 /* workers that died before they were ready */

static int held = -1; /* the slot whose lock this process has */
static uint32_t token;

enum outcome { CLAIM_WON, CLAIM_LOST, CLAIM_BUSY, CLAIM_DIED, CLAIM_REFUSED, CLAIM_NO_HOST };

static uint32_t new_token(void)
{
    uint32_t value = 0;
    if (getrandom(&value, sizeof value, GRND_NONBLOCK) != sizeof value)
        value = (uint32_t)(shim_now_ns() * 0x9e3779b97f4a7c15ull >> 32) ^ (uint32_t)getpid();
    return value != 0 && value != PCI_GONE ? value : 1;
}

static bool host_is_present(void)
{
    return (__atomic_load_n(&pci.directory->status, __ATOMIC_RELAXED) & PCI_STATUS_HOST_PRESENT) != 0;
}

static void let_go(bool release)
{
    if (held < 0) return;
    if (release && !shim_device_is_lost()) pci_store32(pci_slot_page((uint32_t)held) + PCI_SLOT_RELEASE, token);
    pci_unlock((uint32_t)held); /* after the release: nobody else need do it */
    held = -1;
}

/* Watches a claim until it is decided. The device's process stores the token at once; the state follows. */
static enum outcome wait_for_answer(void)
{
    const struct vgpu_directory_slot *entry = pci_entry((uint32_t)held);
    uint64_t began = shim_now_ns(), absent_since = 0, nap_ns = FIRST_NAP_NS;
    bool taken = false;
    for (unsigned turn = 0;; turn++) {
        uint32_t state = pci_state((uint32_t)held), owner = __atomic_load_n(&entry->token, __ATOMIC_RELAXED);
        if (owner == token) {
            taken = true;
            if (state == PCI_READY) return CLAIM_WON;
            if (state == PCI_DEAD) return CLAIM_DIED;
            if (state == PCI_REFUSED)
                return __atomic_load_n(&entry->refusal, __ATOMIC_RELAXED) == WELCOME_BUSY ? CLAIM_BUSY : CLAIM_REFUSED;
        } else if (taken || owner != 0) {
            return CLAIM_LOST; /* somebody was faster, or took us for dead */
        }
        if (turn < SPINS && shim_many_processors) {
            __builtin_ia32_pause();
            continue;
        }
        uint64_t now = shim_now_ns();
        if (!pci_look() || (!taken && now - began > TAKEN_LIMIT_NS)) return CLAIM_NO_HOST;
        if (host_is_present())
            absent_since = 0;
        else if (absent_since == 0)
            absent_since = now;
        else if (now - absent_since > HOST_LIMIT_NS)
            return CLAIM_NO_HOST;
        shim_nap(nap_ns);
        nap_ns = nap_ns * 5 / 4 < LONGEST_NAP_NS ? nap_ns * 5 / 4 : LONGEST_NAP_NS;
    }
}

/* The slot is free and its lock is ours. */
static enum outcome claim(uint32_t slot)
{
    struct vgpu_directory_slot *entry = pci_entry(slot);
    char program[sizeof entry->guest_program] = {0};
    held = (int)slot;
    token = new_token();
    memcpy(program, program_invocation_short_name, strnlen(program_invocation_short_name, VGPU_PROGRAM_NAME - 1));
    memcpy(program + VGPU_PROGRAM_NAME, &pci.sysfs, sizeof pci.sysfs);
    memcpy(entry->guest_program, program, sizeof program);
    pci_store64(pci_slot_page(slot) + PCI_SLOT_OWNER, token | (uint64_t)(uint32_t)getpid() << 32);
    return wait_for_answer();
}

/* One lap over the free slots. CLAIM_LOST: none of them is ours. */
static enum outcome claim_any(void)
{
    for (uint32_t slot = 0; slot < pci.slot_count; slot++) {
        if (pci_state(slot) != PCI_FREE || !pci_lock(slot)) continue;
        if (pci_state(slot) != PCI_FREE) {
            pci_unlock(slot);
            continue;
        }
        enum outcome outcome = claim(slot);
        if (outcome != CLAIM_LOST) return outcome;
        let_go(false);
    }
    return CLAIM_LOST;
}

static uint64_t larger(uint64_t a, uint64_t b) { return a > b ? a : b; }

/* Until this process has a slot that is READY, or it is clear that it will not get one. */
static CUresult get_slot(void)
{
    static struct pci_sweep sweep;
    uint64_t retry_ns = FIRST_RETRY_NS, alone_since = 0;
    unsigned deaths = 0, hopeful;
    memset(&sweep, 0, sizeof sweep);
    (void)pci_sweep(&sweep, -1, &hopeful); /* the dead hold memory of the GPU that this process may want */
    for (;;) {
        uint64_t hint_ns = 0;
        if (!pci_is_still_there()) {
            shim_log(SHIM_ERROR, "the virtual GPU that this process waited for has been taken out");
            return CUDA_ERROR_DEVICE_UNAVAILABLE;
        }
        enum outcome outcome = claim_any();
        uint32_t refusal = held >= 0 ? __atomic_load_n(&pci_entry((uint32_t)held)->refusal, __ATOMIC_RELAXED) : 0;
        if (outcome == CLAIM_WON) return CUDA_SUCCESS;
        if (outcome == CLAIM_BUSY) hint_ns = __atomic_load_n(&pci_entry((uint32_t)held)->retry_milliseconds, __ATOMIC_RELAXED) * 1000000ull;
        let_go(true);
        if (outcome == CLAIM_REFUSED) {
            shim_log(SHIM_ERROR, "the host answered %u: %s", refusal, shim_refusal_words(refusal));
            return shim_refusal_code(refusal);
        }
        if (outcome == CLAIM_BUSY) shim_log(SHIM_DEBUG, "the host is busy; it is asked again");
        if (outcome == CLAIM_NO_HOST || !pci_look()) {
            shim_log(SHIM_ERROR, "no host behind the virtual GPU");
            return CUDA_ERROR_DEVICE_UNAVAILABLE;
        }
        if (outcome == CLAIM_DIED && ++deaths == DEATHS_MOST) {
            shim_log(SHIM_ERROR, "%d workers of the host died at once", DEATHS_MOST);
            return CUDA_ERROR_DEVICE_UNAVAILABLE;
        }
        hopeful = 0;
        bool others = outcome != CLAIM_LOST || pci_sweep(&sweep, -1, &hopeful);
        if (hopeful != 0 && retry_ns > HOPEFUL_RETRY_NS) retry_ns = HOPEFUL_RETRY_NS;
        if (others) {
            alone_since = 0;
            if (outcome == CLAIM_LOST) shim_log(SHIM_DEBUG, "no slot is free; this process waits for one");
        } else if (alone_since == 0) {
            alone_since = shim_now_ns();
        } else if (shim_now_ns() - alone_since > HOST_LIMIT_NS) {
            shim_log(SHIM_ERROR, "every slot belongs to the dead, and the host does not free them");
            return CUDA_ERROR_DEVICE_UNAVAILABLE;
        }
        if (hint_ns > LONGEST_RETRY_NS) hint_ns = LONGEST_RETRY_NS;
        shim_nap(shim_jittered(larger(retry_ns, hint_ns)));
        retry_ns = retry_ns * 2 < LONGEST_RETRY_NS ? retry_ns * 2 : LONGEST_RETRY_NS;
    }
}

CUresult shim_pci_attach(void)
{
    CUresult status = pci_open(true);
    if (status != CUDA_SUCCESS) return status;
    if (!pci_watch_begin()) {
        pci_watch_end();
        pci_close();
        return CUDA_ERROR_OPERATING_SYSTEM;
    }
    status = get_slot();
    if (status == CUDA_SUCCESS) {
        shim.doorbell = (volatile uint32_t *)(void *)(pci.registers + pci_slot_page((uint32_t)held) + PCI_SLOT_DOORBELL);
        status = pci_map_slot((uint32_t)held, __atomic_load_n(&pci_entry((uint32_t)held)->worker_address, __ATOMIC_RELAXED));
    }
    if (status != CUDA_SUCCESS) {
        shim_session_detach();
        return status;
    }
    if (pci.combining_fd >= 0) close(pci.combining_fd);
    pci.combining_fd = -1;
    shim_wait_configure(); /* knows now what it waits for */
    shim_log(SHIM_INFO, "session %llu in slot %d of %04x:%02x:%02x.%x at %p%s%s", (unsigned long long)shim.page->session_id, held, pci.domain, pci.bus,
             pci.device, pci.function, (void *)shim.base, shim.identical ? "" : " (not where the worker has it)",
             shim.uncached ? ", uncached" : "");
    return CUDA_SUCCESS;
}

int shim_pci_probe_version(void)
{
    int version = 0;
    if (pci_open(false) == CUDA_SUCCESS) version = (int)__atomic_load_n(&pci.directory->driver_version, __ATOMIC_RELAXED);
    pci_close();
    return version;
}

void shim_pci_started(void)
{
    if (held >= 0) pci_watch_start((uint32_t)held, token);
}

/* The goodbye is in the ring. Where the program still has pinned memory its threads and exit handlers may use it to the very
 * end: then the lock says that this process is gone, and whoever finds it releases the slot. */
void shim_pci_release(void)
{
    if (held < 0 || shim_pinned_in_use()) return;
    pci_abandon_slot();
    let_go(true);
}

void shim_pci_detach(void)
{
    pci_watch_end();
    pci_unmap_slot();
    if (held >= 0) let_go(true);
    pci_close();
}

void shim_pci_fork_child(void)
{
    if (pci.registers_fd < 0) return;
    pci_watch_end();
    pci_forget_slot();
    /* The mappings have stayed with the parent; the lock has not, as long as this copy of the descriptor is open. */
    pci.registers = pci.window = NULL;
    pci_close();
    held = -1;
}
