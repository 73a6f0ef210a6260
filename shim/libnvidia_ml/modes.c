/* SPDX-License-Identifier: Apache-2.0 */
/*
 * modes.c - settings of the card as a guest sees them, and features a shared GPU does not offer, in the words NVML has for
 * "there is none" where a program would stumble over NOT_SUPPORTED.
 */
#include "internal.h"

ANSWER_U32(nvmlDeviceGetPersistenceMode, persistence_mode)
ANSWER_U32(nvmlDeviceGetComputeMode, compute_mode)
ANSWER_CONSTANT(nvmlDeviceGetDisplayMode, unsigned, 0)
ANSWER_CONSTANT(nvmlDeviceGetDisplayActive, unsigned, 0)
ANSWER_CONSTANT(nvmlDeviceGetVirtualizationMode, unsigned, 0) /* none: programs are to treat it as a GPU of this machine */
ANSWER_CONSTANT(nvmlDeviceGetAccountingMode, unsigned, 0)
ANSWER_CONSTANT(nvmlDeviceGetAccountingBufferSize, unsigned, 0)
ANSWER_CONSTANT(nvmlDeviceIsMigDeviceHandle, unsigned, 0)
ANSWER_CONSTANT(nvmlDeviceGetMaxMigDeviceCount, unsigned, 0)

static nvmlReturn_t only(nvmlDevice_t device, const void *out)
{
    nvmlReturn_t status = nvml_check(device);
    return status == NVML_SUCCESS && out == NULL ? NVML_ERROR_INVALID_ARGUMENT : status;
}

/* Off on the cards that can be partitioned; the others do not know the question. */
EXPORT nvmlReturn_t nvmlDeviceGetMigMode(nvmlDevice_t device, unsigned *current, unsigned *pending)
{
    struct vgpu_device_page page;
    nvmlReturn_t status = nvml_read(device, &page);
    if (status != NVML_SUCCESS) return status;
    if (current == NULL || pending == NULL) return NVML_ERROR_INVALID_ARGUMENT;
    int major, minor;
    if (!nvml_attribute(&page, ATTRIBUTE_MAJOR, &major) || !nvml_attribute(&page, ATTRIBUTE_MINOR, &minor)) return NVML_ERROR_NOT_SUPPORTED;
    if (!((major == 8 && minor == 0) || major == 9 || major == 10)) return NVML_ERROR_NOT_SUPPORTED;
    *current = *pending = 0;
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetMigDeviceHandleByIndex(nvmlDevice_t device, unsigned index, nvmlDevice_t *instance)
{
    (void)index;
    nvmlReturn_t status = only(device, instance);
    return status == NVML_SUCCESS ? NVML_ERROR_NOT_FOUND : status;
}

EXPORT nvmlReturn_t nvmlDeviceGetEncoderStats(nvmlDevice_t device, unsigned *sessions, unsigned *rate, unsigned *latency)
{
    nvmlReturn_t status = only(device, sessions);
    if (status != NVML_SUCCESS) return status;
    if (rate == NULL || latency == NULL) return NVML_ERROR_INVALID_ARGUMENT;
    *sessions = *rate = *latency = 0;
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetFBCStats(nvmlDevice_t device, struct nvml_capture_stats *stats)
{
    nvmlReturn_t status = only(device, stats);
    if (status == NVML_SUCCESS) *stats = (struct nvml_capture_stats){0};
    return status;
}

/* ---- NVLink fabric: programs read "state 0, not supported" and go on ---- */

EXPORT nvmlReturn_t nvmlDeviceGetGpuFabricInfo(nvmlDevice_t device, struct nvml_fabric *info)
{
    nvmlReturn_t status = only(device, info);
    if (status == NVML_SUCCESS) *info = (struct nvml_fabric){.status = NVML_SUCCESS};
    return status;
}

EXPORT nvmlReturn_t nvmlDeviceGetGpuFabricInfoV(nvmlDevice_t device, struct nvml_fabric_v2 *info)
{
    nvmlReturn_t status = only(device, info);
    if (status != NVML_SUCCESS) return status;
    unsigned version = info->version;
    if (version == NVML_VERSION_OF(struct nvml_fabric_v2, 2))
        *info = (struct nvml_fabric_v2){.version = version};
    else if (version == NVML_VERSION_OF(struct nvml_fabric_v3, 3))
        *(struct nvml_fabric_v3 *)info = (struct nvml_fabric_v3){.version = version}; /* SAFETY: the version says how large it is */
    else
        return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetCapabilities(nvmlDevice_t device, struct nvml_capabilities *capabilities)
{
    nvmlReturn_t status = only(device, capabilities);
    if (status != NVML_SUCCESS) return status;
    if (capabilities->version != NVML_VERSION_OF(struct nvml_capabilities, 1)) return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    capabilities->mask = 0;
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlGpmQueryDeviceSupport(nvmlDevice_t device, struct nvml_gpm_support *support)
{
    nvmlReturn_t status = only(device, support);
    if (status == NVML_SUCCESS) support->supported = 0;
    return status;
}

/* No licence is needed. The features behind the head are left as they are: their number is 0. */
static nvmlReturn_t no_licences(nvmlDevice_t device, struct nvml_licence_head *head)
{
    nvmlReturn_t status = only(device, head);
    if (status == NVML_SUCCESS) *head = (struct nvml_licence_head){0};
    return status;
}
EXPORT nvmlReturn_t nvmlDeviceGetGridLicensableFeatures(nvmlDevice_t device, struct nvml_licence_head *head) { return no_licences(device, head); }
EXPORT nvmlReturn_t nvmlDeviceGetGridLicensableFeatures_v2(nvmlDevice_t device, struct nvml_licence_head *head) { return no_licences(device, head); }
EXPORT nvmlReturn_t nvmlDeviceGetGridLicensableFeatures_v3(nvmlDevice_t device, struct nvml_licence_head *head) { return no_licences(device, head); }
EXPORT nvmlReturn_t nvmlDeviceGetGridLicensableFeatures_v4(nvmlDevice_t device, struct nvml_licence_head *head) { return no_licences(device, head); }
