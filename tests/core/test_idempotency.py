"""Idempotency keys without a daemon: what is a key, what is remembered, and who gives up first."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import fakes  # noqa: F401  # it sets how much hypothesis tries
import pytest
from conftest import FakeClock
from hypothesis import given
from hypothesis import strategies as st

from clevrd.core.idempotency import (
    MAX_KEY_CHARS,
    RememberedAnswers,
    Slot,
    check_key,
    key_of_header,
)
from clevrd.errors import InvalidRequest

KEEP_S = 300.0


def memory(max_keys: int = 100, keep_s: float = KEEP_S) -> RememberedAnswers[str]:
    """Return an empty memory."""
    return RememberedAnswers(max_keys, keep_s)


def slot(key: str, tenant: str = "acme", topic: str = "orders") -> Slot:
    """Return the slot of ``key``."""
    return tenant, topic, key


def kept(answers: RememberedAnswers[str], tenant: str, count: int) -> list[int]:
    """Return which of the tenant's keys "0", "1", … are remembered."""
    return [n for n in range(count) if answers.find(slot(str(n), tenant), b"", 0.0) is not None]


# --- keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["a", " ", "k" * MAX_KEY_CHARS, '"\\~!', "8e03978e-40d5-43dd"])
def test_printable_ascii_is_a_key(key: str) -> None:
    """Any of it, up to the limit itself."""
    check_key(key)


@pytest.mark.parametrize("key", ["", "k" * (MAX_KEY_CHARS + 1), "a\tb", "a\0", "\x7f", "é", "😀"])
def test_anything_else_is_no_key(key: str) -> None:
    """Empty, too long, control characters, what a header can't hold."""
    with pytest.raises(InvalidRequest, match=r"must be 1 to 255 printable ASCII characters\.$"):
        check_key(key)


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ("abc", "abc"),
        ('"abc"', "abc"),
        ('"a b"', "a b"),
        ('"a\\"b\\\\c"', 'a"b\\c'),
        ('a"b', 'a"b'),
        ("abc;q=1", "abc;q=1"),
        ('"' + "k" * MAX_KEY_CHARS + '"', "k" * MAX_KEY_CHARS),
    ],
)
def test_header_is_a_quoted_string_or_the_bare_key(value: str, key: str) -> None:
    """RFC 8941 §3.3.3 for the draft's clients, and the bare form that most others send."""
    assert key_of_header(value) == key


@pytest.mark.parametrize("value", ["", '"', '""', '"a', '"a"b', '"a";q=1', '"a\\b"', '"é"', "a\tb"])
def test_header_that_is_neither_is_refused(value: str) -> None:
    """Half a string, something behind it, an escape that there is not."""
    with pytest.raises(InvalidRequest):
        key_of_header(value)


# --- remembering ---------------------------------------------------------------------------------


def test_repeat_gets_the_first_answer_until_its_time_is_up(clock: FakeClock) -> None:
    """The time runs from the first publish; repeats don't prolong it."""
    answers = memory()
    answers.remember(slot("k"), b"1", "first", clock())

    found = [answers.find(slot("k"), b"1", clock.advance(99.0)) for _ in range(4)]

    assert found == ["first", "first", "first", None]
    assert answers.repeats == 3


def test_key_whose_time_is_up_can_be_used_again(clock: FakeClock) -> None:
    """Its new answer counts from then on, before the old one was swept out and after."""
    answers = memory()
    answers.remember(slot("k"), b"1", "first", clock())
    clock.advance(KEEP_S)

    answers.remember(slot("k"), b"2", "second", clock())

    assert answers.find(slot("k"), b"2", clock()) == "second"
    assert len(answers) == 1


def test_other_data_under_a_known_key_is_refused(clock: FakeClock) -> None:
    """It is another message: to answer it as the first would lose it in silence."""
    answers = memory()
    answers.remember(slot("k"), b"1", "first", clock())

    with pytest.raises(InvalidRequest, match=r"another message .* 300 s; use a new key"):
        answers.find(slot("k"), b"2", clock())

    assert answers.find(slot("k"), b"1", clock()) == "first"


def test_same_key_of_others_is_another_key(clock: FakeClock) -> None:
    """Tenant, topic and key are compared one by one, however they look joined."""
    answers = memory()
    answers.remember(("a", "b:c", "d"), b"1", "first", clock())

    for other in (("a:b", "c", "d"), ("a", "b", "c:d"), ("a", "b:c", "d "), ("", "b:c", "d")):
        assert answers.find(other, b"1", clock()) is None


def test_nothing_is_remembered_for_no_time(clock: FakeClock) -> None:
    """0 turns it off, and holds no memory."""
    answers = memory(keep_s=0.0)

    answers.remember(slot("k"), b"1", "first", clock())

    assert answers.find(slot("k"), b"1", clock()) is None
    assert len(answers) == 0


# --- the bound -----------------------------------------------------------------------------------


def test_at_the_bound_the_oldest_goes_first() -> None:
    """One tenant alone has all of the memory, and is told nothing wrong: it is counted."""
    answers = memory(max_keys=10)

    for number in range(25):
        answers.remember(slot(str(number)), b"", "x", 0.0)

    assert kept(answers, "acme", 25) == list(range(15, 25))
    assert (len(answers), answers.pushed_out) == (10, 15)


