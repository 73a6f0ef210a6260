/* SPDX-License-Identifier: Apache-2.0 */
/*
 * handshake.h - how a program on the mediator's own machine finds it and greets it: HELLO and WELCOME, docs/wire.md section 1.
 *
 * Both guest libraries do this, libcuda for a session and libnvidia-ml for the device page; how long each waits, and what it
 * makes of an answer, is its own. transport/attach.py has the same records in Python.
 *
 * Must never: leave a descriptor open that nobody asked for, or one that survives exec; believe an answer of another protocol.
 */
#ifndef VGPU_HANDSHAKE_H
#define VGPU_HANDSHAKE_H

#include "_generated_calls.h"
#include "wire.h"

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define VGPU_HELLO_MAGIC 0x48504756u
#define VGPU_WELCOME_MAGIC 0x57504756u
#define VGPU_HELLO_PROBE 1u       /* flags: no session, only the answer */
#define VGPU_HELLO_DEVICE_PAGE 2u /* no session, only the device page */

struct vgpu_hello {
    uint32_t magic, layout_version;
    uint64_t table_hash;
    uint32_t pid, flags;
    char vm[64], program[64];
    uint8_t zero[104];
};
_Static_assert(sizeof(struct vgpu_hello) == 256, "HELLO is 256 bytes");

struct vgpu_welcome {
    uint32_t magic, layout_version, status, retry_ms;
    uint64_t session_id, segment_size, worker_address;
    uint32_t driver_version; /* of the host, e.g. 13000; 0 when it does not say */
    uint8_t zero[20];
};
_Static_assert(sizeof(struct vgpu_welcome) == 64, "WELCOME is 64 bytes");

/* Status of WELCOME, and of a slot's refusal. */
enum vgpu_welcome_status { WELCOME_OK = 0, WELCOME_BUSY = 1, WELCOME_NO_DEVICE = 2, WELCOME_REFUSED = 3, WELCOME_MISMATCH = 4 };

/* A mediator that is just being restarted refuses connections for a moment: so long it is waited for. */
#define VGPU_ABSENT_LIMIT_NS 600000000ull

/* Is there a socket in that folder? Fills address->sun_path either way. */
static inline bool vgpu_socket_in(const char *folder, const char *below, struct sockaddr_un *address)
{
    if (folder == NULL || folder[0] != '/') return false;
    int length = snprintf(address->sun_path, sizeof address->sun_path, "%s%s/mediator.sock", folder, below);
    return length > 0 && (size_t)length < sizeof address->sun_path && access(address->sun_path, F_OK) == 0;
}

/* Where VGPU_RUN_DIR says. */
static inline bool vgpu_named_socket(struct sockaddr_un *address) { return vgpu_socket_in(secure_getenv("VGPU_RUN_DIR"), "", address); }

#define VGPU_USER_FOLDER 64

/* Where the user's own mediator has its folder vgpu; `fallback` is used where the environment does not say. */
static inline const char *vgpu_user_folder(char fallback[VGPU_USER_FOLDER])
{
    const char *runtime = secure_getenv("XDG_RUNTIME_DIR");
    if (runtime != NULL && runtime[0] != '\0') return runtime;
    snprintf(fallback, VGPU_USER_FOLDER, "/run/user/%u", (unsigned)getuid());
    return fallback;
}

/* The user's own ($XDG_RUNTIME_DIR/vgpu), else the machine's (/var/vgpu). */
static inline bool vgpu_default_socket(struct sockaddr_un *address)
{
    char fallback[VGPU_USER_FOLDER];
    return vgpu_socket_in(vgpu_user_folder(fallback), "/vgpu", address) || vgpu_socket_in("/var/vgpu", "", address);
}

/* Blocks while the channel is full, for as long as its SO_SNDTIMEO says. False: the peer is gone. */
static inline bool vgpu_send_hello(int channel, uint32_t flags)
{
    struct vgpu_hello hello = {.magic = VGPU_HELLO_MAGIC, .layout_version = VGPU_LAYOUT_VERSION, .table_hash = VGPU_TABLE_HASH,
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

/* Reads one WELCOME, and up to `room` descriptors that come with it (-1 where there are fewer); what comes beyond is closed.
 * Blocks for as long as the channel's SO_RCVTIMEO says. False: the peer is gone, or no mediator; no descriptor is open then. */
static inline bool vgpu_receive_welcome(int channel, struct vgpu_welcome *welcome, int *descriptor, unsigned room)
{
    unsigned taken = 0;
    for (unsigned i = 0; i < room; i++) descriptor[i] = -1;
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
                int received;
                memcpy(&received, CMSG_DATA(c) + i * sizeof received, sizeof received);
                if (taken < room)
                    descriptor[taken++] = received;
                else
                    close(received);
            }
        }
        if (count <= 0) goto failed;
        got += (size_t)count;
    }
    if (welcome->magic == VGPU_WELCOME_MAGIC) return true;
failed:
    for (unsigned i = 0; i < taken; i++) {
        close(descriptor[i]);
        descriptor[i] = -1;
    }
    return false;
}

#endif
