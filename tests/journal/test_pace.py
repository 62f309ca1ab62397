"""The pace of records: no wait for company while there is little to send, and a bound on it."""

from __future__ import annotations

from clevrd.journal.pace import APART_S, Pace

MAX_APART_S = 0.008


def paced(partitions: int, per_s: int) -> float:
    """Return how far apart records are after a second at so many messages a second."""
    pace = Pace(partitions, MAX_APART_S)
    for millisecond in range(1_000):
        pace.sent(per_s // 1_000, 100.0 + millisecond / 1_000)
    return pace.apart_s


def test_records_of_an_unhurried_node_are_as_far_apart_as_ever() -> None:
    """At 1,000 messages a second, however many partitions there are."""
    assert [paced(partitions, 1_000) for partitions in (1, 8, 64)] == [APART_S] * 3


def test_records_are_further_apart_the_more_messages_there_are() -> None:
    """So that those of all partitions carry some messages each; never beyond the bound."""
    assert APART_S < paced(8, 5_000) < paced(8, 10_000) < paced(8, 20_000)
    assert paced(8, 1_000_000) == paced(64, 1_000_000) == MAX_APART_S


def test_one_partition_has_nobody_to_share_with() -> None:
    """All of its messages are in its own records, which are as full as they can be."""
    assert paced(1, 1_000_000) == APART_S
    assert paced(2, 1_000_000) == 2 * APART_S


def test_pace_eases_when_the_load_is_over() -> None:
    """The first message behind a silence is reckoned with the silence."""
    pace = Pace(8, MAX_APART_S)
    for millisecond in range(100):
        pace.sent(20, 100.0 + millisecond / 1_000)

    pace.sent(1, 110.0)

    assert pace.apart_s == APART_S
