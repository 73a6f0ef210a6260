/* SPDX-License-Identifier: Apache-2.0 */
/*
 * probe.c - vgpu-guest-probe: asks one thing of the virtual GPU and prints what it got, one `key=value` a line.
 *
 *   vgpu-guest-probe device FOLDER     what the device itself says, read from BAR1 without claiming anything
 *   vgpu-guest-probe cuda [LIBRARY]    loads libcuda.so.1 as a program would, and gets as far as the card's name and memory
 *   vgpu-guest-probe nvml [LIBRARY]    the same of libnvidia-ml.so.1
 *
 * `vgpu-guest check` reads it, and people may. It never waits longer than --timeout seconds (a claim stands for as long as
 * the host has no mediator), never leaves anything behind, and prints no value that came from outside without making it
 * printable. The status is 0 if everything was there, 1 if not; `result=` says what the matter is.
 */
#include "../../transport/_generated_calls.h"
#include "../../transport/wire.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define STATUS_HOST_PRESENT 1u
#define STATUS_QUARANTINED 2u

static unsigned timeout_seconds = 20;
static const char *asking = "nothing yet"; /* for the time-out's line */
static sigjmp_buf unplugged;

static void on_alarm(int number)
{
    (void)number;
    static const char head[] = "result=timeout\nasking=";
    if (write(STDOUT_FILENO, head, sizeof head - 1) < 0 || write(STDOUT_FILENO, asking, strlen(asking)) < 0 ||
        write(STDOUT_FILENO, "\n", 1) < 0)
        _exit(4);
    _exit(1);
}

static void on_bus_error(int number)
{
    (void)number;
    siglongjmp(unplugged, 1);
}

static void print_text(const char *key, const char *text, size_t limit)
{
    printf("%s=", key);
    for (size_t i = 0; i < limit && text[i] != '\0'; i++) putchar(text[i] >= ' ' && text[i] <= '~' ? text[i] : '?');
    putchar('\n');
}

static int refuse(const char *result, const char *detail)
{
    printf("result=%s\n", result);
    print_text("detail", detail, 400);
    return 1;
}

/* ---- device -------------------------------------------------------------------------------------- */

static uint32_t load(const uint32_t *word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }

static const char *agent_state(int resource0)
{
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 0, .l_len = 1};
    if (fcntl(resource0, F_OFD_GETLK, &lock) != 0) return "unknown";
    return lock.l_type == F_UNLCK ? "absent" : "running";
}

static void print_slots(const struct vgpu_directory *directory)
{
    uint32_t count = load(&directory->slot_count), used = 0, waiting = 0, version_refused = 0;
    if (count > VGPU_DIRECTORY_SLOTS) count = VGPU_DIRECTORY_SLOTS;
    for (uint32_t n = 0; n < count; n++) {
        uint32_t state = load(&directory->slot[n].state);
        used += state != 0;
        waiting += state == 1;
        version_refused += state == 3 && load(&directory->slot[n].refusal) == 4;
    }
    printf("slots=%u\nslots_used=%u\nslots_pending=%u\nversion_refusals=%u\n", count, used, waiting, version_refused);
}

static void print_page(const struct vgpu_device_page *page)
{
    if (__atomic_load_n(&page->magic, __ATOMIC_ACQUIRE) != VGPU_SEGMENT_MAGIC) {
        printf("page=absent\n");
        return;
    }
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    uint64_t at = __atomic_load_n(&page->telemetry_ns, __ATOMIC_RELAXED), reasons = page->throttle_reasons;
    int64_t age = (int64_t)now.tv_sec - (int64_t)(at / 1000000000u);
    uint32_t state = load(&page->device_state);
    printf("page=present\n");
    print_text("name", page->name, sizeof page->name);
    print_text("driver", page->driver_version_text, sizeof page->driver_version_text);
    printf("memory_mib=%llu\n", (unsigned long long)(page->total_memory_bytes >> 20));
    if (at != 0) printf("telemetry_age_seconds=%lld\n", (long long)age);
    printf("rate_limited=%s\n", (state & VGPU_STATE_RATE_LIMITED) != 0 ? "yes" : "no");
    printf("page_quarantined=%s\n", (state & VGPU_STATE_QUARANTINED) != 0 ? "yes" : "no");
    if (reasons != UINT64_MAX) printf("throttle_reasons=0x%llx\n", (unsigned long long)reasons);
}

