"""The decisions of the last minutes: what repeats one, what is kept of a flood, whose they are."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from conftest import FakeClock

import clevrd
from clevrd.errors import (
    ConnectionLimit,
    Forbidden,
    RateLimited,
    ShuttingDown,
    TopicLimit,
    Unavailable,
)
from clevrd.metrics.decisions import KEPT_S, MAX_DECISIONS, MERGE_S, Decisions

CONFIGURED = ("acme", "other")
PACKAGE = Path(clevrd.__file__).parent


def portion_of(tenant: str) -> str:
    return tenant if tenant in CONFIGURED else ""


@pytest.fixture
def decisions(clock: FakeClock) -> Decisions:
    return Decisions(clock, portion_of)


def limited(tenant: str = "acme", key: str = "web") -> RateLimited:
    return RateLimited(tenant, 5.0, 10, 0.5, left=0, key=key)


def test_refusal_is_noted_with_its_figures(decisions: Decisions, clock: FakeClock) -> None:
    """Its sentence, what it was decided from, the limits, and when it ends."""
    decisions.note_refusal(limited())

    (found,) = decisions.newest()
    assert (found.kind, found.code) == ("refusal", "rate_limited")
    assert (found.tenant, found.credential, found.topic) == ("acme", "web", "")
    assert found.rule.startswith("The key web of tenant acme is over its publish rate of 5 ")
    assert (found.inputs, found.thresholds) == ({"left": 0}, {"rate_per_s": 5.0, "burst": 10})
    assert (found.began_s, found.last_s, found.lasts_s) == (clock(), clock(), 0.5)


def test_repetition_raises_the_count_alone(decisions: Decisions, clock: FakeClock) -> None:
    """Until it has not come for MERGE_S."""
    decisions.note_refusal(limited())
    began_s = clock()
    clock.advance(MERGE_S)
    decisions.note_refusal(limited(), times=3)
    clock.advance(MERGE_S + 1)

    decisions.note_refusal(limited())

    newest, first = decisions.newest()
    assert (first.count, first.began_s, first.last_s) == (4, began_s, began_s + MERGE_S)
    assert newest.count == 1
    assert len(decisions) == 2


def test_repetition_keeps_no_memory(decisions: Decisions) -> None:
    """A million refusals of one kind take what the first one took."""
    refusal = limited()
    decisions.note_refusal(refusal, times=300)
    for _ in range(10):
        decisions.note_refusal(refusal)
    before = sys.getallocatedblocks()

    for _ in range(1_000):
        decisions.note_refusal(refusal)

    # A number that has grown is another object in the place of the one before.
    assert sys.getallocatedblocks() - before <= 2
    assert next(decisions.newest()).count == 1_310


def test_another_tenant_key_or_code_is_another_decision(decisions: Decisions) -> None:
    """So is each of them shown by itself."""
    for error in (
        limited(),
        limited("other"),
        limited(key="ios"),
        Forbidden("No.", tenant="acme", credential="web"),
    ):
        decisions.note_refusal(error)

    assert len(decisions) == 4


def test_bounds_with_one_code_are_decisions_by_themselves(decisions: Decisions) -> None:
    """The first of them must not hide the others."""
    for error in (
        limited(key=""),
        limited(key="web"),
        TopicLimit("acme", 5, 5, "max_topics of the tenant", 60.0),
        ConnectionLimit("Tenant acme", 3, 3, "max_connections of the tenant", tenant="acme"),
        ConnectionLimit("Tenant acme", 9, 9, "three quarters", tenant="acme"),
        Unavailable("Full.", bound="connections", thresholds={"max_connections": 9}),
        Unavailable("Full.", bound="topics", thresholds={"max_topics": 9}),
        ShuttingDown(),
    ):
        error.credential = ""
        decisions.note_refusal(error)
        decisions.note_refusal(error)

    assert [each.count for each in decisions.newest()] == [2] * 8


def test_each_refusal_for_want_of_room_names_its_bound() -> None:
    """Wherever one is made, so that one of them can't be taken for another."""
    unnamed = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("MemoryShort", "NoMemoryForSubscribers", "Throttled", "Unavailable")
        and "bound" not in [each.arg for each in node.keywords]
    ]

    assert unnamed == []


def test_tenant_is_shown_its_own_and_the_daemons(decisions: Decisions) -> None:
    """Not another's."""
    decisions.note_refusal(limited("acme"))
    decisions.note_refusal(limited("other"))
    decisions.begin("window", "window", "Smaller.")

    assert {each.tenant for each in decisions.newest("acme")} == {"acme", ""}
    assert {each.tenant for each in decisions.newest()} == {"acme", "other", ""}


def test_old_decisions_are_not_shown(decisions: Decisions, clock: FakeClock) -> None:
    """And are forgotten when another of their kind begins."""
    decisions.note_refusal(limited())
    clock.advance(KEPT_S + 1)

    assert list(decisions.newest()) == []
    decisions.note_refusal(limited(key="ios"))
    assert len(decisions) == 1


def test_open_decision_is_kept_until_some_time_after_its_end(
    decisions: Decisions, clock: FakeClock
) -> None:
    """However long it holds; nobody knows beforehand when it ends."""
    found = decisions.begin("memory", "no_publishes", "Publishes are refused.")
    for _ in range(3):
        decisions.hold(found)
        clock.advance(KEPT_S - 1)
    assert list(decisions.newest()) == [found]
    assert (found.is_open, found.lasts_s) == (True, None)

    decisions.end(found)
    clock.advance(KEPT_S)
    assert (found.is_open, found.lasts_s) == (False, 0.0)
    assert list(decisions.newest()) == [found]
    clock.advance(1)
    assert list(decisions.newest()) == []


def test_flood_takes_nothing_from_others(decisions: Decisions, clock: FakeClock) -> None:
    """Neither from another tenant, nor from another kind of the same; the bound holds."""
    decisions.note_refusal(limited("acme"))
    decisions.begin("circuit", "circuit_opened", "It stalls.", "", "t")
    decisions.begin("throttle", "throttled", "All wait.")
    clock.advance(1)

    for number in range(3 * MAX_DECISIONS):
        decisions.note_refusal(limited(f"made-up-{number}"))

    kept = list(decisions.newest())
    assert len(kept) == len(decisions) == MAX_DECISIONS
    assert [each.tenant for each in kept if each.tenant == "acme"] == ["acme"]
    assert {"circuit_opened", "throttled"} <= {each.code for each in kept}
    # The newest of the flood are those that are left.
    assert kept[0].tenant.startswith("made-up-")


def test_small_group_gets_room_in_a_full_ring(decisions: Decisions) -> None:
    """The largest gives."""
    for number in range(MAX_DECISIONS):
        decisions.note_refusal(limited(f"made-up-{number}"))

    decisions.note_refusal(limited("other"))

    kept = [each.tenant for each in decisions.newest()]
    assert len(kept) == MAX_DECISIONS
    assert "other" in kept
    assert "made-up-0" not in kept


def test_forgotten_decision_does_not_go_on(decisions: Decisions) -> None:
    """What comes again after it was pushed out is noted anew, with all that belongs to it."""
    first = limited("made-up-0")
    for number in range(MAX_DECISIONS + 1):
        decisions.note_refusal(limited(f"made-up-{number}"))

    decisions.note_refusal(first)

    assert [each.count for each in decisions.newest() if each.tenant == "made-up-0"] == [1]
    assert len(decisions) == MAX_DECISIONS
