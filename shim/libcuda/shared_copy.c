/* SPDX-License-Identifier: Apache-2.0 */
/*
 * shared_copy.c - fetching bytes from the arena where it is not cached: a VM whose host heeds the guest's memory types.
 *
 * There an ordinary load fetches its 8 or 32 bytes and nothing else, some tens of times slower than memory can. MOVNTDQA
 * (SSE4.1) fetches a line into a buffer and serves the next loads from there. pci_map.c has the whole story.
 */
#include "memory.h"

#include <smmintrin.h>

#define LINE 64u

static _Atomic int streams = -1; /* the processor has SSE4.1; -1 not asked yet */

static bool can_stream(void)
{
    int known = atomic_load_explicit(&streams, memory_order_relaxed);
    if (known < 0) {
        __builtin_cpu_init();
        known = __builtin_cpu_supports("sse4.1") != 0;
        atomic_store_explicit(&streams, known, memory_order_relaxed);
    }
    return known != 0;
}

__attribute__((target("sse4.1"))) static void stream_lines(uint8_t *to, const uint8_t *from, size_t lines)
{
    for (; lines > 0; lines--, to += LINE, from += LINE) {
        /* SAFETY: `from` is on a line's border; `to` may lie anywhere. */
        __m128i *line = (__m128i *)(uintptr_t)from;
        const __m128i a = _mm_stream_load_si128(line), b = _mm_stream_load_si128(line + 1);
        const __m128i c = _mm_stream_load_si128(line + 2), d = _mm_stream_load_si128(line + 3);
        _mm_storeu_si128((__m128i *)(void *)to, a);
        _mm_storeu_si128((__m128i *)(void *)(to + 16), b);
        _mm_storeu_si128((__m128i *)(void *)(to + 32), c);
        _mm_storeu_si128((__m128i *)(void *)(to + 48), d);
    }
}

void memory_copy_uncached(void *destination, const void *source, size_t size)
{
    uint8_t *to = destination;
    const uint8_t *from = source;
    size_t head = (LINE - (uintptr_t)from % LINE) % LINE;
    if (head > size) head = size;
    if (!can_stream() || size - head < LINE) {
        memcpy(to, from, size);
        return;
    }
    memcpy(to, from, head);
    /* A line fetched earlier may lie in a buffer still, older than what the device has written since. */
    _mm_mfence();
    const size_t lines = (size - head) / LINE, rest = head + lines * LINE;
    stream_lines(to + head, from + head, lines);
    memcpy(to + rest, from + rest, size - rest);
}
