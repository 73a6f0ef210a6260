/* SPDX-License-Identifier: Apache-2.0 */
/*
 * memory_attributes.c - cuPointerGetAttribute and cuPointerGetAttributes, every attribute of every kind of pointer,
 * as an H200 answered them. Where no value stands, the number is the driver's own affair (identities).
 */
#include "guest.h"

enum { CONTEXT = 1, TYPE, DEVICE_POINTER, HOST_POINTER, TOKENS, SYNC, ID, MANAGED, ORDINAL, IPC, START, SIZE, MAPPED, HANDLES, RDMA,
       ACCESS, POOL, MAPPING_SIZE, MAPPING_BASE, BLOCK, DECOMPRESS, LAST = DECOMPRESS };
#define UNIT ((uint64_t)2 << 20)
#define UNTOUCHED 0xeeeeeeeeeeeeeeeeull
#define ANY 0xabababababababab

struct row { int single; uint64_t value; int plural; uint64_t plural_value; };

static bool is_narrow(int a)
{
    return a == TYPE || a == SYNC || a == MANAGED || a == ORDINAL || a == IPC || a == MAPPED || a == RDMA || a == ACCESS || a == DECOMPRESS;
}

static void compare(const char *what, int attribute, uint64_t got, uint64_t expected)
{
    if (expected == ANY) return;
    if (is_narrow(attribute) && expected != UNTOUCHED) expected = UNTOUCHED >> 32 << 32 | (uint32_t)expected;
    if (got == expected) return;
    printf("%s attribute %d: %llx, expected %llx\n", what, attribute, (unsigned long long)got, (unsigned long long)expected);
    guest_failures++;
}

static void check(const char *what, uint64_t pointer, const struct row *rows)
{
    for (int a = 1; a <= LAST; a++) {
        uint64_t single = UNTOUCHED, many = UNTOUCHED;
        void *out = &many;
        unsigned asked = (unsigned)a;
        int status = (int)cuPointerGetAttribute(&single, asked, pointer);
        int plural = (int)cuPointerGetAttributes(1, &asked, &out, pointer);
        if (status != rows[a].single || plural != rows[a].plural) {
            printf("%s attribute %d: %d and %d, expected %d and %d\n", what, a, status, plural, rows[a].single, rows[a].plural);
            guest_failures++;
        }
        compare(what, a, single, rows[a].value);
        compare(what, a, many, rows[a].plural_value);
    }
}

#define BOTH(v) {0, v, 0, v}

static void unknown(const char *what, uint64_t pointer, uint64_t start, uint64_t size)
{
    struct row rows[LAST + 1];
    for (int a = 1; a <= LAST; a++) rows[a] = (struct row){1, UNTOUCHED, 0, 0};
    rows[HOST_POINTER].plural_value = pointer;
    rows[TOKENS] = (struct row){1, UNTOUCHED, 1, UNTOUCHED};
    rows[ORDINAL].plural_value = (uint64_t)-2;
    rows[START].plural_value = start;
    rows[SIZE].plural_value = size;
    check(what, pointer, rows);
}