def test_tenant_with_many_keys_pushes_out_its_own() -> None:
    """A flood of one tenant costs another with fewer keys not one of them."""
    answers = memory(max_keys=100)
    for number in range(40):
        answers.remember(slot(str(number), "quiet"), b"", "x", 0.0)

    for number in range(10_000):
        answers.remember(slot(str(number), "flood"), b"", "x", 0.0)

    assert kept(answers, "quiet", 40) == list(range(40))
    assert kept(answers, "flood", 10_000) == list(range(9_940, 10_000))


def test_newcomer_gets_its_share_from_who_has_most() -> None:
    """The memory being full of one tenant's keys is no reason to forget another's at once."""
    answers = memory(max_keys=100)
    for number in range(100):
        answers.remember(slot(str(number), "first"), b"", "x", 0.0)

    for number in range(80):
        answers.remember(slot(str(number), "second"), b"", "x", 0.0)

    assert kept(answers, "first", 100) == list(range(50, 100))
    assert kept(answers, "second", 80) == list(range(30, 80))


def test_what_is_out_of_time_goes_before_anything_is_pushed_out(clock: FakeClock) -> None:
    """Nobody loses a key while there are any that nobody can use."""
    answers = memory(max_keys=10)
    for number in range(10):
        answers.remember(slot(str(number)), b"", "x", clock())
    clock.advance(KEEP_S)

    for number in range(10):
        answers.remember(slot(str(number), "other"), b"", "x", clock())

    assert answers.pushed_out == 0
    assert kept(answers, "other", 10) == list(range(10))


def test_sweep_is_bounded_and_leaves_nothing_behind(clock: FakeClock) -> None:
    """A few at a time, oldest first, and in the end the memory is as empty as in the beginning."""
    answers = memory()
    for number in range(50):
        answers.remember(slot(str(number), f"tenant-{number % 7}"), b"", "x", clock())
        clock.advance(1.0)
    clock.now_s += KEEP_S - 20.0

    swept = [answers.sweep(clock(), at_most=20) for _ in range(3)]
    left = len(answers)
    clock.advance(KEEP_S)
    answers.sweep(clock(), at_most=100)

    assert swept == [20, 11, 0]
    assert left == 19
    assert (len(answers), answers._of_tenant, answers._portions) == (0, {}, {})


class Step(NamedTuple):
    """One publish in a random schedule."""

    tenant: str
    key: str
    data: bytes
    pause_s: float


STEPS = st.lists(
    st.builds(
        Step,
        tenant=st.sampled_from("aaaabbc"),
        key=st.sampled_from("123456"),
        data=st.sampled_from([b"x", b"x", b"x", b"y"]),
        pause_s=st.sampled_from([0.0, 1.0, 40.0, 150.0]),
    ),
    max_size=60,
)


class NaiveMemory:
    """The rules spelled out over a plain list, oldest first."""

    def __init__(self, max_keys: int) -> None:
        self.max_keys = max_keys
        self.entries: list[tuple[Slot, bytes, str, float]] = []

    def expire(self, now_s: float) -> None:
        """Forget what is out of time."""
        self.entries = [entry for entry in self.entries if now_s < entry[3]]

    def known(self, wanted: Slot) -> tuple[bytes, str] | None:
        """Return the data and the answer of the first publish, None when there was none."""
        return next(((data, answer) for at, data, answer, _ in self.entries if at == wanted), None)

    def may_lose(self) -> set[Slot]:
        """Return the slots of which one has to go: the oldest of each tenant with the most."""
        counts = Counter(at[0] for at, *_ in self.entries)
        most = max(counts.values())
        return {
            next(at for at, *_ in self.entries if at[0] == tenant)
            for tenant, count in counts.items()
            if count == most
        }


@given(steps=STEPS, max_keys=st.integers(1, 8))
def test_any_schedule_is_answered_as_a_plain_list_answers_it(
    steps: list[Step], max_keys: int
) -> None:
    """The same repeats, the same refusals, the same keys held, and the right one pushed out."""
    answers, naive = memory(max_keys), NaiveMemory(max_keys)
    now_s = 0.0

    for number, step in enumerate(steps):
        now_s += step.pause_s
        naive.expire(now_s)
        at = slot(step.key, step.tenant)
        known = naive.known(at)
        try:
            found = answers.find(at, step.data, now_s)
        except InvalidRequest:
            assert known is not None
            assert known[0] != step.data
            continue

        assert (None if found is None else (step.data, found)) == known
        if found is None:
            answers.remember(at, step.data, str(number), now_s)
            naive.entries.append((at, step.data, str(number), now_s + KEEP_S))
        held = {at for at, entry in answers._answers.items() if now_s < entry.until_s}
        lost = {at for at, *_ in naive.entries} - held
        assert len(lost) == max(0, len(naive.entries) - max_keys)
        assert not lost or lost <= naive.may_lose()
        naive.entries = [entry for entry in naive.entries if entry[0] not in lost]
        assert {at for at, *_ in naive.entries} == held
        assert len(answers) <= max_keys
