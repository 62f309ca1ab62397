"""Shares of the loop's turns: nobody waits for one who sends more, and order stays as it is.

With a clock that moves a whole share at each look, each piece of work ends its share: whatever is
held back anywhere is held back then, and the answers have to be the same as in one go.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Generator
from functools import partial
from itertools import count, pairwise
from typing import Any, cast

import pytest
from clients import command, commands_socket, masked, publish_socket
from conftest import FakeClock
from daemons import Daemon, running, until
from http_wire import chunked, get, post, responses

from clevrd.raw_http import RawConnection
from clevrd.scheduling.fair_turns import (
    BEGUN_S,
    FRESH_S,
    LARGE_BYTES,
    QUEUE_S,
    QUIET_BYTES,
    SHARE_S,
    FairTurns,
)


class FakeLoop:
    """A loop of which only the ready callbacks exist, taken a turn at a time."""

    def __init__(self) -> None:
        self.ready: list[Callable[[], None]] = []

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Call it in the next turn."""
        self.ready.append(callback)

    def turn(self) -> None:
        """Take one turn."""
        ready, self.ready = self.ready, []
        for callback in ready:
            callback()


class World:
    """Turns on a loop and a clock of their own."""

    def __init__(self) -> None:
        self.loop = FakeLoop()
        self.clock = FakeClock(0.0)
        self.errors = 0
        self.turns = FairTurns(
            cast(asyncio.AbstractEventLoop, self.loop), self.count_error, self.clock
        )
        # Who has worked, in order.
        self.worked: list[str] = []

    def count_error(self) -> None:
        """Count one failure."""
        self.errors += 1

    def fresh(self, name: str, takes_s: float) -> bool:
        """Let somebody work on what has just arrived; return whether it could begin."""
        if not self.turns.begin():
            return False
        self.worked.append(name)
        self.clock.advance(takes_s)
        self.turns.end()
        return True

    def queue(self, name: str, shares: int) -> None:
        """Let somebody wait whose work takes so many whole shares."""

        def work() -> None:
            self.worked.append(name)
            self.clock.advance(SHARE_S)
            if shares > 1:
                self.queue(name, shares - 1)

        self.turns.wait(work)


def test_share_is_spent_when_its_time_is_up() -> None:
    """Not before, so that small things are done in one go."""
    world = World()

    assert world.turns.begin()
    assert not world.turns.is_spent()
    world.clock.advance(SHARE_S)
    assert world.turns.is_spent()


def test_fresh_work_ends_when_its_part_of_the_turn_is_used_up() -> None:
    """And begins again in the next turn."""
    world = World()
    count = round(FRESH_S / SHARE_S)

    begun = [world.fresh(str(number), SHARE_S * 1.001) for number in range(count + 2)]
    world.loop.turn()

    assert begun == [True] * count + [False] * 2
    assert world.fresh("next turn", SHARE_S)


def test_short_work_asks_for_no_turn() -> None:
    """What most turns have costs no callback; time that adds up over turns is forgotten in one."""
    world = World()

    for _ in range(100):
        assert world.fresh("short", FRESH_S / 1_000)
    assert world.loop.ready == []
    for _ in range(900):
        assert world.fresh("short", FRESH_S / 1_000)
        if world.loop.ready:
            world.loop.turn()


def test_those_that_wait_take_turns() -> None:
    """One share each, in the order of arrival, however much one of them has to do."""
    world = World()
    world.queue("long", 5)
    world.queue("short", 1)
    world.queue("other", 2)

    while world.loop.ready:
        world.loop.turn()

    assert world.worked == ["long", "short", "other", "long", "other", "long", "long", "long"]


def test_queue_has_a_part_of_each_turn_and_no_more() -> None:
    """What is fresh is served between, so a newcomer does not wait for the whole queue."""
    world = World()
    for number in range(20):
        world.queue(str(number), 3)
    per_turn: list[int] = []

    while world.loop.ready:
        before = len(world.worked)
        world.loop.turn()
        per_turn.append(len(world.worked) - before)
        assert world.turns.begin()
        world.turns.end()

    assert max(per_turn) == round(QUEUE_S / SHARE_S)
    assert sum(per_turn) == 60


def test_one_turn_is_asked_for_at_a_time() -> None:
    """Work that waits again within its turn must not ask twice, or turns double each time."""
    world = World()
    for number in range(20):
        world.queue(str(number), 10)

    for _ in range(10):
        assert len(world.loop.ready) == 1
        world.loop.turn()


