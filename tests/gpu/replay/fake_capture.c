/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fake_capture.c - fake_device.c with a stream that can be captured, and events that know what was before them in their stream.
 *
 *   FAKE_PARAMETERS   in the environment: functions have a parameter table that reaches beyond every limit
 */
#define cuStreamIsCapturing driver_is_capturing
#define cuEventRecord driver_event_record
#define cuStreamWaitEvent driver_wait_event
#define cuFuncGetParamInfo code_parameter
#define cuStreamBeginCapture_v2 code_begin_capture
#define cuStreamEndCapture code_end_capture
#include "fake_device.c"
#undef cuStreamIsCapturing
#undef cuEventRecord
#undef cuStreamWaitEvent
#undef cuFuncGetParamInfo
#undef cuStreamBeginCapture_v2
#undef cuStreamEndCapture

static void *captured;

EXPORT int cuStreamIsCapturing(void *stream, unsigned *status)
{
    *status = captured != NULL && captured == stream;
    return 0;
}

EXPORT int cuStreamBeginCapture_v2(void *stream, unsigned mode)
{
    (void)mode;
    captured = stream;
    return 0;
}

EXPORT int cuStreamEndCapture(void *stream, void **graph)
{
    (void)stream;
    captured = NULL;
    *graph = NULL;
    return 901;
}

EXPORT int cuEventRecord(struct event *event, void *stream)
{
    pthread_mutex_lock(&lock);
    event->done_at = *free_at(stream);
    pthread_mutex_unlock(&lock);
    return 0;
}

EXPORT int cuStreamWaitEvent(void *stream, struct event *event, unsigned flags)
{
    (void)flags;
    pthread_mutex_lock(&lock);
    uint64_t *until = free_at(stream);
    *until = *until > event->done_at ? *until : event->done_at;
    pthread_mutex_unlock(&lock);
    return 0;
}

EXPORT int cuFuncGetParamInfo(void *function, size_t index, size_t *offset, size_t *size)
{
    if (getenv("FAKE_PARAMETERS") == NULL)
        return code_parameter(function, index, offset, size);
    *offset = 32764;
    *size = 16383;
    return index == 0 ? 0 : 1;
}
