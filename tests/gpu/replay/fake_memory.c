/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fake_memory.c - the fake driver with memory: device memory is host memory in a table, so addresses are checked as the
 * real driver checks them. Work is done at once; being busy (cuCtxSetLimit 1001) only makes it report so later.
 *
 *   cuCtxSetLimit(1007, n)        the n-th copy from now on (0: the next one) fails with 999;
 *                                 FAKE_FAIL_COPY=n in the environment does the same from the start
 *   FAKE_FAULT_COPY=n             the n-th copy makes the device busy for 50 ms, and then everything answers 700
 *   cuCtxGetLimit(1008)           bytes of device memory in use
 *   cuCtxGetLimit(1009)           synchronizing calls of the driver that found the device at work
 *   cuCtxSetLimit(1010, n)        the next texture or surface is given the value n
 *   cuCtxGetLimit(1010)           textures and surfaces that there are
 *   FAKE_NVML=crowd|stranger|stuck  what the management library in here knows of processes: ours among a hundred, not ours, or always
 *                                 the same; else ours alone
 */
#define cuMemAlloc_v2 plain_alloc
#define cuMemFree_v2 plain_free
#define cuMemHostRegister_v2 plain_register
#define cuCtxSetLimit plain_set_limit
#define cuCtxGetLimit plain_get_limit
#define cuStreamWriteValue64_v2 plain_write
#define cuStreamDestroy_v2 plain_stream_destroy
#include "fake_driver.c"
#undef cuMemAlloc_v2
#undef cuMemFree_v2
#undef cuMemHostRegister_v2
#undef cuCtxSetLimit
#undef cuCtxGetLimit
#undef cuStreamWriteValue64_v2
#undef cuStreamDestroy_v2

#include <stdbool.h>
#include <sys/mman.h>

#define UNIT (2ull << 20)
#define ENTRIES 65536
#define HOST 1
#define DEVICE 2
#define ARRAY 3

enum kind { FREE, ALLOCATED, POOLED, PINNED, RESERVED, MAPPED };
static struct area { uint64_t base, size; enum kind kind; int access; void *memory; } areas[ENTRIES];
static struct area *top = areas;
static uint64_t in_use;
static _Atomic long fail_after = -1;
static _Atomic long fault_after = -1;
static bool never_writes;

__attribute__((constructor)) static void read_environment(void)
{
    if (getenv("FAKE_NO_WRITES") != NULL)
        never_writes = true;
    const char *text = getenv("FAKE_FAIL_COPY");
    if (text != NULL)
        atomic_store(&fail_after, atol(text));
    text = getenv("FAKE_FAULT_COPY");
    if (text != NULL)
        atomic_store(&fault_after, atol(text));
}

struct physical { uint64_t size; int handles, mappings; };

static struct area *find(uint64_t address, uint64_t size, bool reserved)
{
    for (struct area *a = areas; a < top; a++)
        if (a->kind != FREE && (a->kind == RESERVED) == reserved && address - a->base < a->size)
            return size <= a->size - (address - a->base) ? a : NULL;
    return NULL;
}

/* Mappings side by side are one range. */
static bool reachable(uint64_t address, uint64_t size)
{
    struct area *a;
    while ((a = find(address, 1, false)) != NULL && (a->kind != MAPPED || a->access != 0)) {
        uint64_t left = a->size - (address - a->base);
        if (size <= left)
            return true;
        if (a->kind != MAPPED)
            return false;
        size -= left;
        address += left;
    }
    return false;
}

static struct area *add(uint64_t base, uint64_t size, enum kind kind, void *memory)
{
    struct area *a;
    /* Replays that ended left what they had registered; nothing else can lie where memory was just got. */
    for (a = areas; kind != MAPPED && a < top; a++)
        if (a->kind == PINNED && a->base < base + size && base < a->base + a->size)
            a->kind = FREE;
    a = areas;
    while (a < top && a->kind != FREE)
        a++;
    if (a == areas + ENTRIES)
        abort();
    *a = (struct area){base, size, kind, 0, memory};
    if (a == top)
        top++;
    return a;
}

