"""The ring: what is held under which offset, and what has to go."""

from __future__ import annotations

from fakes import frame_of
from hypothesis import given
from hypothesis import strategies as st

from clevrd.core.recent_cache import FRAME_OVERHEAD_BYTES, RecentMessageCache

SIZE = 64
HELD = SIZE + FRAME_OVERHEAD_BYTES


def filled(
    count: int, *, max_messages: int = 1_000, max_bytes: int = 1 << 30
) -> RecentMessageCache:
    """Return a ring after ``count`` appends, each followed by the evictions it asked for."""
    ring = RecentMessageCache(max_messages, max_bytes)
    for offset in range(1, count + 1):
        ring.evict(ring.extend([frame_of(offset, SIZE)]))
    return ring


def all_of(ring: RecentMessageCache) -> list[bytes]:
    """Return every frame the ring holds."""
    return ring.frames(ring.first - 1, ring.head)


def test_empty_ring_is_before_its_first_offset() -> None:
    """Nothing is held, and the next message takes the offset the ring starts with."""
    ring = RecentMessageCache(10, 1_000, first=7)

    assert (len(ring), ring.first, ring.head, ring.size_bytes) == (0, 7, 6, 0)
    assert ring.take(6, 6, 1_000) == []


def test_bound_by_count_keeps_the_newest() -> None:
    """A full ring holds exactly its bound, under the offsets the messages had."""
    ring = filled(25, max_messages=10)

    assert (len(ring), ring.first, ring.head) == (10, 16, 25)
    assert all_of(ring) == [frame_of(offset, SIZE) for offset in range(16, 26)]


def test_bound_by_bytes_keeps_the_newest() -> None:
    """Frames count with what they cost besides their bytes."""
    ring = filled(25, max_bytes=4 * HELD)

    assert (len(ring), ring.first, ring.size_bytes) == (4, 22, 4 * HELD)


def test_newest_is_kept_however_large() -> None:
    """One message over the bound in bytes pushes out all others, but not itself."""
    ring = filled(5, max_bytes=4 * HELD)

    ring.evict(ring.extend([frame_of(6, 10_000)]))

    assert all_of(ring) == [frame_of(6, 10_000)]


def test_extending_does_not_evict() -> None:
    """What is too much stays readable until the topic has prepared its readers."""
    ring = filled(10, max_messages=10)

    excess = ring.extend([frame_of(11, SIZE)])

    assert excess == 1
    assert ring.take(0, 1, 1_000) == [frame_of(1, SIZE)]


def test_evicting_all_leaves_the_offsets_going_on() -> None:
    """An emptied ring still knows its head."""
    ring = filled(10)

    ring.evict(10)
    ring.extend([frame_of(11, SIZE)])

    assert (ring.first, ring.head, all_of(ring)) == (11, 11, [frame_of(11, SIZE)])


def test_evicted_frames_are_let_go() -> None:
    """The list behind the ring stays within twice what is held, and holds no evicted bytes."""
    ring = filled(10_000, max_messages=10)

    entries = ring._frames

    assert len(entries) <= 20
    assert sum(map(len, entries)) == 10 * SIZE


def test_take_stops_where_bytes_are_spent() -> None:
    """A read is given what fits, to the byte."""
    ring = filled(10)

    assert len(ring.take(0, 10, 3 * SIZE)) == 3
    assert len(ring.take(0, 10, 3 * SIZE - 1)) == 2
    assert len(ring.take(0, 10, 100 * SIZE)) == 10
    assert ring.take(3, 5, 100 * SIZE) == [frame_of(4, SIZE), frame_of(5, SIZE)]


def test_take_gives_at_least_one_frame() -> None:
    """A frame larger than what may be read at once is read all the same."""
    ring = filled(2)

    assert ring.take(0, 2, 1) == [frame_of(1, SIZE)]
    assert ring.take(0, 2, 0) == [frame_of(1, SIZE)]


def test_oldest_over_spares_what_comes_after() -> None:
    """Cutting to a size stops at the offset it may not pass."""
    ring = filled(10)

    assert ring.oldest_over(4 * HELD, upto=10) == 6
    assert ring.oldest_over(4 * HELD - 1, upto=10) == 7
    assert ring.oldest_over(4 * HELD, upto=3) == 3
    assert ring.oldest_over(0, upto=10) == 10
    assert ring.oldest_over(10 * HELD, upto=10) == 0


@given(
    max_messages=st.integers(1, 12),
    max_bytes=st.integers(0, 2_000),
    first=st.integers(1, 1_000),
    sizes=st.lists(st.one_of(st.integers(64, 400), st.just(-1)), max_size=80),
)
def test_ring_equals_a_plain_list(
    max_messages: int, max_bytes: int, first: int, sizes: list[int]
) -> None:
    """Through any appends, and evictions in between (-1), the ring is the end of a plain list."""
    ring = RecentMessageCache(max_messages, max_bytes, first)
    held: list[bytes] = []
    head = first - 1

    for size in sizes:
        if size < 0:
            ring.evict(len(held[:2]))
            del held[:2]
        else:
            head += 1
            held.append(frame_of(head, size))
            ring.evict(ring.extend(held[-1:]))
            while len(held) > 1 and (
                len(held) > max_messages
                or sum(map(len, held)) + len(held) * FRAME_OVERHEAD_BYTES > max_bytes
            ):
                del held[0]

        assert all_of(ring) == held
        assert (ring.head, len(ring)) == (head, len(held))
        assert ring.size_bytes == sum(map(len, held)) + len(held) * FRAME_OVERHEAD_BYTES
