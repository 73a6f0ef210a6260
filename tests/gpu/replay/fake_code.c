/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fake_code.c - the fake driver with code: modules, libraries, kernels, graphs, links. Every pointer it is given must be
 * one it has handed out and not taken back, or it aborts: a handle that got past the replay's tables is a crash here.
 * An image must still hold the bytes it was loaded with when a library's kernel is looked up.
 *
 * Names: "k<N>" is a kernel of N parameters of 4 bytes; "unloadable" has no code for this device; "long<N>" has a name of
 * N letters; anything else is not found. An image that begins with "fail" does not compile and leaves a log of 100
 * letters times the digit that follows.
 *
 *   cuCtxGetLimit(1100)  launches so far        cuCtxGetLimit(1103)  modules and libraries alive
 *   cuCtxGetLimit(1101)  sum of the bytes of the last launch's parameters
 *   cuCtxGetLimit(1102)  their number           cuCtxGetLimit(1104)  bytes of the last image
 *                                               cuCtxGetLimit(1105)  instances of graphs alive
 *   cuCtxGetLimit(1106)  different pointers that host nodes were given
 */
#define cuCtxGetLimit plain_get_limit
#include "fake_driver.c"
#undef cuCtxGetLimit

#include <stdio.h>

#ifndef other_limit /* what a file that includes this one answers */
#define other_limit plain_get_limit
#endif

enum kind { MODULE = 1, LIBRARY, KERNEL, FUNCTION, GRAPH, NODE, EXEC, LINK, KINDS };
struct object {
    enum kind kind;
    struct object *owner, *next, *function, *child;
    char *name;
    const uint8_t *image;
    uint64_t hash;
    int parameters, type, shared;
    uint32_t values[64];
};
static struct object *live;
static uint64_t launches, sum, count, image_bytes;

static struct object *make(enum kind kind, struct object *owner)
{
    struct object *o = calloc(1, sizeof *o);
    *o = (struct object){.kind = kind, .owner = owner, .next = live};
    live = o;
    return o;
}

static struct object *need(void *pointer, enum kind kind)
{
    for (struct object *o = live; o != NULL; o = o->next)
        if (o == pointer && o->kind == kind) return o;
    fprintf(stderr, "fake driver: %p is no object of kind %d\n", pointer, kind);
    abort();
}

static struct object *callable(void *pointer)
{
    for (struct object *o = live; o != NULL; o = o->next)
        if (o == pointer && (o->kind == KERNEL || o->kind == FUNCTION)) return o;
    return need(pointer, KERNEL);
}

/* With all that belongs to it. */
static void destroy(struct object *gone)
{
    for (struct object *o = live; o != NULL;) {
        if (o->owner == gone) {
            destroy(o);
            o = live;
        } else {
            o = o->next;
        }
    }
    for (struct object **at = &live; *at != NULL; at = &(*at)->next)
        if (*at == gone) {
            *at = gone->next;
            break;
        }
    free(gone->name);
    memset(gone, 0xdd, sizeof *gone);
    free(gone);
}

static uint64_t fnv(const uint8_t *bytes)
{
    uint64_t hash = 14695981039346656037ull;
    for (unsigned i = 0; i == 0 || bytes[i - 1] != 0; i++) hash = (hash ^ bytes[i]) * 1099511628211ull;
    return hash;
}

static int compile(const uint8_t *image, int options, const int *option, void **value)
{
    image_bytes = strlen((const char *)image) + 1;
    const int failed = strncmp((const char *)image, "fail", 4) == 0;
    for (int i = 0; i < options; i++) {
        if (option[i] == 2) {
            const float milliseconds = 1.5f;
            memcpy(&value[i], &milliseconds, sizeof milliseconds);
        }
        if (option[i] != 5 && option[i] != 3) continue;
        const size_t room = (size_t)value[i + 1], wanted = failed ? 100 * (size_t)(image[4] - '0') : 0;
        const size_t length = wanted < room - 1 ? wanted : room - 1;
        memset(value[i], option[i] == 5 ? 'e' : 'i', length);
        ((char *)value[i])[length] = 0;
    }
    return failed ? 218 : 0;
}

