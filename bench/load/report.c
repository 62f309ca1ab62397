/* One JSON object on standard output: what was asked of the server, and what came of it. */
#include <stdio.h>

#include "clock.h"
#include "report.h"

static double seconds_between(uint64_t from, uint64_t to) {
    return to > from ? (double)(to - from) / 1e9 : 0.0;
}

static double per_second(uint64_t count, double seconds) {
    return seconds > 0 ? (double)count / seconds : 0.0;
}

static void count(const char *name, uint64_t value) {
    printf("\"%s\":%llu,", name, (unsigned long long)value);
}

static void print_connecting(const char *name, const struct connecting *c) {
    double seconds = seconds_between(c->first_ns, c->last_ns);
    printf("\"%s\":{", name);
    count("wanted", c->wanted);
    count("established", c->established);
    count("failed", c->failed);
    printf("\"seconds\":%.6f,\"per_s\":%.1f,", seconds, per_second(c->established, seconds));
    hist_print_ms(stdout, "latency_ms", &c->latency);
    printf("},");
}

static void print_publishing(const struct publishing *p) {
    double seconds = seconds_between(p->first_ns, p->last_ns);
    printf("\"publish\":{");
    count("messages", p->issued);
    count("requests", p->requests);
    count("answered", p->answered);
    count("ok", p->ok);
    count("refused", p->refused);
    count("lost_connections", p->lost_connections);
    printf("\"seconds\":%.6f,\"per_s\":%.1f,\"lag_max_ms\":%.3f,", seconds,
           per_second(p->issued, seconds), (double)p->lag_max_ns / 1e6);
    printf("\"first_bad_status\":%d,\"first_error\":\"%s\",", p->first_bad_status, p->first_error);
    hist_print_ms(stdout, "answer_ms", &p->answer);
    printf("},");
}

static void print_deliveries(const char *name, const struct deliveries *d, uint64_t first_ns) {
    double seconds = seconds_between(first_ns, d->last_ns);
    printf("\"%s\":{", name);
    count("readers", d->readers);
    count("expected", d->expected);
    count("delivered", d->delivered);
    count("missing", d->expected > d->unique ? d->expected - d->unique : 0);
    count("holes", d->holes);
    count("duplicates", d->duplicates);
    count("reordered", d->reordered);
    count("misrouted", d->misrouted);
    count("malformed", d->malformed);
    count("offset_breaks", d->offset_breaks);
    count("reads", d->reads);
    printf("\"mean_bytes\":%.1f,", d->delivered ? (double)d->bytes / (double)d->delivered : 0.0);
    printf("\"seconds\":%.6f,\"per_s\":%.1f,", seconds, per_second(d->delivered, seconds));
    hist_print_ms(stdout, "latency_ms", &d->latency);
    printf("},");
}

static void print_closes(const struct run *run) {
    printf("\"closes\":{\"readers\":%llu,\"codes\":{", (unsigned long long)run->readers_closed);
    const char *separator = "";
    for (int i = 0; i < MAX_CLOSE_CODES && run->closes.codes[i]; i++, separator = ",")
        printf("%s\"%u\":%llu", separator, run->closes.codes[i],
               (unsigned long long)run->closes.counts[i]);
    printf("}},");
}

void report_print(const struct run *run) {
    putchar('{');
    print_connecting("connect", &run->sub_connects);
    print_connecting("publisher_connect", &run->pub_connects);
    print_publishing(&run->publishing);
    print_deliveries("fast", &run->fast, run->publishing.first_ns);
    print_deliveries("slow", &run->slow, run->publishing.first_ns);
    count("stalled_open", run->stalled_open);
    print_closes(run);
    hist_print_ms(stdout, "last_reader_ms", &run->last_reader);
    printf(",\"cpu\":{\"server_s\":%.6f,\"load_s\":%.6f,\"others_s\":%.6f,\"wall_s\":%.6f}}\n",
           run->server_cpu_s, run->load_cpu_s, run->others_cpu_s, run->wall_s);
}
