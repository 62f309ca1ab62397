"""clevrd.testing as users' tests see it: both daemons, each fault, under each plugin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.request import urlopen

import aiohttp
import pytest
from fakes import at_once, totals_of
from keys import WRITER, rules

from clevrd.client import Client, Gap, Message, Subscription, Unauthorized
from clevrd.testing import DaemonThread, RunningDaemon, daemon_in_thread, running_daemon

ROOT = Path(__file__).parents[2]


@pytest.fixture
async def daemon() -> AsyncIterator[RunningDaemon]:
    """Return a daemon in this test's loop."""
    async with running_daemon() as started:
        yield started


@pytest.fixture
def threaded() -> Iterator[DaemonThread]:
    """Return a daemon in a thread."""
    with daemon_in_thread() as started:
        yield started


async def take(items: Subscription, count: int) -> list[object]:
    """Return the data of the next ``count`` messages, and the gaps between them."""
    taken: list[object] = []
    while count:
        item = await anext(items)
        taken.append(item.data if isinstance(item, Message) else item)
        count -= isinstance(item, Message)
    return taken


def hasty(daemon: RunningDaemon) -> Client:
    """Return a client that comes back at once."""
    return daemon.client(random=lambda: 0.0)


# --- faults --------------------------------------------------------------------------------------


async def test_cut_reader_comes_back_and_misses_nothing(daemon: RunningDaemon) -> None:
    """Readers of other topics are left alone."""
    async with hasty(daemon) as client, client.subscribe("a") as a, client.subscribe("b") as b:
        count = await daemon.cut("a")
        lost = await daemon.cut("nobody")
        await daemon.publish("a", 1)
        await daemon.publish("b", 2)
        taken = await take(a, 1), await take(b, 1)

    assert (count, lost) == (1, 0)
    assert taken == ([1], [2])


async def test_cut_without_a_topic_cuts_every_websocket(daemon: RunningDaemon) -> None:
    """Publish streams too."""
    async with hasty(daemon) as client, client.subscribe("t") as items:
        async with client.publisher() as publisher:
            await publisher.publish("t", 1)
            await publisher.flush()
            count = await daemon.cut()
            await publisher.publish("t", 2)
        taken = await take(items, 2)

    assert (count, taken) == (2, [1, 2])


@pytest.mark.parametrize("policy", ["drop_oldest", "drop_newest", "circuit_breaker", "latest"])
async def test_gap_is_seen_in_front_of_the_next_message(daemon: RunningDaemon, policy: str) -> None:
    """Exactly as long as asked, whatever the reader's policy; then all goes on."""
    async with daemon.client() as client, client.subscribe("t", policy=policy) as items:
        await daemon.publish("t", 1)
        await daemon.gap("t", 5)
        await daemon.gap("t")
        await daemon.publish("t", 2)
        taken = await take(items, 2)

    topics = daemon.server.hub.topics
    assert taken == [1, Gap("t", 2, 7, 6, "retention"), 2]
    # What the daemon counts is whole all the same.
    assert totals_of(topics).published == 8
    assert topics.ring_bytes == sum(topic.ring.size_bytes for topic in topics)


async def test_gap_reaches_who_comes_back_later(daemon: RunningDaemon) -> None:
    """A reader that was away is told of it when it resumes by its position."""
    async with daemon.client() as client:
        async with client.subscribe("t") as items:
            await daemon.publish("t", 1)
            await take(items, 1)
            position = items.position
        await daemon.gap("t", 2)
        await daemon.publish("t", 2)
        async with client.subscribe("t", position=position) as items:
            taken = await take(items, 1)

    assert taken == [Gap("t", 2, 3, 2, "retention"), 2]


@pytest.mark.parametrize("count", [0, -1, 10_001])
async def test_gap_of_no_size_is_refused(daemon: RunningDaemon, count: int) -> None:
    """And one that would hold the loop."""
    with pytest.raises(ValueError, match="1 to 10000"):
        await daemon.gap("t", count)


async def test_slow_reader_is_slow_and_harms_nobody(daemon: RunningDaemon) -> None:
    """It counts as slow in the metrics, loses by its policy, and is told when it reads on."""
    async with (
        daemon.client() as client,
        client.subscribe("t") as items,
        daemon.slow_reader("t", buffer=2) as slow,
    ):
        for n in range(5):
            await daemon.publish("t", n)
        taken = await take(items, 5)
        slow_count = at_once(daemon.server.hub.sum_up())[1]
        await slow.resume()
        late = [await anext(slow) for _ in range(3)]

    assert (taken, slow_count) == ([0, 1, 2, 3, 4], 1)
    assert late[0] == Gap("t", 1, 3, 3, "slow_consumer")
    assert [item.data for item in late[1:] if isinstance(item, Message)] == [3, 4]


