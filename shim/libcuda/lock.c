/* SPDX-License-Identifier: Apache-2.0 */
/*
 * lock.c - the shim's one kind of lock: one compare-and-exchange when nobody else wants it, a short spin, then a futex.
 *
 * Why not a pthread mutex: its unlock is not a full barrier on every path, and the ring needs one between publishing
 * `tail` and reading `doorbell_wanted`; here the unlock is that barrier.
 */
#include "core.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SPIN_ROUNDS 200 /* about a microsecond: longer than any holder runs */

bool shim_many_processors = true;

void shim_lock_slow(struct shim_lock *lock)
{
    if (shim_many_processors) {
        for (unsigned i = 0; i < SPIN_ROUNDS; i++) {
            uint32_t expected = 0;
            if (atomic_load_explicit(&lock->word, memory_order_relaxed) == 0 &&
                atomic_compare_exchange_weak_explicit(&lock->word, &expected, 1, memory_order_acquire, memory_order_relaxed))
                return;
            __builtin_ia32_pause();
        }
    }
    while (atomic_exchange_explicit(&lock->word, 2, memory_order_acquire) != 0)
        syscall(SYS_futex, &lock->word, FUTEX_WAIT_PRIVATE, 2, NULL, NULL, 0);
}

void shim_lock_wake(struct shim_lock *lock)
{
    syscall(SYS_futex, &lock->word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}
