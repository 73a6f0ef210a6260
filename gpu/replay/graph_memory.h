/* SPDX-License-Identifier: Apache-2.0 */
/*
 * graph_memory.h - memory nodes of graphs: which addresses are whose, which of them are allocated, and what the driver holds
 * for all of them against the VM's quota. Touched by the replay thread alone.
 */
#ifndef VGPU_REPLAY_GRAPH_MEMORY_H
#define VGPU_REPLAY_GRAPH_MEMORY_H

#include "code.h"

/* What an allocation node has an address for. Several of a graph may share addresses, if they are never allocated together. */
struct graph_block {
    uint64_t address, size, cost; /* cost: whole units of the device */
    struct graph_block *next; /* at the same address */
    uint32_t holders;         /* graphs and instances that name it */
    uint32_t instances;       /* of these */
    bool freed_inside;        /* the graph that allocates it frees it too */
    bool is_live;             /* allocated by a launch that left it so, and not freed since */
};

struct graph_blocks { struct graph_block **item; size_t count, capacity; };

/* Of a graph with memory nodes, or an instance of one. */
struct graph_memory {
    struct graph_blocks made;  /* by its allocation nodes */
    struct graph_blocks freed; /* by its free nodes: what other graphs have made */
};

struct graph_instance {
    uint64_t need;  /* bytes of the device that it can have at most */
    uint64_t stamp; /* when it was launched or uploaded last */
    bool frees_itself; /* CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH */
    bool holds;     /* the driver has given it all that it needs, and has not been told to let go since */
    struct graph_memory memory;
    struct graph_blocks left; /* of what it makes, what no free node of the graph freed when it was instantiated */
};

/* Of a session. Made with its first memory node. */
struct replay_graph_memory {
    struct code_map blocks;    /* address -> graph_block */
    struct code_map instances; /* handle -> graph_instance */
    size_t block_count;
    uint64_t charged;  /* what the driver held, when it was asked last */
    uint64_t held;     /* needs of the instances that hold what they need */
    uint64_t orphaned; /* what is allocated and in no instance any more */
    uint64_t stamp;    /* launches and uploads */
};

static inline bool graph_memory_is_used(const struct vgpu_replay *replay)
{
    return replay->code != NULL && replay->code->graph_memory != NULL;
}

/* Are there memory nodes in it? */
static inline bool graph_memory_is_in(const struct code_graph *graph)
{
    return graph->memory != NULL && (graph->memory->made.count != 0 || graph->memory->freed.count != 0);
}

/* The graph that the stream captures into; NULL: none. */
CUresult graph_memory_capturing(struct vgpu_replay *replay, void *stream, struct code_graph **graph);
/* cuMemAllocFromPoolAsync and cuMemFreeAsync into a capture. value[1], value[0]: its graph. */
CUresult graph_memory_capture_allocation(struct vgpu_replay *replay, struct code_graph *graph, uint64_t size, void *pool, void *stream,
                                         struct vgpu_result *result);
CUresult graph_memory_capture_free(struct vgpu_replay *replay, struct code_graph *graph, uint64_t address, void *stream,
                                   struct vgpu_result *result);
/* Frees what a launch has allocated: in a stream's order, or (stream NULL) at once. */
CUresult graph_memory_free(struct vgpu_replay *replay, uint64_t address, uint64_t stream, void *real, bool at_once);

/* Around cuGraphInstantiate. begin: *instance is NULL for a graph without memory nodes. end takes it over, and the driver's instance if it
 * fails. */
CUresult graph_memory_instantiate_begin(struct vgpu_replay *replay, const struct code_graph *graph, uint64_t flags,
                                        struct graph_instance **instance, uint64_t *pledge);
CUresult graph_memory_instantiate_end(struct vgpu_replay *replay, CUresult status, uint64_t flags, uint64_t stream, uint64_t handle,
                                      void *exec, struct graph_instance *instance, uint64_t pledge);
/* The instance has become one of another graph. */
CUresult graph_memory_update(struct vgpu_replay *replay, uint64_t handle, const struct code_graph *graph, void *exec, void *real,
                             int (*update)(void *, void *, void *), void *result);
/* NULL: no memory nodes in it, which is known without a look-up where the session has none. */
struct graph_instance *graph_memory_instance(struct vgpu_replay *replay, uint64_t handle);
CUresult graph_memory_launch(struct vgpu_replay *replay, struct graph_instance *instance, void *exec, uint64_t stream, void *real);
CUresult graph_memory_upload(struct vgpu_replay *replay, struct graph_instance *instance, void *exec, uint64_t stream, void *real);
void graph_memory_instance_ended(struct vgpu_replay *replay, uint64_t handle);
void graph_memory_graph_ended(struct vgpu_replay *replay, struct code_graph *graph);
void graph_memory_context_ended(struct vgpu_replay *replay);

/* What the driver holds now is what counts. keeps_nothing: it is told to let go of what is not in use before. */
void graph_memory_settle(struct vgpu_replay *replay, bool keeps_nothing);
void graph_memory_close(struct replay_code *code);

/* ---- between graph_memory_node.c, which has the blocks, and graph_memory.c ---- */

static inline uint64_t graph_memory_sum(uint64_t a, uint64_t b) { return a + b < a ? UINT64_MAX : a + b; }
struct replay_graph_memory *graph_memory_table(struct vgpu_replay *replay); /* NULL when out of memory */
/* So many more (or, negative, fewer) name it, so many of them instances. It is gone when nobody does and nothing is allocated. */
void graph_block_change(struct replay_graph_memory *memory, struct graph_block *block, int holders, int instances, bool is_live);
struct graph_block *graph_block_live_at(const struct replay_graph_memory *memory, uint64_t address); /* NULL: nothing is allocated there */
bool graph_blocks_make_room(struct graph_blocks *blocks, size_t more);
bool graph_blocks_copy(struct graph_blocks *to, const struct graph_blocks *from); /* the list alone: nobody holds more of them */
void graph_blocks_release(struct replay_graph_memory *memory, struct graph_blocks *blocks, int instances);

#endif
