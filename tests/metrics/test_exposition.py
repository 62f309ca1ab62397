"""What Prometheus reads: both forms say what the snapshot says, in bounded steps, by its rules."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import msgspec
import pytest
from clients import subscribe
from daemons import Daemon, FakeStats, running
from fakes import FakeSink, at_once
from prometheus import need
from prometheus_client import parser as text_parser
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import parser as openmetrics_parser

from clevrd.config import Config
from clevrd.core import busy_topics
from clevrd.core.beginning import Last
from clevrd.core.publish_request import PublishRequest
from clevrd.core.subscriber import Subscriber
from clevrd.core.topic import Topic
from clevrd.handlers.operate.figures import Figures
from clevrd.hub import Hub
from clevrd.metrics import exposition, json
from clevrd.metrics.exposition import families, render_openmetrics, render_text
from clevrd.metrics.json import render_json
from clevrd.metrics.snapshot import Snapshot, topic_view
from clevrd.tenants import Tenant

TENANT = Tenant("default-tenant")
MANY = 10_000
Parse = Callable[[str], Iterable[Metric]]
parse_text: Parse = text_parser.text_string_to_metric_families
parse_openmetrics: Parse = openmetrics_parser.text_string_to_metric_families
# Topics, and metrics, that one step may work on: 0.3 ms and less.
TOPICS_PER_STEP = 64
METRICS_PER_STEP = 1
# Topics that one step may compare, at 0.3 us each.
COMPARED_PER_STEP = 1_300


def figures_of(hub: Hub) -> Figures:
    """Return what takes snapshots of ``hub``, to which nobody is connected."""
    return Figures(hub, lambda: {"http": 0, "websocket": 0, "stream": 0}, 0.0)


def snapshot_of(daemon: Daemon, topics: int = 0) -> Snapshot:
    """Return the daemon's figures at this moment."""
    figures = Figures(daemon.hub, daemon.server.parts.count_connections, 0.0)
    return at_once(figures.snapshot(topics))


async def scrape(daemon: Daemon, accept: str) -> tuple[str, str]:
    """Return the content type and the text of an answer."""
    async with daemon.http.get(f"{daemon.url}/metrics", headers={"Accept": accept}) as answer:
        assert answer.status == 200
        assert answer.headers["Vary"] == "Accept"
        assert answer.headers["Cache-Control"] == "no-store"
        return answer.headers["Content-Type"], await answer.text()


def samples_of(found: Any) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Return the value of each sample by its name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in found
        for sample in family.samples
    }


@pytest.fixture
async def busy() -> Any:
    """A daemon in which something of everything has happened."""
    async with running(stats=FakeStats(cpu=0.25, memory=0.5), ring_messages=100) as daemon:
        daemon.hub.evaluate_throttle()
        daemon.hub.evaluate_buffers()
        async with subscribe(daemon.ws_url, "t") as reader:
            for number in range(5):
                await daemon.publish("t", number)
                await reader.recv()
            async with daemon.http.post(f"{daemon.url}/publish", data=b"{") as refused:
                assert refused.status == 400
            yield daemon


async def test_text_is_what_prometheus_calls_0_0_4(busy: Daemon) -> None:
    """A parser that is not ours finds each sample of the snapshot, with its type."""
    content_type, text = await scrape(busy, "text/plain")
    snapshot = snapshot_of(busy)

    expected = samples_of(families(snapshot))
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"
    assert samples_of(parse_text(text)).keys() == expected.keys()
    assert samples_of(parse_text(at_once(render_text(snapshot)).decode())) == expected


async def test_openmetrics_is_what_its_standard_says(busy: Daemon) -> None:
    """A strict parser that is not ours finds the same, units included, and one end."""
    content_type, text = await scrape(busy, "application/openmetrics-text")
    snapshot = snapshot_of(busy)

    expected = samples_of(families(snapshot))
    assert content_type == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    assert text.endswith("# EOF\n")
    assert text.count("# EOF") == 1
    found = list(parse_openmetrics(text))
    assert samples_of(found).keys() == expected.keys()
    units = {family.name: family.unit for family in found if family.unit}
    assert units["clevrd_received_bytes"] == "bytes"
    assert units["clevrd_round_duration_seconds"] == "seconds"
    assert samples_of(parse_openmetrics(at_once(render_openmetrics(snapshot)).decode())) == expected


