/* SPDX-License-Identifier: Apache-2.0 */
/* guard.h - copies that survive the end of what they copy from (guard.c). Callers hold one lock around all three. */
#ifndef VGPU_NVML_GUARD_H
#define VGPU_NVML_GUARD_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/uio.h>

#define NVML_GUARD_SIZE 32768u

/* Copies the parts one behind the other to `into`, in this order. False: a part could not be read, or all together are
 * more than NVML_GUARD_SIZE. */
bool nvml_guarded_copy(void *into, const struct iovec *parts, int count);
/* Gives back what copies need; the next copy makes it anew. */
void nvml_guard_close(void);

#endif
