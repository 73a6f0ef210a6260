/* SPDX-License-Identifier: Apache-2.0 */
/*
 * host_function.c - functions of the program that the GPU's streams call: cuLaunchHostFunc, cuStreamAddCallback, host nodes.
 *
 * The worker's driver calls a function of the worker, which posts an entry in the session page and waits. One thread of
 * ours, started with the first host function of the process, runs the entries and says when each is done; the stream
 * goes on then. Inside a function CUDA calls are refused (SHIM_IN_CALLBACK), as CUDA does.
 *
 * Waking is by futex where both sides run on one kernel; a time-out makes up for a wake that is lost. In a VM the thread looks
 * again and again, but only while something can come: a function was launched and has not run, or a graph with one was
 * launched lately. It sleeps an eighth of the time since then, so that a host that takes long is not asked often.
 */
#include "code.h"
#include "core.h"

#include <errno.h>
#include <linux/futex.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define POLL_EAGER_NS 1000000ll   /* host functions are expected, or a deferred release waits for the GPU */
#define POLL_IDLE_NS 100000000ll
#define EAGER_ROUNDS 2000         /* about two seconds after the last of them */
#define FIRST_NAP_NS 30000ull     /* in a VM */
#define LONGEST_NAP_NS 2000000ull
#define PATIENT_AFTER_NS 5000000000ull
#define PATIENT_NAP_NS 20000000ull
#define NAP_SHARE 8

