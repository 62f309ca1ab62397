/* What a message carries so that its receiver can judge it: {"s":..,"c":..,"k":..,"t":..,"p":"xx"}. */
#ifndef CLEVRD_BENCH_PAYLOAD_H
#define CLEVRD_BENCH_PAYLOAD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct stamp {
    uint64_t sequence;  /* s: from 1, without holes, per (publisher connection, topic) */
    uint32_t publisher; /* c: index of the publisher connection */
    uint32_t topic;     /* k: index of the topic it was published to */
    uint64_t due_ns;    /* t: CLOCK_MONOTONIC at which it was due, not at which there was room for it */
};

/* The shortest data that any stamp fits in. */
#define PAYLOAD_MIN_BYTES 80

/* Write the data object, padded to exactly `size` bytes (>= PAYLOAD_MIN_BYTES). */
void payload_write(char *out, size_t size, const struct stamp *stamp);

/* Find the stamp in a delivered message. `hint` remembers where it was the last time: an envelope
   has the same length from one message to the next, and a search would cost more than the rest. */
bool payload_find(const char *message, size_t length, size_t *hint, struct stamp *stamp);

/* The number at the end of `..."offset":N}`, or 0 when there is none. */
uint64_t payload_offset(const char *message, size_t length);

#endif
