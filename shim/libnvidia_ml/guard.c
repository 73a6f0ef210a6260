/* SPDX-License-Identifier: Apache-2.0 */
/*
 * guard.c - copying out of a mapping whose other side may take it away.
 *
 * When the PCI device is unplugged, or a file behind a mapping shrinks, a load from the mapping is SIGBUS, and a library has
 * no business installing a signal handler in somebody's program. The kernel, asked to write those bytes to a file, answers
 * EFAULT instead. So a copy is one pwritev into a private memory file, which is mapped here.
 *
 * Where memory files are forbidden (a sandbox), the copy is a plain one: then an unplugged device is fatal, as it would be
 * for anything that maps a device.
 */
#include "guard.h"

#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static int file = -1;
static uint8_t *mapped;

static bool prepare(void)
{
    if (file >= 0) return true;
    int made = memfd_create("nvml", MFD_CLOEXEC);
    if (made < 0) return false;
    void *memory = MAP_FAILED;
    if (ftruncate(made, NVML_GUARD_SIZE) == 0) memory = mmap(NULL, NVML_GUARD_SIZE, PROT_READ, MAP_SHARED, made, 0);
    if (memory == MAP_FAILED) {
        close(made);
        return false;
    }
    file = made;
    mapped = memory;
    return true;
}

bool nvml_guarded_copy(void *into, const struct iovec *parts, int count)
{
    size_t size = 0;
    for (int i = 0; i < count; i++) size += parts[i].iov_len;
    if (size > NVML_GUARD_SIZE) return false;
    if (!prepare()) {
        uint8_t *next = into;
        for (int i = 0; i < count; next += parts[i].iov_len, i++) {
            memcpy(next, parts[i].iov_base, parts[i].iov_len);
            __atomic_thread_fence(__ATOMIC_ACQUIRE);
        }
        return true;
    }
    /* Parts are copied in order, which on x86-64 is also the order of the loads. */
    if (pwritev(file, parts, count, 0) != (ssize_t)size) return false;
    memcpy(into, mapped, size);
    return true;
}

void nvml_guard_close(void)
{
    if (file < 0) return;
    munmap(mapped, NVML_GUARD_SIZE);
    close(file);
    file = -1;
}
