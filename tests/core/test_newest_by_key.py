"""The policy `latest`: the newest message of each key while behind, everything while live.

What holds over random schedules is in test_policies.py and test_positions_model.py.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from clients import (
    RECORD,
    SMALL_BUFFERS,
    client_of,
    raw_subscriber,
    subscribe,
)
from daemons import Daemon, running
from fakes import FakeSink, TopicDriver, frame_of, frames_in, make_topic, sink_of

from clevrd.core.drop_strategy import LATEST
from clevrd.core.gap_log import GapLog
from clevrd.core.newest_by_key import NewestByKey
from clevrd.core.recent_cache import RecentMessageCache
from clevrd.core.subscriber import Subscriber


def lagging_latest(**settings: Any) -> tuple[TopicDriver, Subscriber]:
    """Return a driver and a LATEST that has been given nothing yet and is blocked."""
    driver = TopicDriver(make_topic(**settings))
    reader = driver.join(Subscriber(FakeSink(), LATEST))
    driver.block(reader)
    return driver, reader


# --- what it is given ----------------------------------------------------------------------------


def test_live_latest_gets_everything() -> None:
    """Who keeps up loses nothing, whatever the keys; and no map of keys is kept for it."""
    driver = TopicDriver(make_topic())
    reader = driver.join(Subscriber(FakeSink(), LATEST))

    driver.send_keys("aabab  b")

    assert sink_of(reader).offsets == list(range(1, 9))
    assert reader.dropped == driver.topic.newest.readers == 0


@pytest.mark.parametrize(
    ("keys", "given"),
    [("aaaa", [4]), ("    ", [4]), ("abab", [3, 4]), ("abcd", [1, 2, 3, 4]), ("ab b", [1, 3, 4])],
)
def test_stalled_latest_gets_the_newest_of_each_key(keys: str, given: list[int]) -> None:
    """In the order of their offsets; messages without a key supersede each other only."""
    driver, reader = lagging_latest()

    driver.send_keys(keys)
    driver.unblock(reader)

    assert sink_of(reader).offsets == given
    assert driver.topic.losses.slow_consumer == reader.dropped == 4 - len(given)


def test_latest_that_is_up_to_date_gets_everything_again() -> None:
    """A stall ends; keys of the stall don't hold back what comes after it."""
    driver, reader = lagging_latest()
    driver.send_keys("aab")

    driver.unblock(reader)
    driver.send_keys("aab")

    assert sink_of(reader).offsets == [2, 3, 4, 5, 6]


def test_superseded_between_two_reads_is_not_sent() -> None:
    """What waits is decided at each read: half-way through, the newest is newer."""
    driver, reader = lagging_latest()
    driver.send_keys("abcd")

    reader.is_blocked = False
    driver.read_once(reader, max_bytes=2 * 64)
    driver.send_keys("c")
    driver.catch_up(reader)

    assert sink_of(reader).offsets == [1, 2, 4, 5]
    assert reader.dropped == 1


@pytest.mark.parametrize(("window", "given"), [(1, [6]), (3, [2, 5, 6]), (9, [1, 2, 5, 6])])
def test_window_bounds_the_keys(window: int, given: list[int]) -> None:
    """Of more keys than its window those seen last are kept."""
    driver, reader = lagging_latest(window=window)

    driver.send_keys("abcddc")
    driver.unblock(reader)

    assert sink_of(reader).offsets == given


def test_joining_gives_the_newest_of_each_key_uncounted() -> None:
    """The backlog is a snapshot; who joins was never offered the rest, so it is not slow."""
    driver = TopicDriver(make_topic(window=1))
    driver.send_keys("abcabcabb")

    reader = driver.join(Subscriber(FakeSink(), LATEST), last=8)

    assert sink_of(reader).offsets == [6, 7, 9]
    assert (driver.topic.offered, reader.dropped) == (3, 0)
    assert driver.topic.slow_count(0.0) == 0


# --- what it costs -------------------------------------------------------------------------------


