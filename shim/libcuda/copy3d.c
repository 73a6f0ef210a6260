/* SPDX-License-Identifier: Apache-2.0 */
/*
 * copy3d.c - copies of boxes: cuMemcpy2D and cuMemcpy3D in all their forms.
 *
 * Both are brought to one shape first: a box whose two sides have an address, a pitch and a number of rows per
 * slice. A box without gaps is a plain copy. Otherwise the host's driver does it in one record where both sides
 * are within its reach; pageable memory is packed into staging, some rows or slices at a time.
 * A side that is a CUDA array has no address: it goes by its handle and by where in it the box begins.
 */
#include "array.h"

#include "../../transport/code_wire.h"
#include "_generated_prototypes.h"

#define BATCH_MOST (4ull << 20)
#define BATCH_LEAST (64ull << 10)

struct box_side {
    struct memory_side at; /* of the first byte; of an array MEMORY_DEVICE, without an address */
    uint64_t pitch, rows;  /* bytes from row to row, rows from slice to slice */
    struct array_box in;   /* in.array NULL: addressed memory */
};
struct box {
    struct box_side to, from;
    uint64_t width, height, depth;
};

static CUresult make_side(struct box_side *side, unsigned type, const void *host, uint64_t device, CUarray array, uint64_t x, uint64_t y,
                          uint64_t z, uint64_t pitch, uint64_t rows, const struct box *box)
{
    uint64_t lines, start, last, hull;
    if (type < CU_MEMORYTYPE_HOST || type > CU_MEMORYTYPE_UNIFIED) return CUDA_ERROR_INVALID_VALUE;
    if (type == CU_MEMORYTYPE_ARRAY) {
        *side = (struct box_side){.at = {.place = MEMORY_DEVICE}, .in = {.array = array, .x = x, .y = y, .z = z}};
        return array_check(&side->in, box->width, box->height, box->depth);
    }
    side->in = (struct array_box){.array = NULL};
    if (pitch == 0) pitch = x + box->width;
    if (rows == 0 || box->depth == 1) rows = rows < y + box->height ? y + box->height : rows;
    if (pitch < x + box->width || x + box->width < x || rows < y + box->height || y + box->height < y) return CUDA_ERROR_INVALID_VALUE;
    if (__builtin_mul_overflow(z, rows, &lines) || __builtin_add_overflow(lines, y, &lines) || __builtin_mul_overflow(lines, pitch, &start) ||
        __builtin_add_overflow(start, x, &start))
        return CUDA_ERROR_INVALID_VALUE;
    if (__builtin_mul_overflow(box->depth - 1, rows, &lines) || __builtin_add_overflow(lines, box->height - 1, &lines) ||
        __builtin_mul_overflow(lines, pitch, &last) || __builtin_add_overflow(last, box->width, &hull))
        return CUDA_ERROR_INVALID_VALUE;
    uint64_t base = type == CU_MEMORYTYPE_HOST ? (uint64_t)(uintptr_t)host : device, address;
    if (base == 0 || __builtin_add_overflow(base, start, &address)) return CUDA_ERROR_INVALID_VALUE;
    memory_side_of(address, hull,
                   type == CU_MEMORYTYPE_HOST ? MEMORY_EXPECT_HOST : type == CU_MEMORYTYPE_DEVICE ? MEMORY_EXPECT_CUDA : MEMORY_EXPECT_ANY,
                   &side->at);
    side->pitch = pitch;
    side->rows = rows;
    return side->at.place == MEMORY_NOWHERE ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

static CUresult make_box(const CUDA_MEMCPY3D *copy, struct box *box)
{
    box->width = copy->WidthInBytes;
    box->height = copy->Height;
    box->depth = copy->Depth;
    if (box->width == 0 || box->height == 0 || box->depth == 0) return CUDA_SUCCESS;
    CUresult status = make_side(&box->from, copy->srcMemoryType, copy->srcHost, copy->srcDevice, copy->srcArray, copy->srcXInBytes, copy->srcY,
                                copy->srcZ, copy->srcPitch, copy->srcHeight, box);
    if (status != CUDA_SUCCESS) return status;
    return make_side(&box->to, copy->dstMemoryType, copy->dstHost, copy->dstDevice, copy->dstArray, copy->dstXInBytes, copy->dstY,
                     copy->dstZ, copy->dstPitch, copy->dstHeight, box);
}

static bool is_dense(const struct box_side *side, const struct box *box)
{
    return side->in.array == NULL && (side->pitch == box->width || box->height * box->depth == 1) && (side->rows == box->height || box->depth == 1);
}

/* One record: both sides are addresses, or offsets, the host's driver reaches. */
static CUresult send(const struct box *box, uint64_t stream, const struct shim_fence *fence)
{
    bool from_arena = box->from.at.place == MEMORY_PINNED, to_arena = box->to.at.place == MEMORY_PINNED;
    const struct array_box *from = &box->from.in, *to = &box->to.in;
    CUDA_MEMCPY3D copy;
    memset(&copy, 0, sizeof copy);
    copy.WidthInBytes = box->width;
    copy.Height = box->height;
    copy.Depth = box->depth;
    copy.srcPitch = box->from.pitch;
    copy.srcHeight = box->from.rows;
    copy.dstPitch = box->to.pitch;
    copy.dstHeight = box->to.rows;
    copy.srcDevice = box->from.at.device;
    copy.srcHost = from_arena ? (const void *)(uintptr_t)box->from.at.offset : NULL;
    copy.dstDevice = box->to.at.device;
    copy.dstHost = to_arena ? (void *)(uintptr_t)box->to.at.offset : NULL;
    copy.srcArray = from->array;
    copy.srcXInBytes = from->x;
    copy.srcY = from->y;
    copy.srcZ = from->z;
    copy.dstArray = to->array;
    copy.dstXInBytes = to->x;
    copy.dstY = to->y;
    copy.dstZ = to->z;
    const uint64_t flags = (from_arena ? VGPU_COPY_SOURCE_IN_ARENA : 0) | (to_arena ? VGPU_COPY_DESTINATION_IN_ARENA : 0) |
                           (from->array != NULL ? VGPU_COPY_SOURCE_IS_ARRAY : 0) | (to->array != NULL ? VGPU_COPY_DESTINATION_IS_ARRAY : 0);
    const uint64_t argument[8] = {stream, flags, fence->index, fence->value};
    return memory_submit(VGPU_CALL_wireCopy3D, argument, &copy, sizeof copy);
}

static CUresult send_direct(const struct box *box, uint64_t stream, bool wait)
{
    struct shim_fence fence = {0};
    CUresult status;
    if (!wait) return send(box, stream, &fence);
    if ((status = shim_fence_new(&fence)) != CUDA_SUCCESS) return status;
    status = send(box, stream, &fence);
    if (status == CUDA_SUCCESS) status = shim_fence_wait(&fence);
    if (status == CUDA_SUCCESS) shim_fence_free(&fence);
    return shim_take_deferred(status);
}

static uint64_t offset_of(const struct box_side *side, uint64_t y, uint64_t z) { return (z * side->rows + y) * side->pitch; }

static void move(struct box_side *side, uint64_t x, uint64_t y, uint64_t z)
{
    if (side->in.array != NULL) {
        side->in.x += x;
        side->in.y += y;
        side->in.z += z;
        return;
    }
    const uint64_t by = offset_of(side, y, z) + x;
    side->at.host += by;
    side->at.device += by;
    side->at.offset += by;
}

static bool has_array(const struct box *box) { return box->from.in.array != NULL || box->to.in.array != NULL; }

/* The part of a box that begins there. */
static struct box part_of(const struct box *box, uint64_t x, uint64_t y, uint64_t z, uint64_t width, uint64_t height, uint64_t depth)
{
    struct box part = *box;
    move(&part.from, x, y, z);
    move(&part.to, x, y, z);
    part.width = width;
    part.height = height;
    part.depth = depth;
    return part;
}

static void copy_rows(uint8_t *to, uint64_t to_pitch, uint64_t to_rows, const uint8_t *from, uint64_t from_pitch, uint64_t from_rows,
                      uint64_t width, uint64_t height, uint64_t depth)
{
    for (uint64_t z = 0; z < depth; z++)
        for (uint64_t y = 0; y < height; y++)
            memmove(to + (z * to_rows + y) * to_pitch, from + (z * from_rows + y) * from_pitch, width);
}

/* Out of a staging buffer, where the rows lie one after the other. */
static void fetch_rows(const struct box *part, const uint8_t *buffer)
{
    const struct box_side *to = &part->to;
    for (uint64_t z = 0; z < part->depth; z++)
        for (uint64_t y = 0; y < part->height; y++, buffer += part->width)
            memory_fetch(to->at.host + offset_of(to, y, z), buffer, part->width);
}

/* Each row is a copy of its own: rows that are long, or an arena that is used up. */
static CUresult stage_rows(const struct box *box, bool up, uint64_t stream)
{
    CUresult status = CUDA_SUCCESS;
    for (uint64_t z = 0; z < box->depth; z++)
        for (uint64_t y = 0; y < box->height && status == CUDA_SUCCESS; y++) {
            uint64_t from = offset_of(&box->from, y, z), to = offset_of(&box->to, y, z);
            status = up ? memory_upload(box->to.at.device + to, box->from.at.host + from, box->width, stream)
                        : memory_download(box->to.at.host + to, box->from.at.device + from, box->width, stream);
        }
    return status;
}

static CUresult stage_part(const struct box *part, bool up, uint64_t stream);

/* Into an array or out of it only boxes go: two smaller ones. */
static CUresult stage_halves(const struct box *box, bool up, uint64_t stream)
{
    const bool by_z = box->depth > 1, by_y = !by_z && box->height > 1;
    /* A piece of a row holds whole elements, of at most 16 bytes. */
    const uint64_t z = by_z ? box->depth / 2 : 0, y = by_y ? box->height / 2 : 0, x = by_z || by_y ? 0 : box->width / 32 * 16;
    const struct box first = part_of(box, 0, 0, 0, x != 0 ? x : box->width, y != 0 ? y : box->height, z != 0 ? z : box->depth);
    const struct box second = part_of(box, x, y, z, box->width - x, box->height - y, box->depth - z);
    CUresult status = stage_part(&first, up, stream);
    return status == CUDA_SUCCESS ? stage_part(&second, up, stream) : status;
}

/* A part of the box through one staging buffer, and `fence` for when it is done with. */
static CUresult send_staged(const struct box *part, bool up, uint64_t stream, uint8_t *buffer, uint64_t offset, struct shim_fence *fence)
{
    struct box staged = *part;
    struct box_side *here = up ? &staged.from : &staged.to;
    *here = (struct box_side){.at = {.place = MEMORY_PINNED, .host = buffer, .offset = offset}, .pitch = part->width, .rows = part->height};
    if (up)
        copy_rows(buffer, part->width, part->height, part->from.at.host, part->from.pitch, part->from.rows, part->width, part->height, part->depth);
    CUresult status = shim_fence_new(fence);
    return status == CUDA_SUCCESS ? send(&staged, stream, fence) : status;
}

static CUresult await_staged(const struct box *part, bool up, const uint8_t *buffer, struct shim_fence *fence)
{
    CUresult status = shim_fence_wait(fence);
    if (status != CUDA_SUCCESS) return status;
    shim_fence_free(fence);
    if (!up) fetch_rows(part, buffer);
    return CUDA_SUCCESS;
}

/* The arena is used up by copies on their way. */
static CUresult stage_in_reserve(const struct box *part, bool up, uint64_t stream)
{
    uint64_t offset;
    struct shim_fence fence;
    uint8_t *buffer = memory_reserve_take(&offset);
    if (buffer == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    CUresult status = send_staged(part, up, stream, buffer, offset, &fence);
    if (status == CUDA_SUCCESS) status = await_staged(part, up, buffer, &fence);
    memory_reserve_give();
    return status;
}

/* A part of the box that fits one staging buffer, in the direction that is not pageable. */
static CUresult stage_part(const struct box *part, bool up, uint64_t stream)
{
    uint64_t offset, size = part->width * part->height * part->depth;
    uint8_t *buffer = shim_arena_allocate(size, 4096, &offset);
    if (buffer == NULL && !has_array(part)) return stage_rows(part, up, stream);
    if (buffer == NULL) return size <= MEMORY_RESERVE_BYTES ? stage_in_reserve(part, up, stream) : stage_halves(part, up, stream);
    struct shim_fence fence;
    CUresult status = send_staged(part, up, stream, buffer, offset, &fence);
    if (status == CUDA_SUCCESS && up) {
        shim_arena_free_after(buffer, &fence);
        return CUDA_SUCCESS;
    }
    const bool is_sent = status == CUDA_SUCCESS;
    if (is_sent) status = await_staged(part, up, buffer, &fence);
    if (status == CUDA_SUCCESS || !is_sent) shim_arena_free(buffer);
    return status;
}

static CUresult stage(const struct box *box, bool up, uint64_t stream);

static CUresult stage_columns(const struct box *box, bool up, uint64_t stream, uint64_t width)
{
    CUresult status = CUDA_SUCCESS;
    for (uint64_t x = 0; x < box->width && status == CUDA_SUCCESS; x += width) {
        const struct box column = part_of(box, x, 0, 0, box->width - x < width ? box->width - x : width, box->height, box->depth);
        status = stage(&column, up, stream);
    }
    return status;
}

static CUresult stage(const struct box *box, bool up, uint64_t stream)
{
    CUresult status = CUDA_SUCCESS;
    const uint64_t batch = memory_piece(BATCH_MOST, BATCH_LEAST);
    if (box->width > batch) return has_array(box) ? stage_columns(box, up, stream, batch) : stage_rows(box, up, stream);
    uint64_t rows = batch / box->width, slices = 1;
    if (rows >= box->height) {
        rows = box->height;
        slices = batch / (box->width * box->height);
    }
    for (uint64_t z = 0; z < box->depth; z += slices)
        for (uint64_t y = 0; y < box->height && status == CUDA_SUCCESS; y += rows) {
            const uint64_t height = box->height - y < rows ? box->height - y : rows, depth = box->depth - z < slices ? box->depth - z : slices;
            const struct box part = part_of(box, 0, y, z, box->width, height, depth);
            status = stage_part(&part, up, stream);
        }
    return status;
}

static CUresult copy_box(const CUDA_MEMCPY3D *copy, uint64_t stream, bool blocking)
{
    struct box box;
    CUresult status = make_box(copy, &box);
    if (status != CUDA_SUCCESS || box.width == 0 || box.height == 0 || box.depth == 0) return status;
    bool up = box.from.at.place == MEMORY_PAGEABLE, down = box.to.at.place == MEMORY_PAGEABLE;
    if (is_dense(&box.from, &box) && is_dense(&box.to, &box))
        return memory_copy(&box.to.at, &box.from.at, box.width * box.height * box.depth, stream, blocking);
    bool capturing = atomic_load_explicit(&shim_captures_active, memory_order_relaxed) != 0 && shim_stream_is_capturing(stream);
    if (!up && !down) {
        bool pinned = box.from.at.place == MEMORY_PINNED || box.to.at.place == MEMORY_PINNED;
        bool host_only = box.from.at.place == MEMORY_PINNED && box.to.at.place == MEMORY_PINNED;
        return send_direct(&box, stream, !capturing && (host_only || (blocking && pinned)));
    }
    if (capturing) return shim_refuse(VGPU_CALL_cuMemcpy3DAsync_v2);
    if (up && (down || box.from.at.registered) && (status = memory_wait_stream(stream)) != CUDA_SUCCESS) return status;
    if (up && down) {
        copy_rows(box.to.at.host, box.to.pitch, box.to.rows, box.from.at.host, box.from.pitch, box.from.rows, box.width, box.height, box.depth);
        return shim_take_deferred(CUDA_SUCCESS);
    }
    status = stage(&box, up, stream);
    return up ? status : shim_take_deferred(status);
}

static CUresult begin(uint64_t *stream, bool blocking, CUstream hStream)
{
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    return blocking ? shim_default_stream(stream) : shim_stream(hStream, stream);
}

static CUresult run3d(const void *pCopy, bool blocking, CUstream hStream)
{
    uint64_t stream;
    CUresult status = begin(&stream, blocking, hStream);
    if (status != CUDA_SUCCESS) return status;
    if (pCopy == NULL) return CUDA_ERROR_INVALID_VALUE;
    CUDA_MEMCPY3D copy;
    memcpy(&copy, pCopy, sizeof copy);
    return copy_box(&copy, stream, blocking);
}

static CUresult run2d(const void *pCopy, bool blocking, CUstream hStream)
{
    uint64_t stream;
    CUresult status = begin(&stream, blocking, hStream);
    if (status != CUDA_SUCCESS) return status;
    if (pCopy == NULL) return CUDA_ERROR_INVALID_VALUE;
    CUDA_MEMCPY2D flat;
    memcpy(&flat, pCopy, sizeof flat);
    CUDA_MEMCPY3D copy;
    memset(&copy, 0, sizeof copy);
    copy.srcXInBytes = flat.srcXInBytes;
    copy.srcY = flat.srcY;
    copy.srcMemoryType = flat.srcMemoryType;
    copy.srcHost = flat.srcHost;
    copy.srcDevice = flat.srcDevice;
    copy.srcPitch = flat.srcPitch;
    copy.srcArray = flat.srcArray;
    copy.dstArray = flat.dstArray;
    copy.dstXInBytes = flat.dstXInBytes;
    copy.dstY = flat.dstY;
    copy.dstMemoryType = flat.dstMemoryType;
    copy.dstHost = flat.dstHost;
    copy.dstDevice = flat.dstDevice;
    copy.dstPitch = flat.dstPitch;
    copy.WidthInBytes = flat.WidthInBytes;
    copy.Height = flat.Height;
    copy.Depth = 1;
    return copy_box(&copy, stream, blocking);
}

/* CUDA_MEMCPY3D_PEER is CUDA_MEMCPY3D with contexts in the reserved pointers. With one device they only have to exist. */
static CUresult run_peer(const void *pCopy, bool blocking, CUstream hStream)
{
    CUDA_MEMCPY3D copy;
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    if (pCopy == NULL) return CUDA_ERROR_INVALID_VALUE;
    memcpy(&copy, pCopy, sizeof copy);
    if (!shim_handle_valid(VGPU_KIND_CONTEXT, (uint64_t)(uintptr_t)copy.reserved0) ||
        !shim_handle_valid(VGPU_KIND_CONTEXT, (uint64_t)(uintptr_t)copy.reserved1))
        return CUDA_ERROR_INVALID_CONTEXT;
    return run3d(&copy, blocking, hStream);
}

CUresult cuMemcpy2D_v2(const void *pCopy) { return run2d(pCopy, true, NULL); }
CUresult cuMemcpy2DUnaligned_v2(const void *pCopy) { return run2d(pCopy, true, NULL); }
CUresult cuMemcpy2DAsync_v2(const void *pCopy, CUstream hStream) { return run2d(pCopy, false, hStream); }
CUresult cuMemcpy3D_v2(const void *pCopy) { return run3d(pCopy, true, NULL); }
CUresult cuMemcpy3DAsync_v2(const void *pCopy, CUstream hStream) { return run3d(pCopy, false, hStream); }
CUresult cuMemcpy3DPeer(const void *pCopy) { return run_peer(pCopy, true, NULL); }
CUresult cuMemcpy3DPeerAsync(const void *pCopy, CUstream hStream) { return run_peer(pCopy, false, hStream); }
