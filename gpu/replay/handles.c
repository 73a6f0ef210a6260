/* SPDX-License-Identifier: Apache-2.0 */
/*
 * handles.c - wire handles to real driver objects, one table per kind. A handle is looked up by index and its
 * generation compared, so a forged or stale one is refused and never reaches the driver. Tables are two-level:
 * pages of entries are made when an index of theirs is first used, and their number is bounded, because guests
 * choose the lower half of the indexes themselves. Touched by the replay thread alone.
 */
#include "internal.h"
#include "vm_limits.h"

#include <stdlib.h>

#define PAGE_BITS 8
#define PAGE_ENTRIES (1u << PAGE_BITS)
#define PAGE_COUNT (1u << (VGPU_HANDLE_INDEX_BITS - PAGE_BITS))
/* 65,536 pages of 4 KiB: 256 MiB of host memory is the most one session can make us spend here. */
#define PAGES_PER_SESSION 65536u

struct entry {
    void *real;
    uint16_t generation;
    uint8_t used;
    uint8_t dirty; /* streams: CLEAN, or on the list of those with unfinished work: DIRTY, FENCED */
    uint32_t owner; /* context slot */
};
_Static_assert(sizeof(struct entry) == 16, "an entry is two words");

/* Reverse look-up: real pointer -> handle. Open addressing, linear probing; key NULL is free. */
struct reverse { void *real; uint64_t handle; };

struct replay_table {
    struct entry *page[PAGE_COUNT];
    struct reverse *reverse;
    size_t reverse_capacity, reverse_count; /* capacity is a power of two or 0 */
    uint32_t *free_index; /* worker-chosen indexes to use again */
    size_t free_count, free_capacity;
    uint32_t next_index;
};

/* Objects of these kinds belong to the device, not to a context, and survive it. */
static bool outlives_context(unsigned kind)
{
    return kind == VGPU_KIND_CONTEXT || kind == VGPU_KIND_LIBRARY || kind == VGPU_KIND_KERNEL ||
           kind == VGPU_KIND_POOL || kind == VGPU_KIND_MEMORY || kind == VGPU_KIND_GRAPH || kind == VGPU_KIND_NODE ||
           kind == VGPU_KIND_LINK || kind == VGPU_KIND_USEROBJECT;
}

static size_t hash(const void *real) { return (size_t)(((uint64_t)(uintptr_t)real >> 4) * 0x9e3779b97f4a7c15ull >> 20); }

static struct reverse *reverse_find(struct replay_table *table, const void *real)
{
    if (table->reverse_capacity == 0)
        return NULL;
    for (size_t i = hash(real);; i++) {
        struct reverse *slot = &table->reverse[i & (table->reverse_capacity - 1)];
        if (slot->real == NULL)
            return NULL;
        if (slot->real == real)
            return slot;
    }
}

static bool reverse_grow(struct replay_table *table)
{
    size_t capacity = table->reverse_capacity ? table->reverse_capacity * 2 : 64;
    struct reverse *bigger = calloc(capacity, sizeof *bigger);
    if (bigger == NULL)
        return false;
    for (size_t i = 0; i < table->reverse_capacity; i++) {
        if (table->reverse[i].real == NULL)
            continue;
        size_t at = hash(table->reverse[i].real);
        while (bigger[at & (capacity - 1)].real != NULL)
            at++;
        bigger[at & (capacity - 1)] = table->reverse[i];
    }
    free(table->reverse);
    table->reverse = bigger;
    table->reverse_capacity = capacity;
    return true;
}

/* The first handle of a pointer stands for it; a second one changes nothing. */
static bool reverse_add(struct replay_table *table, void *real, uint64_t handle)
{
    if (real == NULL || reverse_find(table, real) != NULL)
        return true;
    if ((table->reverse_count + 1) * 2 > table->reverse_capacity && !reverse_grow(table))
        return false;
    size_t at = hash(real);
    while (table->reverse[at & (table->reverse_capacity - 1)].real != NULL)
        at++;
    table->reverse[at & (table->reverse_capacity - 1)] = (struct reverse){real, handle};
    table->reverse_count++;
    return true;
}

