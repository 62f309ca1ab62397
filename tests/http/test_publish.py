"""POST /publish over real sockets, on the raw path and through aiohttp."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import pytest
from clients import small_socket, subscribe, upgrade_request
from daemons import Daemon, running, until
from http_wire import Steady, ask, chunked, get, post, read_response, responses, talk

from clevrd.config import Config
from clevrd.control.adaptive_throttler import ThrottleSample
from clevrd.core.publish_request import PublishRequest
from clevrd.core.topic import Topic
from clevrd.hub import PublishAnswer, Published
from clevrd.tenants import Tenant

MIB = 1 << 20
LIMIT = Config().max_message_bytes
OK = post('{"topic":"t","data":1}')
BODY = '{"topic":"fresh","data":1}'


@pytest.fixture(params=[True, False], ids=["raw", "aiohttp"])
async def daemon(request: pytest.FixtureRequest) -> AsyncIterator[Daemon]:
    """A daemon with its defaults; each test has it answer both ways."""
    async with running(raw_paths=request.param, throttle_scope="global") as running_daemon:
        yield running_daemon


def body(**fields: Any) -> bytes:
    """Return a publish of ``fields``, with a topic that nobody else uses and data unless given."""
    return post(json.dumps({"topic": "fresh", "data": 1, **fields}))


class Bad(NamedTuple):
    """One bad request: what is sent, and the refusal it gets."""

    sent: bytes
    # Part of the sentence: what is wrong, or what to do.
    says: str
    status: int = 400
    code: str = "invalid_request"


BAD_INPUT = {
    "no body": Bad(post(""), "body is empty; send"),
    "no length": Bad(post("", length=None), "body is empty; send"),
    "not JSON": Bad(post("topic=t&data=1"), "not JSON at byte 4; send"),
    "truncated": Bad(post('{"topic":"fresh","data":'), "not complete JSON; send"),
    "two values": Bad(post('{"topic":"fresh","data":1}{}'), "not JSON at byte 27; send"),
    "array": Bad(post('[{"topic":"fresh","data":1}]'), "body is an array, not an object; send"),
    "string": Bad(post('"fresh"'), "body is a string, not an object; send"),
    "null": Bad(post("null"), "body is null, not an object; send"),
    "topic missing": Bad(post('{"data":1}'), "topic is missing; send"),
    "topic null": Bad(body(topic=None), "topic is null; send"),
    "topic a number": Bad(body(topic=7), "topic is a number; send"),
    "topic an array": Bad(body(topic=["a"]), "topic is an array; send"),
    "topic empty": Bad(body(topic=""), "1 to 255 bytes"),
    "topic of 256 bytes": Bad(body(topic="t" * 256), "has 256 bytes; 255 are allowed"),
    "topic of 128 letters": Bad(post('{"topic":"%s","data":1}' % ("é" * 128)), "has 256 bytes"),
    "topic with NUL": Bad(body(topic="a\0b"), "control character; remove"),
    "topic with a newline": Bad(body(topic="a\nb"), "control character; remove"),
    "topic with DEL": Bad(body(topic="a\x7f"), "control character; remove"),
    "topic with C1": Bad(body(topic="\x85"), "control character; remove"),
    "topic half a pair": Bad(
        post('{"topic":"\\ud800","data":1}'), "\\ud800 at byte 10, which is half"
    ),
    "data half a pair": Bad(body(data="\ud800"), "\\ud800 at byte 28, which is half"),
    "byte order mark": Bad(post('\ufeff{"topic":"fresh","data":1}'), "byte order mark (EF BB BF)"),
    "data missing": Bad(post('{"topic":"fresh"}'), "missing or null"),
    "data null": Bad(body(data=None), "missing or null"),
    "data NaN": Bad(post('{"topic":"fresh","data":NaN}'), "not JSON at byte 24; send"),
    "bad UTF-8 in data": Bad(post(b'{"topic":"fresh","data":"\xff"}'), "UTF-8 at byte 25"),
    "bad UTF-8 in a topic": Bad(post(b'{"topic":"\xc3(","data":1}'), "UTF-8 at byte 10"),
    "bad UTF-8 in a key": Bad(post(b'{"topic":"fresh","\xff":1,"data":1}'), "UTF-8"),
    "overlong UTF-8": Bad(post(b'{"topic":"fresh","data":"\xc0\xaf"}'), "UTF-8"),
    "surrogate in UTF-8": Bad(post(b'{"topic":"fresh","data":"\xed\xa0\x80"}'), "UTF-8"),
    "bad UTF-8 behind": Bad(post(b'{"topic":"fresh","data":1}\xff'), "UTF-8"),
    "key empty": Bad(body(idempotency_key=""), "key must be 1 to 255 printable"),
    "key of 256": Bad(body(idempotency_key="k" * 256), "key must be 1 to 255 printable"),
    "key with a newline": Bad(body(idempotency_key="a\nb"), "key must be 1 to 255 printable"),
    "key not ASCII": Bad(body(idempotency_key="é"), "key must be 1 to 255 printable"),
    "key a number": Bad(body(idempotency_key=7), "idempotency_key is a number; send a string"),
    "key header empty": Bad(post(BODY, "Idempotency-Key:"), "key must be 1 to 255 printable"),
    "key header quoted badly": Bad(post(BODY, 'Idempotency-Key: "a'), 'one string, "KEY"'),
    "key header twice": Bad(post(BODY, "Idempotency-Key: a", "Idempotency-Key: a"), "sent twice"),
    "keys that differ": Bad(
        post('{"topic":"fresh","data":1,"idempotency_key":"a"}', 'Idempotency-Key: "b"'),
        "differ; send one",
    ),
    "100,000 brackets": Bad(
        post("[" * 100_000), "body is nested too deeply (512 levels are allowed)"
    ),
    "100,000 brackets as data": Bad(
        post('{"topic":"fresh","data":' + "[" * 100_000 + "]" * 100_000 + "}"), "flatten"
    ),
    "100,000 objects": Bad(post('{"topic":"fresh","data":' + '{"a":' * 100_000), "flatten"),
    "gzip": Bad(
        post(gzip.compress(b'{"topic":"fresh","data":1}'), "Content-Encoding: gzip"),
        "send it as plain JSON",
        415,
        "unsupported_media_type",
    ),
    "unknown coding": Bad(
        post('{"topic":"fresh","data":1}', "Content-Encoding: identity, x"),
        "send it as plain JSON",
        415,
        "unsupported_media_type",
    ),
    "declared too large": Bad(
        post("", length=str(LIMIT + 1)), "send less, or raise", 413, "message_too_large"
    ),
    "too large": Bad(
        post('{"topic":"fresh","data":"' + "x" * MIB + '"}'), "send less", 413, "message_too_large"
    ),
    "too large in chunks": Bad(
        post(chunked(b" " * (LIMIT + 1), 65_536), "Transfer-Encoding: chunked", length=None),
        "larger than 1040384 bytes",
        413,
        "message_too_large",
    ),
    "tenant malformed": Bad(
        post('{"topic":"fresh","data":1}', "X-Tenant-ID: a:b"), "1 to 64 letters, digits"
    ),
    "wrong method": Bad(
        post('{"topic":"fresh","data":1}', line="PUT /publish HTTP/1.1"),
        "or POST",
        405,
        "method_not_allowed",
    ),
}


@pytest.mark.parametrize("bad", BAD_INPUT.values(), ids=BAD_INPUT)
async def test_bad_input_gets_its_4xx_and_publishes_nothing(daemon: Daemon, bad: Bad) -> None:
    """A status, a code, a sentence that helps; no message, no topic, and the daemon goes on."""
    await ask(daemon.port, OK)

    answer = await ask(daemon.port, bad.sent)

    assert (answer.status, answer.code) == (bad.status, bad.code)
    assert answer.json.keys() == {"success", "error", "code", "retryable"}
    assert (answer.json["success"], answer.json["retryable"]) == (False, False)
    assert bad.says in answer.json["error"]
    assert answer.json["error"].endswith(".")
    assert answer.headers["content-type"] == "application/json; charset=utf-8"
    assert [topic.name for topic in daemon.hub.topics] == ["t"]
    assert (await ask(daemon.port, OK)).json["offset"] == 2
    assert daemon.hub.counters.refused == {bad.code: 1}


async def test_connection_outlives_a_refused_body(daemon: Daemon) -> None:
    """What was wrong is in the body alone, so the next request on the connection is served."""
    sent = post("{") + OK + post("[]") + OK + get("/health/live", "Connection: close")

    answers = responses(await talk(daemon.port, [sent]))

    assert [answer.status for answer in answers] == [400, 200, 400, 200, 200]


async def test_405_lists_what_is_allowed(daemon: Daemon) -> None:
    """RFC 9110 §15.5.6."""
    answer = await ask(daemon.port, get("/publish/batch"))

    assert (answer.status, answer.headers["allow"]) == (405, "POST, OPTIONS")


async def test_refusal_is_problem_json_for_who_asks(daemon: Daemon) -> None:
    """RFC 9457: type, title, status and detail, and the same code and retryable."""
    accept = "Accept: application/problem+json, application/json;q=0.5"

    answer = await ask(daemon.port, post("{", accept))

    assert answer.headers["content-type"] == "application/problem+json"
    detail = answer.json.pop("detail")
    assert "not complete JSON" in detail
    assert answer.json | {"detail": detail} == {
        "type": "about:blank",
        "title": "Bad Request",
        "status": 400,
        "detail": detail,
        "code": "invalid_request",
        "retryable": False,
    }


async def test_accepted_publish_says_where_the_message_is(daemon: Daemon) -> None:
    """Id, offset, epoch, and how many subscribers there were: in all, behind, slow."""
    first = (await ask(daemon.port, OK)).json
    async with subscribe(daemon.ws_url):
        second = (await ask(daemon.port, OK)).json

    assert first.keys() == {
        "success",
        "message_id",
        "offset",
        "epoch",
        "subscribers",
        "lagging",
        "slow",
    }
    assert (first["success"], first["offset"], first["subscribers"]) == (True, 1, 0)
    assert (second["success"], second["offset"], second["subscribers"]) == (True, 2, 1)
    assert first["epoch"] == second["epoch"]
    assert first["message_id"] < second["message_id"]


@pytest.mark.parametrize(
    "data", ['{ "a" : [1e2, "\\u00e9\\/"] ,"a":"é😀" }', "0.10", '""', "false"]
)
async def test_data_arrives_byte_for_byte(daemon: Daemon, data: str) -> None:
    """Numbers, escapes, order, doubles and spaces are the publisher's."""
    async with subscribe(daemon.ws_url) as reader:
        answer = await ask(daemon.port, post('{"data": ' + data + ' , "topic":"t"}'))
        message = await reader.recv()

    assert f'"data":{data},"timestamp":' in str(message)
    assert answer.json["message_id"] in str(message)


