/* SPDX-License-Identifier: Apache-2.0 */
/*
 * agent.c - vgpu-guest-agent, the one process of ours that lives as long as its VM.
 *
 * It gives back the slots of processes that died without doing so: byte n + 1 of the device's resource0 carries a lock for as
 * long as slot n's owner lives (docs/wire.md, "Who lives, in a VM"). Once a second it looks at the directory in BAR1, which
 * costs no exit from the VM, and stores the token of every slot whose lock can be had into RELEASE.
 *
 * It opens the device to the group that may use the GPU: at its start, for devices plugged in later, and, as
 * `--permit FOLDER`, for the udev rule and the installer.
 *
 * Its own lock is byte 0, so two agents never work on one device. It ends when a device is unplugged, also where another has
 * come into its place since it looked last: reading a mapping that has gone raises SIGBUS, and a fresh process is surer to
 * forget it than this one. systemd starts it again; without systemd `--stay` does. It must never hold a slot's lock while it
 * waits, and never release what it has not read under that lock.
 */
#include "../../transport/wire.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <grp.h>
#include <limits.h>
#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

/* docs/registers.md */
#define PAGE 4096u
#define REGISTER_RELEASE 0x10u
#define STATE_FREE 0u
#define STATE_RELEASING 5u
#define BAR0_LARGEST (PAGE * (VGPU_DIRECTORY_SLOTS + 1)) /* a real card's BAR0 is 16 MiB */

#define DIRECTORY_END (VGPU_DIRECTORY_OFFSET + sizeof(struct vgpu_directory)) /* mapped from BAR1's start */

#define DEVICES_MAX 8
#define LOOK_FOR_DEVICES 2 /* seconds between looks for new ones */

struct device {
    char folder[PATH_MAX];
    int resource0;
    volatile uint8_t *registers;
    size_t registers_size;
    const struct vgpu_directory *directory;
    unsigned long released;
};

static struct device device[DEVICES_MAX];
static size_t devices;
static const char *sysfs = "/sys";
static gid_t group = (gid_t)-1; /* -1: leave the files to root */
static volatile sig_atomic_t asked_to_end;
static sigjmp_buf unplugged;
static volatile sig_atomic_t guarded;

__attribute__((format(printf, 1, 2))) static void say(const char *format, ...)
{
    char line[PATH_MAX + 256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    fprintf(stderr, "vgpu-guest-agent: %s\n", line);
}

/* ---- systemd ---------------------------------------------------------------------------------- */

static void notify(const char *message)
{
    const char *name = getenv("NOTIFY_SOCKET");
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (name == NULL || (name[0] != '/' && name[0] != '@') || strlen(name) >= sizeof address.sun_path) return;
    size_t length = strlen(name);
    memcpy(address.sun_path, name, length);
    if (name[0] == '@') address.sun_path[0] = '\0';
    int socket_fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (socket_fd < 0) return;
    socklen_t size = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + length + (name[0] == '/' ? 1 : 0));
    if (sendto(socket_fd, message, strlen(message), MSG_NOSIGNAL, (const struct sockaddr *)&address, size) < 0)
        say("cannot tell systemd: %s", strerror(errno));
    close(socket_fd);
}

/* ---- sysfs -------------------------------------------------------------------------------------- */

static bool join(char *path, const char *folder, const char *name)
{
    return (size_t)snprintf(path, PATH_MAX, "%s/%s", folder, name) < PATH_MAX;
}

/* The attribute as text without its line's end; false if there is none. */
static bool attribute(const char *folder, const char *name, char *text, size_t size)
{
    char path[PATH_MAX];
    if (!join(path, folder, name)) return false;
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return false;
    ssize_t length = read(file, text, size - 1);
    close(file);
    if (length < 0) return false;
    text[length] = '\0';
    text[strcspn(text, "\n")] = '\0';
    return true;
}

static bool attribute_is(const char *folder, const char *name, const char *value)
{
    char text[64];
    return attribute(folder, name, text, sizeof text) && strcmp(text, value) == 0;
}

static bool store_attribute(const char *folder, const char *name, const char *value)
{
    char path[PATH_MAX];
    if (!join(path, folder, name)) return false;
    int file = open(path, O_WRONLY | O_CLOEXEC | O_TRUNC);
    if (file < 0) return false;
    bool stored = write(file, value, strlen(value)) == (ssize_t)strlen(value);
    int error = errno;
    close(file);
    errno = error;
    return stored;
}

