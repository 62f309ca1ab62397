/* Streams over HTTP as a client sees them: a head, chunks, and events or lines in them. No sockets. */
#ifndef CLEVRD_BENCH_STREAM_H
#define CLEVRD_BENCH_STREAM_H

#include <stdbool.h>
#include <stddef.h>

struct span {
    const char *start;
    size_t length;
};

/* Size of a right 200 answer with a chunked body of this type, 0 when more bytes are needed, -1 when
   it is anything else. */
long stream_check_head(const char *bytes, size_t available, const char *type);

/* Parse one chunk (RFC 9112 section 7.1). Bytes used, 0 when more are needed, -1 when it is none. An
   empty chunk is the end of the body. */
long stream_parse_chunk(const char *bytes, size_t available, struct span *data);

/* Take the next message out of a chunk; false when there is none left. Events with a name and lines
   that begin with a type are not messages. Sets *is_broken at what is neither. */
bool stream_next_event(struct span *chunk, struct span *message, bool *is_broken);
bool stream_next_line(struct span *chunk, struct span *message, bool *is_broken);

#endif
