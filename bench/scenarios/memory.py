"""What is left of a load once everybody has left and its topics are forgotten."""

import dataclasses
import http.client
import json
import time

from bench import generator, runs, servers
from bench.generator import Option
from bench.results import Figure, Outcome, Target, at_most
from bench.servers import Server

# Of all sizes: below 512 bytes Python's own allocator has them, above it the C library's.
DATA_BYTES = (200, 400, 1_000, 5_000, 50_000)
LOAD_BYTES = 115_000_000
BATCH_BYTES = 500_000
TOPICS = 50
IDLE_S = 5
# After that its topics are forgotten, some each second, and memory is given back behind them.
SETTLE_S = 20.0
READERS: dict[str, Option] = {"subs": 2_000, "pub_kind": "none", "hold": 2, "connect_window": 64}
GROWTH_LIMIT = 0.2


def publish(server: Server) -> None:
    """Fill rings with LOAD_BYTES of messages."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    sent = batches = 0
    while sent < LOAD_BYTES:
        size = DATA_BYTES[batches % len(DATA_BYTES)]
        item = {"topic": f"topic-{batches % TOPICS}", "data": "x" * size}
        line = json.dumps(item).encode() + b"\n"
        body = line * max(1, BATCH_BYTES // len(line))
        connection.request("POST", "/publish/batch", body)
        connection.getresponse().read()
        sent += len(body)
        batches += 1
    connection.close()


@runs.scenario("memory")
def memory(_settings: runs.Settings) -> Outcome:
    """115 MB in rings and 2,000 readers, all of them gone: does memory come back?"""
    forgetful = dataclasses.replace(servers.CLEVRD, env={"CLEVRD_TOPIC_IDLE_S": str(IDLE_S)})
    with servers.serving(forgetful) as server:
        before_bytes = server.rss_bytes()
        publish(server)
        generator.start({**READERS, **server.options()}).report()
        loaded_bytes = server.rss_bytes()
        time.sleep(IDLE_S + SETTLE_S)
        after_bytes = server.rss_bytes()
    growth = after_bytes / before_bytes - 1
    figures = {"before": before_bytes, "loaded": loaded_bytes, "left": after_bytes}
    return Outcome(
        figures=[
            Figure("clevrd", f"resident set, {name}", "MB", [size_bytes / 1e6])
            for name, size_bytes in figures.items()
        ],
        targets=[Target("memory comes back", [at_most("growth", growth, GROWTH_LIMIT)])],
    )
