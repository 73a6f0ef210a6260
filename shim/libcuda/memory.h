/* SPDX-License-Identifier: Apache-2.0 */
/*
 * memory.h - what the memory files of the shim share: where bytes are, how a copy is sent.
 */
#ifndef VGPU_SHIM_MEMORY_H
#define VGPU_SHIM_MEMORY_H

#include "memory_map.h"

/* One side of a copy. */
enum memory_place {
    MEMORY_NOWHERE,  /* CUDA would refuse it: CUDA_ERROR_INVALID_VALUE */
    MEMORY_DEVICE,   /* the host's driver reaches it at `device` */
    MEMORY_PINNED,   /* arena memory of this process: `host`, `device` and `offset` all hold */
    MEMORY_PAGEABLE, /* ordinary memory of this process, or memory it registered: staged */
};
struct memory_side {
    enum memory_place place;
    bool registered;  /* pageable, but cuMemHostRegister knows it */
    uint8_t *host;
    uint64_t device;
    uint64_t offset;  /* from the segment's start */
};

/* What the caller says about an address that the table does not know. */
enum memory_expectation {
    MEMORY_EXPECT_CUDA, /* the host is asked (module globals are not in our table), and an unknown one refused */
    MEMORY_EXPECT_HOST, /* it is pageable memory */
    MEMORY_EXPECT_ANY,  /* pageable if this process can read it, else as EXPECT_CUDA */
};
/* What [address, address + size) is. Ranges that end beyond their allocation are MEMORY_NOWHERE. size > 0. */
void memory_side_of(uint64_t address, uint64_t size, enum memory_expectation expectation, struct memory_side *side);

/* May this be given to cuMemFree? Mapped memory and the variables of a module are device memory, but none of the caller's. */
static inline bool memory_is_allocation(const struct shim_range *range)
{
    return range->kind == SHIM_RANGE_POOL || (range->kind == SHIM_RANGE_DEVICE && range->owner == 0);
}

/* Sends a record: one way normally; while a stream of this process is capturing as a round trip, so that what the
 * driver says against a captured call is returned by that very call. */
CUresult memory_submit(unsigned call, const uint64_t argument[8], const void *payload, uint32_t length);
/* Waits until everything sent to the stream so far is done; does not look at deferred errors. */
CUresult memory_wait_stream(uint64_t stream);

/* Copies size bytes between two classified sides; copy.c. `blocking`: return when done, as CUDA's synchronous copies. */
CUresult memory_copy(const struct memory_side *destination, const struct memory_side *source, uint64_t size, uint64_t stream,
                     bool blocking);
/* Pageable memory through staging; copy_staging.c. Upload returns when the source has been read. */
CUresult memory_upload(uint64_t destination, const uint8_t *source, uint64_t size, uint64_t stream);
CUresult memory_download(uint8_t *destination, uint64_t source, uint64_t size, uint64_t stream);
/* memcpy spread over helper threads when it is long and the machine has processors to spare; copy_threads.c. */
void memory_copy_bytes(void *destination, const void *source, size_t size);

/* memcpy from memory that is not cached; shared_copy.c */
void memory_copy_uncached(void *destination, const void *source, size_t size);
/* memcpy from the arena, however it is mapped. */
static inline void memory_fetch(void *destination, const void *source, size_t size)
{
    if (__builtin_expect(shim.uncached, 0))
        memory_copy_uncached(destination, source, size);
    else
        memcpy(destination, source, size);
}

/* A staging buffer that is always there, for one copy at a time; NULL without an arena. arena.c */
#define MEMORY_RESERVE_BYTES 65536u
void *memory_reserve_buffer(uint64_t *offset);
/* The same for the caller alone, until it is given back; copy_staging.c */
void *memory_reserve_take(uint64_t *offset);
void memory_reserve_give(void);
/* In what pieces copies are staged: less where the arena is small, so that several copies find room at a time. */
uint64_t memory_piece(uint64_t usual, uint64_t least);
void shim_arena_collect(void);
/* The memory behind a range of cuMemHostAlloc's that is out of the table; pinned.c */
void shim_pinned_give_back(const struct shim_range *range);
/* Keeps this process from mapping host memory where the device's addresses are; memory.c. */
void memory_reserve_addresses(uint64_t base, uint64_t size);

#endif
