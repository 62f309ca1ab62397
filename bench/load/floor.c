/* The send floor as a server: what one core needs to hand the same bytes to N sockets, and nothing else.

   It speaks just enough HTTP for the load generator, so that it is measured by the very same receivers:
   a GET is upgraded (the generator's key is constant), a POST has its data put into clevrd's envelope
   and sent by a bare send() to one socket after the other. No queues, no slow readers, one topic: a
   socket that is full is an error. Usage: floor PORT. */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "http.h"

#define EVENTS_PER_TURN 512
#define MAX_READERS 20000
#define MAX_REQUEST 65536
/* As the daemon sets it: the kernel's work per send depends on it. */
#define SNDBUF_BYTES (128 << 10)

static const char UPGRADED[] =
    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n"
    "Sec-WebSocket-Accept: " WS_ACCEPT "\r\n\r\n";
static const char ANSWER[] =
    "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 16\r\n\r\n"
    "{\"success\":true}";

static int readers[MAX_READERS];
static int reader_count;
static unsigned long long offset;

static void die(const char *what) {
    perror(what);
    exit(1);
}

static int listen_on(uint16_t port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    int on = 1;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 4096)) die("floor: listen");
    return fd;
}

static size_t frame_of(const char *body, size_t length, char *frame, size_t room) {
    const char *data = memmem(body, length, "\"data\":", 7);
    if (!data) return 0;
    int data_bytes = (int)(body + length - 1 - (data + 7));
    int size = snprintf(frame + 4, room - 4,
                        "{\"id\":\"msg-20250101-000000.000000\",\"topic\":\"bench-0\","
                        "\"tenant_id\":\"default-tenant\",\"data\":%.*s,"
                        "\"timestamp\":\"2025-01-01T00:00:00.000000Z\",\"offset\":%llu}",
                        data_bytes, data + 7, ++offset);
    if (size < 126 || size > 65535) return 0;
    frame[0] = (char)0x81;
    frame[1] = 126;
    frame[2] = (char)(size >> 8);
    frame[3] = (char)size;
    return (size_t)size + 4;
}

static void broadcast(const char *frame, size_t size) {
    for (int i = 0; i < reader_count; i++)
        if (send(readers[i], frame, size, MSG_NOSIGNAL | MSG_DONTWAIT) != (ssize_t)size)
            die("floor: a reader is full or gone");
}

static void upgrade(int fd) {
    int bytes = SNDBUF_BYTES;
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
    if (reader_count == MAX_READERS || send(fd, UPGRADED, sizeof UPGRADED - 1, MSG_NOSIGNAL) < 0) return;
    readers[reader_count++] = fd;
}

static void publish(int fd, const char *request, size_t size) {
    char frame[MAX_REQUEST];
    const char *body = memmem(request, size, "\r\n\r\n", 4);
    size_t length = body ? frame_of(body + 4, (size_t)(request + size - body - 4), frame, sizeof frame) : 0;
    if (!length) die("floor: not a whole publish in one read");
    broadcast(frame, length);
    if (send(fd, ANSWER, sizeof ANSWER - 1, MSG_NOSIGNAL) < 0) perror("floor: answer");
}

/* The first reader that leaves ends the run: a floor has no way to forget one. */
static void leave(int fd) {
    for (int i = 0; i < reader_count; i++)
        if (readers[i] == fd) exit(0);
    close(fd);
}

static void serve(int fd) {
    static char request[MAX_REQUEST];
    ssize_t size = recv(fd, request, sizeof request, 0);
    if (size <= 0)
        leave(fd);
    else if (request[0] == 'G')
        upgrade(fd);
    else
        publish(fd, request, (size_t)size);
}

static void welcome(int epoll_fd, int listener) {
    int on = 1;
    int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    if (fd < 0) return;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event);
}

int main(int argc, char **argv) {
    int port = argc == 2 ? atoi(argv[1]) : 0;
    struct rlimit limit;
    if (port < 1 || port > 65535) {
        fprintf(stderr, "usage: floor PORT\n");
        return 2;
    }
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    int listener = listen_on((uint16_t)port);
    int epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = listener};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        struct epoll_event events[EVENTS_PER_TURN];
        int count = epoll_wait(epoll_fd, events, EVENTS_PER_TURN, -1);
        for (int i = 0; i < count; i++) {
            if (events[i].data.fd == listener)
                welcome(epoll_fd, listener);
            else
                serve(events[i].data.fd);
        }
    }
}
