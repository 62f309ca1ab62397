"""A corpus of HTTP requests for /publish and /subscribe: valid, odd, bad, hostile, pipelined.

The cases are bytes only; the tests say what the daemon should answer. In each case TOPIC stands for
a name that `numbered` replaces by one of its own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator

from clients import masked
from http_wire import PUBLISH_LINE, chunked, get, post

# A name that is replaced in every case by one of the same length.
TOPIC = "topic-0000"
# The topic of a request that is hidden in another request's bytes.
SMUGGLED = "smuggled-0000"

# A size of chunks so large that the topic stands whole in the first chunk.
CHUNK = 30

BODY = f'{{"topic":"{TOPIC}","data":{{"a":[1,2.5,"x"]}}}}'
OK = post(BODY)
INNER = post(f'{{"topic":"{SMUGGLED}","data":1}}')
GOODBYE = masked(0x8, b"\x03\xe8")
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
CHUNKED = "Transfer-Encoding: chunked"

Case = tuple[str, bytes]


def upgrade(
    query: str = f"topic={TOPIC}", /, *more: str, line: str | None = None, **fields: str | None
) -> bytes:
    """Return a WebSocket handshake and a close frame; ``fields`` replace its header fields."""
    names = {
        "Host": "test",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZQ==",
        "Sec_WebSocket_Version": "13",
        **fields,
    }
    lines = [line or f"GET /subscribe?{query} HTTP/1.1"]
    lines += [f"{name.replace('_', '-')}: {text}" for name, text in names.items() if text]
    return "\r\n".join([*lines, *more, "", ""]).encode() + GOODBYE


def data(json: str) -> bytes:
    """Return a publish of ``json`` as data."""
    return post(f'{{"topic":"{TOPIC}","data":{json}}}')


def publishes() -> Iterator[Case]:
    """Return plain publishes that are accepted, in all their forms."""
    yield "plain", OK
    for json in ("0", "-1.5e-7", '""', "[]", "{}", "true", '"\\u00e9\\ud83d\\ude00"', '"é\\n"'):
        yield f"data {json}", data(json)
    yield "data nested", data("[" * 200 + "]" * 200)
    yield "data large", data('"' + "x" * 70_000 + '"')
    yield "spaces", post(f' {{ "data" :\n\t1 ,\r\n"topic": "{TOPIC}" }} ')
    yield "unknown fields", post(f'{{"topic":"{TOPIC}","data":1,"zzz":{{"a":null}},"key":"k"}}')
    yield "twice the same field", post(f'{{"topic":"x","topic":"{TOPIC}","data":1,"data":2}}')
    yield "topic in UTF-8", post(f'{{"topic":"{TOPIC} é ☃ 😀","data":1}}')
    yield "topic escaped", post(f'{{"topic":"{TOPIC}\\u002f\\u00e9","data":1}}')
    yield "empty lines in the data", data('"\\r\\n\\r\\nPOST /publish HTTP/1.1\\r\\n"')


def headed_publishes() -> Iterator[Case]:
    """Return publishes with an unusual head, most of them legal."""
    for field in (
        "Content-Type: application/json",
        "content-type:application/x-www-form-urlencoded",
        "ACCEPT: */*",
        "Accept: application/problem+json",
        "User-Agent: a (b; c) d/1.0",
        "X-Empty:",
        "X-Spaces: \t  a \t b \t ",
        "X-Tenant-ID: acme",
        "Connection: keep-alive",
        "Connection: Keep-Alive",
        "Connection: close",
        "Connection: close, keep-alive",
        "Connection: upgrade",
        "Upgrade: websocket",
        "Upgrade: h2c",
        "Expect: 100-continue",
        "Expect: 200-ok",
        "Content-Encoding: identity",
        "Content-Encoding: gzip",
        "Content-Encoding:",
        "TE: trailers",
        "Trailer: X-A",
        "Keep-Alive: timeout=5",
        "X-Utf8: é",
        "X-Latin: \udce9",
        "X-Tenant-ID: é",
        "X-Long: " + "a" * 4000,
        "X-Long: " + "a" * 8000,
        "X-Long: " + "a" * 9000,
        "Forwarded: for=1.2.3.4",
        "Idempotency-Key: abc",
        'Idempotency-Key: "a b"',
        'Idempotency-Key: "a',
        "Idempotency-Key: a\tb",
        "Idempotency-Key: é",
        "Idempotency-Key:",
        "Idempotency-Key: " + "k" * 256,
        f"traceparent: {TRACEPARENT}",
        "traceparent: 00-0-0-00",
        "ce-id: %ff",
        "ce-specversion: 1.0",
    ):
        yield field[:40], post(BODY, field)
    event = ("ce-specversion: 1.0", "ce-id: 1", "ce-source: /a%20b", "ce-type: x")
    yield "an event", post(BODY, f"traceparent: {TRACEPARENT}", *event)
    yield "an event of odd names", post(BODY, *event, "ce-a_b: 1")
    yield "an event in UTF-8", post(BODY, *event, "ce-a: é", "ce-b: %c3%a9")
    yield "an event in Latin-1", post(BODY, *event, "ce-a: \udce9")
    yield "an event twice", post(BODY, *event, *event)
    yield "two traces", post(BODY, *[f"traceparent: {TRACEPARENT}"] * 2)
    yield "two connections", post(BODY, "Connection: keep-alive", "Connection: keep-alive")
    yield "two tenants", post(BODY, "X-Tenant-ID: a", "X-Tenant-ID: b")
    yield "the same tenant twice", post(BODY, "X-Tenant-ID: a", "x-tenant-id: a")
    yield "two keys", post(BODY, "Idempotency-Key: a", "Idempotency-Key: a")
    keyed = BODY[:-1] + ',"idempotency_key":"a"}'
    yield "the same key twice", post(keyed) + post(BODY, 'Idempotency-Key: "a"')
    yield "keys that differ", post(keyed, "Idempotency-Key: b")
    yield "other data", post(keyed) + post(keyed.replace("2.5", "2.6"))
    yield "tenant in the query", post(BODY, line="POST /publish?tenant=acme HTTP/1.1")
    yield "tenant in both", post(BODY, "X-Tenant-ID: b", line="POST /publish?tenant=a HTTP/1.1")
    for count in (100, 126, 127):
        yield f"{count} fields", post(BODY, *(f"X{n}: 1" for n in range(count)))
    yield "empty lines before", b"\r\n\r\n" + OK
    yield "empty line behind", OK + b"\r\n"
    yield "length with zeros", post(BODY, length=f"000{len(BODY)}")
    yield "no length", post("", length=None)
    yield "empty body", post("")
    yield "no host, 1.0", post(BODY, host=None, line="POST /publish HTTP/1.0")
    yield "1.0", post(BODY, line="POST /publish HTTP/1.0")
    yield "1.0 kept", post(BODY, "Connection: keep-alive", line="POST /publish HTTP/1.0") * 2
    yield "query of odd characters", post(BODY, line="POST /publish?\"<>\\^`{|}'!~#? HTTP/1.1")
    yield "query of many", post(BODY, line=f"POST /publish?{'a&' * 80} HTTP/1.1")
    yield "query not UTF-8", post(BODY, line="POST /publish?tenant=%ff HTTP/1.1")
    yield "query raw bytes", post(BODY, line="POST /publish?tenant=\udcff HTTP/1.1")


def refused_publishes() -> Iterator[Case]:
    """Return publishes that are well-formed HTTP with bad input."""
    for body in (
        "",
        "x",
        '{"topic":',
        '"a"',
        "[1]",
        "null",
        "{}",
        '{"data":1}',
        '{"topic":"","data":1}',
        '{"topic":null,"data":1}',
        '{"topic":7,"data":1}',
        '{"topic":["a"],"data":1}',
        f'{{"topic":"{"t" * 256}","data":1}}',
        f'{{"topic":"{"é" * 128}","data":1}}',
        '{"topic":"a\\u0000b","data":1}',
        '{"topic":"a\\u007f","data":1}',
        '{"topic":"a\\u0085","data":1}',
        '{"topic":"\\ud800","data":1}',
        f'{{"topic":"{TOPIC}"}}',
        f'{{"topic":"{TOPIC}","data":null}}',
        f'{{"topic":"{TOPIC}","data":}}',
        f'{{"topic":"{TOPIC}","data":NaN}}',
        f'{{"topic":"{TOPIC}","data":01}}',
        f'{{"topic":"{TOPIC}","data":"\t"}}',
        f'{{"topic":"{TOPIC}","data":1,"headers":7}}',
        f'{{"topic":"{TOPIC}","data":1,"headers":{{"a":"b"}}}}',
        BODY + "x",
        BODY + BODY,
        "\ufeff" + BODY,
        "[" * 100_000,
    ):
        yield f"body {body[:30]}", post(body)
    for broken in (b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82"):
        yield f"UTF-8 {broken!r}", post(BODY.encode().replace(b"x", broken))
        yield f"UTF-8 key {broken!r}", post(BODY.encode().replace(b"data", broken))


def paths_and_methods() -> Iterator[Case]:
    """Return requests that are not of the two kinds with a raw path, or only just."""
    for path in ("/", "/health/live", "/health/ready", "/nope", "/publish", "//publish"):
        yield f"GET {path}", get(path)
        yield f"POST {path}", post(BODY, line=f"POST {path} HTTP/1.1")
    for path in ("", "/", "/none", "/none/messages", "/%zz", "/a/b", "/none/messages?limit=0"):
        yield f"GET /topics{path}", get(f"/topics{path}")
    for line in (
        "POST /publish/ HTTP/1.1",
        "POST /publish/../publish HTTP/1.1",
        "POST /%70ublish HTTP/1.1",
        "POST /publish%20 HTTP/1.1",
        "POST /publishx HTTP/1.1",
        "POST /publish;a=b HTTP/1.1",
        "POST /publish#a HTTP/1.1",
        "POST publish HTTP/1.1",
        "POST http://test/publish HTTP/1.1",
        "POST https://test:99999999/publish HTTP/1.1",
        "POST foo:/publish HTTP/1.1",
        "POST http:///publish HTTP/1.1",
        "POST http://[::1/publish HTTP/1.1",
        "POST * HTTP/1.1",
        "PUT /publish HTTP/1.1",
        "PATCH /publish HTTP/1.1",
        "DELETE /publish HTTP/1.1",
        "OPTIONS /publish HTTP/1.1",
        "QUERY /publish HTTP/1.1",
        "PURGE /publish HTTP/1.1",
        "post /publish HTTP/1.1",
        "Post /publish HTTP/1.1",
        "POSTT /publish HTTP/1.1",
        "CONNECT test:80 HTTP/1.1",
        "TRACE /publish HTTP/1.1",
        "GET /subscribe HTTP/1.1",
        "POST /subscribe HTTP/1.1",
    ):
        yield line, post(BODY, line=line)
    for line in ("POST /topics/TOPIC/messages HTTP/1.1", "POST /topics/%zz/messages HTTP/1.1"):
        yield line, post("1", line=line.replace("TOPIC", TOPIC))
    yield "batch", post(f"[{BODY},{{}}]", line="POST /publish/batch HTTP/1.1")
    for target in (
        "*",
        "/",
        "/publish",
        "/publish/batch",
        "/subscribe?topic=a",
        "/ws",
        "/metrics",
        "/nope",
        "http://test",
        "http://test/",
        "http://test/publish",
    ):
        yield f"OPTIONS {target}", get(target, method="OPTIONS")
    yield "OPTIONS with a body", post(BODY, line="OPTIONS /publish HTTP/1.1")
    yield "OPTIONS over and over", get("/", method="OPTIONS") * 3 + OK
    for target in (
        "http://test/publish",
        "HTTP://TEST/publish",
        "https://test:8080/publish",
        "http://[::1]:80/publish",
        "http://127.0.0.1/publish?tenant=acme",
        "http://other/publish",
    ):
        yield f"absolute {target}", post(BODY, line=f"POST {target} HTTP/1.1")
    yield "absolute in 1.0", post(BODY, line="POST http://test/publish HTTP/1.0", host=None)
    yield "absolute, no path", get("http://test")
    yield "absolute, only a query", get("http://test?a=b")
    yield "absolute page of another host", get("http://example.com:81/")
    yield "HEAD", get("/health/live", method="HEAD")


def upgrades() -> Iterator[Case]:
    """Return WebSocket handshakes, accepted and refused, each followed by a close frame."""
    yield "upgrade", upgrade()
    for query in (
        f"topic={TOPIC}&last=0&buffer=7&policy=drop_newest",
        f"topic={TOPIC}&policy=circuit_breaker&tenant=acme",
        f"topic={TOPIC}&policy=latest",
        f"topic={TOPIC}+a%2fb%C3%A9",
        "",
        "topic=",
        "topic=%00",
        "topic=%ff",
        "topic=a&topic=b",
        "topic=" + "t" * 256,
        f"topic={TOPIC}&policy=foo",
        f"topic={TOPIC}&policy=",
        f"topic={TOPIC}&buffer=-1",
        f"topic={TOPIC}&buffer=0",
        f"topic={TOPIC}&buffer=1e3",
        f"topic={TOPIC}&buffer=" + "9" * 500,
        f"topic={TOPIC}&last=x",
        f"topic={TOPIC}&last=%D9%A1",
        f"topic={TOPIC}&last=1&last=2",
        f"topic={TOPIC}&tenant=a:b",
        f"topic={TOPIC}&unknown=1",
        f"topic={TOPIC}&control=1",
        f"topic={TOPIC}&control=2",
        f"topic={TOPIC}&offset=3",
        f"topic={TOPIC}&offset=3&epoch=e",
        f"topic={TOPIC}&last_event_id=e:3&since=all",
        f"topic={TOPIC}&since=2026-01-01T00:00:00%2B01:00",
        "a&" * 80,
        f"topic={TOPIC}#fragment",
    ):
        yield f"upgrade {query[:40]}", upgrade(query)
    for name, text in (
        ("Upgrade", "WebSocket"),
        ("Upgrade", "websocket, h2c"),
        ("Upgrade", "h2c"),
        ("Upgrade", None),
        ("Connection", "upgrade"),
        ("Connection", "keep-alive, Upgrade"),
        ("Connection", "keep-alive,  upgrade , x"),
        ("Connection", "Upgrade, close"),
        ("Connection", "keep-alive"),
        ("Connection", None),
        ("Sec_WebSocket_Key", None),
        ("Sec_WebSocket_Key", "short"),
        ("Sec_WebSocket_Key", "dGhlIHNhbXBsZSBub25jZQ=!"),
        ("Sec_WebSocket_Key", "A" * 24),
        ("Sec_WebSocket_Version", None),
        ("Sec_WebSocket_Version", "8"),
        ("Sec_WebSocket_Version", "13, 8"),
        ("Host", None),
        ("Host", "a b"),
    ):
        yield f"upgrade {name} {text}", upgrade(**{name: text})
    for field in (
        "Sec-WebSocket-Protocol: clevrd.v1",
        "Sec-WebSocket-Protocol: x,clevrd.v1",
        "Last-Event-ID: e:3",
        "Last-Event-ID: e",
        "Sec-WebSocket-Protocol: " + "a, " * 3000,
        "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key1: 12998 5 Y3 1  .P00",
        "X-Tenant-ID: acme",
        "Origin: http://evil.example",
        "Cookie: a=b",
        "Content-Length: 0",
        "Content-Length: 5",
        CHUNKED,
    ):
        yield f"upgrade with {field[:30]}", upgrade(f"topic={TOPIC}", field)
    yield "upgrade 1.0", upgrade(line=f"GET /subscribe?topic={TOPIC} HTTP/1.0")
    yield "upgrade of POST", upgrade(line=f"POST /subscribe?topic={TOPIC} HTTP/1.1")
    yield "upgrade of a publish", upgrade(line=PUBLISH_LINE, Content_Length="0")
    yield "upgrade absolute", upgrade(line=f"GET http://test/subscribe?topic={TOPIC} HTTP/1.1")
    yield "upgrade elsewhere", upgrade(line="GET /health/live HTTP/1.1")
    yield "upgrade nowhere", upgrade(line="GET /nope HTTP/1.1")
    for query in ("", "?tenant=acme", "?tenant=a:b", f"?topic={TOPIC}", "?tenant=%ff"):
        yield f"publish socket {query}", upgrade(line=f"GET /publish{query} HTTP/1.1")
    frame = masked(0x1, BODY[:-1].encode() + b',"ref":1}')
    socket = upgrade(line="GET /publish HTTP/1.1").removesuffix(GOODBYE)
    yield "publish socket, a frame", socket + frame + GOODBYE
    yield "publish socket, a bad frame", socket + masked(0x1, b'{"ref":"a"}') + GOODBYE
    yield "publish socket, a request", socket + OK


def chunked_publishes() -> Iterator[Case]:
    """Return publishes in chunks, well-formed or not."""
    body = BODY.encode()

    def case(sent: bytes, *fields: str, line: str = PUBLISH_LINE) -> bytes:
        return post(sent, *fields, line=line, length=None)

    for size in (1, 7, 1000):
        own = body.replace(TOPIC.encode(), b"chunks-of-%d" % size)
        yield f"chunks of {size}", case(chunked(own, size), CHUNKED)
    yield "chunk extension", case(chunked(body, CHUNK, extension=b';a="b"'), CHUNKED)
    yield "trailer", case(chunked(body, CHUNK, trailer=b"X-Tenant-ID: evil\r\n"), CHUNKED)
    yield "CHUNKED", case(chunked(body, CHUNK), "TRANSFER-ENCODING: CHUNKED")
    for coding in ("gzip, chunked", "chunked, gzip", "identity", "xchunked", "chunked, chunked"):
        yield coding, case(chunked(body, CHUNK) + INNER, f"Transfer-Encoding: {coding}")
    yield "chunked in 1.0", case(chunked(body, CHUNK), CHUNKED, line="POST /publish HTTP/1.0")
    for broken in (
        b"zz\r\nabc\r\n0\r\n\r\n",
        b"-5\r\nabcde\r\n0\r\n\r\n",
        b"0x5\r\nabcde\r\n0\r\n\r\n",
        b"5 \r\nabcde\r\n0\r\n\r\n",
        b"5\nabcde\r\n0\r\n\r\n",
        b"5\r\nabcdeXX0\r\n\r\n",
        b"ffffffffffffffffff\r\nabc",
        b"8000000000000000\r\nabc",
        b"7fffffffffffffff\r\nabc",
        b"100001\r\nabc",
        b"1\r\n{\r\n00100000\r\nabc",
        b"0\r\nX : y\r\n\r\n",
        b"0\n\n",
        b"\r\n0\r\n\r\n",
    ):
        yield f"chunk {broken!r}", case(broken + INNER, CHUNKED)


def hostile() -> Iterator[Case]:
    """Return requests that two parsers could read differently, each followed by a request.

    The daemon has to refuse each of them and close the connection.
    """
    size = len(BODY)
    behind = BODY.encode() + INNER
    yield "TE and CL", post(chunked(BODY.encode(), CHUNK) + INNER, CHUNKED)
    yield "CL and TE", post(b"0\r\n\r\n" + INNER, CHUNKED)
    for coding in (
        "Transfer-Encoding:",
        "Transfer-Encoding : chunked",
        "Transfer-Encoding:\tchunked",
    ):
        yield f"CL and {coding!r}", post(b"0\r\n\r\n" + INNER, coding)
    yield "TE twice", post(b"0\r\n\r\n" + INNER, CHUNKED, CHUNKED, length=None)
    for length in (
        f"+{size}",
        f"-{size}",
        f"0x{size:x}",
        f"{size}, {size}",
        f"{size} {size}",
        f"{size}.0",
        f"{size}_0",
        "٣",  # a digit, but not one of HTTP's
        "1e1",
        " ",
        "99999999999999999999999",
        str(1 << 63),
        str(1 << 64),
        "1040385",
        "4294967297",
    ):
        yield f"length {length}", post(behind, length=length)
    for second in (str(size), str(size + 5), "0"):
        yield f"second length {second}", post(behind, f"Content-Length: {second}", length=str(size))
    for field in (
        "X: a\r\n b",
        "X: a\r\n\tb",
        "X: a\nY: b",
        "X: a\rY: b",
        "X: a\0b",
        "X: a\x01b",
        "X: a\x7fb",
        "X a",
        "X : a",
        " X: a",
        ": a",
        "X\0: a",
        "X(: a",
        "é: a",
        "Host: other",
        "host: test",
        "X: a\n\nPOST /publish HTTP/1.1",
    ):
        yield f"field {field!r}", post(behind, field, length=str(size))
    for host in (None, "a b", "a,b", "a/b", "a\tb", "test\x00", "ä", "a@b", "a?b"):
        yield f"host {host!r}", post(behind, host=host, length=str(size))
    for line in (
        "POST /publish",
        "POST /publish HTTP/0.9",
        "POST /publish HTTP/1.2",
        "POST /publish HTTP/2.0",
        "POST /publish HTTP/1.10",
        "POST /publish http/1.1",
        "POST /publish HTTP/1.1 ",
        "POST\t/publish\tHTTP/1.1",
        " POST /publish HTTP/1.1",
        "POST /publish?a b HTTP/1.1",
        "POST  /publish HTTP/1.1",
        "POST /publish  HTTP/1.1",
        "POST   /publish   HTTP/1.1",
        "POST /publish\t HTTP/1.1",
        "POST /publish?é HTTP/1.1",
        "POST /é HTTP/1.1",
        "POST /publish?\udcff HTTP/1.1",
        "POST /publish HTTP/1.1\t",
        "POST /publish HTTP/3.0",
        "POST /publish HTTP/0.0",
        "POST /publish?" + "a" * 8_170 + " HTTP/1.1",
        "POST /publish?\x00 HTTP/1.1",
        "POST /publish?\x7f HTTP/1.1",
        "POST /publish?" + "a" * 9000 + " HTTP/1.1",
        "PRI * HTTP/2.0",
        "HTTP/1.1 200 OK",
        "\x16\x03\x01\x02\x00\x01\x00\x01",
    ):
        yield f"line {line[:30]!r}", post(behind, line=line, length=str(size))
    yield "bare LF", OK.replace(b"\r\n", b"\n") + INNER
    yield "bare CR", OK.replace(b"\r\n", b"\r") + INNER
    yield "LF CR", OK.replace(b"\r\n", b"\n\r") + INNER
    for count in (128, 1000):
        yield f"{count + 2} fields", post(behind, *["a:"] * count, length=str(size))
    yield "field of 9,000 bytes", post(behind, "X: " + "a" * 9000, length=str(size))
    yield "name of 9,000 bytes", post(behind, "a" * 9000 + ": b", length=str(size))
    for form in (
        "//test/publish:",
        "publish",
        "*",
        "http://",
        "http:///publish",
        "http:/publish",
        "http://a@test/publish",
        "http://a:b@test/publish",
        "http://test:/publish",
        "http://test:0x50/publish",
        "http://test:65536/publish",
        "http://test:80:80/publish",
        "http://te st/publish",
        "http://te%73t/publish",
        "http://[::1/publish",
        "http://[test]/publish",
        "http://test,other/publish",
        "http://test\\publish",
        "ws://test/publish",
        "ftp://test/publish",
        "file:///publish",
        "javascript://test/publish",
        "test:80",
    ):
        absolute = f"POST {form} HTTP/1.1"
        yield f"target {form}", post(behind, line=absolute, length=str(size))
    yield "page of a bad host", get("/").replace(b"test", b"a b") + INNER
    yield "page in 2.0", get("/health/live", version="2.0") + INNER
    yield "zeros", b"\0" * 100
    yield "0.9", b"GET /health\r\n\r\n" + INNER


def odd() -> Iterator[Case]:
    """Return requests that look hostile and are not, and bytes that never become a request."""
    size = len(BODY)
    yield "body is a request", post(INNER)
    yield "length 0 and a request", post(OK, length="0")
    yield "length too short by a request", post(BODY.encode() + OK, length=str(size))
    for host in ("", "[::1]:80", "localhost.", "a_b"):
        yield f"host {host!r}", post(BODY, host=host)
    yield "long query", post(BODY, line=f"POST /publish?{'a' * 7000} HTTP/1.1")
    yield "nothing", b""
    yield "only empty lines", b"\r\n" * 20
    yield "cut 0.9", b"GET /health\r\n"
    yield "cut line", b"POST /publ"
    yield "cut head", OK[:40]
    yield "cut body", OK[:-3]
    yield "cut elsewhere", b"GET /hea"


def pipelines() -> Iterator[Case]:
    """Return several requests in a row."""
    parts = {
        "ok": OK,
        "bad": post("{"),
        "close": post(BODY, "Connection: close"),
        "chunked": post(chunked(BODY.encode(), CHUNK), CHUNKED, length=None),
        "live": get("/health/live"),
        "404": get("/nope"),
        "404 with body": post(BODY, line="POST /nope HTTP/1.1"),
        "no upgrade": upgrade("topic=").removesuffix(GOODBYE),
    }
    for first_name, first in parts.items():
        for second_name, second in parts.items():
            yield f"{first_name}, {second_name}, ok", first + second + OK
        yield f"{first_name}, upgrade", first + upgrade()
        yield f"{first_name}, cut", first + OK[:-5]
    yield "300 publishes", OK * 300
    yield "40 of each", (OK + get("/health/live")) * 40
    for name, sent in hostile():
        yield f"ok, {name}", OK + sent
    yield "upgrade, publish", upgrade().removesuffix(GOODBYE) + OK
    yield "upgrade, ping", upgrade().removesuffix(GOODBYE) + masked(0x9, b"hi") + GOODBYE
    yield "upgrade twice", upgrade().removesuffix(GOODBYE) + upgrade()


def numbered(cases: Iterable[Case]) -> list[Case]:
    """Return ``cases``, each with topics of its own."""
    return [
        (f"{number}: {name}", sent.replace(b"-0000", b"-%04d" % number))
        for number, (name, sent) in enumerate(cases, start=1)
    ]


FAMILIES: tuple[Callable[[], Iterator[Case]], ...] = (
    publishes,
    headed_publishes,
    refused_publishes,
    paths_and_methods,
    upgrades,
    chunked_publishes,
    hostile,
    odd,
    pipelines,
)
CORPUS = numbered(case for family in FAMILIES for case in family())

# One case for every kind of input that the raw path tells apart, each short enough to be cut at
# every byte.
SHORT = {
    "plain": OK,
    "refused": post("{"),
    "tenant and problem": post("[", "X-Tenant-ID: a", "Accept: application/problem+json"),
    "two": OK + OK,
    "aiohttp's": get("/health/live") + OK,
    "chunked": post(chunked(BODY.encode(), CHUNK), CHUNKED, length=None),
    "upgrade": upgrade(),
    "publish socket": upgrade(line="GET /publish HTTP/1.1"),
    "upgrade of aiohttp's": upgrade(Connection="Upgrade, keep-alive"),
    "no upgrade": upgrade("topic=").removesuffix(GOODBYE) + OK,
    "absolute": get("http://test:80/nope"),
    "two spaces": get("/nope") + get(" /"),
    "version": get("/", version="2.0"),
    "raw UTF-8": get("/é"),
    "OPTIONS": get("*", method="OPTIONS") + get("/nope"),
    "cut head": get("/nope") + b"GET / HT",
    "chunk too large": post(b"1\r\n{\r\nfffffff\r\nabc", CHUNKED, length=None),
    "CL and TE": post(b"0\r\n\r\n" + INNER, CHUNKED),
    "obs-fold": post(INNER, "X: a\r\n b"),
    "bare LF": OK.replace(b"\r\n", b"\n"),
}


def mutated(source: random.Random, number: int) -> bytes:
    """Return a request of the corpus with a few bytes changed, doubled, moved or removed."""
    chosen = source.choice([OK, OK + OK, upgrade(), *SHORT.values()])
    sent = bytearray(chosen.replace(b"-0000", b"-%04d" % number))
    for _ in range(source.randint(1, 3)):
        at = source.randrange(len(sent))
        match source.randrange(4):
            case 0:
                sent[at] = source.choice(b'\0\t\n\r !"#%:;,/?+-0159AZaz{}[]\x7f\x80\xff')
            case 1:
                del sent[at : at + source.choice([1, 1, 2, 10])]
            case 2:
                sent[at:at] = sent[at : at + source.choice([1, 2, 40])]
            case _:
                sent[at:at] = source.choice([b"\r\n", b"\n", b" ", b",", b"0", b"\r\n\r\n"])
    return bytes(sent)
