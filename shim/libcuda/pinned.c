/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pinned.c - page-locked host memory.
 *
 * What cuMemHostAlloc hands out is the shared arena itself, which the host's driver has registered: copies
 * to and from it are DMA with no staging, and kernels reach it. Where the segment lies at the worker's
 * address in this process (shim.identical), its host address is its device address, as CUDA promises.
 *
 * In a VM the arena is a part of a PCI device and may be small. What does not fit in half of it (the other half is for the
 * staging of copies) is ordinary memory: its copies are staged, and kernels cannot reach it. So it has no device address, asking
 * for one is refused, and a program that asks for mapped memory (CU_MEMHOSTALLOC_DEVICEMAP) by name is told that there is none left.
 *
 * VGPU_PINNED=ordinary in the environment makes all pinned memory ordinary in a VM, but for what is asked to be mapped: for
 * programs that read much of theirs on hosts where that is slow (pci_map.c; with VGPU_LOG the library says so).
 *
 * Memory the application registers itself cannot become shared after the fact. It is remembered, so that
 * every query answers as CUDA does and copies treat it right (staged, hence synchronous), but it has no
 * device address: asking for one is refused and counted.
 */
#include "memory.h"

#include <stdlib.h>
#include <sys/mman.h>

#include "_generated_prototypes.h"

#define HOSTALLOC_FLAGS 0x7u  /* portable, device map, write-combined */
#define REGISTER_FLAGS 0xfu   /* portable, device map, I/O memory, read-only */
#define DEVICEMAP 0x2u        /* always so with unified addressing, and reported */

static _Atomic uint64_t in_arena; /* bytes of pinned memory there */

bool shim_pinned_in_use(void) { return atomic_load(&in_arena) != 0; }

/* Pages that the arena uses up for `size` bytes. */
static uint64_t whole(uint64_t size) { return (size + 4095) & ~4095ull; }

/* Pinned memory from the arena; in a VM only up to half of it. */
static void *take(uint64_t size, unsigned flags, uint64_t *offset)
{
    const char *wanted = shim_in_vm() && (flags & DEVICEMAP) == 0 ? secure_getenv("VGPU_PINNED") : NULL;
    if (size > shim.arena_size || (wanted != NULL && strcmp(wanted, "ordinary") == 0)) return NULL;
    uint64_t before = atomic_fetch_add(&in_arena, whole(size));
    bool allowed = !shim_in_vm() || before + whole(size) <= shim.arena_size / 2;
    void *memory = allowed ? shim_arena_allocate(size, 4096, offset) : NULL;
    if (memory == NULL) atomic_fetch_sub(&in_arena, whole(size));
    return memory;
}

static bool is_ordinary(const struct shim_range *range)
{
    return range->kind == SHIM_RANGE_REGISTERED && range->owner == SHIM_OWNER_PINNED;
}

void shim_pinned_give_back(const struct shim_range *range)
{
    void *memory = (void *)(uintptr_t)range->base;
    if (is_ordinary(range)) {
        munmap(memory, whole(range->size));
    } else {
        shim_arena_free(memory);
        atomic_fetch_sub(&in_arena, whole(range->size));
    }
}