#ifdef FAKE_UNITS
/* Memory in units: a small block lies with others in one, a large one begins one of its own. Nothing is given again. */
static uint64_t place(uint64_t size)
{
    static uint64_t slab, used = UNIT;
    uint64_t room = size < UNIT ? UNIT : (size + UNIT - 1) / UNIT * UNIT;
    if (size < UNIT && used + 4096 <= UNIT && size <= 4096)
        return slab + (used += 4096) - 4096;
    uint64_t at = (uint64_t)mmap(NULL, room + UNIT, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    at = (at + UNIT - 1) / UNIT * UNIT;
    if (size < UNIT) {
        slab = at;
        used = 4096;
    }
    return at;
}
#define mmap(none, size, ...) ((void *)place(size))
#define munmap(base, size) (void)0
#endif

static uint64_t allocate(uint64_t size, enum kind kind)
{
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        return 0;
    pthread_mutex_lock(&lock);
    add((uint64_t)memory, size, kind, NULL);
    in_use += size;
    pthread_mutex_unlock(&lock);
    return (uint64_t)memory;
}

static int release(uint64_t address)
{
    pthread_mutex_lock(&lock);
    struct area *a = find(address, 1, false);
    int status = address == 0 ? 0 : a == NULL || a->base != address || (a->kind != ALLOCATED && a->kind != POOLED) ? 1 : 0;
    if (status == 0 && a != NULL) {
        munmap((void *)a->base, a->size);
        in_use -= a->size;
        a->kind = FREE;
    }
    pthread_mutex_unlock(&lock);
    return status;
}

#ifdef FAKE_UNITS
#undef mmap
#undef munmap
#endif

/* What pools do with memory that was freed in a stream's order: nothing, until the stream is synchronized with. Trimming does not
 * get at it before. */
#define RELEASE_THRESHOLD 4
#define RESERVED_CURRENT 5
static struct { void *stream; uint64_t *pool; } unsynchronized[256];
static unsigned unsynchronized_count;

static void lower(uint64_t *pool, uint64_t keep) { pool[RESERVED_CURRENT] = pool[RESERVED_CURRENT] < keep ? pool[RESERVED_CURRENT] : keep; }
static bool is_unsynchronized(const uint64_t *pool)
{
    for (unsigned i = 0; i < unsynchronized_count; i++)
        if (unsynchronized[i].pool == pool)
            return true;
    return false;
}
static void synchronized(void *stream)
{
    for (unsigned i = unsynchronized_count; i-- > 0;) {
        uint64_t *pool = unsynchronized[i].pool;
        if (unsynchronized[i].stream != stream)
            continue;
        unsynchronized[i] = unsynchronized[--unsynchronized_count];
        if (!is_unsynchronized(pool))
            lower(pool, pool[RELEASE_THRESHOLD]);
    }
}
static uint64_t *pool_of(uint64_t address)
{
    struct area *a = find(address, 1, false);
    return a != NULL && a->kind == POOLED ? a->memory : NULL;
}
static uint64_t syncs; /* synchronizing calls that had something to wait for */
EXPORT int cuStreamSynchronize(void *stream)
{
    int status;
    for (bool first = true; (status = device()) == NOT_READY; first = false) {
        syncs += first;
        nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
    }
    synchronized(stream);
    return status;
}
EXPORT int cuStreamDestroy_v2(void *stream)
{
    synchronized(stream);
    return plain_stream_destroy(stream);
}

EXPORT int cuMemAlloc_v2(uint64_t *address, size_t size) { return size == 0 ? 1 : size >= 1ull << 40 || (*address = allocate(size, ALLOCATED)) == 0 ? 2 : 0; }
EXPORT int cuMemFree_v2(uint64_t address)
{
    uint64_t *pool = pool_of(address);
    if (pool != NULL && !is_unsynchronized(pool))
        lower(pool, pool[RELEASE_THRESHOLD]);
    return release(address);
}
EXPORT int cuMemAllocPitch_v2(uint64_t *address, size_t *pitch, size_t width, size_t height, unsigned element)
{
    (void)element;
    *pitch = (width + 511) & ~511ull;
    return cuMemAlloc_v2(address, *pitch * height);
}
/* With FAKE_UNITS memory is taken in units, and small arrays share units of their own. */
static uint64_t small_arrays, large_arrays;
static uint64_t units(uint64_t bytes) { return (bytes + UNIT - 1) / UNIT * UNIT; }
#ifdef FAKE_UNITS
#define TAKEN (units(in_use) + units(small_arrays) + large_arrays)
#else
#define TAKEN in_use
#endif
EXPORT int cuMemGetInfo_v2(size_t *available, size_t *total) { *total = 8ull << 30; *available = *total - TAKEN; return 0; }
EXPORT int cuMemGetAddressRange_v2(uint64_t *base, size_t *size, uint64_t address)
{
    pthread_mutex_lock(&lock);
    struct area *a = find(address, 1, false);
    if (a != NULL) {
        *base = a->base;
        *size = a->size;
    }
    pthread_mutex_unlock(&lock);
    return a != NULL ? 0 : 500;
}
EXPORT int cuMemHostRegister_v2(void *p, size_t size, unsigned flags)
{
    pthread_mutex_lock(&lock);
    add((uint64_t)p, size, PINNED, NULL);
    pthread_mutex_unlock(&lock);
    return plain_register(p, size, flags);
}

static int transfer(void *to, const void *from, uint64_t size, bool check_to, bool check_from)
{
    long left = atomic_load(&fail_after);
    if (left >= 0 && atomic_fetch_sub(&fail_after, 1) == 0)
        return 999;
    if (atomic_load(&fault_after) >= 0 && atomic_fetch_sub(&fault_after, 1) == 0) {
        uint64_t later = now() + 50000000;
        atomic_store(&fault_at, later);
        atomic_store(&busy_until, later);
    }
    pthread_mutex_lock(&lock);
    bool good = (!check_to || reachable((uint64_t)to, size)) && (!check_from || reachable((uint64_t)from, size));
    pthread_mutex_unlock(&lock);
    if (!good)
        return 1;
    memmove(to, from, size);
    return 0;
}
EXPORT int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t size, void *s) { (void)s; return transfer((void *)to, from, size, true, false); }
EXPORT int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t size, void *s) { (void)s; return transfer(to, (void *)from, size, false, true); }
EXPORT int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t size, void *s) { (void)s; return transfer((void *)to, (void *)from, size, true, true); }

