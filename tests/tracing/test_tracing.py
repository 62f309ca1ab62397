"""Tracing over real sockets: a daemon, its clients, and a collector that reads what it is sent."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from clients import subscribe
from collector import NOT_SAMPLED, PARENT_ID, SAMPLED, TRACE_ID, Collector, collecting
from daemons import ROOT, Daemon, daemon_process, running, until
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import format_span_id, format_trace_id, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from websockets.asyncio.client import connect

from clevrd import __version__
from clevrd.cli import main
from clevrd.handlers.publish.endpoint import PublishEndpoint
from clevrd.hub import traced_delivery
from clevrd.hub.delivery import Delivery
from clevrd.hub.rounds import Rounds
from clevrd.hub.traced_delivery import TracedRounds
from clevrd.tenants.keys import new_key
from clevrd.tenants.settings import read_access
from clevrd.tracing import sender


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send spans soon."""
    monkeypatch.setattr(sender, "GATHER_S", 0.01)


@pytest.fixture
async def collector() -> AsyncIterator[Collector]:
    """Return a running collector."""
    async with collecting() as started:
        yield started


@pytest.fixture(params=[True, False], ids=["raw", "aiohttp"])
async def daemon(request: pytest.FixtureRequest, collector: Collector) -> AsyncIterator[Daemon]:
    """Return a daemon that traces every publish."""
    async with traced(collector, raw_paths=request.param) as started:
        yield started


def traced(collector: Collector, **settings: Any) -> Any:
    """Run a daemon that traces every publish, unless the settings say otherwise."""
    return running(**{"otel_endpoint": collector.url, "otel_sample_ratio": 1.0, **settings})


async def test_publish_is_a_trace_that_its_consumers_continue(
    daemon: Daemon, collector: Collector
) -> None:
    """A publish without a trace begins one; its message carries it, and its delivery is in it."""
    async with subscribe(daemon.ws_url, headers="true") as reader, subscribe(daemon.ws_url):
        answer = await daemon.publish("t", {"n": 1})
        message = json.loads(await reader.recv())

    (publish,) = await collector.wait_for("publish")
    (delivery,) = await collector.wait_for("deliver")
    assert (publish.kind, publish.parent_id, publish.links) == ("producer", "", [])
    assert publish.attributes == {
        "messaging.system": "clevrd",
        "messaging.operation.name": "publish",
        "messaging.operation.type": "send",
        "messaging.destination.name": "t",
        "messaging.message.id": answer["message_id"],
        "messaging.message.body.size": 7,
        "network.protocol.name": "http",
        "clevrd.tenant": "default-tenant",
        "clevrd.offset": 1,
        "clevrd.epoch": answer["epoch"],
        "clevrd.subscribers": 2,
    }
    assert not publish.is_error
    assert publish.resource["service.name"] == "clevrd"
    assert publish.resource["service.version"] == __version__
    assert message["headers"] == {"traceparent": publish.traceparent}
    assert delivery.kind == "consumer"
    assert delivery.links == [(publish.trace_id, publish.span_id)]
    assert (delivery.trace_id, delivery.parent_id) == (publish.trace_id, publish.span_id)
    assert delivery.attributes["clevrd.subscribers"] == 2
    assert delivery.attributes["messaging.message.id"] == answer["message_id"]
    assert publish.start_ns <= delivery.start_ns <= delivery.end_ns


async def test_publish_is_a_child_of_the_publishers_span(
    daemon: Daemon, collector: Collector
) -> None:
    """A valid traceparent is the parent, and its tracestate goes on to consumers and collector."""
    async with subscribe(daemon.ws_url, headers="true") as reader:
        await daemon.publish("t", 1, traceparent=SAMPLED, tracestate="vendor=x")
        message = json.loads(await reader.recv())

    (publish,) = await collector.wait_for("publish")
    assert (publish.trace_id, publish.parent_id) == (TRACE_ID, PARENT_ID)
    assert publish.tracestate == "vendor=x"
    assert message["headers"] == {"traceparent": publish.traceparent, "tracestate": "vendor=x"}


