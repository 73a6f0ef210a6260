/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pci_watch.c - is the device still there? The heartbeat's thread, the look, and what happens when the device is taken away.
 *
 * The thread raises the session's heartbeat, by which others see that this process lives; copies the counters to the session
 * page; gives back slots that the dead have left (pci_sweep.c); and looks for the device. The look costs no exit from the VM:
 * the device's process raises `host_heartbeat` in memory. Only where that stands still is a register read, which says all
 * ones when nobody answers. Then every call of this process answers CUDA_ERROR_DEVICE_UNAVAILABLE.
 *
 * Where the device is unplugged, kernels differ. Since about 5.12 Linux leaves the mappings as they are; nobody answers at their
 * addresses any more, reads say zeros or ones, and some day another device may lie there. Before, the kernel took the mappings
 * away, and whoever touched them got SIGBUS: also a program that merely filled a pinned buffer. In both cases ordinary memory is put
 * in their place: by the thread, which looks at the directory's magic number and at who owns the slot, or by a handler of
 * SIGBUS. A slot that is somebody else's by now (a host may take it from a process that was stopped for minutes) is left
 * the same way.
 *
 * The handler is chained: a SIGBUS at any other address is given to whoever had the signal before, and does what it would have
 * done. A program that installs its own handler later and does not chain, or blocks SIGBUS, may end when the device is
 * unplugged, as it would without us.
 *
 * Must never: read a register while memory says that all is well; run the program's code on the thread; block SIGBUS in a
 * thread of this library (a fault while it is blocked ends the process).
 */
#include "pci.h"

#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#define BEAT_NS 500000000ull
#define SWEEP_BEATS 4
#define STILL_NS 2000000000ull       /* that long without a host heartbeat: ask the register */
#define ASK_AGAIN_NS 1000000000ull
#define STACK_OWN (64u << 10)

static _Atomic bool lost;
static _Atomic bool beating; /* the thread runs */
static _Atomic uint32_t generation; /* of the thread: one that finds another number ends */
static int own_slot = -1;
static uint32_t own_token;
static struct {
    _Atomic uint32_t busy; /* a thread looks */
    uint64_t heartbeat, moved_ns, asked_ns;
} seen;

bool shim_device_is_lost(void) { return atomic_load_explicit(&lost, memory_order_relaxed); }

/* ---- regions and SIGBUS ---- */

static struct { _Atomic uintptr_t start; _Atomic size_t size; _Atomic bool replaced; } regions[PCI_REGIONS];
static struct sigaction chained;
static bool installed;

void pci_watch_region(enum pci_region region, void *start, uint64_t size)
{
    atomic_store(&regions[region].size, 0);
    atomic_store(&regions[region].start, (uintptr_t)start);
    atomic_store(&regions[region].replaced, false);
    atomic_store(&regions[region].size, size);
}

static bool is_ours(const void *address)
{
    for (unsigned i = 0; i < PCI_REGIONS; i++) {
        uintptr_t start = atomic_load(&regions[i].start);
        if ((uintptr_t)address - start < atomic_load(&regions[i].size)) return true;
    }
    return false;
}

