/* SPDX-License-Identifier: Apache-2.0 */
/*
 * library.c - nvmlInit and nvmlShutdown, error texts, and what NVML says about the machine rather than about a GPU.
 */
#include "internal.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

EXPORT nvmlReturn_t nvmlInit_v2(void) { return nvml_begin(); }
EXPORT nvmlReturn_t nvmlInit(void) { return nvml_begin(); }

/* The flags say "do not fail without GPUs" and "do not attach to them". Neither can change anything here. */
EXPORT nvmlReturn_t nvmlInitWithFlags(unsigned flags)
{
    return (flags & ~3u) != 0 ? NVML_ERROR_INVALID_ARGUMENT : nvml_begin();
}

EXPORT nvmlReturn_t nvmlShutdown(void) { return nvml_end(); }

EXPORT const char *nvmlErrorString(nvmlReturn_t result)
{
    static const char *const text[] = {
        "Success", "Uninitialized", "Invalid Argument", "Not Supported", "Insufficient Permissions", "Already Initialized",
        "Not Found", "Insufficient Size", "Insufficient External Power", "Driver Not Loaded", "Timeout",
        "Interrupt Request Issue", "NVML Shared Library Not Found", "Function Not Found", "Corrupted infoROM", "GPU is lost",
        "GPU requires reset", "GPU access blocked by the operating system", "Driver/library version mismatch",
        "In use by another client", "Insufficient Memory", "No data", "vGPU ECC not supported", "Insufficient Resources",
        "Invalid Frequency", "Argument version mismatch", "Requested functionality has been deprecated",
        "System is not in ready state", "No supported GPUs were found",
        "Resource not in correct state to perform requested operation",
    };
    return (unsigned)result < sizeof text / sizeof text[0] ? text[result] : "Unknown Error";
}

/* ---- versions ---- */

EXPORT nvmlReturn_t nvmlSystemGetDriverVersion(char *version, unsigned length)
{
    struct vgpu_device_page page;
    nvmlReturn_t status = nvml_read_page(&page);
    return status == NVML_SUCCESS ? nvml_give_text(page.driver_version_text, version, length) : status;
}

/* Of the host's library, which is what programs compare with the driver; without one, as that library is always named. */
EXPORT nvmlReturn_t nvmlSystemGetNVMLVersion(char *version, unsigned length)
{
    struct vgpu_device_page page;
    nvmlReturn_t status = nvml_read_page(&page);
    if (status != NVML_SUCCESS) return status;
    char text[sizeof page.nvml_version + sizeof page.driver_version_text];
    if (page.nvml_version[0] != '\0')
        snprintf(text, sizeof text, "%s", page.nvml_version);
    else
        snprintf(text, sizeof text, "%u%s%s", page.driver_version / 1000, page.driver_version_text[0] != '\0' ? "." : "", page.driver_version_text);
    return nvml_give_text(text, version, length);
}

/* The real library looks into libcuda for this, and so answers before nvmlInit too. */
EXPORT nvmlReturn_t nvmlSystemGetCudaDriverVersion_v2(int *version)
{
    if (version == NULL) return NVML_ERROR_INVALID_ARGUMENT;
    if (nvml_begin() != NVML_SUCCESS) return NVML_ERROR_LIBRARY_NOT_FOUND;
    struct vgpu_device_page page;
    nvmlReturn_t status = nvml_read_page(&page);
    (void)nvml_end();
    if (status != NVML_SUCCESS) return status;
    if (page.driver_version == 0) return NVML_ERROR_LIBRARY_NOT_FOUND;
    *version = (int)page.driver_version;
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlSystemGetCudaDriverVersion(int *version) { return nvmlSystemGetCudaDriverVersion_v2(version); }

/* ---- the machine ---- */

/* What the process was started as. A name that is longer than the buffer is cut, as documented. */
EXPORT nvmlReturn_t nvmlSystemGetProcessName(unsigned pid, char *name, unsigned length)
{
    if (!nvml_is_initialized()) return NVML_ERROR_UNINITIALIZED;
    if (name == NULL || length == 0) return NVML_ERROR_INVALID_ARGUMENT;
    static const char *const files[] = {"cmdline", "comm"}; /* the first is empty for a process that is just ending */
    for (unsigned i = 0; i < 2; i++) {
        char path[64], text[4096];
        snprintf(path, sizeof path, "/proc/%u/%s", pid, files[i]);
        int file = open(path, O_RDONLY | O_CLOEXEC);
        if (file < 0) return errno == EACCES || errno == EPERM ? NVML_ERROR_NO_PERMISSION : NVML_ERROR_NOT_FOUND;
        ssize_t count = read(file, text, sizeof text - 1);
        close(file);
        if (count <= 0) continue;
        text[count] = '\0';
        text[strcspn(text, "\n")] = '\0';
        if (text[0] == '\0') continue;
        for (char *c = text; *c != '\0'; c++)
            if (iscntrl((unsigned char)*c)) *c = '?'; /* any program may call itself anything; this goes to terminals */
        snprintf(name, length, "%s", text);
        return NVML_SUCCESS;
    }
    return NVML_ERROR_NOT_FOUND;
}

static nvmlReturn_t none(unsigned *count)
{
    if (!nvml_is_initialized()) return NVML_ERROR_UNINITIALIZED;
    if (count == NULL) return NVML_ERROR_INVALID_ARGUMENT;
    *count = 0;
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlUnitGetCount(unsigned *count) { return none(count); }
EXPORT nvmlReturn_t nvmlGetExcludedDeviceCount(unsigned *count) { return none(count); }
EXPORT nvmlReturn_t nvmlGetBlacklistDeviceCount(unsigned *count) { return none(count); }
EXPORT nvmlReturn_t nvmlSystemGetHicVersion(unsigned *count, void *entries)
{
    (void)entries;
    return none(count);
}

/* Confidential computing is off: the host reads everything a VM computes. */
EXPORT nvmlReturn_t nvmlSystemGetConfComputeState(struct nvml_confidential_state *state)
{
    if (!nvml_is_initialized()) return NVML_ERROR_UNINITIALIZED;
    if (state == NULL) return NVML_ERROR_INVALID_ARGUMENT;
    *state = (struct nvml_confidential_state){0};
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlSystemGetConfComputeSettings(struct nvml_confidential_settings *settings)
{
    if (!nvml_is_initialized()) return NVML_ERROR_UNINITIALIZED;
    if (settings == NULL) return NVML_ERROR_INVALID_ARGUMENT;
    if (settings->version != NVML_VERSION_OF(struct nvml_confidential_settings, 1)) return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    *settings = (struct nvml_confidential_settings){.version = settings->version};
    return NVML_SUCCESS;
}
