/* SPDX-License-Identifier: Apache-2.0 */
/*
 * graph_ranges.c - graph_memory.c and memory_map.c of the library alone: blocks of many graphs that share addresses in every way
 * come and go at random, and the table always has exactly the addresses that somebody has.
 */
#include <stdio.h>
#include <stdlib.h>

#include "code.h"
#include "memory.h"

#define GRAPHS 12
#define BLOCKS 6
#define SPAN 256u
#define BASE 0x700000000000ull

_Atomic uint32_t shim_captures_active;
void memory_reserve_addresses(uint64_t base, uint64_t size) { (void)base, (void)size; }
CUresult shim_enter(void) { return 0; }
CUresult shim_enter_context(void) { return 0; }
struct shim_graph *shim_graph_of(CUgraph graph) { return (void *)graph; }
struct shim_graph *shim_graph_adopt(uint64_t handle, uint64_t parent) { (void)handle, (void)parent; return NULL; }
struct shim_node *shim_node_of(CUgraphNode node) { return (void *)node; }
CUresult shim_node_add(unsigned call, CUgraphNode *out, CUgraph graph, const CUgraphNode *dependencies, size_t count, const void *bytes,
                       uint32_t length, const uint64_t argument[2], uint64_t value[4])
{
    (void)call, (void)out, (void)graph, (void)dependencies, (void)count, (void)bytes, (void)length, (void)argument, (void)value;
    return 1;
}
CUresult shim_reply(unsigned call, const uint64_t argument[8], const void *payload, uint32_t length, uint64_t value[4], void *reply,
                    uint32_t capacity, uint32_t *used)
{
    (void)call, (void)argument, (void)payload, (void)length, (void)value, (void)reply, (void)capacity, (void)used;
    return 0;
}
CUresult shim_async(unsigned call, const uint64_t argument[8], const void *payload, uint32_t length)
{
    (void)call, (void)argument, (void)payload, (void)length;
    return 0;
}
CUresult shim_refuse(unsigned call) { (void)call; return 801; }

static struct { struct shim_graph graph; uint64_t address[BLOCKS], size[BLOCKS]; unsigned count; } all[GRAPHS];

static int wrong(void)
{
    for (uint64_t at = 0; at < SPAN + 64; at++) {
        bool wanted = false;
        struct shim_range found;
        for (unsigned g = 0; g < GRAPHS; g++)
            for (unsigned b = 0; b < all[g].count; b++) wanted = wanted || BASE + at - all[g].address[b] < all[g].size[b];
        if (shim_map_find(&shim_memory_map, BASE + at, &found) != wanted) {
            printf("%#lx: %s in the table\n", (unsigned long)(BASE + at), wanted ? "not" : "still");
            return 1;
        }
    }
    return 0;
}

int main(void)
{
    srand(7);
    for (int turn = 0; turn < 20000; turn++) {
        unsigned g = (unsigned)rand() % GRAPHS;
        if (all[g].count < BLOCKS && rand() % 10 < 7) {
            uint64_t address = BASE + (uint64_t)rand() % SPAN, size = 1 + (uint64_t)rand() % 40;
            if (shim_memory_made(&all[g].graph, address, size) != 0) return 2;
            all[g].address[all[g].count] = address;
            all[g].size[all[g].count++] = size;
        } else {
            shim_memory_drop(all[g].graph.memory);
            all[g].graph.memory = NULL;
            all[g].count = 0;
        }
        if (wrong()) return 1;
    }
    puts("all as expected");
    return 0;
}