struct box { size_t sx, sy, sz, sl; unsigned st; const void *sh; uint64_t sd; void *sa, *sr; size_t sp, srows; size_t dx, dy, dz, dl; unsigned dt; void *dh; uint64_t dd; void *da, *dr; size_t dp, drows, width, height, depth; };
_Static_assert(sizeof(struct box) == 200, "CUDA_MEMCPY3D");

/* Arrays: rows without gaps. Whoever names one is believed, and so is what is said of where in it: a worker must have looked. */
struct array { uint64_t magic; size_t size[3], needs; bool empty; unsigned char bytes[]; };
#define ARRAY_MAGIC 0x7961727261206120ull
#define DEFERRED 0x80u
static void count_array(const struct array *array, int sign)
{
    uint64_t bytes = array->size[0] * array->size[1] * array->size[2], *sum = &in_use;
    if (array->empty)
        return;
#ifdef FAKE_UNITS
    sum = array->needs <= UNIT ? &small_arrays : &large_arrays;
    bytes = array->needs <= UNIT ? (bytes + 511) / 512 * 512 : units(array->needs);
#endif
    *sum += (uint64_t)sign * bytes;
}
EXPORT int cuArray3DCreate_v2(void **made, const struct { size_t width, height, depth; unsigned format, channels, flags; } *asked)
{
    static const unsigned char widths[] = {[0x01] = 1, [0x02] = 2, [0x03] = 4, [0x08] = 1, [0x09] = 2, [0x0a] = 4, [0x10] = 2, [0x20] = 4};
    size_t row = asked->width * widths[asked->format] * asked->channels, rows = asked->height ? asked->height : 1;
    size_t slices = asked->depth ? asked->depth : 1, bytes;
    if (__builtin_mul_overflow(row, rows, &bytes) || __builtin_mul_overflow(bytes, slices, &bytes))
        abort(); /* it must have been seen by then */
    bool empty = (asked->flags & DEFERRED) != 0;
    if (row > 1u << 20)
        return 1;
    if (bytes > 1u << 30 && !empty)
        return 2;
    struct array *array = calloc(1, sizeof *array + (empty ? 0 : bytes));
    *array = (struct array){ARRAY_MAGIC, {row, rows, slices}, .empty = empty};
    array->needs = ((row + 63) / 64 * 64 * ((rows + 7) / 8 * 8) * slices + 65535) / 65536 * 65536;
    count_array(array, 1);
    *made = array;
    return 0;
}
EXPORT int cuArrayGetMemoryRequirements(size_t *requirements, const struct array *array, int device)
{
    (void)device;
    if (array->magic != ARRAY_MAGIC)
        abort();
    if (!array->empty)
        return 1;
    requirements[0] = array->needs;
    requirements[1] = 65536;
    return 0;
}
EXPORT int cuArrayDestroy(struct array *array)
{
    if (array->magic != ARRAY_MAGIC)
        abort();
    count_array(array, -1);
    array->magic = 0;
    free(array);
    return 0;
}

