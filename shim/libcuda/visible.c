/* SPDX-License-Identifier: Apache-2.0 */
/*
 * visible.c - CUDA_VISIBLE_DEVICES. Reading it is the driver's work, so it is ours. Pure: text and UUIDs in, indexes out.
 *
 * A comma-separated list of ordinals or of (beginnings of) UUIDs, "GPU-...". It is read from the left up to the first item
 * that names no device or one named before; what follows that is not visible. An empty list shows nothing.
 */
#include "core.h"

#include <ctype.h>
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

/* The device that an item of `length` characters names, -1 for none or more than one. */
static int named(const char *item, size_t length, const uint8_t (*uuid)[16], int count)
{
    if (length >= 4 && strncasecmp(item, "GPU-", 4) == 0) {
        int found = -1;
        for (int i = 0; i < count; i++) {
            char text[UUID_TEXT];
            uuid_text(uuid[i], text);
            if (length >= UUID_TEXT || strncasecmp(item, text, length) != 0) continue;
            if (found >= 0) return -1;
            found = i;
        }
        return found;
    }
    char digits[16];
    if (length == 0 || length >= sizeof digits) return -1;
    memcpy(digits, item, length);
    digits[length] = '\0';
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
    while (shown < count) {
        while (isspace((unsigned char)*list)) list++;
        size_t length = strcspn(list, ",");
        size_t trimmed = length;
        while (trimmed > 0 && isspace((unsigned char)list[trimmed - 1])) trimmed--;
        int device = named(list, trimmed, uuid, count);
        for (int i = 0; i < shown; i++)
            if (out[i] == device) device = -1;
        if (device < 0) break;
        out[shown++] = device;
        if (list[length] == '\0') break;
        list += length + 1;
    }
    return shown;
}