static void reverse_remove(struct replay_table *table, void *real, uint64_t handle)
{
    struct reverse *slot = reverse_find(table, real);
    if (slot == NULL || slot->handle != handle)
        return;
    size_t mask = table->reverse_capacity - 1, hole = (size_t)(slot - table->reverse);
    for (size_t at = hole + 1;; at++) { /* close the gap so that probing still reaches what follows */
        struct reverse *next = &table->reverse[at & mask];
        if (next->real == NULL)
            break;
        size_t home = hash(next->real) & mask;
        if (((at - home) & mask) >= ((at - hole) & mask)) {
            table->reverse[hole & mask] = *next;
            hole = at;
        }
    }
    table->reverse[hole & mask].real = NULL;
    table->reverse_count--;
}

static inline struct entry *find(struct vgpu_replay *replay, unsigned kind, uint64_t handle)
{
    unsigned index = vgpu_handle_index(handle);
    if (kind == VGPU_KIND_NONE || kind >= VGPU_KIND_COUNT || handle != vgpu_handle(kind, vgpu_handle_generation(handle), index))
        return NULL;
    struct entry *page = replay->tables[kind]->page[index >> PAGE_BITS];
    if (page == NULL)
        return NULL;
    struct entry *entry = &page[index & (PAGE_ENTRIES - 1)];
    return entry->used && entry->generation == vgpu_handle_generation(handle) ? entry : NULL;
}

static struct entry *place(struct vgpu_replay *replay, struct replay_table *table, unsigned index)
{
    struct entry **page = &table->page[index >> PAGE_BITS];
    if (*page == NULL) {
        if (replay->private->handles_chunks >= PAGES_PER_SESSION || (*page = calloc(PAGE_ENTRIES, sizeof **page)) == NULL)
            return NULL;
        replay->private->handles_chunks++;
    }
    return &(*page)[index & (PAGE_ENTRIES - 1)];
}

bool replay_handles_open(struct vgpu_replay *replay)
{
    for (unsigned kind = 1; kind < VGPU_KIND_COUNT; kind++) {
        replay->tables[kind] = calloc(1, sizeof *replay->tables[kind]);
        if (replay->tables[kind] == NULL)
            return false;
        replay->tables[kind]->next_index = VGPU_HANDLE_HOST_BASE;
    }
    return true;
}

void replay_handles_close(struct vgpu_replay *replay)
{
    for (unsigned kind = 1; kind < VGPU_KIND_COUNT; kind++) {
        struct replay_table *table = replay->tables[kind];
        if (table == NULL)
            continue;
        for (unsigned i = 0; i < PAGE_COUNT; i++)
            free(table->page[i]);
        free(table->reverse);
        free(table->free_index);
        free(table);
        replay->tables[kind] = NULL;
    }
}

bool replay_lookup(struct vgpu_replay *replay, unsigned kind, uint64_t handle, void **real)
{
    struct entry *entry = find(replay, kind, handle);
    if (entry == NULL)
        return false;
    *real = entry->real;
    return true;
}

static bool fill(struct vgpu_replay *replay, unsigned kind, struct entry *entry, uint64_t handle, void *real)
{
    if (!replay_handle_begins(replay, kind))
        return false;
    if (!reverse_add(replay->tables[kind], real, handle)) {
        replay_handle_ends(replay, kind);
        return false;
    }
    *entry = (struct entry){.real = real,
                            .generation = (uint16_t)vgpu_handle_generation(handle),
                            .used = 1,
                            .owner = replay->private->current};
    return true;
}

bool replay_bind(struct vgpu_replay *replay, unsigned kind, uint64_t handle, void *real)
{
    unsigned index = vgpu_handle_index(handle);
    if (kind == VGPU_KIND_NONE || kind >= VGPU_KIND_COUNT || index >= VGPU_HANDLE_HOST_BASE ||
        handle != vgpu_handle(kind, vgpu_handle_generation(handle), index))
        return false;
    struct entry *entry = place(replay, replay->tables[kind], index);
    return entry != NULL && !entry->used && fill(replay, kind, entry, handle, real);
}

