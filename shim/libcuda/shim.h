/* SPDX-License-Identifier: Apache-2.0 */
/*
 * shim.h - what every file of libcuda.so.1 may use: the session, how a call is submitted, how a thread
 * waits, handles, contexts and the allocation table. One session per process; one ring, one total order.
 *
 * By hand, in this folder:
 *   gcc -std=gnu11 -O2 -fPIC -shared -pthread -fvisibility=hidden -Wall -Wextra -D_GNU_SOURCE *.c -o libcuda.so.1 \
 *       -Wl,-soname,libcuda.so.1,--version-script=libcuda.map,-z,defs
 */
#ifndef VGPU_SHIM_H
#define VGPU_SHIM_H

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "../../transport/_generated_calls.h"
#include "../../transport/wire.h"
#include "cuda_types.h"

/* ---- session (session.c) ---- */

struct shim_session {
    uint8_t *base; /* the segment as mapped here */
    const struct vgpu_device_page *device;
    struct vgpu_session_page *page;
    const struct vgpu_session_page *told; /* for `state` and the errors: page, or a copy where that is slow to read */
    uint8_t *ring;
    uint64_t ring_mask;
    struct vgpu_slot *slots;
    uint64_t *fences;
    uint8_t *arena; /* guest address of arena byte 0 */
    uint64_t arena_offset, arena_size, worker_address;
    struct shim_counters *counters;
    int lifeline;   /* socket to the worker: doorbell, and its end is the other's death; -1 in a VM */
    bool identical; /* the segment lies at worker_address here: host pointer == device pointer */
    /* In a VM (session_pci.c) the segment is memory of a PCI device. */
    bool combining; /* ring and arena are mapped write-combining: stores to them are ordered by fences only */
    bool uncached;  /* and the processor heeds it: reading them is slow */
    volatile uint32_t *doorbell; /* register to ring with; NULL where there is a lifeline, and that tells the two apart */
};
extern struct shim_session shim;
static inline bool shim_in_vm(void) { return shim.doorbell != NULL; }

/* cuInit's work: find a mediator, attach, map. Idempotent and thread-safe. CUDA_ERROR_NO_DEVICE without one. */
CUresult shim_initialise(void);
/* Is the library initialised, alive, and free of a sticky error? Every entry that needs the device begins so. */
CUresult shim_enter(void);
/* The same, and the calling thread has a current context (else CUDA_ERROR_INVALID_CONTEXT), which the ring is
 * told of if the last record ran under another one. */
CUresult shim_enter_context(void);
/* Answer of a refused function: counts it by name, returns CUDA_ERROR_NOT_SUPPORTED. */
CUresult shim_refuse(unsigned call_id);
bool shim_is_torn_down(void);

/* ---- what is said on standard error, where VGPU_LOG asks for it (log.c) ---- */

enum shim_log_level { SHIM_ERROR = 1, SHIM_WARNING, SHIM_INFO, SHIM_DEBUG };
void shim_log(enum shim_log_level level, const char *format, ...) __attribute__((format(printf, 2, 3)));
bool shim_first_time(_Atomic int *said); /* true once in each process */
/* The same, and each place of the source says it once in a process: programs ask again and again for a device. */
#define shim_log_once(level, ...)                                  \
    do {                                                           \
        static _Atomic int said_here;                              \
        if (shim_first_time(&said_here)) shim_log(level, __VA_ARGS__); \
    } while (0)

/* Blocks all signals but the one that says a VM's device is gone; around the start of a thread of this library. thread.c */
void shim_block_signals(sigset_t *before);

/* ---- submission (ring.c). All of them are safe from any thread; order of return is order of replay. ---- */

/* One record, nobody waits. payload (length <= VGPU_INLINE_LIMIT) is copied before the call returns.
 * Blocks only while the ring is full or the host says BUSY. */
CUresult shim_async(unsigned call, const uint64_t argument[8], const void *payload, uint32_t length);
/* The same with two payload parts, for callers that would otherwise have to join them first. */
CUresult shim_async2(unsigned call, const uint64_t argument[8], const void *a, uint32_t a_length, const void *b, uint32_t b_length);
/* One round trip. Up to 4 values come back in value (may be NULL); reply payload, cut to `capacity`, in reply,
 * its true length in *reply_length (may be NULL). Returns the driver's status, or the sticky error if the
 * session dies while waiting. */
CUresult shim_reply(unsigned call, const uint64_t argument[8], const void *payload, uint32_t length, uint64_t value[4],
                    void *reply, uint32_t capacity, uint32_t *reply_length);

/* A fence is a word in the segment the GPU (or the worker) stores a value into. */
struct shim_fence { uint32_t index; uint64_t value; };
CUresult shim_fence_new(struct shim_fence *fence);      /* reserves a word */
bool shim_fence_done(const struct shim_fence *fence);
CUresult shim_fence_wait(const struct shim_fence *fence); /* spins, then sleeps; wakes on a dead or faulted session */
void shim_fence_free(const struct shim_fence *fence);     /* only once done, or the session is dead */
/* The first error an asynchronous call left behind, once: reported by the next synchronizing call. */
CUresult shim_take_deferred(CUresult status);

/* ---- per-thread state (thread.c) ---- */