@pytest.mark.parametrize("planned", [True, False])
async def test_restart_keeps_the_port_and_begins_new_epochs(
    daemon: RunningDaemon, planned: bool
) -> None:
    """Clients come back to the same URL; what was lost is a gap, as with the real thing."""
    url = daemon.url
    async with hasty(daemon) as client, client.subscribe("t") as items:
        await daemon.publish("t", 1)
        before = await take(items, 1)
        await daemon.restart(planned=planned)
        await daemon.publish("t", 2)
        after = await take(items, 1)

    assert (before, after, daemon.url) == ([1], [Gap("t", reason="epoch"), 2], url)


@pytest.mark.parametrize("planned", [True, False])
async def test_restart_keeps_what_a_real_daemon_keeps(tmp_path: Path, planned: bool) -> None:
    """With a state directory positions and messages survive a planned restart, and no other."""
    async with (
        running_daemon(state_dir=str(tmp_path)) as daemon,
        hasty(daemon) as client,
        client.subscribe("t") as items,
    ):
        await daemon.publish("t", 1)
        await take(items, 1)
        await daemon.restart(planned=planned)
        await daemon.publish("t", 2)
        taken = await take(items, 1)
        kept = [message.data for message in await daemon.messages("t")]

    assert taken == ([2] if planned else [Gap("t", reason="epoch"), 2])
    assert kept == ([1, 2] if planned else [2])


async def test_streams_are_cut_as_well(daemon: RunningDaemon) -> None:
    """Whatever transport a subscriber has come by."""
    headers = {"Accept": "text/event-stream"}
    async with (
        aiohttp.ClientSession() as http,
        http.get(f"{daemon.url}/subscribe?topic=t", headers=headers) as stream,
    ):
        await daemon.wait_for_subscribers("t")
        count = await daemon.cut("t")
        with pytest.raises(aiohttp.ClientPayloadError):
            await stream.read()

    assert count == 1


async def test_stopped_daemon_is_an_outage(daemon: RunningDaemon) -> None:
    """Between stop and start nobody is there; stopping twice is stopping."""
    await daemon.stop(planned=False)
    await daemon.stop()
    with pytest.raises(RuntimeError, match="stopped"):
        _ = daemon.server

    await daemon.start()
    await daemon.publish("t", 1)

    assert [message.data for message in await daemon.messages("t")] == [1]


# --- what else a test needs ----------------------------------------------------------------------


async def test_published_messages_can_be_looked_at(daemon: RunningDaemon) -> None:
    """What the code under test has published, whatever it publishes with; frames of any size."""
    sizes = [0, 1, 10, 100, 1_000, 70_000]
    for size in sizes:
        await daemon.publish("t", "x" * size, tenant="acme")

    messages = await daemon.messages("t", tenant="acme")

    assert [len(message.data) for message in messages] == sizes
    assert [message.offset for message in messages] == [1, 2, 3, 4, 5, 6]
    assert {message.tenant_id for message in messages} == {"acme"}
    assert await daemon.messages("t") == []
    assert await daemon.messages("other") == []


async def test_subscribers_can_be_waited_for(daemon: RunningDaemon) -> None:
    """A test that publishes once its reader is there needs no sleep."""
    async with daemon.client() as client, client.subscribe("t"):
        await daemon.wait_for_subscribers("t")
        with pytest.raises(TimeoutError):
            await daemon.wait_for_subscribers("t", 2, timeout_s=0)


async def test_settings_are_the_daemons(tmp_path: Path) -> None:
    """Any of them, out of its range too; a misspelt one is told."""
    async with running_daemon(ring_messages=2, catch_up_messages=5) as daemon:
        for n in range(4):
            await daemon.publish("t", n)
        kept = [message.data for message in await daemon.messages("t")]

    assert kept == [2, 3]
    with pytest.raises(TypeError, match="ring_mesages"):
        running_daemon(ring_mesages=2)


def test_threaded_daemon_is_the_same_without_await(threaded: DaemonThread) -> None:
    """What speaks HTTP publishes to it, and it can be looked at and made to fail."""
    with urlopen(f"{threaded.url}/publish", data=b'{"topic":"t","data":{"n":1}}') as answer:  # noqa: S310  # it is http
        assert json.load(answer)["success"] is True
    seen = [message.data for message in threaded.messages("t")]
    with threaded.slow_reader("t") as slow:
        threaded.wait_for_subscribers("t")
        cut = threaded.cut("t")
        slow.resume()
    threaded.gap("t", 2)
    offset = threaded.publish("t", 2).offset
    threaded.restart()
    threaded.stop(planned=False)
    threaded.start()
    again = threaded.publish("t", 3).offset

    assert (seen, cut, offset, again) == ([{"n": 1}], 1, 4, 1)
    assert threaded.ws_url == threaded.url.replace("http", "ws")