EXPORT int cuModuleLoadDataEx(void **module, const void *image, unsigned n, int *option, void **value)
{
    const int status = compile(image, (int)n, option, value);
    if (status == 0) *module = make(MODULE, NULL);
    return status;
}
EXPORT int cuLibraryLoadData(void **library, const void *image, int *option, void **value, unsigned n, const int *lo, void **lv, unsigned ln)
{
    if (ln != 1 || lo[0] != 1 || lv[0] != (void *)1) abort();
    const int status = compile(image, (int)n, option, value);
    if (status != 0) return status;
    struct object *o = make(LIBRARY, NULL);
    o->image = image;
    o->hash = fnv(image);
    *library = o;
    return 0;
}
EXPORT int cuModuleUnload(void *module) { destroy(need(module, MODULE)); return 0; }
EXPORT int cuLibraryUnload(void *library) { destroy(need(library, LIBRARY)); return 0; }

static int get(void **out, struct object *owner, enum kind kind, const char *name)
{
    for (struct object *o = live; o != NULL; o = o->next)
        if (o->owner == owner && o->kind == kind && strcmp(o->name, name) == 0) {
            *out = o;
            return 0;
        }
    int parameters = 0, used = 0;
    if (sscanf(name, "k%d%n", &parameters, &used) != 1 || name[used] != 0 || parameters < 0) {
        if (strcmp(name, "unloadable") != 0 && strncmp(name, "long", 4) != 0) return 500;
        parameters = 0;
    }
    struct object *o = make(kind, owner);
    o->name = strdup(name);
    if (strncmp(name, "long", 4) == 0) {
        free(o->name);
        o->name = calloc(1, (size_t)atoi(name + 4) + 1);
        memset(o->name, 'n', (size_t)atoi(name + 4));
    }
    o->parameters = parameters;
    *out = o;
    return 0;
}
EXPORT int cuModuleGetFunction(void **f, void *module, const char *name) { return get(f, need(module, MODULE), FUNCTION, name); }
EXPORT int cuLibraryGetKernel(void **k, void *library, const char *name)
{
    struct object *o = need(library, LIBRARY);
    if (fnv(o->image) != o->hash) abort(); /* the copy was not kept */
    return get(k, o, KERNEL, name);
}
EXPORT int cuKernelGetFunction(void **f, void *kernel)
{
    struct object *k = need(kernel, KERNEL);
    if (k->function == NULL) {
        k->function = make(FUNCTION, k->owner);
        k->function->name = strdup(k->name);
        k->function->parameters = k->parameters;
    }
    *f = k->function;
    return 0;
}
EXPORT int cuLibraryGetKernelCount(unsigned *n, void *library) { need(library, LIBRARY); *n = 3; return 0; }
EXPORT int cuLibraryEnumerateKernels(void **out, unsigned n, void *library)
{
    char name[16];
    struct object *o = need(library, LIBRARY);
    for (unsigned i = 0; i < n && i < 3; i++) {
        snprintf(name, sizeof name, "k%u", i);
        get(&out[i], o, KERNEL, name);
    }
    return 0;
}
EXPORT int cuLibraryGetModule(void **m, void *library)
{
    struct object *o = need(library, LIBRARY);
    if (o->child == NULL) o->child = make(MODULE, o);
    *m = o->child;
    return 0;
}
EXPORT int cuLibraryGetGlobal(uint64_t *address, size_t *size, void *library, const char *name)
{
    need(library, LIBRARY);
    *address = 0x5000;
    *size = strlen(name);
    return name[0] == 'v' ? 0 : 500;
}
static int parameter(struct object *o, size_t i, size_t *offset, size_t *size)
{
    if (i >= (size_t)o->parameters) return 1;
    *offset = 4 * i;
    *size = 4;
    return 0;
}
EXPORT int cuKernelGetParamInfo(void *k, size_t i, size_t *offset, size_t *size) { return parameter(need(k, KERNEL), i, offset, size); }
EXPORT int cuFuncGetParamInfo(void *f, size_t i, size_t *offset, size_t *size) { return parameter(need(f, FUNCTION), i, offset, size); }
static int attribute(int *value, unsigned a, struct object *o)
{
    if (strcmp(o->name, "unloadable") == 0) return 209;
    *value = a == 0 ? 1024 : a == 8 ? o->shared : (int)a;
    return a < 16 ? 0 : 1;
}
EXPORT int cuKernelGetAttribute(int *value, unsigned a, void *k, int d) { (void)d; return attribute(value, a, need(k, KERNEL)); }
EXPORT int cuFuncGetAttribute(int *value, unsigned a, void *f) { return attribute(value, a, need(f, FUNCTION)); }
EXPORT int cuKernelSetAttribute(unsigned a, int value, void *k, int d) { (void)d; need(k, KERNEL)->shared = a == 8 ? value : 0; return 0; }
EXPORT int cuFuncSetAttribute(void *f, unsigned a, int value) { need(f, FUNCTION)->shared = a == 8 ? value : 0; return 0; }
EXPORT int cuKernelGetName(const char **name, void *k) { *name = need(k, KERNEL)->name; return 0; }
EXPORT int cuFuncGetName(const char **name, void *f) { *name = need(f, FUNCTION)->name; return 0; }
EXPORT int cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, void *f, int size, size_t shared, unsigned flags)
{
    callable(f);
    (void)flags;
    *blocks = size > 0 ? 2048 / size - (int)(shared >> 16) : 0;
    return size > 0 ? 0 : 1;
}
EXPORT int cuOccupancyMaxActiveClusters(int *clusters, void *f, const void *config) { callable(f); *clusters = *(const int *)config; return 0; }

