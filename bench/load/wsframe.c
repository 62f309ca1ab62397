#include "wsframe.h"

#include <string.h>

static uint64_t big_endian(const uint8_t *bytes, unsigned count) {
    uint64_t value = 0;
    for (unsigned i = 0; i < count; i++) value = value << 8 | bytes[i];
    return value;
}

static int is_known(unsigned opcode) {
    return opcode == WS_TEXT || opcode == WS_BINARY || (opcode >= WS_CLOSE && opcode <= WS_PONG);
}

long ws_parse(const uint8_t *bytes, size_t available, struct ws_frame *frame) {
    if (available < 2) return 0;
    int is_final_without_rsv = (bytes[0] & 0xf0) == 0x80;
    int is_masked = bytes[1] & 0x80;
    if (!is_final_without_rsv || is_masked || !is_known(bytes[0] & 0x0f)) return -1;

    uint64_t length = bytes[1];
    unsigned extra = length == 127 ? 8 : length == 126 ? 2 : 0;
    if (available < 2 + extra) return 0;
    if (extra) length = big_endian(bytes + 2, extra);
    if (length > WS_MAX_FRAME) return -1;
    if (available < 2 + extra + length) return 0;

    frame->opcode = (enum ws_opcode)(bytes[0] & 0x0f);
    frame->payload = bytes + 2 + extra;
    frame->length = (size_t)length;
    return (long)(2 + extra + length);
}

size_t ws_masked_head(size_t length) { return length < 126 ? 6 : length < 65536 ? 8 : 14; }

static size_t write_length(uint8_t *out, size_t length) {
    if (length < 126) {
        out[1] = (uint8_t)(0x80 | length);
        return 2;
    }
    unsigned bytes = length < 65536 ? 2 : 8;
    out[1] = (uint8_t)(0x80 | (bytes == 2 ? 126 : 127));
    for (unsigned i = 0; i < bytes; i++) out[2 + i] = (uint8_t)(length >> (8 * (bytes - 1 - i)));
    return 2 + bytes;
}

/* Eight bytes a step: a publisher at 300,000 frames/s would otherwise spend its core here. */
static void apply_mask(uint8_t *out, const uint8_t *in, size_t length, uint32_t mask) {
    uint64_t wide = (uint64_t)mask << 32 | mask;
    size_t i = 0;
    for (; i + 8 <= length; i += 8) {
        uint64_t word;
        memcpy(&word, in + i, 8);
        word ^= wide;
        memcpy(out + i, &word, 8);
    }
    for (; i < length; i++) out[i] = in[i] ^ (uint8_t)(mask >> (8 * (i & 3)));
}

size_t ws_write_masked(uint8_t *out, enum ws_opcode opcode, uint32_t mask, const uint8_t *payload,
                       size_t length) {
    out[0] = (uint8_t)(0x80 | opcode);
    size_t head = write_length(out, length);
    memcpy(out + head, &mask, 4);
    apply_mask(out + head + 4, payload, length, mask);
    return head + 4 + length;
}