int main(void)
{
    CUcontext context = guest_begin();
    uint64_t owner = (uint64_t)(uintptr_t)context, offset = 4;
    CUdeviceptr p, q, z, va;
    void *h;
    static char page[1 << 20] __attribute__((aligned(4096)));
    CUmemoryPool pool;
    CUmemGenericAllocationHandle handle;
    CUmemAllocationProp properties = {.type = 1, .location = {1, 0}};
    CUmemAccessDesc access = {{1, 0}, 3};
    OK(cuMemAlloc_v2(&p, 1000));
    OK(cuMemHostAlloc(&h, 5000, 0));
    OK(cuMemHostRegister_v2(page, sizeof page, 0));
    OK(cuDeviceGetDefaultMemPool(&pool, 0));
    OK(cuMemAllocAsync(&z, 1 << 20, NULL));
    OK(cuMemAddressReserve(&va, 4 * UNIT, 0, 0, 0));

    struct row device[LAST + 1] = {
        [CONTEXT] = BOTH(owner), [TYPE] = BOTH(2), [DEVICE_POINTER] = BOTH(p + offset), [HOST_POINTER] = {1, 0, 0, 0},
        [TOKENS] = {801, UNTOUCHED, 1, UNTOUCHED}, /* the real driver has tokens for a kernel module; a guest has none */
        [SYNC] = BOTH(1), [ID] = BOTH(ANY), [MANAGED] = BOTH(0), [ORDINAL] = BOTH(0), [IPC] = BOTH(0), [START] = BOTH(p), [SIZE] = BOTH(1000),
        [MAPPED] = BOTH(1), [HANDLES] = BOTH(0), [RDMA] = BOTH(0), [ACCESS] = BOTH(3), [POOL] = BOTH(0), [MAPPING_SIZE] = BOTH(UNIT),
        [MAPPING_BASE] = BOTH(p & ~(UNIT - 1)), [BLOCK] = BOTH(ANY), [DECOMPRESS] = BOTH(0)};
    check("device", p + offset, device);

    uint64_t host = (uint64_t)(uintptr_t)h;
    struct row pinned[LAST + 1];
    memcpy(pinned, device, sizeof pinned);
    pinned[TYPE] = (struct row)BOTH(1);
    pinned[DEVICE_POINTER] = pinned[HOST_POINTER] = (struct row)BOTH(host + offset);
    pinned[SYNC] = (struct row)BOTH(0);
    pinned[START] = pinned[MAPPING_BASE] = (struct row)BOTH(host);
    pinned[SIZE] = (struct row)BOTH(5000);
    check("pinned", host + offset, pinned);

    uint64_t memory = (uint64_t)(uintptr_t)page;
    struct row registered[LAST + 1];
    memcpy(registered, pinned, sizeof registered);
    registered[DEVICE_POINTER] = (struct row){1, 0, 0, 0}; /* no device address here; the real driver has one */
    registered[HOST_POINTER] = (struct row)BOTH(memory + offset);
    registered[START] = registered[MAPPING_BASE] = (struct row)BOTH(memory);
    registered[SIZE] = registered[MAPPING_SIZE] = (struct row)BOTH(sizeof page);
    check("registered", memory + offset, registered);

    struct row pooled[LAST + 1];
    memcpy(pooled, device, sizeof pooled);
    pooled[CONTEXT] = (struct row)BOTH(0);
    pooled[DEVICE_POINTER] = (struct row)BOTH(z + offset);
    pooled[START] = pooled[MAPPING_BASE] = (struct row)BOTH(z);
    pooled[SIZE] = (struct row)BOTH(1 << 20);
    pooled[POOL] = (struct row)BOTH((uint64_t)(uintptr_t)pool);
    check("pool", z + offset, pooled);

    unknown("reserved", va, va, 4 * UNIT);
    OK(cuMemCreate(&handle, 2 * UNIT, &properties, 0));
    OK(cuMemMap(va + UNIT, 2 * UNIT, 0, handle, 0));
    struct row mapped[LAST + 1];
    memcpy(mapped, device, sizeof mapped);
    mapped[CONTEXT] = (struct row)BOTH(0);
    mapped[DEVICE_POINTER] = (struct row){1, 0, 0, 0};
    mapped[START] = (struct row)BOTH(va);
    mapped[SIZE] = (struct row)BOTH(4 * UNIT);
    mapped[ACCESS] = (struct row)BOTH(0);
    mapped[MAPPING_SIZE] = (struct row)BOTH(2 * UNIT);
    mapped[MAPPING_BASE] = (struct row)BOTH(va + UNIT);
    check("mapped without access", va + UNIT + offset, mapped);
    OK(cuMemSetAccess(va + UNIT, 2 * UNIT, &access, 1));
    mapped[DEVICE_POINTER] = (struct row)BOTH(va + UNIT + offset);
    mapped[ACCESS] = (struct row)BOTH(3);
    check("mapped", va + UNIT + offset, mapped);

    unknown("unknown", (uint64_t)(uintptr_t)&host, UNTOUCHED, UNTOUCHED);
    unknown("null", 0, UNTOUCHED, UNTOUCHED);
    OK(cuMemAlloc_v2(&q, 64));
    OK(cuMemFree_v2(q));
    unknown("freed", q, UNTOUCHED, UNTOUCHED);

    uint64_t first = 0, second = 0;
    OK(cuPointerGetAttribute(&first, ID, p));
    OK(cuPointerGetAttribute(&second, ID, host));
    CHECK(first != second && first != 0);
    unsigned three[3] = {TYPE, ORDINAL, START};
    int type = -1, ordinal = -1;
    uint64_t start = 0;
    void *out[3] = {&type, &ordinal, &start};
    OK(cuPointerGetAttributes(3, three, out, p + 7));
    CHECK(type == 2 && ordinal == 0 && start == p);
    unsigned one = 1;
    OK(cuPointerSetAttribute(&one, SYNC, p + 4));
    EXPECT(1, cuPointerSetAttribute(&one, TYPE, p));
    EXPECT(1, cuPointerSetAttribute(&one, SYNC, 0x1234));
    OK(cuPointerSetAttribute(&one, SYNC, host));
    EXPECT(1, cuPointerSetAttribute(NULL, SYNC, p));
    EXPECT(1, cuPointerGetAttribute(NULL, TYPE, p));
    EXPECT(1, cuPointerGetAttribute(&one, 99, p));
    EXPECT(1, cuPointerGetAttributes(0, NULL, NULL, p));
    return guest_end();
}
