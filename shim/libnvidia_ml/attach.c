/* SPDX-License-Identifier: Apache-2.0 */
/*
 * attach.c - finding the device page: from a mediator on this machine, or from the PCI device of a VM.
 *
 * In this order: the mediator in the folder VGPU_RUN_DIR names, and nothing else when that is set; the PCI device, which is
 * what a VM has; the mediator of this user ($XDG_RUNTIME_DIR/vgpu), then of the machine (/var/vgpu). A mediator is asked for
 * the page alone (docs/wire.md section 1, HELLO flag bit 1): no session is made, nobody's slot is taken.
 *
 * Where there is none of them the answer is DRIVER_NOT_LOADED, without a word of output: this is a machine without a GPU.
 *
 * Must never: block for long; leave a descriptor that survives exec; believe a directory entry, a size or an answer before
 * it has been checked.
 */
#include "internal.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "../../transport/handshake.h"

#ifndef VGPU_SYSFS_PCI /* tests build the library over a folder of their own */
#define VGPU_SYSFS_PCI "/sys/bus/pci/devices"
#endif

#define RETRY_NS 20000000ull
#define ANSWER_LIMIT_SECONDS 5       /* a mediator that takes longer than this is as good as none */
#define IMPATIENT_LIMIT_MICROSECONDS 200000

#define VENDOR_NVIDIA 0x10de
#define DEVICE_VGPU 0x2331
#define PCI_MAPPED 65536u /* the device page, the directory, and nothing of the first slot */

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

/* ---- the PCI device ---- */

bool nvml_sysfs_path(const struct nvml_pci_address *address, const char *name, char *path, size_t size)
{
    int length = snprintf(path, size, VGPU_SYSFS_PCI "/%04x:%02x:%02x.%x/%s", address->domain, address->bus, address->device,
                          address->function, name);
    return length > 0 && (size_t)length < size;
}

bool nvml_sysfs_number(const struct nvml_pci_address *address, const char *name, long long *value)
{
    char path[PATH_MAX], text[64];
    if (!nvml_sysfs_path(address, name, path, sizeof path)) return false;
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return false;
    ssize_t count = read(file, text, sizeof text - 1);
    close(file);
    if (count <= 0) return false;
    text[count] = '\0';
    char *end;
    errno = 0;
    *value = strtoll(text, &end, 0);
    return errno == 0 && end != text;
}