async def test_trace_of_opentelemetrys_own_clients_goes_through(
    daemon: Daemon, collector: Collector
) -> None:
    """A publisher and a consumer that use OpenTelemetry have one trace, with a publish between."""
    tracer, w3c = TracerProvider().get_tracer("a test"), TraceContextTextMapPropagator()
    async with subscribe(daemon.ws_url, headers="true") as reader:
        with tracer.start_as_current_span("order") as order:
            fields: dict[str, str] = {}
            w3c.inject(fields)
            await daemon.publish("t", 1, **fields)
        message = json.loads(await reader.recv())
    context = w3c.extract(message["headers"])
    consumed = tracer.start_span("consume", context=context).get_span_context()

    (publish,) = await collector.wait_for("publish")
    before = order.get_span_context()
    assert (publish.trace_id, publish.parent_id) == (
        format_trace_id(before.trace_id),
        format_span_id(before.span_id),
    )
    assert format_trace_id(consumed.trace_id) == publish.trace_id
    given = get_current_span(context).get_span_context()
    assert format_span_id(given.span_id) == publish.span_id


async def test_body_names_the_parent_before_the_head(daemon: Daemon, collector: Collector) -> None:
    """A trace in the message's own headers is nearer than that of the request."""
    body = {"topic": "t", "data": 1, "headers": {"traceparent": SAMPLED}}
    other = SAMPLED.replace(TRACE_ID, "f" * 32)

    async with daemon.http.post(
        f"{daemon.url}/publish", json=body, headers={"traceparent": other}
    ) as answer:
        assert answer.status == 200

    (publish,) = await collector.wait_for("publish")
    assert (publish.trace_id, publish.parent_id) == (TRACE_ID, PARENT_ID)


@pytest.mark.parametrize("data", [{"headers": {"traceparent": SAMPLED}}], ids=["data"])
async def test_data_names_no_parent(daemon: Daemon, collector: Collector, data: Any) -> None:
    """A traceparent in the data is data, also where a body is the data alone."""
    await daemon.publish("t", data)
    async with daemon.http.post(f"{daemon.url}/topics/t/messages", json=data) as answer:
        assert answer.status == 200

    spans = await collector.wait_for("publish", 2)
    assert TRACE_ID not in {span.trace_id for span in spans}
    assert {span.attributes["messaging.destination.name"] for span in spans} == {"t"}


async def test_what_is_not_sampled_has_no_span_and_keeps_its_trace(collector: Collector) -> None:
    """A parent decides before the ratio, both ways; without one the ratio does."""
    async with (
        traced(collector, otel_sample_ratio=0.0) as daemon,
        subscribe(daemon.ws_url, headers="true") as reader,
    ):
        await daemon.publish("t", 1)
        await daemon.publish("t", 2, traceparent=NOT_SAMPLED)
        await daemon.publish("t", 3, traceparent="00-zz")
        await daemon.publish("t", 4, traceparent=SAMPLED)
        messages = [json.loads(await reader.recv()) for _ in range(4)]
        await collector.wait_for("deliver")

    assert [span.attributes["clevrd.offset"] for span in collector.spans] == [4, 4]
    (publish,) = collector.named("publish")
    assert [message.get("headers") for message in messages] == [
        None,
        {"traceparent": NOT_SAMPLED},
        None,
        {"traceparent": publish.traceparent},
    ]


async def test_refused_publish_ends_its_span_with_the_error(
    daemon: Daemon, collector: Collector
) -> None:
    """The span has the machine code and the sentence of the refusal."""
    async with daemon.http.post(f"{daemon.url}/publish", data=b'{"topic":') as answer:
        refusal = await answer.json()
    body = {"topic": "\n", "data": 1}
    async with daemon.http.post(f"{daemon.url}/publish", json=body) as answer:
        assert answer.status == 400

    spans = await collector.wait_for("publish", 2)
    assert [span.attributes["error.type"] for span in spans] == ["invalid_request"] * 2
    assert all(span.is_error for span in spans)
    assert spans[0].message == refusal["error"]


