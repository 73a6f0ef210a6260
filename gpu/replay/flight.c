/* SPDX-License-Identifier: Apache-2.0 */
/*
 * flight.c - the flight recorder: the session's last calls, in memory that the mediator holds too and no guest can see.
 * It is read after the worker has been killed, so it is written as things happen: one cache line when a call is taken, one
 * word when it is done (flight.h). Names of kernels are written once, at a function's first launch.
 */
#include "flight.h"
#include "session.h"

#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

bool replay_flight_open(struct vgpu_replay *replay, int grant_fd)
{
    struct replay_private *private = replay->private;
    struct stat file;
    if (grant_fd >= 0 && fstat(grant_fd, &file) == 0 && file.st_size >= (off_t)(VGPU_FLIGHT_OFFSET + VGPU_FLIGHT_SIZE)) {
        void *mapped = mmap(NULL, VGPU_FLIGHT_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, grant_fd, VGPU_FLIGHT_OFFSET);
        if (mapped != MAP_FAILED) {
            free(private->flight_kept);
            private->flight_kept = NULL;
            private->flight = mapped;
            private->flight->magic = VGPU_FLIGHT_MAGIC;
            return true;
        }
    }
    if (private->flight == NULL)
        private->flight = private->flight_kept = calloc(1, sizeof *private->flight);
    return private->flight != NULL;
}

void replay_flight_close(struct vgpu_replay *replay)
{
    struct replay_private *private = replay->private;
    if (private->flight_kept == NULL && private->flight != NULL)
        munmap(private->flight, VGPU_FLIGHT_SIZE);
    free(private->flight_kept);
    private->flight = private->flight_kept = NULL;
}

void replay_flight_name(struct vgpu_replay *replay, uint64_t function, void *real, bool is_kernel)
{
    struct vgpu_flight_name *name = &replay->private->flight->name[vgpu_flight_slot(function)];
    const char *text = NULL;
    int status = is_kernel ? replay->driver.cuKernelGetName(&text, real) : replay->driver.cuFuncGetName(&text, real);
    memset(name->text, 0, sizeof name->text);
    if (status == 0 && text != NULL)
        memcpy(name->text, text, strnlen(text, sizeof name->text - 1));
    name->function = function;
}

/* ---- a worker that crashes says so ---- */

static volatile uint32_t *fatal_word;

static void note_and_die(int signal_number)
{
    if (fatal_word != NULL)
        *fatal_word = (uint32_t)signal_number;
    raise(signal_number); /* SA_RESETHAND: on return the default takes its course */
}

void vgpu_replay_note_crashes(struct vgpu_replay *replay)
{
    static const int numbers[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT};
    struct sigaction action = {.sa_handler = note_and_die, .sa_flags = (int)SA_RESETHAND | SA_ONSTACK};
    fatal_word = &replay->private->flight->fatal_signal;
    for (unsigned i = 0; i < sizeof numbers / sizeof *numbers; i++)
        sigaction(numbers[i], &action, NULL);
}
