/* SPDX-License-Identifier: Apache-2.0 */
/*
 * libvgpu-exec.c - carries an install without root into every child process.
 *
 * Without root nothing can be added to the loader's cache, so the folder of our libraries has to be in LD_LIBRARY_PATH of
 * every process. Programs that build a fresh environment for their children lose it. This library, loaded with LD_PRELOAD,
 * stands before the exec family, posix_spawn, system and popen, and sees to it that the child's environment has
 *   - LD_LIBRARY_PATH with the folder this library lies in,
 *   - LD_PRELOAD with this library,
 *   - each VGPU_* variable this process was started with, unless the caller gives it a value of its own.
 * Everything else stays as the caller wrote it. A caller that puts VGPU_EXEC=0 into the environment is left alone.
 *
 * It runs between vfork and exec, where the parent's memory is borrowed: so no malloc, no lock, no stdio; the new environment
 * lies on the stack (an environment of more than STACK_LIMIT bytes lies in a mapping, which a vfork child that succeeds
 * leaves behind in its parent). system and popen cannot be called there, and may allocate.
 *
 * Never for a set-uid, set-gid or capability-bearing program: those get exactly what the caller gave. And never inside one.
 *
 * What it cannot reach: programs that start children by raw system calls, as Go's do, statically linked ones, and calls that
 * libc makes to itself (wordexp). Those need the system-wide install.
 */
#include <alloca.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/xattr.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define STACK_LIMIT 32768u /* a thread with a small stack still has this much */
#define VARIABLES_MAX 32
#define STORE_SIZE 8192u

static const char PRELOAD[] = "LD_PRELOAD=";
static const char LIBRARY_PATH[] = "LD_LIBRARY_PATH=";
static const char OFF[] = "VGPU_EXEC=0";

/* Written once by the constructor, read afterwards. */
static bool active;
static char own_path[PATH_MAX], own_folder[PATH_MAX];
static char store[STORE_SIZE];
static char *variable[VARIABLES_MAX]; /* "VGPU_X=value" */
static size_t variables;

/* ---- the functions behind ours --------------------------------------------------------------- */

typedef int execve_function(const char *, char *const[], char *const[]);
typedef int execveat_function(int, const char *, char *const[], char *const[], int);
typedef int fexecve_function(int, char *const[], char *const[]);
typedef int spawn_function(pid_t *, const char *, const posix_spawn_file_actions_t *, const posix_spawnattr_t *, char *const[],
                           char *const[]);
typedef int system_function(const char *);
typedef FILE *popen_function(const char *, const char *);

static execve_function *next_execve, *next_execvpe;
static execveat_function *next_execveat;
static fexecve_function *next_fexecve;
static spawn_function *next_spawn, *next_spawnp;
static system_function *next_system;
static popen_function *next_popen;

static void find(void *slot, const char *name)
{
    void *function = dlsym(RTLD_NEXT, name);
    memcpy(slot, &function, sizeof function); /* a function pointer through void *, as POSIX has it */
}

static void find_all(void)
{
    find(&next_execve, "execve");
    find(&next_execvpe, "execvpe");
    find(&next_execveat, "execveat");
    find(&next_fexecve, "fexecve");
    find(&next_spawn, "posix_spawn");
    find(&next_spawnp, "posix_spawnp");
    find(&next_system, "system");
    find(&next_popen, "popen");
}

__attribute__((constructor)) static void at_load(void)
{
    find_all();
    if (getauxval(AT_SECURE) != 0) return;
    Dl_info self;
    if (dladdr((const void *)&active, &self) == 0 || self.dli_fname == NULL) return;
    if (realpath(self.dli_fname, own_path) == NULL) return;
    if (strpbrk(own_path, ": ") != NULL) return; /* the loader could not take it apart again */
    char *slash = strrchr(own_path, '/');
    if (slash == NULL || slash == own_path) return;
    memcpy(own_folder, own_path, (size_t)(slash - own_path));
    size_t used = 0;
    for (char **entry = environ; entry != NULL && *entry != NULL; entry++) {
        size_t length = strlen(*entry) + 1;
        if (strncmp(*entry, "VGPU_", 5) != 0 || strchr(*entry, '=') == NULL) continue;
        if (variables == VARIABLES_MAX || used + length > sizeof store) break;
        variable[variables++] = memcpy(store + used, *entry, length);
        used += length;
    }
    active = true;
}

