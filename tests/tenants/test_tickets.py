"""A ticket opens what it was issued for, once, within 30 seconds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clevrd.errors import Forbidden, Unauthorized, Unavailable
from clevrd.tenants.tenant import Tenant
from clevrd.tenants.tickets import LIFE_S, Tickets

ACME = Tenant("acme", is_admin=True, credential_id="web")


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_ticket_is_its_tenant_for_its_topics_and_for_reading_alone() -> None:
    """Whatever else the holder of the key may do."""
    tickets = Tickets(Clock())

    bearer = tickets.redeem(tickets.issue(ACME, ["a", "b.*"]))

    assert (bearer.name, bearer.credential_id, bearer.is_admin) == ("acme", "web", False)
    bearer.check_subscribe("a")
    bearer.check_subscribe("b.c")
    with pytest.raises(Forbidden):
        bearer.check_subscribe("c")
    with pytest.raises(Forbidden):
        bearer.check_publish("a")


def test_ticket_is_used_once() -> None:
    """What stands in a log afterwards opens nothing."""
    tickets = Tickets(Clock())
    ticket = tickets.issue(ACME, ["a"])
    tickets.redeem(ticket)

    with pytest.raises(Unauthorized, match="was used") as caught:
        tickets.redeem(ticket)

    assert ticket not in str(caught.value)
    assert len(tickets) == 0


def test_ticket_ends_after_half_a_minute() -> None:
    """And is forgotten then."""
    clock = Clock()
    tickets = Tickets(clock)
    old, new = tickets.issue(ACME, ["a"]), ""
    clock.now_s += LIFE_S / 2
    new = tickets.issue(ACME, ["a"])
    clock.now_s += LIFE_S / 2

    with pytest.raises(Unauthorized):
        tickets.redeem(old)
    assert len(tickets) == 1
    assert tickets.redeem(new).name == "acme"


def test_tickets_are_bounded_for_each_tenant(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tenant's leave room for others', and for its own once time has passed."""
    monkeypatch.setattr("clevrd.tenants.tickets.MAX_PER_TENANT", 3)
    clock = Clock()
    tickets = Tickets(clock)
    for _ in range(3):
        tickets.issue(ACME, ["a"])

    with pytest.raises(Unavailable):
        tickets.issue(ACME, ["a"])
    tickets.issue(Tenant("other"), ["a"])
    clock.now_s += LIFE_S
    tickets.issue(ACME, ["a"])

    assert len(tickets) == 1


@given(st.lists(st.tuples(st.sampled_from(["issue", "redeem", "wait"]), st.integers(0, 9))))
def test_counts_agree_whatever_happens(steps: list[tuple[str, int]]) -> None:
    """What is counted for each tenant is what is there."""
    clock = Clock()
    tickets = Tickets(clock)
    issued: list[str] = []
    for name, number in steps:
        if name == "issue":
            issued.append(tickets.issue(Tenant(f"t{number % 3}"), ["a"]))
        elif name == "wait":
            clock.now_s += number * 5
        elif issued:
            try:
                tickets.redeem(issued[number % len(issued)])
            except Unauthorized:
                continue
    left = len(tickets)
    assert sum(tickets._counts.values()) == left
