/* The little HTTP/1.1 a load generator needs: an upgrade checked strictly, answers with a length. */
#ifndef CLEVRD_BENCH_HTTP_H
#define CLEVRD_BENCH_HTTP_H

#include <stddef.h>

/* The sample nonce of RFC 6455 section 1.3 on every connection: its answer is known without SHA-1. */
#define WS_KEY "dGhlIHNhbXBsZSBub25jZQ=="
#define WS_ACCEPT "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="

/* Size of a right 101 answer, 0 when more bytes are needed, -1 when it is anything else. */
long http_check_upgrade(const char *bytes, size_t available);

struct http_answer {
    int status;
    const char *body;
    size_t body_bytes;
};

/* Size of a whole answer, 0 when more bytes are needed, -1 when it has no plain Content-Length. */
long http_parse_answer(const char *bytes, size_t available, struct http_answer *answer);

/* Copy a path template, with %t replaced. Cut off at `size`. */
void http_fill_path(char *out, size_t size, const char *path_template, const char *topic);

#endif
