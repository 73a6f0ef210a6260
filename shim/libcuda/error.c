/* SPDX-License-Identifier: Apache-2.0 */
/* error.c - names and texts of CUresult. The names are the API's; the texts are our own wording. Works before cuInit. */
#include "core.h"
#include "_generated_prototypes.h"

static const struct { CUresult code; const char *name, *text; } errors[] = {
#define E(name, text) {name, #name, text}
    E(CUDA_SUCCESS, "no error"),
    E(CUDA_ERROR_INVALID_VALUE, "invalid argument"),
    E(CUDA_ERROR_OUT_OF_MEMORY, "out of memory"),
    E(CUDA_ERROR_NOT_INITIALIZED, "cuInit has not been called, or not successfully"),
    E(CUDA_ERROR_DEINITIALIZED, "the driver is shutting down"),
    E(CUDA_ERROR_PROFILER_DISABLED, "profiling is disabled"),
    E(CUDA_ERROR_PROFILER_NOT_INITIALIZED, "the profiler is not initialised (deprecated)"),
    E(CUDA_ERROR_PROFILER_ALREADY_STARTED, "the profiler runs already (deprecated)"),
    E(CUDA_ERROR_PROFILER_ALREADY_STOPPED, "the profiler does not run (deprecated)"),
    E(CUDA_ERROR_STUB_LIBRARY, "this is a stub library, not a driver"),
    E(CUDA_ERROR_CALL_REQUIRES_NEWER_DRIVER, "the call needs a newer driver"),
    E(CUDA_ERROR_DEVICE_UNAVAILABLE, "the device is busy or not available"),
    E(CUDA_ERROR_NO_DEVICE, "no CUDA-capable device was found"),
    E(CUDA_ERROR_INVALID_DEVICE, "no such device"),
    E(CUDA_ERROR_DEVICE_NOT_LICENSED, "the device has no valid licence"),
    E(CUDA_ERROR_INVALID_IMAGE, "the kernel image is invalid"),
    E(CUDA_ERROR_INVALID_CONTEXT, "invalid context, or none is current"),
    E(CUDA_ERROR_CONTEXT_ALREADY_CURRENT, "the context is current already (deprecated)"),
    E(CUDA_ERROR_MAP_FAILED, "mapping failed"),
    E(CUDA_ERROR_UNMAP_FAILED, "unmapping failed"),
    E(CUDA_ERROR_ARRAY_IS_MAPPED, "the array is mapped and cannot be destroyed"),
    E(CUDA_ERROR_ALREADY_MAPPED, "the resource is mapped already"),
    E(CUDA_ERROR_NO_BINARY_FOR_GPU, "the image holds no code for this device"),
    E(CUDA_ERROR_ALREADY_ACQUIRED, "the resource is acquired already"),
    E(CUDA_ERROR_NOT_MAPPED, "the resource is not mapped"),
    E(CUDA_ERROR_NOT_MAPPED_AS_ARRAY, "the resource is not mapped as an array"),
    E(CUDA_ERROR_NOT_MAPPED_AS_POINTER, "the resource is not mapped as a pointer"),
    E(CUDA_ERROR_ECC_UNCORRECTABLE, "an uncorrectable memory error was found"),
    E(CUDA_ERROR_UNSUPPORTED_LIMIT, "the device does not have this limit"),
    E(CUDA_ERROR_CONTEXT_ALREADY_IN_USE, "the context is bound to another thread"),
    E(CUDA_ERROR_PEER_ACCESS_UNSUPPORTED, "peer access between these devices is not supported"),
    E(CUDA_ERROR_INVALID_PTX, "PTX compilation failed"),
    E(CUDA_ERROR_INVALID_GRAPHICS_CONTEXT, "invalid graphics context"),
    E(CUDA_ERROR_NVLINK_UNCORRECTABLE, "an uncorrectable NVLink error was found"),
    E(CUDA_ERROR_JIT_COMPILER_NOT_FOUND, "the PTX compiler library was not found"),
    E(CUDA_ERROR_UNSUPPORTED_PTX_VERSION, "the PTX is of a version this driver does not know"),
    E(CUDA_ERROR_JIT_COMPILATION_DISABLED, "PTX compilation is disabled"),
    E(CUDA_ERROR_UNSUPPORTED_EXEC_AFFINITY, "the device does not support this execution affinity"),
    E(CUDA_ERROR_UNSUPPORTED_DEVSIDE_SYNC, "the code synchronises on the device, which is not supported"),
    E(CUDA_ERROR_CONTAINED, "an error on the device was contained; the process must be restarted"),
    E(CUDA_ERROR_INVALID_SOURCE, "the device kernel source is invalid"),
    E(CUDA_ERROR_FILE_NOT_FOUND, "file not found"),
    E(CUDA_ERROR_SHARED_OBJECT_SYMBOL_NOT_FOUND, "a symbol of a shared object was not found"),
    E(CUDA_ERROR_SHARED_OBJECT_INIT_FAILED, "a shared object could not be initialised"),
    E(CUDA_ERROR_OPERATING_SYSTEM, "a call of the operating system failed"),
    E(CUDA_ERROR_INVALID_HANDLE, "invalid handle"),
    E(CUDA_ERROR_ILLEGAL_STATE, "the resource is not in a state for this call"),
    E(CUDA_ERROR_LOSSY_QUERY, "the answer would lose information"),
    E(CUDA_ERROR_NOT_FOUND, "the named symbol was not found"),
    E(CUDA_ERROR_NOT_READY, "not ready: the work has not finished"),
    E(CUDA_ERROR_ILLEGAL_ADDRESS, "a kernel used an illegal address"),
    E(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "the launch asks for too many resources"),
    E(CUDA_ERROR_LAUNCH_TIMEOUT, "the kernel ran too long and was ended"),
    E(CUDA_ERROR_LAUNCH_INCOMPATIBLE_TEXTURING, "the launch uses an incompatible texturing mode"),
    E(CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED, "peer access is enabled already"),
    E(CUDA_ERROR_PEER_ACCESS_NOT_ENABLED, "peer access has not been enabled"),
    E(CUDA_ERROR_PRIMARY_CONTEXT_ACTIVE, "the primary context is active"),
    E(CUDA_ERROR_CONTEXT_IS_DESTROYED, "the context is destroyed or not initialised yet"),
    E(CUDA_ERROR_ASSERT, "a device-side assertion failed"),
    E(CUDA_ERROR_TOO_MANY_PEERS, "no resources are left for peer access"),
    E(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, "part or all of this memory is registered already"),
    E(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, "this memory is not registered"),
    E(CUDA_ERROR_HARDWARE_STACK_ERROR, "a kernel's call stack failed in hardware"),
    E(CUDA_ERROR_ILLEGAL_INSTRUCTION, "a kernel met an illegal instruction"),
    E(CUDA_ERROR_MISALIGNED_ADDRESS, "a kernel used a misaligned address"),
    E(CUDA_ERROR_INVALID_ADDRESS_SPACE, "a kernel used an address of the wrong space"),
    E(CUDA_ERROR_INVALID_PC, "a kernel's program counter left its program"),
    E(CUDA_ERROR_LAUNCH_FAILED, "a kernel failed for an unspecified reason"),
    E(CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE, "too many blocks for a cooperative launch"),
    E(CUDA_ERROR_TENSOR_MEMORY_LEAK, "a kernel ended without giving back tensor memory"),
    E(CUDA_ERROR_NOT_PERMITTED, "not permitted"),
    E(CUDA_ERROR_NOT_SUPPORTED, "not supported"),
    E(CUDA_ERROR_SYSTEM_NOT_READY, "the system is not ready for CUDA work yet"),
    E(CUDA_ERROR_SYSTEM_DRIVER_MISMATCH, "parts of the driver are of versions that do not fit together"),
    E(CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE, "forward compatibility is not supported on this device"),
    E(CUDA_ERROR_MPS_CONNECTION_FAILED, "the MPS server could not be reached"),
    E(CUDA_ERROR_MPS_RPC_FAILURE, "a call to the MPS server failed"),
    E(CUDA_ERROR_MPS_SERVER_NOT_READY, "the MPS server is not ready for new clients"),
    E(CUDA_ERROR_MPS_MAX_CLIENTS_REACHED, "the MPS server takes no more clients"),
    E(CUDA_ERROR_MPS_MAX_CONNECTIONS_REACHED, "the MPS server has no connection left"),
    E(CUDA_ERROR_MPS_CLIENT_TERMINATED, "the MPS server ended this client"),
    E(CUDA_ERROR_CDP_NOT_SUPPORTED, "dynamic parallelism is not supported here"),
    E(CUDA_ERROR_CDP_VERSION_MISMATCH, "versions of dynamic parallelism do not fit together"),
    E(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "not allowed while a stream is capturing"),
    E(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "an earlier error has invalidated the capture"),
    E(CUDA_ERROR_STREAM_CAPTURE_MERGE, "the call would have merged two captures"),
    E(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, "the capture was not begun on this stream"),
    E(CUDA_ERROR_STREAM_CAPTURE_UNJOINED, "the capture has a fork that was not joined"),
    E(CUDA_ERROR_STREAM_CAPTURE_ISOLATION, "the call would create a dependency across the capture's border"),
    E(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, "the call would depend on the legacy stream while it captures"),
    E(CUDA_ERROR_CAPTURED_EVENT, "the event was last recorded in a capture"),
    E(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD, "the capture was begun by another thread"),
    E(CUDA_ERROR_TIMEOUT, "the wait timed out"),
    E(CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE, "the executable graph cannot be updated this way"),
    E(CUDA_ERROR_EXTERNAL_DEVICE, "a device outside CUDA failed"),
    E(CUDA_ERROR_INVALID_CLUSTER_SIZE, "invalid cluster size"),
    E(CUDA_ERROR_FUNCTION_NOT_LOADED, "the function is not loaded"),
    E(CUDA_ERROR_INVALID_RESOURCE_TYPE, "the resource is of the wrong type"),
    E(CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION, "the resources cannot be configured this way"),
    E(CUDA_ERROR_KEY_ROTATION, "the key rotation is over its limit"),
    E(CUDA_ERROR_UNKNOWN, "unknown error"),
#undef E
};

static int find(unsigned code)
{
    for (unsigned i = 0; i < sizeof errors / sizeof *errors; i++)
        if ((unsigned)errors[i].code == code) return (int)i;
    return -1;
}

static CUresult answer(int found, const char *text, void *out)
{
    if (out == NULL) return CUDA_ERROR_INVALID_VALUE;
    *(const char **)out = text;
    return found < 0 ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuGetErrorName(unsigned int error, void *pStr)
{
    int found = find(error);
    return answer(found, found < 0 ? NULL : errors[found].name, pStr);
}

CUresult cuGetErrorString(unsigned int error, void *pStr)
{
    int found = find(error);
    return answer(found, found < 0 ? NULL : errors[found].text, pStr);
}
