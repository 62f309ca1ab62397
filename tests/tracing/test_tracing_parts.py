"""Tracing without sockets: settings, which publishes are traced, and the sender's queue."""

from __future__ import annotations

import asyncio
import itertools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any, cast

import msgspec
import pytest
from daemons import until
from fakes import FakeSink

from clevrd.admission import Gate
from clevrd.config import Config, load
from clevrd.connections.registry import Connections
from clevrd.core.beginning import Last
from clevrd.core.publish_request import PublishRequest
from clevrd.core.subscriber import Subscriber
from clevrd.errors import ConfigError
from clevrd.handlers.publish.endpoint import PublishEndpoint
from clevrd.handlers.publishers import publishers
from clevrd.http_values import Request
from clevrd.hub import Hub, traced_delivery
from clevrd.hub.rounds import WRITES_PER_SLICE
from clevrd.hub.traced_delivery import TracedRounds, delivery_maker
from clevrd.tenants import Tenant
from clevrd.tenants.authenticator import Authenticator
from clevrd.tenants.settings import OPEN
from clevrd.tracing import sender as sender_module
from clevrd.tracing import settings as settings_module
from clevrd.tracing.exporter import short_reason
from clevrd.tracing.sender import SpanSender
from clevrd.tracing.settings import tracing_of
from clevrd.tracing.spans import Sampler, Span, TraceContext, read_context
from clevrd.tracing.tracing import Tracing

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
SPAN_ID = "b7ad6b7169203331"


def config(endpoint: str, ratio: float = 0.5) -> Config:
    """Return settings that trace."""
    return Config(otel_endpoint=endpoint, otel_sample_ratio=ratio)


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "environ", "endpoint"),
    [
        ("http://c:4318", {}, "http://c:4318/v1/traces"),
        ("http://c:4318/", {}, "http://c:4318/v1/traces"),
        ("https://c/otlp", {}, "https://c/otlp/v1/traces"),
        ("https://c/otlp/v1/traces", {}, "https://c/otlp/v1/traces"),
        ("http://c:1", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://e:2"}, "http://c:1/v1/traces"),
        ("env", {}, "http://localhost:4318/v1/traces"),
        ("env", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://e:2"}, "http://e:2/v1/traces"),
        (
            "env",
            {
                "OTEL_EXPORTER_OTLP_ENDPOINT": "http://e:2",
                "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://e:3/any",
            },
            "http://e:3/any",
        ),
    ],
)
def test_endpoint_is_the_settings_or_the_environments(
    given: str, environ: dict[str, str], endpoint: str
) -> None:
    """The standard variables count where the setting says so."""
    settings = tracing_of(config(given), environ)

    assert settings is not None
    assert settings.endpoint == endpoint
    assert settings.sample_ratio == 0.5


def test_variables_alone_switch_nothing_on() -> None:
    """An environment that is set up for other programs is not meant for this one."""
    environ = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://e:2",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
        "OTEL_EXPORTER_OTLP_HEADERS": "nonsense",
    }

    assert tracing_of(Config(), environ) is None


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "clevrd speaks http/protobuf"),
        ({"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/json"}, "clevrd speaks http/protobuf"),
        ({"OTEL_EXPORTER_OTLP_HEADERS": "a=1,hidden"}, "write name=value"),
        ({"OTEL_EXPORTER_OTLP_HEADERS": "=hidden"}, "write name=value"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4318"}, "Give an http or https URL"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://u:hidden@c"}, "without a user"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c/?key=hidden"}, "without a user"),
    ],
)
def test_wrong_variable_is_named_without_its_secret(environ: dict[str, str], told: str) -> None:
    """Each mistake has a sentence that says which variable, and what to do."""
    with pytest.raises(ConfigError) as refused:
        tracing_of(config("env"), environ)

    assert told in str(refused.value)
    assert next(iter(environ)) in str(refused.value)
    assert "hidden" not in str(refused.value)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("collector:4318", "Give an http or https URL with a host, or env."),
        ("grpc://c:4317", "Give an http or https URL with a host, or env."),
        ("http://", "Give an http or https URL with a host, or env."),
        ("http://c:99999", "It is no URL."),
        ("http://user:hidden@c:4318", "OTEL_EXPORTER_OTLP_HEADERS"),
        ("http://c:4318/?api-key=hidden", "OTEL_EXPORTER_OTLP_HEADERS"),
    ],
)
def test_wrong_endpoint_is_refused_without_its_secret(given: str, told: str) -> None:
    """A password in the wrong place is not shown."""
    with pytest.raises(ConfigError) as refused:
        load({}, {"CLEVRD_OTEL_ENDPOINT": given}, None)

    assert told in str(refused.value)
    assert "hidden" not in str(refused.value)


