/* State of one run, shared by the roles. One process, one thread, one epoll. */
#ifndef CLEVRD_BENCH_RUN_H
#define CLEVRD_BENCH_RUN_H

#include <netinet/in.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "hist.h"
#include "options.h"
#include "payload.h"
#include "wsframe.h"

/* One read takes at most this much: small enough to stay in the second-level cache. */
#define READ_BYTES (128u << 10)
/* Room before it, so that the unfinished frame of the last read can be put in front. */
#define READ_HEADROOM (WS_MAX_FRAME + WS_MAX_HEAD)

enum role { ROLE_READER, ROLE_SLOW, ROLE_STALLED, ROLE_PUBLISHER };
enum state { CONN_NEW, CONN_CONNECTING, CONN_UPGRADING, CONN_LOGIN, CONN_OPEN, CONN_CLOSED };

struct bytes {
    uint8_t *data;
    size_t length;
    size_t capacity;
};

struct conn {
    int fd;
    enum role role;
    enum state state;
    uint32_t interest; /* epoll events asked for now */
    uint32_t topic;
    uint64_t started_ns;
    struct bytes carry; /* received, but not a whole frame or answer yet */
    struct bytes out;   /* composed, but not taken by the socket yet */
    size_t out_sent;
};

/* What one reader has had from one publisher connection. */
struct track {
    uint64_t highest; /* sequence; 0 before the first */
    uint64_t seen;    /* bit i: highest - i was delivered; tells a duplicate from a late one */
};

struct sub {
    struct conn conn;
    uint32_t index;
    size_t stamp_hint;
    uint64_t unique;
    uint64_t last_offset;
    struct bytes stream; /* NATS: protocol bytes that did not end with the frame */
};

struct pub {
    struct conn conn;
    uint32_t index;
    uint32_t mask;
    long in_flight;
    bool is_queued; /* in the ring of those that may send */
    bool is_dirty;  /* has composed bytes that wait for the flush at the end of the turn */
    struct pub *next_ready;
    struct pub *next_dirty;
    uint64_t *sequences; /* per topic, last one used */
    uint64_t *due_ns;    /* of requests in flight, a ring of `depth` */
    uint64_t answered;
};

struct deliveries {
    uint64_t readers;
    uint64_t expected;   /* published x readers of the topic */
    uint64_t delivered;  /* every message, repeated ones too */
    uint64_t unique;
    uint64_t holes;      /* skipped sequences that did not come later */
    uint64_t duplicates;
    uint64_t reordered;  /* came after a later one */
    uint64_t misrouted;  /* of another topic */
    uint64_t malformed;  /* no stamp in it, or a frame that is not allowed */
    uint64_t offset_breaks;
    uint64_t bytes;
    uint64_t reads;
    uint64_t last_ns;
    struct hist latency;
};

struct connecting {
    uint64_t wanted;
    uint64_t established;
    uint64_t failed;
    uint64_t pending;
    uint64_t first_ns;
    uint64_t last_ns;
    struct hist latency;
};

struct publishing {
    uint64_t issued;   /* messages */
    uint64_t requests;
    uint64_t answered;
    uint64_t ok;
    uint64_t refused;  /* any other status, or an error frame */
    uint64_t lost_connections;
    uint64_t first_ns;
    uint64_t last_ns;
    uint64_t lag_max_ns; /* how far behind its schedule the sender was at worst */
    int first_bad_status;
    char first_error[200];
    struct hist answer;
};

#define MAX_CLOSE_CODES 8
struct closes {
    unsigned codes[MAX_CLOSE_CODES];
    uint64_t counts[MAX_CLOSE_CODES];
    uint64_t without_code;
};

/* Rounds: how many readers have had message number i, when one publisher sends one topic. */
#define ROUND_SLOTS (1u << 16)
struct round {
    uint64_t sequence;
    uint64_t readers;
};

struct run {
    struct options options;
    int epoll_fd;
    struct sockaddr_in target;
    struct sockaddr_in pub_target;
    uint8_t *read_buffer;

    struct sub *subs;
    size_t sub_count;
    struct pub *pubs;
    size_t pub_count;
    struct track *tracks; /* sub x pub */
    uint64_t *readers_of; /* per topic: readers that get everything */
    uint64_t *slow_readers_of;

    struct connecting sub_connects;
    struct connecting pub_connects;
    struct publishing publishing;
    struct deliveries fast;
    struct deliveries slow;
    struct closes closes;
    uint64_t stalled_open;
    uint64_t readers_closed;
    bool is_ending; /* closes from now on are our own */
    uint64_t measure_from_ns;

    struct round *rounds;
    struct hist last_reader;

    struct pub *ready_head;
    struct pub *ready_tail;
    struct pub *dirty;
    struct bytes head;    /* HTTP head of the last request: the next is nearly always the same */
    uint32_t head_topic;
    size_t head_body_bytes;
    struct bytes scratch; /* a body while it is composed */

    double server_cpu_s;
    double load_cpu_s;
    double others_cpu_s;
    double wall_s;
};

#endif
