/* What one run does, as the command line says it: every option is `--name value`. */
#ifndef CLEVRD_BENCH_OPTIONS_H
#define CLEVRD_BENCH_OPTIONS_H

struct options {
    const char *target;     /* HOST:PORT, IPv4 */
    const char *pub_target; /* the same of publishers, where it is another one ("": it is not) */
    const char *proto;  /* ws: one message per frame; nats: the NATS protocol over WebSocket;
                           events, lines: subscribers read SSE or NDJSON */

    long subs;          /* subscribers that read all they get */
    long stalled;       /* subscribers that never read */
    long slow;          /* subscribers that read slow_bps bytes a second */
    long slow_bps;
    const char *sub_path; /* %t is the topic */

    long topics;
    const char *prefix; /* topic names are prefix + index; unique per run, so old messages are not ours */

    const char *pub_kind; /* none, http, ws, batch */
    const char *pub_path;
    const char *pub_body; /* wrapped: {"topic":..,"data":..}; raw: the data alone */
    const char *preface;  /* GET this first on each HTTP publisher connection ("": don't) */
    long pubs;            /* publisher connections */
    long depth;           /* requests in flight per HTTP connection */
    long batch;           /* messages per batch */
    long window;          /* stop sending while readers lack more than this (0: no such limit) */
    long data_bytes;      /* size of the data object */
    double rate;          /* messages a second over all connections; 0: as fast as answers come */
    double seconds;       /* how long to publish */
    double warmup;        /* messages due in this first part are checked but not timed */

    long connect_window; /* connects under way at once; 0: all */
    double connect_timeout;
    double hold;  /* stay connected and silent this long before publishing */
    double drain; /* wait at most this long for the last deliveries */

    long offsets;            /* 1: also check that each message's "offset" rises by one */
    const char *server_pids; /* comma-separated: whose CPU time to read */
};

/* Defaults, then the command line. Prints what is wrong and exits 2 on a bad option. */
void options_read(struct options *options, int argc, char **argv);

#endif