async def test_both_forms_say_what_json_says(busy: Daemon) -> None:
    """One snapshot: the same figures under other names."""
    snapshot = snapshot_of(busy)

    told = msgspec.json.decode(at_once(render_json(snapshot)))
    found = samples_of(families(snapshot))
    for name, value in {
        "clevrd_topics": told["total_topics"],
        "clevrd_subscribers": told["total_subscribers"],
        "clevrd_messages_published_total": told["messages"]["published"],
        "clevrd_messages_delivered_total": told["messages"]["delivered"],
        "clevrd_messages_offered_total": told["messages"]["offered"],
        "clevrd_connections_accepted_total": told["connections"]["accepted"],
        "clevrd_window_messages": told["buffer_metrics"]["window_messages"],
        "clevrd_cpu_usage_ratio": told["throttler_metrics"]["cpu_usage"],
        "clevrd_memory_usage_ratio": told["throttler_metrics"]["memory_usage"],
        "clevrd_process_open_fds": told["process"]["open_fds"],
    }.items():
        assert found[name, ()] == value, name
    assert found["clevrd_messages_published_total", ()] == 5
    assert found["clevrd_refusals_total", (("code", "invalid_request"),)] == 1
    assert found["clevrd_connections", (("kind", "websocket"),)] == 1
    assert found["clevrd_publish_wait_seconds_count", ()] == 5
    assert found["clevrd_publish_wait_seconds_bucket", (("le", "0.001"),)] == 5
    for name in ("round_duration_seconds", "round_messages", "publish_to_socket_seconds"):
        assert found[f"clevrd_{name}_count", ()] == 5
    assert found["clevrd_round_messages_sum", ()] == 5


async def test_promtool_finds_nothing(busy: Daemon) -> None:
    """Names, units, help and types are as Prometheus's own linter wants them."""
    _, text = await scrape(busy, "text/plain")

    checked = await asyncio.to_thread(
        subprocess.run,
        [need("promtool"), "check", "metrics"],
        input=text,
        capture_output=True,
        text=True,
        timeout=20,
    )

    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


async def test_nothing_that_clients_choose_is_a_label() -> None:
    """Tenants, topics, keys, patterns and paths are as many as clients like."""
    async with running() as daemon:
        await daemon.publish("chosen-topic", 1, **{"X-Tenant-ID": "chosen-tenant"})
        before = samples_of(families(snapshot_of(daemon))).keys()
        for path in ("/chosen-path", "/subscribe?topic=chosen-topic&policy=chosen-policy"):
            async with daemon.http.get(f"{daemon.url}{path}"):
                pass
        for number in range(50):
            await daemon.publish(f"chosen-topic-{number}", 1, **{"Idempotency-Key": f"k{number}"})
        _, text = await scrape(daemon, "text/plain")
        after = samples_of(families(snapshot_of(daemon))).keys()

    assert "chosen" not in text
    assert {name for name, _ in after - before} <= {"clevrd_refusals_total"}


async def test_topics_option_is_checked_whatever_is_asked_for() -> None:
    """A scrape whose query is wrong fails; one that lists topics gets no topic."""
    async with running() as daemon:
        await daemon.publish("t", 1)
        headers = {"Accept": "text/plain"}
        async with daemon.http.get(f"{daemon.url}/metrics?topics=x", headers=headers) as refused:
            status = refused.status
        async with daemon.http.get(f"{daemon.url}/metrics?topics=9", headers=headers) as answer:
            text = await answer.text()

    assert status == 400
    assert "default-tenant" not in text


# --- in bounded steps ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crowd() -> Hub:
    """A hub with 10,000 topics, each with a subscriber of its own and a message on its way."""
    hub = Hub(Config(), asyncio.new_event_loop())
    request = PublishRequest("t", msgspec.Raw(b"1"))
    for number in range(MANY):
        topic = hub.topic(TENANT, f"t{number}")
        hub.subscribe(topic, Subscriber(FakeSink()), Last(0))
        hub.publish(topic, request)
    hub._loop.close()
    return hub


