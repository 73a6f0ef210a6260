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

static const char *named_folder(void)
{
    const char *run_dir = secure_getenv("VGPU_RUN_DIR");
    return run_dir != NULL && run_dir[0] != '\0' ? run_dir : NULL;
}

static bool find_socket(struct sockaddr_un *address)
{
    *address = (struct sockaddr_un){.sun_family = AF_UNIX};
    return named_folder() != NULL ? vgpu_named_socket(address) : vgpu_default_socket(address);
}

/* find_socket has found none. */
static void say_where_none_is(const struct sockaddr_un *address, int error)
{
    const char *folder = named_folder();
    char user_folder[VGPU_USER_FOLDER];
    if (folder == NULL)
        shim_log_once(SHIM_INFO, "no device: no mediator at %s/vgpu/mediator.sock, nor at %s", vgpu_user_folder(user_folder), address->sun_path);
    else if (folder[0] != '/')
        shim_log_once(SHIM_INFO, "no device: VGPU_RUN_DIR is %s, expected a path that begins with /", folder);
    else if (strlen(folder) + sizeof "/mediator.sock" > sizeof address->sun_path)
        shim_log_once(SHIM_INFO, "no device: VGPU_RUN_DIR is %s, too long for the path of a socket", folder);
    else
        shim_log_once(SHIM_INFO, "no device: no mediator at %s, which VGPU_RUN_DIR names: %s", address->sun_path, strerror(error));
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
        if (!find_socket(&address) && absent_since == 0) {
            say_where_none_is(&address, errno);
            return CUDA_ERROR_NO_DEVICE;
        }
        *channel = connect_to(&address);
        int error = *channel < 0 ? errno : 0;
        if (error == EACCES || error == EPERM) {
            shim_log_once(SHIM_INFO, "no device: the mediator at %s is not for this user: %s", address.sun_path, strerror(error));
            return CUDA_ERROR_NO_DEVICE;
        }
        while (*channel >= 0 && vgpu_send_hello(*channel, flags) && vgpu_receive_welcome(*channel, welcome, descriptor, 2)) {
            if (welcome->status == WELCOME_OK && welcome->layout_version == VGPU_LAYOUT_VERSION) return CUDA_SUCCESS;
            if (welcome->status != WELCOME_BUSY) {
                close(*channel);
                shim_log(SHIM_ERROR, "the mediator at %s answered %u: %s", address.sun_path, welcome->status, shim_refusal_words(welcome->status));
                return shim_refusal_code(welcome->status);
            }
            absent_since = 0;
            uint64_t hint_ns = (uint64_t)welcome->retry_ms * 1000000ull;
            if (hint_ns > LONGEST_RETRY_NS) hint_ns = LONGEST_RETRY_NS;
            shim_log(SHIM_DEBUG, "the mediator at %s is busy; it is asked again", address.sun_path);
            shim_nap(shim_jittered(retry_ns > hint_ns ? retry_ns : hint_ns));
            retry_ns = retry_ns * 2 < LONGEST_RETRY_NS ? retry_ns * 2 : LONGEST_RETRY_NS;
        }
        if (*channel >= 0) close(*channel);
        if (absent_since == 0) {
            absent_since = shim_now_ns();
            retry_ns = FIRST_RETRY_NS;
        }
        if (shim_now_ns() - absent_since > VGPU_ABSENT_LIMIT_NS) {
            shim_log_once(SHIM_INFO, "no device: nobody answers at %s: %s", address.sun_path, error != 0 ? strerror(error) : "it hangs up");
            return CUDA_ERROR_NO_DEVICE;
        }
        shim_log(SHIM_DEBUG, "nobody answers at %s yet: %s", address.sun_path, error != 0 ? strerror(error) : "it hangs up");
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
            shim_log(SHIM_INFO, "session %llu, segment of %llu bytes at %p%s", (unsigned long long)welcome.session_id,
                     (unsigned long long)size, (void *)base, shim.identical ? "" : " (not where the worker has it)");
        return status;
    }
    shim_log(SHIM_ERROR, "the segment offered is not one of layout %u", VGPU_LAYOUT_VERSION);
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
