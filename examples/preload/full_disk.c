/* SPDX-License-Identifier: Apache-2.0 */
/* A disk that is full for one file: preloaded, it lets writes to files named in FULL_DISK_NAME fail with ENOSPC for as long
 * as the file FULL_DISK_WHILE exists. Everything else is written as ever. A real full disk needs a file system of one's own. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static int is_full(int file)
{
    const char *name = getenv("FULL_DISK_NAME"), *flag = getenv("FULL_DISK_WHILE");
    char link[64], path[4096];
    ssize_t length;
    if (name == NULL || flag == NULL || access(flag, F_OK) != 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return strstr(path, name) != NULL;
}

#define NEXT(type, name)                                                                                               \
    static type next;                                                                                                  \
    if (next == NULL) next = (type)dlsym(RTLD_NEXT, name)

typedef ssize_t (*write_type)(int, const void *, size_t);
typedef ssize_t (*pwrite_type)(int, const void *, size_t, off_t);
typedef int (*ftruncate_type)(int, off_t);
typedef int (*fallocate_type)(int, off_t, off_t);

#define REFUSE(file, result)                                                                                           \
    do {                                                                                                               \
        int before = errno;                                                                                            \
        if (is_full(file)) {                                                                                           \
            errno = ENOSPC;                                                                                            \
            return result;                                                                                             \
        }                                                                                                              \
        errno = before;                                                                                                \
    } while (0)

ssize_t write(int file, const void *data, size_t size)
{
    NEXT(write_type, "write");
    REFUSE(file, -1);
    return next(file, data, size);
}

ssize_t pwrite(int file, const void *data, size_t size, off_t offset)
{
    NEXT(pwrite_type, "pwrite");
    REFUSE(file, -1);
    return next(file, data, size, offset);
}

ssize_t pwrite64(int file, const void *data, size_t size, off_t offset)
{
    NEXT(pwrite_type, "pwrite64");
    REFUSE(file, -1);
    return next(file, data, size, offset);
}

int ftruncate64(int file, off_t size)
{
    NEXT(ftruncate_type, "ftruncate64");
    REFUSE(file, -1);
    return next(file, size);
}

int posix_fallocate64(int file, off_t offset, off_t size)
{
    NEXT(fallocate_type, "posix_fallocate64");
    if (is_full(file)) return ENOSPC;
    return next(file, offset, size);
}
