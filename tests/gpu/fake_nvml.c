/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fake_nvml.c - a libnvidia-ml.so.1 with one made-up card, for tests of whoever asks the real one. The numbers are set and
 * counted through the fake_* functions, which the real library does not have.
 */
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT = 7, NOT_LOADED = 9, LOST = 15, MISMATCH = 25 };

static int card;
static unsigned initialised, shut_down, static_calls, hang_milliseconds, init_status, is_lost;
static struct sample { unsigned pid; unsigned long long microseconds; unsigned sm, memory, encoder, decoder; } samples[8];
static unsigned sample_count;

unsigned fake_initialised(void) { return initialised; }
unsigned fake_shut_down(void) { return shut_down; }
unsigned fake_static_calls(void) { return static_calls; }
void fake_hang(unsigned milliseconds) { hang_milliseconds = milliseconds; }
void fake_init_status(unsigned status) { init_status = status; }
void fake_lose(unsigned lost) { is_lost = lost; }
void fake_forget_samples(void) { sample_count = 0; }
void fake_add_sample(unsigned pid, unsigned long long microseconds, unsigned sm)
{
    samples[sample_count++] = (struct sample){.pid = pid, .microseconds = microseconds, .sm = sm};
}

int nvmlInit_v2(void)
{
    initialised++;
    return (int)init_status;
}
int nvmlShutdown(void)
{
    shut_down++;
    return SUCCESS;
}
const char *nvmlErrorString(int status) { return status == NOT_LOADED ? "Driver Not Loaded" : "something else"; }

int nvmlDeviceGetHandleByUUID(const char *uuid, void **device)
{
    *device = &card;
    return strcmp(uuid, "GPU-00112233-4455-6677-8899-aabbccddeeff") == 0 ? SUCCESS : NOT_FOUND;
}
int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, void **device)
{
    *device = &card;
    return strcmp(bus, "0000:41:00.0") == 0 ? SUCCESS : NOT_FOUND;
}

static int give(const void *device, unsigned *out, unsigned value)
{
    if (is_lost) return LOST;
    if (device != &card || out == NULL) return INVALID;
    *out = value;
    return SUCCESS;
}
static int give_static(const void *device, unsigned *out, unsigned value)
{
    static_calls++;
    return give(device, out, value);
}

int nvmlDeviceGetTemperature(void *device, unsigned sensor, unsigned *out)
{
    if (hang_milliseconds != 0) usleep(hang_milliseconds * 1000);
    return sensor == 0 ? give(device, out, 43) : INVALID;
}
int nvmlDeviceGetUtilizationRates(void *device, unsigned out[2])
{
    int status = give(device, &out[0], 87);
    return status == SUCCESS ? give(device, &out[1], 31) : status;
}
int nvmlDeviceGetPowerUsage(void *device, unsigned *out) { return give(device, out, 412345); }
int nvmlDeviceGetEnforcedPowerLimit(void *device, unsigned *out) { return give(device, out, 700000); }
int nvmlDeviceGetPowerManagementDefaultLimit(void *device, unsigned *out) { return give_static(device, out, 690000); }
int nvmlDeviceGetPowerManagementLimitConstraints(void *device, unsigned *least, unsigned *most)
{
    int status = give(device, least, 200000);
    return status == SUCCESS ? give(device, most, 710000) : status;
}
int nvmlDeviceGetClockInfo(void *device, unsigned kind, unsigned *out) { return kind > 3 ? INVALID : give(device, out, 1000 + kind); }
int nvmlDeviceGetMaxClockInfo(void *device, unsigned kind, unsigned *out) { return kind > 3 ? INVALID : give(device, out, 2000 + kind); }
int nvmlDeviceGetPerformanceState(void *device, unsigned *out) { return give(device, out, 2); }
int nvmlDeviceGetFanSpeed(void *device, unsigned *out)
{
    (void)device, (void)out;
    return NOT_SUPPORTED; /* as on a card that the server cools */
}
int nvmlDeviceGetTemperatureThreshold(void *device, unsigned kind, unsigned *out) { return give(device, out, kind == 0 ? 92 : 87); }
int nvmlDeviceGetEncoderUtilization(void *device, unsigned *out, unsigned *period)
{
    *period = 1;
    return give(device, out, 3);
}
int nvmlDeviceGetDecoderUtilization(void *device, unsigned *out, unsigned *period)
{
    *period = 1;
    return give(device, out, 5);
}
int nvmlDeviceGetEccMode(void *device, unsigned *current, unsigned *pending)
{
    *pending = 0;
    return give(device, current, 1);
}
int nvmlDeviceGetPersistenceMode(void *device, unsigned *out) { return give(device, out, 1); }
int nvmlDeviceGetComputeMode(void *device, unsigned *out) { return give(device, out, 0); }
int nvmlDeviceGetBrand(void *device, unsigned *out) { return give(device, out, 14); }
int nvmlDeviceGetArchitecture(void *device, unsigned *out) { return give(device, out, 9); }
int nvmlDeviceGetCurrPcieLinkGeneration(void *device, unsigned *out) { return give(device, out, 4); }
int nvmlDeviceGetMaxPcieLinkGeneration(void *device, unsigned *out) { return give(device, out, 5); }
int nvmlDeviceGetCurrPcieLinkWidth(void *device, unsigned *out) { return give(device, out, 8); }
int nvmlDeviceGetMaxPcieLinkWidth(void *device, unsigned *out) { return give(device, out, 16); }
int nvmlDeviceGetPcieThroughput(void *device, unsigned direction, unsigned *out) { return give(device, out, direction == 0 ? 123 : 456); }
int nvmlDeviceGetMemoryBusWidth(void *device, unsigned *out) { return give(device, out, 6144); }