/* Work for after the GPU has finished what was submitted. */
struct deferred {
    struct deferred *next;
    struct shim_fence fence;
    void (*destroy)(void *);
    void *user;
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static struct deferred *deferred_list;
static bool running;
static pid_t running_in;
static _Atomic uint32_t expected; /* rounds for which to look often */
/* In a VM. */
static _Atomic uint32_t outstanding; /* functions launched that have not run; one too many for each that was refused later */
static _Atomic uint32_t called;      /* futex word of this process: something may come */
static _Atomic uint64_t called_ns;
static _Atomic bool in_graphs;       /* a graph has such a function, so any launch of a graph may bring one */

static void call_thread(void)
{
    if (!shim_in_vm()) return;
    atomic_store(&called_ns, shim_now_ns());
    atomic_fetch_add(&called, 1);
    (void)syscall(SYS_futex, &called, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

void shim_callbacks_graph_launched(void)
{
    if (atomic_load_explicit(&in_graphs, memory_order_relaxed)) call_thread();
}

CUresult shim_callbacks_for_graph(void)
{
    atomic_store(&in_graphs, true);
    return shim_callbacks_start();
}

static void one_has_run(void)
{
    uint32_t count = atomic_load(&outstanding);
    while (count != 0 && !atomic_compare_exchange_weak(&outstanding, &count, count - 1)) continue;
    atomic_store(&called_ns, shim_now_ns());
}

/* Until there may be something to do: `seen` is the number of calls known of. */
static void rest_in_vm(uint32_t seen, bool deferred)
{
    const uint64_t since = shim_now_ns() - atomic_load(&called_ns);
    const bool graphs = atomic_load(&in_graphs);
    const bool coming = deferred || graphs || atomic_load(&outstanding) != 0;
    uint64_t nap = since / NAP_SHARE;
    const uint64_t longest = since < PATIENT_AFTER_NS ? LONGEST_NAP_NS : PATIENT_NAP_NS;
    if (nap > longest) nap = longest;
    if (nap < FIRST_NAP_NS) nap = FIRST_NAP_NS;
    const struct timespec timeout = {.tv_nsec = (long)nap};
    (void)syscall(SYS_futex, &called, FUTEX_WAIT_PRIVATE, seen, coming ? &timeout : NULL, NULL, 0);
}

static void run_entry(struct vgpu_callback *entry)
{
    uint32_t posted = VGPU_CALLBACK_POSTED;
    /* SAFETY: acquire pairs with the worker's release store of POSTED: the entry is filled in. */
    if (!__atomic_compare_exchange_n(&entry->state, &posted, VGPU_CALLBACK_RUNNING, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) return;
    struct shim_thread *thread = shim_thread();
    thread->attention |= SHIM_IN_CALLBACK;
    if (entry->kind == 0) {
        const CUhostFn function = (CUhostFn)(uintptr_t)entry->function;
        function((void *)(uintptr_t)entry->user);
    } else {
        const CUstreamCallback function = (CUstreamCallback)(uintptr_t)entry->function;
        function(CODE_HANDLE(CUstream, entry->stream), (CUresult)entry->status, (void *)(uintptr_t)entry->user);
    }
    thread->attention &= (uint8_t)~SHIM_IN_CALLBACK;
    /* What the function has put into pinned memory comes before the word that says it has run. */
    if (shim.combining) __builtin_ia32_sfence();
    __atomic_store_n(&entry->state, VGPU_CALLBACK_DONE, __ATOMIC_RELEASE);
    if (shim_in_vm())
        one_has_run();
    else
        (void)syscall(SYS_futex, &entry->state, FUTEX_WAKE, 1, NULL, NULL, 0);
}

/* Takes out of the list what the GPU is done with. Everything, once the session has ended. */
static bool run_deferred(bool all)
{
    struct deferred *due = NULL;
    pthread_mutex_lock(&mutex);
    for (struct deferred **at = &deferred_list; *at != NULL;) {
        struct deferred *item = *at;
        if (!all && !shim_fence_done(&item->fence)) {
            at = &item->next;
            continue;
        }
        *at = item->next;
        item->next = due;
        due = item;
    }
    const bool left = deferred_list != NULL;
    pthread_mutex_unlock(&mutex);
    while (due != NULL) {
        struct deferred *next = due->next;
        shim_fence_free(&due->fence);
        due->destroy(due->user);
        free(due);
        due = next;
    }
    return left;
}

static void *callback_thread(void *unused)
{
    (void)unused;
    struct vgpu_session_page *page = shim.page;
    while (!shim_is_torn_down()) {
        const uint32_t seen = shim_in_vm() ? atomic_load(&called) : __atomic_load_n(&page->callback_wake, __ATOMIC_ACQUIRE);
        bool ran = false;
        for (unsigned i = 0; i < VGPU_CALLBACK_ENTRIES; i++)
            if (__atomic_load_n(&page->callback[i].state, __ATOMIC_RELAXED) == VGPU_CALLBACK_POSTED) {
                run_entry(&page->callback[i]);
                ran = true;
            }
        const bool over = __atomic_load_n(&page->state, __ATOMIC_ACQUIRE) != VGPU_SESSION_READY;
        const bool waiting = run_deferred(over);
        if (ran) continue;
        if (shim_in_vm()) {
            if (over) atomic_store(&outstanding, 0);
            rest_in_vm(seen, waiting);
            continue;
        }
        uint32_t rounds = atomic_load_explicit(&expected, memory_order_relaxed);
        if (rounds != 0) atomic_compare_exchange_strong(&expected, &rounds, rounds - 1);
        const struct timespec timeout = {.tv_nsec = rounds != 0 || waiting ? POLL_EAGER_NS : POLL_IDLE_NS};
        if (syscall(SYS_futex, &page->callback_wake, FUTEX_WAIT, seen, &timeout, NULL, 0) == 0)
            atomic_store_explicit(&expected, EAGER_ROUNDS, memory_order_relaxed);
    }
    return NULL;
}

CUresult shim_callbacks_start(void)
{
    pthread_mutex_lock(&mutex);
    if (running && running_in != getpid()) running = false; /* a child of fork has no such thread */
    if (!running) {
        pthread_t thread;
        sigset_t before;
        shim_block_signals(&before);
        running = pthread_create(&thread, NULL, callback_thread, NULL) == 0;
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        running_in = getpid();
        if (running) pthread_detach(thread);
    }
    const bool started = running;
    pthread_mutex_unlock(&mutex);
    atomic_store_explicit(&expected, EAGER_ROUNDS, memory_order_relaxed);
    call_thread();
    return started ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

void shim_callbacks_defer(void (*destroy)(void *), void *user)
{
    struct deferred *item = calloc(1, sizeof *item);
    if (item != NULL && shim_enter_context() == CUDA_SUCCESS && shim_fence_new(&item->fence) == CUDA_SUCCESS) {
        const uint64_t argument[8] = {item->fence.index, item->fence.value};
        if (shim_async(VGPU_CALL_wireFenceContext, argument, NULL, 0) == CUDA_SUCCESS) {
            item->destroy = destroy;
            item->user = user;
            pthread_mutex_lock(&mutex);
            item->next = deferred_list;
            deferred_list = item;
            pthread_mutex_unlock(&mutex);
            if (shim_callbacks_start() == CUDA_SUCCESS) return;
            (void)run_deferred(true);
            return;
        }
    }
    free(item);
    destroy(user); /* no context, so nothing runs that could still use it */
}

static CUresult launch(CUstream hStream, void *function, void *user, unsigned kind)
{
    CUresult status = (uintptr_t)hStream <= 2 ? shim_enter_context() : shim_enter();
    if (status != CUDA_SUCCESS) return status;
    if (function == NULL) return CUDA_ERROR_INVALID_VALUE;
    uint64_t stream;
    if ((status = shim_stream(hStream, &stream)) != CUDA_SUCCESS) return status;
    if ((status = shim_callbacks_start()) != CUDA_SUCCESS) return status;
    const uint64_t argument[8] = {stream, (uint64_t)(uintptr_t)function, (uint64_t)(uintptr_t)user, kind, (uint64_t)(uintptr_t)hStream};
    if (atomic_load_explicit(&shim_captures_active, memory_order_relaxed) == 0) {
        status = shim_async(VGPU_CALL_wireHostFunction, argument, NULL, 0);
        if (status == CUDA_SUCCESS) {
            atomic_fetch_add(&outstanding, 1);
            call_thread();
        }
        return status;
    }
    atomic_store(&in_graphs, true);
    if (kind == 1 && shim_stream_is_capturing(stream)) return shim_capture_forbid(stream);
    return shim_reply(VGPU_CALL_wireHostFunction, argument, NULL, 0, NULL, NULL, 0, NULL);
}

CUresult cuLaunchHostFunc(CUstream hStream, void *fn, void *userData) { return launch(hStream, fn, userData, 0); }

CUresult cuStreamAddCallback(CUstream hStream, void *callback, void *userData, unsigned int flags)
{
    return flags != 0 ? CUDA_ERROR_INVALID_VALUE : launch(hStream, callback, userData, 1);
}
