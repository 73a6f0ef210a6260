# SPDX-License-Identifier: Apache-2.0
"""Build a tracing libcuda.so.1: every call of a program, with its arguments and its answer, in a file.

    python tools/trace_shim.py OUT_FOLDER --target /path/to/libcuda.so.1
    LD_LIBRARY_PATH=OUT_FOLDER VGPU_TRACE=calls.txt PROGRAM

The library stands before the target (ours, or NVIDIA's) and passes every call on untouched. It wraps the
exported functions and what cuGetProcAddress hands out, never the private tables, which runtimes check.
The first six integer arguments are printed in hexadecimal; calls that failed end in the CUresult.
For debugging only: each call takes a lock and writes a line.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

from vgpu.transport.calls._table import load

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char *const names[] = {@NAMES@};
enum { COUNT = sizeof names / sizeof *names };
static void *targets[COUNT];
extern char trace_thunks[]; /* COUNT thunks of 16 bytes */
static FILE *out;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* What a call must remember until it returns. Deep recursion (callbacks) is bounded by the array. */
struct frame { uint64_t back, index, argument[6]; };
static __thread struct frame stack[64];
static __thread unsigned depth;

__attribute__((constructor)) static void open_target(void)
{
    void *target = dlopen("@TARGET@", RTLD_NOW | RTLD_LOCAL);
    if (target == NULL) { fprintf(stderr, "trace: %s\n", dlerror()); abort(); }
    for (unsigned i = 0; i < COUNT; i++) targets[i] = dlsym(target, names[i]);
    const char *path = getenv("VGPU_TRACE");
    out = path != NULL ? fopen(path, "a") : stderr;
    if (out == NULL) out = stderr;
}

static int missing(void) { return 500; }

__attribute__((used)) void *trace_enter(uint64_t index, uint64_t *back, const uint64_t *saved)
{
    extern char trace_return[];
    struct frame *frame = &stack[depth < 63 ? depth++ : depth];
    frame->back = *back;
    frame->index = index;
    for (int i = 0; i < 6; i++) frame->argument[i] = saved[6 - i]; /* pushed rdi first */
    *back = (uint64_t)trace_return;
    return targets[index] != NULL ? targets[index] : (void *)missing;
}

__attribute__((used)) uint64_t trace_exit(unsigned result)
{
    struct frame frame = stack[--depth];
    if (strncmp(names[frame.index], "cuGetProcAddress", 16) == 0) {
        void **pointer = (void **)frame.argument[1];
        if (result == 0 && pointer != NULL && *pointer != NULL)
            for (unsigned i = 0; i < COUNT; i++)
                if (targets[i] == *pointer) { *pointer = trace_thunks + 16 * i; break; }
        return frame.back;
    }
    pthread_mutex_lock(&lock);
    fprintf(out, "%d %s %lx %lx %lx %lx %lx %lx", gettid(), names[frame.index], frame.argument[0], frame.argument[1],
            frame.argument[2], frame.argument[3], frame.argument[4], frame.argument[5]);
    fprintf(out, result ? " -> %u\n" : "\n", result);
    fflush(out);
    pthread_mutex_unlock(&lock);
    return frame.back;
}

__asm__(
    ".text\n.balign 16\ntrace_common:\n"
    "push %rdi\npush %rsi\npush %rdx\npush %rcx\npush %r8\npush %r9\npush %rax\n"
    "mov %rax, %rdi\nlea 56(%rsp), %rsi\nmov %rsp, %rdx\ncall trace_enter\nmov %rax, %r11\n"
    "pop %rax\npop %r9\npop %r8\npop %rcx\npop %rdx\npop %rsi\npop %rdi\njmp *%r11\n"
    ".globl trace_return\n.hidden trace_return\ntrace_return:\n"
    "sub $8, %rsp\npush %rax\nmov %eax, %edi\ncall trace_exit\nmov %rax, 8(%rsp)\npop %rax\nret\n"
    ".balign 16\n.globl trace_thunks\n.hidden trace_thunks\ntrace_thunks:\n"
@THUNKS@);
"""


def source(target: Path) -> str:
    """The library's source for a target."""
    names = []
    for row in load().rows:
        names.append(row.symbol)
        if row.twin:
            names.append(f"{row.symbol}_{row.twin[0]}")
    thunks = "".join(
        f'    ".balign 16\\n.globl {n}\\n.type {n}, @function\\n{n}: mov ${i}, %eax\\njmp trace_common\\n"\n'
        for i, n in enumerate(names)
    )
    listed = ", ".join(f'"{n}"' for n in names)
    return SOURCE.replace("@NAMES@", listed).replace("@TARGET@", str(target)).replace("@THUNKS@", thunks)


def main() -> int:
    """Build it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", type=Path, required=True)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", suffix=".c") as file:
        file.write(source(options.target.resolve()))
        file.flush()
        subprocess.run(
            ["gcc", "-shared", "-fPIC", "-O1", "-fvisibility=hidden", "-Wl,-soname,libcuda.so.1",
             "-o", options.folder / "libcuda.so.1", file.name, "-ldl", "-pthread"],
            check=True,
        )  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
