/* Subscribers: every message is counted, checked for its place in the order, and timed. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>

#include "clock.h"
#include "conn.h"
#include "http.h"
#include "nats.h"
#include "stream.h"
#include "sub.h"

static enum role role_of(const struct options *o, long index) {
    if (index < o->subs) return ROLE_READER;
    return index < o->subs + o->slow ? ROLE_SLOW : ROLE_STALLED;
}

static struct deliveries *deliveries_of(struct run *run, const struct sub *sub) {
    return sub->conn.role == ROLE_READER ? &run->fast : &run->slow;
}

static bool is_events(const struct run *run) { return run->options.proto[0] == 'e'; }

static bool is_stream(const struct run *run) {
    return is_events(run) || run->options.proto[0] == 'l';
}

static const char *media_type(const struct run *run) {
    return is_events(run) ? "text/event-stream" : "application/x-ndjson";
}

void subs_open(struct run *run) {
    for (size_t i = 0; i < run->sub_count; i++) {
        struct sub *sub = &run->subs[i];
        sub->index = (uint32_t)i;
        sub->conn.role = role_of(&run->options, (long)i);
        sub->conn.topic = (uint32_t)(i % (size_t)run->options.topics);
    }
}

void sub_connected(struct run *run, struct sub *sub) {
    char topic[300];
    char path[1024];
    topic_name(run, sub->conn.topic, topic, sizeof topic);
    http_fill_path(path, sizeof path, run->options.sub_path, topic);
    if (is_stream(run))
        conn_request(run, &sub->conn, path, media_type(run));
    else
        conn_upgrade(run, &sub->conn, path);
}

static void sub_established(struct run *run, struct sub *sub) {
    conn_established(&sub->conn, &run->sub_connects);
    if (sub->conn.role == ROLE_READER) run->readers_of[sub->conn.topic]++;
    if (sub->conn.role == ROLE_SLOW) run->slow_readers_of[sub->conn.topic]++;
    if (sub->conn.role == ROLE_STALLED) run->stalled_open++;
    if (sub->conn.role != ROLE_READER) conn_interest(run, &sub->conn, 0);
    deliveries_of(run, sub)->readers += sub->conn.role != ROLE_STALLED;
}

/* True when the sequence is new to this reader. A hole is taken back when its message comes late. */
static bool track_sequence(struct track *track, uint64_t sequence, struct deliveries *d) {
    if (sequence == track->highest + 1) {
        track->highest = sequence;
        track->seen = track->seen << 1 | 1;
        return true;
    }
    if (sequence > track->highest) {
        uint64_t ahead = sequence - track->highest;
        d->holes += ahead - 1;
        track->highest = sequence;
        track->seen = (ahead < 64 ? track->seen << ahead : 0) | 1;
        return true;
    }
    uint64_t behind = track->highest - sequence;
    if (behind >= 64 || track->seen >> behind & 1) {
        d->duplicates++;
        return false;
    }
    track->seen |= 1ull << behind;
    d->holes--;
    d->reordered++;
    return true;
}

static void count_round(struct run *run, const struct stamp *stamp, uint64_t now) {
    struct round *round = &run->rounds[stamp->sequence & (ROUND_SLOTS - 1)];
    if (round->sequence != stamp->sequence) *round = (struct round){stamp->sequence, 0};
    if (++round->readers == run->fast.readers && stamp->due_ns >= run->measure_from_ns)
        hist_record(&run->last_reader, now - stamp->due_ns);
}

static void check_offset(struct sub *sub, const char *message, size_t length, struct deliveries *d) {
    uint64_t offset = payload_offset(message, length);
    if (sub->last_offset && offset != sub->last_offset + 1) d->offset_breaks++;
    sub->last_offset = offset;
}

static void sub_message(struct run *run, struct sub *sub, const char *message, size_t length, uint64_t now) {
    struct deliveries *d = deliveries_of(run, sub);
    struct stamp stamp;
    if (!payload_find(message, length, &sub->stamp_hint, &stamp) ||
        stamp.publisher >= run->pub_count) {
        d->malformed++;
        return;
    }
    if (stamp.topic != sub->conn.topic) {
        d->misrouted++;
        return;
    }
    d->delivered++;
    d->bytes += length;
    d->last_ns = now;
    if (stamp.due_ns >= run->measure_from_ns) hist_record(&d->latency, now - stamp.due_ns);
    struct track *track = &run->tracks[sub->index * run->pub_count + stamp.publisher];
    if (!track_sequence(track, stamp.sequence, d)) return;
    d->unique++;
    sub->unique++;
    if (run->rounds && sub->conn.role == ROLE_READER) count_round(run, &stamp, now);
    if (run->options.offsets) check_offset(sub, message, length, d);
}

static void pong(struct run *run, struct sub *sub, const struct ws_frame *ping) {
    uint8_t frame[125 + WS_MAX_HEAD];
    if (ping->length > 125) return;
    size_t size = ws_write_masked(frame, WS_PONG, 0x5a17c3e9u, ping->payload, ping->length);
    bytes_append(&sub->conn.out, frame, size);
    conn_flush(run, &sub->conn);
}

static void take_nats_line(struct run *run, struct sub *sub, const struct nats_line *line, uint64_t now) {
    if (line->kind == NATS_MESSAGE) sub_message(run, sub, line->payload, line->length, now);
    if (line->kind == NATS_PING) nats_pong(run, &sub->conn);
    if (line->kind == NATS_PONG && sub->conn.state == CONN_LOGIN) sub_established(run, sub);
    if (line->kind == NATS_ERROR) run->fast.malformed++;
}

