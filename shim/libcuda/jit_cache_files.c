/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The JIT cache on disk.  See jit_cache_files.h.
 *
 * A file is a header (magic, data size, the entry's digest, the data's digest) and the data; its name is the entry's digest
 * in hex.  "Recently used" is the modification time, set at each hit: access times are off on most mounts.
 * The folder is measured at the first write, then once a minute, when it looks full, or both; other processes' files count.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* secure_getenv: a set-uid program must not follow the caller's paths */
#endif

#include "jit_cache_files.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum {
    NAME_SIZE = 2 * VGPU_SHA256_SIZE + 1,
    REMEASURE_SECONDS = 60,
    ABANDONED_SECONDS = 3600, /* a temporary file this old belongs to a process that died */
};

/* Ours alone, with the layout's version: another layout is another folder. */
#define FOLDER "vgpu-1"
#define TEMPORARY_PREFIX ".new-"

#define DEFAULT_LIMIT ((uint64_t)1 << 30)
#define LARGEST_LIMIT ((uint64_t)4 << 30)

struct header {
    char magic[8];
    uint64_t size;
    uint8_t digest[VGPU_SHA256_SIZE];
    uint8_t data_digest[VGPU_SHA256_SIZE];
};

static const char magic[8] = {'V', 'G', 'P', 'U', 'J', 'I', 'T', '1'};

static struct {
    bool enabled;
    uint64_t limit;
    char folder[PATH_MAX]; /* empty: no files */
} settings;                /* written once, under settings_once */
static pthread_once_t settings_once = PTHREAD_ONCE_INIT;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t measured_bytes; /* guarded by lock: the folder's size as far as we know */
static time_t measured_at;      /* guarded by lock: monotonic seconds, 0 for never */
static unsigned temporaries;    /* guarded by lock: makes names unique within the process */

static void read_settings(void)
{
    const char *disable = secure_getenv("CUDA_CACHE_DISABLE");
    settings.enabled = disable == NULL || strtol(disable, NULL, 10) == 0;

    settings.limit = DEFAULT_LIMIT;
    const char *text = secure_getenv("CUDA_CACHE_MAXSIZE");
    if (text != NULL && *text >= '0' && *text <= '9') {
        char *end = NULL;
        errno = 0;
        unsigned long long limit = strtoull(text, &end, 10);
        if (*end == '\0')
            settings.limit = errno == ERANGE || limit > LARGEST_LIMIT ? LARGEST_LIMIT : limit;
    }

    const char *path = secure_getenv("CUDA_CACHE_PATH");
    const char *home = secure_getenv("HOME");
    int length = 0;
    if (path != NULL && *path != '\0')
        length = snprintf(settings.folder, sizeof settings.folder, "%s/" FOLDER, path);
    else if (home != NULL && *home == '/')
        length = snprintf(settings.folder, sizeof settings.folder, "%s/.nv/ComputeCache/" FOLDER, home);
    if (length <= 0 || (size_t)length >= sizeof settings.folder)
        settings.folder[0] = '\0';
}

bool vgpu_jit_cache_enabled(void)
{
    pthread_once(&settings_once, read_settings);
    return settings.enabled;
}

uint64_t vgpu_jit_cache_limit(void)
{
    pthread_once(&settings_once, read_settings);
    return settings.limit;
}

/* Opens our folder, made on the way if asked; -1 when there is none to trust: what another user could write to would be
 * a way to put code into our kernels. */
