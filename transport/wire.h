/* SPDX-License-Identifier: Apache-2.0 */
/*
 * wire.h - everything two processes agree on: the layout of a session's shared segment, the call
 * record, the result, and the grant page. docs/wire.md is the prose; transport/_wire.py is the same
 * in Python and tests/transport holds golden vectors read by both.
 *
 * All numbers are little endian. Cache lines are 64 bytes; a field group that one side writes starts
 * on a line of its own. The guest can change every byte of the segment at any moment: whoever reads
 * a guest-written field copies it once into a local and checks the copy.
 */
#ifndef VGPU_WIRE_H
#define VGPU_WIRE_H

#include <stdint.h>

#define VGPU_SEGMENT_MAGIC 0x31555047565f5356ull /* "VS_VGPU1" */
#define VGPU_LAYOUT_VERSION 1u

/* ---- call records (submission ring) --------------------------------------------------------- */

#define VGPU_RECORD_ALIGNMENT 16u
#define VGPU_CALL_ARGUMENTS 8

/* Call header, 80 bytes. A record is a header, payload_length bytes, and padding to 16. */
struct vgpu_call {
    uint16_t call;           /* enum vgpu_call_id */
    uint16_t flags;          /* VGPU_CALL_* */
    uint32_t payload_length; /* bytes that follow the header, before padding */
    uint32_t sequence;       /* counts records, wraps */
    uint16_t slot;           /* completion slot, valid with VGPU_CALL_REPLY */
    uint16_t reserved;       /* zero */
    uint64_t argument[VGPU_CALL_ARGUMENTS];
};
_Static_assert(sizeof(struct vgpu_call) == 80, "call header is 80 bytes");

#define VGPU_CALL_REPLY 0x0001u /* the guest waits for a result in `slot` */

#define VGPU_CALL_PAD 0 /* call id 0: skip to the ring's end; payload_length covers the rest */

/* Largest payload a record may carry inline; larger data goes through the arena. */
#define VGPU_INLINE_LIMIT 65536u

/* Result, 40 bytes, at the head of a completion slot. `sequence` is stored last, with release. */
struct vgpu_result {
    uint32_t sequence;
    uint16_t status;         /* CUresult */
    uint16_t payload_length; /* bytes of reply payload in the slot */
    uint64_t value[4];
};
_Static_assert(sizeof(struct vgpu_result) == 40, "result is 40 bytes");

#define VGPU_SLOT_SIZE 4096u
#define VGPU_SLOT_PAYLOAD_OFFSET 64u
#define VGPU_SLOT_PAYLOAD_LIMIT (VGPU_SLOT_SIZE - VGPU_SLOT_PAYLOAD_OFFSET)
struct vgpu_slot {
    struct vgpu_result result;
    uint8_t padding[VGPU_SLOT_PAYLOAD_OFFSET - sizeof(struct vgpu_result)];
    uint8_t payload[VGPU_SLOT_PAYLOAD_LIMIT];
};
_Static_assert(sizeof(struct vgpu_slot) == VGPU_SLOT_SIZE, "slot size");

/* ---- device page (written by the host, read by the guest) ------------------------------------ */

#define VGPU_DEVICE_ATTRIBUTES 160 /* index = CUdevice_attribute */
#define VGPU_TOPOLOGY_MAX 256
#define VGPU_PROCESSES 128 /* as many as a device has slots, and one */
#define VGPU_UNKNOWN 0xffffffffu