/* Ordinary memory in the place of all regions. False: it cannot be had. */
static bool replace_regions(void)
{
    for (unsigned i = 0; i < PCI_REGIONS; i++) {
        size_t size = atomic_load(&regions[i].size);
        if (size == 0 || atomic_exchange(&regions[i].replaced, true)) continue; /* another thread does it: faults until it has */
        void *start = (void *)atomic_load(&regions[i].start);
        void *at = mmap(start, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
        if (at == MAP_FAILED) return false;
    }
    return true;
}

static void pass_on(int number, siginfo_t *information, void *context)
{
    sigset_t before;
    if ((chained.sa_flags & SA_SIGINFO) == 0 && chained.sa_handler == SIG_IGN && information->si_code <= 0) return;
    if ((chained.sa_flags & SA_SIGINFO) == 0 && (chained.sa_handler == SIG_DFL || chained.sa_handler == SIG_IGN)) {
        /* Back to how it was. A fault happens again when this returns; a signal that was sent must be sent again. */
        struct sigaction plain = {.sa_handler = SIG_DFL};
        sigaction(SIGBUS, &plain, NULL);
        if (information->si_code <= 0) raise(SIGBUS);
        return;
    }
    pthread_sigmask(SIG_BLOCK, &chained.sa_mask, &before);
    if ((chained.sa_flags & SA_SIGINFO) != 0)
        chained.sa_sigaction(number, information, context);
    else
        chained.sa_handler(number);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void on_bus_error(int number, siginfo_t *information, void *context)
{
    int saved = errno;
    if (information->si_code > 0 && is_ours(information->si_addr)) {
        /* First of all, so that whoever finds an empty page knows why. */
        atomic_store(&lost, true);
        pci_tell_lost();
        if (replace_regions()) {
            errno = saved;
            return;
        }
    }
    pass_on(number, information, context);
    errno = saved;
}

bool pci_watch_begin(void)
{
    atomic_store(&lost, false);
    seen.moved_ns = 0;
    pci_watch_region(PCI_REGION_REGISTERS, pci.registers, pci.registers_size);
    pci_watch_region(PCI_REGION_WINDOW, pci.window, PCI_WINDOW_SIZE);
    if (installed) return true;
    shim_stay_loaded(); /* a handler must not be unloaded */
    struct sigaction action = {.sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART};
    sigemptyset(&action.sa_mask);
    if (sigaction(SIGBUS, NULL, &chained) != 0 || sigaction(SIGBUS, &action, NULL) != 0) return false;
    installed = true;
    return true;
}

void pci_watch_end(void)
{
    atomic_fetch_add(&generation, 1);
    atomic_store(&beating, false);
    own_slot = -1;
    atomic_store(&seen.busy, 0); /* a forked child: whoever looked is not here */
    for (unsigned i = 0; i < PCI_REGIONS; i++) pci_watch_region(i, NULL, 0);
}

/* ---- looking ---- */

bool pci_look(void)
{
    if (shim_device_is_lost()) return false;
    if (atomic_exchange_explicit(&seen.busy, 1, memory_order_acquire) != 0) return true; /* another thread looks */
    uint64_t now = shim_now_ns(), heartbeat = __atomic_load_n(&pci.directory->host_heartbeat, __ATOMIC_RELAXED);
    bool gone = pci.directory->magic != VGPU_DIRECTORY_MAGIC;
    bool taken = own_slot >= 0 && __atomic_load_n(&pci_entry((uint32_t)own_slot)->token, __ATOMIC_RELAXED) != own_token;
    if (gone || taken) {
        /* No register is asked: another device may have its own there. */
    } else if (seen.moved_ns == 0 || heartbeat != seen.heartbeat) {
        seen.heartbeat = heartbeat;
        seen.moved_ns = now;
    } else if (now - seen.moved_ns >= STILL_NS && now - seen.asked_ns >= ASK_AGAIN_NS) {
        seen.asked_ns = now;
        gone = pci_load32(PCI_MAGIC) == PCI_GONE;
    }
    atomic_store_explicit(&seen.busy, 0, memory_order_release);
    if (gone || taken) {
        atomic_store(&lost, true);
        pci_tell_lost();
        (void)replace_regions();
        if (shim.page != NULL) __atomic_store_n(&shim.page->device_lost, 1, __ATOMIC_RELEASE);
        shim_log(SHIM_ERROR, taken && !gone ? "the slot is somebody else's now" : "nobody is behind the virtual GPU any more");
    }
    return !shim_device_is_lost();
}

void shim_look_for_device(void)
{
    if (!atomic_load_explicit(&beating, memory_order_relaxed)) (void)pci_look();
}

/* ---- the thread ---- */

static void *beat(void *argument)
{
    static struct pci_sweep sweep; /* one thread at a time */
    uint32_t mine = (uint32_t)(uintptr_t)argument;
    unsigned hopeful;
    memset(&sweep, 0, sizeof sweep);
    for (uint32_t turn = 0; !shim_is_torn_down() && atomic_load(&generation) == mine; turn++) {
        bool present = pci_look();
        shim_look_at_page();
        if (present) {
            __atomic_store_n(&shim.page->heartbeat, turn + 1, __ATOMIC_RELAXED);
            shim_counters_publish();
            if (turn % SWEEP_BEATS == 0) (void)pci_sweep(&sweep, own_slot, &hopeful);
        }
        shim_nap(BEAT_NS);
    }
    return NULL;
}

void pci_watch_start(uint32_t slot, uint32_t token)
{
    pthread_t thread;
    pthread_attr_t attributes;
    sigset_t before;
    own_token = token;
    own_slot = (int)slot;
    void *mine = (void *)(uintptr_t)atomic_load(&generation);
    long least = sysconf(_SC_THREAD_STACK_MIN); /* thread-local storage of the whole program included */
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, (least > 0 ? (size_t)least : 0) + STACK_OWN);
    shim_block_signals(&before);
    bool started = pthread_create(&thread, &attributes, beat, mine) == 0 || pthread_create(&thread, NULL, beat, mine) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    if (started) {
        pthread_setname_np(thread, "vgpu-heartbeat");
        pthread_detach(thread);
    } else {
        shim_log(SHIM_WARNING, "no thread for the heartbeat: others may take this session for dead");
    }
    atomic_store(&beating, started);
}
