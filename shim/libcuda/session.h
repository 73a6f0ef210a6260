/* SPDX-License-Identifier: Apache-2.0 */
/*
 * session.h - what the two transports (session_unix.c, session_pci.c) share with session.c, which chooses between them.
 */
#ifndef VGPU_SHIM_SESSION_H
#define VGPU_SHIM_SESSION_H

#include "../../transport/handshake.h"
#include "core.h"

#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif

CUresult shim_refusal_code(uint32_t status); /* for any status but OK and BUSY */
const char *shim_refusal_words(uint32_t status);

#define FIRST_RETRY_NS 10000000ull
#define LONGEST_RETRY_NS 1000000000ull
void shim_nap(uint64_t ns);
uint64_t shim_jittered(uint64_t ns); /* half to one and a half times ns */

/* Takes over the geometry of a segment whose device page and session page are mapped at `base`. False: not a segment of
 * this layout, or one that is longer than size. */
bool shim_adopt_segment(uint8_t *base, uint64_t size, uint64_t worker_address);
/* The worker says READY when it replays; normally it does before a guest hears of it. */
bool shim_wait_until_ready(const struct vgpu_session_page *page);

CUresult shim_unix_attach(void);
int shim_unix_probe_version(void);
void shim_unix_fork_child(void);
void shim_unix_detach(void);

/* CUDA_ERROR_NO_DEVICE: there is no such device, or this process may not use it. */
CUresult shim_pci_attach(void);
int shim_pci_probe_version(void);
void shim_pci_fork_child(void);
void shim_pci_detach(void);
void shim_pci_started(void);
void shim_pci_release(void);

#endif
