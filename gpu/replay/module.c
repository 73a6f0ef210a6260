/* SPDX-License-Identifier: Apache-2.0 */
/*
 * module.c - loading and unloading of modules and libraries, and what is looked up in them.
 *
 * An image is copied to private memory before the driver sees it: the driver parses what nobody can change any more, and
 * our own check of its length has looked at the same bytes. A library's copy is kept for the library's life, so the
 * driver need not make another (CU_LIBRARY_BINARY_IS_PRESERVED).
 */
#include "code.h"

#include "../../transport/image_length.h"

#define SWEEP_LOADS 256 /* forget what a context's end left behind, every so many loads */

struct code_owner *code_owner_of(struct vgpu_replay *replay, uint64_t handle)
{
    void *real;
    const unsigned kind = vgpu_handle_kind(handle);
    if ((kind != VGPU_KIND_MODULE && kind != VGPU_KIND_LIBRARY) || !replay_lookup(replay, kind, handle, &real)) return NULL;
    return replay->code == NULL ? NULL : code_map_get(&replay->code->owners, handle);
}

static void release_owner(struct code_owner *owner)
{
    if (owner == NULL) return;
    free(owner->functions.item);
    free(owner->wrapper);
    free(owner->image);
    free(owner);
}

/* Drops the records about an owner and all its functions, and their handles. */
static void forget_owner(struct vgpu_replay *replay, uint64_t handle)
{
    struct code_owner *owner = code_map_take(&replay->code->owners, handle);
    if (owner == NULL) return;
    if (owner->module != 0) forget_owner(replay, owner->module);
    for (size_t i = 0; i < owner->functions.count; i++) code_function_drop(replay, owner->functions.item[i]);
    replay_unbind(replay, owner->is_library ? VGPU_KIND_LIBRARY : VGPU_KIND_MODULE, handle);
    release_owner(owner);
}

/* Modules whose context has ended: their handles are gone, their records not yet. */
static void sweep(struct vgpu_replay *replay)
{
    struct code_map *owners = &replay->code->owners;
    struct code_list stale = {0};
    for (size_t i = 0; i < owners->capacity; i++) {
        const struct code_owner *owner = owners->slot[i].value;
        void *real;
        if (owners->slot[i].key == 0 || owner->is_library) continue;
        if (!replay_lookup(replay, VGPU_KIND_MODULE, owner->handle, &real) && !code_list_add(&stale, owner->handle)) break;
    }
    for (size_t i = 0; i < stale.count; i++) forget_owner(replay, stale.item[i]);
    free(stale.item);
}

static struct code_owner *make_owner(struct vgpu_replay *replay, void *real, bool is_library)
{
    struct replay_code *code = code_of(replay);
    struct code_owner *owner = code == NULL ? NULL : calloc(1, sizeof *owner);
    if (owner == NULL) return NULL;
    owner->real = real;
    owner->is_library = is_library;
    owner->handle = replay_intern(replay, is_library ? VGPU_KIND_LIBRARY : VGPU_KIND_MODULE, real);
    if (owner->handle == 0) {
        free(owner);
        return NULL;
    }
    /* A pointer that the driver has used before: the old record is of a module that went with its context. */
    release_owner(code_map_take(&code->owners, owner->handle));
    if (!code_map_put(&code->owners, owner->handle, owner)) {
        replay_unbind(replay, is_library ? VGPU_KIND_LIBRARY : VGPU_KIND_MODULE, owner->handle);
        free(owner);
        return NULL;
    }
    return owner;
}

struct wrapper { uint32_t magic, version; const void *data; const void *const *prelinked; };

