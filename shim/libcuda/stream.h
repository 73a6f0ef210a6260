/* SPDX-License-Identifier: Apache-2.0 */
/* stream.h - what streams and events share. */
#ifndef VGPU_SHIM_STREAM_H
#define VGPU_SHIM_STREAM_H

#include "shim.h"

bool stream_captures_active(void);
uint64_t stream_context(uint64_t id); /* the context of a stream; of the legacy stream, the current one */

#endif
