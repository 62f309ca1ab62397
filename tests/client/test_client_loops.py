"""A plain loop over a subscription, one that is not opened, holds a connection no longer than it
runs: however it is left, and whoever keeps the subscription or the task.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
from fake_server import FakeServer, Feed, message, subscribed

from clevrd.client import Client, Gap, Message, Misuse, Subscription


def feed(*numbers: int) -> Feed:
    """Return a connection with these messages, which then stays open."""
    return Feed(
        [subscribed("e", numbers[0] - 1), *(message(number) for number in numbers)],
        has_control=True,
    )


@pytest.fixture
async def client(server: FakeServer, new_client: Callable[..., Client]) -> AsyncIterator[Client]:
    """Return a client of a server whose topic has two messages, and a third for who comes back."""
    server.feeds.extend([feed(1, 2), feed(3)])
    async with new_client() as opened:
        yield opened


async def break_out(items: Subscription) -> None:
    """Leave a loop at its first item."""
    async for _ in items:
        break


async def return_from(items: Subscription) -> Message | Gap | None:
    """Leave a loop by returning."""
    async for item in items:
        return item
    return None


async def fail_in(items: Subscription) -> None:
    """Leave a loop by an error, which somebody keeps with all its frames."""
    async for _ in items:
        raise KeyError("of the user")


async def is_timed_out_in(items: Subscription) -> None:
    """Leave a loop that waits for what does not come, by a timeout."""
    async with asyncio.timeout(0.05):
        async for _ in items:
            pass


async def is_timed_out_in_the_body(items: Subscription) -> None:
    """Leave a loop that is busy with an item."""
    async with asyncio.timeout(0.05):
        async for _ in items:
            await asyncio.Event().wait()


async def is_cancelled(items: Subscription) -> None:
    """Leave a loop that waits, in a task that is kept."""

    async def read() -> None:
        async for _ in items:
            pass

    task = asyncio.create_task(read())
    while items.position is None or items.position.offset < 2:  # noqa: ASYNC110
        await asyncio.sleep(0)
    task.cancel()
    KEPT.append(task)
    await asyncio.wait((task,))


async def comprehend(items: Subscription) -> None:
    """Leave a comprehension by an error in it."""
    _ = [1 // (item.offset - 2) async for item in items if isinstance(item, Message)]


async def leave_a_generator(items: Subscription) -> None:
    """Leave a generator of one's own around the loop."""

    async def offsets() -> AsyncIterator[int]:
        async for item in items:
            assert isinstance(item, Message)
            yield item.offset

    async for _ in offsets():
        break


KEPT: list[object] = []
WAYS = [
    *(break_out, return_from, fail_in, is_timed_out_in, is_timed_out_in_the_body),
    *(is_cancelled, comprehend, leave_a_generator),
]


# Up to Python 3.11 a comprehension is a function, whose frame keeps the iterator with the error.
@pytest.mark.parametrize("leave", [way for way in WAYS if way is not comprehend])
async def test_loop_that_is_left_lets_go_at_once(
    leave: Callable[[Subscription], Awaitable[Any]], client: Client, server: FakeServer
) -> None:
    """The subscription, the task and the error are kept, and collected nothing is."""
    items = client.subscribe("t", last=2)
    gc.disable()

    try:
        KEPT.append(await leave(items))
    except (KeyError, TimeoutError, ZeroDivisionError) as error:
        KEPT.append(error)
    await asyncio.wait_for(server.left.wait(), 5)
    gc.enable()

    assert not items.is_connected
    KEPT.clear()


@pytest.mark.parametrize("leave", WAYS)
async def test_loop_after_a_loop_goes_on_where_it_was(
    leave: Callable[[Subscription], Awaitable[Any]], client: Client, server: FakeServer
) -> None:
    """What was handed out does not come again, and nothing between is missed."""
    items = client.subscribe("t", last=2)
    with suppress(KeyError, TimeoutError, ZeroDivisionError):
        await leave(items)
    await asyncio.wait_for(server.left.wait(), 5)
    had = items.position
    assert had is not None

    await break_out(items)

    query = dict(server.requests[1].query)
    assert query == {"topic": "t", "epoch": "e", "offset": str(had.offset)}


async def test_inner_loop_leaves_the_connection_to_the_outer_one(
    client: Client, server: FakeServer
) -> None:
    """Loops over one subscription inside each other share it; the outermost lets go."""
    items = client.subscribe("t")
    taken = []

    async for outer in items:
        assert isinstance(outer, Message)
        taken.append(outer.offset)
        async for inner in items:
            assert isinstance(inner, Message)
            taken.append(inner.offset)
            break
        taken.append(items.is_connected)
        break
    await asyncio.wait_for(server.left.wait(), 5)

    assert (taken, len(server.requests)) == ([1, 2, True], 1)


async def test_loop_in_a_block_leaves_the_connection_to_the_block(
    client: Client, server: FakeServer
) -> None:
    """Who entered or opened it closes it; loops come and go."""
    async with client.subscribe("t") as items:
        await break_out(items)
        await return_from(items)
        was_connected = items.is_connected
    opened = await client.subscribe("t").open()
    await break_out(opened)
    is_connected = opened.is_connected
    await opened.close()

    assert (was_connected, is_connected, opened.is_connected) == (True, True, False)
    assert len(server.requests) == 2


async def test_two_tasks_are_told_not_to_share(client: Client, server: FakeServer) -> None:
    """Each item would go to either; the first one goes on, and lets go in the end."""
    items = client.subscribe("t")
    first = asyncio.create_task(is_cancelled(items))
    while items.position is None or items.position.offset < 2:  # noqa: ASYNC110
        await asyncio.sleep(0)

    with pytest.raises(Misuse, match="Two tasks read one subscription"):
        await break_out(items)
    was_left = server.left.is_set()
    await first
    await asyncio.wait_for(server.left.wait(), 5)

    assert not was_left


async def test_opening_beside_a_reader_connects_once(client: Client, server: FakeServer) -> None:
    """A second connection would stay until the client closes."""
    server.feeds.append(Feed())
    items = client.subscribe("t")
    waiting = asyncio.create_task(anext(items))
    await asyncio.sleep(0)

    with pytest.raises(Misuse, match="Two tasks read one subscription"):
        await items.open()
    waiting.cancel()
    with suppress(asyncio.CancelledError):
        await waiting
    await items.close()


async def test_subscription_that_is_cancelled_while_it_opens_lets_go(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """A block that was not entered is not left either."""
    server.feeds.append(Feed([], has_control=True))

    async with new_client() as client:
        items = client.subscribe("t")
        opening = asyncio.create_task(items.open())
        while items._socket is None:  # noqa: ASYNC110
            await asyncio.sleep(0)
        opening.cancel()
        await asyncio.wait((opening,))
        await asyncio.wait_for(server.left.wait(), 5)

    assert opening.cancelled()


async def test_iterator_that_another_thread_frees_is_closed_in_its_loop(
    client: Client, server: FakeServer
) -> None:
    """Python collects a cycle wherever it happens to."""
    holder = [client.subscribe("t")]
    await anext(holder[0])

    await asyncio.to_thread(holder.clear)

    await asyncio.wait_for(server.left.wait(), 5)
