/* SPDX-License-Identifier: Apache-2.0 */
/*
 * code_map.c - the small containers behind code.h: a hash map from 64-bit keys (handles, addresses, blob numbers) to
 * pointers, and growing lists of handles. A look-up is on the path of each launch, so it is one multiplication and,
 * nearly always, one probe.
 */
#include "code.h"
#include "graph_memory.h"

static size_t home(uint64_t key, size_t capacity) { return (size_t)(key * 0x9e3779b97f4a7c15ull >> 20) & (capacity - 1); }

static struct code_map_slot *find(const struct code_map *map, uint64_t key)
{
    if (map->capacity == 0 || key == 0) return NULL;
    for (size_t at = home(key, map->capacity);; at = (at + 1) & (map->capacity - 1)) {
        if (map->slot[at].key == key) return &map->slot[at];
        if (map->slot[at].key == 0) return NULL;
    }
}

void *code_map_get(const struct code_map *map, uint64_t key)
{
    const struct code_map_slot *slot = find(map, key);
    return slot == NULL ? NULL : slot->value;
}

static void insert(struct code_map *map, uint64_t key, void *value)
{
    size_t at = home(key, map->capacity);
    while (map->slot[at].key != 0) at = (at + 1) & (map->capacity - 1);
    map->slot[at] = (struct code_map_slot){key, value};
    map->count++;
}

bool code_map_put(struct code_map *map, uint64_t key, void *value)
{
    struct code_map_slot *known = find(map, key);
    if (known != NULL) {
        known->value = value;
        return true;
    }
    if (key == 0) return false;
    if ((map->count + 1) * 2 > map->capacity) {
        const struct code_map old = *map;
        map->capacity = old.capacity == 0 ? 64 : old.capacity * 2;
        map->slot = calloc(map->capacity, sizeof *map->slot);
        if (map->slot == NULL) {
            *map = old;
            return false;
        }
        map->count = 0;
        for (size_t i = 0; i < old.capacity; i++)
            if (old.slot[i].key != 0) insert(map, old.slot[i].key, old.slot[i].value);
        free(old.slot);
    }
    insert(map, key, value);
    return true;
}

void *code_map_take(struct code_map *map, uint64_t key)
{
    struct code_map_slot *slot = find(map, key);
    if (slot == NULL) return NULL;
    void *value = slot->value;
    const size_t mask = map->capacity - 1;
    size_t hole = (size_t)(slot - map->slot);
    for (size_t at = (hole + 1) & mask; map->slot[at].key != 0; at = (at + 1) & mask) {
        /* Close the gap with what may stand there, so that probing still reaches everything behind. */
        if (((at - home(map->slot[at].key, map->capacity)) & mask) >= ((at - hole) & mask)) {
            map->slot[hole] = map->slot[at];
            hole = at;
        }
    }
    map->slot[hole].key = 0;
    map->count--;
    return value;
}

bool code_list_add(struct code_list *list, uint64_t item)
{
    if (list->count == list->capacity) {
        const size_t larger = list->capacity == 0 ? 8 : list->capacity * 2;
        uint64_t *grown = realloc(list->item, larger * sizeof *grown);
        if (grown == NULL) return false;
        list->item = grown;
        list->capacity = larger;
    }
    list->item[list->count++] = item;
    return true;
}

void code_list_remove(struct code_list *list, uint64_t item)
{
    for (size_t i = 0; i < list->count; i++)
        if (list->item[i] == item) {
            list->item[i] = list->item[--list->count];
            return;
        }
}

struct replay_code *code_of(struct vgpu_replay *replay)
{
    if (replay->code == NULL) replay->code = calloc(1, sizeof *replay->code);
    return replay->code;
}

static void free_values(struct code_map *map, void (*release)(void *))
{
    for (size_t i = 0; i < map->capacity; i++)
        if (map->slot[i].key != 0) release(map->slot[i].value);
    free(map->slot);
}

static void release_blob(void *value)
{
    free(((struct code_blob *)value)->bytes);
    free(value);
}

static void release_function(void *value)
{
    free(((struct code_function *)value)->parameter);
    free(value);
}

static void release_owner(void *value)
{
    struct code_owner *owner = value;
    free(owner->image);
    free(owner->wrapper);
    free(owner->functions.item);
    free(owner);
}

static void release_graph(void *value)
{
    struct code_graph *graph = value;
    if (graph->memory != NULL) {
        free(graph->memory->made.item);
        free(graph->memory->freed.item);
        free(graph->memory);
    }
    free(graph->nodes.item);
    free(graph->children.item);
    free(graph);
}

void replay_code_close(struct vgpu_replay *replay)
{
    struct replay_code *code = replay->code;
    if (code == NULL) return;
    code_links_close(replay);
    free_values(&code->blobs, release_blob);
    free_values(&code->functions, release_function);
    free(code->kernels.slot);
    free_values(&code->owners, release_owner);
    free_values(&code->graphs, release_graph);
    graph_memory_close(code);
    free(code->captures.slot);
    free(code->nodes.slot);
    free_values(&code->host_nodes, free);
    free(code->host_pairs.slot);
    free(code->textures.slot);
    free(code->surfaces.slot);
    free(code);
    replay->code = NULL;
}