async def test_publish_without_a_credential_has_no_span(collector: Collector) -> None:
    """A client that may not ask at all can't fill the queue."""
    key = {"id": "k", "sha256": new_key().sha256, "publish": ["**"]}
    tables = {"auth": {"mode": "required"}, "tenants": [{"name": "acme", "keys": [key]}]}
    async with traced(collector, access=read_access(tables, "a test")) as daemon:
        body = {"topic": "t", "data": 1}
        headers = {"traceparent": SAMPLED}
        async with daemon.http.post(f"{daemon.url}/publish", json=body, headers=headers) as answer:
            assert answer.status == 401
        assert daemon.server.parts.messaging.tracing is not None
        assert daemon.server.parts.messaging.tracing.sender.waiting() == 0

    assert collector.spans == []


async def test_batch_has_one_span_that_all_its_messages_carry(
    daemon: Daemon, collector: Collector
) -> None:
    """Each message of a batch has a delivery, and an item with a trace of its own keeps that."""
    lines = [
        {"topic": "t", "data": 1},
        {"topic": ""},
        {"topic": "t", "data": 3, "headers": {"traceparent": SAMPLED}},
    ]
    body = "\n".join(map(json.dumps, lines))
    async with subscribe(daemon.ws_url, headers="true") as reader:
        async with daemon.http.post(f"{daemon.url}/publish/batch", data=body) as answer:
            assert answer.status == 200
        carried = [json.loads(await reader.recv())["headers"]["traceparent"] for _ in range(2)]

    (publish,) = await collector.wait_for("publish")
    deliveries = await collector.wait_for("deliver", 2)
    assert carried == [publish.traceparent, SAMPLED]
    assert publish.attributes["messaging.batch.message_count"] == 3
    assert publish.attributes["clevrd.refused"] == 1
    assert sorted(span.links for span in deliveries) == sorted(
        [[(publish.trace_id, publish.span_id)], [(TRACE_ID, PARENT_ID)]]
    )


async def test_repeat_of_a_publish_with_a_key_says_so(daemon: Daemon, collector: Collector) -> None:
    """A repeat has a span of its own, with the first message's id; other data is an error."""
    first = await daemon.publish("t", 1, **{"Idempotency-Key": "k"})
    await daemon.publish("t", 1, **{"Idempotency-Key": "k"})
    other = {"topic": "t", "data": 2, "idempotency_key": "k"}
    async with daemon.http.post(f"{daemon.url}/publish", json=other) as answer:
        assert answer.status == 400

    *spans, refused = await collector.wait_for("publish", 3)
    ids = [span.attributes["messaging.message.id"] for span in spans]
    assert ids == [first["message_id"]] * 2
    assert [span.attributes.get("clevrd.repeated") for span in spans] == [None, True]
    assert refused.attributes["error.type"] == "invalid_request"
    assert refused.attributes["messaging.destination.name"] == "t"


@pytest.mark.parametrize("path", ["/publish", "/ws"], ids=["publish", "commands"])
async def test_frame_has_a_span(daemon: Daemon, collector: Collector, path: str) -> None:
    """A frame's own headers name its parent; without any the ratio decides."""
    kind = {"type": "publish"} if path == "/ws" else {}
    frames: list[dict[str, Any]] = [
        {"topic": "t", "data": 1, "ref": 1},
        {"topic": "t", "data": 2, "ref": 2, "headers": {"traceparent": SAMPLED}},
        {"topic": "u", "data": 3, "ref": 3, "idempotency_key": "k"},
        {"topic": "\n", "data": 4, "ref": 4},
    ]
    async with (
        subscribe(daemon.ws_url, headers="true") as reader,
        connect(daemon.ws_url + path, subprotocols=["clevrd.v1"]) as socket,  # type: ignore[list-item]
    ):
        for frame in frames:
            await socket.send(json.dumps({**kind, **frame}))
        answers = [json.loads(await socket.recv()) for _ in frames]
        carried = [json.loads(await reader.recv())["headers"]["traceparent"] for _ in range(2)]

    spans = await collector.wait_for("publish", 3)
    assert len(spans) == 3
    assert [span.attributes["messaging.message.id"] for span in spans] == [
        answer["message_id"] for answer in answers[:3]
    ]
    assert {span.attributes["network.protocol.name"] for span in spans} == {"websocket"}
    assert (spans[1].trace_id, spans[1].parent_id) == (TRACE_ID, PARENT_ID)
    assert carried == [spans[0].traceparent, spans[1].traceparent]


