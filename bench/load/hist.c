#include "hist.h"

static uint64_t bucket_upper_edge(unsigned index) {
    if (index < HIST_SUB) return index;
    unsigned shift = index / HIST_SUB - 1;
    uint64_t mantissa = index % HIST_SUB + HIST_SUB;
    return ((mantissa + 1) << shift) - 1;
}

uint64_t hist_quantile(const struct hist *h, double q) {
    uint64_t rank = (uint64_t)(q * (double)h->count);
    uint64_t seen = 0;
    for (unsigned i = 0; i < HIST_BUCKETS; i++) {
        seen += h->buckets[i];
        if (seen > rank) {
            uint64_t edge = bucket_upper_edge(i);
            return edge < h->max ? edge : h->max;
        }
    }
    return h->max;
}

void hist_print_ms(FILE *out, const char *name, const struct hist *h) {
    double mean = h->count ? (double)h->sum / (double)h->count : 0.0;
    fprintf(out,
            "\"%s\":{\"count\":%llu,\"mean\":%.4f,\"p50\":%.4f,\"p90\":%.4f,\"p99\":%.4f,"
            "\"p999\":%.4f,\"max\":%.4f}",
            name, (unsigned long long)h->count, mean / 1e6, (double)hist_quantile(h, 0.50) / 1e6,
            (double)hist_quantile(h, 0.90) / 1e6, (double)hist_quantile(h, 0.99) / 1e6,
            (double)hist_quantile(h, 0.999) / 1e6, (double)h->max / 1e6);
}
