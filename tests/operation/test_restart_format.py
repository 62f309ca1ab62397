"""The state file's format: what was written comes back exactly, or is refused; never half of it."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from typing import NamedTuple
from zlib import crc32

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clevrd.core.message_ids import MessageIds
from clevrd.core.recent_cache import RecentMessageCache
from clevrd.core.saved_topic import SavedTopic
from clevrd.core.server_frames import text_frame
from clevrd.restart.format import (
    CHUNK_BYTES,
    BadState,
    StateReader,
    end_record,
    file_head,
    split_frames,
    topic_record,
    without_messages,
)

MARKER = bytes(range(16))
HEAD_BYTES = 36
CREATED_AT = "2026-11-23T17:19:35.587355Z"
LAST_ID_US = 1_795_454_375_587_355


class Stand(NamedTuple):
    """A topic as a test compares it: where it stands, and its messages."""

    topic: SavedTopic
    frames: list[bytes]


def stand(name: str, first: int, payloads: list[bytes], tenant: str = "acme") -> Stand:
    """Return a topic with these messages from offset ``first`` on."""
    frames = [text_frame(payload) for payload in payloads]
    return Stand(SavedTopic(tenant, name, "f7502dc3", CREATED_AT, first, len(frames)), frames)


def payload(size: int) -> bytes:
    """Return ``size`` bytes, different from place to place."""
    return bytes(index * 7 % 251 for index in range(size))


# Frames with each of the three lengths of header, an empty ring, and offsets far from 1.
STANDS = [
    stand("orders", 1, [payload(64), payload(200), payload(70_000)]),
    stand("prices", 4_000_000_000, [payload(99)] * 5, tenant="other"),
    stand("quiet", 18, []),
    stand("schön", 7, [payload(300)]),
]


def ring_of(each: Stand) -> RecentMessageCache:
    ring = RecentMessageCache(1 << 30, 1 << 40, each.topic.first)
    ring.extend(each.frames)
    return ring


def written(stands: list[Stand], marker: bytes = MARKER) -> bytes:
    """Return the file of these topics."""
    records = (part for each in stands for part in topic_record(marker, each.topic, ring_of(each)))
    return b"".join([file_head(marker, LAST_ID_US), *records, end_record(marker, len(stands))])


def roomy(topic: SavedTopic) -> RecentMessageCache:
    """Return a ring that holds everything."""
    return RecentMessageCache(1 << 30, 1 << 40, topic.first)


class Reading(NamedTuple):
    """All that was read of a file."""

    found: dict[str, tuple[SavedTopic, list[bytes] | None]]
    damaged: int
    topics_written: int | None


def read(
    content: bytes, ring_for: Callable[[SavedTopic], RecentMessageCache | None] = roomy
) -> Reading:
    reader = StateReader(io.BytesIO(content), len(content))
    found = {
        topic.name: (topic, None if ring is None else ring.frames(ring.first - 1, ring.head))
        for topic, ring in reader.topics(ring_for)
    }
    return Reading(found, reader.damaged, reader.written)


def test_what_was_written_comes_back_byte_for_byte() -> None:
    """Tenants, names, epochs, offsets and frames, and the last id."""
    content = written(STANDS)

    found, damaged, count = read(content)

    assert found == {each.topic.name: (each.topic, each.frames) for each in STANDS}
    assert (damaged, count) == (0, len(STANDS))
    assert StateReader(io.BytesIO(content), len(content)).last_id_us == LAST_ID_US


def test_format_is_the_one_that_other_releases_read() -> None:
    """Bytes of version 1: who changes them changes the version."""
    content = written([stand("t", 3, [b"{}"])])

    assert content.hex() == (
        "636c657672640a01000102030405060708090a0b0c0d0e0f000660f4cc446e1bc2a5e9bf00010203"
        "0405060708090a0b0c0d0e0f54005b000000000000000486a674656e616e74a461636d65a46e616d"
        "65a174a565706f6368a86637353032646333aa637265617465645f6174bb323032362d31312d3233"
        "5431373a31393a33352e3538373335355aa5666972737403a86d657373616765730115d76e2f8102"
        "7b7d955a7790000102030405060708090a0b0c0d0e0f4500010000000000000000014431b897"
    )


@given(st.data())
def test_any_damage_leaves_what_is_exact_or_nothing(data: st.DataObject) -> None:
    """A byte flipped, cut out, or put in anywhere: no topic comes back other than it was."""
    content = bytearray(written(STANDS))
    place = data.draw(st.integers(0, len(content) - 1))
    match data.draw(st.sampled_from(["flip", "cut", "remove", "insert", "zeros"])):
        case "flip":
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        case "cut":
            del content[place:]
        case "remove":
            del content[place : place + data.draw(st.integers(1, 300))]
        case "insert":
            content[place:place] = data.draw(st.binary(min_size=1, max_size=100))
        case _:
            content[place : place + 4096] = bytes(len(content[place : place + 4096]))

    try:
        found, damaged, count = read(bytes(content))
    except BadState:
        return

    for each in STANDS:
        topic, frames = found.get(each.topic.name, (each.topic, each.frames))
        assert (topic, frames or each.frames) == each
    if len(found) < len(STANDS) or any(frames is None for _, frames in found.values()):
        assert damaged or count is None


def test_one_flipped_bit_costs_one_topic() -> None:
    """Wherever it is: the others are all there, with their messages."""
    sound = written(STANDS[1:])
    for place in range(HEAD_BYTES, len(sound)):
        content = bytearray(sound)
        content[place] ^= 0x10

        found, damaged, _ = read(bytes(content))

        whole = [name for name, (_, frames) in found.items() if frames is not None]
        assert (damaged, len(whole) >= len(STANDS) - 2) == (1, True), place


def test_damaged_messages_cost_the_messages_and_not_the_position() -> None:
    """Epoch and newest offset have a checksum of their own: who is up to date loses nothing."""
    content = bytearray(written(STANDS))
    content[content.index(payload(200)) + 100] ^= 1

    found, damaged, _ = read(bytes(content))

    assert found["orders"] == (STANDS[0].topic, None)
    assert found["prices"] == STANDS[1]
    assert damaged == 1


@pytest.mark.parametrize("cut", [1, 10, 31, 60])
def test_torn_end_is_seen(cut: int) -> None:
    """A file that lacks its end does not pass for whole, though its topics are."""
    found, _, count = read(written(STANDS)[:-cut])

    assert count is None
    assert found["orders"] == STANDS[0]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not a state file"),
        (b"PK\x03\x04" * 100, "not a state file"),
        (b"clevrd\n", "damaged"),
        (written(STANDS)[:20], "damaged"),
        (written(STANDS).replace(b"clevrd\n\x01", b"clevrd\n\x02", 1), "damaged"),
    ],
)
def test_other_files_are_refused(content: bytes, why: str) -> None:
    """Empty, foreign, or broken in its first bytes: refused with a reason."""
    with pytest.raises(BadState, match=why):
        read(content)


def test_later_version_is_refused_as_such() -> None:
    """After a step back to an older release the reason is the version, not damage."""
    head = struct.pack(">7sB16sQ", b"clevrd\n", 2, MARKER, 0)

    with pytest.raises(BadState, match="version 2, and this clevrd reads 1"):
        read(head + struct.pack(">I", crc32(head)))


def test_record_with_fields_of_a_later_release_is_read() -> None:
    """A field more in where a topic stands is no new version."""
    meaning = msgspec.msgpack.encode({**msgspec.to_builtins(STANDS[2].topic), "later": [1, 2]})
    record = struct.pack(">16scHQ", MARKER, b"T", len(meaning), 0) + meaning
    summed = record + struct.pack(">I", crc32(record)) + bytes(4)
    content = file_head(MARKER, 0) + summed + end_record(MARKER, 1)

    found, damaged, _ = read(content)

    assert (found["quiet"], damaged) == ((STANDS[2].topic, []), 0)


# --- made to harm --------------------------------------------------------------------------------


def forged(meaning: object, body: bytes, body_bytes: int | None = None) -> bytes:
    """Return a file of one record whose checksums are right, whatever it says."""
    encoded = msgspec.msgpack.encode(meaning)
    size = len(body) if body_bytes is None else body_bytes
    record = struct.pack(">16scHQ", MARKER, b"T", len(encoded), size) + encoded
    summed = record + struct.pack(">I", crc32(record))
    sums = struct.pack(">I", crc32(body))
    return file_head(MARKER, 0) + summed + body + sums + end_record(MARKER, 1)


TOPIC = msgspec.to_builtins(stand("t", 1, [b"x"]).topic)


@pytest.mark.parametrize(
    "meaning",
    [
        {**TOPIC, "name": ""},
        {**TOPIC, "name": "n" * 300},
        {**TOPIC, "tenant": "a:b"},
        {**TOPIC, "epoch": 'a"b'},
        {**TOPIC, "epoch": "a" * 65},
        {**TOPIC, "created_at": "yesterday"},
        {**TOPIC, "first": 0},
        {**TOPIC, "first": 10**18},
        {**TOPIC, "messages": -1},
        {"tenant": "acme"},
        [1, 2, 3],
        None,
    ],
)
def test_record_that_says_what_cannot_be_is_damaged(meaning: object) -> None:
    """Right checksums make no topic of what no daemon writes."""
    found, damaged, count = read(forged(meaning, text_frame(b"x" * 64)))

    assert (found, damaged, count) == ({}, 1, 1)


@pytest.mark.parametrize(
    "body",
    [
        b"\x00" * 40,
        b"\x81\xff" + b"\xff" * 8,
        b"\x81\x7f" + (1 << 40).to_bytes(8, "big") + b"x" * 100,
        b"\x81\x7f" + (1 << 63).to_bytes(8, "big"),
        b"\x81",
        text_frame(b"x" * 64) + b"\x81\x05abc",
        text_frame(b"x" * 64) * 2,
        b"",
    ],
)
def test_messages_that_are_no_frames_are_damaged(body: bytes) -> None:
    """What is no whole frame, and more or fewer than were said, never reaches a ring."""
    found, damaged, _ = read(forged(TOPIC, body))

    assert found["t"][1] is None
    assert damaged == 1


@pytest.mark.parametrize("body_bytes", [100, 1 << 31, (1 << 64) - 1])
def test_length_beyond_the_file_allocates_nothing(body_bytes: int) -> None:
    """A length is looked at against the file's size before anything is read."""
    content = forged(TOPIC, b"", body_bytes)
    asked: list[int] = []

    class Asked(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            assert size is not None
            asked.append(size)
            return super().read(size)

    reader = StateReader(Asked(content), len(content))
    ((_, ring),) = reader.topics(roomy)

    assert ring is None
    assert reader.damaged == 1
    assert max(asked) <= 1 << 20


def test_marker_inside_a_message_forges_no_record() -> None:
    """Records are found by their place; the marker is random in each file, and not told."""
    evil = b"".join(topic_record(b"\xee" * 16, stand("evil", 1, []).topic, None))
    content = bytearray(written([stand("good", 1, [evil]), stand("next", 1, [payload(80)])]))
    content[HEAD_BYTES + 20] ^= 1

    found, damaged, _ = read(bytes(content))

    assert set(found) == {"next"}
    assert damaged == 1


# --- limits that have shrunk ---------------------------------------------------------------------


def test_tail_is_cut_to_the_bounds_that_hold_now() -> None:
    """A smaller ring gets the newest messages, and its offsets are right."""
    content = written([stand("t", 101, [payload(100 + size) for size in range(50)])])
    rings: list[RecentMessageCache] = []

    def small(topic: SavedTopic) -> RecentMessageCache:
        rings.append(RecentMessageCache(10, 1 << 20, topic.first))
        return rings[-1]

    found, damaged, _ = read(content, small)

    assert (rings[0].first, rings[0].head, damaged) == (141, 150, 0)
    assert found["t"][1] == [text_frame(payload(100 + size)) for size in range(40, 50)]


def test_messages_are_passed_over_where_there_is_no_room() -> None:
    """Without a ring a topic keeps its position, and the next ones are found."""
    found, damaged, count = read(written(STANDS), lambda _: None)

    assert {name: topic.head for name, (topic, _) in found.items()} == {
        each.topic.name: each.topic.first + len(each.frames) - 1 for each in STANDS
    }
    assert (damaged, count) == (0, len(STANDS))


def test_topic_without_messages_keeps_its_newest_offset() -> None:
    """What is written when the time is up."""
    bare = without_messages(STANDS[0].topic)

    assert (bare.first, bare.messages, bare.head) == (4, 0, STANDS[0].topic.head)


def test_frame_longer_than_what_is_read_at_a_time() -> None:
    """A message of megabytes between small ones is put together again."""
    each = stand("t", 1, [payload(80), payload(3_000_000), payload(90)] * 2)

    assert read(written([each])).found["t"] == each


@pytest.mark.parametrize("size", [2, 99, 200, 70_000])
@pytest.mark.parametrize("before", range(12))
def test_frame_whose_header_is_cut_by_the_end_of_a_read(before: int, size: int) -> None:
    """Wherever in its header what is read at a time ends, the frame is put together again."""
    first = b"x" * (CHUNK_BYTES - before - len(text_frame(b"x" * 70_000)) + 70_000)
    each = stand("t", 1, [first, payload(size), payload(80)])

    assert len(each.frames[0]) == CHUNK_BYTES - before
    assert read(written([each])) == ({"t": each}, 0, 1)


@pytest.mark.parametrize("size", [2, 99, 200, 70_000])
def test_frames_are_parted_wherever_they_are_cut(size: int) -> None:
    """What is whole is returned, and what is not is the rest, to the byte."""
    frames = [text_frame(payload(size)), text_frame(payload(300))]
    joined = b"".join(frames)

    for cut in (*range(16), *range(len(frames[0]) - 3, len(joined) + 1)):
        found, rest = split_frames(joined[:cut])
        assert found == [frames[index] for index in range(len(found))]
        assert b"".join(found) + rest == joined[:cut]
        assert len(found) == (cut >= len(frames[0])) + (cut == len(joined))


@pytest.mark.parametrize("stray", [b"\xff", MARKER[:1], MARKER[:15], MARKER[:15] * 2, b"T" * 1_000])
def test_stray_bytes_before_a_record_cost_no_topic(stray: bytes) -> None:
    """The record right behind them is found, were it a single byte, or how a marker begins."""
    records = [b"".join(topic_record(MARKER, each.topic, ring_of(each))) for each in STANDS]
    parts = [file_head(MARKER, LAST_ID_US), *records, end_record(MARKER, len(STANDS))]

    for place in range(1, len(parts)):
        found, damaged, count = read(b"".join([*parts[:place], stray, *parts[place:]]))

        assert found == {each.topic.name: each for each in STANDS}
        assert (damaged, count) == (1, len(STANDS))


@pytest.mark.parametrize("before", range(-1, 18))
def test_marker_is_found_across_the_ends_of_reads(before: int) -> None:
    """A record behind more damage than is read at a time begins where one read ends."""
    records = [b"".join(topic_record(MARKER, each.topic, ring_of(each))) for each in STANDS]
    # The search begins at the second byte of what is damaged.
    junk = b"\xff" * (CHUNK_BYTES + 1 - before)
    content = b"".join([file_head(MARKER, 0), junk, *records, end_record(MARKER, len(STANDS))])

    found, damaged, count = read(content)

    assert found == {each.topic.name: each for each in STANDS}
    assert (damaged, count) == (1, len(STANDS))


def test_ids_go_on_behind_those_of_the_process_before() -> None:
    """Also when the clock was set back meanwhile; the timestamp is the clock's."""
    ids = MessageIds()
    ids.go_on_after(LAST_ID_US)

    message_id, timestamp = ids.next(LAST_ID_US - 3_600_000_000)

    assert message_id == "msg-20261123-171935.587356"
    assert timestamp < "2026-11-23T16:20"
    assert ids.last_us == LAST_ID_US + 1
