"""Messages with a time to live: which have expired, and what a lagging reader is given of them."""

from __future__ import annotations

import random

import msgspec
import pytest
from fakes import FakeSink, TopicDriver, make_topic, sink_of

from clevrd.core.drop_strategy import DropStrategy
from clevrd.core.expiring import Expiring
from clevrd.core.message import KeyedMessage, Message, message_of
from clevrd.core.server_frames import FrameEncoder, key_of, ttl_of
from clevrd.core.subscriber import Subscriber

STAMP = ("msg-20261123-171935.587355", "2026-11-23T17:19:35.587355Z")
RAW = msgspec.Raw


def test_expired_offsets_are_found_as_a_list_finds_them() -> None:
    """Every question is answered as by looking at all messages, however many are forgotten."""
    rng = random.Random(7)  # noqa: S311  # no secret
    expiring = Expiring()
    until_s: dict[int, float] = {}
    first = 1
    for offset in range(1, 3_000):
        if rng.random() < 0.6:
            until_s[offset] = rng.choice([0.0, 1.0, 2.0])
            expiring.note(offset, until_s[offset], first)
        first = max(first, offset - 100)
        expiring.now_s = rng.choice([0.5, 1.5])
        over = {each for each, end_s in until_s.items() if end_s <= expiring.now_s}
        after = rng.randrange(first - 1, offset + 1)
        upto = rng.randrange(after, offset + 1)

        found = [each for each in range(after + 1, upto + 1) if each in over]
        end = after
        while end < upto and end + 1 in over:
            end += 1
        assert expiring.next_expired(after, upto) == (found[0] if found else 0)
        assert expiring.end_of_expired(after, upto) == end
        assert expiring.has_expired(offset) == (offset in over)
    # 100 in the ring, as many again, and what is let go of together.
    assert len(expiring) <= 256 + 200


@pytest.mark.parametrize("key", [None, "k", '"\\', '","offset":1,"ttl_s":9,"key":"x', "é" * 127])
def test_frame_says_its_time_to_live(key: str | None) -> None:
    """It is found behind the offset, and nothing that a publisher chooses passes for it."""
    encode = FrameEncoder().frame
    data = RAW(b'["\\",\\"offset\\":1,\\"ttl_s\\":5}",{"timestamp":"","offset":1,"ttl_s":5}]')
    expires = message_of(STAMP, "t", "tenant", data, 7, key, 0.5)
    plain: Message = (
        Message(STAMP[0], "t", "tenant", data, STAMP[1], 7)
        if key is None
        else KeyedMessage(STAMP[0], "t", "tenant", data, STAMP[1], 7, key)
    )

    assert ttl_of(encode(expires)) == 0.5
    assert ttl_of(encode(plain)) is None
    spelled = b"" if key is None else msgspec.json.encode(key)[1:-1]
    assert key_of(encode(expires)) == key_of(encode(plain)) == spelled
    assert msgspec.structs.fields(expires)[-1].name == ("ttl_s" if key is None else "key")


@pytest.mark.parametrize("strategy", [DropStrategy.DROP_OLDEST, DropStrategy.DROP_NEWEST])
def test_lagging_reader_is_given_no_expired_message(strategy: DropStrategy) -> None:
    """What expired while it lagged is passed over, counted by its reason, and makes it not slow."""
    topic = make_topic()
    driver = TopicDriver(topic)
    reader = driver.join(Subscriber(FakeSink(), strategy))
    driver.block(reader)
    driver.publish(10)
    for offset in (1, 2, 5, 9, 10):
        topic.note_expiry(offset, 1.0)
    topic.note_expiry(7, 3.0)
    driver.flush()
    driver.now_s = 2.0

    driver.unblock(reader)
    driver.send(1)

    assert sink_of(reader).offsets == [3, 4, 6, 7, 8, 11]
    assert (topic.losses.expired, topic.losses.total, reader.dropped) == (5, 5, 5)
    assert topic.offered == topic.delivered + topic.losses.total
    assert topic.slow_count(2.0) == 0
    assert reader.dropped_in_stall == 0


def test_latest_reader_is_given_no_expired_message() -> None:
    """An expired newest message of a key is not given, and what it had superseded neither."""
    topic = make_topic()
    driver = TopicDriver(topic)
    reader = driver.join(Subscriber(FakeSink(), DropStrategy.LATEST))
    driver.block(reader)
    driver.send_keys("aabbcc")
    for offset in (2, 6):
        topic.note_expiry(offset, 1.0)
    driver.now_s = 2.0

    driver.unblock(reader)
    driver.send_keys("a")

    assert sink_of(reader).offsets == [4, 7]
    assert (topic.losses.expired, topic.losses.slow_consumer) == (2, 3)
    assert topic.offered == topic.delivered + topic.losses.total


@pytest.mark.parametrize("strategy", list(DropStrategy))
def test_no_message_is_unaccounted_for_whatever_expires(strategy: DropStrategy) -> None:
    """Offered is delivered, dropped, discarded and queued, after every step."""
    rng = random.Random(11)  # noqa: S311  # no secret
    for _ in range(60):
        topic = make_topic(ring_messages=rng.choice([5, 20]), window=rng.choice([3, 100]))
        driver = TopicDriver(topic)
        driver.may_half_open = True
        reader = driver.join(Subscriber(FakeSink(), strategy))
        for _ in range(60):
            step = rng.randrange(5)
            if step == 0:
                driver.block(reader)
            elif step == 1 and reader.is_blocked:
                driver.unblock(reader)
            elif step == 2:
                driver.now_s += rng.choice([0.1, 1.0])
            else:
                driver.publish(key=rng.choice("abc"))
                if rng.random() < 0.5:
                    topic.note_expiry(topic.head, driver.now_s + rng.choice([0.5, 2.0]))
                driver.flush()
            topic.settle(driver.now_s)
            lost = topic.losses.total
            assert topic.offered == topic.delivered + lost + topic.discarded + topic.queued()
            offsets = sink_of(reader).offsets
            assert offsets == sorted(set(offsets))