/* Ours by its ids; a real card of these ids, should there be one, has a BAR0 of 16 MiB. */
static bool is_ours(const char *folder)
{
    char path[PATH_MAX];
    struct stat status;
    return attribute_is(folder, "vendor", "0x10de") && attribute_is(folder, "device", "0x2331") &&
           attribute_is(folder, "subsystem_vendor", "0x10de") && attribute_is(folder, "subsystem_device", "0x16c1") &&
           join(path, folder, "resource0") && stat(path, &status) == 0 && status.st_size <= (off_t)BAR0_LARGEST;
}

/* A display driver that took the card for a real one would hold its memory; it is asked to let go, and not to come back. */
static void unbind(const char *folder)
{
    char path[PATH_MAX], target[PATH_MAX];
    if (!join(path, folder, "driver")) return;
    ssize_t length = readlink(path, target, sizeof target - 1);
    if (length < 0) return;
    target[length] = '\0';
    const char *slash = strrchr(target, '/'), *driver = slash == NULL ? target : slash + 1;
    const char *address = strrchr(folder, '/');
    if (strcmp(driver, "nouveau") != 0 && strcmp(driver, "nvidiafb") != 0 && strcmp(driver, "nova_core") != 0) {
        say("%s is held by the driver %s; programs cannot map it", folder, driver);
        return;
    }
    store_attribute(folder, "driver_override", "vgpu-none");
    if (address != NULL && store_attribute(path, "unbind", address + 1)) say("%s: took it from the driver %s", folder, driver);
}

/*
 * Gives the device's memory to the group and switches its decoding on. A device just plugged in is announced before the
 * kernel has made these files, so `patience` says how many tenths of a second to wait for them. False: not done, and said so.
 */
static bool permit(const char *folder, int patience)
{
    static const char *const file[] = {"resource0", "resource1", "resource1_wc"};
    char path[PATH_MAX];
    struct stat status;
    if (!join(path, folder, file[1])) return false;
    while (stat(path, &status) != 0 && patience-- > 0) poll(NULL, 0, 100);
    unbind(folder);
    bool good = true;
    for (size_t i = 0; i < sizeof file / sizeof *file; i++) {
        if (!join(path, folder, file[i])) return false;
        if (stat(path, &status) != 0) {
            if (i == 2) continue; /* only a prefetchable BAR has it */
            say("%s: %s", path, strerror(errno));
            good = false;
            continue;
        }
        if (group == (gid_t)-1 || (status.st_gid == group && (status.st_mode & 07777) == 0660)) continue;
        if (chown(path, (uid_t)-1, group) != 0 || chmod(path, 0660) != 0) {
            say("%s: cannot give it to group %u: %s", path, (unsigned)group, strerror(errno));
            good = false;
        }
    }
    /* The kernel counts: a second 1 would have to be taken back twice. */
    if (attribute_is(folder, "enable", "0") && !store_attribute(folder, "enable", "1")) {
        say("%s/enable: cannot switch the device on: %s", folder, strerror(errno));
        good = false;
    }
    return good;
}

/* ---- devices -------------------------------------------------------------------------------------- */

static bool lock_byte(int file, off_t byte, short kind)
{
    struct flock lock = {.l_type = kind, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1};
    return fcntl(file, F_OFD_SETLK, &lock) == 0;
}

static void forget(struct device *gone)
{
    if (gone->registers != NULL) munmap((void *)gone->registers, gone->registers_size);
    if (gone->directory != NULL) munmap((void *)((const uint8_t *)gone->directory - VGPU_DIRECTORY_OFFSET), DIRECTORY_END);
    if (gone->resource0 >= 0) close(gone->resource0);
}

/* The reason why it could not be opened, or NULL. */
static const char *open_device(struct device *opened, const char *folder)
{
    char path[PATH_MAX];
    struct stat status;
    memset(opened, 0, sizeof *opened);
    opened->resource0 = -1;
    if (!join(path, folder, "resource0")) return "name too long";
    strcpy(opened->folder, folder);
    if ((opened->resource0 = open(path, O_RDWR | O_CLOEXEC)) < 0) return strerror(errno);
    if (fstat(opened->resource0, &status) != 0) return strerror(errno);
    if (!lock_byte(opened->resource0, 0, F_WRLCK)) return "another agent looks after it";
    if (status.st_size < (off_t)PAGE) return "BAR0 is too small";
    opened->registers_size = (size_t)status.st_size;
    void *registers = mmap(NULL, opened->registers_size, PROT_READ | PROT_WRITE, MAP_SHARED, opened->resource0, 0);
    if (registers == MAP_FAILED) return strerror(errno);
    opened->registers = registers;
    if (!join(path, folder, "resource1")) return "name too long";
    int resource1 = open(path, O_RDONLY | O_CLOEXEC);
    if (resource1 < 0) return strerror(errno);
    const uint8_t *memory = mmap(NULL, DIRECTORY_END, PROT_READ, MAP_SHARED, resource1, 0);
    int error = errno;
    close(resource1);
    if (memory == MAP_FAILED) return strerror(error);
    opened->directory = (const struct vgpu_directory *)(memory + VGPU_DIRECTORY_OFFSET);
    return NULL;
}

