/* Connections: dialling, reading with what was left over, writing what the socket takes. */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "clock.h"
#include "conn.h"
#include "http.h"

/* A source address has 28,000 ports, and those of the last runs stay in TIME_WAIT for a minute. */
#define CONNECTIONS_PER_SOURCE 8000

void bytes_reserve(struct bytes *b, size_t room) {
    if (b->length + room <= b->capacity) return;
    size_t capacity = b->capacity ? b->capacity : 256;
    while (capacity < b->length + room) capacity *= 2;
    b->data = realloc(b->data, capacity);
    if (!b->data) abort();
    b->capacity = capacity;
}

void bytes_append(struct bytes *b, const void *data, size_t length) {
    if (!length) return;
    bytes_reserve(b, length);
    memcpy(b->data + b->length, data, length);
    b->length += length;
}

void topic_name(const struct run *run, uint32_t topic, char *out, size_t size) {
    snprintf(out, size, "%s%u", run->options.prefix, topic);
}

static void bind_source(int fd) {
    static unsigned dialled;
    unsigned host = dialled++ / CONNECTIONS_PER_SOURCE;
    struct sockaddr_in source = {.sin_family = AF_INET};
    source.sin_addr.s_addr = htonl(0x7f000001u + ((unsigned)getpid() % 250 << 16) + (host << 8));
    int on = 1;
    setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
    /* Where only 127.0.0.1 exists, the kernel's own choice serves up to its number of ports. */
    (void)!bind(fd, (struct sockaddr *)&source, sizeof source);
}

void conn_failed(struct run *run, const struct conn *conn) {
    struct connecting *stats = conn->role == ROLE_PUBLISHER ? &run->pub_connects : &run->sub_connects;
    stats->failed++;
    stats->pending--;
}

static void give_up(struct run *run, struct conn *conn) {
    conn_failed(run, conn);
    conn_close(run, conn);
}

void conn_start(struct run *run, struct conn *conn, struct connecting *stats) {
    conn->started_ns = now_ns();
    if (!stats->first_ns) stats->first_ns = conn->started_ns;
    stats->pending++;
    conn->state = CONN_CONNECTING;
    conn->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (conn->fd < 0) {
        give_up(run, conn);
        return;
    }
    int on = 1;
    setsockopt(conn->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    bind_source(conn->fd);
    const struct sockaddr_in *target =
        conn->role == ROLE_PUBLISHER ? &run->pub_target : &run->target;
    int failed = connect(conn->fd, (const struct sockaddr *)target, sizeof *target);
    if (failed && errno != EINPROGRESS) {
        give_up(run, conn);
        return;
    }
    struct epoll_event event = {.events = EPOLLOUT, .data.ptr = conn};
    conn->interest = EPOLLOUT;
    epoll_ctl(run->epoll_fd, EPOLL_CTL_ADD, conn->fd, &event);
}

void conn_interest(struct run *run, struct conn *conn, uint32_t events) {
    if (conn->interest == events || conn->state == CONN_CLOSED) return;
    struct epoll_event event = {.events = events, .data.ptr = conn};
    epoll_ctl(run->epoll_fd, EPOLL_CTL_MOD, conn->fd, &event);
    conn->interest = events;
}

bool conn_flush(struct run *run, struct conn *conn) {
    while (conn->out_sent < conn->out.length) {
        ssize_t sent = send(conn->fd, conn->out.data + conn->out_sent,
                            conn->out.length - conn->out_sent, MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno == EINTR) continue;
            if (errno != EAGAIN) {
                conn_close(run, conn);
                return false;
            }
            conn_interest(run, conn, conn->interest | EPOLLOUT);
            return true;
        }
        conn->out_sent += (size_t)sent;
    }
    conn->out.length = conn->out_sent = 0;
    conn_interest(run, conn, conn->interest & ~(uint32_t)EPOLLOUT);
    return true;
}

ssize_t conn_receive(struct run *run, struct conn *conn, size_t limit, uint8_t **start) {
    uint8_t *base = run->read_buffer + READ_HEADROOM;
    ssize_t count = recv(conn->fd, base, limit, 0);
    if (count < 0 && (errno == EAGAIN || errno == EINTR)) return 0;
    if (count <= 0) return -1;
    *start = base - conn->carry.length;
    memcpy(*start, conn->carry.data ? conn->carry.data : base, conn->carry.length);
    count += (ssize_t)conn->carry.length;
    conn->carry.length = 0;
    return count;
}

void conn_carry(struct conn *conn, const uint8_t *rest, size_t length) {
    if (length) bytes_append(&conn->carry, rest, length);
}

static void count_close(struct run *run, const struct conn *conn) {
    if (run->is_ending || conn->state != CONN_OPEN) return;
    if (conn->role == ROLE_PUBLISHER)
        run->publishing.lost_connections++;
    else if (conn->role == ROLE_STALLED)
        run->stalled_open--;
    else
        run->readers_closed++;
}

void conn_close(struct run *run, struct conn *conn) {
    if (conn->state == CONN_CLOSED) return;
    count_close(run, conn);
    conn->state = CONN_CLOSED;
    if (conn->fd >= 0) close(conn->fd);
    conn->fd = -1;
}

bool conn_upgrade(struct run *run, struct conn *conn, const char *path) {
    char request[2048];
    int length = snprintf(request, sizeof request,
                          "GET %s HTTP/1.1\r\nHost: %s\r\nUpgrade: websocket\r\n"
                          "Connection: Upgrade\r\nSec-WebSocket-Key: " WS_KEY
                          "\r\nSec-WebSocket-Version: 13\r\n\r\n",
                          path, run->options.target);
    if (length < 0 || (size_t)length >= sizeof request) abort();
    bytes_append(&conn->out, request, (size_t)length);
    conn->state = CONN_UPGRADING;
    return conn_flush(run, conn);
}

bool conn_request(struct run *run, struct conn *conn, const char *path, const char *type) {
    char request[2048];
    int length = snprintf(request, sizeof request, "GET %s HTTP/1.1\r\nHost: %s\r\nAccept: %s\r\n\r\n",
                          path, run->options.target, type);
    if (length < 0 || (size_t)length >= sizeof request) abort();
    bytes_append(&conn->out, request, (size_t)length);
    conn->state = CONN_UPGRADING;
    return conn_flush(run, conn);
}

void conn_established(struct conn *conn, struct connecting *stats) {
    conn->state = CONN_OPEN;
    stats->established++;
    stats->pending--;
    stats->last_ns = now_ns();
    hist_record(&stats->latency, stats->last_ns - conn->started_ns);
}

void closes_count(struct closes *closes, const struct ws_frame *frame) {
    if (frame->length < 2) {
        closes->without_code++;
        return;
    }
    unsigned code = (unsigned)frame->payload[0] << 8 | frame->payload[1];
    for (int i = 0; i < MAX_CLOSE_CODES; i++) {
        if (closes->codes[i] && closes->codes[i] != code) continue;
        closes->codes[i] = code;
        closes->counts[i]++;
        return;
    }
}
