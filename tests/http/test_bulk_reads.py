"""Large requests are read one after the other: their bytes take a bounded part of a turn."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any, cast

import pytest
from daemons import running
from world import ManualLoop

from clevrd.raw_http.connection import RawConnection
from clevrd.scheduling.bulk_reads import BULK_BYTES, BulkReads


def test_a_few_are_read_in_each_turn() -> None:
    """In the order in which they came, all of them, also behind one that fails."""
    loop = ManualLoop()
    errors: list[None] = []
    reads = BulkReads(cast(asyncio.AbstractEventLoop, cast(Any, loop)), lambda: errors.append(None))
    done: list[int] = []

    def fail() -> None:
        raise RuntimeError("a bug")

    for number in range(5):
        reads.wait(partial(done.append, number))
    reads.wait(fail)
    for number in range(5, 9):
        reads.wait(partial(done.append, number))
    assert done == []
    seen = []
    while loop.is_busy:
        loop.turn()
        seen.append(len(done))

    assert seen[:3] == [4, 7, 9]
    assert done == list(range(9))
    assert len(errors) == 1


async def test_large_body_is_not_read_on_in_the_same_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each large part of it pauses its connection; the publish is answered all the same."""
    kept: list[bool] = []
    add = RawConnection._add_to_held

    def watched(self: RawConnection, data: bytes) -> bytes | None:
        whole = add(self, data)
        if whole is None and len(data) >= BULK_BYTES and len(self._buffer) < self._needed_bytes:
            kept.append(self.transport.is_reading())
        return whole

    monkeypatch.setattr(RawConnection, "_add_to_held", watched)
    body = b'{"topic":"t","data":"%b"}' % (b"x" * 1_000_000)
    head = b"POST /publish HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n\r\n" % len(body)
    async with running() as daemon:
        reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
        for _ in range(3):
            writer.write(head + body)
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
            await reader.readuntil(b"}")
        writer.close()

    assert kept
    assert not any(kept)