static bool known(const char *folder)
{
    for (size_t i = 0; i < devices; i++)
        if (strcmp(device[i].folder, folder) == 0) return true;
    return false;
}

/* `complain`: say why a device cannot be looked after; not again every two seconds. */
static void look_for_devices(bool complain)
{
    char list[PATH_MAX], folder[PATH_MAX];
    if (!join(list, sysfs, "bus/pci/devices")) return;
    DIR *open_list = opendir(list);
    if (open_list == NULL) return;
    for (struct dirent *entry; devices < DEVICES_MAX && (entry = readdir(open_list)) != NULL;) {
        if (entry->d_name[0] == '.' || !join(folder, list, entry->d_name) || known(folder) || !is_ours(folder)) continue;
        permit(folder, 0);
        const char *reason = open_device(&device[devices], folder);
        if (reason == NULL) {
            say("looking after %s", folder);
            devices++;
            continue;
        }
        if (complain) say("%s: %s", folder, reason);
        forget(&device[devices]);
    }
    closedir(open_list);
}

/* ---- dead owners ------------------------------------------------------------------------------------ */

static uint32_t load(const uint32_t *word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }

/* The token of a slot that somebody has to give back, else 0. */
static uint32_t owned(const struct vgpu_directory_slot *slot)
{
    uint32_t state = load(&slot->state), token = load(&slot->token);
    return state == STATE_FREE || state == STATE_RELEASING || token == UINT32_MAX ? 0 : token;
}

/* A process in another network namespace may see another instance of sysfs: its locks are not ours, and a free one means
 * nothing. The shim's processes judge such owners by their heartbeat. */
static bool sees_our_locks(const struct device *swept, const struct vgpu_directory_slot *slot)
{
    uint64_t theirs;
    struct stat ours;
    memcpy(&theirs, slot->guest_program + VGPU_PROGRAM_NAME, sizeof theirs);
    return theirs == 0 || (fstat(swept->resource0, &ours) == 0 && theirs == ours.st_dev);
}

static void sweep(struct device *swept)
{
    const struct vgpu_directory *directory = swept->directory;
    if (__atomic_load_n(&directory->magic, __ATOMIC_ACQUIRE) != VGPU_DIRECTORY_MAGIC) return; /* no host behind it yet */
    uint32_t count = load(&directory->slot_count);
    if (count > VGPU_DIRECTORY_SLOTS) count = VGPU_DIRECTORY_SLOTS;
    if (count > swept->registers_size / PAGE - 1) count = (uint32_t)(swept->registers_size / PAGE - 1);
    for (uint32_t n = 0; n < count; n++) {
        const struct vgpu_directory_slot *slot = &directory->slot[n];
        if (owned(slot) == 0 || !sees_our_locks(swept, slot) || !lock_byte(swept->resource0, (off_t)n + 1, F_WRLCK)) continue;
        /* Only who holds the lock may claim the slot, so what is read now stays true until the lock is given back. */
        uint32_t token = owned(slot);
        if (token != 0) {
            *(volatile uint32_t *)(swept->registers + PAGE * (n + 1) + REGISTER_RELEASE) = token;
            swept->released++;
            say("slot %u: process %u has gone; released", n, load(&slot->pid));
        }
        lock_byte(swept->resource0, (off_t)n + 1, F_UNLCK);
    }
}

static void on_bus_error(int number)
{
    if (guarded) siglongjmp(unplugged, 1);
    signal(number, SIG_DFL);
    raise(number);
}

static void on_end(int number)
{
    (void)number;
    asked_to_end = 1;
}

static bool sweep_guarded(struct device *swept)
{
    if (sigsetjmp(unplugged, 1) != 0) {
        guarded = 0;
        return false;
    }
    guarded = 1;
    sweep(swept);
    guarded = 0;
    return true;
}

/* The files are those that are open. A device that was taken out and put in again has new ones: the locks of its owners lie on
 * those, while the mapping, which kernels since about 5.12 leave in place, reaches the new device at the old addresses. */