static size_t take_nats_lines(struct run *run, struct sub *sub, const char *bytes, size_t count,
                              uint64_t now) {
    size_t used = 0;
    size_t size;
    struct nats_line line;
    while (used < count && (size = nats_parse(bytes + used, count - used, &line))) {
        take_nats_line(run, sub, &line, now);
        used += size;
    }
    return used;
}

/* A frame need not end where a message does; the copy is made only when it doesn't. */
static void take_nats_frame(struct run *run, struct sub *sub, const struct ws_frame *frame, uint64_t now) {
    struct bytes *stream = &sub->stream;
    if (!stream->length) {
        const char *payload = (const char *)frame->payload;
        size_t used = take_nats_lines(run, sub, payload, frame->length, now);
        bytes_append(stream, payload + used, frame->length - used);
        return;
    }
    bytes_append(stream, frame->payload, frame->length);
    size_t used = take_nats_lines(run, sub, (const char *)stream->data, stream->length, now);
    memmove(stream->data, stream->data + used, stream->length - used);
    stream->length -= used;
}

static void handle_frame(struct run *run, struct sub *sub, const struct ws_frame *frame, uint64_t now) {
    if (frame->opcode == WS_PING)
        pong(run, sub, frame);
    else if (frame->opcode == WS_CLOSE)
        closes_count(&run->closes, frame);
    else if (frame->opcode != WS_PONG && run->options.proto[0] == 'n')
        take_nats_frame(run, sub, frame, now);
    else if (frame->opcode != WS_PONG)
        sub_message(run, sub, (const char *)frame->payload, frame->length, now);
}

static void handle_frames(struct run *run, struct sub *sub, const uint8_t *bytes, size_t count) {
    uint64_t now = now_ns();
    const uint8_t *end = bytes + count;
    while (bytes < end && sub->conn.state != CONN_CLOSED) {
        struct ws_frame frame;
        long used = ws_parse(bytes, (size_t)(end - bytes), &frame);
        if (used == 0) break;
        if (used < 0) {
            deliveries_of(run, sub)->malformed++;
            conn_close(run, &sub->conn);
            return;
        }
        handle_frame(run, sub, &frame, now);
        bytes += used;
    }
    conn_carry(&sub->conn, bytes, (size_t)(end - bytes));
}

static void handle_chunk(struct run *run, struct sub *sub, struct span chunk, uint64_t now) {
    struct span message;
    bool is_broken = false;
    while (is_events(run) ? stream_next_event(&chunk, &message, &is_broken)
                          : stream_next_line(&chunk, &message, &is_broken))
        sub_message(run, sub, message.start, message.length, now);
    if (is_broken) deliveries_of(run, sub)->malformed++;
}

static void handle_chunks(struct run *run, struct sub *sub, const uint8_t *bytes, size_t count) {
    uint64_t now = now_ns();
    const uint8_t *end = bytes + count;
    while (bytes < end && sub->conn.state != CONN_CLOSED) {
        struct span chunk;
        long used = stream_parse_chunk((const char *)bytes, (size_t)(end - bytes), &chunk);
        if (used == 0) break;
        if (used < 0) {
            deliveries_of(run, sub)->malformed++;
            conn_close(run, &sub->conn);
            return;
        }
        handle_chunk(run, sub, chunk, now);
        bytes += used;
    }
    conn_carry(&sub->conn, bytes, (size_t)(end - bytes));
}

static long check_answer(const struct run *run, const char *bytes, size_t count) {
    char type[64];
    if (!is_stream(run)) return http_check_upgrade(bytes, count);
    snprintf(type, sizeof type, "Content-Type: %s", media_type(run));
    return stream_check_head(bytes, count, type);
}

/* Bytes of the answer's head; 0 when it isn't whole (then all is carried over) or was refused. */
static size_t finish_upgrade(struct run *run, struct sub *sub, const uint8_t *bytes, size_t count) {
    long used = check_answer(run, (const char *)bytes, count);
    if (used < 0) conn_close(run, &sub->conn);
    if (used == 0) conn_carry(&sub->conn, bytes, count);
    if (used <= 0) return 0;
    if (run->options.proto[0] == 'n')
        nats_login(run, &sub->conn);
    else
        sub_established(run, sub);
    return (size_t)used;
}

static void read_once(struct run *run, struct sub *sub, size_t limit) {
    uint8_t *bytes = NULL;
    ssize_t count = conn_receive(run, &sub->conn, limit, &bytes);
    if (count < 0) conn_close(run, &sub->conn);
    if (count <= 0) return;
    deliveries_of(run, sub)->reads++;
    size_t used = 0;
    if (sub->conn.state == CONN_UPGRADING && !(used = finish_upgrade(run, sub, bytes, (size_t)count)))
        return;
    if (is_stream(run))
        handle_chunks(run, sub, bytes + used, (size_t)count - used);
    else
        handle_frames(run, sub, bytes + used, (size_t)count - used);
}

void sub_readable(struct run *run, struct sub *sub) { read_once(run, sub, READ_BYTES); }

void slow_subs_read(struct run *run) {
    size_t first = (size_t)run->options.subs;
    size_t bite = (size_t)(run->options.slow_bps / 50);
    if (bite > READ_BYTES) bite = READ_BYTES;
    for (size_t i = first; i < first + (size_t)run->options.slow; i++)
        if (run->subs[i].conn.state == CONN_OPEN) read_once(run, &run->subs[i], bite ? bite : 1);
}
