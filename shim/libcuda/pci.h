/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pci.h - the virtual GPU as a PCI device of this machine: found and opened (pci.c), a slot of it claimed (session_pci.c),
 * others' forgotten slots given back (pci_sweep.c), mapped (pci_map.c) and watched (pci_watch.c). docs/registers.md.
 */
#ifndef VGPU_SHIM_PCI_H
#define VGPU_SHIM_PCI_H

#include "session.h"

/* Where sysfs is. Tests build a library that looks elsewhere; nothing at run time can. */
#ifndef SHIM_SYSFS
#define SHIM_SYSFS "/sys"
#endif

#define PCI_WINDOW_SIZE 65536u /* device page and directory, at the start of BAR1 */
#define PCI_PAGE 4096u

enum pci_register { /* page 0, then offsets in the page of a slot */
    PCI_MAGIC = 0x00,
    PCI_SLOT_OWNER = 0x00, PCI_SLOT_RELEASE = 0x10, PCI_SLOT_DOORBELL = 0x14
};
#define PCI_MAGIC_VALUE 0x55504756u
#define PCI_GONE 0xffffffffu /* what is read where nobody answers */
#define PCI_STATUS_HOST_PRESENT 0x1u

enum pci_slot_state { PCI_FREE = 0, PCI_PENDING = 1, PCI_READY = 2, PCI_REFUSED = 3, PCI_DEAD = 4, PCI_RELEASING = 5 };

struct pci_device {
    unsigned domain, bus, device, function;
    int registers_fd; /* resource0; the locks of slots lie on it */
    int memory_fd;    /* resource1 */
    int combining_fd; /* resource1_wc, -1 where there is none */
    uint8_t *registers; /* BAR0: every access leaves the VM */
    uint64_t registers_size;
    uint8_t *window;    /* the first PCI_WINDOW_SIZE bytes of BAR1 */
    struct vgpu_directory *directory; /* in the window */
    /* Of the directory, checked against the sizes of the BARs. */
    uint32_t slot_count;
    uint64_t first_slot, slot_size;
    uint64_t sysfs; /* the instance of sysfs that the files, and so the locks, belong to */
};
extern struct pci_device pci; /* the one this process uses; descriptors are -1 while it uses none */

/* Finds the device and opens it. CUDA_ERROR_NO_DEVICE: none here, or not for us (the log says why). Reads one register if
 * the caller `claims`, none if it only wants to read the window. */
CUresult pci_open(bool claims);
void pci_close(void);
/* Are the files of the device those that are open? A device taken out and put in again has new ones, and its locks lie on
 * those, while a mapping that the kernel has left in place reaches it all the same. */
bool pci_is_still_there(void);
uint32_t pci_load32(uint64_t offset);
void pci_store32(uint64_t offset, uint32_t value);
void pci_store64(uint64_t offset, uint64_t value);
static inline uint64_t pci_slot_page(uint32_t slot) { return (uint64_t)(1 + slot) * PCI_PAGE; }
static inline uint64_t pci_slot_offset(uint32_t slot) { return pci.first_slot + slot * pci.slot_size; }
static inline struct vgpu_directory_slot *pci_entry(uint32_t slot) { return &pci.directory->slot[slot]; }
static inline uint32_t pci_state(uint32_t slot)
{
    /* SAFETY: acquire pairs with the host's release store of `state`, its last to an entry. */
    return __atomic_load_n(&pci_entry(slot)->state, __ATOMIC_ACQUIRE);
}

/* ---- locks: byte slot + 1 of resource0 says that the slot's owner lives ---- */

bool pci_lock(uint32_t slot); /* false: somebody has it */
void pci_unlock(uint32_t slot);

/* ---- slots of the dead (pci_sweep.c) ---- */

/* Taken slots whose lock was free, as they were when first seen so. Zero-initialise. */
struct pci_sweep {
    struct pci_suspect { uint32_t token, state; uint64_t heartbeat, since_ns; } suspect[VGPU_DIRECTORY_SLOTS];
};
/* Looks at every slot that is taken, but for `own`; gives back those whose owner is dead; none where another device has come
 * into the place of the one that is open. Is there an owner that lives? *hopeful: slots that may become free, being given
 * back now, freed by the host, or waiting for a second look. */
bool pci_sweep(struct pci_sweep *sweep, int own, unsigned *hopeful);
#define PCI_SWEEP_NS 1500000000ull /* how long an owner must have shown no life: three heartbeats */

/* ---- mapping (pci_map.c) ---- */

/* Maps a READY slot and adopts it as the segment. */
CUresult pci_map_slot(uint32_t slot, uint64_t worker_address);
void pci_unmap_slot(void);
void pci_forget_slot(void); /* in a forked child, which has inherited no mapping */
void pci_tell_lost(void); /* calls answer that the device is lost, whatever the page says; in a signal handler too */
/* From now on this process's accesses to the slot reach nobody. */
void pci_abandon_slot(void);

/* ---- watching (pci_watch.c) ---- */

/* Memory that goes away with the device. Accesses to it are answered by memory of our own from then on. */
enum pci_region { PCI_REGION_REGISTERS, PCI_REGION_WINDOW, PCI_REGION_SLOT, PCI_REGIONS };
void pci_watch_region(enum pci_region region, void *start, uint64_t size); /* size 0: no longer */
bool pci_watch_begin(void); /* before the claim: from here on a device that goes away does not end the process */
void pci_watch_start(uint32_t slot, uint32_t token); /* the heartbeat's thread */
void pci_watch_end(void);   /* also in a forked child */
/* Asks, sparingly, whether the device is still there: memory first, a register only when that has stood still. */
bool pci_look(void);

#endif