# --- under pytest, as users have it --------------------------------------------------------------

USERS_TESTS = """
import asyncio, urllib.request
import pytest, uvloop
from clevrd.client import Gap
from clevrd.testing import running_daemon

@pytest.fixture
def clevrd_settings():
    return {"ring_messages": 3}

@pytest.mark.asyncio
async def test_async(clevrd_daemon):
    assert isinstance(asyncio.get_running_loop(), uvloop.Loop) == IS_UVLOOP
    for n in range(5):
        await clevrd_daemon.publish("t", n)
    assert [message.data for message in await clevrd_daemon.messages("t")] == [2, 3, 4]
    async with clevrd_daemon.client() as client, client.subscribe("t", last=0) as items:
        await clevrd_daemon.gap("t", 2)
        await clevrd_daemon.restart()
        await clevrd_daemon.publish("t", 5)
        assert (await anext(items)).reason == "epoch"
        assert (await anext(items)).data == 5

def test_sync(clevrd_server, clevrd_url):
    assert clevrd_url == clevrd_server.url
    urllib.request.urlopen(clevrd_url + "/publish", data=b'{"topic":"t","data":1}').close()
    assert [message.data for message in clevrd_server.messages("t")] == [1]

def test_without_fixtures():
    async def main():
        async with running_daemon() as daemon:
            return (await daemon.publish("t", 1)).offset
    assert asyncio.run(main()) == 1
"""
UVLOOP = """
import uvloop
def pytest_asyncio_loop_factories():
    return {"uvloop": uvloop.new_event_loop}
"""


def run_python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Python with ``arguments`` and this tree's package."""
    environ = {name: text for name, text in os.environ.items() if name != "PYTEST_ADDOPTS"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=25,
    )


@pytest.mark.long
@pytest.mark.parametrize(
    ("mode", "loop", "plugins"),
    [("strict", "asyncio", "asyncio"), ("auto", "uvloop", "asyncio and aiohttp")],
)
def test_fixtures_work_under_every_plugin_and_loop(
    mode: str, loop: str, plugins: str, tmp_path: Path
) -> None:
    """Registered in conftest.py, warnings are errors, and there is none."""
    is_uvloop = loop == "uvloop"
    setup = 'pytest_plugins = ["clevrd.testing"]\nfrom clevrd.testing import running_daemon\n'
    (tmp_path / "conftest.py").write_text(setup + (UVLOOP if is_uvloop else ""))
    (tmp_path / "test_users.py").write_text(USERS_TESTS.replace("IS_UVLOOP", str(is_uvloop)))
    (tmp_path / "pytest.ini").write_text(
        f"[pytest]\nasyncio_mode = {mode}\nasyncio_default_fixture_loop_scope = function\n"
        "filterwarnings = error\n"
    )

    without = ["-p", "no:aiohttp"] if plugins == "asyncio" else []
    done = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", *without, cwd=tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout


def test_without_pytest_there_are_daemons_but_no_fixtures(tmp_path: Path) -> None:
    """pytest is no dependency of clevrd; who asks for a fixture is told what is missing."""
    program = """
import asyncio, importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "pytest" else find_spec(name, *rest)
from clevrd.testing import daemon_in_thread
with daemon_in_thread() as daemon:
    print(daemon.publish("t", 1).offset)
assert "pytest" not in sys.modules
from clevrd.testing import clevrd_daemon
"""
    done = run_python("-c", program, cwd=tmp_path)

    assert done.stdout == "1\n"
    assert done.stderr.splitlines()[-1] == (
        "ImportError: clevrd_daemon is a pytest fixture, and pytest is not installed; install it,"
        " or use running_daemon() or daemon_in_thread()."
    )


async def test_daemon_may_ask_for_keys() -> None:
    """With the tables of the configuration file; a restart keeps them."""
    async with running_daemon(**rules()) as daemon:
        await daemon.restart()
        async with daemon.client(token=WRITER.secret) as client:
            answer = await client.publish("orders", 1)
        with pytest.raises(Unauthorized):
            await daemon.publish("orders", 2)
        messages = await daemon.messages("orders", tenant="acme")

    assert (answer.offset, [each.data for each in messages]) == (1, [1])
