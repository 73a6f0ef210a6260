/* SPDX-License-Identifier: Apache-2.0 */
/*
 * throttle.c - bounds the work a session has on the GPU while others wait for it, so that a lease that ends soon ends soon
 * on the device too. After each STRIDE launches an event is recorded behind them; the next stride is not begun before
 * the event of the one before is done. Alone on the GPU nothing of this happens.
 *
 * The wait is bounded: kernels may wait for something that a later record brings, and then the later record must come.
 */
#include "internal.h"

#define STRIDE 32u
#define LONGEST_WAIT_NS 5000000ull

void replay_throttle(struct vgpu_replay *replay, const struct vgpu_call *call)
{
    struct replay_private *private = replay->private;
    /* A graph stands for many kernels. */
    bool is_graph = call->call == VGPU_CALL_cuGraphLaunch;
    private->launches_since_marker += is_graph ? STRIDE : 1;
    if (private->launches_since_marker < STRIDE || private->error != 0)
        return;
    private->launches_since_marker = 0;
    uint64_t handle = call->argument[is_graph ? 1 : 5];
    void *stream = NULL;
    if ((handle != 0 && !replay_lookup(replay, VGPU_KIND_STREAM, handle, &stream)) || replay_is_capturing(replay, stream))
        return;
    if (private->marker != NULL) {
        uint64_t began = replay_now_ns();
        while (private->error == 0 && replay->driver.cuEventQuery(private->marker) == CUDA_ERROR_NOT_READY &&
               replay_now_ns() - began < LONGEST_WAIT_NS && atomic_load_explicit(&private->stop, memory_order_relaxed) == 0) {
            replay_poll_words(replay); /* others of this session sleep until their fences come */
            nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL);
        }
        replay_give_event(replay, private->marker, private->marker_context);
        private->marker = NULL;
    }
    void *event = replay_take_event(replay);
    if (event != NULL && replay->driver.cuEventRecord(event, stream) == 0) {
        private->marker = event;
        private->marker_context = private->current;
    } else if (event != NULL) {
        replay_give_event(replay, event, private->current);
    }
}
