/* SPDX-License-Identifier: Apache-2.0 */
/* The tables, word by word, and their look-up.  See private_tables.h; the answers are in private_slots.c. */
#include "private_tables.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "context_storage.h"
#include "integrity_check.h"
#include "jit_cache.h"
#include "private_slots.h"

/* A function of its own for each refused slot, so that the count says which one it was.  The caller's arguments stay in its
 * registers: with the C calling convention of x86-64 a callee may take none of them. */
static CUresult refuse(const char *what)
{
    shim_count_refused(what);
    return shim_is_torn_down() ? CUDA_ERROR_DEINITIALIZED : CUDA_ERROR_NOT_SUPPORTED;
}

#define REFUSED(table, number)                                                     \
    static CUresult table##_##number(void)                                         \
    {                                                                              \
        return refuse("cuGetExportTable " table##_uuid "[" #number "]");           \
    }
#define REFUSED_TEN(table, tens)                                                                                      \
    REFUSED(table, tens##0)                                                                                           \
    REFUSED(table, tens##1)                                                                                           \
    REFUSED(table, tens##2)                                                                                           \
    REFUSED(table, tens##3)                                                                                           \
    REFUSED(table, tens##4)                                                                                           \
    REFUSED(table, tens##5)                                                                                           \
    REFUSED(table, tens##6)                                                                                           \
    REFUSED(table, tens##7)                                                                                           \
    REFUSED(table, tens##8)                                                                                           \
    REFUSED(table, tens##9)

#define SIZE(bytes) [0] = {.size_bytes = (bytes)}
#define SLOT(number, function) [number] = {.slot = (vgpu_slot)(function)}
#define NO(table, number) SLOT(number, table##_##number)
#define NO_TEN(table, tens)                                                                                           \
    NO(table, tens##0), NO(table, tens##1), NO(table, tens##2), NO(table, tens##3), NO(table, tens##4),               \
        NO(table, tens##5), NO(table, tens##6), NO(table, tens##7), NO(table, tens##8), NO(table, tens##9)

/* The size words are those of the 580 driver, whose API version we report.  Where another driver is known to have more
 * slots, refusing functions stand behind the end, because callers do not look at the size. */

/* ---- CUDART_INTERFACE ---- */
#define cudart_uuid "6bd5fb6c5bf4e74a8987d93912fd9df9"
REFUSED(cudart, 3)
REFUSED(cudart, 4)
REFUSED(cudart, 5)
REFUSED(cudart, 9)
REFUSED(cudart, 10)
REFUSED(cudart, 11)
static const union vgpu_table_word cudart_table[] = {
    SIZE(0x68),
    SLOT(1, vgpu_cudart_load_module),
    SLOT(2, vgpu_cudart_primary_context),
    NO(cudart, 3),
    NO(cudart, 4),
    NO(cudart, 5),
    SLOT(6, vgpu_cudart_load_module_extended),
    SLOT(7, vgpu_cudart_module_unregistered),
    SLOT(8, vgpu_cudart_load_fatbin_extended),
    NO(cudart, 9),
    NO(cudart, 10),
    NO(cudart, 11),
    SLOT(12, vgpu_cudart_load_compilers),
};

/* ---- TOOLS_TLS ---- */
#define tls_uuid "42d85a8123f6cb478298f6e78a3aecdc"
REFUSED(tls, 1)
REFUSED(tls, 3)
static const union vgpu_table_word tls_table[] = {
    SIZE(0x18),
    NO(tls, 1),
    SLOT(2, vgpu_tools_thread_context),
    NO(tls, 3),
};

/* ---- TOOLS_RUNTIME_CALLBACK_HOOKS ---- */
#define hooks_uuid "a094798c2e742e7493f20800200c0a66"
REFUSED(hooks, 1)
REFUSED(hooks, 3)
REFUSED(hooks, 4)
REFUSED(hooks, 5)
static const union vgpu_table_word hooks_table[] = {
    SIZE(0x38),
    NO(hooks, 1),
    SLOT(2, vgpu_hooks_api_flags),
    NO(hooks, 3),
    NO(hooks, 4),
    NO(hooks, 5),
    SLOT(6, vgpu_hooks_domain_flags),
};

/* ---- CONTEXT_LOCAL_STORAGE_INTERFACE_V0301: no size word, ends with a null word ---- */
#define storage_uuid "c693336e1121df11a8c368f355d89593"
REFUSED(storage, 3)
REFUSED(storage, 4)
REFUSED(storage, 5)
REFUSED(storage, 6)
REFUSED(storage, 7)
static const union vgpu_table_word storage_table[] = {
    SLOT(0, vgpu_context_storage_put),
    SLOT(1, vgpu_context_storage_delete),
    SLOT(2, vgpu_context_storage_get),
    NO(storage, 3), /* the vendor's table is reported to be longer than what is known of it */
    NO(storage, 4),
    NO(storage, 5),
    NO(storage, 6),
    NO(storage, 7),
    SLOT(8, NULL),
};

/* ---- CONTEXT_CHECKS ---- */
#define checks_uuid "263e88607cd2614392f6bbd5006dfa7e"
REFUSED(checks, 1)
REFUSED(checks, 4)
REFUSED(checks, 5)
REFUSED(checks, 6)
REFUSED(checks, 7)
REFUSED(checks, 8)
REFUSED(checks, 9)
REFUSED(checks, 10)
REFUSED(checks, 11)
REFUSED(checks, 12)
REFUSED(checks, 13)
REFUSED(checks, 14)
REFUSED(checks, 15)
REFUSED(checks, 16)
static const union vgpu_table_word checks_table[] = {
    SIZE(0x78),
    NO(checks, 1),
    SLOT(2, vgpu_checks_is_derived),
    SLOT(3, vgpu_checks_at_start),
    NO(checks, 4),
    NO(checks, 5),
    NO(checks, 6),
    NO(checks, 7),
    NO(checks, 8),
    NO(checks, 9),
    NO(checks, 10),
    NO(checks, 11),
    NO(checks, 12),
    NO(checks, 13),
    NO(checks, 14),
    NO(checks, 15),
    NO(checks, 16),
};

/* ---- tools context ---- */
#define tools_context_uuid "21318c60971432488ca641ff7324c8f2"
REFUSED(tools_context, 1)
REFUSED(tools_context, 2)
REFUSED(tools_context, 3)
REFUSED(tools_context, 5)
REFUSED(tools_context, 6)
REFUSED(tools_context, 7)
REFUSED(tools_context, 8)
REFUSED(tools_context, 9)
REFUSED_TEN(tools_context, 1)
REFUSED_TEN(tools_context, 2)
REFUSED(tools_context, 30)
REFUSED(tools_context, 31)
REFUSED(tools_context, 32)
REFUSED(tools_context, 33)
REFUSED(tools_context, 34)
REFUSED(tools_context, 35)
REFUSED(tools_context, 36)
REFUSED(tools_context, 37)
REFUSED(tools_context, 38)
REFUSED_TEN(tools_context, 4)
REFUSED(tools_context, 50)
REFUSED(tools_context, 52)
REFUSED(tools_context, 53)
REFUSED(tools_context, 54)
REFUSED(tools_context, 55)
REFUSED(tools_context, 56)
REFUSED(tools_context, 57)
REFUSED(tools_context, 58)
REFUSED(tools_context, 59)
REFUSED_TEN(tools_context, 6)
REFUSED_TEN(tools_context, 7)
REFUSED_TEN(tools_context, 8)
REFUSED_TEN(tools_context, 9)
static const union vgpu_table_word tools_context_table[] = {
    SIZE(0x2e8),
    NO(tools_context, 1),
    NO(tools_context, 2),
    NO(tools_context, 3),
    SLOT(4, vgpu_tools_context_number),
    NO(tools_context, 5),
    NO(tools_context, 6),
    NO(tools_context, 7),
    NO(tools_context, 8),
    NO(tools_context, 9),
    NO_TEN(tools_context, 1),
    NO_TEN(tools_context, 2),
    NO(tools_context, 30),
    NO(tools_context, 31),
    NO(tools_context, 32),
    NO(tools_context, 33),
    NO(tools_context, 34),
    NO(tools_context, 35),
    NO(tools_context, 36),
    NO(tools_context, 37),
    NO(tools_context, 38),
    SLOT(39, vgpu_tools_stream_number),
    NO_TEN(tools_context, 4),
    NO(tools_context, 50),
    SLOT(51, vgpu_tools_stream_object),
    NO(tools_context, 52),
    NO(tools_context, 53),
    NO(tools_context, 54),
    NO(tools_context, 55),
    NO(tools_context, 56),
    NO(tools_context, 57),
    NO(tools_context, 58),
    NO(tools_context, 59),
    NO_TEN(tools_context, 6),
    NO_TEN(tools_context, 7),
    NO_TEN(tools_context, 8),
    NO_TEN(tools_context, 9),
};

/* ---- tools module ---- */
#define tools_module_uuid "6e163fbeb958444d835ce182aff1991e"
REFUSED(tools_module, 1)
REFUSED(tools_module, 2)
REFUSED(tools_module, 3)
REFUSED(tools_module, 4)
REFUSED(tools_module, 5)
REFUSED(tools_module, 6)
REFUSED(tools_module, 8)
REFUSED(tools_module, 9)
REFUSED_TEN(tools_module, 1)
REFUSED_TEN(tools_module, 2)
REFUSED_TEN(tools_module, 3)
REFUSED_TEN(tools_module, 4)
REFUSED_TEN(tools_module, 5)
REFUSED_TEN(tools_module, 6)
REFUSED_TEN(tools_module, 7)
REFUSED_TEN(tools_module, 8)
REFUSED_TEN(tools_module, 9)
static const union vgpu_table_word tools_module_table[] = {
    SIZE(95 * 8),
    NO(tools_module, 1),
    NO(tools_module, 2),
    NO(tools_module, 3),
    NO(tools_module, 4),
    NO(tools_module, 5),
    NO(tools_module, 6),
    SLOT(7, vgpu_tools_module_functions),
    NO(tools_module, 8),
    NO(tools_module, 9),
    NO_TEN(tools_module, 1),
    NO_TEN(tools_module, 2),
    NO_TEN(tools_module, 3),
    NO_TEN(tools_module, 4),
    NO_TEN(tools_module, 5),
    NO_TEN(tools_module, 6),
    NO_TEN(tools_module, 7),
    NO_TEN(tools_module, 8),
    NO_TEN(tools_module, 9),
};

/* ---- GPC / TPC topology ---- */
#define topology_uuid "1734dc26800d47458726c0f1e7dd8bca"
REFUSED(topology, 1)
REFUSED(topology, 2)
REFUSED(topology, 3)
REFUSED(topology, 5)
REFUSED(topology, 6)
REFUSED(topology, 7)
REFUSED(topology, 8)
REFUSED(topology, 9)
REFUSED(topology, 10)
REFUSED(topology, 11)
REFUSED(topology, 12)
REFUSED(topology, 14)
REFUSED(topology, 15)
REFUSED(topology, 16)
static const union vgpu_table_word topology_table[] = {
    SIZE(0x88),
    NO(topology, 1),
    NO(topology, 2),
    NO(topology, 3),
    SLOT(4, vgpu_topology_get),
    NO(topology, 5),
    NO(topology, 6),
    NO(topology, 7),
    NO(topology, 8),
    NO(topology, 9),
    NO(topology, 10),
    NO(topology, 11),
    NO(topology, 12),
    SLOT(13, vgpu_topology_free),
    NO(topology, 14),
    NO(topology, 15),
    NO(topology, 16),
};

/* ---- JIT compile cache ---- */
#define jit_cache_uuid "da9151d33ae6cc41a5c04f26d533e328"
REFUSED(jit_cache, 5)
static const union vgpu_table_word jit_cache_table[] = {
    SIZE(0x38),
    SLOT(1, vgpu_jit_cache_open),
    SLOT(2, vgpu_jit_cache_close),
    SLOT(3, vgpu_jit_cache_find),
    SLOT(4, vgpu_jit_cache_store),
    NO(jit_cache, 5),
    SLOT(6, vgpu_jit_cache_release),
};

/* ---- INTEGRITY_CHECK ---- */
#define integrity_uuid "d4082055bde6704b8d34ba123c66e1f2"
static CUresult integrity_question(uint32_t version, uint64_t unix_seconds, uint64_t answer[2]);
REFUSED(integrity, 2)
static const union vgpu_table_word integrity_table[] = {
    SIZE(0x18),
    SLOT(1, integrity_question),
    NO(integrity, 2),
};

static void device_facts(void *user, uint32_t ordinal, struct vgpu_integrity_device *out)
{
    (void)user;
    shim_device_uuid((int)ordinal, out->uuid);
    shim_device_pci((int)ordinal, &out->pci_domain, &out->pci_bus, &out->pci_device);
}

static CUresult integrity_question(uint32_t version, uint64_t unix_seconds, uint64_t answer[2])
{
    if (answer == NULL)
        return CUDA_ERROR_INVALID_VALUE;
    if (shim_is_torn_down())
        return CUDA_ERROR_DEINITIALIZED;
    int count = shim_device_count();
    struct vgpu_integrity_inputs inputs = {
        .driver_version = (uint32_t)shim_driver_version(),
        .asked_version = version,
        .process_id = (uint32_t)getpid(),
        .thread_id = (uint32_t)(uintptr_t)pthread_self(),
        .cudart_table = (uintptr_t)cudart_table,
        .integrity_table = (uintptr_t)integrity_table,
        .integrity_slot_1 = (uintptr_t)integrity_table[1].slot, /* the table's own word, whatever it is */
        .unix_seconds = unix_seconds,
        .device_count = count > 0 ? (uint32_t)count : 0,
    };
    vgpu_integrity_answer(&inputs, device_facts, NULL, answer);
    return CUDA_SUCCESS;
}

/* ---- look-up ---- */

static const struct {
    const char *uuid; /* hex, in memory order */
    const void *table;
} served[] = {
    {cudart_uuid, cudart_table},
    {tls_uuid, tls_table},
    {hooks_uuid, hooks_table},
    {storage_uuid, storage_table},
    {checks_uuid, checks_table},
    {integrity_uuid, integrity_table},
    {tools_context_uuid, tools_context_table},
    {tools_module_uuid, tools_module_table},
    {topology_uuid, topology_table},
    {jit_cache_uuid, jit_cache_table},
};

enum { UUID_TEXT = 33, NAMES_KEPT = 64 };

/* Names of refused tables: the counter keeps what it is given, so they must last.  A program asks for a handful; one that
 * asks for random ones is counted under a common name once the room is used up. */
static pthread_mutex_t names_lock = PTHREAD_MUTEX_INITIALIZER;
static char names[NAMES_KEPT][sizeof "cuGetExportTable " + UUID_TEXT]; /* guarded by names_lock; "" ends */

static const char *lasting_name(const char *uuid)
{
    char name[sizeof names[0]];
    snprintf(name, sizeof name, "cuGetExportTable %s", uuid);
    const char *found = "cuGetExportTable (others)";
    pthread_mutex_lock(&names_lock);
    for (int i = 0; i < NAMES_KEPT; i++) {
        if (names[i][0] == '\0')
            memcpy(names[i], name, sizeof name);
        if (strcmp(names[i], name) == 0) {
            found = names[i];
            break;
        }
    }
    pthread_mutex_unlock(&names_lock);
    return found;
}

CUresult vgpu_private_export_table(const void **table, const CUuuid *id)
{
    if (table == NULL)
        return CUDA_ERROR_INVALID_VALUE;
    *table = NULL;
    if (id == NULL)
        return CUDA_ERROR_INVALID_VALUE;
    char uuid[UUID_TEXT];
    for (int i = 0; i < 16; i++)
        snprintf(uuid + 2 * i, 3, "%02x", (unsigned)(unsigned char)id->bytes[i]);
    for (size_t i = 0; i < sizeof served / sizeof *served; i++) {
        if (strcmp(uuid, served[i].uuid) == 0) {
            *table = served[i].table;
            return CUDA_SUCCESS;
        }
    }
    shim_count_refused(lasting_name(uuid));
    return CUDA_ERROR_INVALID_VALUE;
}

void vgpu_private_fork_child(void)
{
    pthread_mutex_init(&names_lock, NULL);
    vgpu_context_storage_fork_child();
    vgpu_jit_cache_fork_child();
}
