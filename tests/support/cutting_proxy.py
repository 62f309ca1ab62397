"""A TCP proxy that cuts each connection after a number of bytes drawn from a seed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

READ_BYTES = 4096


class CuttingProxy:
    """Passes bytes on until a connection's number of bytes is used up, even within a frame."""

    def __init__(self, port: int, seed: int, least_bytes: int, most_bytes: int) -> None:
        self._server_port = port
        # A fixed seed, for the same cuts in every run.
        self._random = random.Random(seed)  # noqa: S311  # no secret
        self._bounds = least_bytes, most_bytes
        self.url = ""
        self.cuts = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass bytes of one connection on until its cut, or its end."""
        try:
            far = await asyncio.open_connection("127.0.0.1", self._server_port)
        except OSError:
            writer.transport.abort()
            return
        share = Share(self._random.randint(*self._bounds))
        ways = [
            asyncio.create_task(self._carry(reader, far[1], share)),
            asyncio.create_task(self._carry(far[0], writer, share)),
        ]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        await asyncio.wait(ways)
        far[1].transport.abort()
        writer.transport.abort()

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, share: Share
    ) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(READ_BYTES):
                part = data[: share.left_bytes]
                share.left_bytes -= len(part)
                writer.write(part)
                await writer.drain()
                if len(part) < len(data):
                    self.cuts += 1
                    return


class Share:
    """Bytes that a connection may still carry, both ways together."""

    def __init__(self, left_bytes: int) -> None:
        self.left_bytes = left_bytes


@asynccontextmanager
async def cutting_proxy(
    port: int, *, seed: int, least_bytes: int = 300, most_bytes: int = 20_000
) -> AsyncIterator[CuttingProxy]:
    """Run a proxy in front of the daemon on ``port``."""
    proxy = CuttingProxy(port, seed, least_bytes, most_bytes)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        server.close()
