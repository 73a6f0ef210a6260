/* SPDX-License-Identifier: Apache-2.0 */
/*
 * visible.c - CUDA_VISIBLE_DEVICES. Reading it is the driver's work, so it is ours. Pure: text and UUIDs in, indexes out.
 *
 * What the real driver does (measured, 580): a comma-separated list, all ordinals or all UUIDs ("GPU-" and at least one
 * hexadecimal digit more), as its first item has it. It is read up to the first item that names no device, and what was named
 * before counts. An ordinal is read as C's atoi reads it ("0x1" and "0abc" are 0); what follows a whole UUID is ignored; case
 * matters in "GPU-" and nowhere else. A device named twice is an error. An empty list, or one that begins badly, shows nothing.
 */
#include "core.h"

#include <stdio.h>
#include <stdlib.h>
#include <strings.h>

#define UUID_TEXT 41 /* "GPU-" and 8-4-4-4-12 hexadecimal digits, and a zero */

static void uuid_text(const uint8_t uuid[16], char out[UUID_TEXT])
{
    snprintf(out, UUID_TEXT, "GPU-%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", uuid[0], uuid[1],
             uuid[2], uuid[3], uuid[4], uuid[5], uuid[6], uuid[7], uuid[8], uuid[9], uuid[10], uuid[11], uuid[12], uuid[13],
             uuid[14], uuid[15]);
}

static int by_uuid(const char *item, size_t length, const uint8_t (*uuid)[16], int count)
{
    int found = -1;
    if (length > UUID_TEXT - 1) length = UUID_TEXT - 1;
    for (int i = 0; i < count; i++) {
        char text[UUID_TEXT];
        uuid_text(uuid[i], text);
        if (strncasecmp(item, text, length) != 0) continue;
        if (found >= 0) return -1; /* the beginning of more than one */
        found = i;
    }
    return found;
}

static bool begins_uuid(const char *item, size_t length) { return length > 4 && strncmp(item, "GPU-", 4) == 0; }

static int by_ordinal(const char *item, size_t length, int count)
{
    char digits[16] = {0};
    memcpy(digits, item, length < sizeof digits - 1 ? length : sizeof digits - 1);
    char *end;
    long ordinal = strtol(digits, &end, 10);
    return end != digits && ordinal >= 0 && ordinal < count ? (int)ordinal : -1;
}

int shim_visible_devices(const char *list, const uint8_t (*uuid)[16], int count, int *out)
{
    int shown = 0;
    if (list == NULL) {
        for (; shown < count; shown++) out[shown] = shown;
        return shown;
    }
    bool uuids = begins_uuid(list, strcspn(list, ","));
    for (;;) {
        size_t length = strcspn(list, ",");
        int device = !uuids                      ? by_ordinal(list, length, count)
                     : begins_uuid(list, length) ? by_uuid(list, length, uuid, count)
                                                 : -1;
        if (device < 0) return shown;
        for (int i = 0; i < shown; i++)
            if (out[i] == device) return -1;
        out[shown++] = device;
        if (list[length] == '\0') return shown;
        list += length + 1;
    }
}
