"""The load of the TLS scenario notices what is lost, repeated, or out of order."""

from __future__ import annotations

import asyncio
import json
import time
from unittest.mock import Mock

import pytest

from bench.peers.tls_load import Reader, quantile
from clevrd.core.server_frames import text_frame


def frame(offset: int, number: int, publisher: int = 1, padding: str = "") -> bytes:
    """Return a message as the daemon delivers it."""
    data = {"p": publisher, "s": number, "t": time.monotonic_ns(), "x": padding}
    return text_frame(json.dumps({"data": data, "offset": offset}).encode())


@pytest.mark.parametrize(
    ("frames", "delivered", "faults"),
    [
        ([frame(1, 1), frame(2, 2), frame(3, 1, publisher=2), frame(4, 3)], 4, 0),
        ([frame(1, 1), frame(2, 2, padding="x" * 500)], 2, 0),
        ([frame(1, 1), frame(3, 3)], 2, 1),
        ([frame(1, 1), frame(1, 1)], 2, 1),
        ([frame(1, 2), frame(2, 1)], 2, 2),
        ([frame(1, 1), frame(2, 1)], 2, 1),
    ],
    ids=["whole", "longer", "lost", "twice", "late", "renumbered"],
)
@pytest.mark.parametrize("piece_bytes", [1, 10_000])
async def test_reader_counts_and_checks(
    frames: list[bytes], delivered: int, faults: int, piece_bytes: int
) -> None:
    """However its bytes arrive, the end of the handshake with the first message among them."""
    reader = Reader()
    transport = Mock(asyncio.Transport)
    reader.connection_made(transport)
    wire = b"HTTP/1.1 101 Switching Protocols\r\nServer: clevrd\r\n\r\n" + b"".join(frames)

    for start in range(0, len(wire), piece_bytes):
        reader.data_received(wire[start : start + piece_bytes])

    assert transport.write.call_args[0][0].startswith(b"GET /subscribe?topic=bench-0&last=0 ")
    assert reader.ready.done()
    assert (reader.delivered, reader.faults) == (delivered, faults)
    assert len(reader.latencies_ms) == delivered


def test_quantiles_are_of_what_there_is() -> None:
    """No delivery has none."""
    assert [quantile([3, 1, 2], share) for share in (0, 0.5, 0.99)] == [1, 2, 3]
    assert quantile([], 0.5) == 0
