"""A real daemon under a real limit on its memory: a flood sheds publishers, and kills nothing."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from clients import raw_subscriber
from daemons import daemon_process, shell_daemon
from http_wire import post, read_response

MIB = 1 << 20
# Small, so that the flood fills it in a second: without the ladder the daemon was killed each time.
LIMIT_BYTES = 128 * MIB

# The flood ends behind so many refusals, however long a busy machine takes to fill the memory.
ENOUGH_REFUSALS = 500
PUBLISHERS = 12
STALLED = 100
STALLED_TOPICS = 20
SIZES = (200, 3_000, 100_000, 900_000, 30_000)


class MemoryCgroup:
    """A cgroup that limits memory, of version 1 or 2."""

    def __init__(self, directory: Path, limit: str, failures: str) -> None:
        self.directory = directory
        (directory / limit).write_text(str(LIMIT_BYTES))
        # Processes that were killed in it are counted here.
        self._failures = directory / failures

    def kills(self) -> int:
        """Return how many processes the kernel killed for want of memory."""
        found = re.search(r"^oom_kill (\d+)$", self._failures.read_text(), re.MULTILINE)
        return int(found[1]) if found else 0


@contextmanager
def memory_cgroup() -> Iterator[MemoryCgroup]:
    """Make a cgroup of LIMIT_BYTES; skip the test where this machine allows none."""
    version_1 = Path("/sys/fs/cgroup/memory")
    root = version_1 if version_1.is_dir() else Path("/sys/fs/cgroup")
    directory = root / f"clevrd-test-{os.getpid()}"
    names = ("memory.limit_in_bytes", "memory.oom_control")
    if root is not version_1:
        names = ("memory.max", "memory.events")
    try:
        directory.mkdir()
        group = MemoryCgroup(directory, *names)
    except OSError as error:
        if directory.is_dir():
            directory.rmdir()
        pytest.skip(f"no cgroup can limit memory here: {error}")
    try:
        yield group
    finally:
        deadline_s = time.monotonic() + 5
        while time.monotonic() < deadline_s:
            try:
                directory.rmdir()
                break
            except OSError:  # its last process is still ending
                time.sleep(0.05)


def requests_of(which: int) -> list[bytes]:
    """Return publishes of all sizes, every other one to a topic that stalled subscribers read."""
    requests = []
    for number in range(40):
        topic = f"t{(which + number) % STALLED_TOPICS}" if number % 2 else f"u{which * 40 + number}"
        body = json.dumps({"topic": topic, "data": "x" * SIZES[number % len(SIZES)]}).encode()
        requests.append(post(body))
    return requests


async def flood(port: int, answers: Counter[str], which: int) -> None:
    """Publish until enough is refused, without a pause and without waiting as it is told."""
    requests = requests_of(which)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    number = 0
    while answers["memory_limit"] < ENOUGH_REFUSALS:
        writer.write(requests[number % len(requests)])
        answer = await read_response(reader)
        answers[answer.json.get("code", str(answer.status))] += 1
        number += 1
    writer.close()


async def flooded(port: int) -> tuple[Counter[str], dict[str, Any], dict[str, Any]]:
    """Flood the daemon with stalled subscribers; return the answers, /metrics, and the end."""
    url = f"http://127.0.0.1:{port}"
    answers: Counter[str] = Counter()
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(aiohttp.ClientSession())
        for number in range(STALLED):
            policy = ("drop_oldest", "drop_newest", "circuit_breaker")[number % 3]
            query = f"topic=t{number % STALLED_TOPICS}&policy={policy}"
            stalled = await raw_subscriber(port, query, receive_bytes=4096)
            await stack.enter_async_context(stalled)
        await asyncio.gather(*(flood(port, answers, n) for n in range(PUBLISHERS)))
        async with http.get(f"{url}/metrics?topics=0") as answer:
            metrics = await answer.json()
    return answers, metrics, await publish_again(url)


async def publish_again(url: str) -> dict[str, Any]:
    """Return the answer to a publish behind the flood, as soon as one is taken."""
    async with aiohttp.ClientSession() as http, asyncio.timeout(30):
        while True:
            async with http.post(f"{url}/publish", data='{"topic":"end","data":1}') as answer:
                found: dict[str, Any] = await answer.json()
                if answer.status == 200:
                    return found
            await asyncio.sleep(0.2)


@pytest.mark.timeout(120)
def test_flood_in_a_small_cgroup_sheds_and_kills_nothing() -> None:
    """Publishers are refused before a subscriber loses anything; messages are taken afterwards."""
    with (
        memory_cgroup() as group,
        shell_daemon(f"echo $$ > {group.directory}/cgroup.procs") as (process, port),
    ):
        answers, metrics, after = asyncio.run(flooded(port))
        is_running, kills = process.poll() is None, group.kills()

    assert (is_running, kills) == (True, 0)
    assert answers["200"] > 100
    assert set(answers) <= {"200", "memory_limit", "throttled", "unavailable"}, answers
    assert metrics["memory_ladder"]["rings_shrunk_bytes"] > 0
    assert sum(metrics["messages"]["dropped"].values()) == 0
    assert after["success"] is True


# --- little memory, and bodies that arrive slowly ------------------------------------------------


def begin_body(port: int, address: str, tenant: str, size_bytes: int) -> socket.socket:
    """Return a connection over which so much of a publish has come, and no more follows."""
    client = socket.create_connection(("127.0.0.1", port), 10, (address, 0))
    head = f"POST /publish HTTP/1.1\r\nHost: t\r\nX-Tenant-ID: {tenant}\r\nContent-Length: 1000000"
    with suppress(OSError):  # refused meanwhile
        client.sendall(f'{head}\r\n\r\n{{"topic":"t","data":"{"x" * size_bytes}'.encode())
    return client


def test_slow_bodies_never_have_publishers_refused() -> None:
    """Of many addresses and several tenants, at the least memory that can be set."""
    with daemon_process(CLEVRD_MAX_MEMORY_MB="64") as daemon, ExitStack() as stack:
        # What comes first, what one tenant is guaranteed, and what each address is.
        for address, tenant, count, size_bytes in (
            ("127.0.0.2", "default-tenant", 13, 900_000),
            ("127.0.0.3", "other", 4, 700_000),
            *((f"127.0.1.{number}", "default-tenant", 1, 45_000) for number in range(1, 134)),
        ):
            for _ in range(count):
                stack.enter_context(begin_body(daemon.port, address, tenant, size_bytes))
        http = HTTPConnection("127.0.0.1", daemon.port, timeout=20)
        codes: Counter[int] = Counter()
        for _ in range(300):
            http.request("POST", "/publish", b'{"topic":"t","data":1}')
            answer = http.getresponse()
            answer.read()
            codes[answer.status] += 1
        http.request("GET", "/metrics")
        ladder = json.load(http.getresponse())["memory_ladder"]
        http.request("GET", "/config")
        setting = json.load(http.getresponse())["settings"]["max_batch_bytes"]
        # It could never arrive whole.
        http.request("POST", "/publish/batch", b" " * 8_000_000)
        too_large = http.getresponse()
        sentence = json.load(too_large)["error"]
        http.close()

    assert codes == {200: 300}
    assert ladder["state"] == "well"
    assert setting["value"] == 8 * MIB
    assert too_large.status == 413
    assert "of 8000000 bytes is larger than 3" in sentence