#define SHIM_CONTEXT_DEPTH 64
#define SHIM_IN_CALLBACK 1u /* the thread runs a host function: shim_enter answers CUDA_ERROR_NOT_PERMITTED */
#define SHIM_MEASURED 2u    /* its next call is measured (times.c) */
struct shim_thread {
    uint64_t context[SHIM_CONTEXT_DEPTH]; /* handles; [depth-1] is current */
    unsigned depth;
    bool default_is_per_thread;  /* inside a ptsz/ptds entry */
    uint64_t per_thread_stream;  /* real stream behind CU_STREAM_PER_THREAD, made on first use */
    uint64_t per_thread_context; /* the context it belongs to */
    unsigned capture_mode;       /* cuThreadExchangeStreamCaptureMode */
    uint8_t attention;           /* SHIM_IN_CALLBACK, SHIM_MEASURED: what shim_enter has to see to */
};
struct shim_thread *shim_thread(void);
static inline void shim_restore_default(bool *saved) { shim_thread()->default_is_per_thread = *saved; }
#define SHIM_PER_THREAD_STREAM                                                                   \
    bool saved_default __attribute__((cleanup(shim_restore_default))) = shim_thread()->default_is_per_thread; \
    shim_thread()->default_is_per_thread = true
/* Stream argument -> wire id. 0 and CU_STREAM_LEGACY give 0 (or the thread's own stream inside a ptsz entry),
 * CU_STREAM_PER_THREAD the thread's own stream. Unknown or destroyed: CUDA_ERROR_INVALID_HANDLE. */
CUresult shim_stream(CUstream stream, uint64_t *id);
/* For entries without a stream parameter (cuMemcpyHtoD, cuMemsetD8, ...): the default stream they run on. */
CUresult shim_default_stream(uint64_t *id);
uint64_t shim_current_context_id(void); /* 0: none */

/* ---- handles (handle.c) ---- */

/* A guest-side object behind a handle. `data` belongs to the subject file that created it. */
struct shim_object { uint64_t handle; uint64_t context; void *data; uint32_t flags; int32_t priority; };
uint64_t shim_handle_new(unsigned kind, void *data, struct shim_object **object); /* 0 when out of handles */
bool shim_handle_adopt(uint64_t host_chosen, void *data);  /* records a worker-chosen handle as valid */
void shim_handle_free(uint64_t handle);
bool shim_handle_valid(unsigned kind, uint64_t handle);
struct shim_object *shim_object(unsigned kind, uint64_t handle); /* NULL when not valid; lock-free */
void shim_handle_each(unsigned kind, void (*visit)(struct shim_object *, void *), void *user);

/* ---- allocation table (memory_map.c): what a pointer is, answered in the guest ---- */

enum shim_range_kind { SHIM_RANGE_DEVICE = 1, SHIM_RANGE_PINNED, SHIM_RANGE_REGISTERED, SHIM_RANGE_RESERVED, SHIM_RANGE_MANAGED, SHIM_RANGE_POOL, SHIM_RANGE_GRAPH };
struct shim_range {
    uint64_t base, size;         /* as the application sees it */
    uint64_t device_address;     /* of base; differs from base only for pinned memory without identity */
    uint64_t context, id;        /* id: CU_POINTER_ATTRIBUTE_BUFFER_ID */
    uint32_t kind, flags;
    uint64_t owner;              /* pool or allocation handle, 0 none */
};
bool shim_range_find(uint64_t address, struct shim_range *out); /* copy, so no lifetime question */
void shim_range_add(const struct shim_range *range);
bool shim_range_remove(uint64_t base, struct shim_range *out);  /* by exact base */

/* ---- arena (arena.c): shared memory for pinned allocations and staging ---- */

/* Bytes from the registered arena. offset is from the segment's start (what the wire carries). NULL when full. */
void *shim_arena_allocate(size_t size, size_t alignment, uint64_t *offset);
void shim_arena_free(void *pointer);
bool shim_arena_offset(const void *pointer, size_t size, uint64_t *offset); /* is [pointer, +size) inside the arena? */
/* Give back once `fence` is done (staging of asynchronous copies); takes over the fence. */
void shim_arena_free_after(void *pointer, const struct shim_fence *fence);

/* ---- contexts and capture, told by their subjects ---- */

CUresult shim_launch_blocking(void); /* CUDA_LAUNCH_BLOCKING: synchronise after a launch; CUDA_SUCCESS at once otherwise */
extern _Atomic uint32_t shim_captures_active; /* streams of this process that are capturing */
bool shim_stream_is_capturing(uint64_t stream_id); /* exact while captures_active > 0; may ask the worker */
/* Begins every call that CUDA forbids while a stream captures (allocation, synchronisation, ...): CUDA_SUCCESS, or
 * CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED after invalidating the captures concerned. One load when nothing captures. */
CUresult shim_capture_check(void);
/* As the entry of a call on one stream: that stream captures, so the call is forbidden and its capture is spoilt. */
CUresult shim_capture_forbid(uint64_t stream_id);
/* cuCtxSynchronize while anything captures: forbidden whatever the modes, and every capture is spoilt. */
CUresult shim_capture_forbid_all(void);
void shim_capture_stream_gone(uint64_t stream_id); /* cuStreamDestroy */
/* cuDevicePrimaryCtxReset, cuCtxDestroy: drop everything that belonged to the context (subjects register hooks). */
void shim_on_context_end(void (*hook)(uint64_t context));

/* Around the copying of payload between the program's memory and the arena; times.c counts how long it took. */
uint64_t shim_copy_begins(void);
void shim_copy_ends(uint64_t began);

extern const char *const shim_call_names[VGPU_CALL_COUNT];

#endif
