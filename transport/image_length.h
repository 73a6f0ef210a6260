/* SPDX-License-Identifier: Apache-2.0 */
/*
 * image_length.h - how many bytes belong to a device-code image of which only the first is known.
 *
 * The guest is handed bare pointers (cuModuleLoadData, cuLibraryLoadData) and must not read one byte that the
 * format does not prove to be there: an image may end at a page border. The worker is handed bytes of known
 * length and must not let the driver walk past them. Both ask here; the guest with limit UINT64_MAX.
 *
 * Formats: fatbin (16-byte header with the length), ELF64 cubin (program headers come last in cubins, so every
 * table and every piece counts), ar archive, PTX text with its NUL. A fatbin *wrapper* holds pointers and is
 * taken apart by the guest alone (shim/libcuda/image.c).
 */
#ifndef VGPU_IMAGE_LENGTH_H
#define VGPU_IMAGE_LENGTH_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#define VGPU_WRAPPER_MAGIC 0x466243b1u
#define VGPU_FATBIN_MAGIC 0xba55ed50u
#define VGPU_FATBIN_MAGIC_OLD 0x1ee55a01u
/* Larger than any image; a length beyond it is a damaged header, not an image. */
#define VGPU_IMAGE_LIMIT (2ull << 30)

enum vgpu_image_kind { VGPU_IMAGE_NONE, VGPU_IMAGE_FATBIN, VGPU_IMAGE_ELF, VGPU_IMAGE_ARCHIVE, VGPU_IMAGE_PTX };

static inline uint16_t vgpu_image_u16(const uint8_t *at) { uint16_t value; memcpy(&value, at, 2); return value; }
static inline uint32_t vgpu_image_u32(const uint8_t *at) { uint32_t value; memcpy(&value, at, 4); return value; }
static inline uint64_t vgpu_image_u64(const uint8_t *at) { uint64_t value; memcpy(&value, at, 8); return value; }

/* Does the image begin with these bytes? Compared one by one, so that nothing behind a mismatch is read. */
static inline bool vgpu_image_starts(const uint8_t *image, uint64_t limit, const char *magic, unsigned length)
{
    for (unsigned i = 0; i < length; i++)
        if (i >= limit || image[i] != (uint8_t)magic[i]) return false;
    return true;
}

static inline bool vgpu_image_is_u32(const uint8_t *image, uint64_t limit, uint32_t magic)
{
    char bytes[4];
    memcpy(bytes, &magic, 4);
    return vgpu_image_starts(image, limit, bytes, 4);
}

static inline bool vgpu_image_extend(uint64_t *end, uint64_t offset, uint64_t size)
{
    if (offset > VGPU_IMAGE_LIMIT || size > VGPU_IMAGE_LIMIT - offset) return false;
    if (offset + size > *end) *end = offset + size;
    return true;
}

/* ELF64: the header proves the two tables, the tables prove the pieces. */
static inline bool vgpu_image_elf(const uint8_t *image, uint64_t limit, uint64_t *length)
{
    /* EI_CLASS 2 (64 bit), EI_DATA 1 (little endian): read before anything further back. */
    if (limit < 64 || image[4] != 2 || image[5] != 1) return false;
    const uint64_t program_offset = vgpu_image_u64(image + 32), section_offset = vgpu_image_u64(image + 40);
    const uint16_t header_size = vgpu_image_u16(image + 52);
    const uint16_t program_size = vgpu_image_u16(image + 54), program_count = vgpu_image_u16(image + 56);
    const uint16_t section_size = vgpu_image_u16(image + 58);
    uint64_t section_count = vgpu_image_u16(image + 60);
    if (header_size < 64 || header_size > limit) return false;
    uint64_t end = header_size;
    if (program_count != 0) {
        if (program_size < 56) return false;
        if (!vgpu_image_extend(&end, program_offset, (uint64_t)program_count * program_size)) return false;
    }
    if (section_offset != 0 && section_size < 64) return false;
    if (section_offset != 0 && section_count == 0) {
        /* More than 65,279 sections: the true count stands in section 0. */
        if (!vgpu_image_extend(&end, section_offset, section_size) || end > limit) return false;
        section_count = vgpu_image_u64(image + section_offset + 32);
        if (section_count > VGPU_IMAGE_LIMIT / section_size) return false;
    }
    if (section_offset == 0) section_count = 0;
    if (!vgpu_image_extend(&end, section_offset, section_count * section_size)) return false;
    if (end > limit) return false; /* from here on the tables themselves are read */
    for (uint64_t i = 0; i < program_count; i++) {
        const uint8_t *header = image + program_offset + i * program_size;
        if (!vgpu_image_extend(&end, vgpu_image_u64(header + 8), vgpu_image_u64(header + 32))) return false;
    }
    for (uint64_t i = 0; i < section_count; i++) {
        const uint8_t *header = image + section_offset + i * section_size;
        const uint32_t type = vgpu_image_u32(header + 4);
        if (type == 8 || type == 0) continue; /* NOBITS and NULL have no bytes in the file */
        if (!vgpu_image_extend(&end, vgpu_image_u64(header + 24), vgpu_image_u64(header + 32))) return false;
    }
    *length = end;
    return end <= limit;
}