static CUresult allocate_ordinary(void **pointer, size_t size, unsigned flags)
{
    if (size > SIZE_MAX - 4095) return CUDA_ERROR_OUT_OF_MEMORY;
    void *memory = mmap(NULL, whole(size), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
    const struct shim_range range = {.base = (uint64_t)(uintptr_t)memory, .size = size, .context = shim_current_context_id(),
                                     .kind = SHIM_RANGE_REGISTERED, .owner = SHIM_OWNER_PINNED, .flags = flags};
    shim_range_add(&range);
    *pointer = memory;
    return CUDA_SUCCESS;
}

static CUresult allocate(void **pointer, size_t size, unsigned flags)
{
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    if (pointer == NULL || (flags & ~HOSTALLOC_FLAGS) != 0) return CUDA_ERROR_INVALID_VALUE;
    if (size == 0) {
        *pointer = NULL;
        return CUDA_SUCCESS;
    }
    if ((status = shim_capture_check()) != CUDA_SUCCESS) return status;
    uint64_t offset;
    void *memory = take(size, flags, &offset);
    if (memory == NULL) {
        status = shim_enter();
        if (status != CUDA_SUCCESS) return status;
        return shim_in_vm() && (flags & DEVICEMAP) == 0 ? allocate_ordinary(pointer, size, flags) : CUDA_ERROR_OUT_OF_MEMORY;
    }
    const struct shim_range range = {.base = (uint64_t)(uintptr_t)memory, .size = size,
                                     .device_address = shim.worker_address + offset, .context = shim_current_context_id(),
                                     .kind = SHIM_RANGE_PINNED, .flags = flags | DEVICEMAP};
    shim_range_add(&range);
    *pointer = memory;
    return CUDA_SUCCESS;
}

CUresult cuMemHostAlloc(void *pp, size_t bytesize, unsigned int Flags) { return allocate(pp, bytesize, Flags); }
CUresult cuMemAllocHost_v2(void *pp, size_t bytesize) { return allocate(pp, bytesize, 0); }

CUresult cuMemFreeHost(void *p)
{
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS || p == NULL) return status;
    struct shim_range range;
    uint64_t base = (uint64_t)(uintptr_t)p;
    if (!shim_map_find(&shim_memory_map, base, &range) || range.base != base ||
        (range.kind != SHIM_RANGE_PINNED && !is_ordinary(&range)))
        return CUDA_ERROR_INVALID_VALUE;
    if ((status = shim_capture_check()) != CUDA_SUCCESS) return status;
    /* As natively, freeing waits for the device: a copy under way must not write into what is handed out next. */
    if (atomic_load_explicit(&shim_captures_active, memory_order_relaxed) == 0) {
        struct shim_fence fence;
        if ((status = shim_fence_new(&fence)) != CUDA_SUCCESS) return status;
        const uint64_t argument[8] = {fence.index, fence.value};
        status = shim_async(VGPU_CALL_wireFenceContext, argument, NULL, 0);
        if (status == CUDA_SUCCESS) status = shim_fence_wait(&fence);
        if (status != CUDA_SUCCESS) return status;
        shim_fence_free(&fence);
    }
    if (!shim_map_remove(&shim_memory_map, base, NULL)) return CUDA_ERROR_INVALID_VALUE;
    shim_pinned_give_back(&range);
    return CUDA_SUCCESS;
}

CUresult cuMemHostGetDevicePointer_v2(void *pdptr, void *p, unsigned int Flags)
{
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    struct shim_range range;
    uint64_t address = (uint64_t)(uintptr_t)p;
    if (pdptr == NULL || Flags != 0 || !shim_map_find(&shim_memory_map, address, &range) ||
        (range.kind != SHIM_RANGE_PINNED && range.kind != SHIM_RANGE_REGISTERED))
        return CUDA_ERROR_INVALID_VALUE;
    if (range.kind == SHIM_RANGE_REGISTERED) return shim_refuse(VGPU_CALL_cuMemHostGetDevicePointer_v2);
    *(CUdeviceptr *)pdptr = range.device_address + (address - range.base);
    return CUDA_SUCCESS;
}

CUresult cuMemHostGetFlags(unsigned int *pFlags, void *p)
{
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    struct shim_range range;
    if (pFlags == NULL || !shim_map_find(&shim_memory_map, (uint64_t)(uintptr_t)p, &range) ||
        (range.kind != SHIM_RANGE_PINNED && range.kind != SHIM_RANGE_REGISTERED))
        return CUDA_ERROR_INVALID_VALUE;
    *pFlags = range.flags & (HOSTALLOC_FLAGS | REGISTER_FLAGS);
    return CUDA_SUCCESS;
}

/* Does [address, +size) touch a range of this kind? */
static bool touches(uint64_t address, uint64_t size, uint32_t *kind)
{
    struct shim_range range;
    if (!shim_map_next(&shim_memory_map, address, &range)) return false;
    if (range.base >= address && range.base - address >= size) return false;
    *kind = is_ordinary(&range) ? SHIM_RANGE_PINNED : range.kind;
    return true;
}

CUresult cuMemHostRegister_v2(void *p, size_t bytesize, unsigned int Flags)
{
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    uint64_t address = (uint64_t)(uintptr_t)p;
    uint32_t kind;
    if (p == NULL || bytesize == 0 || (Flags & ~REGISTER_FLAGS) != 0 || address + bytesize < address) return CUDA_ERROR_INVALID_VALUE;
    if (touches(address, bytesize, &kind))
        return kind == SHIM_RANGE_REGISTERED ? CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED : CUDA_ERROR_INVALID_VALUE;
    const struct shim_range range = {.base = address, .size = bytesize, .device_address = 0, .context = shim_current_context_id(),
                                     .kind = SHIM_RANGE_REGISTERED, .flags = Flags | DEVICEMAP};
    shim_range_add(&range);
    return CUDA_SUCCESS;
}

CUresult cuMemHostUnregister(void *p)
{
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    struct shim_range range;
    uint64_t address = (uint64_t)(uintptr_t)p;
    if (p == NULL) return CUDA_ERROR_INVALID_VALUE;
    if (!shim_map_find(&shim_memory_map, address, &range)) return CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
    if (range.kind != SHIM_RANGE_REGISTERED || is_ordinary(&range) || range.base != address) return CUDA_ERROR_INVALID_VALUE;
    shim_map_remove(&shim_memory_map, address, NULL);
    return CUDA_SUCCESS;
}