struct vgpu_device_page {
    uint64_t magic;
    uint32_t layout_version;
    uint32_t driver_version; /* as cuDriverGetVersion, e.g. 13000 */
    char name[256];
    uint8_t uuid[16];
    int32_t pci_domain, pci_bus, pci_device, pci_function;
    uint64_t total_memory_bytes; /* this VM's quota, or the card's memory */
    uint32_t device_flags;       /* VGPU_DEVICE_* */
    uint32_t topology_count;     /* entries used below; TPC -> GPC map for the private topology table */
    uint8_t gpc_of_tpc[VGPU_TOPOLOGY_MAX];
    uint8_t index_in_gpc[VGPU_TOPOLOGY_MAX];
    int32_t stream_priority_least, stream_priority_greatest;
    uint64_t vmm_granularity_minimum, vmm_granularity_recommended;
    char driver_version_text[80]; /* "580.159.04" */
    uint8_t attribute_valid[VGPU_DEVICE_ATTRIBUTES];
    int32_t attribute[VGPU_DEVICE_ATTRIBUTES];
    /* Live telemetry. Seqlock: odd while the host writes. VGPU_UNKNOWN where the card does not say. */
    uint32_t telemetry_sequence __attribute__((aligned(64)));
    uint32_t temperature_celsius, gpu_utilization_percent, memory_utilization_percent;
    uint32_t power_milliwatts, sm_clock_mhz, memory_clock_mhz, process_count;
    uint64_t memory_used_bytes; /* by this VM */
    uint64_t telemetry_ns;      /* CLOCK_REALTIME of the sample */
    uint64_t energy_millijoules, throttle_reasons, bar1_total_bytes, memory_reserved_bytes; /* 64-bit: all ones if unknown */
    uint32_t graphics_clock_mhz, video_clock_mhz;
    uint32_t graphics_clock_max_mhz, sm_clock_max_mhz, memory_clock_max_mhz, video_clock_max_mhz;
    uint32_t power_limit_milliwatts, power_limit_default_milliwatts, power_limit_min_milliwatts, power_limit_max_milliwatts;
    uint32_t performance_state, fan_percent, memory_temperature_celsius;
    uint32_t temperature_slowdown_celsius, temperature_shutdown_celsius;
    uint32_t encoder_utilization_percent, decoder_utilization_percent;
    uint32_t ecc_enabled, persistence_mode, compute_mode, brand, architecture;
    uint32_t pcie_generation, pcie_generation_max, pcie_width, pcie_width_max, pcie_tx_kilobytes, pcie_rx_kilobytes;
    uint32_t memory_bus_width_bits, device_state; /* VGPU_STATE_* */
    char vbios_version[32], nvml_version[80], serial[32], board_part_number[32];
    /* ECC errors of the card; volatile: since its driver was loaded. */
    uint64_t ecc_corrected_volatile, ecc_corrected_aggregate, ecc_uncorrected_volatile, ecc_uncorrected_aggregate;
    struct vgpu_process {
        uint32_t pid; /* as the VM numbers it; on the host itself, the host's */
        uint32_t sm_utilization_percent;
        uint64_t memory_used_bytes, session_id;
    } process[VGPU_PROCESSES]; /* the first process_count are valid: this VM's sessions */
};
#define VGPU_STATE_QUARANTINED 0x1u
#define VGPU_STATE_RATE_LIMITED 0x2u /* calls of this VM were held back within the last seconds */
#define VGPU_DEVICE_SOFTWARE 0x1u    /* the software GPU */
#define VGPU_DEVICE_GPU_FENCES 0x2u  /* the device writes fence words itself */
#define VGPU_DEVICE_PAGE_SIZE 16384u
_Static_assert(sizeof(struct vgpu_device_page) <= VGPU_DEVICE_PAGE_SIZE, "device page");

/* ---- slot directory (a VM's BAR1, behind its device page; the host writes all but `guest_*`) --------------------- */

/*
 * What BAR0 says, in shared memory: reading it is no exit from the VM. Claim and release are stores to BAR0
 * (docs/registers.md); what became of them is read here. BAR1: device page at 0, directory at 16 KiB, slot 0 at first_slot.
 */