async def test_frame_over_the_rate_ends_its_span_with_the_error(collector: Collector) -> None:
    """A frame that is refused after it was read has a span, and so have those behind it."""
    async with (
        traced(collector, publish_rate=0.001, publish_burst=1) as daemon,
        connect(daemon.ws_url + "/publish") as socket,
    ):
        for number in range(3):
            await socket.send(json.dumps({"topic": "t", "data": number, "ref": number}))
        codes = [json.loads(await socket.recv()).get("code") for _ in range(3)]
        spans = await collector.wait_for("publish", 3)

    assert codes == [None, "rate_limited", "rate_limited"]
    assert [span.attributes.get("error.type") for span in spans] == codes


async def test_journaled_publish_ends_its_span_with_its_answer(
    collector: Collector, tmp_path: Path
) -> None:
    """The span has the place that the journal gave; a batch and a socket's run, too."""
    async with traced(collector, journal_table={"directory": str(tmp_path / "j")}) as daemon:
        async with (
            subscribe(daemon.ws_url, headers="true") as reader,
            connect(daemon.ws_url + "/publish") as socket,
        ):
            answer = await daemon.publish("t", 1)
            keyed = await daemon.publish("t", 2, **{"Idempotency-Key": "k"})
            await socket.send(json.dumps({"topic": "t", "data": 3, "ref": 1}))
            framed = json.loads(await socket.recv())
            carried = [json.loads(await reader.recv())["headers"] for _ in range(3)]
        spans = await collector.wait_for("publish", 3)
        deliveries = await collector.wait_for("deliver", 3)

    ids = [answer["message_id"], keyed["message_id"], framed["message_id"]]
    assert [span.attributes["messaging.message.id"] for span in spans] == ids
    assert [span.attributes["clevrd.offset"] for span in spans] == [1, 2, 3]
    assert carried == [{"traceparent": span.traceparent} for span in spans]
    assert [span.links for span in deliveries] == [
        [(span.trace_id, span.span_id)] for span in spans
    ]