def test_missing_extra_is_said_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence can be typed; without the setting nothing is missed."""
    monkeypatch.setattr(settings_module, "find_spec", lambda name: None)

    with pytest.raises(ConfigError, match=r'pip install "clevrd\[otel\]"'):
        tracing_of(config("http://c"), {})
    assert tracing_of(Config(), {}) is None


# --- which publishes are traced ------------------------------------------------------------------


def test_ratio_is_of_the_lower_half_of_the_trace_id() -> None:
    """The same ids are traced as elsewhere, so that the parts of a trace agree."""
    numbers = iter([(1 << 63) - 1, 5, 6, 1 << 63])
    sampler = Sampler(0.5, lambda bits: next(numbers))

    below, above = sampler.begin(None), sampler.begin(None)

    assert below == TraceContext("0" * 15 + "5" + "7" + "f" * 15, "0" * 15 + "6", True)
    assert above is None


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_ends_of_the_ratio_are_never_and_always(ratio: float) -> None:
    """No id lies outside them."""
    ends = itertools.cycle([0, (1 << 64) - 1])
    sampler = Sampler(ratio, lambda bits: next(ends))

    assert [sampler.begin(None) is not None for _ in range(3)] == [bool(ratio)] * 3


@pytest.mark.parametrize("flags", ["00", "01", "03"])
def test_parent_decides_before_the_ratio(flags: str) -> None:
    """A trace is whole, or not there."""
    parent = read_context({"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-{flags}"})

    begun = [Sampler(ratio).begin(parent) for ratio in (0.0, 1.0)]

    is_sampled = flags != "00"
    assert [each is not None for each in begun] == [is_sampled] * 2
    assert all(each is None or each.trace_id == TRACE_ID for each in begun)


@pytest.mark.parametrize(
    "traceparent",
    ["", "00", f"00-{TRACE_ID}-{SPAN_ID}", f"ff-{TRACE_ID}-{SPAN_ID}-01", f"00-{'0' * 32}-1-01"],
)
def test_wrong_traceparent_is_none(traceparent: str) -> None:
    """A publish is not refused for it, and begins a trace as if there were none."""
    assert read_context({"traceparent": traceparent}) is None


# --- deliveries ----------------------------------------------------------------------------------


class KeptSpans(SpanSender):
    """A sender that keeps what it is offered."""

    def __init__(self) -> None:
        super().__init__(FakeExporter(), "", cast("asyncio.AbstractEventLoop", Turns()))
        self.spans: list[Span] = []

    def offer(self, span: Span) -> None:
        """Keep it."""
        self.spans.append(span)


class TracedHub:
    """A hub that traces, whose turns the test takes."""

    def __init__(self) -> None:
        self.turns = Turns()
        self.sender = KeptSpans()
        maker = delivery_maker(Tracing(Sampler(0.0), self.sender))
        loop = cast("asyncio.AbstractEventLoop", self.turns)
        self.hub = Hub(Config(), loop, make_delivery=maker)
        self.topic = self.hub.topic(Tenant("default-tenant"), "t")
        rounds = self.hub.delivery.rounds
        assert isinstance(rounds, TracedRounds)
        self.rounds = rounds

    def subscribe(self, readers: int) -> None:
        """Add readers that keep up."""
        for _ in range(readers):
            self.hub.subscribe(self.topic, Subscriber(FakeSink()), Last(0))
        self.turns.run()

    def publish(self, flags: str = "01") -> None:
        """Publish a message with a trace, as a source or another node of a journal does."""
        headers = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-{flags}"}
        request = PublishRequest("t", msgspec.Raw(b"1"), headers=headers)
        self.hub.publish(self.topic, request)


def test_delivery_has_one_span_over_all_slices_of_a_round() -> None:
    """The readers of each slice count, and the span ends with the last of them."""
    traced = TracedHub()
    traced.subscribe(2 * WRITES_PER_SLICE + 1)
    traced.publish()

    traced.turns.run()

    (span,) = traced.sender.spans
    assert span.attributes["clevrd.subscribers"] == 2 * WRITES_PER_SLICE + 1
    assert span.link == span.parent == TraceContext(TRACE_ID, SPAN_ID, True)
    assert (span.context.trace_id, traced.rounds.noted_messages) == (TRACE_ID, 0)


def test_message_without_a_reader_or_a_sampled_trace_has_no_span() -> None:
    """Nobody is given the one, and nobody records the trace of the other."""
    traced = TracedHub()
    traced.publish()
    traced.subscribe(1)
    traced.publish("00")

    traced.turns.run()

    assert traced.sender.spans == []
    assert traced.rounds.noted_messages == 0


def test_messages_that_no_round_will_offer_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A topic that is over does not keep others from being traced for ever."""
    monkeypatch.setattr(traced_delivery, "MAX_NOTED", 2)
    traced = TracedHub()
    over = traced.hub.topic(Tenant("default-tenant"), "over")
    for offset in (1, 2):
        traced.rounds.note(over, TraceContext(TRACE_ID, SPAN_ID, True), "id", offset)
    traced.subscribe(1)

    traced.publish()
    traced.turns.run()

    assert [span.attributes["messaging.destination.name"] for span in traced.sender.spans] == ["t"]
    assert traced.rounds.noted_messages == 0