def test_many_keys_are_not_all_remembered() -> None:
    """What no reader asks for is forgotten: as many keys as the window, and some."""
    driver, reader = lagging_latest(window=10, ring_messages=10_000)

    for turn in range(50):
        driver.send_keys("".join(chr(ord("a") + (turn * 7 + at) % 26) for at in range(40)))
    for offset in range(1, 2_000):
        key = "".join(chr(ord("a") + int(digit)) for digit in str(offset))
        driver.publish(key="z" + key)
    driver.flush()
    known = len(driver.topic.newest)
    driver.unblock(reader)

    assert known <= 2 * 10 + 64
    assert sink_of(reader).offsets == list(range(3_990, 4_000))
    assert driver.topic.newest.readers == 0


def distinct_keys(driver: TopicDriver, count: int) -> None:
    """Send so many messages, none with the key of another."""
    for number in range(count):
        driver.publish(key=chr(ord("a") + number // 26) + chr(ord("a") + number % 26))
    driver.flush()


def test_what_was_forgotten_is_there_for_who_asks_for_more() -> None:
    """A backlog larger than what the others need is read from the ring again."""
    driver, _ = lagging_latest(window=1)
    distinct_keys(driver, 200)

    reader = driver.join(Subscriber(FakeSink(), LATEST), last=150)

    assert sink_of(reader).offsets == list(range(51, 201))


@pytest.mark.parametrize(("evicted", "after"), [(6, 2), (6, 6), (1, 0), (10, 3)])
def test_keys_are_read_from_what_the_ring_has(evicted: int, after: int) -> None:
    """What it gave up, if only the last of it, is no key and no place."""
    ring = RecentMessageCache(100, 1 << 20)
    ring.extend([frame_of(offset, key="abcdefghij"[offset - 1]) for offset in range(1, 11)])
    ring.evict(evicted)
    newest = NewestByKey(edge=10)

    newest.reach_back(ring, after, window=100)

    assert newest.after(0, 100) == list(range(max(evicted, after) + 1, 11))
    assert len(newest) == 10 - max(evicted, after)


def test_window_that_grows_holds_more_keys() -> None:
    """A reader that lags when it grows has the larger one for what comes then."""
    driver, reader = lagging_latest(window=1)

    driver.topic.set_window(200, now_s=0.0)
    distinct_keys(driver, 190)
    driver.unblock(reader)

    assert sink_of(reader).offsets == list(range(1, 191))


# --- reasons -------------------------------------------------------------------------------------


def test_ring_that_moved_on_is_the_reason_only_for_the_newest() -> None:
    """What was superseded would not have been given anyway."""
    driver, reader = lagging_latest(ring_bytes=3 * (64 + 56))

    driver.send_keys("abacad")
    driver.topic.settle(0.0)

    losses = driver.topic.losses
    assert (losses.slow_consumer, losses.retention) == (2, 1)  # 1 and 3; 2, the only b.
    driver.unblock(reader)
    assert sink_of(reader).offsets == [4, 5, 6]


def test_round_that_the_ring_gave_up_is_lost() -> None:
    """Who blocks before its turn in such a round has nothing of it waiting."""
    driver = TopicDriver(make_topic(ring_messages=3))
    reader = driver.join(Subscriber(FakeSink(), LATEST))
    driver.send(6)
    driver.publish(1)
    driver.begin()

    driver.publish(4)
    driver.block(reader)
    driver.unblock(reader)
    driver.flush()

    assert sink_of(reader).offsets == [1, 2, 3, 4, 5, 6, 9, 10, 11]
    assert reader.dropped == 2


@pytest.mark.parametrize(("keys", "reason"), [("abcdef", "retention"), ("aacdef", "slow_consumer")])
def test_gap_names_the_ring_where_nothing_was_superseded(keys: str, reason: str) -> None:
    """It is the reader's slowness that is named where that was part of it."""
    driver = TopicDriver(make_topic(ring_bytes=3 * (64 + 56)))
    reader = driver.join(Subscriber(FakeSink(), LATEST, gaps=GapLog("t")))
    driver.block(reader)

    driver.send_keys(keys)
    driver.unblock(reader)

    (frame, *_) = frames_in(sink_of(reader).received.partition(b"4.")[0])
    assert json.loads(bytes(frame.data)) == {
        "type": "gap", "topic": "t", "from": 1, "to": 3, "count": 3, "reason": reason
    }  # fmt: skip


# --- over the wire -------------------------------------------------------------------------------


async def send_keys(daemon: Daemon, keys: list[str]) -> None:
    """Publish a message for each key; the empty one is none."""
    async with client_of(f"{daemon.ws_url}/publish") as socket:
        for number, key in enumerate(keys):
            frame: dict[str, Any] = {"topic": "t", "data": RECORD.decode(), "ref": number}
            await socket.send(json.dumps({**frame, "key": key} if key else frame))
        for _ in keys:
            assert json.loads(await socket.recv())["success"]


@pytest.mark.parametrize("raw_paths", [True, False])
async def test_key_is_last_in_the_message_and_only_where_given(raw_paths: bool) -> None:
    """Over every way to publish; without a key the bytes are those of a message without keys."""
    async with running(raw_paths=raw_paths) as daemon, subscribe(daemon.ws_url) as reader:
        with_key = {"topic": "t", "data": 1, "key": 'EUR/"USD"'}
        async with daemon.http.post(f"{daemon.url}/publish", json=with_key) as response:
            assert response.status == 200
        batch = [{"topic": "t", "data": 2, "key": "é"}, {"topic": "t", "data": 3, "key": ""}]
        async with daemon.http.post(f"{daemon.url}/publish/batch", json=batch) as response:
            refused = (await response.json())["results"][1]
        await daemon.publish("t", 4)
        seen = [str(await reader.recv()) for _ in range(3)]

    assert seen[0].endswith(r',"offset":1,"key":"EUR/\"USD\""}')
    assert seen[1].endswith(',"offset":2,"key":"é"}')
    assert seen[2].endswith(',"offset":3}')
    assert refused["error"] == "The key is empty; give one of 1 to 255 bytes, or leave it out."


async def test_stalled_latest_over_a_socket_has_no_hole_untold() -> None:
    """Messages and gaps follow each other without a hole, and the last of each key is there."""
    keys = [f"k{number % 7}" for number in range(600)] + ["rare", "", "k1", "k1", ""]
    query = "topic=t&control=1&last=0&policy=latest"
    async with (
        running(**SMALL_BUFFERS) as daemon,
        await raw_subscriber(daemon.port, query, receive_bytes=4096) as reader,
    ):
        await send_keys(daemon, keys)
        figures = await daemon.get_json("/metrics")
        position = (await reader.message())["offset"]
        last: dict[str, int] = {}
        lost = 0
        while position < len(keys):
            frame = await reader.message()
            assert frame.get("from", frame.get("offset")) == position + 1
            position = frame.get("to", frame.get("offset"))
            if "type" in frame:
                assert frame["reason"] == "slow_consumer"
                lost += frame["count"]
            else:
                last[frame.get("key", "")] = frame["offset"]

    assert last == {key: offset for offset, key in enumerate(keys, 1)}
    assert lost == sum(figures["messages"]["dropped"].values()) > 100


async def test_resume_with_latest_tells_what_it_passes_over() -> None:
    """A position gives a snapshot of what came after it, with the holes where they are."""
    async with running() as daemon:
        await send_keys(daemon, ["a", "b", "a", "c", "c", "b"])
        epoch = (await daemon.publish("t", 1))["epoch"]

        position = {"offset": 1, "epoch": epoch, "policy": "latest", "control": 1}
        async with subscribe(daemon.ws_url, **position) as reader:
            frames = [json.loads(await reader.recv()) for _ in range(7)]
        figures = await daemon.get_json("/metrics")

    assert (frames[0]["offset"], frames[0]["recovered"]) == (1, True)
    told = [(frame["from"], frame["to"]) if "to" in frame else frame["offset"] for frame in frames]
    assert told[1:] == [(2, 2), 3, (4, 4), 5, 6, 7]
    assert figures["messages"]["dropped"]["slow_consumer"] == figures["slow_subscribers"] == 0