static int probe_device(const char *folder)
{
    char path[PATH_MAX];
    if ((size_t)snprintf(path, sizeof path, "%s/resource0", folder) >= sizeof path) return refuse("failed", "name too long");
    int resource0 = open(path, O_RDWR | O_CLOEXEC);
    if (resource0 < 0) return refuse(errno == EACCES ? "forbidden" : errno == EROFS ? "readonly" : "failed", strerror(errno));
    snprintf(path, sizeof path, "%s/resource1", folder);
    int resource1 = open(path, O_RDWR | O_CLOEXEC);
    if (resource1 < 0) return refuse(errno == EACCES ? "forbidden" : errno == EROFS ? "readonly" : "failed", strerror(errno));
    size_t size = VGPU_DIRECTORY_OFFSET + sizeof(struct vgpu_directory);
    uint8_t *memory = mmap(NULL, size, PROT_READ, MAP_SHARED, resource1, 0);
    if (memory == MAP_FAILED) return refuse(errno == EPERM ? "lockdown" : "failed", strerror(errno));
    struct sigaction on_bus = {.sa_handler = on_bus_error};
    sigaction(SIGBUS, &on_bus, NULL);
    if (sigsetjmp(unplugged, 1) != 0) return refuse("unplugged", "the device went away");

    printf("agent=%s\n", agent_state(resource0));
    const struct vgpu_directory *directory = (const struct vgpu_directory *)(memory + VGPU_DIRECTORY_OFFSET);
    uint64_t magic = __atomic_load_n(&directory->magic, __ATOMIC_ACQUIRE);
    if (magic == UINT64_MAX) return refuse("off", "the device's memory reads as ones");
    if (magic != VGPU_DIRECTORY_MAGIC) return refuse("foreign", "no slot directory in BAR1");
    printf("layout=%u\nown_layout=%u\n", load(&directory->layout_version), VGPU_LAYOUT_VERSION);
    printf("calls=%s\n", directory->table_hash == VGPU_TABLE_HASH ? "same" : "different");
    uint32_t status = load(&directory->status);
    printf("host=%s\n", (status & STATUS_HOST_PRESENT) != 0 ? "present" : "absent");
    printf("quarantined=%s\n", (status & STATUS_QUARANTINED) != 0 ? "yes" : "no");
    printf("cuda_version=%u\n", load(&directory->driver_version));
    print_slots(directory);
    print_page((const struct vgpu_device_page *)memory);
    /* The device's process raises it several times a second. */
    uint64_t first = __atomic_load_n(&directory->host_heartbeat, __ATOMIC_ACQUIRE);
    bool alive = false;
    for (int i = 0; i < 20 && !alive; i++) {
        poll(NULL, 0, 100);
        alive = __atomic_load_n(&directory->host_heartbeat, __ATOMIC_ACQUIRE) != first;
    }
    printf("device_process=%s\n", alive ? "alive" : "still");
    bool good = alive && (status & STATUS_HOST_PRESENT) != 0 && (status & STATUS_QUARANTINED) == 0;
    printf("result=%s\n", good ? "ok" : "impaired");
    return good ? 0 : 1;
}

/* ---- libraries ------------------------------------------------------------------------------------- */

/* Where the loader found it is printed, since a wrong library of the right name is the commonest trouble of all. */
static void *open_library(const char *name)
{
    void *library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) refuse("not-loaded", dlerror());
    return library;
}

static void *function(void *library, const char *name)
{
    void *found = dlsym(library, name);
    if (found == NULL) refuse("no-function", name);
    return found;
}

static void print_place(void *function_in_it)
{
    Dl_info place;
    char real[PATH_MAX];
    if (dladdr(function_in_it, &place) != 0 && place.dli_fname != NULL)
        print_text("library", realpath(place.dli_fname, real) != NULL ? real : place.dli_fname, PATH_MAX);
}

static int failed(const char *call, int status, const char *text)
{
    printf("result=error\ncall=%s\ncode=%d\n", call, status);
    print_text("error", text != NULL ? text : "unknown", 200);
    return 1;
}

/* A function pointer out of void *, as POSIX has it. */
#define LOAD(variable, library, name)                         \
    do {                                                      \
        void *loaded = function(library, name);               \
        if (loaded == NULL) return 1;                         \
        memcpy(&(variable), &loaded, sizeof loaded);          \
    } while (0)