# --- the cost where it is off --------------------------------------------------------------------


class Turns:
    """The part of a loop that a publish needs."""

    def __init__(self) -> None:
        self.ready: list[Callable[[], object]] = []

    def time(self) -> float:
        """Stand still."""
        return 1.0

    def call_soon(self, callback: Callable[..., object], *arguments: object) -> None:
        """Keep the callback for the next turn."""
        self.ready.append(partial(callback, *arguments))

    def run(self) -> None:
        """Run until nothing is left to do."""
        while self.ready:
            self.ready.pop(0)()


def bytecodes_of_a_publish(tracing: Tracing | None, turns: Turns, *, is_plain: bool = False) -> int:
    """Return how many bytecodes the second publish takes, with its round to a reader.

    Args:
        is_plain: as a daemon has it that knows no tracing.
    """
    loop = cast("asyncio.AbstractEventLoop", turns)
    hub = (
        Hub(Config(), loop)
        if is_plain
        else Hub(Config(), loop, make_delivery=delivery_maker(tracing))
    )
    gate = Gate(Authenticator(OPEN), lambda: False, lambda: 0.0)
    connections = cast(Connections, None)
    chosen = publishers(gate, hub, connections, Config(), tracing).publish
    endpoint = PublishEndpoint(gate, hub, Config()) if is_plain else chosen
    body = b'{"topic":"t","data":1}'
    admitted = endpoint.admit(Request("POST", "/publish", {"content-length": str(len(body))}))
    hub.subscribe(hub.topic(Tenant("default-tenant"), "t"), Subscriber(FakeSink()), Last(0))
    counts: list[int] = []
    for _ in range(2):
        with counting_bytecodes(counts):
            endpoint.answer(admitted, body)
            turns.run()
    return counts[1]


