/* SPDX-License-Identifier: Apache-2.0 */
/*
 * code.h - what the handlers about device code share: blobs, modules and libraries, functions, graphs, links, textures.
 *
 * The handle tables (handles.c) say whether a handle is real; what is kept here says what belongs to it: a function's
 * parameter table, a graph's nodes, a library's copy of its image. Everything here is touched by the replay thread
 * alone. A record here may outlive its handle (the end of a context drops handles without asking), so each use goes
 * through the handle table first.
 */
#ifndef VGPU_REPLAY_CODE_H
#define VGPU_REPLAY_CODE_H

#include <stdlib.h>

#include "../../transport/code_wire.h"
#include "flight.h"
#include "replay.h"

/* ---- a map from 64-bit keys to pointers (code_map.c) ---- */

struct code_map {
    struct code_map_slot { uint64_t key; void *value; } *slot; /* key 0: free */
    size_t capacity, count; /* capacity is a power of two, or 0 */
};
void *code_map_get(const struct code_map *map, uint64_t key);
bool code_map_put(struct code_map *map, uint64_t key, void *value); /* replaces; false when out of memory */
void *code_map_take(struct code_map *map, uint64_t key);            /* removes */

/* ---- lists of handles ---- */

struct code_list { uint64_t *item; size_t count, capacity; };
bool code_list_add(struct code_list *list, uint64_t item);
void code_list_remove(struct code_list *list, uint64_t item);

/* ---- everything a session keeps ---- */

struct graph_memory; /* graph_memory.h */
struct replay_graph_memory;

struct code_blob { uint8_t *bytes; uint64_t total, written; };

struct code_function {
    uint64_t handle, owner;
    void *real;
    bool is_kernel, described;
    CUresult status; /* why it cannot be loaded, if it cannot */
    uint32_t parameter_count, parameter_bytes;
    struct wire_parameter *parameter;
    struct replay_pace pace;
};

/* A module or a library. */
struct code_owner {
    uint64_t handle;
    void *real;
    bool is_library;
    uint8_t *image;             /* libraries: our copy, which the driver was promised to keep */
    void *wrapper;
    uint64_t module;            /* a library's module that the guest knows, 0 none */
    bool of_library;            /* is such a module: it ends with its library only */
    struct code_list functions; /* handles */
};

struct code_graph {
    uint64_t handle, parent;
    struct graph_memory *memory; /* NULL: it has no memory nodes */
    bool captured_into; /* by cuStreamBeginCaptureToGraph: a spoilt capture leaves it to the guest */
    struct code_list nodes, children;
};

struct code_link;
struct code_host_node; /* a host function inside a graph */

struct replay_code {
    struct code_map blobs;     /* number -> code_blob */
    struct code_map functions; /* handle -> code_function */
    struct code_map kernels;   /* real pointer -> code_function, kernels only */
    struct code_map owners;    /* handle -> code_owner */
    struct code_map graphs;    /* handle -> code_graph */
    struct code_map nodes;     /* handle -> code_graph it belongs to */
    struct code_map links;     /* handle -> code_link */
    struct code_map host_nodes; /* address -> code_host_node */
    struct code_map host_pairs; /* function and user, mixed -> the same, a list */
    struct code_map captures;  /* stream that began one -> the driver's pointer to the graph that it captures into */
    struct replay_graph_memory *graph_memory; /* NULL: there has been no memory node yet */
    struct code_map textures, surfaces; /* context and value -> nothing but that they are the session's (texture.c) */
    uint64_t blob_bytes, next_blob;
    unsigned loads;
};
struct replay_code *code_of(struct vgpu_replay *replay); /* NULL when out of memory */
/* Frees what is kept here; the driver's objects end with the process. For tests and the end of a worker. */
void replay_code_close(struct vgpu_replay *replay);

/* ---- blobs (blob.c) ---- */

/* A blob the guest has written completely, and takes it out of the session: the caller frees bytes. NULL: no such. */
uint8_t *code_blob_take(struct vgpu_replay *replay, uint64_t number, uint64_t *size);
/* A blob for the guest to read and free. 0 when it cannot be kept. */
uint64_t code_blob_make(struct vgpu_replay *replay, const void *bytes, uint64_t size);

/* ---- JIT options (jit_options.c) ---- */

struct code_jit {
    unsigned count;
    int option[VGPU_OPTION_LIMIT + 8];
    void *value[VGPU_OPTION_LIMIT + 8];
    char *information, *error; /* log buffers, or NULL */
    unsigned information_size, error_size, wall_time, threads; /* index of the value + 1, 0 absent */
    uint32_t information_capacity, error_capacity;
};
CUresult code_jit_read(struct code_jit *jit, const void *payload, uint32_t length, uint64_t count);
void code_jit_answer(struct vgpu_replay *replay, const struct code_jit *jit, struct vgpu_result *result, uint8_t *reply);
void code_jit_release(struct code_jit *jit);

/* ---- modules and functions (module.c, function.c) ---- */

struct code_owner *code_owner_of(struct vgpu_replay *replay, uint64_t handle);
struct code_function *code_function_of(struct vgpu_replay *replay, uint64_t handle);
/* The function behind a driver's pointer, known or made known as one of `owner`. */
struct code_function *code_function_intern(struct vgpu_replay *replay, void *real, bool is_kernel, struct code_owner *owner);
void code_function_describe(struct vgpu_replay *replay, struct code_function *function);
void code_function_drop(struct vgpu_replay *replay, uint64_t handle);
/* A function the driver names that we have not met: a library kernel's. NULL: nobody's. */
struct code_function *code_function_search(struct vgpu_replay *replay, void *real);
/* Fills the reply of a look-up: description, then as many parameters as fit. */
void code_function_answer(struct vgpu_replay *replay, struct code_function *function, struct vgpu_result *result, uint8_t *reply);
/* A NUL-terminated copy of a name in a payload; free() it. */
char *code_name(const void *payload, uint32_t length);
/* Answers with text that may be longer than a slot. */
CUresult code_text_answer(struct vgpu_replay *replay, const char *text, struct vgpu_result *result, uint8_t *reply);

/* ---- launches (launch.c) ---- */

/* Copies and checks launch attributes; handles become the driver's. */
CUresult code_launch_attributes(struct vgpu_replay *replay, const uint8_t *wire, uint32_t count, CUlaunchAttribute *out);
/* A stream for a question: 0 the legacy one. Does not mark it dirty. */
bool code_stream(struct vgpu_replay *replay, uint64_t id, void **real);

/* ---- graphs (graph.c) ---- */

struct code_graph *code_graph_of(struct vgpu_replay *replay, uint64_t handle, void **real);
struct code_graph *code_graph_of_node(struct vgpu_replay *replay, uint64_t handle, void **real);
uint64_t code_graph_intern(struct vgpu_replay *replay, void *real, uint64_t parent);
uint64_t code_node_intern(struct vgpu_replay *replay, void *real, struct code_graph *graph);
void code_graph_forget(struct vgpu_replay *replay, uint64_t handle);
/* The stream's capture is over and has left no graph: what was told of it is forgotten. The handle, or 0. */
uint64_t code_capture_lost(struct vgpu_replay *replay, uint64_t stream);
void code_captures_check(struct vgpu_replay *replay); /* streams have ended, maybe while they captured */
/* Reads count node handles, and edge data if there are, from the payload; free() both. *used: bytes read. */
CUresult code_node_list(struct vgpu_replay *replay, const uint8_t *payload, uint32_t length, uint64_t count, bool has_edges,
                        void ***nodes, uint64_t **edges, uint32_t *used);
void code_links_close(struct vgpu_replay *replay);

#endif