uint64_t replay_intern(struct vgpu_replay *replay, unsigned kind, void *real)
{
    if (real == NULL || kind == VGPU_KIND_NONE || kind >= VGPU_KIND_COUNT)
        return 0;
    struct replay_table *table = replay->tables[kind];
    struct reverse *known = reverse_find(table, real);
    if (known != NULL)
        return known->handle;
    bool again = table->free_count > 0;
    if (!again && table->next_index >= 1u << VGPU_HANDLE_INDEX_BITS)
        return 0;
    unsigned index = again ? table->free_index[table->free_count - 1] : table->next_index;
    struct entry *entry = place(replay, table, index);
    if (entry == NULL)
        return 0;
    uint64_t handle = vgpu_handle(kind, again ? entry->generation + 1u : 1u, index);
    if (!fill(replay, kind, entry, handle, real))
        return 0;
    if (again)
        table->free_count--;
    else
        table->next_index++;
    return handle;
}

static void release(struct vgpu_replay *replay, unsigned kind, struct entry *entry, uint64_t handle)
{
    struct replay_table *table = replay->tables[kind];
    unsigned index = vgpu_handle_index(handle);
    if (entry->dirty)
        replay_stream_clean(replay, handle);
    reverse_remove(table, entry->real, handle);
    entry->used = 0;
    entry->real = NULL;
    replay_handle_ends(replay, kind);
    if (index < VGPU_HANDLE_HOST_BASE)
        return;
    if (table->free_count == table->free_capacity) {
        size_t capacity = table->free_capacity ? table->free_capacity * 2 : 64;
        uint32_t *bigger = realloc(table->free_index, capacity * sizeof *bigger);
        if (bigger == NULL)
            return; /* the index is lost, nothing else */
        table->free_index = bigger;
        table->free_capacity = capacity;
    }
    table->free_index[table->free_count++] = index;
}

void replay_unbind(struct vgpu_replay *replay, unsigned kind, uint64_t handle)
{
    struct entry *entry = find(replay, kind, handle);
    if (entry != NULL)
        release(replay, kind, entry, handle);
}

void replay_unbind_real(struct vgpu_replay *replay, unsigned kind, void *real)
{
    if (kind == VGPU_KIND_NONE || kind >= VGPU_KIND_COUNT)
        return;
    struct reverse *known = reverse_find(replay->tables[kind], real);
    if (known != NULL)
        replay_unbind(replay, kind, known->handle);
}

void replay_each(struct vgpu_replay *replay, unsigned kind,
                 void (*visit)(struct vgpu_replay *, uint64_t handle, void *real, void *user), void *user)
{
    if (kind == VGPU_KIND_NONE || kind >= VGPU_KIND_COUNT)
        return;
    struct replay_table *table = replay->tables[kind];
    for (unsigned p = 0; p < PAGE_COUNT; p++)
        for (unsigned i = 0; table->page[p] != NULL && i < PAGE_ENTRIES; i++) {
            struct entry *entry = &table->page[p][i];
            if (entry->used) /* the visitor may unbind it */
                visit(replay, vgpu_handle(kind, entry->generation, p << PAGE_BITS | i), entry->real, user);
        }
}

/* The driver ends what lies in the context; instances of graphs are its own, and nobody could name them any more. */
static void end_in_driver(struct vgpu_replay *replay, unsigned kind, void *real)
{
    if (kind == VGPU_KIND_EXEC)
        (void)replay->driver.cuGraphExecDestroy(real);
}

void replay_handles_end_context(struct vgpu_replay *replay, unsigned slot)
{
    for (unsigned kind = 1; kind < VGPU_KIND_COUNT; kind++) {
        if (outlives_context(kind))
            continue;
        struct replay_table *table = replay->tables[kind];
        for (unsigned p = 0; p < PAGE_COUNT; p++)
            for (unsigned i = 0; table->page[p] != NULL && i < PAGE_ENTRIES; i++) {
                struct entry *entry = &table->page[p][i];
                if (!entry->used || entry->owner != slot)
                    continue;
                end_in_driver(replay, kind, entry->real);
                release(replay, kind, entry, vgpu_handle(kind, entry->generation, p << PAGE_BITS | i));
            }
    }
}

