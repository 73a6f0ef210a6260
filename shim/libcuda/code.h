/* SPDX-License-Identifier: Apache-2.0 */
/*
 * code.h - what the files about device code share: images, modules and libraries, functions, launches, graphs, capture
 * and host functions. Not for other subjects; what those may use stands in shim.h.
 *
 * Who owns what: a module or library (shim_code) owns the functions looked up in it; unloading frees them. One mutex
 * guards all look-ups that change something; it is never held across a round trip. A launch takes no lock.
 */
#ifndef VGPU_SHIM_CODE_H
#define VGPU_SHIM_CODE_H

#include "../../transport/code_wire.h"
#include "_generated_prototypes.h"
#include "private_hooks.h"
#include "shim.h"

#define CODE_HANDLE(kind, handle) ((kind)(uintptr_t)(handle))

/* ---- images (image.c) ---- */

/* A module image as parts of guest memory; nothing is copied. */
struct shim_image {
    uint32_t part_count, is_wrapper;
    const void **part; /* first_part while there is only one */
    uint64_t *length;
    const void *first_part;
    uint64_t first_length;
};
/* Finds out what a bare pointer points at. CUDA_ERROR_INVALID_IMAGE for what is no image. */
CUresult shim_image_describe(const void *image, struct shim_image *out);
void shim_image_release(struct shim_image *image);
/* Reads a whole file. CUDA_ERROR_FILE_NOT_FOUND, or CUDA_ERROR_OUT_OF_MEMORY. NUL-terminated; free() it. */
CUresult shim_image_read_file(const char *name, void **bytes, size_t *length);
bool shim_image_check(const void *bytes, size_t length); /* is the file whole, by its own format? */

/* ---- blobs (blob.c) ---- */

/* Sends bytes to the worker under a number of the guest's, in as many records as it takes. */
struct shim_blob { uint64_t id, total, written; };
void shim_blob_begin(struct shim_blob *blob, uint64_t total);
CUresult shim_blob_append(struct shim_blob *blob, const void *bytes, uint64_t length);
/* Fetches length bytes of a worker's blob. */
CUresult shim_blob_read(uint64_t id, void *out, uint64_t length);
CUresult shim_blob_free(uint64_t id);

/* ---- JIT options (jit_options.c) ---- */

struct shim_jit {
    unsigned count;                                /* of wire */
    struct wire_option wire[VGPU_OPTION_LIMIT];
    char *information, *error;                     /* the caller's log buffers, or NULL */
    uint32_t information_capacity, error_capacity;
    void **information_size, **error_size, **wall_time, **threads; /* where results go: the caller's value slots */
};
CUresult shim_jit_read(struct shim_jit *jit, unsigned count, const int *options, void **values);
/* Puts what the worker answered into the caller's buffers and slots. */
void shim_jit_finish(const struct shim_jit *jit, const uint8_t *reply, uint32_t length);

/* ---- modules and libraries (module.c, library.c), functions (function.c) ---- */

struct shim_occupancy;
struct shim_code;

#define SHIM_ANY_BLOCK UINT64_MAX
struct shim_function {
    uint64_t handle;
    struct shim_code *owner;
    struct shim_function *next;       /* in the owner's bucket */
    _Atomic(struct shim_function *) peer; /* a kernel's function, a function's kernel */
    char *_Atomic name;
    /* Set once, by release store of described: 0 unknown, 1 known. */
    _Atomic uint32_t described;
    CUresult status;                  /* of loading it; a launch answers this */
    uint32_t parameter_count, parameter_bytes;
    struct wire_parameter *parameter;
    _Atomic int32_t attribute[VGPU_FUNCTION_ATTRIBUTES];
    _Atomic uint32_t attribute_status[VGPU_FUNCTION_ATTRIBUTES]; /* CUresult, or SHIM_ATTRIBUTE_UNKNOWN */
    struct shim_occupancy *occupancy; /* guarded by shim_code_mutex */
    /* The block shape the driver has taken (launch.c), 0 none yet; SHIM_ANY_BLOCK once it has taken two. */
    _Atomic uint64_t block;
};
#define SHIM_ATTRIBUTE_UNKNOWN 0xffffffffu

#define SHIM_CODE_BUCKETS 64
struct shim_global { uint64_t base; struct shim_global *next; };
struct shim_code {
    uint64_t handle;
    uint64_t context;               /* modules: where they live; 0 for libraries */
    struct shim_code *parent;       /* the library this module belongs to */
    _Atomic(struct shim_code *) module; /* a library's module in the current context */
    struct shim_function *bucket[SHIM_CODE_BUCKETS];
    struct shim_global *global;     /* variables whose addresses were asked for */
};

extern pthread_mutex_t shim_code_mutex;

/* A module or library by handle; NULL: not valid. */
struct shim_code *shim_code_of(uint64_t handle);
struct shim_code *shim_code_new(uint64_t handle, uint64_t context);
void shim_code_unload(struct shim_code *code);
/* Address and size of a variable; call: the table's id of the entry that asks. Makes the range known to copies. */
CUresult shim_code_global(struct shim_code *code, unsigned call, const char *name, uint64_t *address, uint64_t *size);
/* Loads an image: a module into the current context, or a library. */
CUresult shim_code_load(bool is_library, const struct shim_image *image, struct shim_jit *jit, uint64_t *handle);

