"""A broadcaster on the `websockets` package: `websockets.broadcast` to all readers of a topic.

It is given its publishes over a WebSocket (GET /publish), since that package serves no POST.
"""

import argparse
import json
from collections import defaultdict
from urllib.parse import parse_qs, urlsplit

import uvloop
from websockets.asyncio.server import ServerConnection, broadcast, serve

READERS: defaultdict[str, set[ServerConnection]] = defaultdict(set)


async def subscribe(connection: ServerConnection, topic: str) -> None:
    """Be among the topic's readers until the connection closes."""
    READERS[topic].add(connection)
    try:
        await connection.wait_closed()
    finally:
        READERS[topic].discard(connection)


async def publish(connection: ServerConnection) -> None:
    """Send the data of each frame on, as it came, to all readers of its topic."""
    async for frame in connection:
        body = json.loads(frame)
        broadcast(READERS[body["topic"]], json.dumps(body["data"], separators=(",", ":")))


async def handle(connection: ServerConnection) -> None:
    """Serve one connection by its path."""
    assert connection.request is not None  # noqa: S101 - set once the handshake is over
    url = urlsplit(connection.request.path)
    if url.path == "/publish":
        await publish(connection)
    else:
        await subscribe(connection, parse_qs(url.query)["topic"][0])


async def main() -> None:
    """Serve on 127.0.0.1 until killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    port = parser.parse_args().port
    async with serve(handle, "127.0.0.1", port, compression=None, backlog=4096) as server:
        await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
