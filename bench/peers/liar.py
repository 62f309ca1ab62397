"""A server that breaks its promises in known ways, to show that the load generator notices each.

By a message's sequence number: 10 is lost, 20 comes twice, 30 comes after 31, 40 says that it is of
another topic. Every frame is written in two pieces, cut at a place that moves through the frame.
"""

import argparse
import asyncio
import json
from collections.abc import Callable
from itertools import cycle

from aiohttp import web

LOST, TWICE, LATE, MISROUTED = 10, 20, 30, 40
CUTS = cycle(range(1, 200))
HELD: list[bytes] = []


def frame_of(payload: bytes) -> bytes:
    """Return an unmasked text frame. RFC 6455 §5.2."""
    return b"\x81\x7e" + len(payload).to_bytes(2, "big") + payload


def chunk_of(text: bytes) -> bytes:
    """Return one chunk of a body. RFC 9112 §7.1."""
    return b"%x\r\n%b\r\n" % (len(text), text)


def event_of(payload: bytes) -> bytes:
    """Return an event, with a named one and a comment that mean nothing in front of it."""
    return chunk_of(b"event: x\ndata: {}\n\n:\n") + chunk_of(b"id: a:1\ndata: %b\n\n" % payload)


def line_of(payload: bytes) -> bytes:
    """Return a line, with one that is no message and a keep-alive in front of it."""
    return chunk_of(b'{"type":"x"}\n') + chunk_of(b" ") + chunk_of(payload + b"\n")


Spell = Callable[[bytes], bytes]
STREAMS: dict[str, Spell] = {"text/event-stream": event_of, "application/x-ndjson": line_of}
READERS: list[tuple[asyncio.Transport, Spell]] = []


def payload_of(data: dict[str, object]) -> bytes:
    """Return a message."""
    return json.dumps({"topic": "x", "data": data}).encode()


def payloads_for(data: dict[str, object]) -> list[bytes]:
    """Return what is sent when this was published: nothing, or one or two messages."""
    sequence = data["s"]
    if sequence == LOST:
        return []
    if sequence == TWICE:
        return [payload_of(data)] * 2
    if sequence == LATE:
        HELD.append(payload_of(data))
        return []
    if sequence == LATE + 1:
        return [payload_of(data), HELD.pop()]
    return [payload_of({**data, "k": 7} if sequence == MISROUTED else data)]


async def publish(request: web.Request) -> web.Response:
    """POST /publish: lie to every reader alike."""
    payloads = payloads_for((await request.json())["data"])
    cut = next(CUTS)
    for part in (slice(cut), slice(cut, None)):
        for transport, spell in READERS:
            transport.write(b"".join(map(spell, payloads))[part])
        # Long enough that the reader sees the pieces apart.
        await asyncio.sleep(0.001)
    return web.json_response({"success": True})


async def subscribe(request: web.Request) -> web.StreamResponse:
    """GET /subscribe: aiohttp does the handshake or the head; the rest is written beside it."""
    assert isinstance(request.transport, asyncio.Transport)  # noqa: S101 - it is connected
    accept = request.headers.get("Accept", "")
    if accept in STREAMS:
        stream = web.StreamResponse(headers={"Content-Type": accept})
        stream.enable_chunked_encoding()
        await stream.prepare(request)
        READERS.append((request.transport, STREAMS[accept]))
        await asyncio.Event().wait()
        return stream
    ws = web.WebSocketResponse(compress=False)
    await ws.prepare(request)
    READERS.append((request.transport, frame_of))
    await ws.receive()
    return ws


def main() -> None:
    """Serve on 127.0.0.1 until killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    app = web.Application()
    app.add_routes([web.post("/publish", publish), web.get("/subscribe", subscribe)])
    port = parser.parse_args().port
    web.run_app(app, host="127.0.0.1", port=port, access_log=None, print=None)


if __name__ == "__main__":
    main()
