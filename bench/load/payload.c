#include "payload.h"

#include <string.h>

static const char MARK[] = "\"s\":";
#define MARK_BYTES (sizeof MARK - 1)

static char *put_text(char *out, const char *text) {
    size_t length = strlen(text);
    memcpy(out, text, length);
    return out + length;
}

static char *put_number(char *out, uint64_t value) {
    char digits[20];
    size_t count = 0;
    do digits[count++] = (char)('0' + value % 10);
    while (value /= 10);
    while (count) *out++ = digits[--count];
    return out;
}

void payload_write(char *out, size_t size, const struct stamp *stamp) {
    char *end = out + size;
    char *at = put_number(put_text(out, "{\"s\":"), stamp->sequence);
    at = put_number(put_text(at, ",\"c\":"), stamp->publisher);
    at = put_number(put_text(at, ",\"k\":"), stamp->topic);
    at = put_number(put_text(at, ",\"t\":"), stamp->due_ns);
    at = put_text(at, ",\"p\":\"");
    memset(at, 'x', (size_t)(end - 2 - at));
    memcpy(end - 2, "\"}", 2);
}

/* The keys hold no digits, so the next digit begins the next number, whatever a server that parses
   and writes JSON anew puts around it. */
static const char *take_number(const char *at, const char *end, uint64_t *value) {
    while (at < end && (unsigned char)(*at - '0') > 9) at++;
    if (at == end) return NULL;
    uint64_t number = 0;
    for (; at < end && (unsigned char)(*at - '0') <= 9; at++)
        number = number * 10 + (uint64_t)(*at - '0');
    *value = number;
    return at;
}

static const char *find_mark(const char *message, size_t length, size_t *hint) {
    if (*hint + MARK_BYTES <= length && !memcmp(message + *hint, MARK, MARK_BYTES))
        return message + *hint;
    const char *found = memmem(message, length, MARK, MARK_BYTES);
    if (found) *hint = (size_t)(found - message);
    return found;
}

bool payload_find(const char *message, size_t length, size_t *hint, struct stamp *stamp) {
    const char *end = message + length;
    const char *at = find_mark(message, length, hint);
    uint64_t publisher = 0;
    uint64_t topic = 0;
    if (!at || !(at = take_number(at, end, &stamp->sequence))) return false;
    if (!(at = take_number(at, end, &publisher)) || !(at = take_number(at, end, &topic))) return false;
    if (!take_number(at, end, &stamp->due_ns)) return false;
    stamp->publisher = (uint32_t)publisher;
    stamp->topic = (uint32_t)topic;
    return true;
}

uint64_t payload_offset(const char *message, size_t length) {
    static const char key[] = "\"offset\":";
    const size_t key_bytes = sizeof key - 1;
    if (length < key_bytes + 2 || message[length - 1] != '}') return 0;
    size_t at = length - 1;
    uint64_t value = 0;
    for (uint64_t unit = 1; at && (unsigned char)(message[at - 1] - '0') <= 9; unit *= 10)
        value += unit * (uint64_t)(message[--at] - '0');
    if (at < key_bytes || memcmp(message + at - key_bytes, key, key_bytes)) return 0;
    return value;
}
