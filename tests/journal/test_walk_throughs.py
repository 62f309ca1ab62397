"""The walk-throughs of docs/journal.md, run as they are written there, on free ports."""

from __future__ import annotations

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
from daemons import ROOT
from journal_engines import new_topic
from ports import free_port
from redis import Redis
from redis.exceptions import RedisError

# They wait for seconds, and a broker takes some to start.
pytestmark = pytest.mark.timeout(120)


def written_under(heading: str) -> str:
    """Return the shell's lines under a heading."""
    text = (ROOT / "docs" / "journal.md").read_text()
    below = text[text.index(f"### {heading}\n") :]
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


def test_two_nodes_on_redis(tmp_path: Path) -> None:
    """A newcomer who types it sees what the comments say."""
    redis_servers.need()
    port = free_port()
    try:
        check(
            typed(written_under("Two nodes to try").replace("6390", str(port)), tmp_path), tmp_path
        )
    finally:
        # The walk-through has stopped it, if it came to its end.
        with Redis(port=port) as client, suppress(RedisError):
            client.shutdown(nosave=True)


def test_two_nodes_on_nats(tmp_path: Path) -> None:
    """A newcomer who types it sees what the comments say."""
    tools = (str(Path(nats_servers.need()).parent),)
    lines = written_under("Two nodes on NATS to try").replace("4333", str(free_port()))

    check(typed(lines, tmp_path, tools=tools), tmp_path)


def test_two_nodes_on_kafka(tmp_path: Path) -> None:
    """A newcomer who types it sees what the comments say."""
    server = kafka_servers.shared_server()
    lines = written_under("Two nodes to try with Kafka")
    lines = lines.replace("kafka://127.0.0.1:9092/clevrd", server.url(new_topic()))

    check(typed(lines, tmp_path), tmp_path)