/* What the driver is to be given for the bytes of a wire_image. *wrapper is allocated when it is a wrapper. */
static CUresult open_image(const uint8_t *bytes, uint64_t size, const void **image, void **wrapper)
{
    struct wire_image head;
    *wrapper = NULL;
    if (size < sizeof head) return CUDA_ERROR_INVALID_IMAGE;
    memcpy(&head, bytes, sizeof head);
    if (head.part_count == 0 || head.part_count > VGPU_IMAGE_PARTS || head.is_wrapper > 2) return CUDA_ERROR_INVALID_IMAGE;
    if (head.part_count > 1 && head.is_wrapper != 2) return CUDA_ERROR_INVALID_IMAGE;
    uint64_t at = vgpu_align16(sizeof head + 8ull * head.part_count);
    if (at > size) return CUDA_ERROR_INVALID_IMAGE;
    struct wrapper *built = NULL;
    const void **prelinked = NULL;
    if (head.is_wrapper != 0) {
        built = calloc(1, sizeof *built + 16 + (size_t)head.part_count * sizeof(void *));
        if (built == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
        prelinked = (const void **)(void *)((uint8_t *)built + vgpu_align16(sizeof *built));
        *built = (struct wrapper){.magic = VGPU_WRAPPER_MAGIC, .version = head.is_wrapper};
        if (head.is_wrapper == 2) built->prelinked = prelinked; /* an empty list, unless parts follow */
    }
    for (uint32_t i = 0; i < head.part_count; i++) {
        uint64_t length, proven;
        memcpy(&length, bytes + sizeof head + 8ull * i, sizeof length);
        if (length > size - at || vgpu_image_length(bytes + at, length, &proven) == VGPU_IMAGE_NONE) {
            free(built);
            return CUDA_ERROR_INVALID_IMAGE;
        }
        if (i == 0 && built != NULL)
            built->data = bytes + at;
        else if (i == 0)
            *image = bytes + at;
        else
            prelinked[i - 1] = bytes + at;
        at += vgpu_align16(length);
        if (at > size && i + 1 < head.part_count) {
            free(built);
            return CUDA_ERROR_INVALID_IMAGE;
        }
    }
    if (built != NULL) *image = built;
    *wrapper = built;
    return CUDA_SUCCESS;
}

/* arguments: is_library, blob or 0, bytes of the image, options; payload: options, then the image if there is no blob */
CUresult replay_wireModuleLoad(REPLAY_PARAMETERS)
{
    const bool is_library = call->argument[0] != 0;
    struct replay_code *code = code_of(replay);
    if (code == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    if (++code->loads % SWEEP_LOADS == 0) sweep(replay);
    struct code_jit jit;
    CUresult status = code_jit_read(&jit, payload, call->payload_length, call->argument[3]);
    if (status != CUDA_SUCCESS) return status;
    const uint32_t option_bytes = (uint32_t)(call->argument[3] * sizeof(struct wire_option));
    uint64_t size = call->payload_length - option_bytes;
    uint8_t *bytes;
    if (call->argument[1] != 0) {
        bytes = code_blob_take(replay, call->argument[1], &size);
        status = bytes == NULL ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS; /* it was refused when it was written */
    } else {
        bytes = malloc(size + 1);
        status = bytes == NULL ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
        if (bytes != NULL) memcpy(bytes, (const uint8_t *)payload + option_bytes, size);
    }
    const void *image = NULL;
    void *wrapper = NULL, *real = NULL;
    if (status == CUDA_SUCCESS) status = open_image(bytes, size, &image, &wrapper);
    struct wire_image head = {0};
    if (status == CUDA_SUCCESS) memcpy(&head, bytes, sizeof head);
    if (wrapper != NULL && !is_library && head.part_count == 1) {
        /* Measured: as a module the driver takes the fatbin alone; CUDA_ERROR_INVALID_IMAGE for one in its wrapper. */
        image = ((const struct wrapper *)wrapper)->data;
        free(wrapper);
        wrapper = NULL;
    }
    if (status == CUDA_SUCCESS) {
        int preserved = 1; /* CU_LIBRARY_BINARY_IS_PRESERVED */
        void *yes = (void *)1;
        status = is_library ? (CUresult)replay->driver.cuLibraryLoadData(&real, image, jit.option, jit.value, jit.count, &preserved, &yes, 1)
                            : (CUresult)replay->driver.cuModuleLoadDataEx(&real, image, jit.count, jit.option, jit.value);
        code_jit_answer(replay, &jit, result, reply);
    }
    code_jit_release(&jit);
    struct code_owner *owner = status == CUDA_SUCCESS ? make_owner(replay, real, is_library) : NULL;
    if (owner != NULL && is_library) {
        owner->image = bytes;
        owner->wrapper = wrapper;
    } else {
        if (status == CUDA_SUCCESS && owner == NULL) {
            (void)(is_library ? replay->driver.cuLibraryUnload(real) : replay->driver.cuModuleUnload(real));
            status = CUDA_ERROR_OUT_OF_MEMORY;
        }
        free(bytes);
        free(wrapper);
    }
    if (owner != NULL) result->value[0] = owner->handle;
    return status;
}

static CUresult unload(struct vgpu_replay *replay, uint64_t handle, unsigned kind)
{
    struct code_owner *owner = code_owner_of(replay, handle);
    if (owner == NULL || vgpu_handle_kind(handle) != kind) return CUDA_ERROR_INVALID_HANDLE;
    if (owner->of_library) return CUDA_ERROR_NOT_PERMITTED;
    const CUresult status =
        (CUresult)(owner->is_library ? replay->driver.cuLibraryUnload(owner->real) : replay->driver.cuModuleUnload(owner->real));
    forget_owner(replay, handle);
    return status;
}

CUresult replay_cuModuleUnload(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    return unload(replay, call->argument[0], VGPU_KIND_MODULE);
}

CUresult replay_cuLibraryUnload(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    return unload(replay, call->argument[0], VGPU_KIND_LIBRARY);
}

CUresult replay_cuLibraryGetModule(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    struct code_owner *library = code_owner_of(replay, call->argument[0]);
    if (library == NULL || !library->is_library) return CUDA_ERROR_INVALID_HANDLE;
    void *real = NULL;
    const CUresult status = (CUresult)replay->driver.cuLibraryGetModule(&real, library->real);
    if (status != CUDA_SUCCESS) return status;
    struct code_owner *module = library->module == 0 ? NULL : code_owner_of(replay, library->module);
    if (module == NULL || module->real != real) {
        if ((module = make_owner(replay, real, false)) == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
        module->of_library = true;
        library->module = module->handle;
    }
    result->value[0] = module->handle;
    return CUDA_SUCCESS;
}

char *code_name(const void *payload, uint32_t length)
{
    char *name = malloc((size_t)length + 1);
    if (name == NULL) return NULL;
    memcpy(name, payload, length);
    name[length] = 0;
    return name;
}

CUresult code_text_answer(struct vgpu_replay *replay, const char *text, struct vgpu_result *result, uint8_t *reply)
{
    const size_t length = text == NULL ? 0 : strlen(text);
    if (length <= VGPU_SLOT_PAYLOAD_LIMIT) {
        if (length != 0) memcpy(reply, text, length);
        result->payload_length = (uint16_t)length;
        return CUDA_SUCCESS;
    }
    result->value[0] = code_blob_make(replay, text, length);
    result->value[1] = length;
    return result->value[0] == 0 ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

CUresult replay_cuLibraryGetKernelCount(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    const struct code_owner *library = code_owner_of(replay, call->argument[0]);
    if (library == NULL || !library->is_library) return CUDA_ERROR_INVALID_HANDLE;
    unsigned count = 0;
    const CUresult status = (CUresult)replay->driver.cuLibraryGetKernelCount(&count, library->real);
    result->value[0] = count;
    return status;
}

static CUresult variable(struct vgpu_replay *replay, const struct vgpu_call *call, const void *payload, struct vgpu_result *result,
                         unsigned kind, int (*get)(void *, void *, void *, const char *))
{
    const struct code_owner *owner = code_owner_of(replay, call->argument[0]);
    if (owner == NULL || vgpu_handle_kind(owner->handle) != kind) return CUDA_ERROR_INVALID_HANDLE;
    char *name = code_name(payload, call->payload_length);
    if (name == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    unsigned long long address = 0;
    size_t size = 0;
    const CUresult status = (CUresult)get(&address, &size, owner->real, name);
    free(name);
    result->value[0] = address;
    result->value[1] = size;
    return status;
}

CUresult replay_cuModuleGetGlobal_v2(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    return variable(replay, call, payload, result, VGPU_KIND_MODULE, replay->driver.cuModuleGetGlobal_v2);
}

CUresult replay_cuLibraryGetGlobal(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    return variable(replay, call, payload, result, VGPU_KIND_LIBRARY, replay->driver.cuLibraryGetGlobal);
}

CUresult replay_cuLibraryGetManaged(REPLAY_PARAMETERS)
{
    REPLAY_UNUSED;
    return variable(replay, call, payload, result, VGPU_KIND_LIBRARY, replay->driver.cuLibraryGetManaged);
}
