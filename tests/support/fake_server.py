"""A fake server whose answers each test sets, and clients of it whose waits take no time.

conftest.py offers the fixtures to every test. A real daemon is in daemons.py.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from aiohttp import WSMsgType, web
from aiohttp.test_utils import TestServer

from clevrd.client import Client

if TYPE_CHECKING:
    from conftest import FakeClock


class Answer(msgspec.Struct, frozen=True):
    """One answer to a publish; status 0 cuts the connection without an answer."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = {}


class Feed(msgspec.Struct, frozen=True):
    """The frames of one subscription, then a close code; 0 cuts, None stays open."""

    frames: Sequence[bytes] = ()
    code: int | None = None
    reason: bytes = b""
    refusal: Answer | None = None
    has_control: bool = False
    # An event; when it is set, one more message is sent before the end, number 99 unless told
    # otherwise.
    then: asyncio.Event | None = None
    last_frame: bytes | None = None
    # On /ws: the number of commands awaited before the frames are sent.
    commands: int = 0


class FakeServer:
    """Answers publishes and subscribes as the test says, and keeps the requests."""

    def __init__(self) -> None:
        # The server's URL; set by the fixture, once it listens.
        self.url = ""
        # Answers and feeds to come, taken from the left; without any, publishes succeed and feeds
        # stay open.
        self.answers: deque[Answer] = deque()
        self.feeds: deque[Feed] = deque()
        self.bodies: list[bytes] = []
        # The data of each batch's items; and the keys of all items.
        self.batches: list[list[bytes]] = []
        self.keys: list[str] = []
        self.batch_heads: list[Mapping[str, str]] = []
        self.requests: list[web.BaseRequest] = []
        # Commands of each connection to /ws.
        self.commands: list[list[dict[str, Any]]] = []
        self.first_publish = asyncio.Event()
        # Set when a client has closed a feed that would have stayed open.
        self.left = asyncio.Event()

    async def publish(self, request: web.Request) -> web.StreamResponse:
        """Keep a publish and return the next answer."""
        self.requests.append(request)
        self.bodies.append(await request.read())
        self.first_publish.set()
        answer = self.answers.popleft() if self.answers else Answer(body=self.success())
        return respond(request, answer)

    async def subscribe(self, request: web.Request) -> web.StreamResponse:
        """Send the frames of the next feed."""
        self.requests.append(request)
        feed = self.feeds.popleft() if self.feeds else Feed()
        if feed.refusal is not None:
            return respond(request, feed.refusal)
        socket = web.WebSocketResponse(protocols=["clevrd.v1"] if feed.has_control else [])
        await socket.prepare(request)
        if feed.commands:
            self.commands.append([await socket.receive_json() for _ in range(feed.commands)])
        for frame in feed.frames:
            await socket.send_frame(frame, WSMsgType.TEXT)
        if feed.then is not None:
            await feed.then.wait()
            await socket.send_frame(feed.last_frame or message(99), WSMsgType.TEXT)
        if feed.code is None:
            await socket.receive()  # until the client closes
            self.left.set()
        elif feed.code == 0:
            cut(request)
        else:
            await socket.close(code=feed.code, message=feed.reason)
        return socket

    def success(self) -> bytes:
        """Return the body of the answer to the last publish."""
        number = len(self.bodies)
        return json.dumps(
            {"success": True, "message_id": f"msg-{number}", "offset": number, "epoch": "e"}
        ).encode()

    @property
    def data(self) -> list[bytes]:
        """Data of each publish to topic t, cut out of its body byte for byte."""
        return [data_of(body) for body in self.bodies]

    async def publish_batch(self, request: web.Request) -> web.StreamResponse:
        """Keep a batch and return the next answer; without any, all items succeed."""
        self.batch_heads.append(request.headers)
        lines = (await request.read()).split(b"\n")
        self.batches.append([data_of(line) for line in lines])
        self.keys += [json.loads(line)["idempotency_key"] for line in lines]
        if self.answers:
            return respond(request, self.answers.popleft())
        return respond(request, batch_answer(["taken"] * len(lines)))


def data_of(body: bytes) -> bytes:
    """Return the data in the body of a publish to topic t."""
    return body.removeprefix(b'{"topic":"t","data":').rpartition(b',"idempotency_key":')[0]