static int take(struct object *f, void **extra)
{
    count = sum = 0;
    if (extra == NULL) return f->parameters == 0 ? 0 : 1;
    const uint8_t *bytes = extra[1];
    count = *(size_t *)extra[3];
    if (count < 4 * (size_t)f->parameters) return 1;
    for (uint64_t i = 0; i < count; i++) sum += bytes[i];
    return 0;
}
EXPORT int cuLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void *stream, void **p, void **extra)
{
    (void)gx, (void)gy, (void)gz, (void)bx, (void)by, (void)bz, (void)shared, (void)stream;
    if (p != NULL) abort();
    launches++;
    return take(callable(f), extra);
}
struct configuration { unsigned grid[3], block[3], shared; void *stream; struct { unsigned id, pad; uint64_t value[8]; } *attribute; unsigned count; };
EXPORT int cuLaunchKernelEx(const struct configuration *config, void *f, void **p, void **extra)
{
    if (p != NULL || config->count > 33) abort();
    for (unsigned i = 0; i < config->count; i++)
        if ((config->attribute[i].id == 7 || config->attribute[i].id == 12) && config->attribute[i].value[0] < 0x1000) abort();
    launches++;
    return take(callable(f), extra);
}

EXPORT int cuGraphCreate(void **graph, unsigned flags) { *graph = make(GRAPH, NULL); return flags == 0 ? 0 : 1; }
EXPORT int cuGraphDestroy(void *graph) { destroy(need(graph, GRAPH)); return 0; }
EXPORT int cuGraphClone(void **out, void *graph) { need(graph, GRAPH); *out = make(GRAPH, NULL); return 0; }
static int add(void **node, void *graph, void **dependency, size_t n, int type)
{
    for (size_t i = 0; i < n; i++) need(dependency[i], NODE);
    struct object *o = make(NODE, need(graph, GRAPH));
    o->type = type;
    *node = o;
    return 0;
}
EXPORT int cuGraphAddEmptyNode(void **node, void *graph, void **dependency, size_t n) { return add(node, graph, dependency, n, 5); }
struct kernel_node { void *function; unsigned size[7]; void **parameters, **extra; void *kernel, *context; };
EXPORT int cuGraphAddKernelNode_v2(void **node, void *graph, void **dependency, size_t n, const struct kernel_node *p)
{
    struct object *f = p->function != NULL ? need(p->function, FUNCTION) : need(p->kernel, KERNEL);
    const int status = take(f, p->extra);
    if (status != 0) return status;
    add(node, graph, dependency, n, 0);
    struct object *o = *node;
    o->function = f;
    if (p->extra != NULL && count <= sizeof o->values) memcpy(o->values, p->extra[1], count);
    return 0;
}
EXPORT int cuGraphKernelNodeGetParams_v2(void *node, struct kernel_node *p)
{
    static void *pointer[64];
    struct object *o = need(node, NODE);
    if (o->type != 0) return 1;
    for (unsigned i = 0; i < 64; i++) pointer[i] = &o->values[i];
    *p = (struct kernel_node){.size = {1, 2, 3, 4, 5, 6, 7}, .parameters = pointer, .context = (void *)0x1000};
    *(o->function->kind == KERNEL ? &p->kernel : &p->function) = o->function;
    return 0;
}
EXPORT int cuGraphAddChildGraphNode(void **node, void *graph, void **dependency, size_t n, void *child)
{
    need(child, GRAPH);
    add(node, graph, dependency, n, 4);
    ((struct object *)*node)->child = make(GRAPH, *node);
    return 0;
}
EXPORT int cuGraphChildGraphNodeGetGraph(void *node, void **graph)
{
    *graph = need(node, NODE)->child;
    return *graph == NULL;
}
EXPORT int cuGraphAddMemsetNode(void **node, void *graph, void **dependency, size_t n, const void *p, void *context)
{
    (void)p;
    if (context != NULL && context != (void *)0x1000) abort();
    return add(node, graph, dependency, n, 2);
}
static const void *host_users[64];
EXPORT int cuGraphHostNodeSetParams(void *node, void *const p[2])
{
    need(node, NODE);
    for (int i = 0; i < 64 && p[0] != NULL; i++)
        if (host_users[i] == NULL || host_users[i] == p[1]) {
            host_users[i] = p[1];
            break;
        }
    return 0;
}
EXPORT int cuGraphAddHostNode(void **node, void *graph, void **dependency, size_t n, void *const p[2])
{
    return add(node, graph, dependency, n, 3) != 0 ? 1 : cuGraphHostNodeSetParams(*node, p);
}
struct copy { size_t a[4]; unsigned from_type; const uint8_t *from; uint64_t from_device; void *x, *y; size_t b[6]; unsigned to_type; uint8_t *to; };
EXPORT int cuGraphAddMemcpyNode(void **node, void *graph, void **dependency, size_t n, const struct copy *p, void *context)
{
    (void)context;
    /* What it names of host memory must be there to be read. */
    if (p->from_type == 1) sum = p->from[0];
    if (p->to_type == 1) sum = p->to[0];
    return add(node, graph, dependency, n, 1);
}
EXPORT int cuGraphNodeGetType(void *node, unsigned *type) { *type = (unsigned)need(node, NODE)->type; return 0; }
EXPORT int cuGraphDestroyNode(void *node) { destroy(need(node, NODE)); return 0; }
EXPORT int cuGraphGetNodes(void *graph, void **out, size_t *n)
{
    size_t found = 0;
    need(graph, GRAPH);
    for (struct object *o = live; o != NULL; o = o->next)
        if (o->kind == NODE && o->owner == graph) {
            if (out != NULL && found < *n) out[found] = o;
            found++;
        }
    *n = found;
    return 0;
}
EXPORT int cuGraphAddDependencies_v2(void *graph, void **from, void **to, const void *edges, size_t n)
{
    (void)edges;
    need(graph, GRAPH);
    for (size_t i = 0; i < n; i++) need(from[i], NODE), need(to[i], NODE);
    return 0;
}
EXPORT int cuGraphInstantiateWithParams(void **exec, void *graph, void *p) { (void)p; need(graph, GRAPH); *exec = make(EXEC, NULL); return 0; }
EXPORT int cuGraphLaunch(void *exec, void *stream) { (void)stream; need(exec, EXEC); launches++; return 0; }
EXPORT int cuGraphExecDestroy(void *exec) { destroy(need(exec, EXEC)); return 0; }