static bool is_still_there(const struct device *looked_at)
{
    char path[PATH_MAX];
    struct stat now, opened;
    return join(path, looked_at->folder, "resource0") && stat(path, &now) == 0 && fstat(looked_at->resource0, &opened) == 0 &&
           now.st_ino == opened.st_ino && now.st_dev == opened.st_dev;
}

/* False: a device has gone. */
static bool sweep_all(void)
{
    for (size_t i = 0; i < devices; i++) {
        if (!is_still_there(&device[i]) || !sweep_guarded(&device[i])) {
            say("%s was unplugged", device[i].folder);
            return false;
        }
    }
    return true;
}

/* ---- the process -------------------------------------------------------------------------------------- */

static const char usage[] =
    "usage: vgpu-guest-agent [--group NAME] [--stay]\n"
    "       vgpu-guest-agent [--group NAME] --permit FOLDER\n"
    "\n"
    "Gives back the virtual GPU's slots of processes that died, and opens the device to a group.\n"
    "  --group NAME     who may use the GPU (a name or a number); without it only root may\n"
    "  --permit FOLDER  open the device whose sysfs folder this is, and end\n"
    "  --stay           after a device was unplugged start again instead of ending (where systemd does not)\n"
    "  --sysfs FOLDER   where sysfs is, if not /sys\n";

static bool set_group(const char *name)
{
    char *end;
    unsigned long number = strtoul(name, &end, 10);
    const struct group *found;
    if (*name != '\0' && *end == '\0' && number < (gid_t)-1) {
        group = (gid_t)number;
    } else if ((found = getgrnam(name)) != NULL) {
        group = found->gr_gid;
    } else {
        say("there is no group %s", name);
        return false;
    }
    return true;
}

static void report(char *message, size_t size)
{
    unsigned long released = 0;
    for (size_t i = 0; i < devices; i++) released += device[i].released;
    if (devices == 0)
        snprintf(message, size, "READY=1\nSTATUS=waiting for a virtual GPU");
    else
        snprintf(message, size, "READY=1\nSTATUS=%zu virtual GPU%s, %lu slots given back", devices, devices == 1 ? "" : "s", released);
}

int main(int count, char **arguments)
{
    static const struct option options[] = {{"group", required_argument, NULL, 'g'}, {"permit", required_argument, NULL, 'p'},
                                            {"stay", no_argument, NULL, 's'},        {"sysfs", required_argument, NULL, 'f'},
                                            {"help", no_argument, NULL, 'h'},        {NULL, 0, NULL, 0}};
    const char *permitted = NULL;
    bool stay = false;
    for (int option; (option = getopt_long(count, arguments, "", options, NULL)) != -1;) {
        switch (option) {
        case 'g':
            if (!set_group(optarg)) return 1;
            break;
        case 'p': permitted = optarg; break;
        case 's': stay = true; break;
        case 'f': sysfs = optarg; break;
        case 'h': fputs(usage, stdout); return 0;
        default: fputs(usage, stderr); return 2;
        }
    }
    if (optind != count) {
        fputs(usage, stderr);
        return 2;
    }
    if (permitted != NULL) return permit(permitted, 20) ? 0 : 1;

    sigset_t ending, before;
    sigemptyset(&ending);
    sigaddset(&ending, SIGTERM);
    sigaddset(&ending, SIGINT);
    sigprocmask(SIG_BLOCK, &ending, &before); /* they arrive in ppoll, or not at all */
    sigdelset(&before, SIGTERM);
    sigdelset(&before, SIGINT);
    struct sigaction on_signal = {.sa_handler = on_end}, on_bus = {.sa_handler = on_bus_error};
    sigaction(SIGTERM, &on_signal, NULL);
    sigaction(SIGINT, &on_signal, NULL);
    sigaction(SIGBUS, &on_bus, NULL);

    char message[128], told[128] = "";
    for (unsigned tick = 0;; tick++) {
        if (tick % LOOK_FOR_DEVICES == 0) look_for_devices(tick == 0);
        if (!sweep_all()) break;
        report(message, sizeof message);
        if (strcmp(message, told) != 0) {
            notify(message);
            strcpy(told, message);
        }
        struct timespec second = {.tv_sec = 1};
        ppoll(NULL, 0, &second, &before);
        if (asked_to_end) {
            notify("STOPPING=1");
            return 0;
        }
    }
    notify("STOPPING=1");
    for (size_t i = 0; i < devices; i++) forget(&device[i]);
    if (stay) {
        execv("/proc/self/exe", arguments); /* signals stay blocked: one that comes now is for the next life's ppoll */
        say("cannot start again: %s", strerror(errno));
        return 1;
    }
    return 0;
}