def batch_answer(outcomes: Sequence[str]) -> Answer:
    """Return a batch's answer: each item is taken, refused for the moment (later), or for good."""
    results = [
        {"success": True, "message_id": f"msg-{number}", "offset": number}
        if outcome == "taken"
        else {"success": False, "error": outcome, "code": "x", "retryable": outcome == "later"}
        for number, outcome in enumerate(outcomes, start=1)
    ]
    return Answer(200, json.dumps({"success": True, "results": results}).encode())


def respond(request: web.Request, answer: Answer) -> web.Response:
    """Return aiohttp's response for an answer, or cut the connection."""
    if answer.status == 0:
        cut(request)
    return web.Response(status=answer.status, body=answer.body, headers=answer.headers)


def cut(request: web.Request) -> None:
    """Drop the connection without an answer."""
    assert request.transport is not None
    request.transport.abort()


def refusal(status: int, sentence: str, **headers: str) -> Answer:
    """Return an error answer in the form of the wire contract."""
    body = json.dumps({"success": False, "error": sentence, "code": "x", "retryable": False})
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, body.encode(), names)


def message(number: int, offset: int | None = None, topic: str = "") -> bytes:
    """Return the topic's message ``number``; its offset is that number unless told otherwise."""
    place = number if offset is None else offset
    name = b'"topic":"%b",' % topic.encode() if topic else b""
    return b'{"id":"msg-20260131-120000.%06d",%b"data":{"n":%d},"offset":%d}' % (
        *(number, name),
        *(number, place),
    )


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    """Return a fake server that listens on a free port of this machine."""
    # aiohttp logs a warning, in a command's own output, where the server does not take the
    # subprotocol.
    logging.getLogger("aiohttp.websocket").setLevel(logging.ERROR)
    fake = FakeServer()
    app = web.Application()
    app.router.add_post("/publish", fake.publish)
    app.router.add_post("/publish/batch", fake.publish_batch)
    app.router.add_get("/subscribe", fake.subscribe)
    app.router.add_get("/ws", fake.subscribe)
    async with TestServer(app, host="127.0.0.1") as running:
        fake.url = str(running.make_url("")).rstrip("/")
        yield fake


@asynccontextmanager
async def serving(answer: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> Any:
    """Run a server that answers everything by ``answer``, and yield its URL."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    async with TestServer(app, host="127.0.0.1") as running:
        yield str(running.make_url("")).rstrip("/")


class FakePause:
    """A clock that sleeping moves; keeps the seconds of each sleep."""

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock
        self.slept_s: list[float] = []

    async def __call__(self, seconds: float) -> None:
        """Let ``seconds`` pass at once."""
        self.slept_s.append(seconds)
        self._clock.advance(seconds)


@pytest.fixture
def pause(clock: FakeClock) -> FakePause:
    """Return the sleep function for a client."""
    return FakePause(clock)


@pytest.fixture
def new_client(server: FakeServer, clock: FakeClock, pause: FakePause) -> Callable[..., Client]:
    """Return a maker of clients of the fake server, without real waits and jitter."""

    def make(**options: Any) -> Client:
        options = {"random": lambda: 0.5, "sleep": pause, "clock": clock, **options}
        return Client(server.url, **options)

    return make


def subscribed(
    epoch: str, offset: int, *, is_recovered: bool = True, topic: str = "t", **fields: Any
) -> bytes:
    """Return the `subscribed` notice of a server with positions."""
    return json.dumps(
        {
            **{"type": "subscribed", "topic": topic, "epoch": epoch, "offset": offset},
            **{"recovered": is_recovered, "window": 1000, **fields},
        }
    ).encode()


def watching(pattern: str, ref: int) -> bytes:
    """Return the answer to a subscribe command with a pattern."""
    return json.dumps({"type": "watching", "pattern": pattern, "ref": ref}).encode()


def failure(sentence: str, *, is_retryable: bool = False, **fields: Any) -> bytes:
    """Return an `error` notice."""
    head = {"type": "error", "code": "x", "error": sentence, "retryable": is_retryable}
    return json.dumps({**head, **fields}).encode()


def gap(first: int | None, last: int | None, reason: str, topic: str = "t") -> bytes:
    """Return a `gap` notice."""
    count = None if first is None or last is None else last - first + 1
    head = {"type": "gap", "topic": topic, "from": first, "to": last}
    return json.dumps({**head, "count": count, "reason": reason}).encode()
