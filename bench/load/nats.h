/* The NATS client protocol over WebSocket binary frames: CONNECT, SUB, PUB, MSG, PING and PONG. */
#ifndef CLEVRD_BENCH_NATS_H
#define CLEVRD_BENCH_NATS_H

#include "run.h"

enum nats_kind { NATS_OTHER, NATS_MESSAGE, NATS_PING, NATS_PONG, NATS_ERROR };

struct nats_line {
    enum nats_kind kind;
    const char *payload; /* of a message */
    size_t length;
};

/* Introduce a connection to the server, and subscribe a reader. The server's PONG says that this has
   been carried out; only then is a reader owed anything. */
void nats_login(struct run *run, struct conn *conn);
void nats_pong(struct run *run, struct conn *conn);
/* Read one line, and the payload of a message with it. Bytes that it takes, 0 when it isn't whole. */
size_t nats_parse(const char *bytes, size_t count, struct nats_line *line);
/* A PUB with its payload, for one frame. */
size_t nats_publication(const struct run *run, uint32_t topic, const uint8_t *data, size_t length,
                        uint8_t *out, size_t room);

#endif