class Steps:
    """Counts how often something is done, and how often at most in one step of a generator."""

    def __init__(self) -> None:
        self.count = 0
        self.most = 0

    def counting(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``call``, counted."""

        def counted(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            return call(*arguments, **options)

        return counted

    def watch(self, steps: Generator[None, None, Any]) -> Iterator[Any]:
        """Take all ``steps`` and yield what they return."""
        before = 0
        while True:
            try:
                next(steps)
            except StopIteration as end:
                self.most = max(self.most, self.count - before)
                yield end.value
                return
            self.most = max(self.most, self.count - before)
            before = self.count


def test_a_snapshot_of_many_is_taken_in_small_steps(
    crowd: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step looks at more than a few topics, however many there are and are listed."""
    settled, viewed = Steps(), Steps()
    monkeypatch.setattr(Topic, "settle", settled.counting(Topic.settle))
    view = viewed.counting(topic_view)
    monkeypatch.setattr("clevrd.handlers.operate.figures.topic_view", view)
    steps = figures_of(crowd).snapshot(MANY)

    (snapshot,) = settled.watch(viewed_too(steps, viewed))

    assert len(snapshot.topics) == snapshot.total_topics == snapshot.total_subscribers == MANY
    assert snapshot.messages.published == MANY
    assert settled.count == 2 * MANY
    assert viewed.count == MANY
    assert settled.most <= TOPICS_PER_STEP
    assert viewed.most <= TOPICS_PER_STEP


def viewed_too(steps: Generator[None, None, Any], viewed: Steps) -> Generator[None, None, Any]:
    """Pass ``steps`` on, watched by ``viewed`` as well."""
    before = 0
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
        viewed.most = max(viewed.most, viewed.count - before)
        before = viewed.count
        yield


def test_busiest_of_many_are_found_in_small_steps(
    crowd: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All topics that are read may be among them, so no step compares them all."""
    compared = Steps()
    monkeypatch.setattr(busy_topics, "_messages", compared.counting(busy_topics._messages))

    (busiest,) = compared.watch(crowd.topics.busiest(100))

    assert len(busiest) == 100
    assert compared.count >= MANY
    assert compared.most <= COMPARED_PER_STEP


def test_a_scrape_of_many_looks_at_no_topic_but_for_the_sums(
    crowd: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Prometheus asks for names no topic, so that none is viewed."""
    settled = Steps()
    monkeypatch.setattr(Topic, "settle", settled.counting(Topic.settle))

    (snapshot,) = settled.watch(figures_of(crowd).snapshot(0))

    assert snapshot.topics == []
    assert settled.count == MANY
    assert settled.most <= TOPICS_PER_STEP


@pytest.mark.parametrize(
    ("render", "spell"),
    [(render_text, "_spell_text"), (render_openmetrics, "_spell_openmetrics")],
)
def test_prometheus_forms_are_spelled_in_small_steps(
    crowd: Hub,
    monkeypatch: pytest.MonkeyPatch,
    render: Callable[[Snapshot], Generator[None, None, bytes]],
    spell: str,
) -> None:
    """One metric a step, and none of them is large."""
    snapshot = at_once(figures_of(crowd).snapshot(0))
    spelled = Steps()
    monkeypatch.setattr(exposition, spell, spelled.counting(getattr(exposition, spell)))

    (text,) = spelled.watch(render(snapshot))

    assert spelled.count == len(list(families(snapshot))) > 40
    assert spelled.most == METRICS_PER_STEP
    assert max(len(family.samples) for family in families(snapshot)) <= 20
    assert len(text) < 20_000


def test_json_is_encoded_in_small_steps(crowd: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few topics a step, however many are listed."""
    snapshot = at_once(figures_of(crowd).snapshot(MANY))
    encoded = Steps()
    sizes: list[int] = []

    def noting(value: Any, encode: Any = json._encode) -> bytes:
        sizes.append(len(value) if isinstance(value, list) else 1)
        return bytes(encode(value))

    monkeypatch.setattr(json, "_encode", encoded.counting(noting))

    (text,) = encoded.watch(render_json(snapshot))

    assert len(msgspec.json.decode(text)["topics"]) == MANY
    assert encoded.most == 1
    assert max(sizes) <= TOPICS_PER_STEP