#define VGPU_DIRECTORY_MAGIC 0x3152494455504756ull /* "VGPUDIR1" */
#define VGPU_DIRECTORY_OFFSET 16384u
#define VGPU_DIRECTORY_SLOTS 127
struct vgpu_directory_slot {
    /* Host-written; `state` is stored last, with release. */
    uint32_t token, pid;  /* the owner's; 0 when free */
    uint32_t state;       /* as STATE in docs/registers.md */
    uint32_t refusal;     /* status as in WELCOME, with state REFUSED */
    uint32_t retry_milliseconds, reserved;
    uint64_t session_id;
    uint64_t worker_address; /* where the worker has mapped the slot */
    uint64_t host_reserved[3];
    /* Guest-written, by whoever holds the slot's lock, before the claim. Hostile. A name that ends with a zero; in the last 8
     * bytes the device number of the sysfs through which the claimant sees the device, so that others know whether its locks
     * are theirs (docs/wire.md); 0 if it does not say. */
    char guest_program[64];
};
#define VGPU_PROGRAM_NAME 56 /* bytes for the name, its zero included */
_Static_assert(sizeof(struct vgpu_directory_slot) == 128, "directory entry is two lines");
struct vgpu_directory {
    uint64_t magic;
    uint32_t layout_version, interface_version;
    uint64_t table_hash;
    uint64_t bar1_size, first_slot, slot_size;
    uint32_t slot_count;
    uint32_t status;         /* as STATUS in docs/registers.md */
    uint32_t generation;     /* resets so far */
    uint32_t driver_version; /* as cuDriverGetVersion; 0 until a mediator has said so */
    uint64_t host_heartbeat; /* rises several times a second while the device's process lives */
    uint64_t reserved[7];
    struct vgpu_directory_slot slot[VGPU_DIRECTORY_SLOTS];
};
_Static_assert(sizeof(struct vgpu_directory) == 128 + 128 * VGPU_DIRECTORY_SLOTS, "directory");
_Static_assert(VGPU_DIRECTORY_OFFSET + sizeof(struct vgpu_directory) <= 65536, "directory ends before the first slot");

/* ---- session page ---------------------------------------------------------------------------- */

enum vgpu_session_state {
    VGPU_SESSION_EMPTY = 0,
    VGPU_SESSION_READY = 1,
    VGPU_SESSION_CLOSED = 2, /* the guest said goodbye */
    VGPU_SESSION_DEAD = 3,   /* the host ended it; session_error says why */
};

#define VGPU_CALLBACK_ENTRIES 64
struct vgpu_callback {
    uint32_t state;    /* enum vgpu_callback_state; futex word */
    uint32_t kind;     /* 0 host function, 1 stream callback */
    uint64_t function; /* guest address */
    uint64_t user;     /* guest address */
    uint64_t stream;   /* guest handle, stream callbacks */
    uint32_t status;   /* CUresult handed to a stream callback */
    uint32_t reserved[7];
};
_Static_assert(sizeof(struct vgpu_callback) == 64, "callback entry is a line");
enum vgpu_callback_state { VGPU_CALLBACK_FREE = 0, VGPU_CALLBACK_POSTED = 1, VGPU_CALLBACK_RUNNING = 2, VGPU_CALLBACK_DONE = 3 };

#define VGPU_REFUSED_NAMES 1024

/* Where the time of the program's threads goes, as the guest library measures it (docs/tracing.md): in ticks of the guest's
 * time-stamp counter, summed over threads. For people to look at, never trusted. */
struct vgpu_guest_times {
    uint64_t ticks_per_second __attribute__((aligned(64))); /* 0: not known yet */
    uint64_t encode_ticks;    /* building records and putting them into the ring; scaled up from a sample */
    uint64_t encode_samples;  /* calls that were measured for it */
    uint64_t copy_ticks;      /* copying between ordinary memory and the arena */
    uint64_t sync_ticks;      /* waiting for the device: fences */
    uint64_t sync_waits;
    uint64_t answer_ticks;    /* waiting for the worker's answers */
    uint64_t answer_waits;
    uint64_t room_ticks;      /* waiting for room in the ring, or for a completion slot; ringing the doorbell */
    uint64_t room_waits;
    uint64_t held_sync_ticks; /* of sync_ticks: the host was BUSY */
    uint64_t held_ring_ticks; /* of answer_ticks and room_ticks: the same */
};

