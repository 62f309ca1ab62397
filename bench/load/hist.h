/* Latency histogram with log-linear buckets: 64 per power of two, so a value is known to 1.6 %. */
#ifndef CLEVRD_BENCH_HIST_H
#define CLEVRD_BENCH_HIST_H

#include <stdint.h>
#include <stdio.h>

#define HIST_SUB_BITS 6
#define HIST_SUB (1u << HIST_SUB_BITS)
#define HIST_BUCKETS ((64 - HIST_SUB_BITS + 1) * HIST_SUB)

struct hist {
    uint64_t count;
    uint64_t sum;
    uint64_t max;
    uint64_t buckets[HIST_BUCKETS];
};

static inline unsigned hist_index(uint64_t value) {
    if (value < HIST_SUB) return (unsigned)value;
    unsigned shift = 63u - (unsigned)__builtin_clzll(value) - HIST_SUB_BITS;
    return (shift + 1) * HIST_SUB + (unsigned)((value >> shift) - HIST_SUB);
}

static inline void hist_record(struct hist *h, uint64_t value) {
    h->count++;
    h->sum += value;
    if (value > h->max) h->max = value;
    h->buckets[hist_index(value)]++;
}

/* Upper edge of the bucket that holds the q-th value (0 < q <= 1), never above the true maximum. */
uint64_t hist_quantile(const struct hist *h, double q);

/* {"count":..,"mean":..,"p50":..,"p90":..,"p99":..,"p999":..,"max":..} in milliseconds. */
void hist_print_ms(FILE *out, const char *name, const struct hist *h);

#endif