/* The management library. */
static int card;
EXPORT int nvmlInit_v2(void) { return 0; }
EXPORT int nvmlDeviceGetHandleByUUID(const char *name, void **device)
{
    *device = &card;
    return strcmp(name, "GPU-abababab-abab-abab-abab-abababababab") == 0 ? 0 : 6;
}
EXPORT int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, struct { unsigned pid; unsigned long long used; unsigned instance[2]; } *found)
{
    const char *how = getenv("FAKE_NVML");
    if (how == NULL)
        how = "";
    unsigned there = strcmp(how, "crowd") == 0 ? 100 : 1, room = *count;
    *count = there;
    if (device != &card)
        return 2;
    if (room < there)
        return 7;
    for (unsigned i = 0; i < there; i++) {
        found[i].pid = (unsigned)getpid() + (strcmp(how, "stranger") == 0 ? 1 : there - 1 - i);
        found[i].used = 500000000 + (strcmp(how, "stuck") == 0 ? 0 : TAKEN);
    }
    return 0;
}
static unsigned char *inside(const struct array *array, size_t x, size_t y, size_t z)
{
    if (array->magic != ARRAY_MAGIC)
        abort();
    return (unsigned char *)array->bytes + (z * array->size[1] + y) * array->size[0] + x;
}

/* Textures and surfaces: what they are made of must have been looked at, and who destroys one must own it. */
struct resource { unsigned type; union { const struct array *array; struct { uint64_t address; unsigned format, channels; size_t size[3]; } memory; int reserved[32]; }; unsigned flags; };
_Static_assert(sizeof(struct resource) == 144, "CUDA_RESOURCE_DESC");
struct how { unsigned modes[3], filter, flags, anisotropy, levels; float bias[3], border[4]; int reserved[12]; };
_Static_assert(sizeof(struct how) == 104, "CUDA_TEXTURE_DESC");
struct view { unsigned format; size_t size[3]; unsigned levels[2], layers[2], reserved[16]; };
_Static_assert(sizeof(struct view) == 112, "CUDA_RESOURCE_VIEW_DESC");
static uint64_t images[ENTRIES], next_image, image_count;

static int make_image(uint64_t *made, const struct resource *resource)
{
    if (resource->flags != 0 || resource->type == 1 || resource->type > 3)
        abort();
    if (resource->type == 0 && resource->array->magic != ARRAY_MAGIC)
        abort();
    for (int i = resource->type == 0 ? 2 : resource->type == 2 ? 6 : 10; i < 32; i++)
        if (resource->reserved[i] != 0)
            abort();
    for (uint64_t i = 0; i < ENTRIES; i++)
        if (images[i] == 0) {
            *made = next_image != 0 ? next_image : i + 1;
            images[i] = *made;
            next_image = 0;
            image_count++;
            return 0;
        }
    return 2;
}
static int end_image(uint64_t value)
{
    for (uint64_t i = 0; i < ENTRIES; i++)
        if (images[i] == value && value != 0) {
            images[i] = 0;
            image_count--;
            return 0;
        }
    abort();
}
EXPORT int cuTexObjectCreate(uint64_t *made, const struct resource *resource, const struct how *how, const struct view *view)
{
    if (how->modes[0] > 3 || how->modes[1] > 3 || how->modes[2] > 3 || how->filter > 1 || (how->flags & ~0x73u) != 0)
        abort();
    for (int i = 0; i < 12; i++)
        if (how->reserved[i] != 0)
            abort();
    if (view != NULL && (resource->type != 0 || view->format > 0x22 || view->reserved[0] != 0 || view->reserved[15] != 0))
        abort();
    return make_image(made, resource);
}
EXPORT int cuSurfObjectCreate(uint64_t *made, const struct resource *resource)
{
    if (resource->type != 0)
        abort();
    return make_image(made, resource);
}
EXPORT int cuTexObjectDestroy(uint64_t value) { return end_image(value); }
EXPORT int cuSurfObjectDestroy(uint64_t value) { return end_image(value); }

