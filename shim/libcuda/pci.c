/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pci.c - the virtual GPU among this machine's PCI devices: found in sysfs, opened, its registers reached.
 *
 * What has NVIDIA's numbers need not be ours: a driver that is bound to it means it is not, and the directory at 16 KiB of
 * BAR1 and the first register of BAR0 must carry our magic numbers. Of several, the one with the lowest address is used.
 *
 * A device that no driver has switched on does not answer (its memory decoding is off): then `enable` is written, which
 * needs root; a system with our udev rule has done it before.
 *
 * Must never: print, but for the log; write to a device that has not shown the numbers; leave a descriptor that survives exec.
 */
#include "pci.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define VENDOR 0x10de
#define DEVICE 0x2331
#define DEVICES_MOST 16
#define CONFIG_COMMAND 4 /* offset in configuration space */
#define COMMAND_MEMORY 0x2u

#define CLOSED {.registers_fd = -1, .memory_fd = -1, .combining_fd = -1}
struct pci_device pci = CLOSED;

/* The number a file of sysfs holds; -1 without one. */
static long number_in(int folder, const char *name)
{
    char text[32];
    int file = openat(folder, name, O_RDONLY | O_CLOEXEC);
    if (file < 0) return -1;
    ssize_t length = read(file, text, sizeof text - 1);
    close(file);
    if (length <= 0) return -1;
    text[length] = '\0';
    char *end;
    long value = strtol(text, &end, 0);
    return end == text ? -1 : value;
}