async def test_many_messages_of_a_turn_have_a_bounded_number_of_spans(
    daemon: Daemon, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deliveries beyond the bound have no span, and are counted as dropped."""
    monkeypatch.setattr(traced_delivery, "MAX_NOTED", 10)
    count = 50
    body = "\n".join([json.dumps({"topic": "t", "data": 1})] * count)
    async with subscribe(daemon.ws_url):
        async with daemon.http.post(f"{daemon.url}/publish/batch", data=body) as answer:
            assert answer.status == 200
        assert daemon.server.parts.messaging.tracing is not None
        counts = daemon.server.parts.messaging.tracing.sender.counts
        await until(lambda: counts()["sent"] + counts()["dropped"] == count + 1)
        figures = (await daemon.get_json("/metrics"))["tracing"]
        async with daemon.http.get(
            f"{daemon.url}/metrics", headers={"Accept": "text/plain"}
        ) as answer:
            text = await answer.text()

    assert figures == {"spans": counts(), "waiting": 0}
    assert f'clevrd_trace_spans_total{{outcome="sent"}} {float(counts()["sent"])}' in text
    rounds = daemon.hub.delivery.rounds
    assert isinstance(rounds, TracedRounds)
    assert rounds.noted_messages == 0
    assert counts()["dropped"] > 0
    assert counts()["sent"] == len(collector.spans)


async def test_collector_that_refuses_is_told_of_once_and_counted(
    collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    """Publishes go on; the log has a line when it begins, and one when it is over."""
    collector.status = 403
    async with traced(collector) as daemon:
        assert daemon.server.parts.messaging.tracing is not None
        counts = daemon.server.parts.messaging.tracing.sender.counts
        with caplog.at_level(logging.WARNING):
            for number in range(3):
                await daemon.publish("t", number)
                await until(lambda number=number: counts()["dropped"] == number + 1)
            collector.status = 200
            await daemon.publish("t", 4)
            await until(lambda: counts()["sent"] == 1)

    # pytest hears the library's lines as well, which reach no log.
    lines = [each.getMessage() for each in caplog.records if each.name.startswith("clevrd.")]
    assert lines == [
        f"traces are not taken, and spans are dropped endpoint={collector.url}/v1/traces"
        " why='it was answered 403 Forbidden'",
        f"traces are taken again endpoint={collector.url}/v1/traces",
    ]


async def test_redirect_is_no_collector(
    collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    """Spans that are sent elsewhere are dropped, and the log says what to set."""
    collector.status = 307
    async with traced(collector) as daemon:
        assert daemon.server.parts.messaging.tracing is not None
        counts = daemon.server.parts.messaging.tracing.sender.counts
        with caplog.at_level(logging.WARNING):
            await daemon.publish("t", 1)
            await until(lambda: sum(counts().values()) == 1)

    assert counts() == {"sent": 0, "dropped": 1}
    assert (
        "why='it was answered 307 Temporary Redirect, and redirects are not followed; set"
        " otel_endpoint to the address that takes spans'" in caplog.text
    )


async def test_answer_without_an_end_is_read_no_further_than_a_bound(collector: Collector) -> None:
    """What the collector answers takes no memory of the daemon."""
    collector.is_endless = True
    async with traced(collector) as daemon:
        assert daemon.server.parts.messaging.tracing is not None
        counts = daemon.server.parts.messaging.tracing.sender.counts
        await daemon.publish("t", 1)
        await until(lambda: counts()["sent"] == 1)


async def test_stop_does_not_wait_for_a_collector_that_hangs(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A stop leaves what is not taken in time, and says how much that is."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "600")
    monkeypatch.setattr(sender, "FLUSH_S", 0.1)
    collector.answers.clear()
    async with traced(collector) as daemon:
        await daemon.publish("t", 1)
        await until(lambda: collector.requests == 1)
        await daemon.publish("t", 2)

    assert "spans not sent at the stop count=2" in caplog.text
    assert collector.spans == []


async def test_stop_sends_what_waits(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans of the last publishes don't wait for others to come with them."""
    monkeypatch.setattr(sender, "GATHER_S", 3600.0)
    async with traced(collector) as daemon:
        await daemon.publish("t", 1)

    assert len(collector.named("publish")) == 1


async def test_daemon_without_tracing_has_nothing_of_it() -> None:
    """Off is the default, and then the parts are those that know of no spans."""
    async with running() as daemon:
        figures = await daemon.get_json("/metrics")

        assert daemon.server.parts.messaging.tracing is None
        assert type(daemon.hub.delivery) is Delivery
        assert type(daemon.hub.delivery.rounds) is Rounds
        assert type(daemon.listener.raw.grammar._publish) is PublishEndpoint  # type: ignore[union-attr]
        assert "tracing" not in figures


def test_opentelemetry_is_imported_where_it_is_used_alone() -> None:
    """A daemon without tracing does not pay for the import."""
    program = (
        "import sys, clevrd.server.process; print([n for n in sys.modules if 'opentelemetry' in n])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )

    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.holds_loop("a process is started, and its first line read")
async def test_process_goes_by_opentelemetrys_own_variables(collector: Collector) -> None:
    """A daemon with `env` takes the endpoint, the name and the headers of the environment."""
    variables = {
        "CLEVRD_OTEL_ENDPOINT": "env",
        "CLEVRD_OTEL_SAMPLE_RATIO": "1",
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20secret",
        "OTEL_SERVICE_NAME": "orders-bus",
    }
    loop = asyncio.get_running_loop()
    with daemon_process(**variables) as process:
        body = b'{"topic":"t","data":1}'
        reader, writer = await asyncio.open_connection("127.0.0.1", process.port)
        writer.write(
            b"POST /publish HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        # Sent by the stop, or before it.
        assert await loop.run_in_executor(None, process.stop) == 0
        writer.close()

    (publish,) = collector.named("publish")
    assert publish.resource["service.name"] == "orders-bus"
    assert collector.headers["authorization"] == "Bearer secret"


@pytest.mark.parametrize("command", ["checkconfig", "doctor"])
def test_commands_check_the_setting(
    command: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A start that would fail is found before, without a secret in the sentence."""
    monkeypatch.setenv("CLEVRD_OTEL_ENDPOINT", "env")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://user:hidden@collector")

    code = main([command])

    told = "".join(capfd.readouterr())
    assert code != 0
    assert "OTEL_EXPORTER_OTLP_ENDPOINT (environment) is not allowed" in told
    assert "hidden" not in told
