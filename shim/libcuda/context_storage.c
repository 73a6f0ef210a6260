/* SPDX-License-Identifier: Apache-2.0 */
/* Context-local storage: a fixed hash table of chains under one mutex.  See context_storage.h. */
#include "context_storage.h"

#include <pthread.h>
#include <stdlib.h>

/* A process has about ten runtime copies and as many contexts as devices, so chains stay short. */
enum { BUCKETS = 256 };

struct entry {
    struct entry *next;
    CUcontext context;
    void *key;
    void *value;
    vgpu_storage_destructor destructor; /* may be NULL */
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct entry *buckets[BUCKETS]; /* guarded by lock */
static uint32_t numbers_given;         /* guarded by lock */
static char number_key;                /* its address is the key of a context's number */

static unsigned bucket_of(CUcontext context, const void *key)
{
    uint64_t mixed = (uint64_t)(uintptr_t)context * 0x9e3779b97f4a7c15u ^ (uint64_t)(uintptr_t)key;
    return (unsigned)((mixed * 0xff51afd7ed558ccdu) >> 56);
}

/* The link that points at the entry, or at the NULL that ends its chain.  Lock held. */
static struct entry **find(CUcontext context, const void *key)
{
    struct entry **link = &buckets[bucket_of(context, key)];
    while (*link != NULL && ((*link)->context != context || (*link)->key != key))
        link = &(*link)->next;
    return link;
}

static CUresult resolve(CUcontext *context)
{
    if (shim_is_torn_down())
        return CUDA_ERROR_DEINITIALIZED;
    if (*context == NULL || (uintptr_t)*context == UINTPTR_MAX)
        *context = shim_current_context();
    return *context != NULL ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

CUresult vgpu_context_storage_put(CUcontext context, void *key, void *value, vgpu_storage_destructor destructor)
{
    CUresult result = resolve(&context);
    if (result != CUDA_SUCCESS)
        return result;
    pthread_mutex_lock(&lock);
    struct entry **link = find(context, key);
    if (*link == NULL) {
        struct entry *fresh = calloc(1, sizeof *fresh);
        if (fresh == NULL) {
            pthread_mutex_unlock(&lock);
            return CUDA_ERROR_OUT_OF_MEMORY;
        }
        fresh->context = context;
        fresh->key = key;
        *link = fresh;
    }
    (*link)->value = value;
    (*link)->destructor = destructor;
    pthread_mutex_unlock(&lock);
    return CUDA_SUCCESS;
}

CUresult vgpu_context_storage_delete(CUcontext context, void *key)
{
    CUresult result = resolve(&context);
    if (result != CUDA_SUCCESS)
        return result;
    pthread_mutex_lock(&lock);
    struct entry **link = find(context, key);
    struct entry *found = *link;
    if (found != NULL)
        *link = found->next;
    pthread_mutex_unlock(&lock);
    if (found == NULL)
        return CUDA_ERROR_INVALID_HANDLE;
    free(found);
    return CUDA_SUCCESS;
}

CUresult vgpu_context_storage_get(void **value, CUcontext context, void *key)
{
    if (value == NULL)
        return CUDA_ERROR_INVALID_VALUE;
    CUresult result = resolve(&context);
    if (result != CUDA_SUCCESS)
        return result;
    pthread_mutex_lock(&lock);
    struct entry *found = *find(context, key);
    if (found != NULL)
        *value = found->value;
    else
        result = CUDA_ERROR_INVALID_HANDLE;
    pthread_mutex_unlock(&lock);
    return result;
}

CUresult vgpu_context_storage_number(CUcontext context, uint32_t *number)
{
    if (number == NULL)
        return CUDA_ERROR_INVALID_VALUE;
    CUresult result = resolve(&context);
    if (result != CUDA_SUCCESS)
        return result;
    pthread_mutex_lock(&lock);
    struct entry **link = find(context, &number_key);
    if (*link == NULL) {
        struct entry *fresh = calloc(1, sizeof *fresh);
        if (fresh == NULL) {
            pthread_mutex_unlock(&lock);
            return CUDA_ERROR_OUT_OF_MEMORY;
        }
        fresh->context = context;
        fresh->key = &number_key;
        fresh->value = (void *)(uintptr_t)++numbers_given;
        *link = fresh;
    }
    *number = (uint32_t)(uintptr_t)(*link)->value;
    pthread_mutex_unlock(&lock);
    return CUDA_SUCCESS;
}

void vgpu_context_storage_drop(CUcontext context)
{
    if (context == NULL)
        return;
    struct entry *dropped = NULL;
    pthread_mutex_lock(&lock);
    for (unsigned i = 0; i < BUCKETS; i++) {
        struct entry **link = &buckets[i];
        while (*link != NULL) {
            struct entry *here = *link;
            if (here->context == context) {
                *link = here->next;
                here->next = dropped;
                dropped = here;
            } else {
                link = &here->next;
            }
        }
    }
    pthread_mutex_unlock(&lock);
    /* The entries are ours alone now: a racing delete misses, so nobody frees a value twice.  What another thread puts
     * from here on belongs to the context's next life (a primary context keeps its handle across a reset). */
    while (dropped != NULL) {
        struct entry *here = dropped;
        dropped = here->next;
        if (here->destructor != NULL)
            here->destructor(here->context, here->key, here->value);
        free(here);
    }
}

void vgpu_context_storage_fork_child(void)
{
    /* Another thread of the parent may have held the lock in the middle of a change, so nothing is walked: the parent's
     * contexts do not exist here, and their entries are left behind. */
    pthread_mutex_init(&lock, NULL);
    for (unsigned i = 0; i < BUCKETS; i++)
        buckets[i] = NULL;
}