EXPORT int cuMemcpy3DAsync_v2(const struct box *asked, void *s)
{
    (void)s;
    struct box filled = *asked, *b = &filled; /* what is not said is as little as the box needs */
    b->sp = b->sp ? b->sp : b->sx + b->width;
    b->dp = b->dp ? b->dp : b->dx + b->width;
    b->srows = b->srows ? b->srows : b->sy + b->height;
    b->drows = b->drows ? b->drows : b->dy + b->height;
    if (b->st == ARRAY || b->dt == ARRAY) {
        for (size_t z = 0; z < b->depth; z++)
            for (size_t y = 0; y < b->height; y++) {
                size_t from_at = (z * b->srows + y) * b->sp, to_at = (z * b->drows + y) * b->dp;
                const void *from = b->st == ARRAY ? inside(b->sa, b->sx, b->sy + y, b->sz + z) : b->st == HOST ? (const unsigned char *)b->sh + from_at : (void *)(b->sd + from_at);
                void *to = b->dt == ARRAY ? inside(b->da, b->dx, b->dy + y, b->dz + z) : b->dt == HOST ? (unsigned char *)b->dh + to_at : (void *)(b->dd + to_at);
                int status = transfer(to, from, b->width, b->dt == DEVICE, b->st == DEVICE);
                if (status != 0)
                    return status;
            }
        return 0;
    }
    const char *from = b->st == HOST ? b->sh : (void *)b->sd;
    char *to = b->dt == HOST ? b->dh : (void *)b->dd;
    if (b->sx | b->sy | b->sz | b->dx | b->dy | b->dz || b->sp < b->width || b->dp < b->width || b->srows < b->height || b->drows < b->height)
        return 1;
    for (size_t z = 0; z < b->depth; z++)
        for (size_t y = 0; y < b->height; y++) {
            int status = transfer(to + (z * b->drows + y) * b->dp, from + (z * b->srows + y) * b->sp, b->width, b->dt == DEVICE, b->st == DEVICE);
            if (status != 0)
                return status;
        }
    return 0;
}

static int fill(uint64_t to, size_t pitch, unsigned value, size_t element, size_t width, size_t height)
{
    for (size_t y = 0; y < height; y++)
        for (size_t x = 0; x < width; x++) {
            uint64_t at = to + y * pitch + x * element;
            if (x == 0 && !reachable(at, width * element))
                return 1;
            memcpy((void *)at, &value, element);
        }
    return 0;
}
EXPORT int cuMemsetD8Async(uint64_t to, unsigned char v, size_t n, void *s) { (void)s; return fill(to, 0, v, 1, n, 1); }
EXPORT int cuMemsetD16Async(uint64_t to, unsigned short v, size_t n, void *s) { (void)s; return fill(to, 0, v, 2, n, 1); }
EXPORT int cuMemsetD32Async(uint64_t to, unsigned v, size_t n, void *s) { (void)s; return fill(to, 0, v, 4, n, 1); }
EXPORT int cuMemsetD2D8Async(uint64_t to, size_t pitch, unsigned char v, size_t w, size_t h, void *s) { (void)s; return fill(to, pitch, v, 1, w, h); }
EXPORT int cuMemsetD2D16Async(uint64_t to, size_t pitch, unsigned short v, size_t w, size_t h, void *s) { (void)s; return fill(to, pitch, v, 2, w, h); }
EXPORT int cuMemsetD2D32Async(uint64_t to, size_t pitch, unsigned v, size_t w, size_t h, void *s) { (void)s; return fill(to, pitch, v, 4, w, h); }

/* ---- virtual memory ---- */

