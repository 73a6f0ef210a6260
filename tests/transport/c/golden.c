/* SPDX-License-Identifier: Apache-2.0 */
/* Prints what wire.h makes of bytes (hex on stdin, one per line: "call HEX" or "result HEX"), and its offsets. */
#include <inttypes.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "wire.h"

static size_t unhex(const char *text, uint8_t *out, size_t limit)
{
    size_t n = 0;
    unsigned byte;
    while (n < limit && sscanf(text + 2 * n, "%2x", &byte) == 1) out[n++] = (uint8_t)byte;
    return n;
}

#define GRANT(field) printf("offset grant " #field " %zu\n", offsetof(struct vgpu_grant_page, field))
#define SESSION(field) printf("offset session " #field " %zu\n", offsetof(struct vgpu_session_page, field))

#define ACCOUNT(field) printf("offset account " #field " %zu\n", offsetof(struct vgpu_account, field))
#define ENTRY(field) printf("offset entry " #field " %zu\n", offsetof(struct vgpu_account_entry, field))

int main(void)
{
    char kind[16], text[256];
    while (scanf("%15s %255s", kind, text) == 2) {
        if (strcmp(kind, "call") == 0) {
            struct vgpu_call c;
            if (unhex(text, (uint8_t *)&c, sizeof c) != sizeof c) return 1;
            printf("call %u %u %u %u %u", c.call, c.flags, c.payload_length, c.sequence, c.slot);
            for (int i = 0; i < VGPU_CALL_ARGUMENTS; i++) printf(" %" PRIu64, c.argument[i]);
        } else {
            struct vgpu_result r;
            if (unhex(text, (uint8_t *)&r, sizeof r) != sizeof r) return 1;
            printf("result %u %u %u", r.sequence, r.status, r.payload_length);
            for (int i = 0; i < 4; i++) printf(" %" PRIu64, r.value[i]);
        }
        printf("\n");
    }
    GRANT(magic); GRANT(session_id); GRANT(epoch); GRANT(deadline_ns); GRANT(credits); GRANT(granted); GRANT(preempt);
    GRANT(memory_limit_bytes); GRANT(retry_hint_ns); GRANT(token); GRANT(in_flight_us); GRANT(slice_ns); GRANT(seen_epoch); GRANT(demand); GRANT(current_call);
    GRANT(records); GRANT(current_since_ns); GRANT(async_records); GRANT(reply_records); GRANT(fence_records);
    GRANT(doorbells); GRANT(replay_errors); GRANT(protocol_errors); GRANT(launches); GRANT(bytes_to_device);
    GRANT(bytes_from_device); GRANT(gpu_ns); GRANT(fences_issued); GRANT(fences_done); GRANT(oldest_fence_ns);
    GRANT(memory_used_bytes); GRANT(memory_peak_bytes); GRANT(last_error); GRANT(worker_pid); GRANT(held_ns);
    GRANT(ended_token); GRANT(replay_ns); GRANT(lease_wait_ns); GRANT(gpu_wait_ns);
    GRANT(oldest_mark_ns); GRANT(last_mark_ns); GRANT(looked_ns); GRANT(answered_ns);
    GRANT(timed_leases); GRANT(timed_charged_ns); GRANT(timed_device_ns);
    SESSION(magic); SESSION(session_id); SESSION(tail); SESSION(head); SESSION(state); SESSION(sticky_error);
    SESSION(deferred_error); SESSION(busy); SESSION(wake); SESSION(device_lost); SESSION(local_calls);
    SESSION(async_calls); SESSION(fence_calls); SESSION(reply_calls); SESSION(refused_calls); SESSION(refused); SESSION(times);
    ACCOUNT(magic); ACCOUNT(limit); ACCOUNT(is_limited); ACCOUNT(entry_top); ACCOUNT(calls_per_second);
    ACCOUNT(bytes_per_second); ACCOUNT(queue_depth); ACCOUNT(calls_ns); ACCOUNT(bytes_ns); ACCOUNT(entry);
    ENTRY(session_id); ENTRY(used); ENTRY(asking); ENTRY(refused); ENTRY(queued); ENTRY(worker_pid); ENTRY(held_back);
    ENTRY(held_back_ns);
    printf("magic %" PRIx64 " %" PRIx64 " %u %u\n", (uint64_t)VGPU_GRANT_MAGIC, (uint64_t)VGPU_SEGMENT_MAGIC,
           VGPU_DEVICE_PAGE_SIZE, VGPU_SESSION_PAGE_SIZE);
    return 0;
}
