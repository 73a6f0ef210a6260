/* SPDX-License-Identifier: Apache-2.0 */
/*
 * stream_values.c - waits for and writes of memory words in stream order. Addresses are checked here, so that a wrong
 * one is refused by the call that names it, and pinned ones become the device's.
 */
#include "memory.h"

#include "_generated_prototypes.h"

#define WAIT_CONDITIONS 0x3u
#define WAIT_FLUSH 0x40000000u
#define WRITE_NO_BARRIER 0x1u
#define OPERATIONS_MOST 256u

enum operation { WAIT_32 = 1, WRITE_32 = 2, FLUSH = 3, WAIT_64 = 4, WRITE_64 = 5, BARRIER = 6 };

struct parameters { /* CUstreamBatchMemOpParams */
    uint32_t operation, pad;
    uint64_t address, value;
    uint32_t flags, pad2;
    uint64_t alias, pad3;
};
_Static_assert(sizeof(struct parameters) == 48, "CUstreamBatchMemOpParams");

static CUresult check(enum operation operation, uint64_t *address, uint32_t flags, unsigned call)
{
    struct memory_side side;
    uint64_t width = operation == WAIT_64 || operation == WRITE_64 ? 8 : 4;
    bool wait = operation == WAIT_32 || operation == WAIT_64;
    if ((flags & ~(wait ? WAIT_CONDITIONS | WAIT_FLUSH : WRITE_NO_BARRIER)) != 0 || *address % width != 0) return CUDA_ERROR_INVALID_VALUE;
    memory_side_of(*address, width, MEMORY_EXPECT_CUDA, &side);
    if (side.place == MEMORY_NOWHERE) return CUDA_ERROR_INVALID_VALUE;
    if (side.place == MEMORY_PAGEABLE) return shim_refuse(call); /* registered memory is not the device's to see */
    *address = side.device;
    return CUDA_SUCCESS;
}

static CUresult submit(unsigned call, enum operation operation, CUstream stream, uint64_t address, uint64_t value, uint32_t flags)
{
    uint64_t id;
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    if ((status = shim_stream(stream, &id)) != CUDA_SUCCESS) return status;
    if ((status = check(operation, &address, flags, call)) != CUDA_SUCCESS) return status;
    const uint64_t argument[8] = {id, address, value, flags};
    return memory_submit(call, argument, NULL, 0);
}

CUresult cuStreamWaitValue32_v2(CUstream stream, unsigned long long addr, unsigned int value, unsigned int flags)
{
    return submit(VGPU_CALL_cuStreamWaitValue32_v2, WAIT_32, stream, addr, value, flags);
}
CUresult cuStreamWaitValue64_v2(CUstream stream, unsigned long long addr, unsigned long long value, unsigned int flags)
{
    return submit(VGPU_CALL_cuStreamWaitValue64_v2, WAIT_64, stream, addr, value, flags);
}
CUresult cuStreamWriteValue32_v2(CUstream stream, unsigned long long addr, unsigned int value, unsigned int flags)
{
    return submit(VGPU_CALL_cuStreamWriteValue32_v2, WRITE_32, stream, addr, value, flags);
}
CUresult cuStreamWriteValue64_v2(CUstream stream, unsigned long long addr, unsigned long long value, unsigned int flags)
{
    return submit(VGPU_CALL_cuStreamWriteValue64_v2, WRITE_64, stream, addr, value, flags);
}

CUresult cuStreamBatchMemOp_v2(CUstream hStream, unsigned int count, void *paramArray, unsigned int flags)
{
    uint64_t id;
    CUresult status = shim_enter_context();
    if (status != CUDA_SUCCESS) return status;
    if ((status = shim_stream(hStream, &id)) != CUDA_SUCCESS) return status;
    struct parameters operation[OPERATIONS_MOST];
    if (count == 0 || paramArray == NULL || count > OPERATIONS_MOST) return CUDA_ERROR_INVALID_VALUE;
    memcpy(operation, paramArray, count * sizeof operation[0]);
    for (unsigned i = 0; i < count; i++) {
        uint32_t what = operation[i].operation;
        if (what < WAIT_32 || what > BARRIER) return CUDA_ERROR_INVALID_VALUE;
        if (what == FLUSH || what == BARRIER) continue;
        status = check((enum operation)what, &operation[i].address, operation[i].flags, VGPU_CALL_cuStreamBatchMemOp_v2);
        if (status != CUDA_SUCCESS) return status;
        operation[i].alias = 0;
    }
    const uint64_t argument[8] = {id, count, flags};
    return shim_reply(VGPU_CALL_cuStreamBatchMemOp_v2, argument, operation, (uint32_t)(count * sizeof operation[0]), NULL, NULL, 0, NULL);
}
