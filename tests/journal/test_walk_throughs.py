"""What docs/journal.md has to be typed, run as it is written there, on free ports."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import kafka_servers
import nats_servers
import pytest
import redis_servers
from daemons import ROOT, running
from journal_engines import new_topic
from ports import free_port
from redis import Redis
from redis.exceptions import RedisError

# They wait for seconds, and a broker takes some to start.
pytestmark = pytest.mark.timeout(120)


def written_under(heading: str) -> str:
    """Return the shell's first lines under a heading, or behind any other words."""
    text = (ROOT / "docs" / "journal.md").read_text()
    below = text[text.index(f"{heading}\n" if heading.startswith("#") else heading) :]
    return below[below.index("```sh\n") + 6 : below.index("\n```\n")]


def typed(lines: str, folder: Path, *, tools: tuple[str, ...] = ()) -> str:
    """Run ``lines`` in ``folder``, with ports that are free; return what they print."""
    for port in ("8081", "8082"):
        lines = lines.replace(f"127.0.0.1:{port}", f"127.0.0.1:{free_port()}")
    places = (str(Path(sys.executable).parent), *tools)
    path = os.pathsep.join((*places, os.environ["PATH"]))
    shell = subprocess.Popen(
        ["bash"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        text=True,
        start_new_session=True,
    )
    try:
        printed, errors = shell.communicate(f"{lines}\n", timeout=90)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
    assert shell.returncode == 0, errors
    return printed


def check(printed: str, folder: Path) -> None:
    """See that both nodes are ready, and that a reader has all three messages, one on the other."""
    messages = [json.loads(line[6:]) for line in printed.splitlines() if line.startswith("data: {")]
    heard = (folder / "heard").read_text()

    assert printed.startswith('{"status":"ok"}{"status":"ok"}')
    assert re.findall(r'"data":"([^"]+)".*"offset":(\d)', heard) == [
        ("from one", "1"),
        ("from two", "2"),
    ]
    assert messages[-2]["recovered"] is True
    assert (messages[-1]["data"], messages[-1]["offset"]) == ("meanwhile", 3)


@pytest.mark.long
def test_two_nodes_on_redis(tmp_path: Path) -> None:
    """A newcomer who types it sees what the comments say."""
    redis_servers.need()
    port = free_port()
    try:
        check(
            typed(written_under("### Two nodes to try").replace("6390", str(port)), tmp_path),
            tmp_path,
        )
    finally:
        # The walk-through has stopped it, if it came to its end.
        with Redis(port=port) as client, suppress(RedisError):
            client.shutdown(nosave=True)


@pytest.mark.long
def test_two_nodes_on_nats(tmp_path: Path) -> None:
    """A newcomer who types it sees what the comments say."""
    tools = (str(Path(nats_servers.need()).parent),)
    lines = written_under("### Two nodes on NATS to try").replace("4333", str(free_port()))

    check(typed(lines, tmp_path, tools=tools), tmp_path)


@pytest.mark.long
def test_two_nodes_on_kafka(tmp_path: Path) -> None:
    """A newcomer who types it sees what the comments say."""
    server = kafka_servers.shared_server()
    lines = written_under("### Two nodes to try with Kafka")
    lines = lines.replace("kafka://127.0.0.1:9092/clevrd", server.url(new_topic()))

    check(typed(lines, tmp_path), tmp_path)


@pytest.mark.holds_loop("a server is started, and commands are waited for")
async def test_messages_move_to_another_engine_and_back(tmp_path: Path) -> None:
    """From SQLite to Redis, and from Redis to SQLite: data and keys, in the order of each topic."""
    old, new = tmp_path / "old", tmp_path / "new"
    async with running(journal_table={"directory": str(old)}) as daemon:
        for number in range(6):
            await daemon.publish(f"t.{number % 2}", number, **{"Idempotency-Key": f"k{number}"})
    with redis_servers.redis_server(tmp_path / "redis") as server:
        async with running(journal_table={"url": server.url}) as daemon:
            lines = written_under("**From SQLite to a journal that nodes share:**")
            lines = lines.replace("http://127.0.0.1:8080", daemon.url)
            lines = lines.replace("/var/lib/clevrd/journal", str(old))
            # The daemon answers it meanwhile.
            told = await asyncio.to_thread(typed, lines, tmp_path)
        lines = written_under("**From Redis to SQLite:**")
        lines = lines.replace("redis-cli", f"redis-cli -p {server.port}")
        lines = lines.replace("/var/lib/clevrd/journal", str(new))
        typed(lines, tmp_path)
    exported = typed(f"clevrd journal export {new}", tmp_path).splitlines()

    assert told == '"published":6,"refused":0\n'
    found = [json.loads(line) for line in exported]
    for topic in range(2):
        of_topic = [each for each in found if each["topic"] == f"t.{topic}"]
        assert [each["data"] for each in of_topic] == list(range(topic, 6, 2))
        assert [each["idempotency_key"] for each in of_topic] == [
            f"k{number}" for number in range(topic, 6, 2)
        ]
