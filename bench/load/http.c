#include "http.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#define MAX_HEAD 8192

static size_t head_size(const char *bytes, size_t available) {
    const char *end = memmem(bytes, available, "\r\n\r\n", 4);
    return end ? (size_t)(end - bytes) + 4 : 0;
}

/* Value of a header, as it stands up to the end of its line; NULL when absent. */
static const char *find_header(const char *head, size_t size, const char *name, size_t *length) {
    size_t name_length = strlen(name);
    const char *line = head;
    const char *end = head + size;
    while ((line = memmem(line, (size_t)(end - line), "\r\n", 2)) && (line += 2) < end) {
        if ((size_t)(end - line) <= name_length || line[name_length] != ':') continue;
        if (strncasecmp(line, name, name_length) != 0) continue;
        const char *value = line + name_length + 1;
        while (*value == ' ') value++;
        const char *stop = memchr(value, '\r', (size_t)(end - value));
        *length = stop ? (size_t)(stop - value) : 0;
        return value;
    }
    return NULL;
}

static int header_is(const char *head, size_t size, const char *name, const char *wanted) {
    size_t length = 0;
    const char *value = find_header(head, size, name, &length);
    return value && length == strlen(wanted) && !strncasecmp(value, wanted, length);
}

long http_check_upgrade(const char *bytes, size_t available) {
    size_t size = head_size(bytes, available);
    if (!size) return available > MAX_HEAD ? -1 : 0;
    int is_right = !strncmp(bytes, "HTTP/1.1 101 ", 13) &&
                   header_is(bytes, size, "Upgrade", "websocket") &&
                   header_is(bytes, size, "Connection", "upgrade") &&
                   header_is(bytes, size, "Sec-WebSocket-Accept", WS_ACCEPT);
    return is_right ? (long)size : -1;
}

long http_parse_answer(const char *bytes, size_t available, struct http_answer *answer) {
    size_t size = head_size(bytes, available);
    if (!size) return available > MAX_HEAD ? -1 : 0;
    if (size < 16 || strncmp(bytes, "HTTP/1.1 ", 9) != 0) return -1;
    size_t digits = 0;
    const char *length = find_header(bytes, size, "Content-Length", &digits);
    if (!length || !digits) return -1;
    answer->status = atoi(bytes + 9);
    answer->body = bytes + size;
    answer->body_bytes = strtoul(length, NULL, 10);
    return available < size + answer->body_bytes ? 0 : (long)(size + answer->body_bytes);
}

void http_fill_path(char *out, size_t size, const char *path_template, const char *topic) {
    const char *mark = strstr(path_template, "%t");
    if (!mark)
        snprintf(out, size, "%s", path_template);
    else
        snprintf(out, size, "%.*s%s%s", (int)(mark - path_template), path_template, topic, mark + 2);
}
