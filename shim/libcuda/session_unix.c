/* SPDX-License-Identifier: Apache-2.0 */
/*
 * session_unix.c - finding a mediator by its socket, attaching to it, mapping the segment it sends. docs/wire.md section 1.
 *
 * Where: the folder VGPU_RUN_DIR names, and nothing else when it is set; else the user's own ($XDG_RUNTIME_DIR/vgpu), else the
 * machine's (/var/vgpu).
 *
 * After the attach nothing here is needed any more: calls go through the segment and the lifeline, which belong to the worker.
 * The mediator may restart; the connection to it is kept only so that it learns when this process ends.
 *
 * Must never: block a process that has no mediator; leave a descriptor that survives exec.
 */
#include "session.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14 */
#endif

static int mediator = -1;
static size_t mapped_size;

/* ---- handshake ---- */

static bool find_socket(struct sockaddr_un *address)
{
    *address = (struct sockaddr_un){.sun_family = AF_UNIX};
    const char *run_dir = secure_getenv("VGPU_RUN_DIR");
    return run_dir != NULL && run_dir[0] != '\0' ? vgpu_named_socket(address) : vgpu_default_socket(address);
}

static int connect_to(const struct sockaddr_un *address)
{
    int channel = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (channel < 0) return -1;
    if (connect(channel, (const struct sockaddr *)address, sizeof *address) == 0) return channel;
    int error = errno;
    close(channel);
    errno = error;
    return -1;
}

/* Asks until there is an answer other than BUSY: for as long as the program lives, and only a mediator that is not there is
 * waited for no longer than a moment. CUDA_SUCCESS: *channel is open, `welcome` and `descriptor` are filled. */
static CUresult ask(uint32_t flags, int *channel, struct vgpu_welcome *welcome, int descriptor[2])
{
    uint64_t absent_since = 0, retry_ns = FIRST_RETRY_NS;
    for (;;) {
        struct sockaddr_un address;
        if (!find_socket(&address) && absent_since == 0) return CUDA_ERROR_NO_DEVICE;
        *channel = connect_to(&address);
        if (*channel < 0 && (errno == EACCES || errno == EPERM)) return CUDA_ERROR_NO_DEVICE;
        while (*channel >= 0 && vgpu_send_hello(*channel, flags) && vgpu_receive_welcome(*channel, welcome, descriptor, 2)) {
            if (welcome->status == WELCOME_OK && welcome->layout_version == VGPU_LAYOUT_VERSION) return CUDA_SUCCESS;
            if (welcome->status != WELCOME_BUSY) {
                close(*channel);
                shim_log("the mediator answered %u", welcome->status);
                return shim_refusal_code(welcome->status);
            }
            absent_since = 0;
            uint64_t hint_ns = (uint64_t)welcome->retry_ms * 1000000ull;
            if (hint_ns > LONGEST_RETRY_NS) hint_ns = LONGEST_RETRY_NS;
            shim_nap(shim_jittered(retry_ns > hint_ns ? retry_ns : hint_ns));
            retry_ns = retry_ns * 2 < LONGEST_RETRY_NS ? retry_ns * 2 : LONGEST_RETRY_NS;
        }
        if (*channel >= 0) close(*channel);
        if (absent_since == 0) {
            absent_since = shim_now_ns();
            retry_ns = FIRST_RETRY_NS;
        }
        if (shim_now_ns() - absent_since > VGPU_ABSENT_LIMIT_NS) return CUDA_ERROR_NO_DEVICE;
        shim_nap(shim_jittered(retry_ns));
        retry_ns *= 2;
    }
}

int shim_unix_probe_version(void)
{
    struct sockaddr_un address;
    if (!find_socket(&address)) return 0;
    int channel, descriptor[2];
    struct vgpu_welcome welcome;
    if (ask(VGPU_HELLO_PROBE, &channel, &welcome, descriptor) != CUDA_SUCCESS) return 0;
    close(channel);
    for (unsigned i = 0; i < 2; i++)
        if (descriptor[i] >= 0) close(descriptor[i]);
    return (int)welcome.driver_version;
}

/* ---- the segment ---- */

static uint8_t *map_segment(int segment, size_t size, uint64_t wanted)
{
    int protection = PROT_READ | PROT_WRITE, flags = MAP_SHARED | MAP_NORESERVE;
    void *base = MAP_FAILED;
    if (wanted != 0) {
        base = mmap((void *)(uintptr_t)wanted, size, protection, flags | MAP_FIXED_NOREPLACE, segment, 0);
        if (base != MAP_FAILED && (uintptr_t)base != wanted) { /* a kernel that takes the flag for a hint */
            munmap(base, size);
            base = MAP_FAILED;
        }
    }
    if (base == MAP_FAILED) base = mmap(NULL, size, protection, flags, segment, 0);
    if (base == MAP_FAILED) return NULL;
    /* A forked child must not write into its parent's session. */
    (void)madvise(base, size, MADV_DONTFORK);
    return base;
}

CUresult shim_unix_attach(void)
{
    struct vgpu_welcome welcome = {0};
    int channel, descriptor[2];
    CUresult status = ask(0, &channel, &welcome, descriptor);
    if (status != CUDA_SUCCESS) return status;
    struct stat file;
    uint8_t *base = NULL;
    uint64_t size = welcome.segment_size;
    status = CUDA_ERROR_SYSTEM_DRIVER_MISMATCH;
    if (descriptor[1] >= 0 && size > VGPU_DEVICE_PAGE_SIZE + VGPU_SESSION_PAGE_SIZE && fstat(descriptor[0], &file) == 0 &&
        (uint64_t)file.st_size >= size && (base = map_segment(descriptor[0], size, welcome.worker_address)) != NULL &&
        shim_adopt_segment(base, size, welcome.worker_address)) {
        shim.lifeline = descriptor[1];
        mediator = channel;
        mapped_size = size;
        shim.page->guest_pid = (uint32_t)getpid();
        close(descriptor[0]);
        /* Pages, ring, slots and fences (some MiB) are wanted in the first milliseconds: one call now, instead of a fault in
         * every fortieth launch of the first lap. A kernel that cannot is no worse off. */
        (void)madvise(base, (size_t)(shim.arena_offset & ~(uint64_t)4095), MADV_POPULATE_WRITE);
        status = shim_wait_until_ready(shim.page) ? CUDA_SUCCESS : CUDA_ERROR_DEVICE_UNAVAILABLE;
        if (status != CUDA_SUCCESS)
            shim_session_detach();
        else
            shim_log("session %llu, segment of %llu bytes at %p%s", (unsigned long long)welcome.session_id,
                     (unsigned long long)size, (void *)base, shim.identical ? "" : " (not where the worker has it)");
        return status;
    }
    shim_log("the segment offered is not one of layout %u", VGPU_LAYOUT_VERSION);
    if (base != NULL) munmap(base, size);
    for (unsigned i = 0; i < 2; i++)
        if (descriptor[i] >= 0) close(descriptor[i]);
    close(channel);
    return status;
}

void shim_unix_fork_child(void)
{
    if (shim.lifeline >= 0) close(shim.lifeline);
    if (mediator >= 0) close(mediator);
    shim.lifeline = mediator = -1;
}

void shim_unix_detach(void)
{
    shim_unix_fork_child();
    if (mapped_size != 0) munmap(shim.base, mapped_size);
    mapped_size = 0;
}
