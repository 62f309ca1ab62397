#include "stream.h"

#include <string.h>
#include <strings.h>

#define MAX_HEAD 8192
#define MAX_CHUNK (1u << 20)

static bool has_field(const char *head, size_t size, const char *field) {
    size_t length = strlen(field);
    for (const char *line = head; (line = memmem(line, (size_t)(head + size - line), "\r\n", 2));) {
        line += 2;
        if ((size_t)(head + size - line) >= length && !strncasecmp(line, field, length)) return true;
    }
    return false;
}

long stream_check_head(const char *bytes, size_t available, const char *type) {
    const char *end = memmem(bytes, available, "\r\n\r\n", 4);
    if (!end) return available > MAX_HEAD ? -1 : 0;
    size_t size = (size_t)(end - bytes) + 4;
    bool is_right = !strncmp(bytes, "HTTP/1.1 200 ", 13) && has_field(bytes, size, type) &&
                    has_field(bytes, size, "Transfer-Encoding: chunked\r\n");
    return is_right ? (long)size : -1;
}

static int hex_value(char digit) {
    if (digit >= '0' && digit <= '9') return digit - '0';
    return digit >= 'a' && digit <= 'f' ? digit - 'a' + 10 : -1;
}

long stream_parse_chunk(const char *bytes, size_t available, struct span *data) {
    size_t size = 0;
    size_t at = 0;
    for (; at < available && bytes[at] != '\r'; at++) {
        int value = hex_value(bytes[at]);
        if (value < 0 || (size = size * 16 + (size_t)value) > MAX_CHUNK) return -1;
    }
    if (available < at + 2 + size + 2) return 0;
    if (!at || bytes[at + 1] != '\n' || memcmp(bytes + at + 2 + size, "\r\n", 2)) return -1;
    data->start = bytes + at + 2;
    data->length = size;
    return (long)(at + 2 + size + 2);
}

/* Cut the next line off; false when none ends here. */
static bool take_line(struct span *chunk, struct span *line) {
    const char *end = memchr(chunk->start, '\n', chunk->length);
    if (!end) return false;
    line->start = chunk->start;
    line->length = (size_t)(end - chunk->start);
    chunk->length -= line->length + 1;
    chunk->start = end + 1;
    return true;
}

static bool starts_with(const struct span *line, const char *word) {
    size_t length = strlen(word);
    return line->length >= length && !memcmp(line->start, word, length);
}

bool stream_next_event(struct span *chunk, struct span *message, bool *is_broken) {
    bool is_named = false;
    struct span line;
    while (take_line(chunk, &line)) {
        if (line.length == 0)
            is_named = false;
        else if (starts_with(&line, "event: "))
            is_named = true;
        else if (starts_with(&line, "data: ")) {
            if (is_named) continue;
            message->start = line.start + 6;
            message->length = line.length - 6;
            return true;
        } else if (!starts_with(&line, "id: ") && !starts_with(&line, "retry: ") && line.start[0] != ':')
            *is_broken = true;
    }
    *is_broken = *is_broken || chunk->length;
    return false;
}

bool stream_next_line(struct span *chunk, struct span *message, bool *is_broken) {
    struct span line;
    /* A keep-alive is a space before whatever comes next. */
    while (chunk->length && chunk->start[0] == ' ') {
        chunk->start++;
        chunk->length--;
    }
    while (take_line(chunk, &line)) {
        if (starts_with(&line, "{\"type\":")) continue;
        if (!starts_with(&line, "{")) *is_broken = true;
        *message = line;
        return true;
    }
    *is_broken = *is_broken || chunk->length;
    return false;
}
