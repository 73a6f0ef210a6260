/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pci_sweep.c - slots whose owner is dead are given back: by whoever wants one and finds none free, and now and then by every
 * process that has one, for a session holds memory of the GPU until its slot is released.
 *
 * A slot's lock says that its owner lives, and the kernel drops it however the owner ends. But the lock is the file's, and a
 * process in another network namespace (a container, a service with a private network) may see another instance of sysfs, with
 * other files. Owners say which they see. Where it is ours, having got the lock proves the owner dead. Elsewhere it proves
 * nothing: a session must have had no heartbeat for PCI_SWEEP_NS, and one that is just being made must have stood there for as
 * long; its owner, if there is one after all, finds itself without a slot and asks anew.
 *
 * A device that was taken out and put in again has other files too, at the same addresses: whoever has opened the old ones
 * releases nothing.
 */
#include "pci.h"

#include <sys/mman.h>

/* The heartbeat of the session in a slot. */
static uint64_t heartbeat_of(uint32_t slot)
{
    void *at = mmap(NULL, PCI_PAGE, PROT_READ, MAP_SHARED, pci.memory_fd, (off_t)(pci_slot_offset(slot) + VGPU_DEVICE_PAGE_SIZE));
    if (at == MAP_FAILED) return 0;
    uint64_t value = __atomic_load_n(&((struct vgpu_session_page *)at)->heartbeat, __ATOMIC_RELAXED);
    munmap(at, PCI_PAGE);
    return value;
}

/* Does the owner see the same locks as we do? One that does not say is taken at its word that it follows the rules. */
static bool same_locks(uint32_t slot)
{
    uint64_t theirs;
    memcpy(&theirs, pci_entry(slot)->guest_program + VGPU_PROGRAM_NAME, sizeof theirs);
    return theirs == 0 || theirs == pci.sysfs;
}

/* The slot's lock is ours. True: the slot may become free. */
static bool look_at(struct pci_sweep *sweep, uint32_t slot, uint64_t now)
{
    uint32_t state = pci_state(slot), token = __atomic_load_n(&pci_entry(slot)->token, __ATOMIC_RELAXED);
    if (state == PCI_FREE || state == PCI_RELEASING) return true;
    if (token == 0) return false;
    bool surely = same_locks(slot) || state == PCI_DEAD || state == PCI_REFUSED;
    uint64_t heartbeat = state == PCI_READY && !surely ? heartbeat_of(slot) : 0;
    bool same = sweep->suspect[slot].token == token && sweep->suspect[slot].state == state && sweep->suspect[slot].heartbeat == heartbeat;
    if (surely || (same && now - sweep->suspect[slot].since_ns >= PCI_SWEEP_NS)) {
        shim_log(SHIM_INFO, "slot %u: its owner is dead; released", slot);
        pci_store32(pci_slot_page(slot) + PCI_SLOT_RELEASE, token);
        sweep->suspect[slot].token = 0;
        return true;
    }
    if (same) return true;
    bool first = sweep->suspect[slot].token != token; /* else it has moved: somebody lives there */
    sweep->suspect[slot] = (struct pci_suspect){.token = token, .state = state, .heartbeat = heartbeat, .since_ns = now};
    return first;
}

bool pci_sweep(struct pci_sweep *sweep, int own, unsigned *hopeful)
{
    bool others = false;
    *hopeful = 0;
    if (!pci_is_still_there()) return false;
    uint64_t now = shim_now_ns();
    for (uint32_t slot = 0; slot < pci.slot_count; slot++) {
        uint32_t state = (int)slot == own ? PCI_FREE : pci_state(slot);
        if (state == PCI_FREE) continue;
        if (state == PCI_RELEASING) {
            ++*hopeful;
            continue;
        }
        if (!pci_lock(slot)) {
            sweep->suspect[slot].token = 0;
            others = true;
            continue;
        }
        if (look_at(sweep, slot, now))
            ++*hopeful;
        else
            others = true;
        pci_unlock(slot);
    }
    return others;
}
