#include "options.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "payload.h"

/* A PUB line and its payload are put together in 4 KiB. */
#define NATS_MAX_DATA 3500

enum kind { TEXT, WHOLE, REAL };

struct spec {
    const char *name;
    enum kind kind;
    size_t offset;
};

#define AT(field) offsetof(struct options, field)

static const struct spec SPECS[] = {
    {"target", TEXT, AT(target)},
    {"pub-target", TEXT, AT(pub_target)},
    {"proto", TEXT, AT(proto)},
    {"subs", WHOLE, AT(subs)},
    {"stalled", WHOLE, AT(stalled)},
    {"slow", WHOLE, AT(slow)},
    {"slow-bps", WHOLE, AT(slow_bps)},
    {"sub-path", TEXT, AT(sub_path)},
    {"topics", WHOLE, AT(topics)},
    {"prefix", TEXT, AT(prefix)},
    {"pub-kind", TEXT, AT(pub_kind)},
    {"pub-path", TEXT, AT(pub_path)},
    {"pub-body", TEXT, AT(pub_body)},
    {"preface", TEXT, AT(preface)},
    {"pubs", WHOLE, AT(pubs)},
    {"depth", WHOLE, AT(depth)},
    {"batch", WHOLE, AT(batch)},
    {"window", WHOLE, AT(window)},
    {"data-bytes", WHOLE, AT(data_bytes)},
    {"rate", REAL, AT(rate)},
    {"seconds", REAL, AT(seconds)},
    {"warmup", REAL, AT(warmup)},
    {"connect-window", WHOLE, AT(connect_window)},
    {"connect-timeout", REAL, AT(connect_timeout)},
    {"hold", REAL, AT(hold)},
    {"drain", REAL, AT(drain)},
    {"offsets", WHOLE, AT(offsets)},
    {"server-pids", TEXT, AT(server_pids)},
};

static const struct options DEFAULTS = {
    .target = "127.0.0.1:8080",
    .pub_target = "",
    .proto = "ws",
    .slow_bps = 1024,
    .sub_path = "/subscribe?topic=%t&last=0",
    .topics = 1,
    .prefix = "bench-",
    .pub_kind = "none",
    .pub_path = "/publish",
    .pub_body = "wrapped",
    .preface = "",
    .pubs = 1,
    .depth = 1,
    .batch = 1,
    .data_bytes = 100,
    .rate = 1000,
    .seconds = 5,
    .connect_window = 64,
    .connect_timeout = 30,
    .drain = 5,
    .server_pids = "",
};

static void refuse(const char *what, const char *value) {
    fprintf(stderr, "load: %s: %s\n", what, value);
    exit(2);
}

static const struct spec *find_spec(const char *argument) {
    if (strncmp(argument, "--", 2) != 0) refuse("not an option", argument);
    for (size_t i = 0; i < sizeof SPECS / sizeof *SPECS; i++)
        if (!strcmp(SPECS[i].name, argument + 2)) return &SPECS[i];
    refuse("unknown option", argument);
    return NULL;
}

static void store(struct options *options, const struct spec *spec, char *value) {
    void *field = (char *)options + spec->offset;
    char *end = value;
    if (spec->kind == TEXT) {
        *(const char **)field = value;
        return;
    }
    if (spec->kind == WHOLE)
        *(long *)field = strtol(value, &end, 10);
    else
        *(double *)field = strtod(value, &end);
    if (end == value || *end || *value == '-') refuse("not a number of at least 0", value);
}

static void check(const struct options *o) {
    if (o->topics < 1 || o->depth < 1 || o->batch < 1 || o->pubs < 1)
        refuse("topics, pubs, depth and batch", "at least 1 each");
    if (o->data_bytes < PAYLOAD_MIN_BYTES) refuse("data-bytes", "too few for a stamp");
    bool is_nats = !strcmp(o->proto, "nats");
    bool is_stream = !strcmp(o->proto, "events") || !strcmp(o->proto, "lines");
    if (!is_nats && !is_stream && strcmp(o->proto, "ws") != 0) refuse("unknown proto", o->proto);
    if (is_nats && (!strcmp(o->pub_kind, "batch") || !strcmp(o->pub_kind, "http")))
        refuse("nats publishes over its socket: pub-kind must be ws or none", o->pub_kind);
    if (is_nats && o->data_bytes > NATS_MAX_DATA) refuse("data-bytes", "too many for proto nats");
    if (o->subs + o->stalled + o->slow + o->pubs > 19900) refuse("connections", "at most 19,900");
}

void options_read(struct options *options, int argc, char **argv) {
    *options = DEFAULTS;
    for (int i = 1; i < argc; i += 2) {
        const struct spec *spec = find_spec(argv[i]);
        if (i + 1 == argc) refuse("needs a value", argv[i]);
        store(options, spec, argv[i + 1]);
    }
    check(options);
}