static int give_quad(const void *device, unsigned long long *out, unsigned long long value)
{
    if (is_lost) return LOST;
    if (device != &card) return INVALID;
    *out = value;
    return SUCCESS;
}
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *out) { return give_quad(device, out, 98765432109ull); }
int nvmlDeviceGetTotalEccErrors(void *device, unsigned kind, unsigned counter, unsigned long long *out)
{
    unsigned which = 2 * kind + counter; /* one is refused */
    return which == 2 ? 3 : give_quad(device, out, 70 + which);
}
/* The older of the two names, so that falling back to it is tested. */
int nvmlDeviceGetCurrentClocksThrottleReasons(void *device, unsigned long long *out) { return give_quad(device, out, 4); }
int nvmlDeviceGetBAR1MemoryInfo(void *device, unsigned long long out[3]) { return give_quad(device, out, 256ull << 30); }

struct memory { unsigned version; unsigned long long total, reserved, free, used; };
int nvmlDeviceGetMemoryInfo_v2(void *device, struct memory *memory)
{
    if (memory->version != (sizeof *memory | 2u << 24)) return MISMATCH;
    memory->reserved = 600ull << 20;
    memory->used = 5ull << 30;
    memory->free = 1;
    return give_quad(device, &memory->total, 143771ull << 20);
}

struct field { unsigned id, scope; long long microseconds, latency; unsigned kind; int status; union { unsigned whole; unsigned long long wide; } value; };
int nvmlDeviceGetFieldValues(void *device, int count, struct field *fields)
{
    if (device != &card || count != 1 || fields->id != 82) return INVALID;
    fields->value.wide = ~0ull; /* the high half of a 32-bit answer is nobody's */
    fields->value.whole = 51;
    fields->status = is_lost ? LOST : SUCCESS;
    return SUCCESS;
}

static int give_text(void *device, const char *text, char *buffer, unsigned size)
{
    if (is_lost) return LOST;
    if (device != &card) return INVALID;
    if (strlen(text) >= size) return INSUFFICIENT;
    strcpy(buffer, text);
    return SUCCESS;
}
int nvmlDeviceGetVbiosVersion(void *device, char *buffer, unsigned size) { return give_text(device, "96.00.A5.00.01", buffer, size); }
int nvmlDeviceGetSerial(void *device, char *buffer, unsigned size) { return give_text(device, "1652723012345", buffer, size); }
int nvmlDeviceGetBoardPartNumber(void *device, char *buffer, unsigned size) { return give_text(device, "692-2G520-0280-001", buffer, size); }
int nvmlSystemGetNVMLVersion(char *buffer, unsigned size) { return give_text(&card, "13.580.159.04", buffer, size); }

#ifndef WITHOUT_PROCESSES
int nvmlDeviceGetProcessUtilization(void *device, struct sample *out, unsigned *count, unsigned long long last_seen)
{
    unsigned found = 0;
    if (is_lost) return LOST;
    if (device != &card) return INVALID;
    for (unsigned i = 0; i < sample_count; i++) found += samples[i].microseconds > last_seen;
    if (found == 0) return NOT_FOUND;
    unsigned room = *count;
    *count = found;
    if (out == NULL || room < found) return INSUFFICIENT;
    for (unsigned i = 0, at = 0; i < sample_count; i++)
        if (samples[i].microseconds > last_seen) out[at++] = samples[i];
    return SUCCESS;
}
#endif