async def test_topic_of_255_bytes_and_body_of_the_limit_are_taken() -> None:
    """The limits themselves are allowed."""
    start, end = '{"topic":"%s","data":"' % ("é" * 127 + "t"), '"}'
    padding = "x" * (2000 - len((start + end).encode()))
    for raw_paths in (True, False):
        async with running(raw_paths=raw_paths, max_message_bytes=2000) as daemon:
            whole = await ask(daemon.port, post(start + padding + end))
            one_more = await ask(daemon.port, post(start + padding + "x" + end))

            assert (whole.status, one_more.status) == (200, 413)


async def test_missing_topics_are_created_up_to_the_limit() -> None:
    """Over the limit: 503 that says which limit and when to come back; old topics go on."""
    for raw_paths in (True, False):
        async with running(raw_paths=raw_paths, max_topics_per_tenant=1) as daemon:
            await ask(daemon.port, OK)

            answer = await ask(daemon.port, body())

            assert (answer.status, answer.code) == (503, "unavailable")
            assert answer.json["retryable"] is True
            assert answer.headers["retry-after"] == "60"
            assert "CLEVRD_MAX_TOPICS_PER_TENANT" in answer.json["error"]
            assert (await ask(daemon.port, OK)).json["offset"] == 2


async def test_draining_daemon_refuses_publishes_with_503(daemon: Daemon) -> None:
    """A publisher learns that it may come back."""
    daemon.hub.is_draining = True

    answer = await ask(daemon.port, OK)

    assert (answer.status, answer.code) == (503, "unavailable")
    assert answer.json["retryable"] is True
    assert answer.headers["retry-after"] == "1"
    assert len(daemon.hub.topics) == 0