def test_work_that_fails_does_not_keep_others_from_theirs() -> None:
    """It is logged and counted."""
    world = World()

    def fail() -> None:
        raise RuntimeError("broken")

    world.turns.wait(fail)
    world.queue("next", 1)
    world.loop.turn()

    assert world.worked == ["next"]
    assert world.errors == 1


def test_newcomers_take_turns_with_those_that_go_on() -> None:
    """Who has not begun waits for as many others as have come before, not for all that is left."""
    world = World()
    for number in range(20):
        world.queue(f"loud {number}", 50)
    for name in ("first", "second", "third"):
        world.turns.wait(partial(world.worked.append, name), QUIET_BYTES, has_begun=False)

    world.turns.wait(partial(world.worked.append, "large"), QUIET_BYTES + 1, has_begun=False)

    while "third" not in world.worked:
        world.loop.turn()

    assert world.worked[:6] == ["first", "loud 0", "second", "loud 1", "third", "loud 2"]


def test_who_is_connected_does_not_wait_for_all_who_connect() -> None:
    """First requests have a queue of their own, and it is served in turns with the others."""
    world = World()
    for number in range(1_000):
        first = partial(world.worked.append, f"first {number}")
        world.turns.wait(first, QUIET_BYTES, has_begun=False, is_first=True)
    world.queue("loud", 1)
    for name in ("a", "b"):
        world.turns.wait(partial(world.worked.append, name), QUIET_BYTES, has_begun=False)
    assert len(world.turns) == 1_003

    while world.turns:
        world.loop.turn()

    assert world.worked[:5] == ["a", "loud", "first 0", "b", "first 1"]
    assert world.worked[5:] == [f"first {number}" for number in range(2, 1_000)]


async def test_requests_behind_the_first_are_told_from_it() -> None:
    """On both paths: a connection is new until a request of it has been served."""
    kinds: list[tuple[str, bool]] = []

    class Watching(FairTurns):
        def begin(self) -> bool:
            return False

        def wait(self, work: Any, size_bytes: int = 0, **how: bool) -> None:
            kinds.append((work.__qualname__.partition(".")[0], how.get("is_first", False)))
            super().wait(work, size_bytes, **how)

    async with running() as daemon:
        turns = Watching(asyncio.get_running_loop(), lambda: None)
        daemon.listener.raw.turns = turns
        reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
        for _ in range(3):
            writer.write(post(b'{"topic":"t","data":1}'))
            await reader.readuntil(b"}")
        writer.close()

    assert kinds == [("RawConnection", True), ("RawConnection", False), ("RawConnection", False)]


async def test_coroutines_wait_behind_those_that_wait_already() -> None:
    """And are let in as many a turn as there are shares in the queue's part of it."""
    loop = asyncio.get_running_loop()
    clock = FakeClock(0.0)
    turns = FairTurns(loop, lambda: None, clock)
    order: list[str] = []

    async def work(name: str) -> None:
        await turns.turn()
        order.append(name)
        clock.advance(SHARE_S)
        turns.end()

    turns.wait(lambda: order.append("first"))
    tasks = [asyncio.create_task(work(str(number))) for number in range(20)]
    lengths = []
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0)
        lengths.append(len(turns))

    assert order == ["first", *map(str, range(20))]
    woken = [before - after for before, after in pairwise(lengths)]
    assert max(woken) == round(QUEUE_S / SHARE_S)


async def test_what_has_begun_goes_on_for_little_of_a_turn() -> None:
    """A batch leaves most of the time for new work to others, though nobody waits in the queue."""
    clock = FakeClock(0.0)
    turns = FairTurns(asyncio.get_running_loop(), lambda: None, clock)
    shares: list[int] = []

    async def batch() -> None:
        for share in range(9):
            await turns.turn(has_begun=share > 0)
            shares.append(share)
            clock.advance(SHARE_S * 1.001)
            turns.end()

    task = asyncio.create_task(batch())
    done = [0]
    while not task.done():
        await asyncio.sleep(0)
        done.append(len(shares))

    assert shares == list(range(9))
    assert max(after - before for before, after in pairwise(done)) == round(BEGUN_S / SHARE_S)


async def test_large_input_has_the_queues_part_of_a_turn_for_itself() -> None:
    """It is decoded in one go, so that there is one of it in a turn, however much time is left."""
    turns = FairTurns(asyncio.get_running_loop(), lambda: None, FakeClock(0.0))
    waiting: list[int] = []

    async def work() -> None:
        await turns.turn(LARGE_BYTES + 1)
        turns.end()

    tasks = [asyncio.create_task(work()) for _ in range(4)]
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0)
        waiting.append(len(turns))

    assert [count for count in (4, 3, 2, 1, 0) if count in waiting] == [4, 3, 2, 1, 0]


