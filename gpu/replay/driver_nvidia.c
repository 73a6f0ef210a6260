/* SPDX-License-Identifier: Apache-2.0 */
/*
 * driver_nvidia.c - the real driver behind the vtable: libcuda by path, at run time, never linked.
 *
 * Our own guest library has the same name and the same symbols. A worker that loaded it would call itself for ever, so a
 * file that holds the guest library's words for finding a mediator is refused before any of its code runs.
 */
#include "internal.h"
#include "session.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define OLDEST_DRIVER 12040
/* NVIDIA's library has been larger than this for ten years; ours is a tenth of it. Larger files need no look. */
#define SHIM_AT_MOST (16u << 20)

static bool is_guest_library(int file, off_t size)
{
    if (size <= 0 || size > SHIM_AT_MOST)
        return false;
    void *bytes = mmap(NULL, (size_t)size, PROT_READ, MAP_PRIVATE, file, 0);
    if (bytes == MAP_FAILED)
        return true; /* not to be looked at: not to be run */
    static const char marker[] = "VGPU_RUN_DIR";
    bool found = memmem(bytes, (size_t)size, marker, sizeof marker - 1) != NULL;
    munmap(bytes, (size_t)size);
    return found;
}

const char *vgpu_driver_open(struct vgpu_driver *driver, const char *path)
{
    struct stat about;
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return "the file cannot be opened";
    bool unusable = fstat(file, &about) != 0 || !S_ISREG(about.st_mode);
    bool ours = !unusable && is_guest_library(file, about.st_size);
    close(file);
    if (unusable)
        return "not a regular file";
    if (ours)
        return "this is the guest library of this project, not a driver";
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL)
        return "the dynamic linker refuses it";
    *driver = vgpu_driver_refusing;
    void **field = (void **)(void *)driver;
    _Static_assert(sizeof(struct vgpu_driver) == VGPU_DRIVER_FUNCTIONS * sizeof(void *), "the vtable is pointers only");
    for (unsigned i = 0; i < VGPU_DRIVER_FUNCTIONS; i++) {
        void *function = dlsym(library, vgpu_driver_names[i]);
        if (function != NULL)
            field[i] = function;
    }
    int version = 0;
    if (dlsym(library, "cuInit") == NULL || driver->cuDriverGetVersion(&version) != 0) {
        *driver = vgpu_driver_refusing;
        return "it does not answer as libcuda does";
    }
    if (version < OLDEST_DRIVER) {
        *driver = vgpu_driver_refusing;
        return "the driver is older than CUDA 12.4";
    }
    return NULL; /* the library stays loaded for the life of the process */
}

void vgpu_thread_stacks(size_t bytes)
{
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes) != 0)
        return;
    if (pthread_attr_setstacksize(&attributes, bytes) == 0)
        pthread_setattr_default_np(&attributes);
    pthread_attr_destroy(&attributes);
}
