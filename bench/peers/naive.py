"""The broadcaster that one writes first: an aiohttp app that awaits `ws.send_str` for each reader.

Same endpoints and the same envelope as clevrd, so that both are given the same work.
"""

import argparse
import asyncio
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import count

import uvloop
from aiohttp import WSMsgType, web

READERS: web.AppKey[dict[str, set[web.WebSocketResponse]]] = web.AppKey("readers")
OFFSETS: web.AppKey[Iterator[int]] = web.AppKey("offsets")


def envelope(topic: str, data: object, offset: int) -> str:
    """Return the message as clients see it."""
    now = datetime.now(UTC)
    message = {
        "id": now.strftime("msg-%Y%m%d-%H%M%S.%f"),
        "topic": topic,
        "tenant_id": "default-tenant",
        "data": data,
        "timestamp": now.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "offset": offset,
    }
    return json.dumps(message, separators=(",", ":"))


async def broadcast(app: web.Application, topic: str, data: object) -> str:
    """Send to every reader in turn, and wait for each; return the message."""
    offsets = app[OFFSETS]
    text = envelope(topic, data, next(offsets))
    for ws in list(app[READERS].get(topic, ())):
        await ws.send_str(text)
    return text


async def publish(request: web.Request) -> web.StreamResponse:
    """POST /publish, or GET /publish upgraded: each text frame is a publish."""
    if request.method == "GET":
        return await publish_socket(request)
    body = await request.json()
    await broadcast(request.app, body["topic"], body["data"])
    return web.json_response({"success": True})


async def publish_socket(request: web.Request) -> web.WebSocketResponse:
    """Publish what comes over a WebSocket until it closes."""
    ws = web.WebSocketResponse(compress=False)
    await ws.prepare(request)
    async for frame in ws:
        if frame.type is WSMsgType.TEXT:
            body = json.loads(frame.data)
            await broadcast(request.app, body["topic"], body["data"])
    return ws


async def subscribe(request: web.Request) -> web.WebSocketResponse:
    """GET /subscribe?topic=T: be in the topic's set while the socket is open."""
    readers = request.app[READERS].setdefault(request.query["topic"], set())
    ws = web.WebSocketResponse(compress=False)
    await ws.prepare(request)
    readers.add(ws)
    try:
        async for _ in ws:
            pass
    finally:
        readers.discard(ws)
    return ws


def make_app() -> web.Application:
    """Return the app with its routes."""
    app = web.Application()
    app[READERS] = {}
    app[OFFSETS] = count(1)
    app.add_routes(
        [
            web.post("/publish", publish),
            web.get("/publish", publish),
            web.get("/subscribe", subscribe),
        ]
    )
    return app


def main() -> None:
    """Serve on 127.0.0.1 until killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    port = parser.parse_args().port
    asyncio.set_event_loop(uvloop.new_event_loop())
    web.run_app(make_app(), host="127.0.0.1", port=port, backlog=4096, access_log=None, print=None)


if __name__ == "__main__":
    main()
