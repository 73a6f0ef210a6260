/* SPDX-License-Identifier: Apache-2.0 */
/*
 * throttle.c - bounds the work a session has on the GPU while others are there, so that a lease that ends soon ends soon on
 * the device too. Launches are counted in strides; an event is recorded behind each stride, and the one after the next is
 * not begun before it is done: two strides are queued at most. The length of a stride follows the kernels, so that it
 * takes the device half of the bound, or is a single launch. A session that is the only one has no bound and no strides.
 *
 * Each wait is bounded: kernels may wait for something that a later record brings, and then the later record must come.
 */
#include "internal.h"

#define FIRST_STRIDE 8u
#define LONGEST_STRIDE 128u /* of the shortest kernels these take a quarter of a millisecond */
#define LONGEST_WAIT_NS 5000000ull
#define DEFAULT_BOUND_NS 500000ull /* for leases that name none */
#define NAP_NS 10000

/* The stride before the marker took the device `took` ns, or at most so long. */
static void adapt(struct replay_private *private, uint64_t took)
{
    uint64_t wanted = (private->in_flight_ns != 0 ? private->in_flight_ns : DEFAULT_BOUND_NS) / 2;
    unsigned stride = private->stride;
    if (took > wanted)
        stride = (unsigned)(stride * wanted / took);
    else if (took < wanted / 2)
        stride *= 2;
    private->stride = stride < 1 ? 1 : stride > LONGEST_STRIDE ? LONGEST_STRIDE : stride;
}

/* Waits for the marker, if it can be waited for. */
static void wait_for_marker(struct vgpu_replay *replay)
{
    struct replay_private *private = replay->private;
    uint64_t began = replay_now_ns(), now = began;
    bool waited = false, done = false;
    while (private->error == 0 && atomic_load_explicit(&private->stop, memory_order_relaxed) == 0) {
        done = replay->driver.cuEventQuery(private->marker) != CUDA_ERROR_NOT_READY;
        now = replay_now_ns();
        if (done || now - began >= LONGEST_WAIT_NS)
            break;
        waited = true;
        replay_poll_words(replay); /* others of this session sleep until their fences come */
        /* One stride is left on the device: a nap that lasts too long would leave it idle. */
        if (private->spin_ns >= SPIN_WORTHWHILE_NS)
            for (unsigned i = 0; i < 32; i++)
                __builtin_ia32_pause();
        else
            nanosleep(&(struct timespec){.tv_nsec = NAP_NS}, NULL);
    }
    /* Between two markers that were waited for the device did nothing but the stride between them. */
    if (!done)
        adapt(private, LONGEST_WAIT_NS * private->stride);
    else if (!waited && now - private->stride_began_ns < DEFAULT_BOUND_NS / 2)
        adapt(private, now - private->stride_began_ns);
    else if (waited)
        adapt(private, now - (private->marker_done_ns != 0 ? private->marker_done_ns : private->stride_began_ns));
    private->marker_done_ns = waited && done ? now : 0;
    replay_give_event(replay, private->marker, private->marker_context);
    private->marker = NULL;
}

void replay_throttle_anew(struct vgpu_replay *replay)
{
    struct replay_private *private = replay->private;
    if (private->marker != NULL)
        replay_give_event(replay, private->marker, private->marker_context);
    private->marker = NULL;
    private->launches_since_marker = private->launched_count = 0;
    private->marker_done_ns = 0;
    private->next_stride_ns = replay_now_ns();
}

/* Records the event behind all launches since the last marker, in whichever streams they are. */
static bool record_behind(struct vgpu_replay *replay, void *event)
{
    struct replay_private *private = replay->private;
    unsigned before = private->current, found = 0;
    void *helper = private->launched_count > 1 ? replay_helper_stream(replay, before) : NULL;
    bool recorded = false;
    for (unsigned i = 0; i < private->launched_count; i++) {
        void *stream = NULL, *own = NULL;
        uint64_t handle = private->launched[i].handle;
        if ((handle != 0 && !replay_lookup(replay, VGPU_KIND_STREAM, handle, &stream)) ||
            !replay_select_context(replay, private->launched[i].slot) || replay_is_capturing(replay, stream))
            continue;
        found++;
        if (helper == NULL)
            recorded = private->current == before && replay->driver.cuEventRecord(event, stream) == 0;
        else if ((own = replay_take_event(replay)) != NULL) {
            if (replay->driver.cuEventRecord(own, stream) == 0)
                (void)replay->driver.cuStreamWaitEvent(helper, own, 0);
            replay_give_event(replay, own, private->current);
        }
    }
    replay_select_context(replay, before);
    return helper != NULL ? found != 0 && replay->driver.cuEventRecord(event, helper) == 0 : recorded;
}

void replay_throttle(struct vgpu_replay *replay, const struct vgpu_call *call)
{
    struct replay_private *private = replay->private;
    if (private->stride == 0)
        private->stride = FIRST_STRIDE;
    /* A graph stands for many kernels. */
    bool is_graph = call->call == VGPU_CALL_cuGraphLaunch;
    private->launches_since_marker += is_graph ? private->stride : 1;
    if (private->error != 0)
        return;
    uint64_t handle = call->argument[is_graph ? 1 : 5];
    unsigned known = 0;
    while (known < private->launched_count &&
           (private->launched[known].handle != handle || private->launched[known].slot != private->current))
        known++;
    if (known == private->launched_count) {
        private->launched[known].handle = handle;
        private->launched[known].slot = private->current;
        private->launched_count++;
    }
    bool is_full = private->launched_count == sizeof private->launched / sizeof *private->launched;
    if (private->launches_since_marker < private->stride && !is_full)
        return;
    private->launches_since_marker = 0;
    if (private->marker != NULL)
        wait_for_marker(replay);
    void *event = replay_take_event(replay);
    private->stride_began_ns = private->next_stride_ns;
    private->next_stride_ns = replay_now_ns();
    if (event != NULL && record_behind(replay, event)) {
        private->marker = event;
        private->marker_context = private->current;
    } else if (event != NULL) {
        replay_give_event(replay, event, private->current);
    }
    private->launched_count = 0;
}
