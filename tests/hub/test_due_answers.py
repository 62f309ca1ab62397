"""The order of answers that are due, and what an answer does that comes later."""

from __future__ import annotations

import asyncio

import pytest

from clevrd.errors import ShuttingDown, Unavailable
from clevrd.scheduling.due_answers import MAX_DUE_ANSWERS, MAX_DUE_BYTES, Due, DueAnswers


def test_answers_leave_in_the_order_of_their_requests() -> None:
    """Whatever order they are known in, each waits for those before it."""
    due = DueAnswers()
    first, second = due.expect(), due.expect()
    due.add(b"3")
    last = due.expect()

    is_next = [due.settle(second, b"2")]
    early = due.take()
    is_next += [due.settle(first, b"1"), due.settle(last, b"4")]

    assert (is_next, early) == ([False, True, False], b"")
    assert due.take() == b"1234"
    assert (len(due), due.take()) == (0, b"")


def test_queue_is_full_by_number_and_by_bytes() -> None:
    """Both what is due and what is known behind it count, until they leave."""
    by_number, by_bytes = DueAnswers(), DueAnswers()
    run = by_number.expect(MAX_DUE_ANSWERS - 1)
    place = by_bytes.expect()
    before = by_number.is_full, by_bytes.is_full

    by_number.add(b"")
    by_bytes.add(bytes(MAX_DUE_BYTES))

    assert before == (False, False)
    assert (by_number.is_full, by_bytes.is_full) == (True, True)
    by_number.settle(run, b"")
    by_bytes.settle(place, b"1")
    assert (by_number.take(), len(by_bytes.take())) == (b"", MAX_DUE_BYTES + 1)
    assert (by_number.is_full, by_bytes.is_full) == (False, False)


def test_sealed_queue_is_full_until_all_have_left() -> None:
    """One answer less is not enough for what has to come behind all of them."""
    due = DueAnswers()
    first, second = due.expect(), due.expect()
    due.seal()

    due.settle(first, b"1")
    one = due.take(), due.is_full
    due.settle(second, b"2")

    assert one == (b"1", True)
    assert (due.take(), due.is_full) == (b"2", False)


async def test_due_answer_is_made_when_it_is_known() -> None:
    """Of an outcome, of an error where something makes an answer of it, and of a cancellation."""
    loop = asyncio.get_running_loop()
    outcome, error, gone = (loop.create_future() for _ in range(3))
    made = Due[str](outcome, lambda number: f"answer {number}")
    plain = Due[str](error, str)
    told = Due[str](error, str, failed=lambda reason: f"no: {reason}")
    cut = Due[str](gone, str)

    outcome.set_result(7)
    error.set_exception(Unavailable("full"))
    gone.cancel()

    assert await made == "answer 7"
    assert await told == "no: full"
    with pytest.raises(Unavailable):
        await plain
    with pytest.raises(ShuttingDown):
        await cut


async def test_who_waits_may_be_cancelled_and_the_request_stands() -> None:
    """What the answer comes from is the hub's; others may wait for it as well."""
    outcome: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    due = Due[str](outcome, str)

    async def wait() -> str:
        return await due

    waiting = asyncio.ensure_future(wait())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])

    assert (waiting.cancelled(), outcome.cancelled()) == (True, False)
    outcome.set_result(1)
    assert await due == "1"