bool replay_stream(struct vgpu_replay *replay, uint64_t id, void **real)
{
    /* Who asks for a stream is about to put work on it; so generated handlers need not know of dirty streams. */
    replay_stream_dirty(replay, id);
    if (id == 0) {
        *real = NULL;
        return true;
    }
    return replay_lookup(replay, VGPU_KIND_STREAM, id, real);
}

bool replay_function(struct vgpu_replay *replay, uint64_t handle, void **real, bool *is_kernel)
{
    *is_kernel = vgpu_handle_kind(handle) == VGPU_KIND_KERNEL;
    return replay_lookup(replay, *is_kernel ? VGPU_KIND_KERNEL : VGPU_KIND_FUNCTION, handle, real);
}

bool replay_stream_owner(struct vgpu_replay *replay, uint64_t handle, void **real, unsigned *slot)
{
    struct entry *entry = find(replay, VGPU_KIND_STREAM, handle);
    if (entry == NULL)
        return false;
    *real = entry->real;
    *slot = entry->owner;
    return true;
}

enum { CLEAN, DIRTY, FENCED /* no work since the fence in its list entry */ };

static void begin_busy(struct replay_private *private)
{
    if (private->busy_since_ns == 0)
        private->busy_since_ns = replay_now_ns();
}

void replay_stream_dirty(struct vgpu_replay *replay, uint64_t id)
{
    struct replay_private *private = replay->private;
    if (id == 0) {
        private->context[private->current].legacy_dirty = true;
        begin_busy(private);
        return;
    }
    struct entry *entry = find(replay, VGPU_KIND_STREAM, id);
    if (entry == NULL || entry->dirty == DIRTY)
        return;
    if (entry->dirty == FENCED) {
        entry->dirty = DIRTY;
        return;
    }
    if (private->dirty_count == private->dirty_capacity) {
        unsigned capacity = private->dirty_capacity ? private->dirty_capacity * 2 : 64;
        struct replay_dirty *bigger = realloc(private->dirty, capacity * sizeof *bigger);
        if (bigger == NULL) {
            replay_fault(replay, CUDA_ERROR_OUT_OF_MEMORY); /* a context fence could miss work: end rather than lie */
            return;
        }
        private->dirty = bigger;
        private->dirty_capacity = capacity;
    }
    private->dirty[private->dirty_count++] = (struct replay_dirty){.handle = id};
    entry->dirty = DIRTY;
    begin_busy(private);
}

void replay_stream_clean(struct vgpu_replay *replay, uint64_t handle)
{
    struct replay_private *private = replay->private;
    struct entry *entry = find(replay, VGPU_KIND_STREAM, handle);
    if (entry == NULL || !entry->dirty)
        return;
    entry->dirty = CLEAN;
    for (unsigned i = 0; i < private->dirty_count; i++)
        if (private->dirty[i].handle == handle) {
            private->dirty[i] = private->dirty[--private->dirty_count];
            return;
        }
}

void replay_stream_fenced(struct vgpu_replay *replay, uint64_t handle, uint32_t index, uint64_t value)
{
    struct replay_private *private = replay->private;
    struct entry *entry = handle != 0 ? find(replay, VGPU_KIND_STREAM, handle) : NULL;
    if (entry == NULL || entry->dirty == CLEAN)
        return;
    for (unsigned i = 0; i < private->dirty_count; i++)
        if (private->dirty[i].handle == handle) {
            private->dirty[i].index = index;
            private->dirty[i].value = value;
            entry->dirty = FENCED;
            return;
        }
}

bool replay_stream_is_clean(struct vgpu_replay *replay, uint64_t handle)
{
    struct replay_private *private = replay->private;
    struct entry *entry = handle != 0 ? find(replay, VGPU_KIND_STREAM, handle) : NULL;
    if (entry == NULL || entry->dirty == DIRTY)
        return false;
    if (entry->dirty == CLEAN)
        return true;
    for (unsigned i = 0; i < private->dirty_count; i++)
        if (private->dirty[i].handle == handle) {
            /* The word is the guest's to write: good enough to answer it, not to believe that the device is empty. Until the
             * driver says so the stream stays on the list. */
            return replay_fence_is_done(replay, private->dirty[i].index, private->dirty[i].value);
        }
    return false;
}
