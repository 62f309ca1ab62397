"""Publishes with an idempotency key over real sockets: a repeat gets the first answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from clients import SMALL_BUFFERS, client_of, masked, publishing, raw_subscriber, subscribe
from daemons import Daemon, running, until
from fakes import at_once
from http_wire import Response, ask, post

from clevrd.control.adaptive_throttler import ThrottleSample
from clevrd.core.topic import Topic
from clevrd.errors import Throttled
from clevrd.tenants import Tenant

TEXT = 0x1


@pytest.fixture(params=[True, False], ids=["raw", "aiohttp"])
async def daemon(request: pytest.FixtureRequest) -> AsyncIterator[Daemon]:
    """A daemon with its defaults; each test has it answer both ways."""
    async with running(raw_paths=request.param, throttle_scope="global") as running_daemon:
        yield running_daemon


def with_key(key: str | None = None, *fields: str, data: Any = 1, topic: str = "t") -> bytes:
    """Return a publish with ``key`` in its body, if any, and ``fields`` in its head."""
    body = {"topic": topic, "data": data}
    return post(json.dumps(body if key is None else {**body, "idempotency_key": key}), *fields)


def head(daemon: Daemon, topic: str = "t") -> int:
    """Return the offset of the topic's newest message."""
    found = daemon.hub.topics.find("default-tenant", topic)
    return found.head if found is not None else 0


def throttle(daemon: Daemon) -> None:
    """Make every publish of the next five seconds wait 10 ms."""
    sample = ThrottleSample(subscribers=2, slow_subscribers=2, cpu=0.9, memory=0.1)
    daemon.hub.throttler.evaluate(sample, asyncio.get_running_loop().time())


def repeat_of(first: Response | dict[str, Any]) -> dict[str, Any]:
    """Return what a repeat of the publish that was answered so is answered."""
    answer = first.json if isinstance(first, Response) else first
    return {**answer, "repeated": True}


# --- POST /publish -------------------------------------------------------------------------------


async def test_repeat_gets_the_first_answer_and_publishes_nothing(daemon: Daemon) -> None:
    """Id, offset, epoch and counts as they were, marked in head and body; readers see one."""
    first = await ask(daemon.port, with_key("k"))
    async with subscribe(daemon.ws_url) as reader:
        again = [await ask(daemon.port, with_key("k")) for _ in range(2)]
        other = await ask(daemon.port, with_key("another"))
        seen = [json.loads(await reader.recv())["offset"] for _ in range(2)]

    assert "repeated" not in first.json
    assert "idempotency-replayed" not in first.headers
    for answer in again:
        assert (answer.status, answer.json) == (200, repeat_of(first))
        assert answer.headers["idempotency-replayed"] == "true"
    assert (other.json["offset"], other.json["subscribers"]) == (2, 1)
    assert seen == [1, 2]


@pytest.mark.parametrize(
    ("first", "again"),
    [
        (with_key("a b"), with_key(None, 'Idempotency-Key: "a b"')),
        (with_key(None, 'Idempotency-Key: "a b"'), with_key(None, "idempotency-key: a b")),
        (with_key(None, "Idempotency-Key: a b"), with_key("a b", "Idempotency-Key: a b")),
    ],
    ids=["body and quoted", "quoted and bare", "bare and both"],
)
async def test_key_is_the_same_wherever_it_stands(
    daemon: Daemon, first: bytes, again: bytes
) -> None:
    """In the body, in the header with quotes or without, or in both alike."""
    answers = [await ask(daemon.port, sent) for sent in (first, again)]

    assert answers[1].json == repeat_of(answers[0])
    assert head(daemon) == 1


async def test_key_belongs_to_its_tenant_and_topic(daemon: Daemon) -> None:
    """The same key elsewhere is another key."""
    sent = [
        with_key("k"),
        with_key("k", topic="u"),
        with_key("k", "X-Tenant-ID: acme"),
        with_key("k", "X-Tenant-ID: acme", topic="u"),
    ]

    answers = [await ask(daemon.port, each) for each in sent]

    assert len({answer.json["message_id"] for answer in answers}) == 4
    assert not any("repeated" in answer.json for answer in answers)


