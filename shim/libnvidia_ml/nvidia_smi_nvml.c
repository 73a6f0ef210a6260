/* SPDX-License-Identifier: Apache-2.0 */
/* nvidia_smi_nvml.c - the library behind nvidia-smi: opened when the program runs, so that the guest's own is found. */
#include "nvidia_smi.h"

#include <dlfcn.h>
#include <stdlib.h>

static void *library;

static nvmlReturn_t absent(void) { return 13; /* FUNCTION_NOT_FOUND */ }

void *smi_function(const char *name)
{
    void *found = library != NULL ? dlsym(library, name) : NULL;
    return found != NULL ? found : (void *)absent;
}

const char *smi_error(nvmlReturn_t status)
{
    const char *(*text)(nvmlReturn_t) = dlsym(library, "nvmlErrorString");
    return text != NULL ? text(status) : "Unknown Error";
}

int smi_open(void)
{
    library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
        puts("NVIDIA-SMI couldn't find libnvidia-ml.so library in your system. Please make sure that the NVIDIA Display Driver is "
             "properly installed and present in your system.\n"
             "Please also try adding directory that contains libnvidia-ml.so to your system PATH.");
        return SMI_NO_LIBRARY;
    }
    nvmlReturn_t status = SMI_CALL(nvmlInitWithFlags, (unsigned), 0);
    if (status == NVML_SUCCESS) return SMI_OK;
    if (status == NVML_ERROR_DRIVER_NOT_LOADED)
        puts("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA driver "
             "is installed and running.\n");
    else
        printf("Failed to initialize NVML: %s\n", smi_error(status));
    return (int)status;
}

void smi_close(void)
{
    (void)SMI_CALL(nvmlShutdown, (void));
}