static int probe_cuda(const char *name)
{
    int (*initialise)(unsigned), (*count)(int *), (*device)(int *, int), (*device_name)(char *, int, int);
    int (*total)(size_t *, int), (*version)(int *), (*error_name)(int, const char **);
    asking = "dlopen of libcuda.so.1";
    void *library = open_library(name);
    if (library == NULL) return 1;
    LOAD(initialise, library, "cuInit");
    LOAD(count, library, "cuDeviceGetCount");
    LOAD(device, library, "cuDeviceGet");
    LOAD(device_name, library, "cuDeviceGetName");
    LOAD(total, library, "cuDeviceTotalMem_v2");
    LOAD(version, library, "cuDriverGetVersion");
    LOAD(error_name, library, "cuGetErrorName");
    print_place(dlsym(library, "cuInit"));
    fflush(stdout);
    const char *text = NULL;
    int status, devices = 0, driver = 0;
#define ASK(call, ...)                                        \
    do {                                                      \
        asking = #call;                                       \
        if ((status = __VA_ARGS__) != 0) {                    \
            error_name(status, &text);                        \
            return failed(#call, status, text);               \
        }                                                     \
    } while (0)
    ASK(cuInit, initialise(0));
    ASK(cuDriverGetVersion, version(&driver));
    printf("cuda_version=%d\n", driver);
    ASK(cuDeviceGetCount, count(&devices));
    printf("devices=%d\n", devices);
    for (int i = 0; i < devices; i++) {
        int handle;
        char words[256] = "";
        size_t bytes = 0;
        ASK(cuDeviceGet, device(&handle, i));
        ASK(cuDeviceGetName, device_name(words, sizeof words - 1, handle));
        ASK(cuDeviceTotalMem, total(&bytes, handle));
        print_text("name", words, sizeof words);
        printf("memory_mib=%zu\n", bytes >> 20);
    }
    printf("result=%s\n", devices > 0 ? "ok" : "no-device");
    return devices > 0 ? 0 : 1;
}

static int probe_nvml(const char *name)
{
    int (*initialise)(void), (*end)(void), (*count)(unsigned *), (*version)(char *, unsigned);
    const char *(*error_text)(int);
    asking = "dlopen of libnvidia-ml.so.1";
    void *library = open_library(name);
    if (library == NULL) return 1;
    LOAD(initialise, library, "nvmlInit_v2");
    LOAD(end, library, "nvmlShutdown");
    LOAD(count, library, "nvmlDeviceGetCount_v2");
    LOAD(version, library, "nvmlSystemGetDriverVersion");
    LOAD(error_text, library, "nvmlErrorString");
    print_place(dlsym(library, "nvmlInit_v2"));
    fflush(stdout);
    unsigned devices = 0;
    int status;
    char words[96] = "";
    asking = "nvmlInit";
    if ((status = initialise()) != 0) return failed(asking, status, error_text(status));
    asking = "nvmlSystemGetDriverVersion";
    if ((status = version(words, sizeof words - 1)) != 0) return failed(asking, status, error_text(status));
    print_text("driver", words, sizeof words);
    asking = "nvmlDeviceGetCount";
    if ((status = count(&devices)) != 0) return failed(asking, status, error_text(status));
    printf("devices=%u\n", devices);
    end();
    printf("result=%s\n", devices > 0 ? "ok" : "no-device");
    return devices > 0 ? 0 : 1;
}

static int usage(void)
{
    fputs("usage: vgpu-guest-probe [--timeout SECONDS] device FOLDER | cuda [LIBRARY] | nvml [LIBRARY]\n", stderr);
    return 2;
}

int main(int count, char **arguments)
{
    int at = 1;
    if (at + 1 < count && strcmp(arguments[at], "--timeout") == 0) {
        char *end;
        unsigned long seconds = strtoul(arguments[at + 1], &end, 10);
        if (*end != '\0' || seconds == 0 || seconds > 3600) return usage();
        timeout_seconds = (unsigned)seconds;
        at += 2;
    }
    if (at >= count || at + 2 < count) return usage();
    const char *what = arguments[at], *name = at + 1 < count ? arguments[at + 1] : NULL;
    struct sigaction action = {.sa_handler = on_alarm};
    sigaction(SIGALRM, &action, NULL);
    alarm(timeout_seconds);
    setvbuf(stdout, NULL, _IOLBF, 0); /* what is known is out when the time is up */
    if (strcmp(what, "device") == 0 && name != NULL) return probe_device(name);
    if (strcmp(what, "cuda") == 0) return probe_cuda(name != NULL ? name : "libcuda.so.1");
    if (strcmp(what, "nvml") == 0) return probe_nvml(name != NULL ? name : "libnvidia-ml.so.1");
    return usage();
}
