"""A server that breaks its promises in known ways, to show that the load generator notices each.

By a message's sequence number: 10 is lost, 20 comes twice, 30 comes after 31, 40 says that it is of
another topic. Every frame is written in two pieces, cut at a place that moves through the frame.
"""

import argparse
import asyncio
import json
from itertools import cycle

from aiohttp import web

LOST, TWICE, LATE, MISROUTED = 10, 20, 30, 40
READERS: list[asyncio.Transport] = []
CUTS = cycle(range(1, 200))
HELD: list[bytes] = []


def frame_of(data: dict[str, object]) -> bytes:
    """Return an unmasked text frame. RFC 6455 §5.2."""
    payload = json.dumps({"topic": "x", "data": data}).encode()
    return b"\x81\x7e" + len(payload).to_bytes(2, "big") + payload


def frames_for(data: dict[str, object]) -> bytes:
    """Return what is sent when this was published: nothing, or one or two frames."""
    sequence = data["s"]
    if sequence == LOST:
        return b""
    if sequence == TWICE:
        return frame_of(data) * 2
    if sequence == LATE:
        HELD.append(frame_of(data))
        return b""
    if sequence == LATE + 1:
        return frame_of(data) + HELD.pop()
    return frame_of({**data, "k": 7} if sequence == MISROUTED else data)


async def publish(request: web.Request) -> web.Response:
    """POST /publish: lie to every reader alike."""
    frames = frames_for((await request.json())["data"])
    cut = next(CUTS)
    for piece in (frames[:cut], frames[cut:]):
        for transport in READERS:
            transport.write(piece)
        # Long enough that the reader sees the pieces apart.
        await asyncio.sleep(0.001)
    return web.json_response({"success": True})


async def subscribe(request: web.Request) -> web.WebSocketResponse:
    """GET /subscribe: aiohttp does the handshake; the frames are written beside it."""
    ws = web.WebSocketResponse(compress=False)
    await ws.prepare(request)
    assert isinstance(request.transport, asyncio.Transport)  # noqa: S101 - it is connected
    READERS.append(request.transport)
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
