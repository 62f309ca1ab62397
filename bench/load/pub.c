/* Publishers: messages are due by a schedule and sent by whichever connection has room. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>

#include "clock.h"
#include "conn.h"
#include "http.h"
#include "nats.h"
#include "pub.h"

/* Sends of one turn, so that reading is never put off for long by a burst that is due at once. */
#define UNITS_PER_TURN 2048
/* A publish socket with more than this waiting has no room: the next message waits, still due. */
#define SOCKET_BACKLOG_BYTES (256u << 10)

static bool is_socket(const struct run *run) {
    return !strcmp(run->options.pub_kind, "ws") || run->options.proto[0] == 'n';
}

static long unit_messages(const struct run *run) {
    return strcmp(run->options.pub_kind, "batch") ? 1 : run->options.batch;
}

static bool has_room(const struct run *run, const struct pub *pub) {
    if (pub->conn.state != CONN_OPEN) return false;
    if (is_socket(run)) return pub->conn.out.length - pub->conn.out_sent < SOCKET_BACKLOG_BYTES;
    return pub->in_flight < run->options.depth;
}

/* A ring of those with room, taken from the front: load spreads evenly over the connections. */
static void offer(struct run *run, struct pub *pub) {
    if (pub->is_queued || !has_room(run, pub)) return;
    pub->is_queued = true;
    pub->next_ready = NULL;
    if (run->ready_tail)
        run->ready_tail->next_ready = pub;
    else
        run->ready_head = pub;
    run->ready_tail = pub;
}

static struct pub *take_ready(struct run *run) {
    struct pub *pub;
    while ((pub = run->ready_head)) {
        run->ready_head = pub->next_ready;
        if (!run->ready_head) run->ready_tail = NULL;
        pub->is_queued = false;
        if (has_room(run, pub)) return pub;
    }
    return NULL;
}

void pubs_open(struct run *run) {
    for (size_t i = 0; i < run->pub_count; i++) {
        struct pub *pub = &run->pubs[i];
        pub->index = (uint32_t)i;
        pub->mask = 0x9e3779b9u * (uint32_t)(i + 1);
        pub->conn.role = ROLE_PUBLISHER;
        pub->sequences = calloc((size_t)run->options.topics, sizeof *pub->sequences);
        pub->due_ns = calloc((size_t)run->options.depth, sizeof *pub->due_ns);
        if (!pub->sequences || !pub->due_ns) abort();
    }
}

static void pub_established(struct run *run, struct pub *pub) {
    conn_established(&pub->conn, &run->pub_connects);
    offer(run, pub);
}

/* A server with a fast path for publishes may leave it for good at the first other request: so the
   same connection is measured with and without it. */
static void send_preface(struct run *run, struct pub *pub) {
    char request[1024];
    int length = snprintf(request, sizeof request, "GET %s HTTP/1.1\r\nHost: %s\r\n\r\n",
                          run->options.preface, run->options.target);
    if (length < 0 || (size_t)length >= sizeof request) abort();
    pub->conn.state = CONN_LOGIN;
    bytes_append(&pub->conn.out, request, (size_t)length);
    conn_flush(run, &pub->conn);
}

void pub_connected(struct run *run, struct pub *pub) {
    if (is_socket(run))
        conn_upgrade(run, &pub->conn, run->options.pub_path);
    else if (run->options.preface[0])
        send_preface(run, pub);
    else
        pub_established(run, pub);
}

void pub_writable(struct run *run, struct pub *pub) { offer(run, pub); }

/* Answers */

static void note_error(struct publishing *p, int status, const char *text, size_t length) {
    p->refused++;
    if (p->first_error[0]) return;
    p->first_bad_status = status;
    for (size_t i = 0; i < length && i + 1 < sizeof p->first_error; i++) {
        unsigned char byte = (unsigned char)text[i];
        p->first_error[i] = byte < ' ' || byte > '~' || byte == '"' || byte == '\\' ? ' ' : text[i];
    }
}

static void handle_answer(struct run *run, struct pub *pub, const struct http_answer *answer) {
    struct publishing *p = &run->publishing;
    uint64_t due = pub->due_ns[pub->answered++ % (uint64_t)run->options.depth];
    pub->in_flight--;
    p->answered++;
    p->last_ns = now_ns();
    if (due >= run->measure_from_ns) hist_record(&p->answer, p->last_ns - due);
    if (answer->status >= 200 && answer->status < 203)
        p->ok++;
    else
        note_error(p, answer->status, answer->body, answer->body_bytes);
}

static size_t handle_answers(struct run *run, struct pub *pub, const char *bytes, size_t count) {
    size_t used = 0;
    while (used < count) {
        struct http_answer answer;
        long size = http_parse_answer(bytes + used, count - used, &answer);
        if (size < 0 || (size > 0 && !pub->in_flight)) {
            note_error(&run->publishing, 0, bytes + used, count - used);
            conn_close(run, &pub->conn);
            return count;
        }
        if (size == 0) break;
        handle_answer(run, pub, &answer);
        used += (size_t)size;
    }
    return used;
}