static int link_options;
static const int *link_option;
static void **link_value;
EXPORT int cuLinkCreate_v2(unsigned n, int *option, void **value, void **state)
{
    *state = make(LINK, NULL);
    link_options = (int)n;
    link_option = option;
    link_value = value;
    return 0;
}
EXPORT int cuLinkAddData_v2(void *state, unsigned type, void *data, size_t size, const char *name, unsigned n, int *option, void **value)
{
    (void)type, (void)size, (void)name, (void)n, (void)option, (void)value;
    need(state, LINK);
    return compile(data, link_options, link_option, link_value); /* the logs of the link, which must still be there */
}
EXPORT int cuLinkComplete(void *state, void **cubin, size_t *size)
{
    static uint8_t bytes[10000];
    need(state, LINK);
    for (unsigned i = 0; i < sizeof bytes; i++) bytes[i] = (uint8_t)(i * 7);
    *cubin = bytes;
    *size = sizeof bytes;
    return 0;
}
EXPORT int cuLinkDestroy(void *state) { destroy(need(state, LINK)); return 0; }

EXPORT int cuCtxGetLimit(size_t *value, unsigned limit)
{
    switch (limit) {
    case 1100: *value = launches; return 0;
    case 1101: *value = sum; return 0;
    case 1102: *value = count; return 0;
    case 1103:
        *value = 0;
        for (const struct object *o = live; o != NULL; o = o->next) *value += o->kind == MODULE || o->kind == LIBRARY;
        return 0;
    case 1104: *value = image_bytes; return 0;
    case 1106:
        for (*value = 0; *value < 64 && host_users[*value] != NULL; ++*value) {}
        return 0;
    case 1105:
        *value = 0;
        for (struct object *o = live; o != NULL; o = o->next) *value += o->kind == EXEC;
        return 0;
    default: return other_limit(value, limit);
    }
}
