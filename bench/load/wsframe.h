/* WebSocket frames as a client sees them: masked out, unmasked in. No sockets here. RFC 6455 section 5. */
#ifndef CLEVRD_BENCH_WSFRAME_H
#define CLEVRD_BENCH_WSFRAME_H

#include <stddef.h>
#include <stdint.h>

enum ws_opcode { WS_TEXT = 1, WS_BINARY = 2, WS_CLOSE = 8, WS_PING = 9, WS_PONG = 10 };

/* A frame header of a client with its mask: 2 + 8 + 4 bytes. */
#define WS_MAX_HEAD 14
/* A server that sends more than this in one frame is broken, as far as this load is concerned. */
#define WS_MAX_FRAME (1u << 20)

struct ws_frame {
    enum ws_opcode opcode;
    const uint8_t *payload;
    size_t length;
};

/* Parse one server frame. Bytes used, 0 when more are needed, -1 when the frame is not allowed:
   masked (5.1), with RSV bits (5.2), fragmented (no peer here fragments), or over WS_MAX_FRAME. */
long ws_parse(const uint8_t *bytes, size_t available, struct ws_frame *frame);

/* Write a final, masked frame to out (room for length + WS_MAX_HEAD); its size is returned.
   payload may be where the masked bytes go. */
size_t ws_write_masked(uint8_t *out, enum ws_opcode opcode, uint32_t mask, const uint8_t *payload,
                       size_t length);

/* Bytes of the header that ws_write_masked puts before a payload of this length. */
size_t ws_masked_head(size_t length);

#endif