static int by_name(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

/* Maps the device at `address` if it is one of ours and its host has laid out the directory. */
static nvmlReturn_t map_pci(const struct nvml_pci_address *address, struct nvml_source *source)
{
    long long vendor, device;
    char path[PATH_MAX];
    if (!nvml_sysfs_number(address, "vendor", &vendor) || vendor != VENDOR_NVIDIA ||
        !nvml_sysfs_number(address, "device", &device) || device != DEVICE_VGPU ||
        !nvml_sysfs_path(address, "resource1", path, sizeof path))
        return NVML_ERROR_DRIVER_NOT_LOADED;
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return errno == EACCES || errno == EPERM ? NVML_ERROR_NO_PERMISSION : NVML_ERROR_DRIVER_NOT_LOADED;
    struct stat status;
    void *mapping = MAP_FAILED;
    if (fstat(file, &status) == 0 && status.st_size >= (off_t)PCI_MAPPED)
        mapping = mmap(NULL, PCI_MAPPED, PROT_READ, MAP_SHARED, file, 0);
    int error = errno;
    close(file);
    if (mapping == MAP_FAILED) return error == EPERM ? NVML_ERROR_NO_PERMISSION : NVML_ERROR_DRIVER_NOT_LOADED;
    const struct vgpu_directory *directory = (const void *)((const uint8_t *)mapping + VGPU_DIRECTORY_OFFSET);
    const struct vgpu_device_page *page = mapping;
    /* SAFETY: a real card's BAR1 may lie behind this number; nothing in it is believed before both words are ours. */
    uint64_t magic = __atomic_load_n(&directory->magic, __ATOMIC_ACQUIRE), page_magic = __atomic_load_n(&page->magic, __ATOMIC_ACQUIRE);
    if (magic != VGPU_DIRECTORY_MAGIC || page_magic != VGPU_SEGMENT_MAGIC) {
        munmap(mapping, PCI_MAPPED);
        return NVML_ERROR_DRIVER_NOT_LOADED;
    }
    *source = (struct nvml_source){.mapping = mapping, .mapped = PCI_MAPPED, .connection = -1, .is_pci = true, .address = *address};
    return NVML_SUCCESS;
}

static nvmlReturn_t find_pci(struct nvml_source *source)
{
    DIR *folder = opendir(VGPU_SYSFS_PCI);
    if (folder == NULL) return NVML_ERROR_DRIVER_NOT_LOADED;
    char *names[1024];
    size_t count = 0;
    for (struct dirent *entry; count < 1024 && (entry = readdir(folder)) != NULL;)
        if (entry->d_name[0] != '.' && (names[count] = strdup(entry->d_name)) != NULL) count++;
    closedir(folder);
    qsort(names, count, sizeof names[0], by_name); /* as libcuda: the first address wins */
    nvmlReturn_t result = NVML_ERROR_DRIVER_NOT_LOADED;
    for (size_t i = 0; i < count; i++) {
        struct nvml_pci_address address;
        if (result != NVML_SUCCESS &&
            sscanf(names[i], "%x:%x:%x.%x", &address.domain, &address.bus, &address.device, &address.function) == 4) {
            nvmlReturn_t status = map_pci(&address, source);
            if (status != NVML_ERROR_DRIVER_NOT_LOADED) result = status;
        }
        free(names[i]);
    }
    return result;
}

/* ---- the mediator ---- */

static int connect_to(const struct sockaddr_un *address, bool patient)
{
    /* Not blocking while connecting: a mediator that stands still with a full queue must not hold us. */
    int channel = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (channel < 0) return -1;
    struct timeval limit = {.tv_sec = ANSWER_LIMIT_SECONDS};
    if (!patient) limit = (struct timeval){.tv_usec = IMPATIENT_LIMIT_MICROSECONDS};
    if (connect(channel, (const struct sockaddr *)address, sizeof *address) == 0 && fcntl(channel, F_SETFL, 0) == 0 &&
        setsockopt(channel, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit) == 0 &&
        setsockopt(channel, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit) == 0)
        return channel;
    int error = errno;
    close(channel);
    errno = error;
    return -1;
}

/* Takes over a connected channel: SUCCESS fills `source`, anything else closes the channel. NOT_FOUND: ask again. */
static nvmlReturn_t ask_for_page(int channel, struct nvml_source *source)
{
    struct vgpu_welcome welcome = {0};
    int descriptor = -1;
    nvmlReturn_t result = NVML_ERROR_NOT_FOUND;
    if (!vgpu_send_hello(channel, VGPU_HELLO_DEVICE_PAGE) || !vgpu_receive_welcome(channel, &welcome, &descriptor, 1)) goto done;
    result = welcome.status == WELCOME_OK && welcome.layout_version == VGPU_LAYOUT_VERSION ? NVML_SUCCESS
             : welcome.status == WELCOME_BUSY      ? NVML_ERROR_NOT_FOUND
             : welcome.status == WELCOME_NO_DEVICE ? NVML_ERROR_DRIVER_NOT_LOADED
             : welcome.status == WELCOME_REFUSED   ? NVML_ERROR_NO_PERMISSION
                                                   : NVML_ERROR_LIB_RM_VERSION_MISMATCH;
    if (result != NVML_SUCCESS) goto done;
    struct stat file;
    void *mapping = MAP_FAILED;
    if (descriptor >= 0 && fstat(descriptor, &file) == 0 && file.st_size >= (off_t)VGPU_DEVICE_PAGE_SIZE)
        mapping = mmap(NULL, VGPU_DEVICE_PAGE_SIZE, PROT_READ, MAP_SHARED, descriptor, 0);
    result = mapping == MAP_FAILED ? NVML_ERROR_LIB_RM_VERSION_MISMATCH : NVML_SUCCESS;
    if (result == NVML_SUCCESS)
        *source = (struct nvml_source){.mapping = mapping, .mapped = VGPU_DEVICE_PAGE_SIZE, .connection = channel};
done:
    if (descriptor >= 0) close(descriptor);
    if (result != NVML_SUCCESS) close(channel);
    return result;
}

static nvmlReturn_t ask_at(bool (*find)(struct sockaddr_un *), struct nvml_source *source, bool patient)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (!find(&address)) return NVML_ERROR_DRIVER_NOT_LOADED;
    for (uint64_t began = now_ns();;) {
        int channel = connect_to(&address, patient);
        if (channel < 0 && (errno == EACCES || errno == EPERM)) return NVML_ERROR_NO_PERMISSION;
        nvmlReturn_t result = channel < 0 ? NVML_ERROR_NOT_FOUND : ask_for_page(channel, source);
        if (result != NVML_ERROR_NOT_FOUND) return result;
        if (!patient || now_ns() - began > VGPU_ABSENT_LIMIT_NS) return NVML_ERROR_DRIVER_NOT_LOADED;
        struct timespec pause = {.tv_nsec = (long)RETRY_NS};
        nanosleep(&pause, NULL);
    }
}

nvmlReturn_t nvml_attach(struct nvml_source *source, bool patient)
{
    const char *run_dir = secure_getenv("VGPU_RUN_DIR");
    if (run_dir != NULL && run_dir[0] != '\0') return ask_at(vgpu_named_socket, source, patient);
    nvmlReturn_t result = find_pci(source);
    if (result != NVML_ERROR_DRIVER_NOT_LOADED) return result;
    return ask_at(vgpu_default_socket, source, patient);
}

void nvml_detach(struct nvml_source *source)
{
    if (source->mapping != NULL) munmap((void *)(uintptr_t)source->mapping, source->mapped);
    if (source->connection >= 0) close(source->connection);
    *source = (struct nvml_source){.connection = -1};
}
