/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pulse.c - does the device get on with this session's kernels? Behind launches the device itself writes marks, rising numbers,
 * into memory of ours. Fences would not do: their words are the guest's to write, and a guest that waits for none has none.
 * Nor do calls that are consumed: a program that polls a hung kernel makes many.
 *
 * A mark behind each launch would cost as much as the launch. So it is behind each kernel that takes long or whose length
 * is not known yet, and behind every STRIDE-th of those that were measured to be short. Whatever is left over at the end
 * gets a mark when it has been unfinished for TAIL_NS. Between two marks there is then a kernel, or very little, and a mark
 * that stays away for as long as a kernel may take tells of a hang (supervision/_progress.py).
 *
 * What counts is time in which the device was watched. Where no record was taken between two looks and they are far apart, this
 * thread had no processor or was stopped; then the device, its other threads or this whole host may have stood still as well, and
 * the gap counts for GAP_NS. A gap in which a call was replayed counts: that call had its own deadline.
 *
 * Must never: put a mark into a stream that is capturing; wait.
 */
#include "flight.h"

#include <stdlib.h>
#include <sys/mman.h>

#define TRACKS 512u          /* streams with marks on their way, at most; a page of words */
#define STRIDE 64u
#define LIGHT_NS 2000000ull
#define LOOK_NS 1000000ull   /* words are looked at so often; more exact than anybody needs */
#define TAIL_NS 5000000ull
#define GAP_NS 50000000ull   /* the loop looks far more often than that while the device is at work: it was kept from looking */
#define KEPT 64u             /* launches remembered with their marks, for each stream */
#define GROWTH 4u            /* a launch of so many times the blocks is measured anew */
#define REGISTER_PORTABLE 1u
#define REGISTER_DEVICE_MAP 2u

/* A stream with launches. */
struct track {
    void *stream;
    unsigned slot;              /* of its context */
    unsigned unmarked;          /* launches since the last mark */
    uint64_t unmarked_since_ns;
    uint64_t issued, seen;      /* marks given to the driver; the last that the device has set */
    uint64_t since_ns;          /* when the last one was seen, or there began to be one to wait for */
    uint64_t measured;          /* the mark behind the launch whose length is being measured, 0 none */
    uint64_t function, blocks;  /* that launch */
    struct vgpu_flight_entry last; /* the newest launch */
    struct { uint64_t mark; struct vgpu_flight_entry launch; } kept[KEPT]; /* the launch before each mark */
};

struct replay_pulse {
    uint64_t *word; /* TRACKS of them, registered with the driver */
    unsigned slot;  /* context they are registered in; REPLAY_NO_CONTEXT: it has ended */
    struct track track[TRACKS];
    unsigned used, last; /* tracks ever used; the one used last */
    unsigned waiting;    /* tracks with launches that are not known to be done */
    uint64_t looked_ns, progress_ns;
    uint64_t records;    /* taken when last looked */
};

static bool tell_driver(struct vgpu_replay *replay, struct replay_pulse *pulse)
{
    uint64_t device = 0;
    pulse->slot = replay->private->current;
    int status = replay->driver.cuMemHostRegister_v2(pulse->word, TRACKS * sizeof *pulse->word, REGISTER_PORTABLE | REGISTER_DEVICE_MAP);
    if (status == CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED)
        return true;
    if (status != 0)
        return false;
    status = replay->driver.cuMemHostGetDevicePointer_v2(&device, pulse->word, 0);
    return status == 0 && device == (uint64_t)(uintptr_t)pulse->word;
}