async def test_large_bodies_are_decoded_one_in_a_turn() -> None:
    """Those that have become whole in one turn: otherwise they would add up to a pause."""
    async with running() as daemon:
        server = daemon.listener.raw
        sent = post(b'{"topic":"t","data":"%b"}' % (b"x" * (LARGE_BYTES + 1)))
        writers = [(await asyncio.open_connection("127.0.0.1", daemon.port))[1] for _ in range(3)]
        for writer in writers:
            writer.write(sent[:-1])
        await until(lambda: server.budget.used_bytes == 3 * (len(sent) - 1))
        # A clock of which each look takes more than half of the queues' part of a turn.
        daemon.hub.turns._clock_s = count(step=QUEUE_S * 0.6).__next__
        for connection in list(server.open):
            cast(RawConnection, connection).data_received(sent[-1:])
        published = [daemon.hub.topics.published]
        while published[-1] < 3:
            await asyncio.sleep(0)
            published.append(daemon.hub.topics.published)
        for writer in writers:
            writer.close()

    assert published[0] == 0
    assert max(after - before for before, after in pairwise(published)) == 1


async def test_steps_are_taken_in_as_many_shares_as_they_need() -> None:
    """Their result comes through, and so does their error."""
    clock = FakeClock(0.0)
    turns = FairTurns(asyncio.get_running_loop(), lambda: None, clock)

    def count(to: int) -> Any:
        for _ in range(to):
            clock.advance(SHARE_S / 3)
            yield
        if to == 13:
            raise ValueError(to)
        return to

    assert await turns.carry_out(count(100)) == 100
    with pytest.raises(ValueError, match="13"):
        await turns.carry_out(count(13))
    assert len(turns) == 0


async def test_long_work_takes_one_share_of_a_turn() -> None:
    """Though nobody else works: between two shares the loop is free for what is not shared out."""
    clock = HastyClock()
    turns = FairTurns(asyncio.get_running_loop(), lambda: None, clock)
    beats: list[int] = []
    steps: list[int] = []

    def work() -> Generator[None, None, None]:
        for _ in range(10):
            steps.append(len(beats))
            yield

    async def beat() -> None:
        while True:
            beats.append(1)
            await asyncio.sleep(0)

    beating = asyncio.create_task(beat())
    await turns.carry_out(work())
    beating.cancel()

    assert len(set(steps)) == len(steps) == 10


# --- a daemon that is always short of time -------------------------------------------------------