struct vgpu_session_page {
    /* Immutable after the session is ready; written by the host. Offsets are from the segment's start. */
    uint64_t magic;
    uint32_t layout_version;
    uint32_t flags;
    uint64_t session_id;
    uint64_t segment_size;
    uint64_t ring_offset, ring_size; /* size is a power of two */
    uint64_t slots_offset;
    uint32_t slot_count, fence_count;
    uint64_t fences_offset; /* u64 words */
    uint64_t arena_offset, arena_size;
    uint64_t arena_registered; /* bytes from the arena's start registered before the guest attached */
    uint64_t worker_address;   /* where the worker has mapped the segment: device address of segment byte 0 */

    /* Guest-written. */
    uint64_t tail __attribute__((aligned(64))); /* bytes ever produced; release store */
    uint64_t heartbeat __attribute__((aligned(64)));
    uint32_t guest_pid, guest_waiters; /* waiters: threads sleeping on `wake`, so the worker must wake */

    /* Worker-written. */
    uint64_t head __attribute__((aligned(64))); /* bytes ever consumed; release store */
    uint32_t doorbell_wanted __attribute__((aligned(64)));
    uint32_t state __attribute__((aligned(64)));   /* enum vgpu_session_state; futex-woken through `wake` */
    uint32_t sticky_error;   /* CUresult that every later call returns, 0 none */
    uint32_t deferred_error; /* first error of an async call not yet reported; the guest takes it with exchange */
    uint32_t busy;           /* 1 while the worker holds no lease */
    uint64_t busy_retry_ns;  /* hint: try again after so many ns */
    uint32_t wake;           /* futex word, incremented when something a waiter may want has happened */
    uint32_t device_lost;    /* 1: no host behind this session any more */

    /* Host functions: the worker posts, the guest's callback thread runs them. */
    uint32_t callback_wake __attribute__((aligned(64))); /* futex word for the guest's callback thread */
    struct vgpu_callback callback[VGPU_CALLBACK_ENTRIES] __attribute__((aligned(64)));

    /* Guest-written counters, for metrics only, never trusted. */
    uint64_t local_calls __attribute__((aligned(64)));
    uint64_t async_calls, fence_calls, reply_calls, refused_calls;
    uint32_t refused[VGPU_REFUSED_NAMES]; /* by index into the generated name table */
    struct vgpu_guest_times times;        /* guest-written as well */
};
#define VGPU_SESSION_PAGE_SIZE 32768u
_Static_assert(sizeof(struct vgpu_session_page) <= VGPU_SESSION_PAGE_SIZE, "session page");

/* Order inside a segment: device page, session page, ring, slots, fences, arena. A segment of a VM is a slot of its BAR1;
 * one too small for the defaults below gets smaller parts (docs/wire.md section 2). */
#define VGPU_DEFAULT_RING_SIZE (4u << 20)
#define VGPU_DEFAULT_SLOT_COUNT 256u
#define VGPU_DEFAULT_FENCE_COUNT 8192u

/* ---- grant page (mediator <-> worker, never mapped by a guest) ---------------------------------- */