/* The addresses of what may be ours, in order; how many there are. */
static unsigned candidates(uint64_t *address)
{
    unsigned count = 0;
    DIR *folder = opendir(SHIM_SYSFS "/bus/pci/devices");
    if (folder == NULL) {
        shim_log_once(SHIM_INFO, "no virtual GPU: %s cannot be read: %s", SHIM_SYSFS "/bus/pci/devices", strerror(errno));
        return 0;
    }
    for (struct dirent *entry; (entry = readdir(folder)) != NULL && count < DEVICES_MOST;) {
        unsigned domain, bus, device, function;
        if (sscanf(entry->d_name, "%x:%x:%x.%x", &domain, &bus, &device, &function) != 4) continue;
        int here = openat(dirfd(folder), entry->d_name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        if (here < 0) continue;
        if (number_in(here, "vendor") == VENDOR && number_in(here, "device") == DEVICE) {
            uint64_t found = (uint64_t)domain << 16 | (bus & 0xff) << 8 | (device & 0x1f) << 3 | (function & 7);
            unsigned at = count++;
            for (; at > 0 && address[at - 1] > found; at--) address[at] = address[at - 1];
            address[at] = found;
        }
        close(here);
    }
    closedir(folder);
    if (count == 0) shim_log_once(SHIM_INFO, "no virtual GPU: no device %04x:%04x in %s", VENDOR, DEVICE, SHIM_SYSFS "/bus/pci/devices");
    return count;
}

static const char *name_of(uint64_t address)
{
    static __thread char name[24];
    snprintf(name, sizeof name, "%04x:%02x:%02x.%x", (unsigned)(address >> 16), (unsigned)(address >> 8) & 0xff,
             (unsigned)(address >> 3) & 0x1f, (unsigned)address & 7);
    return name;
}

/* Sees to it that the device answers at its addresses. */
static bool switch_on(int folder, uint64_t address)
{
    if (number_in(folder, "enable") != 0) return true; /* on, or a kernel that does not say */
    uint8_t command[2];
    int config = openat(folder, "config", O_RDONLY | O_CLOEXEC);
    bool decodes = config >= 0 && pread(config, command, sizeof command, CONFIG_COMMAND) == sizeof command && (command[0] & COMMAND_MEMORY) != 0;
    if (config >= 0) close(config);
    if (decodes) return true; /* the firmware has done it */
    int file = openat(folder, "enable", O_WRONLY | O_CLOEXEC);
    bool done = file >= 0 && write(file, "1", 1) == 1;
    int error = errno;
    if (file >= 0) close(file);
    if (!done) shim_log(SHIM_ERROR, "%s is switched off, and to write its `enable` needs root: %s", name_of(address), strerror(error));
    return done;
}

static uint8_t *map_shared(int file, uint64_t size)
{
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (at == MAP_FAILED) return NULL;
    (void)madvise(at, size, MADV_DONTFORK); /* a child must not touch its parent's registers */
    return at;
}

bool pci_is_still_there(void)
{
    char path[256];
    struct stat now, opened;
    uint64_t address = (uint64_t)pci.domain << 16 | pci.bus << 8 | pci.device << 3 | pci.function;
    snprintf(path, sizeof path, "%s/bus/pci/devices/%s/resource0", SHIM_SYSFS, name_of(address));
    return stat(path, &now) == 0 && fstat(pci.registers_fd, &opened) == 0 && now.st_ino == opened.st_ino && now.st_dev == opened.st_dev;
}

/* Opens the files of the device in `folder` and maps what is wanted of them. */
static bool open_files(int folder, uint64_t address)
{
    struct stat registers, memory;
    pci.registers_fd = openat(folder, "resource0", O_RDWR | O_CLOEXEC);
    if (pci.registers_fd >= 0) pci.memory_fd = openat(folder, "resource1", O_RDWR | O_CLOEXEC);
    if (pci.memory_fd < 0) {
        shim_log(SHIM_ERROR, "%s cannot be opened for reading and writing: %s", name_of(address), strerror(errno));
        return false;
    }
    pci.combining_fd = openat(folder, "resource1_wc", O_RDWR | O_CLOEXEC);
    if (fstat(pci.registers_fd, &registers) != 0 || fstat(pci.memory_fd, &memory) != 0 || registers.st_size < (off_t)(2 * PCI_PAGE) ||
        memory.st_size < (off_t)(2 * PCI_WINDOW_SIZE)) {
        shim_log(SHIM_INFO, "%s is too small for a virtual GPU", name_of(address));
        return false;
    }
    pci.registers_size = (uint64_t)registers.st_size;
    pci.sysfs = registers.st_dev;
    pci.window = map_shared(pci.memory_fd, PCI_WINDOW_SIZE);
    if (pci.window != NULL) pci.registers = map_shared(pci.registers_fd, pci.registers_size);
    if (pci.registers == NULL) {
        shim_log(SHIM_ERROR, "%s cannot be mapped: %s", name_of(address), strerror(errno));
        return false;
    }
    pci.directory = (void *)(pci.window + VGPU_DIRECTORY_OFFSET);
    return true;
}

/* Is it what it should be, and cut as the files are long? */
static CUresult check(uint64_t address, bool claims)
{
    const struct vgpu_directory *directory = pci.directory;
    struct stat memory;
    if (directory->magic != VGPU_DIRECTORY_MAGIC || (claims && pci_load32(PCI_MAGIC) != PCI_MAGIC_VALUE)) {
        shim_log(SHIM_WARNING, "%s is no virtual GPU, or nobody is behind it", name_of(address));
        return CUDA_ERROR_NO_DEVICE;
    }
    if (directory->layout_version != VGPU_LAYOUT_VERSION || directory->table_hash != VGPU_TABLE_HASH) {
        shim_log(SHIM_ERROR, "%s was made for another version of this library", name_of(address));
        return CUDA_ERROR_SYSTEM_DRIVER_MISMATCH;
    }
    pci.slot_count = directory->slot_count;
    pci.first_slot = directory->first_slot;
    pci.slot_size = directory->slot_size;
    bool sound = fstat(pci.memory_fd, &memory) == 0 && pci.slot_count != 0 && pci.slot_count <= VGPU_DIRECTORY_SLOTS &&
                 pci.first_slot % PCI_PAGE == 0 && pci.first_slot >= PCI_WINDOW_SIZE && pci.slot_size % PCI_PAGE == 0 &&
                 pci.slot_size > VGPU_DEVICE_PAGE_SIZE + VGPU_SESSION_PAGE_SIZE && pci.first_slot < (uint64_t)memory.st_size &&
                 pci.slot_size <= ((uint64_t)memory.st_size - pci.first_slot) / pci.slot_count &&
                 pci_slot_page(pci.slot_count) <= pci.registers_size;
    if (!sound) shim_log(SHIM_ERROR, "%s says of itself what cannot be", name_of(address));
    return sound ? CUDA_SUCCESS : CUDA_ERROR_SYSTEM_DRIVER_MISMATCH;
}

static CUresult open_one(uint64_t address, bool claims)
{
    char path[256];
    CUresult status = CUDA_ERROR_NO_DEVICE;
    snprintf(path, sizeof path, "%s/bus/pci/devices/%s", SHIM_SYSFS, name_of(address));
    int folder = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (folder < 0) {
        shim_log(SHIM_INFO, "%s cannot be opened: %s", path, strerror(errno));
        return status;
    }
    if (faccessat(folder, "driver", F_OK, 0) == 0)
        shim_log(SHIM_INFO, "%s has a driver, so it is no virtual GPU", name_of(address));
    else if (switch_on(folder, address) && open_files(folder, address))
        status = check(address, claims);
    close(folder);
    if (status != CUDA_SUCCESS) {
        pci_close();
        return status;
    }
    pci.domain = (unsigned)(address >> 16);
    pci.bus = (unsigned)(address >> 8) & 0xff;
    pci.device = (unsigned)(address >> 3) & 0x1f;
    pci.function = (unsigned)address & 7;
    return status;
}

CUresult pci_open(bool claims)
{
    uint64_t address[DEVICES_MOST];
    CUresult status = CUDA_ERROR_NO_DEVICE;
    unsigned count = candidates(address);
    for (unsigned i = 0; i < count; i++) {
        CUresult opened = open_one(address[i], claims);
        if (opened == CUDA_SUCCESS) return opened;
        if (status == CUDA_ERROR_NO_DEVICE) status = opened;
    }
    return status;
}

void pci_close(void)
{
    if (pci.registers != NULL) munmap(pci.registers, pci.registers_size);
    if (pci.window != NULL) munmap(pci.window, PCI_WINDOW_SIZE);
    if (pci.registers_fd >= 0) close(pci.registers_fd);
    if (pci.memory_fd >= 0) close(pci.memory_fd);
    if (pci.combining_fd >= 0) close(pci.combining_fd);
    pci = (struct pci_device)CLOSED;
}

/* SAFETY: registers are reached by single instructions of the register's width; the compiler must neither split nor drop
 * them. The device's memory type keeps them in order. */
uint32_t pci_load32(uint64_t offset) { return *(volatile uint32_t *)(void *)(pci.registers + offset); }
void pci_store32(uint64_t offset, uint32_t value) { *(volatile uint32_t *)(void *)(pci.registers + offset) = value; }
void pci_store64(uint64_t offset, uint64_t value) { *(volatile uint64_t *)(void *)(pci.registers + offset) = value; }

/* ---- locks ---- */

static bool set_lock(uint32_t slot, short type)
{
    /* Of the open file, not of the process: so it ends with the last copy of the descriptor, however this process ends. */
    struct flock lock = {.l_type = type, .l_whence = SEEK_SET, .l_start = (off_t)slot + 1, .l_len = 1};
    return fcntl(pci.registers_fd, F_OFD_SETLK, &lock) == 0;
}

bool pci_lock(uint32_t slot) { return set_lock(slot, F_WRLCK); }
void pci_unlock(uint32_t slot) { (void)set_lock(slot, F_UNLCK); }
