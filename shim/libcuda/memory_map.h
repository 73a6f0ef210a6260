/* SPDX-License-Identifier: Apache-2.0 */
/*
 * memory_map.h - the interval table behind shim_range_*: what an address is, answered without a lock.
 *
 * Two tables: `shim_memory_map` holds allocations and mappings, `shim_reserved_map` the address
 * reservations that mappings lie in. Intervals of one table never overlap.
 */
#ifndef VGPU_MEMORY_MAP_H
#define VGPU_MEMORY_MAP_H

#include "shim.h"

/* Bits of shim_range.flags above the ones CUDA defines for pinned memory (1, 2, 4) and for access (1, 3). */
#define SHIM_RANGE_SYNC_MEMOPS 0x100u

/* `owner` of a REGISTERED range that cuMemHostAlloc made: pinned memory to the program, but no part of the arena (pinned.c). */
#define SHIM_OWNER_PINNED 1u

struct shim_map;
extern struct shim_map shim_memory_map, shim_reserved_map;

bool shim_map_find(struct shim_map *map, uint64_t address, struct shim_range *out);
/* False, and nothing added, if the range overlaps one that is there or memory is short. */
bool shim_map_add(struct shim_map *map, const struct shim_range *range);
bool shim_map_remove(struct shim_map *map, uint64_t base, struct shim_range *out); /* by exact base */
/* Replaces flags, owner and context of the range at exactly `base`. */
bool shim_map_update(struct shim_map *map, uint64_t base, const struct shim_range *range);
/* The range at or after `address`; for walking. */
bool shim_map_next(struct shim_map *map, uint64_t address, struct shim_range *out);
uint64_t shim_range_new_id(void);

#endif