#define VGPU_GRANT_MAGIC 0x544e415247555047ull
struct vgpu_grant_page {
    uint64_t magic;
    uint64_t session_id;
    /* Mediator-written. */
    uint64_t epoch __attribute__((aligned(64))); /* bumped by each grant or revocation; release store, last */
    uint64_t deadline_ns;   /* CLOCK_MONOTONIC; 0 = open-ended */
    int64_t credits;        /* records this lease may consume; negative = unlimited */
    uint32_t granted;       /* 1: a lease is held; VGPU_GRANT_STANDBY: it may be taken, see the turn word */
    uint32_t preempt;       /* 1: stop at the next record and report */
    uint64_t memory_limit_bytes;
    uint64_t retry_hint_ns;
    uint32_t token;         /* of the lease; it begins when the turn word names it as holder. 0: begins at once */
    uint32_t in_flight_us;  /* work to have queued on the device at most, about; 0: any */
    uint64_t slice_ns;      /* with deadline_ns 0: the lease ends so long after it began; 0 = open-ended */
    /* Worker-written. */
    uint64_t seen_epoch __attribute__((aligned(64)));
    uint32_t demand;        /* 1: records wait and no lease is held */
    uint32_t current_call;  /* call id being replayed, 0 none */
    uint64_t records;       /* records consumed */
    uint64_t current_since_ns; /* when the replay loop last took a record that may block */
    uint64_t async_records, reply_records, fence_records, doorbells, replay_errors, protocol_errors;
    uint64_t launches, bytes_to_device, bytes_from_device;
    uint64_t gpu_ns;        /* time this session had work on the device */
    uint64_t fences_issued, fences_done;
    uint64_t oldest_fence_ns; /* CLOCK_MONOTONIC when the oldest unfinished fence was issued, 0 none */
    uint64_t memory_used_bytes, memory_peak_bytes;
    uint32_t last_error, worker_pid;
    uint64_t held_ns;       /* time the device was this session's alone, under leases with a token */
    uint32_t ended_token;   /* the last lease that is over, its work done; stored after held_ns and gpu_ns */
    uint32_t reserved;
    /* Where the session's time goes, as its worker sees it; what is missing is the guest's own. gpu_ns overlaps them. */
    uint64_t replay_ns;     /* records were being replayed: the worker's code and the driver's */
    uint64_t lease_wait_ns; /* records waited and no lease was held */
    uint64_t gpu_wait_ns;   /* no record waited and the device was still at work */
    /* Marks that the device sets behind launches (gpu/replay/pulse.c), as they were found at looked_ns; 0: no marks yet. */
    uint64_t oldest_mark_ns; /* of the streams with work: the longest without a mark has been so since then; 0: none has work */
    uint64_t last_mark_ns;   /* when a mark was last seen, of whichever stream */
    uint64_t looked_ns;      /* stored last */
    uint64_t answered_ns;    /* of replay_ns: records whose caller waits for the answer */
    /* Leases that the device's own clock has timed (gpu/replay/slice_clock.c): how many, what they were charged, and what it says. */
    uint64_t timed_leases, timed_charged_ns, timed_device_ns;
};
#define VGPU_GRANT_PAGE_SIZE 4096u
_Static_assert(sizeof(struct vgpu_grant_page) <= VGPU_GRANT_PAGE_SIZE, "grant page");

/* The flight recorder: the session's last calls, behind the grant page in the same file. Worker-written; what the mediator
 * reads of it once it has killed the worker. gpu/replay/flight.c */
#define VGPU_FLIGHT_MAGIC 0x31544847494c4656ull
#define VGPU_FLIGHT_ENTRIES 256u
#define VGPU_FLIGHT_NAMES 256u
#define VGPU_FLIGHT_UNFINISHED 0xffffffffu
#define VGPU_FLIGHT_OFFSET VGPU_GRANT_PAGE_SIZE
struct vgpu_flight_entry {
    uint32_t call, status; /* status: a CUresult, or UNFINISHED */
    uint64_t sequence;
    uint64_t began_ns;     /* CLOCK_MONOTONIC, as last read: the clock is read for every sixteenth call */
    uint64_t argument[5];  /* of wireLaunch: function, then grid and block as six 32-bit numbers, then the rest */
};
struct vgpu_flight_name {
    uint64_t function;
    char text[120];        /* cut off, with a NUL */
};
struct vgpu_flight {
    uint64_t magic;
    uint64_t next;         /* calls taken so far; the last is entry[(next - 1) % ENTRIES] */
    uint32_t fatal_signal; /* the worker crashed by it; 0: it did not */
    uint32_t reserved[11];
    struct vgpu_flight_entry entry[VGPU_FLIGHT_ENTRIES];
    struct vgpu_flight_name name[VGPU_FLIGHT_NAMES];
    struct vgpu_flight_entry suspect; /* the launch that the device has been at since oldest_mark_ns; call 0: none, or not known */
};
#define VGPU_FLIGHT_SIZE 53248u
#define VGPU_GRANT_FILE_SIZE (VGPU_GRANT_PAGE_SIZE + VGPU_FLIGHT_SIZE)
_Static_assert(sizeof(struct vgpu_flight_entry) == 64 && sizeof(struct vgpu_flight_name) == 128, "flight recorder");
_Static_assert(sizeof(struct vgpu_flight) <= VGPU_FLIGHT_SIZE, "flight recorder");
static inline uint32_t vgpu_flight_slot(uint64_t function) { return (uint32_t)((function * 0x9e3779b97f4a7c15ull) >> 56); }

