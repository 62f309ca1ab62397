"""Answers that come later change nothing that a client can see but when it comes.

A program is what one client sends, cut into pieces. It is sent twice: to a daemon that answers at
once, and to one whose hub answers at random times and in random order (late_answers.py). The bytes
that come back are the same, with ids and times taken out.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from unittest.mock import patch

import uvloop
from clients import command, commands_socket, masked, publish_socket
from daemons import running
from http_wire import get, post, settled, split_each, talk
from hypothesis import given, settings
from hypothesis import strategies as st
from late_answers import LateAnswers

from clevrd.scheduling import due_answers

# How many readers a topic has and how far they are is of the moment.
OF_THE_MOMENT = re.compile(rb'"(subscribers|lagging|slow)":\d+')
TOPICS = ("a", "b", "fails")


def http_publish(topic: str, number: int) -> bytes:
    """Return a publish over HTTP."""
    return post(json.dumps({"topic": topic, "data": number}))


def keyed_publish(key: str, number: int) -> bytes:
    """Return a publish with an idempotency key, the repeat of another one perhaps."""
    return post(json.dumps({"topic": "k", "data": number % 2}), f"Idempotency-Key: {key}")


def frame_publish(topic: str, ref: int | None) -> bytes:
    """Return a publish on a socket, and to a socket for commands a command."""
    fields = {} if ref is None else {"ref": ref}
    return command(type="publish", topic=topic, data=1, **fields)


def frame_keyed(key: str, ref: int | None) -> bytes:
    """Return a publish on a socket with an idempotency key."""
    fields = {} if ref is None else {"ref": ref}
    return command(type="publish", topic="k", data=1, idempotency_key=key, **fields)


numbers = st.integers(0, 99)
refs = st.none() | numbers
PLAIN = st.one_of(
    st.builds(http_publish, st.sampled_from(TOPICS), numbers),
    st.builds(keyed_publish, st.sampled_from("xy"), numbers),
    st.sampled_from(
        [post("{"), post('{"topic":"a","data":1,"zzz":2}'), post('{"topic":"","x":1}')]
    ),
)
# What ends the raw path, or the connection, and what may stand behind it.
FURTHER = st.one_of(PLAIN, st.just(get("/nope")), st.just(get("/health/live")))
BATCH = post(
    '{"topic":"a","data":1}\n{"topic":"fails","data":2}\n{"topic":"b","data":3}\nx\n'
    '{"topic":"k","data":1,"idempotency_key":"z"}\n{"topic":"k","data":1,"idempotency_key":"z"}',
    line="POST /publish/batch HTTP/1.1",
)
HANDSHAKE = publish_socket()
CLOSE = masked(0x8, b"\x03\xe8")
FRAMES = st.one_of(
    st.builds(frame_publish, st.sampled_from(TOPICS), refs),
    st.builds(frame_publish, st.just("a"), refs),
    st.builds(frame_keyed, st.sampled_from("xy"), refs),
    st.sampled_from([masked(0x1, b'{"ref":5}'), masked(0x9, b"ping"), masked(0xA, b"")]),
)
COMMANDS = st.one_of(
    FRAMES,
    st.builds(
        lambda name, ref: command(type="subscribe", topic=name, last=0, ref=ref),
        st.sampled_from("st"),
        numbers,
    ),
    st.builds(
        lambda name, ref: command(type="unsubscribe", topic=name, ref=ref),
        st.sampled_from("st"),
        numbers,
    ),
    st.builds(lambda ref: command(type="ping", ref=ref), numbers),
    st.just(command(type="nonsense", ref=1)),
)
# Nothing, a goodbye, binary, a broken frame.
ENDS = st.sampled_from([b"", CLOSE, masked(0x2, b"1"), b"\xff\xff", masked(0x1, b"x")[:-1]])


def joined(strategy: st.SearchStrategy[bytes], most: int) -> st.SearchStrategy[bytes]:
    """Return up to ``most`` of them, one behind the other."""
    return st.lists(strategy, max_size=most).map(b"".join)


TAILS = st.one_of(
    st.just(b""),
    st.just(b"\x00nonsense\r\n\r\n"),
    st.just(post("{}")[:-1]),
    st.just(post("{}", "Connection: close")),
    st.just(post("{}", "X-Tenant-ID: a:b")),
    st.builds(bytes.__add__, st.sampled_from([get("/nope"), get("/"), BATCH]), joined(FURTHER, 6)),
    st.builds(lambda frames, end: HANDSHAKE + frames + end, joined(FRAMES, 8), ENDS),
)
HTTP = st.builds(bytes.__add__, joined(PLAIN, 24), TAILS)
BATCHES = joined(st.one_of(st.just(BATCH), PLAIN), 6)
PUBLISH_SOCKET = st.builds(lambda frames, end: HANDSHAKE + frames + end, joined(FRAMES, 24), ENDS)
COMMAND_SOCKET = st.builds(
    lambda frames, end: commands_socket() + frames + end, joined(COMMANDS, 24), ENDS
)


async def outcome(
    pieces: list[bytes], *, raw_paths: bool, source: random.Random | None
) -> tuple[bytes, dict[str, int]]:
    """Return what comes back for ``pieces``, and how much was published in each topic."""
    async with running(raw_paths=raw_paths) as daemon:
        late = LateAnswers(daemon.hub, lambda: source is not None and source.random() < 0.8)
        answering = asyncio.ensure_future(late.answer_at_random(source)) if source else None
        try:
            transcript = await talk(daemon.port, pieces, shut=True)
        finally:
            if answering is not None:
                answering.cancel()
        assert not late.held or transcript.count(b"HTTP/1.1 101")
        late.answer()
        published = {topic.name: topic.published for topic in daemon.hub.topics}
        return OF_THE_MOMENT.sub(b"", settled(transcript)), published


def both(sent: bytes, cuts: list[int], bound: int, seed: int, *, raw_paths: bool) -> None:
    """Compare what comes back at once and late."""
    source = random.Random(seed)  # noqa: S311  # not a secret
    pieces = split_each(sent, sorted({cut % (len(sent) + 1) for cut in cuts}))

    async def run() -> tuple[tuple[bytes, dict[str, int]], tuple[bytes, dict[str, int]]]:
        at_once = await outcome(pieces, raw_paths=raw_paths, source=None)
        return at_once, await outcome(pieces, raw_paths=raw_paths, source=source)

    new_loop = uvloop.new_event_loop
    with (
        patch.object(due_answers, "MAX_DUE_ANSWERS", bound),
        asyncio.Runner(loop_factory=new_loop) as runner,
    ):
        at_once, late = runner.run(run())

    assert (late[0], late[1]) == (at_once[0], at_once[1])


CUTS = st.lists(st.integers(0, 10_000), max_size=6)
BOUNDS = st.sampled_from([1, 2, 5, 1_024])
SEEDS = st.integers(0, 1 << 32)
SOME = settings(max_examples=80)


@SOME
@given(HTTP, CUTS, BOUNDS, SEEDS)
def test_pipelined_requests_are_answered_alike(
    sent: bytes, cuts: list[int], bound: int, seed: int
) -> None:
    """On the raw path, and where it ends: faults, unknown paths, upgrades, half a request."""
    both(sent, cuts, bound, seed, raw_paths=True)


@SOME
@given(HTTP, CUTS, SEEDS)
def test_requests_through_aiohttp_are_answered_alike(
    sent: bytes, cuts: list[int], seed: int
) -> None:
    """One request after the other there, so the order can't be lost."""
    both(sent, cuts, 1_024, seed, raw_paths=False)


@SOME
@given(BATCHES, CUTS, BOUNDS, SEEDS, st.booleans())
def test_batches_are_answered_alike(
    sent: bytes, cuts: list[int], bound: int, seed: int, raw_paths: bool
) -> None:
    """Each batch by all its items, in their order."""
    both(sent, cuts, bound, seed, raw_paths=raw_paths)


@SOME
@given(PUBLISH_SOCKET, CUTS, BOUNDS, SEEDS)
def test_publish_sockets_are_answered_alike(
    sent: bytes, cuts: list[int], bound: int, seed: int
) -> None:
    """With refs and without, among pings, and up to the close frame."""
    both(sent, cuts, bound, seed, raw_paths=True)


@SOME
@given(COMMAND_SOCKET, CUTS, BOUNDS, SEEDS)
def test_command_sockets_are_answered_alike(
    sent: bytes, cuts: list[int], bound: int, seed: int
) -> None:
    """Subscriptions begin and end between the same answers."""
    both(sent, cuts, bound, seed, raw_paths=True)
