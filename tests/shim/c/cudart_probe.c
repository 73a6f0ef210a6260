/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Drives a stock libcudart, named by its path, through start, allocation and reset, and prints one "step result" line each.
 * Usage: cudart_probe PATH [main|thread|fork]: where the first runtime call, and so the self-test, happens.
 */
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static void *library;

static void *entry(const char *name)
{
    void *found = dlsym(library, name);
    if (found == NULL) {
        fprintf(stderr, "no %s: %s\n", name, dlerror());
        exit(2);
    }
    return found;
}

static void *run(void *unused)
{
    int (*get_device_count)(int *) = (int (*)(int *))entry("cudaGetDeviceCount");
    int (*allocate)(void **, size_t) = (int (*)(void **, size_t))entry("cudaMalloc");
    int (*release)(void *) = (int (*)(void *))entry("cudaFree");
    int (*reset)(void) = (int (*)(void))entry("cudaDeviceReset");

    int count = -1;
    int result = get_device_count(&count);
    printf("count %d %d\n", result, count);
    fflush(stdout);
    if (result != 0 || count == 0)
        return unused;
    void *memory = NULL;
    printf("malloc %d\n", allocate(&memory, 1024));
    printf("free %d\n", release(memory));
    printf("reset %d\n", reset());
    printf("malloc %d\n", allocate(&memory, 2048));
    printf("free %d\n", release(memory));
    fflush(stdout);
    return unused;
}

int main(int argc, char **argv)
{
    if (argc < 2)
        return 2;
    library = dlopen(argv[1], RTLD_NOW);
    if (library == NULL) {
        fprintf(stderr, "%s\n", dlerror());
        return 2;
    }
    const char *where = argc > 2 ? argv[2] : "main";
    if (strcmp(where, "thread") == 0) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, run, NULL) != 0)
            return 2;
        pthread_join(thread, NULL);
    } else if (strcmp(where, "fork") == 0) {
        pid_t child = fork();
        if (child == 0) {
            run(NULL);
            return 0;
        }
        int status = 0;
        if (child < 0 || waitpid(child, &status, 0) != child || !WIFEXITED(status))
            return 3;
        return WEXITSTATUS(status);
    } else {
        run(NULL);
    }
    return 0;
}
