"""Scrapes of /metrics and looks of operators: how long does one hold the loop, in each form?"""

import http.client
import json
import os
import signal
import tempfile
import time
from pathlib import Path

from bench import generator, runs, servers
from bench.generator import Option
from bench.results import Figure, Outcome, Target, at_most
from bench.servers import Kind, Server

CROWD = 10_000
READERS: dict[str, Option] = {
    "subs": CROWD,
    "pub_kind": "none",
    "hold": 60,
    "connect_window": 256,
}
PREFIX = "bench-"
SCRAPES = 20
# What nothing may hold the loop for.
LIMIT_MS = 10.0

# Form -> Accept, and what is asked for.
FORMS = {
    "JSON": ("application/json", "/metrics"),
    "JSON of 10,000 topics": ("application/json", f"/metrics?topics={CROWD}"),
    "text": ("text/plain", "/metrics"),
    "OpenMetrics": ("application/openmetrics-text", "/metrics"),
    "tenants as text": ("text/plain", "/metrics/tenants"),
    # The view is taken anew once a second, so most of these are given the one before.
    "Top-N view": ("application/json", "/admin/top?n=100"),
    "decisions": ("application/json", "/admin/explain?n=1000"),
}
# Who reads what: a topic each, or all of them one.
SPREADS = {"a topic each": CROWD, "one topic": 1}


def longest_ms(server: Server, told: Path) -> float:
    """Return the longest turn since the last time this was asked."""
    told.unlink(missing_ok=True)
    os.kill(server.pid, signal.SIGUSR1)
    while not told.exists():
        time.sleep(0.005)
    return float(told.read_text())


def make_topics(server: Server) -> None:
    """Publish one message to each of CROWD topics."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    for start in range(0, CROWD, 1_000):
        items = (
            {"topic": f"{PREFIX}{number}", "data": 1} for number in range(start, start + 1_000)
        )
        body = "".join(f"{json.dumps(item)}\n" for item in items)
        connection.request("POST", "/publish/batch", body)
        connection.getresponse().read()
    connection.close()


def scrape(server: Server, accept: str, path: str) -> list[float]:
    """Ask SCRAPES times; return how long each answer took, in ms."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    took: list[float] = []
    for _ in range(SCRAPES):
        began_s = time.perf_counter()
        connection.request("GET", path, headers={"Accept": accept})
        answer = connection.getresponse()
        answer.read()
        took.append((time.perf_counter() - began_s) * 1000)
    connection.close()
    return took


@runs.scenario("scrape")
def scrapes(_settings: runs.Settings) -> Outcome:
    """10,000 subscribers and 10,000 topics: for how long does a scrape hold the loop?"""
    figures: list[Figure] = []
    worst = 0.0
    with tempfile.TemporaryDirectory(prefix="bench-scrape-") as name:
        told = Path(name) / "longest"
        kind = Kind(
            "clevrd",
            lambda port, _: servers.python_module(
                "bench.peers.watched", "--port", str(port), "--target", str(told)
            ),
        )
        for spread, topics in SPREADS.items():
            with servers.serving(kind) as server:
                options = {**READERS, "topics": topics, "prefix": PREFIX, **server.options()}
                with generator.meanwhile(options, "connected"):
                    make_topics(server)
                    longest_ms(server, told)
                    time.sleep(3)
                    timers_ms = longest_ms(server, told)
                    figures.append(Figure(spread, "longest turn, no scrape", "ms", [timers_ms]))
                    os.kill(server.pid, signal.SIGUSR2)
                    time.sleep(2)
                    alone_ms = longest_ms(server, told)
                    figures.append(Figure(spread, "the same without timers", "ms", [alone_ms]))
                    for form, (accept, path) in FORMS.items():
                        took = scrape(server, accept, path)
                        held_ms = longest_ms(server, told)
                        worst = max(worst, held_ms)
                        figures.append(Figure(spread, f"longest turn, {form}", "ms", [held_ms]))
                        figures.append(Figure(spread, f"answer, {form}", "ms", took))
    limit = at_most("ms, the longest turn of all", worst, LIMIT_MS)
    return Outcome(figures=figures, targets=[Target("a scrape is no pause", [limit])])
