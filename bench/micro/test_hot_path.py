"""Where the time of a publish goes, without sockets: decode, encode, append, and the round.

`python -m pytest bench/micro`. Rounds are measured over fake sinks: what is left of a delivery is
what the daemon adds to the write itself. The scenario `floor` measures both together.
"""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import cast

import pytest

from clevrd.admission import Gate
from clevrd.config import Config
from clevrd.connections.registry import Connections
from clevrd.core.beginning import Last
from clevrd.core.message import Message
from clevrd.core.publish_request import PublishRequest, decode_publish
from clevrd.core.recent_cache import RecentMessageCache
from clevrd.core.server_frames import FrameEncoder
from clevrd.core.subscriber import Subscriber
from clevrd.core.topic import Topic
from clevrd.handlers.publishers import publishers
from clevrd.http_values import Request
from clevrd.hub import Hub
from clevrd.hub.traced_delivery import delivery_maker
from clevrd.tenants import Tenant
from clevrd.tenants.authenticator import Authenticator
from clevrd.tenants.keys import new_key
from clevrd.tenants.settings import OPEN, read_access
from clevrd.tracing.sender import SpanSender
from clevrd.tracing.spans import Sampler, Span
from clevrd.tracing.tracing import Tracing

# pytest-benchmark's fixture, as far as it is used here.
Benchmark = Callable[[Callable[[], object]], object]

BODY = b'{"topic":"bench-0","data":{"s":1,"t":123456789012,"p":"' + b"x" * 60 + b'"}}'


class Turns:
    """The part of a loop that the hub needs here: a turn costs what its callbacks cost."""

    def __init__(self) -> None:
        self.ready: list[Callable[[], object]] = []

    def time(self) -> float:
        """Stand still."""
        return 1.0

    def call_soon(self, callback: Callable[..., object], *args: object) -> None:
        """Keep the callback for the next turn."""
        self.ready.append(partial(callback, *args))

    def run(self) -> None:
        """Run until nothing is left to do."""
        while self.ready:
            ready, self.ready = self.ready, []
            for callback in ready:
                callback()


class NullSink:
    """A reader that takes everything at once."""

    def write(self, data: bytes, /) -> None:
        """Take it."""

    def unsent_bytes(self) -> int:
        """Return nothing: it never lags."""
        return 0

    def close(self, code: int, reason: str) -> None:
        """Never happens here."""


def a_message() -> Message:
    """Return a message of some 250 bytes."""
    request = decode_publish(BODY)
    return Message(
        "msg-20260101-000000.000000",
        request.topic,
        "default-tenant",
        request.data,
        "2026-01-01T00:00:00.000000Z",
        1,
    )


class Fixture:
    """A hub with one topic and so many readers that keep up."""

    def __init__(self, readers: int) -> None:
        self.turns = Turns()
        self.hub = Hub(Config(), cast("asyncio.AbstractEventLoop", self.turns))
        self.topic: Topic = self.hub.topic(Tenant("default-tenant"), "bench-0")
        self.request: PublishRequest = decode_publish(BODY)
        for _ in range(readers):
            self.hub.subscribe(self.topic, Subscriber(NullSink()), Last(0))
        self.turns.run()

    def publish(self, count: int) -> None:
        """Publish this many in one turn, and let the turn end."""
        for _ in range(count):
            self.hub.publish(self.topic, self.request)
        self.turns.run()


def test_decode(benchmark: Benchmark) -> None:
    """A publish's body becomes a request."""
    benchmark(lambda: decode_publish(BODY))


def test_encode(benchmark: Benchmark) -> None:
    """A message becomes the one frame that all readers get."""
    encoder = FrameEncoder()
    message = a_message()

    benchmark(lambda: encoder.frame(message))


def test_append(benchmark: Benchmark) -> None:
    """A frame goes into a topic's full ring."""
    ring = RecentMessageCache(1000, 1 << 30)
    frame = FrameEncoder().frame(a_message())

    benchmark(lambda: ring.extend([frame]))


def test_publish_without_readers(benchmark: Benchmark) -> None:
    """A request is given an id, encoded and appended."""
    fixture = Fixture(readers=0)

    benchmark(lambda: fixture.publish(1))


