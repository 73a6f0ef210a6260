/* SPDX-License-Identifier: Apache-2.0 */
/* Spends its time in one way and says how much: where_time_goes PTX-FILE HOW, where HOW is
 *   sync      waits for a line, launches and synchronises until the next one, says "sync NS wall NS"
 *   answers   waits for a line, asks for the free memory until the next one, says "answers NS"
 *   enqueue   waits for a line, launches 20000 times, says "enqueued NS", its processor time
 *   copy      copies 64 MiB up and down, says "copied NS"
 *   lie       writes all ones where its times belong, says "ones"; after a line small numbers, says "small"; after a line goes on */
#include "guest.h"

#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <time.h>
#include <unistd.h>

#include "../../../transport/wire.h"

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

/* Of this thread: what the scheduler does to it is not in it. */
static uint64_t processor_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

static int goes_on(void)
{
    struct pollfd input = {.fd = 0, .events = POLLIN};
    return poll(&input, 1, 0) == 0;
}

/* The session page of this process: what a program that means no good finds as well. */
static struct vgpu_session_page *own_page(void)
{
    FILE *maps = fopen("/proc/self/maps", "r");
    char line[512];
    while (maps != NULL && fgets(line, sizeof line, maps) != NULL) {
        unsigned long begin, end;
        if (sscanf(line, "%lx-%lx rw-s", &begin, &end) != 2 || end - begin < VGPU_DEVICE_PAGE_SIZE + VGPU_SESSION_PAGE_SIZE) continue;
        if (strstr(line, "rw-s") == NULL) continue;
        struct vgpu_session_page *page = (void *)(begin + VGPU_DEVICE_PAGE_SIZE);
        if (page->magic == VGPU_SEGMENT_MAGIC && page->layout_version == VGPU_LAYOUT_VERSION) return page;
    }
    EXPECT(!"a segment is mapped");
    return NULL;
}

int main(int argc, char **argv)
{
    EXPECT(argc == 3);
    start();
    CUfunction fill;
    CHECK(cuModuleGetFunction(&fill, load(argv[1]), "fill"));
    CUdeviceptr memory;
    CHECK(cuMemAlloc(&memory, 64 << 20));
    unsigned value = 7, n = 1024;
    void *parameters[] = {&memory, &value, &n};
    CHECK(cuLaunchKernel(fill, 4, 1, 1, 256, 1, 1, 0, NULL, parameters, NULL));
    CHECK(cuCtxSynchronize());
    const char *how = argv[2];
    if (strcmp(how, "sync") == 0) {
        EXPECT(say_and_wait("ready"));
        uint64_t began = now_ns(), waited = 0;
        while (goes_on()) {
            CHECK(cuLaunchKernel(fill, 4, 1, 1, 256, 1, 1, 0, NULL, parameters, NULL));
            uint64_t before = now_ns();
            CHECK(cuCtxSynchronize());
            waited += now_ns() - before;
        }
        printf("sync %llu wall %llu\n", (unsigned long long)waited, (unsigned long long)(now_ns() - began));
    } else if (strcmp(how, "answers") == 0) {
        EXPECT(say_and_wait("ready"));
        uint64_t waited = 0;
        while (goes_on()) {
            size_t available, total;
            uint64_t before = now_ns();
            CHECK(cuMemGetInfo(&available, &total));
            waited += now_ns() - before;
        }
        printf("answers %llu\n", (unsigned long long)waited);
    } else if (strcmp(how, "enqueue") == 0) {
        EXPECT(say_and_wait("ready"));
        uint64_t began = processor_ns();
        for (unsigned i = 0; i < 20000; i++)
            CHECK(cuLaunchKernel(fill, 4, 1, 1, 256, 1, 1, 0, NULL, parameters, NULL));
        printf("enqueued %llu\n", (unsigned long long)(processor_ns() - began));
    } else if (strcmp(how, "copy") == 0) {
        static char bytes[64 << 20];
        memset(bytes, 1, sizeof bytes);
        uint64_t began = now_ns();
        CHECK(cuMemcpyHtoD(memory, bytes, sizeof bytes));
        CHECK(cuMemcpyDtoH(bytes, memory, sizeof bytes));
        printf("copied %llu\n", (unsigned long long)(now_ns() - began));
    } else {
        struct vgpu_guest_times *times = &own_page()->times;
        memset(times, 0xff, sizeof *times);
        times->ticks_per_second = 1000000000;
        EXPECT(say_and_wait("ones"));
        memset(times, 0, sizeof *times);
        times->ticks_per_second = 1000000000;
        times->sync_ticks = 5;
        EXPECT(say_and_wait("small"));
        unsigned result[4];
        CHECK(cuLaunchKernel(fill, 4, 1, 1, 256, 1, 1, 0, NULL, parameters, NULL));
        CHECK(cuMemcpyDtoH(result, memory, sizeof result));
        EXPECT(result[3] == 7);
        puts("right");
    }
    fflush(stdout);
    char line[16];
    (void)!fgets(line, sizeof line, stdin); /* the one that ended the loop, */
    (void)!fgets(line, sizeof line, stdin); /* and the end */
    return 0;
}