/*
 * The account of a VM: its limits, what its sessions hold, and the buckets they draw from. One file for each VM, in the run
 * directory's accounts/, mapped by the mediator and by the workers of all its sessions, by no guest. A session has an entry;
 * what a VM holds is the sum over the entries, so what a dead worker held is given back by clearing its entry, whatever it
 * was doing. gpu/replay/vm_limits.c, docs/limits.md.
 */
enum vgpu_resource {
    VGPU_RESOURCE_MEMORY = 0,  /* bytes of device memory */
    VGPU_RESOURCE_ARENA = 1,   /* bytes of the arena made known to the driver after the session began */
    VGPU_RESOURCE_MODULES = 2, /* modules and libraries that are loaded */
    VGPU_RESOURCE_HANDLES = 3, /* driver objects of all kinds; counted in small blocks */
    VGPU_RESOURCE_COUNT
};
struct vgpu_account_entry {
    uint64_t session_id; /* 0: free. Claimed and cleared by the mediator; the rest is its worker's */
    uint64_t used[VGPU_RESOURCE_COUNT];
    uint64_t asking[VGPU_RESOURCE_COUNT]; /* on top of used, while it finds out whether there is room */
    uint64_t refused[VGPU_RESOURCE_COUNT]; /* how often there was none */
    uint32_t queued;     /* calls given to the driver and not known to be executed, under a queue depth */
    uint32_t worker_pid; /* the mediator's */
    uint64_t held_back;  /* how often a call had to wait for a bucket or the queue, and how long all that took */
    uint64_t held_back_ns;
};
_Static_assert(sizeof(struct vgpu_account_entry) == 128, "account entry is two lines");
#define VGPU_ACCOUNT_MAGIC 0x544e434355504756ull /* "VGPUCCNT" */
#define VGPU_ACCOUNT_ENTRIES 254
struct vgpu_account {
    uint64_t magic; /* stored last: the limits have been written */
    /* Mediator-written. Limits of 0 are none. Read by the workers for every call: nothing that changes often lies here. */
    uint64_t limit[VGPU_RESOURCE_COUNT];
    uint32_t is_limited; /* one of the next three is set */
    uint32_t entry_top;  /* entries at and above this have never been used */
    uint64_t calls_per_second;
    uint64_t bytes_per_second __attribute__((aligned(64)));
    uint64_t queue_depth;
    /* Buckets, as points of CLOCK_MONOTONIC: full when a second or more in the past, empty now, in debt in the future. */
    uint64_t calls_ns __attribute__((aligned(64)));
    uint64_t bytes_ns __attribute__((aligned(64)));
    struct vgpu_account_entry entry[VGPU_ACCOUNT_ENTRIES] __attribute__((aligned(128)));
};
#define VGPU_ACCOUNT_FILE_SIZE 32768u
_Static_assert(sizeof(struct vgpu_account) == VGPU_ACCOUNT_FILE_SIZE, "account");

/*
 * The turn word, one per GPU, in the file gpuN.turn of the run directory, mapped by the mediator and all workers of that
 * GPU: the token of the lease that has the device in the low half, that of the next one in the high half, 0 nobody. A worker
 * whose lease is over and whose work is done swaps (own, next) for (next, 0). A worker with a standby lease and something to
 * do swaps (holder, next) for (holder, own), or with no holder for (own, next), unless HIGH is set in the holder or STANDBY in
 * the next; a holder without HIGH ends its lease when it sees STANDBY in the next. All other changes are the mediator's.
 */
