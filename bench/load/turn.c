/* One turn of the loop: each event goes to the role of its connection. */
#include <sys/epoll.h>
#include <sys/socket.h>

#include "clock.h"
#include "conn.h"
#include "pub.h"
#include "sub.h"
#include "turn.h"

#define EVENTS_PER_TURN 512

static void connected(struct run *run, struct conn *conn) {
    int error = 0;
    socklen_t size = sizeof error;
    getsockopt(conn->fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error) {
        conn_failed(run, conn);
        conn_close(run, conn);
        return;
    }
    conn_interest(run, conn, EPOLLIN);
    if (conn->role == ROLE_PUBLISHER)
        pub_connected(run, (struct pub *)conn);
    else
        sub_connected(run, (struct sub *)conn);
}

static void readable(struct run *run, struct conn *conn) {
    enum state before = conn->state;
    if (conn->role == ROLE_PUBLISHER)
        pub_readable(run, (struct pub *)conn);
    else
        sub_readable(run, (struct sub *)conn);
    if (conn->state == CONN_CLOSED && before < CONN_OPEN) conn_failed(run, conn);
}

static void handle(struct run *run, struct conn *conn, uint32_t events) {
    if (conn->state == CONN_CLOSED) return;
    if (conn->state == CONN_CONNECTING) {
        connected(run, conn);
        return;
    }
    if (events & EPOLLOUT && conn_flush(run, conn) && conn->role == ROLE_PUBLISHER)
        pub_writable(run, (struct pub *)conn);
    if (conn->state == CONN_CLOSED) return;
    if (events & EPOLLIN)
        readable(run, conn);
    else if (events & (EPOLLHUP | EPOLLERR))
        conn_close(run, conn);
}

void turn_take(struct run *run, uint64_t wake_ns) {
    struct epoll_event events[EVENTS_PER_TURN];
    uint64_t now = now_ns();
    struct timespec wait = timespec_of(wake_ns > now ? wake_ns - now : 0);
    int count = epoll_pwait2(run->epoll_fd, events, EVENTS_PER_TURN, &wait, NULL);
    for (int i = 0; i < count; i++) handle(run, events[i].data.ptr, events[i].events);
}