static void take_nats_line(struct run *run, struct pub *pub, const struct nats_line *line) {
    if (line->kind == NATS_PING) nats_pong(run, &pub->conn);
    if (line->kind == NATS_ERROR) run->publishing.refused++;
    if (line->kind == NATS_PONG && pub->conn.state == CONN_LOGIN) pub_established(run, pub);
}

/* A publisher is sent short lines alone, each whole in its frame. */
static void take_nats_frame(struct run *run, struct pub *pub, const struct ws_frame *frame) {
    const char *bytes = (const char *)frame->payload;
    struct nats_line line;
    for (size_t used = 0, size; used < frame->length; used += size) {
        size = nats_parse(bytes + used, frame->length - used, &line);
        if (!size) return;
        take_nats_line(run, pub, &line);
    }
}

static void handle_frame(struct run *run, struct pub *pub, const struct ws_frame *frame) {
    uint8_t pong[125 + WS_MAX_HEAD];
    if (frame->opcode == WS_PING && frame->length <= 125) {
        size_t size = ws_write_masked(pong, WS_PONG, pub->mask, frame->payload, frame->length);
        bytes_append(&pub->conn.out, pong, size);
        conn_flush(run, &pub->conn);
    } else if (frame->opcode == WS_CLOSE) {
        closes_count(&run->closes, frame);
    } else if (run->options.proto[0] == 'n') {
        take_nats_frame(run, pub, frame);
    } else if (frame->opcode == WS_TEXT) {
        note_error(&run->publishing, 0, (const char *)frame->payload, frame->length);
    }
}

static size_t finish_preface(struct run *run, struct pub *pub, const char *bytes, size_t count) {
    struct http_answer answer;
    long size = http_parse_answer(bytes, count, &answer);
    if (size < 0 || (size > 0 && answer.status != 200)) conn_close(run, &pub->conn);
    if (size <= 0 || answer.status != 200) return 0;
    pub_established(run, pub);
    return (size_t)size;
}

static size_t handle_frames(struct run *run, struct pub *pub, const uint8_t *bytes, size_t count) {
    size_t used = 0;
    while (used < count && pub->conn.state != CONN_CLOSED) {
        struct ws_frame frame;
        long size = ws_parse(bytes + used, count - used, &frame);
        if (size < 0) conn_close(run, &pub->conn);
        if (size <= 0) break;
        handle_frame(run, pub, &frame);
        used += (size_t)size;
    }
    return used;
}

static size_t finish_upgrade(struct run *run, struct pub *pub, const uint8_t *bytes, size_t count) {
    long used = http_check_upgrade((const char *)bytes, count);
    if (used < 0) conn_close(run, &pub->conn);
    if (used <= 0) return 0;
    if (run->options.proto[0] == 'n')
        nats_login(run, &pub->conn);
    else
        pub_established(run, pub);
    return (size_t)used;
}

void pub_readable(struct run *run, struct pub *pub) {
    uint8_t *bytes = NULL;
    ssize_t received = conn_receive(run, &pub->conn, READ_BYTES, &bytes);
    if (received < 0) conn_close(run, &pub->conn);
    if (received <= 0) return;
    size_t count = (size_t)received;
    size_t used = 0;
    if (pub->conn.state == CONN_UPGRADING) used = finish_upgrade(run, pub, bytes, count);
    if (pub->conn.state == CONN_LOGIN && !is_socket(run))
        used = finish_preface(run, pub, (const char *)bytes, count);
    if (pub->conn.state == CONN_OPEN || (pub->conn.state == CONN_LOGIN && is_socket(run)))
        used += is_socket(run) ? handle_frames(run, pub, bytes + used, count - used)
                               : handle_answers(run, pub, (const char *)bytes + used, count - used);
    if (pub->conn.state == CONN_CLOSED) return;
    conn_carry(&pub->conn, bytes + used, count - used);
    offer(run, pub);
}

/* Composing */

static void compose_message(struct run *run, struct pub *pub, uint32_t topic, uint64_t due) {
    struct bytes *body = &run->scratch;
    size_t size = (size_t)run->options.data_bytes;
    struct stamp stamp = {++pub->sequences[topic], pub->index, topic, due};
    bool is_wrapped = run->options.pub_body[0] == 'w';
    bytes_reserve(body, size + 512);
    char *at = (char *)body->data + body->length;
    if (is_wrapped)
        at += sprintf(at, "{\"topic\":\"%s%u\",\"data\":", run->options.prefix, topic);
    payload_write(at, size, &stamp);
    at += size;
    if (is_wrapped) *at++ = '}';
    body->length = (size_t)(at - (char *)body->data);
    run->fast.expected += run->readers_of[topic];
    run->slow.expected += run->slow_readers_of[topic];
}

