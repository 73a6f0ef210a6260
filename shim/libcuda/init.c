/* SPDX-License-Identifier: Apache-2.0 */
/*
 * init.c - the life of the library in a process: cuInit, fork and exit.
 *
 * As with CUDA: before cuInit everything answers CUDA_ERROR_NOT_INITIALIZED; a child of a process that had called cuInit can
 * never use it again and gets the same; once the process is going down, calls (other libraries' atexit handlers make them)
 * answer CUDA_ERROR_DEINITIALIZED. The segment stays mapped to the very end, so that a late thread reads memory, not a hole.
 */
#include "core.h"
#include "_generated_prototypes.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <unistd.h>

_Atomic int shim_phase = SHIM_FRESH;

static pthread_mutex_t initialising = PTHREAD_MUTEX_INITIALIZER;
static _Atomic int reported_version; /* 0: nobody has asked yet */

CUresult shim_phase_error(void)
{
    switch (atomic_load_explicit(&shim_phase, memory_order_acquire)) {
    case SHIM_READY: return CUDA_SUCCESS;
    case SHIM_TORN_DOWN: return CUDA_ERROR_DEINITIALIZED;
    default: return CUDA_ERROR_NOT_INITIALIZED;
    }
}

bool shim_is_torn_down(void) { return atomic_load_explicit(&shim_phase, memory_order_acquire) == SHIM_TORN_DOWN; }

CUresult shim_enter(void)
{
    CUresult status = shim_enter_local();
    if (SHIM_UNLIKELY(status != CUDA_SUCCESS)) return status;
    if (SHIM_UNLIKELY(shim_self != NULL && shim_self->state.attention != 0)) {
        if ((shim_self->state.attention & SHIM_IN_CALLBACK) != 0) return CUDA_ERROR_NOT_PERMITTED;
        shim_self->encode_began = shim_ticks();
    }
    return shim_session_error();
}

CUresult shim_enter_context(void)
{
    CUresult status = shim_enter();
    if (SHIM_UNLIKELY(status != CUDA_SUCCESS)) return status;
    uint64_t handle = shim_current_context_id();
    if (SHIM_UNLIKELY(handle == 0)) return CUDA_ERROR_INVALID_CONTEXT;
    const struct shim_context *context = shim_context_find(handle);
    if (SHIM_UNLIKELY(context == NULL || atomic_load_explicit(&context->active, memory_order_acquire) == 0))
        return CUDA_ERROR_CONTEXT_IS_DESTROYED;
    return CUDA_SUCCESS;
}

/* ---- cuInit ---- */

/* A library with threads in it, thread-local destructors and fork handlers cannot be unloaded: stay. */
void shim_stay_loaded(void)
{
    Dl_info self;
    if (dladdr((const void *)&shim_phase, &self) != 0 && self.dli_fname != NULL)
        (void)dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_NODELETE);
}

/* A thread may be waiting in cuInit, for a mediator that is BUSY, for as long as it likes: fork does not wait for it. */
static __thread bool fork_holds_lock __attribute__((tls_model("initial-exec")));

static void before_fork(void) { fork_holds_lock = pthread_mutex_trylock(&initialising) == 0; }

static void in_parent(void)
{
    if (fork_holds_lock) pthread_mutex_unlock(&initialising);
}

static void in_child(void)
{
    int phase = atomic_load(&shim_phase);
    if (phase == SHIM_READY) {
        atomic_store(&shim_phase, SHIM_FORKED);
        shim_thread_fork_child();
        vgpu_private_fork_child();
    }
    shim_session_fork_child(); /* also what another thread had half made */
    if (fork_holds_lock)
        pthread_mutex_unlock(&initialising);
    else
        pthread_mutex_init(&initialising, NULL); /* whoever holds it does not exist here */
}

__attribute__((constructor)) static void at_load(void) { pthread_atfork(before_fork, in_parent, in_child); }

__attribute__((destructor)) void shim_tear_down(void)
{
    int phase = atomic_exchange(&shim_phase, SHIM_TORN_DOWN);
    if (phase != SHIM_READY) return;
    shim_ring_goodbye();
    shim_session_release();
}

CUresult shim_initialise(void)
{
    if (atomic_load_explicit(&shim_phase, memory_order_acquire) == SHIM_READY) return CUDA_SUCCESS;
    pthread_mutex_lock(&initialising);
    CUresult status = CUDA_SUCCESS;
    switch (atomic_load(&shim_phase)) {
    case SHIM_READY: break;
    case SHIM_FORKED: status = CUDA_ERROR_NOT_INITIALIZED; break;
    case SHIM_TORN_DOWN: status = CUDA_ERROR_DEINITIALIZED; break;
    default: {
        const char *visible = secure_getenv("CUDA_VISIBLE_DEVICES");
        if (visible != NULL && visible[0] == '\0') {
            status = CUDA_ERROR_NO_DEVICE; /* nothing to attach for */
            shim_log_once(SHIM_INFO, "no device: CUDA_VISIBLE_DEVICES is empty");
            break;
        }
        shim_wait_configure();
        status = shim_session_attach();
        if (status != CUDA_SUCCESS) break;
        int shown[1];
        shim_devices = shim_visible_devices(visible, &shim.device->uuid, 1, shown);
        if (shim_devices <= 0) {
            status = shim_devices < 0 ? CUDA_ERROR_INVALID_DEVICE : CUDA_ERROR_NO_DEVICE;
            shim_log_once(SHIM_INFO, "no device: CUDA_VISIBLE_DEVICES is \"%.200s\", which leaves none", visible);
            shim_devices = 0;
            shim_session_detach();
            break;
        }
        shim_times_attach();
        shim_ring_attach();
        shim_fence_attach();
        shim_primary_attach();
        shim_stay_loaded();
        /* exchange: a process that exits while another thread initialises stays torn down */
        int fresh = SHIM_FRESH;
        if (!atomic_compare_exchange_strong(&shim_phase, &fresh, SHIM_READY)) status = shim_phase_error();
        if (status == CUDA_SUCCESS) shim_session_started();
    }
    }
    pthread_mutex_unlock(&initialising);
    return status;
}

CUresult cuInit(unsigned int Flags)
{
    if (Flags != 0) return CUDA_ERROR_INVALID_VALUE;
    return shim_initialise();
}

/* The version is one for the whole process, from the first question on: the runtime hashes it (integrity_check.c), and may ask
 * before cuInit. Then a probe tells, which costs the host nothing; without a mediator it is simply what this library speaks. */
int shim_reported_version(void)
{
    int version = atomic_load_explicit(&reported_version, memory_order_acquire);
    if (SHIM_LIKELY(version != 0)) return version;
    pthread_mutex_lock(&initialising);
    version = atomic_load(&reported_version);
    if (version == 0) {
        int host = atomic_load(&shim_phase) == SHIM_READY ? (int)shim.device->driver_version
                   : atomic_load(&shim_phase) == SHIM_FRESH ? shim_session_probe_version()
                                                            : 0;
        version = host > 0 && host < SHIM_API_VERSION ? host : SHIM_API_VERSION;
        atomic_store_explicit(&reported_version, version, memory_order_release);
    }
    pthread_mutex_unlock(&initialising);
    return version;
}

CUresult cuDriverGetVersion(int *driverVersion)
{
    if (driverVersion == NULL) return CUDA_ERROR_INVALID_VALUE;
    if (shim_is_torn_down()) return CUDA_ERROR_DEINITIALIZED;
    *driverVersion = shim_reported_version();
    return CUDA_SUCCESS;
}