/* ar: members follow each other, 60-byte headers at even offsets; the first byte that is not a header ends it. */
static inline bool vgpu_image_archive(const uint8_t *image, uint64_t limit, uint64_t *length)
{
    uint64_t at = 8;
    for (;;) {
        uint64_t size = 0;
        /* A header is proved by its own last two bytes only, so its digits are checked on the way there. */
        bool header = true;
        for (unsigned i = 0; i < 60 && header; i++) {
            if (at + i >= limit) { header = false; break; }
            const uint8_t byte = image[at + i];
            if (i >= 48 && i < 58) {
                if (byte >= '0' && byte <= '9') size = size * 10 + (byte - '0');
                else if (byte != ' ') header = false;
            } else if (i == 58) {
                header = byte == 0x60;
            } else if (i == 59) {
                header = byte == 0x0a;
            } else if (byte < 0x20 || byte > 0x7e) {
                header = false;
            }
        }
        if (!header) break;
        if (size > VGPU_IMAGE_LIMIT - at - 60) return false;
        at += 60 + size;
        if (at > limit) return false;
        if (at & 1) {
            if (at >= limit || image[at] != '\n') break;
            at++;
        }
    }
    *length = at;
    return at > 8;
}

/* Text up to its NUL. Control characters other than white space end the search: this is no text. */
static inline bool vgpu_image_text(const uint8_t *image, uint64_t limit, uint64_t *length)
{
    uint64_t at = 0;
    while (at < limit && at < VGPU_IMAGE_LIMIT) {
        const uint8_t byte = image[at];
        if (byte == 0) {
            *length = at + 1;
            return at > 0;
        }
        if (byte < 0x20 && !(byte >= 0x09 && byte <= 0x0d)) return false;
        if (byte == 0x7f) return false;
        at++;
    }
    return false;
}

/* The kind and the length in bytes of what starts at image; VGPU_IMAGE_NONE when it is nothing we know or does not
 * fit into limit. PTX counts its NUL. A wrapper is none. */
static inline enum vgpu_image_kind vgpu_image_length(const void *start, uint64_t limit, uint64_t *length)
{
    const uint8_t *image = start;
    if (vgpu_image_is_u32(image, limit, VGPU_FATBIN_MAGIC) || vgpu_image_is_u32(image, limit, VGPU_FATBIN_MAGIC_OLD)) {
        if (limit < 16) return VGPU_IMAGE_NONE;
        const uint64_t header = vgpu_image_u16(image + 6), size = vgpu_image_u64(image + 8);
        if (header < 16 || size > VGPU_IMAGE_LIMIT - header || header + size > limit) return VGPU_IMAGE_NONE;
        *length = header + size;
        return VGPU_IMAGE_FATBIN;
    }
    if (vgpu_image_starts(image, limit, "\177ELF", 4))
        return vgpu_image_elf(image, limit, length) ? VGPU_IMAGE_ELF : VGPU_IMAGE_NONE;
    if (vgpu_image_starts(image, limit, "!<arch>\n", 8))
        return vgpu_image_archive(image, limit, length) ? VGPU_IMAGE_ARCHIVE : VGPU_IMAGE_NONE;
    if (vgpu_image_is_u32(image, limit, VGPU_WRAPPER_MAGIC)) return VGPU_IMAGE_NONE;
    return vgpu_image_text(image, limit, length) ? VGPU_IMAGE_PTX : VGPU_IMAGE_NONE;
}

#endif