static void compose_head(struct run *run, uint32_t topic, size_t body_bytes) {
    char name[300];
    char path[1024];
    if (run->head.length && run->head_topic == topic && run->head_body_bytes == body_bytes) return;
    topic_name(run, topic, name, sizeof name);
    http_fill_path(path, sizeof path, run->options.pub_path, name);
    run->head.length = 0;
    bytes_reserve(&run->head, 2048);
    int length = snprintf((char *)run->head.data, 2048,
                          "POST %s HTTP/1.1\r\nHost: %s\r\nContent-Type: %s\r\n"
                          "Content-Length: %zu\r\n\r\n",
                          path, run->options.target,
                          run->options.batch > 1 ? "application/x-ndjson" : "application/json",
                          body_bytes);
    run->head.length = (size_t)length;
    run->head_topic = topic;
    run->head_body_bytes = body_bytes;
}

static void send_request(struct run *run, struct pub *pub, uint32_t topic, uint64_t due) {
    uint64_t position = pub->answered + (uint64_t)pub->in_flight++;
    pub->due_ns[position % (uint64_t)run->options.depth] = due;
    compose_head(run, topic, run->scratch.length);
    bytes_append(&pub->conn.out, run->head.data, run->head.length);
    bytes_append(&pub->conn.out, run->scratch.data, run->scratch.length);
}

static void send_frame(struct run *run, struct pub *pub, uint32_t topic) {
    struct bytes *body = &run->scratch;
    struct bytes *out = &pub->conn.out;
    bool is_nats = run->options.proto[0] == 'n';
    uint8_t wrapped[4096];
    const uint8_t *payload = body->data;
    size_t length = body->length;
    if (is_nats) {
        length = nats_publication(run, topic, body->data, body->length, wrapped, sizeof wrapped);
        payload = wrapped;
    }
    bytes_reserve(out, length + WS_MAX_HEAD);
    out->length += ws_write_masked(out->data + out->length, is_nats ? WS_BINARY : WS_TEXT, pub->mask,
                                   payload, length);
}

static void publish_unit(struct run *run, struct pub *pub, uint64_t due) {
    struct publishing *p = &run->publishing;
    uint32_t topic = 0;
    run->scratch.length = 0;
    for (long i = unit_messages(run); i > 0; i--) {
        topic = (uint32_t)(p->issued++ % (uint64_t)run->options.topics);
        compose_message(run, pub, topic, due);
        if (i > 1) bytes_append(&run->scratch, "\n", 1);
    }
    p->requests++;
    if (is_socket(run))
        send_frame(run, pub, topic);
    else
        send_request(run, pub, topic, due);
    if (pub->is_dirty) return;
    pub->is_dirty = true;
    pub->next_dirty = run->dirty;
    run->dirty = pub;
}

static void flush_dirty(struct run *run) {
    while (run->dirty) {
        struct pub *pub = run->dirty;
        run->dirty = pub->next_dirty;
        pub->is_dirty = false;
        if (pub->conn.state == CONN_OPEN) conn_flush(run, &pub->conn);
    }
}

/* Schedule */

uint64_t pubs_next_due_ns(const struct run *run) {
    if (run->options.rate <= 0) return 0;
    double interval_ns = 1e9 / run->options.rate;
    return run->publishing.first_ns + (uint64_t)((double)run->publishing.issued * interval_ns);
}

static uint64_t end_ns(const struct run *run) {
    return run->publishing.first_ns + (uint64_t)(run->options.seconds * 1e9);
}

/* By the schedule and not by the clock: a sender that fell behind still sends all of it, late. Only
   when it is a whole run behind is the rest given up, so that a run is bounded. */
static bool is_over(const struct run *run, uint64_t now) {
    if (run->options.rate <= 0) return now >= end_ns(run);
    uint64_t grace_ns = (uint64_t)((run->options.seconds + run->options.drain) * 1e9);
    return pubs_next_due_ns(run) >= end_ns(run) || now >= run->publishing.first_ns + grace_ns;
}

bool pubs_are_done(const struct run *run) {
    return run->pub_count == 0 || is_over(run, now_ns());
}

/* Readers are owed more than the window: sending faster would only fill queues. */
static bool is_window_full(const struct run *run) {
    uint64_t owed = run->fast.expected - run->fast.unique;
    return run->options.window && run->fast.readers &&
           owed >= (uint64_t)run->options.window * run->fast.readers;
}

bool pubs_send_due(struct run *run, uint64_t now) {
    bool is_blocked = false;
    for (int i = 0; i < UNITS_PER_TURN && !is_over(run, now); i++) {
        uint64_t due = pubs_next_due_ns(run);
        if (due > now) break;
        struct pub *pub = is_window_full(run) ? NULL : take_ready(run);
        if (!pub) {
            is_blocked = true;
            break;
        }
        uint64_t lag = due ? now - due : 0;
        if (lag > run->publishing.lag_max_ns) run->publishing.lag_max_ns = lag;
        publish_unit(run, pub, due ? due : now);
        offer(run, pub);
    }
    flush_dirty(run);
    return is_blocked;
}

bool pubs_have_all_answers(const struct run *run) {
    for (size_t i = 0; i < run->pub_count; i++) {
        const struct pub *pub = &run->pubs[i];
        if (pub->conn.state != CONN_OPEN) continue;
        if (pub->in_flight || pub->conn.out_sent < pub->conn.out.length) return false;
    }
    return true;
}