#define VGPU_GRANT_STANDBY 2u
#define VGPU_TOKEN_HIGH 0x80000000u    /* of a session of high priority */
#define VGPU_TOKEN_STANDBY 0x40000000u /* of a lease given beforehand */
#define VGPU_TURN_FILE_SIZE 4096u
static inline uint32_t vgpu_turn_holder(uint64_t word) { return (uint32_t)word; }
static inline uint32_t vgpu_turn_next(uint64_t word) { return (uint32_t)(word >> 32); }

/*
 * The trace of one session, a memfd between worker and mediator that no guest sees: a head page, then a ring of `capacity`
 * events. One writer, the replay thread, while head < limit; event n is at n % capacity. Times are CLOCK_MONOTONIC.
 */
enum vgpu_trace_kind {
    VGPU_TRACE_CALL = 1,   /* one record replayed; call, detail: stream handle or 0 */
    VGPU_TRACE_FENCE = 2,  /* device work from its submission until seen to be done; call: fence index, detail: value */
    VGPU_TRACE_BUSY = 3,   /* the device had work of this session */
    VGPU_TRACE_LEASE = 4,  /* a lease with a token that was held; detail: the token */
    VGPU_TRACE_STARVED = 5 /* records waited for a lease */
};
struct vgpu_trace_event {
    uint64_t begin_ns, end_ns, detail;
    uint32_t kind, call;
};
struct vgpu_trace_head {
    uint64_t magic;
    uint32_t event_size, capacity;
    uint64_t limit __attribute__((aligned(64))); /* written by the worker's control thread */
    uint64_t head __attribute__((aligned(64)));  /* events written since the worker began; release store, after the event */
    uint64_t missed;                             /* events that came after the limit */
};
#define VGPU_TRACE_MAGIC 0x4543415254555047ull /* "GPUTRACE" */
#define VGPU_TRACE_HEAD_SIZE 4096u
#define VGPU_TRACE_CAPACITY (1u << 17)
#define VGPU_TRACE_FILE_SIZE (VGPU_TRACE_HEAD_SIZE + VGPU_TRACE_CAPACITY * (uint64_t)sizeof(struct vgpu_trace_event))
_Static_assert(sizeof(struct vgpu_trace_event) == 32, "trace event");

/* ---- handles ------------------------------------------------------------------------------------ */

/*
 * What an application holds as CUstream, CUevent, ... is not a pointer: bits 42..46 kind, 28..41
 * generation, 4..27 index, 0..3 zero. It fits 47 bits, so it looks like a user-space pointer, and it
 * never equals the special stream handles 0, 1, 2. Indexes below VGPU_HANDLE_HOST_BASE are chosen by
 * the guest, the others by the worker.
 */
enum vgpu_handle_kind {
    VGPU_KIND_NONE = 0, VGPU_KIND_CONTEXT, VGPU_KIND_STREAM, VGPU_KIND_EVENT, VGPU_KIND_MODULE, VGPU_KIND_FUNCTION,
    VGPU_KIND_LIBRARY, VGPU_KIND_KERNEL, VGPU_KIND_GRAPH, VGPU_KIND_NODE, VGPU_KIND_EXEC, VGPU_KIND_POOL,
    VGPU_KIND_LINK, VGPU_KIND_MEMORY, VGPU_KIND_ARRAY, VGPU_KIND_MIPMAP, VGPU_KIND_USEROBJECT,
    VGPU_KIND_COUNT
};
#define VGPU_HANDLE_INDEX_BITS 24
#define VGPU_HANDLE_GENERATION_BITS 14
#define VGPU_HANDLE_HOST_BASE (1u << 23)
static inline uint64_t vgpu_handle(unsigned kind, unsigned generation, unsigned index)
{
    return (uint64_t)kind << 42 | (uint64_t)(generation & 0x3fff) << 28 | (uint64_t)(index & 0xffffff) << 4;
}
static inline unsigned vgpu_handle_kind(uint64_t h) { return (unsigned)(h >> 42); }
static inline unsigned vgpu_handle_generation(uint64_t h) { return (unsigned)(h >> 28) & 0x3fff; }
static inline unsigned vgpu_handle_index(uint64_t h) { return (unsigned)(h >> 4) & 0xffffff; }

#endif
