/* The NATS client protocol over WebSocket binary frames: CONNECT, SUB, PUB, MSG, PING and PONG. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "conn.h"
#include "nats.h"

static void send_line(struct run *run, struct conn *conn, const char *line) {
    size_t length = strlen(line);
    bytes_reserve(&conn->out, length + WS_MAX_HEAD);
    conn->out.length += ws_write_masked(conn->out.data + conn->out.length, WS_BINARY, 0x3c6ef372u,
                                        (const uint8_t *)line, length);
    conn_flush(run, conn);
}

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

void nats_pong(struct run *run, struct conn *conn) { send_line(run, conn, "PONG\r\n"); }

/* MSG subject sid [reply] #bytes, and the payload behind it. */
static size_t parse_message(const char *bytes, size_t line_bytes, size_t count, struct nats_line *line) {
    const char *number = memrchr(bytes, ' ', line_bytes);
    if (!number) return 0;
    size_t payload = strtoul(number + 1, NULL, 10);
    size_t size = line_bytes + 2 + payload + 2;
    if (count < size) return 0;
    *line = (struct nats_line){NATS_MESSAGE, bytes + line_bytes + 2, payload};
    return size;
}

static enum nats_kind kind_of(const char *bytes) {
    if (!strncmp(bytes, "PING", 4)) return NATS_PING;
    if (!strncmp(bytes, "PONG", 4)) return NATS_PONG;
    if (!strncmp(bytes, "-ERR", 4)) return NATS_ERROR;
    return NATS_OTHER;
}

size_t nats_parse(const char *bytes, size_t count, struct nats_line *line) {
    const char *stop = memchr(bytes, '\r', count);
    if (!stop || (size_t)(stop - bytes) + 2 > count) return 0;
    size_t length = (size_t)(stop - bytes);
    if (!strncmp(bytes, "MSG ", 4)) return parse_message(bytes, length, count, line);
    *line = (struct nats_line){kind_of(bytes), NULL, 0};
    return length + 2;
}
