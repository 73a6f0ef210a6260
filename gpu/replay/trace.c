/* SPDX-License-Identifier: Apache-2.0 */
/*
 * trace.c - what a session does, event by event, for whoever looks (wire.h: the trace). Off it is one load and one branch
 * that is never taken for each record. On it is a look at the clock (two for a record that did not come at once after another)
 * and a store of 32 bytes.
 *
 * Only the replay thread writes events. The control thread says how many there may be; it never takes the memory away,
 * so that the replay thread may finish an event after it was switched off.
 */
#include "internal.h"
#include "session.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/stat.h>

#define AHEAD 16u /* events */
#define BUSY_SLICE_NS 10000000ull /* of a device that is never idle something is to be seen, too */

int vgpu_replay_trace_map(struct vgpu_replay *replay, int trace_fd)
{
    struct stat file;
    if (replay->private->trace_map != NULL)
        return EINVAL;
    if (fstat(trace_fd, &file) != 0)
        return errno;
    if (file.st_size < (off_t)VGPU_TRACE_FILE_SIZE)
        return EINVAL;
    void *mapped = mmap(NULL, VGPU_TRACE_FILE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, trace_fd, 0);
    if (mapped == MAP_FAILED)
        return errno;
    struct vgpu_trace_head *trace = mapped;
    trace->event_size = sizeof(struct vgpu_trace_event);
    trace->capacity = VGPU_TRACE_CAPACITY;
    trace->magic = VGPU_TRACE_MAGIC;
    replay->private->trace_map = trace;
    return 0;
}

void vgpu_replay_trace(struct vgpu_replay *replay, uint64_t events)
{
    struct replay_private *private = replay->private;
    struct vgpu_trace_head *trace = private->trace_map;
    if (trace == NULL)
        return;
    uint64_t head = atomic_load_explicit(replay_quad(&trace->head), memory_order_relaxed);
    atomic_store_explicit(replay_quad(&trace->limit), head + events, memory_order_relaxed);
    /* SAFETY: release: the replay thread finds the limit when it finds the trace. */
    atomic_store_explicit(&private->trace, events != 0 ? trace : NULL, memory_order_release);
}

void replay_trace(struct vgpu_replay *replay, enum vgpu_trace_kind kind, uint32_t call, uint64_t begin_ns, uint64_t end_ns, uint64_t detail)
{
    struct vgpu_trace_head *trace = replay_tracing(replay);
    if (trace == NULL)
        return;
    uint64_t head = trace->head; /* nobody else writes it */
    if (head >= atomic_load_explicit(replay_quad(&trace->limit), memory_order_relaxed)) {
        trace->missed++;
        return;
    }
    struct vgpu_trace_event *ring = (struct vgpu_trace_event *)(void *)((uint8_t *)trace + VGPU_TRACE_HEAD_SIZE);
    ring[head & (VGPU_TRACE_CAPACITY - 1)] =
        (struct vgpu_trace_event){.begin_ns = begin_ns, .end_ns = end_ns, .detail = detail, .kind = kind, .call = call};
    /* A reader on another processor has the lines of the round before: they are asked back before they are wanted. */
    __builtin_prefetch(&ring[(head + AHEAD) & (VGPU_TRACE_CAPACITY - 1)], 1);
    /* SAFETY: release: who sees the count sees the event. */
    atomic_store_explicit(replay_quad(&trace->head), head + 1, memory_order_release);
}

static uint64_t stream_of(const struct vgpu_call *call)
{
    switch (call->call) {
    case VGPU_CALL_wireLaunch: return call->argument[5];
    case VGPU_CALL_cuGraphLaunch: return call->argument[1];
    case VGPU_CALL_wireFence:
    case VGPU_CALL_wireCopy3D:
    case VGPU_CALL_wireHostFunction: return call->argument[0];
    case VGPU_CALL_wireCopyInline: return call->argument[2];
    case VGPU_CALL_wireCopyToDevice:
    case VGPU_CALL_wireCopyFromDevice:
    case VGPU_CALL_wireCopyDevice: return call->argument[3];
    case VGPU_CALL_wireMemset: return call->argument[6];
    default: return 0;
    }
}

uint64_t replay_trace_call(struct vgpu_replay *replay, const struct vgpu_call *call, uint64_t begin_ns)
{
    uint64_t now = replay_now_ns();
    replay_trace(replay, VGPU_TRACE_CALL, call->call, begin_ns, now, stream_of(call));
    return now;
}

void replay_trace_busy(struct vgpu_replay *replay, uint64_t since_ns, uint64_t now, bool is_over)
{
    struct replay_private *private = replay->private;
    if (private->trace_busy_ns < since_ns - BUSY_SLICE_NS) /* none, or one that an earlier trace left */
        private->trace_busy_ns = since_ns;
    if (!is_over && now - private->trace_busy_ns < BUSY_SLICE_NS)
        return;
    if (now > private->trace_busy_ns)
        replay_trace(replay, VGPU_TRACE_BUSY, 0, private->trace_busy_ns, now, 0);
    private->trace_busy_ns = is_over ? 0 : now;
}