async def test_bug_in_the_daemon_is_a_500_without_details(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An error nobody thought of is answered, logged once, counted, and ends nothing."""

    def fail(topic: Topic, request: PublishRequest) -> Published:
        raise ZeroDivisionError("inside information")

    monkeypatch.setattr(daemon.hub, "publish", fail)

    answer = await ask(daemon.port, post('{"topic":"t","data":1}', "Connection: keep-alive"))

    assert (answer.status, answer.code) == (500, "internal_error")
    assert b"inside information" not in answer.body
    request_id = answer.headers["x-request-id"]
    assert [record.getMessage() for record in caplog.records] == [
        f"request failed request_id={request_id} traceparent= path=/publish"
    ]
    assert daemon.hub.counters.refused == {"internal_error": 1}


# --- the rate limit ------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["raw", "aiohttp"])
async def limited(request: pytest.FixtureRequest) -> AsyncIterator[Daemon]:
    """A daemon that grants each tenant two messages, and one more every 100 seconds."""
    async with running(raw_paths=request.param, publish_rate=0.01, publish_burst=2) as daemon:
        yield daemon


async def test_over_the_rate_is_429_that_says_which_limit_and_when(limited: Daemon) -> None:
    """Retry-After, the RateLimit fields of the IETF draft, and both settings by name."""
    granted = [await ask(limited.port, OK) for _ in range(2)]

    refused = await ask(limited.port, OK)

    assert [answer.status for answer in granted] == [200, 200]
    assert (refused.status, refused.code) == (429, "rate_limited")
    assert refused.json["retryable"] is True
    for part in ("default-tenant", "0.01 messages", "burst of 2", "CLEVRD_PUBLISH_RATE"):
        assert part in refused.json["error"]
    wait_s = int(refused.headers["retry-after"])
    # A hundred seconds, less what the test may take.
    assert 70 <= wait_s <= 101
    assert refused.headers["ratelimit-policy"] == '"publish";q=2;w=200'
    assert refused.headers["ratelimit"] == f'"publish";r=0;t={wait_s}'
    assert limited.hub.topics.find("default-tenant", "t").head == 2  # type: ignore[union-attr]


async def test_rate_limit_of_one_tenant_leaves_others_alone(limited: Daemon) -> None:
    """Each tenant has its own budget, named in the header or in the query."""
    as_a = post('{"topic":"t","data":1}', "X-Tenant-ID: a")
    spent = [await ask(limited.port, as_a) for _ in range(3)][-1]
    in_query = await ask(limited.port, post(OK[-22:], line="POST /publish?tenant=a HTTP/1.1"))

    other = await ask(limited.port, post('{"topic":"t","data":1}', "X-Tenant-ID: b"))
    default = await ask(limited.port, OK)

    assert (spent.status, in_query.status) == (429, 429)
    assert "Tenant a " in spent.json["error"]
    assert (other.status, default.status) == (200, 200)


async def test_pipelined_publishes_over_the_rate_are_refused_in_order(limited: Daemon) -> None:
    """Two are granted, the rest refused, each at its place."""
    sent = OK * 5 + get("/health/live", "Connection: close")

    answers = responses(await talk(limited.port, [sent]))

    assert [answer.status for answer in answers] == [200, 200, 429, 429, 429, 200]


# More publishes than a share of a turn has time for, on most machines.
PIPELINED = 128


# --- pipelines -----------------------------------------------------------------------------------


def throttle(daemon: Daemon) -> None:
    """Make the daemon throttle for the next five seconds."""
    now_s = asyncio.get_running_loop().time()
    sample = ThrottleSample(subscribers=2, slow_subscribers=2, cpu=0.9, memory=0.1)
    assert daemon.hub.throttler.evaluate(sample, now_s).is_throttling


async def test_pipelined_publishes_are_answered_in_order(daemon: Daemon) -> None:
    """More than one turn's worth: every answer, at its place."""
    count = 2 * PIPELINED + 7
    sent = OK * count + get("/health/live", "Connection: close")

    answers = responses(await talk(daemon.port, [sent]))

    assert [answer.json["offset"] for answer in answers[:-1]] == list(range(1, count + 1))


async def test_kept_connection_takes_split_requests_of_any_size_in_turn(daemon: Daemon) -> None:
    """What a large one still lacked says nothing of the next one, which may be small and split."""
    large, small = post('{"topic":"t","data":"' + "x" * 100_000 + '"}'), OK
    body_at = small.index(b"\r\n\r\n") + 4
    # Pieces, and how many requests each of them completes.
    sent: list[tuple[bytes, int]] = []
    for cut in (1, 10, body_at - 2, body_at, body_at + 1, len(small) - 1):
        sent += [(large[:200], 0), (large[200:60_000], 0), (large[60_000:], 1)]
        sent += [(small[:cut], 0), (small[cut:], 1)]
        # Its first bytes in the same piece as the end of the large one.
        sent += [(large[:300], 0), (large[300:] + small[:cut], 1), (small[cut:], 1)]

    reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
    offsets = []
    for piece, completes in sent:
        writer.write(piece)
        # A turn for the daemon to read it, and one for it to begin.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if completes:
            response = await read_response(reader, timeout_s=5.0)
            offsets.append(response.json["offset"])
    writer.close()

    assert offsets == list(range(1, 25))


async def test_pipeline_keeps_its_order_when_throttling_begins_within_it(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Publishes that wait hold back those behind them, and what else is behind them."""
    count = PIPELINED + 12
    publish = daemon.hub.publish

    def publish_and_throttle(topic: Topic, request: PublishRequest) -> PublishAnswer:
        if topic.head == PIPELINED + 5:
            throttle(daemon)
        return publish(topic, request)

    monkeypatch.setattr(daemon.hub, "publish", publish_and_throttle)
    sent = OK * count + post("{") + get("/health/live") + OK + post("{", "Connection: close")

    answers = responses(await talk(daemon.port, [sent]))

    assert [answer.json["offset"] for answer in answers[:count]] == list(range(1, count + 1))
    assert [answer.status for answer in answers[count:]] == [400, 200, 200, 400]
    assert daemon.hub.throttler.started == 1


async def test_connection_is_read_on_after_a_wait_and_a_request_of_another_kind(
    daemon: Daemon,
) -> None:
    """A publish that waited, then a page: the connection goes on, whoever serves it now."""
    throttle(daemon)
    reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)

    writer.write(OK + get("/health/live"))
    first = [await read_response(reader) for _ in range(2)]
    writer.write(get("/health/live") + OK)
    second = [await read_response(reader) for _ in range(2)]

    writer.close()
    assert [answer.status for answer in first + second] == [200] * 4


async def test_subscription_behind_a_throttled_publish_is_read_on(daemon: Daemon) -> None:
    """A publish that waited, then an upgrade on the same connection: its pings are answered."""
    throttle(daemon)
    reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
    handshake = get(
        "/subscribe?topic=t",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version: 13",
    )

    writer.write(OK + handshake)
    published = await read_response(reader)
    accepted = await reader.readuntil(b"\r\n\r\n")
    caught_up = await reader.readuntil(b'"offset":1}')
    writer.write(b"\x89\x80\0\0\0\0")
    pong = await reader.readexactly(2)

    writer.close()
    assert published.json["offset"] == 1
    assert accepted.startswith(b"HTTP/1.1 101 ")
    assert caught_up[2:4] == len(caught_up[4:]).to_bytes(2, "big")
    assert pong == b"\x8a\x00"


async def test_client_that_shuts_its_side_while_a_publish_waits_is_answered(
    daemon: Daemon,
) -> None:
    """Whatever stands behind the publish: a page, a subscription, a request that is cut."""
    throttle(daemon)
    ends = {"page": get("/health/live"), "cut": OK[:30], "socket": upgrade_request()}

    found = {
        name: await talk(daemon.port, [OK + end], shut=True, timeout_s=5)
        for name, end in ends.items()
    }

    statuses = {name: [each.status for each in responses(found[name])] for name in found}
    assert statuses == {"page": [200, 200], "cut": [200, 400], "socket": [200, 101]}


async def test_publisher_that_waits_is_not_read_meanwhile(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much it sends, and however long it waits: it is held, not swallowed, and not cut."""
    waits = asyncio.Event()
    publish = daemon.hub.publish

    async def publish_later(_: Tenant, topic: Topic, request: PublishRequest) -> PublishAnswer:
        await waits.wait()
        return publish(topic, request)

    monkeypatch.setattr(daemon.hub, "must_wait", lambda topic: not waits.is_set())
    monkeypatch.setattr(daemon.hub, "publish_later", publish_later)
    count = 8 * MIB // len(OK)
    reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
    writer.write(OK * count)
    await until(Steady(writer.transport.get_write_buffer_size), timeout_s=15)
    held_back_bytes = writer.transport.get_write_buffer_size()

    for connection in list(daemon.listener.raw.open):
        daemon.listener.raw.deadlines.set(connection, 0.0)
    daemon.listener.raw.deadlines.run_due()
    waits.set()
    first = await read_response(reader)

    writer.transport.abort()
    # The rest is in the kernel, whose buffers grow to some MiB on loopback, and in one read.
    assert held_back_bytes > MIB
    assert first.json["offset"] == 1


async def test_publish_counts_although_its_client_has_gone(daemon: Daemon) -> None:
    """A publish that waits when its connection ends is carried out, and harms nothing."""
    throttle(daemon)
    _, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
    writer.write(OK)
    await until(lambda: len(daemon.hub.topics))

    writer.transport.abort()

    topic = daemon.hub.topics.find("default-tenant", "t")
    await until(lambda: topic is not None and topic.head == 1)
    assert (await ask(daemon.port, OK)).json["offset"] == 2


async def test_publisher_that_reads_no_answers_is_not_read_either(daemon: Daemon) -> None:
    """Its requests wait in its own machine: here memory is bounded, and later all is answered."""
    count = 10_000
    reader, writer = await asyncio.open_connection(sock=small_socket(daemon.port), limit=4096)
    await ask(daemon.port, OK)
    topic = next(iter(daemon.hub.topics))
    writer.write(OK * count)

    await until(Steady(lambda: topic.published), timeout_s=15)
    held_back_at = topic.published
    offsets = [(await read_response(reader)).json["offset"] for _ in range(count)]

    writer.close()
    # About 300 bytes each: what the kernel buffers of both sides and one turn's answers hold.
    assert 1 < held_back_at < 5_000
    assert offsets == list(range(2, count + 2))