EXPORT int cuMemAddressReserve(uint64_t *address, size_t size, size_t alignment, uint64_t wish, uint64_t flags)
{
    (void)alignment; (void)wish;
    if (size == 0 || size % UNIT != 0 || flags != 0)
        return 1;
    char *memory = mmap(NULL, size + UNIT, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        return 2;
    *address = ((uint64_t)memory + UNIT - 1) & ~(UNIT - 1);
    pthread_mutex_lock(&lock);
    add(*address, size, RESERVED, memory);
    pthread_mutex_unlock(&lock);
    return 0;
}
EXPORT int cuMemAddressFree(uint64_t address, size_t size)
{
    pthread_mutex_lock(&lock);
    struct area *a = find(address, 1, true);
    int status = a == NULL || a->base != address || a->size != size ? 1 : 0;
    if (status == 0) {
        munmap(a->memory, size + UNIT);
        a->kind = FREE;
    }
    pthread_mutex_unlock(&lock);
    return status;
}
EXPORT int cuMemCreate(uint64_t *handle, size_t size, const int *properties, uint64_t flags)
{
    if (size == 0 || size % UNIT != 0 || flags != 0 || properties[0] != 1 || properties[1] != 0 || properties[2] != 1 || properties[3] != 0)
        return 1;
    if (size >= 1ull << 40)
        return 2;
    struct physical *p = calloc(1, sizeof *p);
    *p = (struct physical){.size = size, .handles = 1};
    *handle = (uint64_t)p;
    in_use += size;
    return 0;
}
static void drop(struct physical *p)
{
    if (p->handles == 0 && p->mappings == 0) {
        in_use -= p->size;
        free(p);
    }
}
EXPORT int cuMemRelease(struct physical *p)
{
    if (p->handles == 0)
        return 1;
    p->handles--;
    drop(p);
    return 0;
}
EXPORT int cuMemMap(uint64_t address, size_t size, size_t offset, struct physical *p, uint64_t flags)
{
    if (flags != 0 || find(address, size, true) == NULL || find(address, 1, false) != NULL)
        return 1;
    if (offset != 0 || size != p->size)
        return 801;
    mprotect((void *)address, size, PROT_READ | PROT_WRITE);
    pthread_mutex_lock(&lock);
    add(address, size, MAPPED, p);
    pthread_mutex_unlock(&lock);
    p->mappings++;
    return 0;
}
EXPORT int cuMemUnmap(uint64_t address, size_t size)
{
    if (find(address, size, true) == NULL)
        return 1;
    pthread_mutex_lock(&lock);
    for (struct area *a = areas; a < top; a++)
        if (a->kind == MAPPED && a->base >= address && a->base < address + size) {
            struct physical *p = a->memory;
            a->kind = FREE;
            p->mappings--;
            drop(p);
        }
    pthread_mutex_unlock(&lock);
    return 0;
}
EXPORT int cuMemSetAccess(uint64_t address, size_t size, const int *description, size_t count)
{
    (void)count;
    if (description[0] != 1 || description[1] != 0)
        return 1;
    for (struct area *a = areas; a < top; a++)
        if (a->kind == MAPPED && a->base >= address && a->base < address + size)
            a->access = description[2];
    return 0;
}
EXPORT int cuMemGetAccess(unsigned long long *flags, const int *location, uint64_t address)
{
    (void)location;
    struct area *a = find(address, 1, false);
    if (a == NULL)
        return 1;
    *flags = a->kind == MAPPED ? (unsigned long long)a->access : 3;
    return 0;
}
EXPORT int cuMemRetainAllocationHandle(void **handle, void *address)
{
    struct area *a = find((uint64_t)address, 1, false);
    if (a == NULL || a->kind != MAPPED)
        return 1;
    ((struct physical *)a->memory)->handles++;
    *handle = a->memory;
    return 0;
}

/* ---- pools ---- */

static uint64_t pool_attribute[2][16];
EXPORT int cuDeviceGetDefaultMemPool(void **pool, int d) { (void)d; *pool = &pool_attribute[0]; return 0; }
EXPORT int cuDeviceGetMemPool(void **pool, int d) { return cuDeviceGetDefaultMemPool(pool, d); }
/* What a pool holds is what was last said of it (attribute 5): nothing here keeps memory. */
EXPORT int cuMemPoolTrimTo(uint64_t *pool, size_t keep)
{
    if (!is_unsynchronized(pool))
        lower(pool, keep);
    return 0;
}
EXPORT int cuMemPoolCreate(void **pool, const int *properties)
{
    if (properties[0] != 1 || properties[1] != 0 || properties[2] != 1)
        return 1;
    *pool = calloc(16, 8);
    return 0;
}
EXPORT int cuMemPoolDestroy(void *pool)
{
    for (unsigned i = unsynchronized_count; i-- > 0;)
        if (unsynchronized[i].pool == pool)
            unsynchronized[i] = unsynchronized[--unsynchronized_count];
    for (struct area *a = areas; a < top; a++)
        if (a->kind == POOLED && a->memory == pool)
            a->memory = NULL;
    free(pool);
    return 0;
}
EXPORT int cuMemPoolSetAttribute(uint64_t *pool, unsigned attribute, const void *value)
{
    if (attribute < 1 || attribute > 8)
        return 1;
    memcpy(&pool[attribute], value, attribute <= 3 ? 4 : 8);
    return 0;
}
EXPORT int cuMemPoolGetAttribute(uint64_t *pool, unsigned attribute, void *value)
{
    if (attribute < 1 || attribute > 8)
        return 1;
    memcpy(value, &pool[attribute], attribute <= 3 ? 4 : 8);
    return 0;
}
EXPORT int cuMemPoolSetAccess(void *pool, const int *description, size_t count) { (void)pool; return count == 1 && description[1] == 0 ? 0 : 1; }
EXPORT int cuMemPoolGetAccess(unsigned *flags, void *pool, const int *location) { (void)pool; *flags = 3; return location[1] == 0 ? 0 : 1; }
EXPORT int cuMemAllocFromPoolAsync(uint64_t *address, size_t size, void *pool, void *s)
{
    (void)s;
    if (size >= 1ull << 40 || (*address = allocate(size, POOLED)) == 0)
        return 2;
    find(*address, 1, false)->memory = pool;
    return 0;
}
EXPORT int cuMemAllocAsync(uint64_t *address, size_t size, void *s) { return cuMemAllocFromPoolAsync(address, size, &pool_attribute[0], s); }
EXPORT int cuMemFreeAsync(uint64_t address, void *s)
{
    uint64_t *pool = pool_of(address);
    if (pool != NULL && unsynchronized_count < 256) {
        unsynchronized[unsynchronized_count].stream = s;
        unsynchronized[unsynchronized_count++].pool = pool;
    }
    return release(address);
}

/* ---- streams and events ---- */

EXPORT int cuStreamGetAttribute(void *stream, unsigned attribute, void *value)
{
    (void)stream;
    if (attribute != 1 && attribute != 3)
        return 1;
    memset(value, (int)attribute, 64);
    return 0;
}
EXPORT int cuStreamSetAttribute(void *stream, unsigned attribute, const void *value) { (void)stream; return attribute == 3 && *(const int *)value == 2 ? 0 : 1; }
EXPORT int cuStreamWriteValue32_v2(void *stream, uint64_t address, uint32_t value, unsigned flags)
{
    (void)stream;
    if (flags > 1 || !reachable(address, 4))
        return 1;
    *(uint32_t *)address = value;
    return 0;
}
EXPORT int cuStreamWaitValue32_v2(void *stream, uint64_t address, uint32_t value, unsigned flags)
{
    (void)stream; (void)flags;
    return reachable(address, 4) && *(uint32_t *)address >= value ? 0 : 1;
}
EXPORT int cuStreamBatchMemOp_v2(void *stream, unsigned count, const uint64_t (*operation)[6], unsigned flags)
{
    (void)stream; (void)flags;
    for (unsigned i = 0; i < count; i++) {
        if ((uint32_t)operation[i][0] != 2 || !reachable(operation[i][1], 4))
            return 1;
        *(uint32_t *)operation[i][1] = (uint32_t)operation[i][2];
    }
    return 0;
}
EXPORT int cuEventRecordWithFlags(void *event, void *stream, unsigned flags) { return flags == 1 ? 401 : cuEventRecord(event, stream); }
EXPORT int cuEventSynchronize(void *event) { (void)event; return 1; }
EXPORT int cuCtxSetLimit(unsigned limit, size_t value)
{
    if (limit == 1010) {
        next_image = value;
        return 0;
    }
    if (limit != 1007)
        return plain_set_limit(limit, value);
    atomic_store(&fail_after, (long)value);
    return 0;
}
EXPORT int cuCtxGetLimit(size_t *value, unsigned limit)
{
    if (limit < 1008 || limit > 1010)
        return plain_get_limit(value, limit);
    *value = limit == 1008 ? in_use : limit == 1009 ? syncs : image_count;
    return 0;
}
EXPORT int cuStreamWriteValue64_v2(void *stream, uint64_t address, uint64_t value, unsigned flags)
{
    (void)stream; (void)flags;
    if (never_writes)
        return 801;
    pthread_mutex_lock(&lock);
    bool good = address % 8 == 0 && reachable(address, 8) && (find(address, 8, false)->kind != PINNED || is_registered(address, 8));
    pthread_mutex_unlock(&lock);
    return good ? write_word(address, value) : 1;
}