void replay_pulse_open(struct vgpu_replay *replay)
{
    struct replay_pulse *pulse = calloc(1, sizeof *pulse);
    if (pulse == NULL || !replay->gpu_fences) {
        free(pulse);
        return; /* the watchdog has the fences then */
    }
    pulse->word = mmap(NULL, TRACKS * sizeof *pulse->word, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    replay->private->pulse = pulse;
    if (pulse->word == MAP_FAILED || !tell_driver(replay, pulse)) {
        if (pulse->word == MAP_FAILED)
            pulse->word = NULL;
        replay_pulse_close(replay);
    }
}

void replay_pulse_again(struct vgpu_replay *replay)
{
    struct replay_pulse *pulse = replay->private->pulse;
    if (pulse != NULL && pulse->slot == REPLAY_NO_CONTEXT && !tell_driver(replay, pulse))
        replay_pulse_close(replay);
}

void replay_pulse_close(struct vgpu_replay *replay)
{
    struct replay_pulse *pulse = replay->private->pulse;
    replay->private->pulse = NULL;
    if (pulse != NULL && pulse->word != NULL)
        munmap(pulse->word, TRACKS * sizeof *pulse->word);
    free(pulse);
}

static bool is_waiting(const struct track *track) { return track->unmarked != 0 || track->seen != track->issued; }

static uint64_t loaded(uint64_t *word) { return atomic_load_explicit(replay_quad(word), memory_order_acquire); }

/* The stream's track; a new one if need be. NULL: there are too many. */
static struct track *track_of(struct vgpu_replay *replay, struct replay_pulse *pulse, void *stream)
{
    unsigned slot = replay->private->current;
    struct track *last = &pulse->track[pulse->last], *idle = NULL;
    if (last->stream == stream && last->slot == slot && pulse->used != 0)
        return last;
    for (unsigned i = 0; i < pulse->used; i++) {
        struct track *track = &pulse->track[i];
        if (track->stream == stream && track->slot == slot) {
            pulse->last = i;
            return track;
        }
        if (!is_waiting(track))
            idle = track;
    }
    if (pulse->used < TRACKS)
        idle = &pulse->track[pulse->used++];
    if (idle == NULL)
        return NULL;
    /* The numbers go on: a word never falls. */
    idle->stream = stream;
    idle->slot = slot;
    idle->unmarked = 0;
    idle->measured = 0;
    pulse->last = (unsigned)(idle - pulse->track);
    return idle;
}

static void mark(struct vgpu_replay *replay, struct replay_pulse *pulse, struct track *track, uint64_t now)
{
    track->unmarked = 0;
    if (replay_is_capturing(replay, track->stream))
        return;
    uint64_t address = (uint64_t)(uintptr_t)&pulse->word[track - pulse->track];
    if (replay->driver.cuStreamWriteValue64_v2(track->stream, address, track->issued + 1, 0) != 0)
        return; /* the context is broken, which others find */
    if (track->seen == track->issued)
        track->since_ns = now;
    track->issued++;
    track->kept[track->issued % KEPT].mark = track->issued;
    track->kept[track->issued % KEPT].launch = track->last;
}

void replay_pulse_launch(struct vgpu_replay *replay, void *stream, uint64_t function, struct replay_pace *pace, uint64_t blocks)
{
    struct replay_pulse *pulse = replay->private->pulse;
    struct track *track = pulse != NULL ? track_of(replay, pulse, stream) : NULL;
    if (track == NULL)
        return;
    if (!is_waiting(track))
        pulse->waiting++;
    bool is_light = pace != NULL && pace->is_light && blocks <= pace->blocks * GROWTH;
    if (track->unmarked == 0)
        track->unmarked_since_ns = replay->grant->current_since_ns;
    const struct vgpu_flight *flight = replay->private->flight;
    const struct vgpu_flight_entry *launch = &flight->entry[(flight->next - 1) % VGPU_FLIGHT_ENTRIES];
    if (++track->unmarked < STRIDE && is_light) {
        track->last = *launch;
        return;
    }
    uint64_t now = replay_now_ns(), before = track->issued;
    /* Measured from mark to mark: what came before has to have one of its own. */
    if (!is_light && track->unmarked > 1)
        mark(replay, pulse, track, now);
    track->last = *launch;
    mark(replay, pulse, track, now);
    if (track->issued != before && !is_light && pace != NULL && track->measured == 0) {
        track->measured = track->issued;
        track->function = function;
        track->blocks = blocks;
    }
    if (!is_waiting(track)) /* it captures: nothing has been launched */
        pulse->waiting--;
}

void replay_pulse_stream_ends(struct vgpu_replay *replay, void *stream)
{
    struct replay_pulse *pulse = replay->private->pulse;
    if (pulse == NULL)
        return;
    for (unsigned i = 0; i < pulse->used; i++) {
        struct track *track = &pulse->track[i];
        if (track->stream != stream)
            continue;
        bool was_waiting = is_waiting(track);
        if (track->unmarked != 0)
            mark(replay, pulse, track, replay_now_ns());
        pulse->waiting -= was_waiting && !is_waiting(track) ? 1 : 0;
        track->stream = track; /* nobody's: the driver may give the next stream the same address */
    }
}

void replay_pulse_context_ends(struct vgpu_replay *replay, unsigned slot)
{
    struct replay_pulse *pulse = replay->private->pulse;
    if (pulse == NULL)
        return;
    if (pulse->slot == slot)
        pulse->slot = REPLAY_NO_CONTEXT;
    for (unsigned i = 0; i < pulse->used; i++) {
        struct track *track = &pulse->track[i];
        if (track->slot != slot)
            continue;
        pulse->waiting -= is_waiting(track) ? 1 : 0;
        /* What the context had left to do it does no more. */
        atomic_store(replay_quad(&pulse->word[i]), track->issued);
        track->stream = track;
        track->seen = track->issued;
        track->unmarked = 0;
        track->measured = 0;
    }
}

/* The mark behind the measured launch was seen: how long did that take? */
static void measure(struct vgpu_replay *replay, struct track *track, uint64_t now)
{
    struct replay_pace *pace = replay_pace_of(replay, track->function);
    track->measured = 0;
    if (pace == NULL)
        return;
    pace->is_light = now - track->since_ns <= LIGHT_NS;
    pace->blocks = track->blocks;
}

void replay_pulse_look(struct vgpu_replay *replay, uint64_t now, bool is_idle)
{
    struct replay_pulse *pulse = replay->private->pulse;
    struct vgpu_grant_page *grant = replay->grant;
    if (pulse == NULL || pulse->waiting == 0 || (now - pulse->looked_ns < LOOK_NS && !is_idle))
        return;
    bool was_away = grant->records == pulse->records && now - pulse->looked_ns > GAP_NS;
    uint64_t before_ns = pulse->looked_ns;
    pulse->looked_ns = now;
    pulse->records = grant->records;
    uint64_t oldest = 0;
    const struct track *stuck = NULL;
    unsigned before = replay->private->current, waiting = 0;
    /* A host function runs in the guest, and streams may wait for it. */
    if (atomic_load_explicit(&replay->private->callbacks_claimed, memory_order_relaxed) != 0)
        pulse->progress_ns = now;
    for (unsigned i = 0; i < pulse->used; i++) {
        struct track *track = &pulse->track[i];
        if (!is_waiting(track))
            continue;
        uint64_t seen = loaded(&pulse->word[i]);
        if (seen != track->seen) {
            /* Of two marks seen at once the second launch took no time that could be told. */
            if (track->measured != 0 && track->measured <= seen)
                measure(replay, track, now);
            track->seen = seen;
            track->since_ns = pulse->progress_ns = now;
        } else if (was_away) {
            uint64_t from = track->since_ns > before_ns ? track->since_ns : before_ns;
            if (now - from > GAP_NS)
                track->since_ns += now - from - GAP_NS;
            track->measured = 0; /* nobody can tell how long that took */
        }
        /* The driver says so, and it does not lie to us; but a stream that captures is called empty without asking. */
        if (is_idle && (track->stream == NULL || track->stream == track || !replay_is_capturing(replay, track->stream)))
            track->unmarked = 0;
        if (track->unmarked != 0 && now - track->unmarked_since_ns > TAIL_NS && replay->private->error == 0 &&
            replay_select_context(replay, track->slot))
            mark(replay, pulse, track, now);
        if (track->seen != track->issued && (stuck == NULL || track->since_ns < oldest)) {
            oldest = track->since_ns;
            stuck = track;
        }
        waiting += is_waiting(track) ? 1 : 0;
    }
    replay_select_context(replay, before);
    pulse->waiting = waiting;
    struct vgpu_flight_entry *suspect = &replay->private->flight->suspect;
    uint64_t next = stuck != NULL ? stuck->seen + 1 : 0;
    if (stuck != NULL && stuck->kept[next % KEPT].mark == next)
        *suspect = stuck->kept[next % KEPT].launch;
    else
        suspect->call = 0;
    grant->last_mark_ns = pulse->progress_ns;
    grant->oldest_mark_ns = oldest;
    /* SAFETY: release: who sees the time of the look sees what was found. */
    atomic_store_explicit(replay_quad(&grant->looked_ns), now, memory_order_release);
}
