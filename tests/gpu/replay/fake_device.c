/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fake_device.c - fake_code.c with a device that takes time: a kernel runs for as many milliseconds as its grid is wide,
 * one of FOREVER never ends, and each stream works through its queue on its own. Words are written when the work before them is done.
 */
#define cuLaunchKernel code_launch
#define cuStreamQuery code_stream_query
#define cuStreamWriteValue64_v2 code_stream_write
#define fakeForgetWrites code_forget_writes
#include "fake_code.c"
#undef fakeForgetWrites
#undef cuLaunchKernel
#undef cuStreamQuery
#undef cuStreamWriteValue64_v2

#define FOREVER 60000u
#define BLOCK_SHORT 33u    /* of so many threads: at once, whatever the grid */
#define BLOCK_FOREVER 77u  /* never, whatever the grid */
#define STREAMS 16
#define WRITES 65536

static struct { void *stream; uint64_t free_at; } busy[STREAMS];
static struct { uint64_t at, value; _Atomic uint64_t *word; pthread_t asker; } write_at[WRITES];
static unsigned writes_waiting;

static uint64_t *free_at(void *stream)
{
    unsigned i = 0;
    while (i < STREAMS - 1 && busy[i].free_at != 0 && busy[i].stream != stream)
        i++;
    busy[i].stream = stream;
    return &busy[i].free_at;
}

static void *write_words(void *unused)
{
    (void)unused;
    for (;;) {
        pthread_mutex_lock(&lock);
        unsigned kept = 0;
        for (unsigned i = 0; i < writes_waiting; i++)
            if (write_at[i].at > now())
                write_at[kept++] = write_at[i];
            else
                atomic_store(write_at[i].word, write_at[i].value);
        writes_waiting = kept;
        pthread_mutex_unlock(&lock);
        nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL);
    }
    return NULL;
}

EXPORT int cuLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void *stream, void **p, void **extra)
{
    pthread_mutex_lock(&lock);
    uint64_t *until = free_at(stream), time = now();
    *until = (*until > time ? *until : time) + (gx == FOREVER || bx == BLOCK_FOREVER ? 1ull << 60 : bx == BLOCK_SHORT ? 0 : gx * 1000000ull);
    pthread_mutex_unlock(&lock);
    return code_launch(f, gx, gy, gz, bx, by, bz, shared, stream, p, extra);
}

EXPORT int cuStreamWriteValue64_v2(void *stream, uint64_t address, uint64_t value, unsigned flags)
{
    static atomic_flag started = ATOMIC_FLAG_INIT;
    pthread_t thread;
    (void)flags;
    if (!atomic_flag_test_and_set(&started) && pthread_create(&thread, NULL, write_words, NULL) != 0)
        return 999;
    pthread_mutex_lock(&lock);
    if (writes_waiting < WRITES) {
        write_at[writes_waiting].asker = pthread_self();
        write_at[writes_waiting].at = *free_at(stream);
        write_at[writes_waiting].word = (_Atomic uint64_t *)address;
        write_at[writes_waiting++].value = value;
    }
    pthread_mutex_unlock(&lock);
    return 0;
}
EXPORT int cuStreamQuery(void *stream)
{
    pthread_mutex_lock(&lock);
    int status = *free_at(stream) > now() ? 600 : 0;
    pthread_mutex_unlock(&lock);
    return status;
}
EXPORT void fakeForgetWrites(pthread_t asker)
{
    code_forget_writes(asker);
    pthread_mutex_lock(&lock);
    unsigned kept = 0;
    for (unsigned i = 0; i < writes_waiting; i++)
        if (!pthread_equal(write_at[i].asker, asker))
            write_at[kept++] = write_at[i];
    writes_waiting = kept;
    pthread_mutex_unlock(&lock);
}
EXPORT void fakeReset(void)
{
    pthread_mutex_lock(&lock);
    memset(busy, 0, sizeof busy);
    writes_waiting = 0;
    pthread_mutex_unlock(&lock);
}
