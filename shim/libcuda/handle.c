/* SPDX-License-Identifier: Apache-2.0 */
/*
 * handle.c - what stands behind the CUstream, CUevent, CUmodule, ... an application holds.
 *
 * A handle is kind, generation and index (transport/wire.h). Objects lie in blocks that are never given back, so a look-up
 * takes no lock and reads no freed memory: it compares the whole handle with the one in the object, and a handle that was
 * destroyed, forged or never given out differs. Indexes below VGPU_HANDLE_HOST_BASE are chosen here, the others by the
 * worker; the generation of a reused index makes the old handle stale.
 */
#include "core.h"

#include <stdlib.h>

#define BLOCK_BITS 9
#define BLOCK_OBJECTS (1u << BLOCK_BITS)
#define BLOCKS (1u << (VGPU_HANDLE_INDEX_BITS - BLOCK_BITS))

struct entry {
    struct shim_object object; /* object.handle: 0 while free; written last, with release */
    uint32_t generation, next_free;
};

static struct {
    struct shim_lock lock;
    uint32_t fresh;              /* guest-chosen indexes from here on were never used; 0 is skipped */
    uint32_t first_free, last_free; /* oldest first, so that a stale handle stays stale for long */
    struct entry *_Atomic block[BLOCKS];
} kinds[VGPU_KIND_COUNT];

static struct entry *find_entry(unsigned kind, unsigned index)
{
    if (kind >= VGPU_KIND_COUNT) return NULL;
    /* SAFETY: acquire pairs with make_entry's release: the block is zeroed before it can be seen. */
    struct entry *block = atomic_load_explicit(&kinds[kind].block[index >> BLOCK_BITS], memory_order_acquire);
    return block != NULL ? &block[index & (BLOCK_OBJECTS - 1)] : NULL;
}

/* Lock held. NULL when out of memory. */
static struct entry *make_entry(unsigned kind, unsigned index)
{
    struct entry *_Atomic *place = &kinds[kind].block[index >> BLOCK_BITS];
    if (atomic_load_explicit(place, memory_order_relaxed) == NULL) {
        struct entry *block = calloc(BLOCK_OBJECTS, sizeof *block);
        if (block == NULL) return NULL;
        atomic_store_explicit(place, block, memory_order_release);
    }
    return find_entry(kind, index);
}

static void publish(struct entry *entry, uint64_t handle, void *data)
{
    entry->object.context = shim_current_context_id();
    entry->object.data = data;
    entry->object.flags = 0;
    entry->object.priority = 0;
    __atomic_store_n(&entry->object.handle, handle, __ATOMIC_RELEASE);
}

uint64_t shim_handle_new(unsigned kind, void *data, struct shim_object **object)
{
    if (kind == VGPU_KIND_NONE || kind >= VGPU_KIND_COUNT) return 0;
    struct entry *entry = NULL;
    uint64_t handle = 0;
    uint32_t index;
    (void)shim_block(); /* publish() reads the thread's context: have the block made outside the lock */
    shim_lock_take(&kinds[kind].lock);
    if (kinds[kind].first_free != 0) {
        index = kinds[kind].first_free;
        entry = find_entry(kind, index);
        kinds[kind].first_free = entry->next_free;
        if (kinds[kind].first_free == 0) kinds[kind].last_free = 0;
    } else {
        index = kinds[kind].fresh + 1;
        if (index < VGPU_HANDLE_HOST_BASE && (entry = make_entry(kind, index)) != NULL) kinds[kind].fresh = index;
    }
    if (entry != NULL) {
        handle = vgpu_handle(kind, entry->generation, index);
        publish(entry, handle, data);
        if (object != NULL) *object = &entry->object;
    }
    shim_lock_give(&kinds[kind].lock);
    return handle;
}

bool shim_handle_adopt(uint64_t handle, void *data)
{
    unsigned kind = vgpu_handle_kind(handle), index = vgpu_handle_index(handle);
    if (kind == VGPU_KIND_NONE || kind >= VGPU_KIND_COUNT || index < VGPU_HANDLE_HOST_BASE || (handle & 15) != 0) return false;
    (void)shim_block();
    shim_lock_take(&kinds[kind].lock);
    struct entry *entry = make_entry(kind, index);
    if (entry != NULL) {
        bool known = __atomic_load_n(&entry->object.handle, __ATOMIC_RELAXED) == handle;
        if (!known)
            publish(entry, handle, data);
        else if (data != NULL)
            entry->object.data = data;
    }
    shim_lock_give(&kinds[kind].lock);
    return entry != NULL;
}

void shim_handle_free(uint64_t handle)
{
    unsigned kind = vgpu_handle_kind(handle), index = vgpu_handle_index(handle);
    struct entry *entry = find_entry(kind, index);
    if (entry == NULL || handle == 0) return;
    shim_lock_take(&kinds[kind].lock);
    if (__atomic_load_n(&entry->object.handle, __ATOMIC_RELAXED) == handle) {
        __atomic_store_n(&entry->object.handle, 0, __ATOMIC_RELEASE);
        entry->generation = (entry->generation + 1) & ((1u << VGPU_HANDLE_GENERATION_BITS) - 1);
        if (index < VGPU_HANDLE_HOST_BASE) {
            entry->next_free = 0;
            if (kinds[kind].last_free != 0)
                find_entry(kind, kinds[kind].last_free)->next_free = index;
            else
                kinds[kind].first_free = index;
            kinds[kind].last_free = index;
        }
    }
    shim_lock_give(&kinds[kind].lock);
}

struct shim_object *shim_object(unsigned kind, uint64_t handle)
{
    if (vgpu_handle_kind(handle) != kind || handle == 0) return NULL;
    struct entry *entry = find_entry(kind, vgpu_handle_index(handle));
    /* SAFETY: acquire pairs with publish's release: the object's fields are there when the handle matches. */
    return entry != NULL && __atomic_load_n(&entry->object.handle, __ATOMIC_ACQUIRE) == handle ? &entry->object : NULL;
}

bool shim_handle_valid(unsigned kind, uint64_t handle) { return shim_object(kind, handle) != NULL; }

void shim_handle_each(unsigned kind, void (*visit)(struct shim_object *, void *), void *user)
{
    if (kind >= VGPU_KIND_COUNT) return;
    for (unsigned number = 0; number < BLOCKS; number++) {
        struct entry *block = atomic_load_explicit(&kinds[kind].block[number], memory_order_acquire);
        if (block == NULL) continue;
        for (unsigned i = 0; i < BLOCK_OBJECTS; i++)
            if (__atomic_load_n(&block[i].object.handle, __ATOMIC_ACQUIRE) != 0) visit(&block[i].object, user);
    }
}