HEAD_FIELDS = {"host": "localhost:8080", "content-type": "application/json"}


@pytest.mark.parametrize("asks", ["open", "key", "restricted key"])
def test_admit_a_publish(benchmark: Benchmark, asks: str) -> None:
    """What it costs to know who asks: a head that comes for the first time.

    A head that comes again on the raw path costs a look-up, whoever it is of.
    """
    made = new_key()
    permitted = ["bench-0", "orders.*"] if asks == "restricted key" else ["**"]
    key = {"id": "k", "sha256": made.sha256, "publish": permitted}
    tables = {"auth": {"mode": "required"}, "tenants": [{"name": "acme", "keys": [key]}]}
    access = OPEN if asks == "open" else read_access(tables, "a bench")
    gate = Gate(Authenticator(access), lambda: False, lambda: 0.0)
    fields = HEAD_FIELDS if asks == "open" else {**HEAD_FIELDS, "x-api-key": made.secret}
    head = Request("POST", "/publish", fields)

    benchmark(lambda: gate.admit_tenant(head).tenant.publish.allows("bench-0"))


def test_publish_with_a_key(benchmark: Benchmark) -> None:
    """The same with an idempotency key that is new, while as many are remembered as may be."""
    fixture = Fixture(readers=0)
    tenant, keys = Tenant("default-tenant"), count()
    for _ in range(fixture.hub.answers.max_keys):
        fixture.hub.publish_once(tenant, fixture.request, f"key-{next(keys)}")

    benchmark(lambda: fixture.hub.publish_once(tenant, fixture.request, f"key-{next(keys)}"))


def test_repeat(benchmark: Benchmark) -> None:
    """A publish whose key is known gets the first answer."""
    fixture = Fixture(readers=0)
    tenant = Tenant("default-tenant")
    fixture.hub.publish_once(tenant, fixture.request, "key")

    benchmark(lambda: fixture.hub.publish_once(tenant, fixture.request, "key"))


@pytest.mark.parametrize("readers", [1, 100, 1000, 10_000])
def test_round_of_one_message(benchmark: Benchmark, readers: int) -> None:
    """One message to all readers: the cost of a round that carries the least."""
    fixture = Fixture(readers)

    benchmark(lambda: fixture.publish(1))


@pytest.mark.parametrize("messages", [10, 100])
def test_round_of_many_messages(benchmark: Benchmark, messages: int) -> None:
    """Many messages of one turn to 100 readers: one write for each reader."""
    fixture = Fixture(readers=100)

    benchmark(lambda: fixture.publish(messages))


class NullExporter:
    """A collector that takes everything at once."""

    def send(self, spans: Sequence[Span]) -> str | None:
        """Take them."""
        return None

    def end(self) -> None:
        """Nothing waits."""


@pytest.mark.parametrize("ratio", [None, 0.0, 1.0], ids=["off", "not sampled", "sampled"])
def test_publish_with_tracing(benchmark: Benchmark, ratio: float | None) -> None:
    """From the body to the last write of the round, to ten readers.

    Where tracing is off it is the same code as without it, to the bytecode, which
    tests/tracing/test_tracing_parts.py holds. The time of the thread that sends spans is not in it.
    """
    turns = Turns()
    loop = cast("asyncio.AbstractEventLoop", turns)
    tracing: Tracing | None = None
    if ratio is not None:
        tracing = Tracing(Sampler(ratio), SpanSender(NullExporter(), "", loop))
    hub = Hub(Config(), loop, make_delivery=delivery_maker(tracing))
    gate = Gate(Authenticator(OPEN), lambda: False, lambda: 0.0)
    endpoint = publishers(gate, hub, cast(Connections, None), Config(), tracing).publish
    head = Request("POST", "/publish", {**HEAD_FIELDS, "content-length": str(len(BODY))})
    admitted = endpoint.admit(head)
    topic = hub.topic(Tenant("default-tenant"), "bench-0")
    for _ in range(10):
        hub.subscribe(topic, Subscriber(NullSink()), Last(0))
    turns.run()

    def publish() -> None:
        endpoint.answer(admitted, BODY)
        turns.run()

    benchmark(publish)
