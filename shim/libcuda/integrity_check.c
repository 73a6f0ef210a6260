/* SPDX-License-Identifier: Apache-2.0 */
/* Message layout and constants of the self-test; pure, so that golden vectors can check it byte by byte. */
#include "integrity_check.h"

#include <endian.h>
#include <string.h>

#include "md2.h"

enum { RECORD_SIZE = 48, DEVICE_SIZE = 28 };

static const uint8_t message_key[16] = {0x14, 0x6a, 0xdd, 0xae, 0x53, 0xa9, 0xa7, 0x52,
                                        0xaa, 0x08, 0x41, 0x36, 0x0b, 0xf5, 0x5a, 0x9f};

/* The first two of the three questions have fixed answers. */
static const uint64_t fixed_answer_0[2] = {0x3341181c03cb675c, 0x8ed383aa1f4cd1e8};
static const uint64_t fixed_answer_1[2] = {0x1841181c03cb675c, 0x8ed383aa1f4cd1e8};

static uint8_t *put_u32(uint8_t *at, uint32_t value)
{
    value = htole32(value);
    memcpy(at, &value, sizeof value);
    return at + sizeof value;
}

static uint8_t *put_u64(uint8_t *at, uint64_t value)
{
    value = htole64(value);
    memcpy(at, &value, sizeof value);
    return at + sizeof value;
}

void vgpu_integrity_answer(const struct vgpu_integrity_inputs *inputs,
                           void (*device)(void *user, uint32_t ordinal, struct vgpu_integrity_device *out), void *user,
                           uint64_t answer[2])
{
    uint32_t question = inputs->asked_version % 10;
    if (question < 2) {
        memcpy(answer, question == 0 ? fixed_answer_0 : fixed_answer_1, sizeof fixed_answer_0);
        return;
    }
    struct vgpu_hmac_md2 hmac;
    vgpu_hmac_md2_start(&hmac, message_key, sizeof message_key);

    uint8_t record[RECORD_SIZE];
    uint8_t *at = record;
    at = put_u32(at, inputs->driver_version);
    at = put_u32(at, inputs->asked_version);
    at = put_u32(at, inputs->process_id);
    at = put_u32(at, inputs->thread_id);
    at = put_u64(at, inputs->cudart_table);
    at = put_u64(at, inputs->integrity_table);
    at = put_u64(at, inputs->integrity_slot_1);
    put_u64(at, inputs->unix_seconds);
    vgpu_hmac_md2_add(&hmac, record, sizeof record);

    for (uint32_t ordinal = 0; ordinal < inputs->device_count; ordinal++) {
        struct vgpu_integrity_device facts = {0};
        device(user, ordinal, &facts);
        uint8_t bytes[DEVICE_SIZE];
        memcpy(bytes, facts.uuid, sizeof facts.uuid);
        at = bytes + sizeof facts.uuid;
        at = put_u32(at, (uint32_t)facts.pci_domain);
        at = put_u32(at, (uint32_t)facts.pci_bus);
        put_u32(at, (uint32_t)facts.pci_device);
        vgpu_hmac_md2_add(&hmac, bytes, sizeof bytes);
    }
    uint8_t digest[VGPU_MD2_SIZE];
    vgpu_hmac_md2_finish(&hmac, digest);
    memcpy(answer, digest, sizeof digest); /* as bytes: the runtime compares memory */
}
