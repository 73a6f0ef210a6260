/* SPDX-License-Identifier: Apache-2.0 */
/*
 * log.c - what the library says on standard error: nothing, unless VGPU_LOG names a level.
 *
 *   error     why this program cannot use the GPU, or cannot any more, although there is one
 *   warning   what a program asked for and does not get: functions that are refused
 *   info      which session it has; why there is no device, and where it was looked for
 *   debug     what is waited for, and what is tried meanwhile
 *
 * A level includes those above it. 1 is info; empty, 0, off and none are silence; any other word is info and is named as
 * unknown. The environment is read at each line, for lines are rare: none is on the path of a call.
 */
#include "core.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <strings.h>
#include <unistd.h>

bool shim_first_time(_Atomic int *said)
{
    int self = (int)getpid(); /* a forked child is a process of its own */
    return atomic_exchange_explicit(said, self, memory_order_relaxed) != self;
}

static void write_line(const char *format, va_list arguments)
{
    char line[512];
    int head = snprintf(line, sizeof line, "libcuda[%d]: ", (int)getpid());
    int body = vsnprintf(line + head, sizeof line - (size_t)head - 1, format, arguments);
    size_t length = body < 0 ? (size_t)head : (size_t)head + (size_t)body;
    if (length > sizeof line - 2) length = sizeof line - 2; /* what did not fit was cut, and a zero ends it */
    line[length++] = '\n';
    if (write(STDERR_FILENO, line, length) < 0) return; /* there is nobody to tell */
}

__attribute__((format(printf, 1, 2))) static void say(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    write_line(format, arguments);
    va_end(arguments);
}

/* The last level that is told. */
static int told_level(void)
{
    static const struct { const char *name; int level; } levels[] = {
        {"", 0}, {"0", 0}, {"off", 0}, {"none", 0}, {"1", SHIM_INFO},
        {"error", SHIM_ERROR}, {"warning", SHIM_WARNING}, {"info", SHIM_INFO}, {"debug", SHIM_DEBUG},
    };
    static _Atomic int said;
    const char *wanted = secure_getenv("VGPU_LOG");
    if (wanted == NULL) return 0;
    for (size_t i = 0; i < sizeof levels / sizeof levels[0]; i++)
        if (strcasecmp(wanted, levels[i].name) == 0) return levels[i].level;
    if (shim_first_time(&said)) say("VGPU_LOG is \"%.40s\", expected error, warning, info, debug or off; taken for info", wanted);
    return SHIM_INFO;
}

void shim_log(enum shim_log_level level, const char *format, ...)
{
    if ((int)level > told_level()) return;
    va_list arguments;
    va_start(arguments, format);
    write_line(format, arguments);
    va_end(arguments);
}
