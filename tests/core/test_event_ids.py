"""Ids of events of a connection with several topics: what is spelled is read back, or refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clevrd.core.beginning import After, Beginning, Last, Since
from clevrd.core.event_ids import (
    MAX_EVENT_ID_BYTES,
    MAX_READ_BYTES,
    EventIds,
    names_topics,
    read_topic_positions,
)
from clevrd.errors import InvalidRequest

NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=9)
POSITIONS = st.builds(
    After, st.integers(0, 10**18 - 1), st.text("0123456789abcdef", min_size=1, max_size=8)
)


def spell(at: After) -> bytes:
    """Return a position as an event's id begins."""
    return f"{at.epoch}:{at.offset}".encode()


@given(st.dictionaries(NAMES, POSITIONS, max_size=5), st.dictionaries(NAMES, POSITIONS, max_size=5))
def test_id_is_read_back_whatever_topics_are_called(
    named: dict[str, After], found: dict[str, After]
) -> None:
    """Commas, slashes, stars, spaces and all of Unicode in a name change nothing."""
    found = {name: at for name, at in found.items() if name not in named}
    ids = EventIds(named, found, has_found_all=True)

    text = ids.whole().decode("ascii")
    said = read_topic_positions(text, "id")

    assert said.by_index == dict(enumerate(named.values()))
    assert said.by_name == found
    assert said.has_found_all
    assert names_topics(text)


def test_events_id_begins_with_its_own_topic_and_has_the_others_behind() -> None:
    """What follows the event's own position is the reader's own."""
    ids = EventIds({"a": After(1, "e1"), "b": Last(5)}, {}, has_found_all=False)
    a, b, found = ids.add("a", "e1"), ids.add("b", "e2"), ids.add("p.1", "e3")

    assert b.move(b"e2:7") == b"/1,e1:1/0"
    assert found.move(b"e3:0") == b"@p.1,e1:1/0,e2:7/1"
    assert a.move(b"e1:2") == b"/0,e2:7/1,e3:0@p.1"
    ids.note_all_found()
    ids.forget("p.1")
    assert ids.whole() == b"e1:2/0,e2:7/1,*"


@pytest.mark.parametrize("beginning", [Last(0), After(0), Since("msg-x", is_time=False)])
def test_topic_that_has_begun_nowhere_is_in_no_id(beginning: Beginning) -> None:
    """Who is cut before it heard of a topic begins there as its URL says."""
    ids = EventIds({"a": beginning, "b": beginning}, {}, has_found_all=False)

    assert ids.add("b", "e2").move(b"e2:7") == b"/1"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("e:1/", "does not say whose"),
        ("e:1@", "does not say whose"),
        ("e:1/x", "does not say whose"),
        ("e:1/1000", "does not say whose"),
        ("e:1/0,e:2", "does not say whose"),
        ("*,e:1", "does not say whose"),
        ("e:1/0,", "does not say whose"),
        ("e:1/0,e:2/0", "two positions of one topic"),
        ("e:1@a,e:2@%61", "two positions of one topic"),
        ("e:1@%ff", "not UTF-8"),
        ("e:x/0", "must be epoch:offset"),
        (":1/0", "must be epoch:offset"),
        ("e:1111111111111111111/0", "must be epoch:offset"),
        ("e:1@" + "x" * MAX_READ_BYTES, "longer than any"),
        (",".join(f"a:1@{number}" for number in range(600)), "longer than any"),
        ("e:1@\udcff", "not ASCII"),
        ("e:1@é", "not ASCII"),
    ],
)
def test_id_that_no_event_had_is_refused_in_words(text: str, words: str) -> None:
    """What was put together by hand, or cut short, is not guessed at."""
    with pytest.raises(InvalidRequest, match=words):
        read_topic_positions(text, "Last-Event-ID")


def test_ids_stay_short_enough_to_come_back_in_a_header() -> None:
    """A topic that would make them too long is refused, and those before it stay."""
    ids = EventIds({"a": After(1, "e1")}, {}, has_found_all=True)
    count = 0

    def add_until_full() -> None:
        nonlocal count
        while True:
            place = ids.add(f"orders.{count:04}", "0123abcd")
            place.move(b"0123abcd:123456789012345")
            count += 1

    with pytest.raises(InvalidRequest, match="over /ws"):
        add_until_full()

    assert 80 < count < 120
    assert MAX_EVENT_ID_BYTES * 0.9 < len(ids.whole()) <= MAX_EVENT_ID_BYTES + len(b"e1:1/0,*,")
    assert len(read_topic_positions(ids.whole().decode(), "id").by_name) == count


@pytest.mark.parametrize("number", [0, 1, 30, 65])
def test_topics_that_are_gone_give_way_to_those_that_are_there(number: int) -> None:
    """An id that is full of names which never came back is no reason to leave out live topics.

    One that has come back is there, wherever it stood among those that are gone.
    """
    gone = {f"jobs.{number:032}": After(9, "0123abcd") for number in range(66)}
    ids = EventIds({"a": After(1, "e1")}, gone, has_found_all=True)
    back = f"jobs.{number:032}"
    del gone[back]

    for name in (back, *(f"jobs.new{number:029}" for number in range(30))):
        ids.add(name, "89abcdef").move(b"89abcdef:1")
    said = read_topic_positions(ids.whole().decode(), "id").by_name

    assert said[back] == After(1, "89abcdef")
    assert sum(name.startswith("jobs.new") for name in said) == 30
    # Those that were said first go first.
    assert set(gone) - said.keys() == set(list(gone)[: len(gone) - len(said) + 31])
    assert set(ids.given_way()) == set(gone) - said.keys()
    assert ids.given_way() == []
    assert len(ids.whole()) <= MAX_EVENT_ID_BYTES