/* The function behind a handle, known to the guest or made known now; NULL: not valid. Not described yet. */
static inline struct shim_function *shim_function_of(const void *handle)
{
    struct shim_object *object = shim_object(vgpu_handle_kind((uint64_t)(uintptr_t)handle), (uint64_t)(uintptr_t)handle);
    const unsigned kind = vgpu_handle_kind((uint64_t)(uintptr_t)handle);
    if (object == NULL || (kind != VGPU_KIND_FUNCTION && kind != VGPU_KIND_KERNEL)) return NULL;
    return object->data;
}
/* Asks the worker what is not known yet: parameter table, limits. CUDA_SUCCESS also if the function cannot be loaded. */
CUresult shim_function_describe_slow(struct shim_function *function);
static inline CUresult shim_function_describe(struct shim_function *function)
{
    if (__builtin_expect(atomic_load_explicit(&function->described, memory_order_acquire) != 0, 1)) return CUDA_SUCCESS;
    return shim_function_describe_slow(function);
}
/* The guest's object for a handle the worker named; reply: a wire_function, or NULL. */
struct shim_function *shim_function_adopt(uint64_t handle, struct shim_code *owner, const char *name, const uint8_t *reply,
                                          uint32_t length);
CUresult shim_function_get(struct shim_code *owner, const char *name, struct shim_function **out);
CUresult shim_function_attribute(struct shim_function *function, unsigned attribute, int *value);
CUresult shim_function_set_attribute(struct shim_function *function, unsigned attribute, int value);
CUresult shim_function_parameter(struct shim_function *function, size_t index, size_t *offset, size_t *size);
CUresult shim_function_name(struct shim_function *function, unsigned call, const char **name);
CUresult shim_function_enumerate(struct shim_code *owner, unsigned call, void **out, uint32_t capacity);
void shim_function_forget_occupancy(struct shim_function *function);

/* ---- launches (launch.c) ---- */

/* Packs kernelParams or extra into one buffer. *packed is `space` if it fits there, else malloc'ed (free it). */
CUresult shim_pack_parameters(struct shim_function *function, void **parameters, void **extra, uint8_t *space, size_t capacity,
                              uint8_t **packed, uint32_t *length);
/* Copies launch attributes to the wire form; refuses those that cannot be carried. out: 72 bytes each. */
CUresult shim_launch_attributes(const CUlaunchAttribute *attributes, unsigned count, CUlaunchAttribute *out);

/* ---- graphs (graph.c, graph_node.c, graph_exec.c) ---- */

struct shim_reference;
struct shim_graph {
    uint64_t handle;
    uint64_t *node; /* handles adopted from the worker */
    size_t node_count, node_capacity;
    uint64_t *child;
    size_t child_count, child_capacity;
    uint64_t parent;
    struct shim_reference *reference; /* user objects */
    struct shim_memory *memory;       /* NULL: no memory nodes */
};
struct shim_node {
    uint64_t handle, graph;
    void *parameters; /* what Get functions handed out; freed with the node */
};
struct shim_exec {
    uint64_t handle;
    struct shim_reference *reference;
    struct shim_memory *memory; /* NULL: no memory nodes */
    _Atomic bool launched;
};
struct shim_graph *shim_graph_of(CUgraph graph);
struct shim_graph *shim_graph_adopt(uint64_t handle, uint64_t parent);
CUresult shim_node_adopt(uint64_t handle, uint64_t graph);
struct shim_node *shim_node_of(CUgraphNode node);
struct shim_exec *shim_exec_of(CUgraphExec exec);
CUresult shim_exec_adopt(uint64_t handle, struct shim_graph *graph);
/* A graph that the worker has forgotten: it was to come of a capture that failed. */
void shim_graph_lost(uint64_t handle);
/* Node list + optional edge data as payload; free() it. */
CUresult shim_node_list(const CUgraphNode *nodes, const void *edges, size_t count, uint8_t **payload, uint32_t *length);
/* Adds a node by that call; argument: the two of its own. */
CUresult shim_node_add(unsigned call, CUgraphNode *out, CUgraph hGraph, const CUgraphNode *dependencies, size_t count, const void *bytes,
                       uint32_t length, const uint64_t argument[2], uint64_t value[4]);

/* ---- memory nodes (graph_memory.c) ---- */

struct shim_memory; /* of a graph, or of an instance */
CUresult shim_memory_made(struct shim_graph *graph, uint64_t address, uint64_t size); /* by a node of the graph */
CUresult shim_memory_freed(struct shim_graph *graph, uint64_t address);
struct shim_memory *shim_memory_copy(const struct shim_graph *graph); /* for an instance */
void shim_memory_drop(struct shim_memory *memory);
void shim_memory_launched(struct shim_memory *memory);
bool shim_memory_free(uint64_t address); /* false: nothing is allocated there */
CUresult shim_memory_free_async(uint64_t address, uint64_t stream);

/* ---- host functions (host_function.c) ---- */

CUresult shim_callbacks_start(void); /* the callback thread, once */
CUresult shim_callbacks_for_graph(void);     /* the same, and from now on any launch of a graph may bring a function to run */
void shim_callbacks_graph_launched(void);
/* Runs destroy(user) on the callback thread once all work submitted so far in the current context is done. */
void shim_callbacks_defer(void (*destroy)(void *), void *user);

/* ---- user objects (user_object.c) ---- */

struct shim_reference *shim_references_copy(const struct shim_reference *from);
void shim_references_join(struct shim_reference **to, const struct shim_reference *from); /* adds copies */
/* Drops them all; deferred: only after the GPU has finished what was submitted. */
void shim_references_drop(struct shim_reference *reference, bool deferred);

#endif
