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

#define HELLO_MAGIC 0x48504756u
#define WELCOME_MAGIC 0x57504756u
#define HELLO_PROBE 1u

struct hello {
    uint32_t magic, layout_version;
    uint64_t table_hash;
    uint32_t pid, flags;
    char vm[64], program[64];
    uint8_t zero[104];
};
_Static_assert(sizeof(struct hello) == 256, "HELLO is 256 bytes");

struct welcome {
    uint32_t magic, layout_version, status, retry_ms;
    uint64_t session_id, segment_size, worker_address;
    uint32_t driver_version; /* of the host, e.g. 13000; 0 when it does not say */
    uint8_t zero[20];
};
_Static_assert(sizeof(struct welcome) == 64, "WELCOME is 64 bytes");

/* A mediator that is just being restarted refuses connections for a moment. Only this case is bounded: one that answers
 * BUSY is asked again for as long as the program lives. */
#define ABSENT_LIMIT_NS 600000000ull

static int mediator = -1;
static size_t mapped_size;

/* ---- where ---- */

static bool path_in(const char *folder, const char *below, struct sockaddr_un *address)
{
    if (folder == NULL || folder[0] != '/') return false;
    int length = snprintf(address->sun_path, sizeof address->sun_path, "%s%s/mediator.sock", folder, below);
    return length > 0 && (size_t)length < sizeof address->sun_path && access(address->sun_path, F_OK) == 0;
}

static bool find_socket(struct sockaddr_un *address)
{
    *address = (struct sockaddr_un){.sun_family = AF_UNIX};
    const char *run_dir = secure_getenv("VGPU_RUN_DIR");
    if (run_dir != NULL && run_dir[0] != '\0') return path_in(run_dir, "", address);
    char user_folder[64];
    const char *runtime = secure_getenv("XDG_RUNTIME_DIR");
    if (runtime == NULL || runtime[0] == '\0') {
        snprintf(user_folder, sizeof user_folder, "/run/user/%u", (unsigned)getuid());
        runtime = user_folder;
    }
    return path_in(runtime, "/vgpu", address) || path_in("/var/vgpu", "", address);
}

/* ---- handshake ---- */

static bool send_hello(int channel, uint32_t flags)
{
    struct hello hello = {.magic = HELLO_MAGIC, .layout_version = VGPU_LAYOUT_VERSION, .table_hash = VGPU_TABLE_HASH,
                          .pid = (uint32_t)getpid(), .flags = flags};
    const char *vm = secure_getenv("VGPU_VM");
    /* One that is too long fills the field without an end, and is refused; cut, it would be another VM's. */
    if (vm != NULL) memcpy(hello.vm, vm, strnlen(vm, sizeof hello.vm));
    memcpy(hello.program, program_invocation_short_name, strnlen(program_invocation_short_name, sizeof hello.program - 1));
    for (size_t sent = 0; sent < sizeof hello;) {
        ssize_t count = send(channel, (const char *)&hello + sent, sizeof hello - sent, MSG_NOSIGNAL);
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) return false;
        sent += (size_t)count;
    }
    return true;
}

/* Reads one WELCOME, and what descriptors come with it into descriptor[2] (-1: none). False: the peer is gone, or no mediator. */
static bool receive_welcome(int channel, struct welcome *welcome, int descriptor[2])
{
    unsigned taken = 0;
    descriptor[0] = descriptor[1] = -1;
    for (size_t got = 0; got < sizeof *welcome;) {
        union { struct cmsghdr align; char bytes[CMSG_SPACE(4 * sizeof(int))]; } control;
        struct iovec part = {(char *)welcome + got, sizeof *welcome - got};
        struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
        ssize_t count = recvmsg(channel, &message, MSG_CMSG_CLOEXEC);
        if (count < 0 && errno == EINTR) continue;
        for (struct cmsghdr *c = count > 0 ? CMSG_FIRSTHDR(&message) : NULL; c != NULL; c = CMSG_NXTHDR(&message, c)) {
            if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
            size_t number = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
            for (size_t i = 0; i < number; i++) {
                int fd;
                memcpy(&fd, CMSG_DATA(c) + i * sizeof fd, sizeof fd);
                if (taken < 2)
                    descriptor[taken++] = fd;
                else
                    close(fd);
            }
        }
        if (count <= 0) goto failed;
        got += (size_t)count;
    }
    if (welcome->magic == WELCOME_MAGIC) return true;
failed:
    for (unsigned i = 0; i < taken; i++) close(descriptor[i]);
    descriptor[0] = descriptor[1] = -1;
    return false;
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

/* Asks until there is an answer other than BUSY. CUDA_SUCCESS: *channel is open, `welcome` and `descriptor` are filled. */
static CUresult ask(uint32_t flags, int *channel, struct welcome *welcome, int descriptor[2])
{
    uint64_t absent_since = 0, retry_ns = FIRST_RETRY_NS;
    for (;;) {
        struct sockaddr_un address;
        if (!find_socket(&address) && absent_since == 0) return CUDA_ERROR_NO_DEVICE;
        *channel = connect_to(&address);
        if (*channel < 0 && (errno == EACCES || errno == EPERM)) return CUDA_ERROR_NO_DEVICE;
        while (*channel >= 0 && send_hello(*channel, flags) && receive_welcome(*channel, welcome, descriptor)) {
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
        if (shim_now_ns() - absent_since > ABSENT_LIMIT_NS) return CUDA_ERROR_NO_DEVICE;
        shim_nap(shim_jittered(retry_ns));
        retry_ns *= 2;
    }
}

int shim_unix_probe_version(void)
{
    struct sockaddr_un address;
    if (!find_socket(&address)) return 0;
    int channel, descriptor[2];
    struct welcome welcome;
    if (ask(HELLO_PROBE, &channel, &welcome, descriptor) != CUDA_SUCCESS) return 0;
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
    struct welcome welcome = {0};
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
