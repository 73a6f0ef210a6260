/* SPDX-License-Identifier: Apache-2.0 */
/*
 * memory_map.c - sorted intervals under a sequence lock.
 *
 * Every copy, memset and pointer query asks this table, from any thread, so a look-up takes no lock and
 * makes no system call: a binary search over a dense array of bases, then a copy of one node, repeated if
 * a writer was at work. Nodes and arrays are never given back to malloc while the process lives (arrays
 * double, so all retired ones together are no larger than the live one): a reader that lost a race reads
 * stale numbers, never freed memory, and then sees that the sequence moved.
 *
 * Writers (allocations and frees, which cost a round trip anyway) take a mutex.
 */
#include "memory_map.h"

#include <sched.h>
#include <stdlib.h>

#define FIELDS 8

struct map_node {
    _Atomic uint64_t field[FIELDS]; /* base, size, device_address, context, id, kind | flags << 32, owner, unused */
    struct map_node *next_free;
};

struct map_slot {
    _Atomic uint64_t base;
    struct map_node *_Atomic node;
};

struct map_array {
    struct map_array *retired; /* the one before; still read by who found it */
    uint32_t capacity;
    struct map_slot slot[];
};

struct shim_map {
    pthread_mutex_t lock;
    _Atomic uint32_t sequence; /* odd while a writer is at work */
    _Atomic uint32_t count;
    struct map_array *_Atomic array;
    struct map_node *free_nodes;
};

struct shim_map shim_memory_map = {.lock = PTHREAD_MUTEX_INITIALIZER};
struct shim_map shim_reserved_map = {.lock = PTHREAD_MUTEX_INITIALIZER};

uint64_t shim_range_new_id(void)
{
    static _Atomic uint64_t last;
    return atomic_fetch_add_explicit(&last, 1, memory_order_relaxed) + 1;
}

static void node_store(struct map_node *node, const struct shim_range *range)
{
    const uint64_t value[FIELDS] = {range->base, range->size, range->device_address, range->context, range->id,
                                    (uint64_t)range->kind | (uint64_t)range->flags << 32, range->owner, 0};
    for (int i = 0; i < FIELDS; i++)
        atomic_store_explicit(&node->field[i], value[i], memory_order_release);
}

/* Acquire loads keep the check of the sequence behind them; on x86 they are plain loads. */
static void node_load(struct map_node *node, struct shim_range *out)
{
    uint64_t value[FIELDS];
    for (int i = 0; i < FIELDS; i++)
        value[i] = atomic_load_explicit(&node->field[i], memory_order_acquire);
    out->base = value[0];
    out->size = value[1];
    out->device_address = value[2];
    out->context = value[3];
    out->id = value[4];
    out->kind = (uint32_t)value[5];
    out->flags = (uint32_t)(value[5] >> 32);
    out->owner = value[6];
}