class HastyClock:
    """A clock of which each look costs a whole share."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += SHARE_S
        return self.now_s


def hurry(daemon: Daemon) -> None:
    """Let each piece of work in ``daemon`` use up its share."""
    daemon.hub.turns._clock_s = HastyClock()


@pytest.fixture(params=[True, False], ids=["raw", "aiohttp"])
async def hasty(request: pytest.FixtureRequest) -> AsyncIterator[Daemon]:
    async with running(raw_paths=request.param, max_connections=500) as daemon:
        hurry(daemon)
        yield daemon
        assert daemon.hub.counters.background_errors == 0
        await until(lambda: len(daemon.hub.turns) == 0)
        assert daemon.hub.input_budget.used_bytes == 0


OK = post('{"topic":"t","data":1}')
LAST = get("/health/live", "Connection: close")


def ending(opening: bytes, frames: bytes) -> bytes:
    """Return all that is sent over a WebSocket, its goodbye included."""
    return opening + frames + masked(8, b"\x03\xe8")


async def test_pipelined_requests_keep_their_order(hasty: Daemon) -> None:
    """Publishes, faults, pages and a body of another kind on one connection."""
    kinds = [OK, post("{"), OK, get("/health/live"), OK, OK]
    sent = b"".join(kinds * 40) + LAST

    answers = responses(await hasty.send_raw(sent, timeout_s=20))

    assert [answer.status for answer in answers] == [200, 400, 200, 200, 200, 200] * 40 + [200]
    offsets = [answer.json["offset"] for answer in answers if b'"offset"' in answer.body]
    assert offsets == list(range(1, 161))


async def test_bodies_in_small_chunks_arrive_whole(hasty: Daemon) -> None:
    """Each is parsed over many turns, and what is pipelined behind it waits."""
    data = "x" * 60_000
    body = json.dumps({"topic": "t", "data": data}).encode()
    head = b"POST /publish HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n"
    sent = (head + chunked(body, 1) + OK) * 2 + head + chunked(body, 1_000) + LAST

    answers = responses(await hasty.send_raw(sent, timeout_s=20))
    (topic,) = hasty.hub.topics

    assert [answer.json.get("offset") for answer in answers[:-1]] == [1, 2, 3, 4, 5]
    frames = hasty.hub.serve(topic, 0, 5, 1 << 20)
    assert [data.encode() in frame for frame in frames] == [True, False, True, False, True]


async def test_publish_socket_keeps_its_order(hasty: Daemon) -> None:
    """Frames that straddle slices, faults among them, and answers to each."""
    frames = b"".join(
        masked(1, b"{}" if ref % 7 == 0 else b'{"topic":"t","data":%d,"ref":%d}' % (ref, ref))
        for ref in range(1, 2_001)
    )

    answers = await hasty.send_raw(ending(publish_socket(), frames), timeout_s=20)
    (topic,) = hasty.hub.topics

    refs = [int(part.partition(b"}")[0]) for part in answers.split(b'"ref":')[1:]]
    assert refs == [ref for ref in range(1, 2_001) if ref % 7]
    assert topic.head == len(refs)


async def test_commands_keep_their_order(hasty: Daemon) -> None:
    """What is published is delivered to who subscribed before it, and to nobody after it left."""
    frames = b"".join(
        command(type="subscribe", topic="t", last=0, ref=3 * turn)
        + command(type="publish", topic="t", data=turn, ref=3 * turn + 1)
        + command(type="unsubscribe", topic="t", ref=3 * turn + 2)
        for turn in range(200)
    )

    answers = await hasty.send_raw(ending(commands_socket(), frames), timeout_s=20)

    refs = [int(part.partition(b"}")[0]) for part in answers.split(b'"ref":')[1:]]
    assert refs == list(range(600))
    assert hasty.hub.subscribers == 0


async def test_batches_and_figures_are_whole(hasty: Daemon) -> None:
    """Many clients at once, all of whose work is cut into shares."""

    async def batch(topic: int) -> list[int]:
        lines = b"".join(b'{"topic":"t%d","data":%d}\n' % (topic, n) for n in range(700))
        async with hasty.http.post(f"{hasty.url}/publish/batch", data=lines) as response:
            results = (await response.json())["results"]
        return [result["offset"] for result in results]

    offsets = await asyncio.gather(*map(batch, range(8)))
    figures = await asyncio.gather(*(hasty.get_json("/metrics?topics=10000") for _ in range(4)))

    assert offsets == [list(range(1, 701))] * 8
    for each in figures:
        assert sorted(topic["name"] for topic in each["topics"]) == [
            f"default-tenant:t{n}" for n in range(8)
        ]
        assert each["messages"]["published"] == 5_600


async def test_handshakes_at_once_all_succeed(hasty: Daemon) -> None:
    """They wait for their turns, and each subscriber gets what is published then."""
    async with asyncio.TaskGroup() as group:
        sockets = [
            group.create_task(hasty.http.ws_connect(f"{hasty.ws_url}/subscribe?topic=t"))
            for _ in range(60)
        ]
    await hasty.publish("t", "hello")
    messages = [json.loads(await (await socket).receive_str()) for socket in sockets]
    for socket in sockets:
        await socket.result().close()

    assert [message["data"] for message in messages] == ["hello"] * 60


async def test_client_that_shuts_its_side_gets_its_answers(hasty: Daemon) -> None:
    """Whatever was still held back when it did."""
    reader, writer = await asyncio.open_connection("127.0.0.1", hasty.port)
    writer.write(OK * 50 + get("/health/live") * 3)
    writer.write_eof()
    async with asyncio.timeout(20):
        answers = responses(await reader.read())
    writer.close()

    assert [answer.status for answer in answers] == [200] * 53


async def test_what_is_held_back_counts_against_the_budget(hasty: Daemon) -> None:
    """Beyond it a connection is refused, and the others go on."""
    hasty.hub.input_budget.max_bytes = 100
    hasty.hub.turns._fresh_s = FRESH_S

    first = responses(await hasty.send_raw(OK * 3 + LAST))
    hasty.hub.input_budget.max_bytes = 1 << 20
    second = responses(await hasty.send_raw(OK + LAST))

    assert [answer.status for answer in first] == [503]
    assert [answer.status for answer in second] == [200, 200]