async def test_other_data_under_a_known_key_is_refused(daemon: Daemon) -> None:
    """It is no repeat; answered as one it would be lost in silence."""
    await ask(daemon.port, with_key("k", data={"a": 1}))

    refused = await ask(daemon.port, with_key("k", data={"a": 2}))

    assert (refused.status, refused.code) == (400, "invalid_request")
    assert "use a new key" in refused.json["error"]
    assert head(daemon) == 1


@pytest.mark.parametrize(("first", "second"), [(None, "EUR"), ("EUR", "USD"), ("EUR", None)])
async def test_another_message_key_under_a_known_key_is_refused(
    daemon: Daemon, first: str | None, second: str | None
) -> None:
    """The same price of another currency is another message."""
    body = {"topic": "t", "data": 1, "idempotency_key": "k"}
    await ask(daemon.port, post(json.dumps({**body, "key": first})))

    answer = await ask(daemon.port, post(json.dumps({**body, "key": second})))
    again = await ask(daemon.port, post(json.dumps({**body, "key": first})))

    assert (answer.status, answer.code) == (400, "invalid_request")
    assert "another message" in answer.json["error"]
    assert again.json["repeated"] is True
    assert head(daemon) == 1


async def test_refused_publish_is_not_remembered(daemon: Daemon) -> None:
    """Once what was wrong is mended the same key can be used."""
    refused = await ask(daemon.port, with_key("k", topic=""))
    mended = await ask(daemon.port, with_key("k", topic="t"))

    assert (refused.status, mended.status) == (400, 200)
    assert "repeated" not in mended.json


async def test_first_answer_outlives_the_topic(daemon: Daemon) -> None:
    """A topic forgotten meanwhile is not made by a repeat, nor is its new epoch told."""
    first = await ask(daemon.port, with_key("k"))
    daemon.hub.topics.evict_idle(asyncio.get_running_loop().time() + 3601)

    without = await ask(daemon.port, with_key("k"))
    topics = len(daemon.hub.topics)
    new = await ask(daemon.port, with_key())
    beside = await ask(daemon.port, with_key("k"))

    assert topics == 0
    assert (without.json, beside.json) == (repeat_of(first), repeat_of(first))
    assert new.json["epoch"] != first.json["epoch"]


async def test_repeat_counts_against_the_rate() -> None:
    """It costs what reading it costs, so a flood of repeats is a flood."""
    async with running(publish_rate=0.01, publish_burst=2) as daemon:
        answers = [await ask(daemon.port, with_key("k")) for _ in range(3)]

    assert [answer.status for answer in answers] == [200, 200, 429]


async def test_keys_are_checked_and_not_remembered_when_turned_off() -> None:
    """With `idempotency_s` 0 every publish is published."""
    async with running(idempotency_s=0.0) as daemon:
        answers = [await ask(daemon.port, with_key("k")) for _ in range(2)]
        refused = await ask(daemon.port, with_key(""))

    assert [answer.json["offset"] for answer in answers] == [1, 2]
    assert refused.status == 400


async def test_keys_in_heads_leave_the_cache_of_heads_alone() -> None:
    """Heads that come once don't push out those that come again."""
    async with running() as daemon:
        await ask(daemon.port, with_key())

        for number in range(20):
            await ask(daemon.port, with_key(None, f"Idempotency-Key: {number}"))

        assert daemon.listener.raw.grammar is not None
        assert len(daemon.listener.raw.grammar._cache) == 1


# --- publishes that wait -------------------------------------------------------------------------


async def test_repeat_of_a_publish_that_waits_waits_for_its_answer(daemon: Daemon) -> None:
    """However many come at once, one is published, and all are told where."""
    throttle(daemon)

    answers = await asyncio.gather(*(ask(daemon.port, with_key("k")) for _ in range(5)))

    assert head(daemon) == 1
    assert sorted("repeated" in answer.json for answer in answers) == [False, *[True] * 4]
    assert {answer.json["offset"] for answer in answers} == {1}
    publishing = daemon.hub.publishing
    assert (publishing.idempotent.under_way, publishing.waiting.count) == ({}, 0)


