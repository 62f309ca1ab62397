/* Connections: dialling, reading with what was left over, writing what the socket takes. */
#ifndef CLEVRD_BENCH_CONN_H
#define CLEVRD_BENCH_CONN_H

#include "run.h"

void bytes_reserve(struct bytes *b, size_t room);
void bytes_append(struct bytes *b, const void *data, size_t length);
void topic_name(const struct run *run, uint32_t topic, char *out, size_t size);
void conn_start(struct run *run, struct conn *conn, struct connecting *stats);
/* Count a connection that was not established as failed. */
void conn_failed(struct run *run, const struct conn *conn);
void conn_interest(struct run *run, struct conn *conn, uint32_t events);
/* Hand composed bytes to the socket; what it does not take waits for EPOLLOUT. False: it is gone. */
bool conn_flush(struct run *run, struct conn *conn);
/* Read once. Bytes at *start (what was carried over, and what came), 0 for nothing, -1 for the end. */
ssize_t conn_receive(struct run *run, struct conn *conn, size_t limit, uint8_t **start);
void conn_carry(struct conn *conn, const uint8_t *rest, size_t length);
void conn_close(struct run *run, struct conn *conn);
bool conn_upgrade(struct run *run, struct conn *conn, const char *path);
/* Ask for a stream of this media type; the answer is checked like an upgrade's. */
bool conn_request(struct run *run, struct conn *conn, const char *path, const char *type);
void conn_established(struct conn *conn, struct connecting *stats);
/* Count the code of a close frame that a server sent. */
void closes_count(struct closes *closes, const struct ws_frame *frame);

#endif
