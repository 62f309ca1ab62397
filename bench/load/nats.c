/* The NATS client protocol over WebSocket binary frames: CONNECT, SUB, PUB, MSG, PING and PONG. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "run.h"

static void send_line(struct run *run, struct conn *conn, const char *line) {
    size_t length = strlen(line);
    bytes_reserve(&conn->out, length + WS_MAX_HEAD);
    conn->out.length += ws_write_masked(conn->out.data + conn->out.length, WS_BINARY, 0x3c6ef372u,
                                        (const uint8_t *)line, length);
    conn_flush(run, conn);
}

/* The PONG says that the SUB before it has been carried out; only then is the reader owed anything. */
void nats_login(struct run *run, struct conn *conn) {
    char lines[600];
    char topic[300];
    topic_name(run, conn->topic, topic, sizeof topic);
    conn->state = CONN_LOGIN;
    int length = snprintf(lines, sizeof lines,
                          "CONNECT {\"verbose\":false,\"pedantic\":false,\"echo\":true}\r\n");
    if (conn->role != ROLE_PUBLISHER)
        length += snprintf(lines + length, sizeof lines - (size_t)length, "SUB %s 1\r\n", topic);
    snprintf(lines + length, sizeof lines - (size_t)length, "PING\r\n");
    send_line(run, conn, lines);
}

size_t nats_publication(const struct run *run, uint32_t topic, const uint8_t *data, size_t length,
                        uint8_t *out, size_t room) {
    char name[300];
    topic_name(run, topic, name, sizeof name);
    int head = snprintf((char *)out, room, "PUB %s %zu\r\n", name, length);
    if (head < 0 || (size_t)head + length + 2 > room) abort();
    memcpy(out + head, data, length);
    memcpy(out + (size_t)head + length, "\r\n", 2);
    return (size_t)head + length + 2;
}

/* Size of a MSG with its payload, 0 when it isn't whole: MSG subject sid [reply] #bytes */
static size_t take_message(struct run *run, struct sub *sub, const char *line, size_t line_bytes,
                           size_t available, uint64_t now) {
    const char *number = memrchr(line, ' ', line_bytes);
    if (!number) return 0;
    size_t payload = strtoul(number + 1, NULL, 10);
    size_t size = line_bytes + 2 + payload + 2;
    if (available < size) return 0;
    sub_message(run, sub, line + line_bytes + 2, payload, now);
    return size;
}

static size_t take_line(struct run *run, struct sub *sub, const char *bytes, size_t count, uint64_t now) {
    const char *stop = memchr(bytes, '\r', count);
    if (!stop || (size_t)(stop - bytes) + 2 > count) return 0;
    size_t length = (size_t)(stop - bytes);
    if (!strncmp(bytes, "MSG ", 4)) return take_message(run, sub, bytes, length, count, now);
    if (!strncmp(bytes, "PING", 4)) send_line(run, &sub->conn, "PONG\r\n");
    if (!strncmp(bytes, "PONG", 4) && sub->conn.state == CONN_LOGIN) sub_established(run, sub);
    if (!strncmp(bytes, "-ERR", 4)) run->fast.malformed++;
    return length + 2;
}

static size_t take_lines(struct run *run, struct sub *sub, const char *bytes, size_t count, uint64_t now) {
    size_t used = 0;
    size_t size;
    while (used < count && (size = take_line(run, sub, bytes + used, count - used, now))) used += size;
    return used;
}

/* A frame need not end where a message does; the copy is made only when it doesn't. */
void nats_sub_frame(struct run *run, struct sub *sub, const struct ws_frame *frame, uint64_t now) {
    struct bytes *stream = &sub->stream;
    if (!stream->length) {
        const char *payload = (const char *)frame->payload;
        size_t used = take_lines(run, sub, payload, frame->length, now);
        bytes_append(stream, payload + used, frame->length - used);
        return;
    }
    bytes_append(stream, frame->payload, frame->length);
    size_t used = take_lines(run, sub, (const char *)stream->data, stream->length, now);
    memmove(stream->data, stream->data + used, stream->length - used);
    stream->length -= used;
}

void nats_pub_frame(struct run *run, struct pub *pub, const struct ws_frame *frame) {
    const char *text = (const char *)frame->payload;
    if (memmem(text, frame->length, "PING\r\n", 6)) send_line(run, &pub->conn, "PONG\r\n");
    if (memmem(text, frame->length, "-ERR", 4)) run->publishing.refused++;
    if (pub->conn.state == CONN_LOGIN && memmem(text, frame->length, "PONG\r\n", 6))
        pub_established(run, pub);
}