@contextmanager
def counting_bytecodes(counts: list[int]) -> Iterator[None]:
    """Append to ``counts`` how many bytecodes are executed in functions that the block calls."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
        counts.append(count)


def test_publish_takes_not_one_bytecode_more_where_tracing_is_off() -> None:
    """Nothing on the way of a publish and its round asks whether it is off."""
    turns = Turns()
    loop = cast("asyncio.AbstractEventLoop", turns)
    unsampled = Tracing(Sampler(0.0), SpanSender(FakeExporter(), "", loop))

    off = bytecodes_of_a_publish(None, turns)

    assert off == bytecodes_of_a_publish(None, turns, is_plain=True)
    assert off < bytecodes_of_a_publish(unsampled, turns)


# --- the sender ----------------------------------------------------------------------------------


class FakeExporter:
    """An exporter that the test holds up."""

    def __init__(self) -> None:
        self.goes_on = threading.Event()
        self.batches: list[int] = []
        self.why: str | None = None
        self.error: Exception | None = None

    def send(self, spans: Sequence[Span]) -> str | None:
        """Take them when the test lets it."""
        self.batches.append(len(spans))
        assert self.goes_on.wait(60)
        if self.error is not None:
            raise self.error
        return self.why

    def end(self) -> None:
        """Let go of what is held up."""
        self.goes_on.set()


def a_span() -> Span:
    """Return a span."""
    return Span("publish", TraceContext(TRACE_ID, SPAN_ID, True), None, 1, 2, {})


async def test_spans_beyond_the_queue_are_dropped_counted_and_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A collector that takes nothing costs a bounded amount of memory."""
    monkeypatch.setattr(sender_module, "MAX_QUEUED", 100)
    monkeypatch.setattr(sender_module, "BATCH", 64)
    monkeypatch.setattr(sender_module, "GATHER_S", 0.001)
    exporter = FakeExporter()
    sender = SpanSender(exporter, "http://c", asyncio.get_running_loop())
    sender.offer(a_span())
    await until(lambda: exporter.batches == [1])

    for _ in range(110):
        sender.offer(a_span())

    assert (sender.waiting(), sender.counts()) == (101, {"sent": 0, "dropped": 10})
    assert caplog.text.count("traces are too many") == 1
    exporter.goes_on.set()
    await until(lambda: sender.counts()["sent"] == 101)
    assert exporter.batches == [1, 64, 36]
    await sender.stop()


async def test_error_of_the_exporter_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The thread goes on, and the spans are counted."""
    monkeypatch.setattr(sender_module, "GATHER_S", 0.001)
    exporter = FakeExporter()
    exporter.goes_on.set()
    exporter.error = ValueError("boom")
    sender = SpanSender(exporter, "http://c", asyncio.get_running_loop())
    sender.offer(a_span())
    await until(lambda: sender.counts()["dropped"] == 1)

    exporter.error = None
    sender.offer(a_span())
    await until(lambda: sender.counts()["sent"] == 1)

    assert "why='ValueError: boom'" in caplog.text
    await sender.stop()


async def test_stop_does_not_wait_where_the_last_request_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A collector that is away holds no stop up at all."""
    monkeypatch.setattr(sender_module, "GATHER_S", 0.001)
    monkeypatch.setattr(sender_module, "FLUSH_S", 3600.0)
    exporter = FakeExporter()
    exporter.goes_on.set()
    exporter.why = "it is away"
    sender = SpanSender(exporter, "http://c", asyncio.get_running_loop())
    sender.offer(a_span())
    await until(lambda: sender.counts()["dropped"] == 1)
    exporter.goes_on.clear()
    sender.offer(a_span())

    await sender.stop()

    assert sender.counts() == {"sent": 0, "dropped": 2}
    sender.offer(a_span())
    assert sender.counts()["dropped"] == 3


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "Failed to export spans batch code: 401, reason: Unauthorized",
            "it was answered 401 Unauthorized",
        ),
        (
            "Transient error HTTPConnectionPool(host='c', port=1): Max retries exceeded with url:"
            " /v1/traces (Caused by NewConnectionError(\"HTTPConnection(host='c', port=1): Failed"
            ' to establish a new connection: [Errno 111] Connection refused")) encountered',
            "it can't be reached: Connection refused",
        ),
        ("Transient error HTTPConnectionPool: Read timed out. (timeout=10)", "no answer in time"),
        ("", "they were not taken"),
        ("x" * 1000, "x" * 300),
    ],
)
def test_reason_is_a_few_words(said: str, told: str) -> None:
    """The log says what an operator can act on."""
    assert short_reason(said) == told