/* How many of the first `count` slots have a base <= address. */
static uint32_t upper_bound(struct map_array *array, uint32_t count, uint64_t address)
{
    uint32_t low = 0, high = count;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (atomic_load_explicit(&array->slot[middle].base, memory_order_acquire) <= address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* One consistent look: at_or_after 0 finds the range that holds address, 1 the first that ends behind it. */
static bool look(struct shim_map *map, uint64_t address, bool at_or_after, struct shim_range *out)
{
    for (unsigned turn = 0;; turn++) {
        uint32_t before = atomic_load_explicit(&map->sequence, memory_order_acquire);
        if (before & 1) {
            if (turn > 200) sched_yield();
            continue;
        }
        bool found = false;
        struct map_array *array = atomic_load_explicit(&map->array, memory_order_acquire);
        uint32_t count = atomic_load_explicit(&map->count, memory_order_acquire);
        if (array != NULL) {
            if (count > array->capacity) count = array->capacity;
            uint32_t at = upper_bound(array, count, address);
            struct map_node *node = NULL;
            if (at > 0) node = atomic_load_explicit(&array->slot[at - 1].node, memory_order_acquire);
            if (node != NULL) {
                node_load(node, out);
                found = address - out->base < out->size;
            }
            if (!found && at_or_after && at < count) {
                node = atomic_load_explicit(&array->slot[at].node, memory_order_acquire);
                if (node != NULL) {
                    node_load(node, out);
                    found = true;
                }
            }
        }
        if (atomic_load_explicit(&map->sequence, memory_order_acquire) == before) return found;
    }
}

bool shim_map_find(struct shim_map *map, uint64_t address, struct shim_range *out)
{
    return look(map, address, false, out);
}

bool shim_map_next(struct shim_map *map, uint64_t address, struct shim_range *out)
{
    return look(map, address, true, out);
}

static void write_begin(struct shim_map *map)
{
    uint32_t now = atomic_load_explicit(&map->sequence, memory_order_relaxed);
    atomic_store_explicit(&map->sequence, now + 1, memory_order_seq_cst);
}

static void write_end(struct shim_map *map)
{
    uint32_t now = atomic_load_explicit(&map->sequence, memory_order_relaxed);
    atomic_store_explicit(&map->sequence, now + 1, memory_order_release);
}

/* Room for one more; called under the mutex. Copies into an array twice the size, the old one stays readable. */
static struct map_array *make_room(struct shim_map *map, uint32_t count)
{
    struct map_array *old = atomic_load_explicit(&map->array, memory_order_relaxed);
    if (old != NULL && count < old->capacity) return old;
    uint32_t capacity = old == NULL ? 64 : old->capacity * 2;
    struct map_array *array = calloc(1, sizeof *array + capacity * sizeof array->slot[0]);
    if (array == NULL) return NULL;
    array->capacity = capacity;
    array->retired = old;
    for (uint32_t i = 0; i < count; i++) {
        atomic_store_explicit(&array->slot[i].base, atomic_load_explicit(&old->slot[i].base, memory_order_relaxed), memory_order_relaxed);
        atomic_store_explicit(&array->slot[i].node, atomic_load_explicit(&old->slot[i].node, memory_order_relaxed), memory_order_relaxed);
    }
    atomic_store_explicit(&map->array, array, memory_order_release);
    return array;
}

static struct map_node *take_node(struct shim_map *map)
{
    if (map->free_nodes == NULL) {
        struct map_node *block = calloc(64, sizeof *block);
        if (block == NULL) return NULL;
        for (int i = 0; i < 64; i++) {
            block[i].next_free = map->free_nodes;
            map->free_nodes = &block[i];
        }
    }
    struct map_node *node = map->free_nodes;
    map->free_nodes = node->next_free;
    return node;
}

static void move_slot(struct map_array *array, uint32_t to, uint32_t from)
{
    atomic_store_explicit(&array->slot[to].base, atomic_load_explicit(&array->slot[from].base, memory_order_relaxed), memory_order_release);
    atomic_store_explicit(&array->slot[to].node, atomic_load_explicit(&array->slot[from].node, memory_order_relaxed), memory_order_release);
}

bool shim_map_add(struct shim_map *map, const struct shim_range *range)
{
    bool added = false;
    pthread_mutex_lock(&map->lock);
    uint32_t count = atomic_load_explicit(&map->count, memory_order_relaxed);
    struct map_array *array = make_room(map, count);
    struct map_node *node = array != NULL ? take_node(map) : NULL;
    if (node != NULL) {
        struct shim_range copy = *range, neighbour;
        if (copy.id == 0) copy.id = shim_range_new_id();
        uint32_t at = upper_bound(array, count, copy.base);
        bool free_here = true;
        if (at > 0) {
            node_load(atomic_load_explicit(&array->slot[at - 1].node, memory_order_relaxed), &neighbour);
            free_here = copy.base - neighbour.base >= neighbour.size;
        }
        if (free_here && at < count)
            free_here = atomic_load_explicit(&array->slot[at].base, memory_order_relaxed) - copy.base >= copy.size;
        if (free_here) {
            write_begin(map);
            for (uint32_t i = count; i > at; i--)
                move_slot(array, i, i - 1);
            node_store(node, &copy);
            atomic_store_explicit(&array->slot[at].base, copy.base, memory_order_release);
            atomic_store_explicit(&array->slot[at].node, node, memory_order_release);
            atomic_store_explicit(&map->count, count + 1, memory_order_release);
            write_end(map);
            added = true;
        } else {
            node->next_free = map->free_nodes;
            map->free_nodes = node;
        }
    }
    pthread_mutex_unlock(&map->lock);
    return added;
}

/* Index of the slot with exactly this base, or count. Under the mutex. */
static uint32_t exact(struct shim_map *map, uint64_t base, uint32_t *count)
{
    struct map_array *array = atomic_load_explicit(&map->array, memory_order_relaxed);
    *count = atomic_load_explicit(&map->count, memory_order_relaxed);
    if (array == NULL || *count == 0) return *count;
    uint32_t at = upper_bound(array, *count, base);
    if (at == 0 || atomic_load_explicit(&array->slot[at - 1].base, memory_order_relaxed) != base) return *count;
    return at - 1;
}

bool shim_map_remove(struct shim_map *map, uint64_t base, struct shim_range *out)
{
    pthread_mutex_lock(&map->lock);
    uint32_t count, at = exact(map, base, &count);
    bool found = at < count;
    if (found) {
        struct map_array *array = atomic_load_explicit(&map->array, memory_order_relaxed);
        struct map_node *node = atomic_load_explicit(&array->slot[at].node, memory_order_relaxed);
        if (out != NULL) node_load(node, out);
        write_begin(map);
        for (uint32_t i = at + 1; i < count; i++)
            move_slot(array, i - 1, i);
        atomic_store_explicit(&map->count, count - 1, memory_order_release);
        write_end(map);
        node->next_free = map->free_nodes;
        map->free_nodes = node;
    }
    pthread_mutex_unlock(&map->lock);
    return found;
}

bool shim_map_update(struct shim_map *map, uint64_t base, const struct shim_range *range)
{
    pthread_mutex_lock(&map->lock);
    uint32_t count, at = exact(map, base, &count);
    bool found = at < count;
    if (found) {
        struct map_array *array = atomic_load_explicit(&map->array, memory_order_relaxed);
        struct map_node *node = atomic_load_explicit(&array->slot[at].node, memory_order_relaxed);
        struct shim_range now;
        node_load(node, &now);
        now.flags = range->flags;
        now.owner = range->owner;
        now.context = range->context;
        write_begin(map);
        node_store(node, &now);
        write_end(map);
    }
    pthread_mutex_unlock(&map->lock);
    return found;
}

/* ---- the public face (shim.h) ---- */

bool shim_range_find(uint64_t address, struct shim_range *out)
{
    return shim_map_find(&shim_memory_map, address, out) || shim_map_find(&shim_reserved_map, address, out);
}

void shim_range_add(const struct shim_range *range)
{
    shim_map_add(range->kind == SHIM_RANGE_RESERVED ? &shim_reserved_map : &shim_memory_map, range);
}

bool shim_range_remove(uint64_t base, struct shim_range *out)
{
    return shim_map_remove(&shim_memory_map, base, out) || shim_map_remove(&shim_reserved_map, base, out);
}