/* Another library's constructor may start a program before ours ran. */
#define NEXT(function) (__builtin_expect((function) == NULL, 0) ? (find_all(), (function)) : (function))

/* ---- what the child's environment lacks ------------------------------------------------------- */

struct merge {
    char *const *given;
    size_t count;            /* of given */
    const char *preload;     /* the caller's value, or NULL: none; only with add_preload */
    const char *library;     /* the same of LD_LIBRARY_PATH */
    size_t preload_at, library_at; /* where in given; count if it is not there */
    bool add_preload, add_library;
    uint32_t add_variable; /* bit i: variable[i] */
    size_t bytes;          /* for the new environment; 0: nothing is to be changed */
    void *mapping;
};
_Static_assert(VARIABLES_MAX <= 32, "a bit for each");

static bool begins(const char *text, const char *with) { return strncmp(text, with, strlen(with)) == 0; }

/* Whether a list separated by any of `separators` has `item`, or (by_name) an item of the same file name. */
static bool list_has(const char *list, const char *separators, const char *item, bool by_name)
{
    const char *name = strrchr(item, '/');
    size_t length = strlen(item), name_length = name == NULL ? 0 : strlen(name);
    while (*list != '\0') {
        size_t part = strcspn(list, separators);
        if (part == length && memcmp(list, item, length) == 0) return true;
        if (by_name && name_length != 0 && part >= name_length && memcmp(list + part - name_length, name, name_length) == 0) return true;
        list += part;
        list += strspn(list, separators);
    }
    return false;
}

static void plan(struct merge *merge, char *const *given, bool privileged)
{
    memset(merge, 0, sizeof *merge);
    merge->given = given;
    if (!active || privileged) return;
    size_t count = 0;
    uint32_t present = 0;
    while (given != NULL && given[count] != NULL) count++;
    merge->count = merge->preload_at = merge->library_at = count;
    for (size_t i = 0; i < count; i++) {
        const char *entry = given[i];
        if (entry[0] == 'L' && begins(entry, PRELOAD)) { /* the loader goes by the last one */
            merge->preload = entry + sizeof PRELOAD - 1;
            merge->preload_at = i;
        } else if (entry[0] == 'L' && begins(entry, LIBRARY_PATH)) {
            merge->library = entry + sizeof LIBRARY_PATH - 1;
            merge->library_at = i;
        } else if (entry[0] == 'V' && begins(entry, "VGPU_")) {
            if (strcmp(entry, OFF) == 0) return;
            for (size_t v = 0; v < variables; v++) {
                size_t name = strcspn(variable[v], "=") + 1;
                if (strncmp(entry, variable[v], name) == 0) present |= 1u << v;
            }
        }
    }
    merge->add_preload = merge->preload == NULL || !list_has(merge->preload, ": ", own_path, true);
    merge->add_library = merge->library == NULL || !list_has(merge->library, ":;", own_folder, false);
    uint32_t all = variables == 32 ? UINT32_MAX : (1u << variables) - 1;
    merge->add_variable = all & ~present;
    if (!merge->add_preload && !merge->add_library && merge->add_variable == 0) return;
    merge->bytes = (count + 2 + variables + 1) * sizeof(char *);
    if (merge->add_preload) merge->bytes += sizeof PRELOAD + strlen(own_path) + 1 + (merge->preload == NULL ? 0 : strlen(merge->preload));
    if (merge->add_library) merge->bytes += sizeof LIBRARY_PATH + strlen(own_folder) + 1 + (merge->library == NULL ? 0 : strlen(merge->library));
}