async def test_failure_of_the_first_is_its_own(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits with the same key takes its place; a third is answered as that one was."""
    turn = daemon.hub.publishing.turn
    fails = asyncio.Event()

    async def failing_turn(tenant: Tenant, topic: Topic, *, size_bytes: int) -> Topic:
        monkeypatch.setattr(daemon.hub.publishing, "turn", turn)
        await fails.wait()
        raise Throttled("Not now.")

    monkeypatch.setattr(daemon.hub.publishing, "turn", failing_turn)
    throttle(daemon)
    first = asyncio.create_task(ask(daemon.port, with_key("k")))
    await until(lambda: daemon.hub.publishing.idempotent.under_way)
    others = [asyncio.create_task(ask(daemon.port, with_key("k"))) for _ in range(2)]
    await until(lambda: daemon.hub.publishing.waiting.count == 2)

    fails.set()
    answers = await asyncio.gather(first, *others)

    assert [answer.status for answer in answers] == [429, 200, 200]
    assert sorted("repeated" in answer.json for answer in answers[1:]) == [False, True]
    assert head(daemon) == 1


async def test_waiting_repeats_are_bounded(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """They count among the publishes that wait; over the bound they are told to come back."""
    monkeypatch.setattr("clevrd.hub.waiting_publishes.MAX_WAITING_PUBLISHES", 2)
    daemon.hub.throttler._until_s = asyncio.get_running_loop().time() + 60

    answers = await asyncio.gather(*(ask(daemon.port, with_key("k")) for _ in range(4)))

    assert sorted(answer.status for answer in answers) == [200, 200, 429, 429]
    assert {answer.code for answer in answers} == {None, "throttled"}
    assert head(daemon) == 1


# --- batches -------------------------------------------------------------------------------------


async def send_batch(daemon: Daemon, items: list[dict[str, Any]]) -> dict[str, Any]:
    """Publish a batch and return the answer."""
    async with daemon.http.post(f"{daemon.url}/publish/batch", json=items) as response:
        assert response.status == 200
        answer: dict[str, Any] = await response.json()
        return answer


@pytest.mark.parametrize("is_throttled", [False, True])
async def test_batch_that_is_sent_again_publishes_what_was_not(is_throttled: bool) -> None:
    """Keys are each item's own; within a batch the second gets the first's answer, in order."""
    plain = {"topic": "t", "data": 0}
    keyed = [{"topic": "t", "data": n, "idempotency_key": f"k{n}"} for n in range(3)]
    async with running() as daemon:
        if is_throttled:
            throttle(daemon)
        first = await send_batch(daemon, [plain, keyed[0], keyed[0], plain, plain, keyed[1]])
        second = await send_batch(daemon, [keyed[2], plain, keyed[1], keyed[0]])

    assert [each["offset"] for each in first["results"]] == [1, 2, 2, 3, 4, 5]
    assert [each["offset"] for each in second["results"]] == [6, 7, 5, 2]
    repeats = [[each.get("repeated") for each in answer["results"]] for answer in (first, second)]
    assert repeats == [[None, None, True, None, None, None], [None, None, True, True]]
    assert (first["success"], first["published"], first["refused"]) == (True, 6, 0)


async def test_batch_with_the_header_is_told_where_keys_go(daemon: Daemon) -> None:
    """One key can't be that of many messages, and to ignore it would promise too much."""
    sent = post(
        '[{"topic":"t","data":1}]', "Idempotency-Key: k", line="POST /publish/batch HTTP/1.1"
    )

    refused = await ask(daemon.port, sent)

    assert (refused.status, refused.code) == (400, "invalid_request")
    assert "into each item" in refused.json["error"]


# --- publish sockets -----------------------------------------------------------------------------


@pytest.mark.parametrize("is_throttled", [False, True])
async def test_repeats_within_one_read_of_a_socket(is_throttled: bool) -> None:
    """Answered in the order of the frames; a silent first, a wrong one and a plain one between."""
    bodies = [
        {"topic": "t", "data": 1, "idempotency_key": "k"},
        {"topic": "t", "data": 1, "idempotency_key": "k", "ref": "again"},
        {"topic": "t", "data": 2, "idempotency_key": "k", "ref": "other"},
        {"topic": "t", "data": 3, "ref": "plain"},
        {"topic": "t", "data": 1, "idempotency_key": "k", "ref": 7},
    ]
    async with running() as daemon, client_of(f"{daemon.ws_url}/publish") as socket:
        if is_throttled:
            throttle(daemon)
        frames = [masked(TEXT, json.dumps(body).encode()) for body in bodies]
        socket.transport.write(b"".join(frames))
        answers = [json.loads(await socket.recv()) for _ in range(4)]

    assert [answer["ref"] for answer in answers] == ["again", "other", "plain", 7]
    assert [answer.get("offset") for answer in answers] == [1, None, 2, 1]
    assert [answer.get("repeated") for answer in answers] == [True, None, None, True]
    assert "use a new key" in answers[1]["error"]


async def test_key_used_over_http_is_known_on_a_socket(daemon: Daemon) -> None:
    """A publisher may come back any way it likes."""
    first = await ask(daemon.port, with_key("k"))

    async with client_of(f"{daemon.ws_url}/publish") as socket:
        await socket.send('{"topic":"t","data":1,"idempotency_key":"k","ref":1}')
        again = json.loads(await socket.recv())

    assert again == {**repeat_of(first), "ref": 1}


async def test_key_is_known_to_the_command_publish(daemon: Daemon) -> None:
    """On a multiplexed socket too the second gets the first's answer."""
    frame = '{"type":"publish","topic":"t","data":1,"idempotency_key":"k","ref":1}'

    async with client_of(f"{daemon.ws_url}/ws", subprotocols=["clevrd.v1"]) as socket:
        answers = []
        for _ in range(2):
            await socket.send(frame)
            answers.append(json.loads(await socket.recv()))

    assert answers[0]["type"] == "published"
    assert answers[1] == repeat_of(answers[0])
    assert head(daemon) == 1


# --- what is counted, and what publishers are told -----------------------------------------------


async def test_metrics_say_what_keys_cost_and_save() -> None:
    """How many are held of how many, how many repeats they caught, how many were pushed out."""
    async with running(max_idempotency_keys=3) as daemon:
        for number in (0, 1, 1, 2, 3, 4):
            await ask(daemon.port, with_key(f"k{number}"))

        figures = (await daemon.get_json("/metrics"))["idempotency"]

    assert figures == {"keys": 3, "max_keys": 3, "repeats": 1, "pushed_out": 2}


async def test_keys_are_bounded_by_memory_too() -> None:
    """5 % of it at 1 KiB each, where that is less than was set."""
    async with running(max_memory_mb=64) as daemon:
        assert daemon.hub.answers.max_keys == 64 * 1024 // 20


async def test_timer_gives_back_what_nobody_can_use() -> None:
    """A daemon that has become quiet holds no keys for ever."""
    async with running() as daemon:
        await ask(daemon.port, with_key("k"))
        for entry in daemon.hub.answers._answers.values():
            entry.until_s = 0.0

        daemon.hub.forget_old_answers()

        assert len(daemon.hub.answers) == 0


async def test_answers_tell_how_many_are_behind_and_slow() -> None:
    """Lagging as it is now, slow as of the last evaluation; batches and sockets say the same."""
    async with (
        running(**SMALL_BUFFERS) as daemon,
        subscribe(daemon.ws_url),
        await raw_subscriber(daemon.port, "topic=t&buffer=10", receive_bytes=4096),
        publishing(daemon.port) as publisher,
    ):
        before = await daemon.publish("t", 1)
        while at_once(daemon.hub.sum_up())[1] < 1:
            await publisher.send("t", 50, b'"%b"' % (b"x" * 100))

        single = await daemon.publish("t", 1)
        (item,) = (await send_batch(daemon, [{"topic": "t", "data": 1}]))["results"]
        async with client_of(f"{daemon.ws_url}/publish") as socket:
            await socket.send('{"topic":"t","data":1,"ref":1}')
            frame = json.loads(await socket.recv())

    counts = [(a["subscribers"], a["lagging"], a["slow"]) for a in (before, single, item, frame)]
    assert counts == [(2, 0, 0), (2, 1, 1), (2, 1, 1), (2, 1, 1)]