static int open_folder(bool make)
{
    if (!vgpu_jit_cache_enabled() || settings.folder[0] == '\0')
        return -1;
    if (make) {
        char partial[PATH_MAX];
        for (size_t i = 1; settings.folder[i - 1] != '\0'; i++) {
            if (settings.folder[i] != '/' && settings.folder[i] != '\0')
                continue;
            memcpy(partial, settings.folder, i);
            partial[i] = '\0';
            if (mkdir(partial, S_IRWXU) != 0 && errno != EEXIST)
                return -1;
        }
    }
    int folder = open(settings.folder, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (folder < 0)
        return -1;
    struct stat facts;
    if (fstat(folder, &facts) != 0 || facts.st_uid != geteuid() || (facts.st_mode & (S_IWGRP | S_IWOTH)) != 0) {
        close(folder);
        return -1;
    }
    return folder;
}

static void name_of(const uint8_t digest[VGPU_SHA256_SIZE], char name[NAME_SIZE])
{
    for (int i = 0; i < VGPU_SHA256_SIZE; i++)
        snprintf(name + 2 * i, 3, "%02x", digest[i]);
}

static bool read_all(int descriptor, void *into, size_t size)
{
    char *at = into;
    while (size > 0) {
        ssize_t got = read(descriptor, at, size);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return false;
        at += got;
        size -= (size_t)got;
    }
    return true;
}

static bool write_all(int descriptor, const void *from, size_t size)
{
    const char *at = from;
    while (size > 0) {
        ssize_t put = write(descriptor, at, size);
        if (put < 0 && errno == EINTR)
            continue;
        if (put <= 0)
            return false;
        at += put;
        size -= (size_t)put;
    }
    return true;
}

/* The kernel stamps files with the time of its last tick, some milliseconds coarse; order needs better. */
static void mark_used(int descriptor)
{
    struct timespec now[2];
    clock_gettime(CLOCK_REALTIME, &now[0]);
    now[1] = now[0];
    (void)futimens(descriptor, now);
}

static void digest_of(const void *data, size_t size, uint8_t digest[VGPU_SHA256_SIZE])
{
    struct vgpu_sha256 hash;
    vgpu_sha256_start(&hash);
    vgpu_sha256_add(&hash, data, size);
    vgpu_sha256_finish(&hash, digest);
}

static void remove_file(const uint8_t digest[VGPU_SHA256_SIZE])
{
    int folder = open_folder(false);
    if (folder < 0)
        return;
    char name[NAME_SIZE];
    name_of(digest, name);
    unlinkat(folder, name, 0);
    close(folder);
}

int vgpu_jit_file_open(const uint8_t digest[VGPU_SHA256_SIZE], size_t *size)
{
    int folder = open_folder(false);
    if (folder < 0)
        return -1;
    char name[NAME_SIZE];
    name_of(digest, name);
    int descriptor = openat(folder, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    close(folder);
    if (descriptor < 0)
        return -1;
    struct stat facts;
    /* Nobody's business but the owner's: leave what is not a file of ours alone. */
    if (fstat(descriptor, &facts) != 0 || !S_ISREG(facts.st_mode) || facts.st_uid != geteuid()) {
        close(descriptor);
        return -1;
    }
    struct header header;
    if (facts.st_size < (off_t)sizeof header || (uint64_t)facts.st_size - sizeof header > UINT32_MAX) {
        close(descriptor);
        remove_file(digest);
        return -1;
    }
    *size = (size_t)facts.st_size - sizeof header;
    return descriptor;
}

bool vgpu_jit_file_read(int descriptor, const uint8_t digest[VGPU_SHA256_SIZE], void *data, size_t size)
{
    struct header header;
    uint8_t found[VGPU_SHA256_SIZE];
    bool sound = read_all(descriptor, &header, sizeof header) && memcmp(header.magic, magic, sizeof magic) == 0 &&
                 header.size == size && memcmp(header.digest, digest, sizeof header.digest) == 0 &&
                 read_all(descriptor, data, size);
    if (sound) {
        digest_of(data, size, found);
        sound = memcmp(header.data_digest, found, sizeof found) == 0;
    }
    if (sound)
        mark_used(descriptor);
    close(descriptor);
    if (!sound)
        remove_file(digest);
    return sound;
}

void vgpu_jit_file_discard(int descriptor)
{
    close(descriptor);
}

struct measured_file {
    struct timespec used;
    uint64_t size;
    char name[NAME_SIZE];
};

static int older_first(const void *left, const void *right)
{
    const struct measured_file *a = left;
    const struct measured_file *b = right;
    if (a->used.tv_sec != b->used.tv_sec)
        return a->used.tv_sec < b->used.tv_sec ? -1 : 1;
    if (a->used.tv_nsec != b->used.tv_nsec)
        return a->used.tv_nsec < b->used.tv_nsec ? -1 : 1;
    return strcmp(a->name, b->name);
}

/* Adds up the folder and removes the least recently used files above the limit.  Another process may be doing the same:
 * a file that is gone already is as good as removed.  Lock held. */
static void measure_and_evict(int folder)
{
    int again = openat(folder, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *listing = again >= 0 ? fdopendir(again) : NULL;
    if (listing == NULL) {
        if (again >= 0)
            close(again);
        return;
    }
    struct measured_file *files = NULL;
    size_t count = 0;
    size_t room = 0;
    uint64_t total = 0;
    time_t now = time(NULL);
    struct dirent *found;
    while ((found = readdir(listing)) != NULL) {
        struct stat facts;
        if (fstatat(folder, found->d_name, &facts, AT_SYMLINK_NOFOLLOW) != 0 || !S_ISREG(facts.st_mode))
            continue;
        if (strncmp(found->d_name, TEMPORARY_PREFIX, strlen(TEMPORARY_PREFIX)) == 0) {
            if (now - facts.st_mtime > ABANDONED_SECONDS)
                unlinkat(folder, found->d_name, 0);
            continue;
        }
        if (strlen(found->d_name) != NAME_SIZE - 1)
            continue;
        if (count == room) {
            size_t more = room == 0 ? 256 : 2 * room;
            struct measured_file *grown = realloc(files, more * sizeof *files);
            if (grown == NULL)
                break; /* then only the files seen so far are candidates */
            files = grown;
            room = more;
        }
        files[count].used = facts.st_mtim;
        files[count].size = (uint64_t)facts.st_size;
        memcpy(files[count].name, found->d_name, NAME_SIZE);
        count++;
        total += (uint64_t)facts.st_size;
    }
    closedir(listing);

    if (total > settings.limit) {
        qsort(files, count, sizeof *files, older_first);
        /* A little below the limit, lest every further store measures the folder again. */
        uint64_t target = settings.limit - settings.limit / 16;
        for (size_t i = 0; i < count && total > target; i++) {
            if (unlinkat(folder, files[i].name, 0) == 0 || errno == ENOENT)
                total -= files[i].size;
        }
    }
    free(files);
    measured_bytes = total;
}

static bool write_file(int folder, const char *temporary, const char *name, const struct header *header,
                       const void *data, size_t size)
{
    int descriptor = openat(folder, temporary, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, S_IRUSR | S_IWUSR);
    if (descriptor < 0)
        return false;
    bool written = write_all(descriptor, header, sizeof *header) && write_all(descriptor, data, size);
    if (written)
        mark_used(descriptor);
    written = close(descriptor) == 0 && written; /* network file systems report a full disk here */
    written = written && renameat(folder, temporary, folder, name) == 0;
    if (!written)
        unlinkat(folder, temporary, 0);
    return written;
}

void vgpu_jit_file_write(const uint8_t digest[VGPU_SHA256_SIZE], const void *data, size_t size)
{
    struct header header = {.size = size};
    if (size > UINT32_MAX || size + sizeof header > vgpu_jit_cache_limit())
        return;
    int folder = open_folder(true);
    if (folder < 0)
        return;
    memcpy(header.magic, magic, sizeof magic);
    memcpy(header.digest, digest, sizeof header.digest);
    digest_of(data, size, header.data_digest);

    char name[NAME_SIZE];
    char temporary[64];
    name_of(digest, name);
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    pthread_mutex_lock(&lock);
    unsigned serial = temporaries++;
    pthread_mutex_unlock(&lock);
    /* Containers may share a folder and have equal process ids: the time and O_EXCL settle that. */
    snprintf(temporary, sizeof temporary, TEMPORARY_PREFIX "%d-%u-%lld-%ld", (int)getpid(), serial,
             (long long)now.tv_sec, now.tv_nsec);

    if (write_file(folder, temporary, name, &header, data, size)) {
        clock_gettime(CLOCK_MONOTONIC, &now);
        pthread_mutex_lock(&lock);
        measured_bytes += sizeof header + size;
        if (measured_at == 0 || now.tv_sec - measured_at > REMEASURE_SECONDS || measured_bytes > settings.limit) {
            measure_and_evict(folder);
            measured_at = now.tv_sec > 0 ? now.tv_sec : 1;
        }
        pthread_mutex_unlock(&lock);
    }
    close(folder);
}

void vgpu_jit_files_fork_child(void)
{
    pthread_mutex_init(&lock, NULL);
    measured_at = 0; /* measure again at the first write */
}