static char *append(char *at, const char *text)
{
    size_t length = strlen(text);
    memcpy(at, text, length + 1);
    return at + length;
}

/* name + ours, then a colon and theirs if there are any: an empty entry would mean the working directory. Returns the end. */
static char *write_entry(char *at, const char *name, const char *ours, const char *theirs)
{
    at = append(append(at, name), ours);
    if (theirs != NULL && *theirs != '\0') at = append(append(at, ":"), theirs);
    return at + 1;
}

/* `space`: merge->bytes of the caller's stack, or NULL where that would be too much. */
static char *const *fill(struct merge *merge, void *space)
{
    if (merge->bytes == 0) return merge->given;
    if (space == NULL) {
        space = mmap(NULL, merge->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (space == MAP_FAILED) return merge->given;
        merge->mapping = space;
    }
    char **entry = space;
    size_t count = merge->count;
    if (count != 0) memcpy(entry, merge->given, count * sizeof *entry);
    char *text = (char *)(entry + count + 2 + variables + 1);
    if (merge->add_preload) {
        size_t at = merge->preload_at == merge->count ? count++ : merge->preload_at;
        entry[at] = text;
        text = write_entry(text, PRELOAD, own_path, merge->preload);
    }
    if (merge->add_library) {
        size_t at = merge->library_at == merge->count ? count++ : merge->library_at;
        entry[at] = text;
        text = write_entry(text, LIBRARY_PATH, own_folder, merge->library);
    }
    for (size_t v = 0; v < variables; v++)
        if ((merge->add_variable >> v & 1) != 0) entry[count++] = variable[v];
    entry[count] = NULL;
    return entry;
}

/* After a call that returned. */
static int done(struct merge *merge, int status)
{
    if (merge->mapping != NULL) {
        int error = errno;
        munmap(merge->mapping, merge->bytes);
        errno = error;
    }
    return status;
}

/* alloca has to be in the frame of the function that makes the call. */
#define MERGE(merge, given, privileged)                                                          \
    struct merge merge;                                                                          \
    plan(&merge, given, privileged);                                                             \
    char *const *merge##d = fill(&merge, merge.bytes != 0 && merge.bytes <= STACK_LIMIT ? alloca(merge.bytes) : NULL)

/* ---- programs that are to be left alone --------------------------------------------------------- */

static bool special_bits(const struct stat *status)
{
    return S_ISREG(status->st_mode) && (status->st_mode & (S_ISUID | S_ISGID)) != 0;
}

static bool privileged_file(const char *path)
{
    int error = errno;
    struct stat status;
    bool privileged = path != NULL && stat(path, &status) == 0 &&
                      (special_bits(&status) || getxattr(path, "security.capability", NULL, 0) >= 0);
    errno = error;
    return privileged;
}

static bool privileged_descriptor(int descriptor)
{
    int error = errno;
    struct stat status;
    bool privileged = fstat(descriptor, &status) == 0 &&
                      (special_bits(&status) || fgetxattr(descriptor, "security.capability", NULL, 0) >= 0);
    if (!privileged && errno == EBADF) { /* O_PATH: no extended attributes through the descriptor itself */
        char path[32] = "/proc/self/fd/", digits[12], *digit = digits + sizeof digits;
        *--digit = '\0';
        for (unsigned rest = (unsigned)descriptor; digit == digits + sizeof digits - 1 || rest != 0; rest /= 10)
            *--digit = (char)('0' + rest % 10);
        strcat(path, digit);
        privileged = getxattr(path, "security.capability", NULL, 0) >= 0;
    }
    errno = error;
    return privileged;
}

/* What a search along PATH would find first. */
static bool privileged_name(const char *name)
{
    if (name == NULL || strchr(name, '/') != NULL) return privileged_file(name);
    const char *search = getenv("PATH");
    if (search == NULL) search = "/bin:/usr/bin"; /* as libc does */
    size_t name_length = strlen(name);
    int error = errno;
    bool privileged = false;
    for (bool more = true; more;) {
        size_t folder = strcspn(search, ":");
        more = search[folder] != '\0';
        char path[PATH_MAX];
        struct stat status;
        if (folder + name_length + 2 <= sizeof path) {
            memcpy(path, search, folder);
            size_t at = folder;
            if (folder != 0) path[at++] = '/';
            memcpy(path + at, name, name_length + 1);
            if (stat(path, &status) == 0 && S_ISREG(status.st_mode) && access(path, X_OK) == 0) {
                privileged = privileged_file(path);
                break;
            }
        }
        search += folder + 1;
    }
    errno = error;
    return privileged;
}

/* ---- the exec family ------------------------------------------------------------------------------- */

static int run_path(const char *path, char *const argv[], char *const envp[])
{
    MERGE(merge, envp, privileged_file(path));
    execve_function *next = NEXT(next_execve);
    return done(&merge, next != NULL ? next(path, argv, merged) : (int)syscall(SYS_execve, path, argv, merged));
}

static int run_name(const char *name, char *const argv[], char *const envp[])
{
    MERGE(merge, envp, privileged_name(name));
    return done(&merge, NEXT(next_execvpe)(name, argv, merged));
}

EXPORT int execve(const char *path, char *const argv[], char *const envp[]) { return run_path(path, argv, envp); }
EXPORT int execv(const char *path, char *const argv[]) { return run_path(path, argv, environ); }
EXPORT int execvpe(const char *name, char *const argv[], char *const envp[]) { return run_name(name, argv, envp); }
EXPORT int execvp(const char *name, char *const argv[]) { return run_name(name, argv, environ); }

EXPORT int fexecve(int descriptor, char *const argv[], char *const envp[])
{
    MERGE(merge, envp, privileged_descriptor(descriptor));
    return done(&merge, NEXT(next_fexecve)(descriptor, argv, merged));
}

EXPORT int execveat(int folder, const char *path, char *const argv[], char *const envp[], int flags)
{
    bool privileged = false;
    if (*path == '\0') {
        privileged = privileged_descriptor(folder);
    } else {
        int error = errno, opened = openat(folder, path, O_PATH | O_CLOEXEC);
        if (opened >= 0) {
            privileged = privileged_descriptor(opened);
            close(opened);
        }
        errno = error;
    }
    MERGE(merge, envp, privileged);
    execveat_function *next = NEXT(next_execveat); /* libc has it since 2.34 */
    return done(&merge, next != NULL ? next(folder, path, argv, merged, flags)
                                     : (int)syscall(SYS_execveat, folder, path, argv, merged, flags));
}

/* The arguments of execl and its kin: how many, then into an array; the environment follows the NULL in execle. */
#define COLLECT(first, with_environment)                                 \
    va_list list;                                                        \
    size_t count = 0;                                                    \
    va_start(list, first);                                               \
    for (const char *next = first; next != NULL; count++) next = va_arg(list, const char *); \
    va_end(list);                                                        \
    char **arguments = alloca((count + 1) * sizeof *arguments);          \
    memcpy(&arguments[0], &first, sizeof first);                         \
    va_start(list, first);                                               \
    for (size_t i = 1; i <= count; i++) arguments[i] = va_arg(list, char *); \
    char *const *environment = (with_environment) ? va_arg(list, char *const *) : environ; \
    va_end(list)

EXPORT int execl(const char *path, const char *argument, ...)
{
    COLLECT(argument, false);
    return run_path(path, arguments, environment);
}

EXPORT int execle(const char *path, const char *argument, ...)
{
    COLLECT(argument, true);
    return run_path(path, arguments, environment);
}

EXPORT int execlp(const char *name, const char *argument, ...)
{
    COLLECT(argument, false);
    return run_name(name, arguments, environment);
}

/* ---- posix_spawn ------------------------------------------------------------------------------------ */

EXPORT int posix_spawn(pid_t *pid, const char *path, const posix_spawn_file_actions_t *actions, const posix_spawnattr_t *attributes,
                       char *const argv[], char *const envp[])
{
    MERGE(merge, envp, privileged_file(path));
    return done(&merge, NEXT(next_spawn)(pid, path, actions, attributes, argv, merged));
}

EXPORT int posix_spawnp(pid_t *pid, const char *name, const posix_spawn_file_actions_t *actions, const posix_spawnattr_t *attributes,
                        char *const argv[], char *const envp[])
{
    MERGE(merge, envp, privileged_name(name));
    return done(&merge, NEXT(next_spawnp)(pid, name, actions, attributes, argv, merged));
}

/* ---- system and popen --------------------------------------------------------------------------------- */

/*
 * libc starts the shell for these with the process's own environment, by an internal call that nobody can stand before. Where
 * that environment lacks something, the command gets an export in front, on a line of its own. Changing the environment of
 * the process around the call instead would race with its other threads.
 */
static size_t quoted_length(const char *text)
{
    size_t length = 2;
    for (; *text != '\0'; text++) length += *text == '\'' ? 4 : 1;
    return length;
}

static char *quote(char *at, const char *text)
{
    *at++ = '\'';
    for (; *text != '\0'; text++) {
        if (*text == '\'') {
            memcpy(at, "'\\''", 4);
            at += 4;
        } else {
            *at++ = *text;
        }
    }
    *at++ = '\'';
    *at = '\0';
    return at;
}

static bool is_name(const char *entry, size_t length)
{
    for (size_t i = 0; i < length; i++)
        if (entry[i] != '_' && !(entry[i] >= 'A' && entry[i] <= 'Z') && !(entry[i] >= 'a' && entry[i] <= 'z') &&
            !(entry[i] >= '0' && entry[i] <= '9'))
            return false;
    return length != 0;
}

/* NULL: the command as it is will do, or there is no memory for another. */
static char *with_export(const char *command)
{
    MERGE(merge, environ, false);
    if (merge.bytes == 0 || merged == merge.given) {
        done(&merge, 0);
        return NULL;
    }
    /* The entries that differ from the process's own, and the new ones behind them. */
    size_t total = sizeof "export\n" + strlen(command), listed = 0;
    for (size_t pass = 0; pass < 2; pass++) {
        char *text = NULL, *at = NULL;
        if (pass == 1) {
            text = at = malloc(total);
            if (text == NULL) break;
            at = append(at, "export");
        }
        for (size_t i = 0; merged[i] != NULL; i++) {
            if (i < merge.count && merged[i] == merge.given[i]) continue;
            size_t name = strcspn(merged[i], "=");
            if (!is_name(merged[i], name)) continue;
            if (pass == 0) {
                total += 1 + name + 1 + quoted_length(merged[i] + name + 1);
                listed++;
            } else {
                *at++ = ' ';
                memcpy(at, merged[i], name + 1);
                at = quote(at + name + 1, merged[i] + name + 1);
            }
        }
        if (pass == 0 && listed == 0) break;
        if (pass == 1) {
            append(append(at, "\n"), command);
            done(&merge, 0);
            return text;
        }
    }
    done(&merge, 0);
    return NULL;
}

EXPORT int system(const char *command)
{
    char *exported = command == NULL ? NULL : with_export(command);
    int status = NEXT(next_system)(exported != NULL ? exported : command);
    int error = errno;
    free(exported);
    errno = error;
    return status;
}

EXPORT FILE *popen(const char *command, const char *mode)
{
    char *exported = command == NULL ? NULL : with_export(command);
    FILE *stream = NEXT(next_popen)(exported != NULL ? exported : command, mode);
    int error = errno;
    free(exported);
    errno = error;
    return stream;
}
