"""A TCP proxy that cuts connections after numbers of bytes drawn from a seed. No HTTP here."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

# Byte counts of the cuts: some lie in the handshake, most in the middle of a frame.
MOST_BYTES = 3_000


class CuttingProxy:
    """Passes bytes on between its port and a daemon's, until a connection is to be cut."""

    def __init__(self, to_port: int, seed: int) -> None:
        self._to_port = to_port
        self._random = random.Random(seed)  # noqa: S311  # a seed has to give the same cuts
        # Tasks that serve a connection; each closes both of its sides.
        self._tasks: set[asyncio.Task[None]] = set()
        self.url = ""
        # Number of connections still to be cut; once it is 0 the others live.
        self.cuts_left = 0

    def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass one connection on to the daemon."""
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._to_port)
        except ConnectionRefusedError:
            # The daemon is down, so the client is refused at once.
            writer.transport.abort()
            return
        ways = {
            asyncio.create_task(self._pass_on(reader, far_writer)),
            asyncio.create_task(self._pass_on(far_reader, writer)),
        }
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            # A reset may overtake bytes that were sent before it, a FIN does not.
            is_abrupt = self._random.random() < 0.3
            for side in (writer, far_writer):
                if is_abrupt:
                    side.transport.abort()
                side.close()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Copy one way until it ends or is to be cut."""
        left_bytes: int | None = None
        with suppress(OSError):
            while data := await reader.read(65_536):
                if self.cuts_left and left_bytes is None:
                    left_bytes = self._random.randint(1, MOST_BYTES)
                if self.cuts_left and left_bytes is not None and len(data) >= left_bytes:
                    writer.write(data[:left_bytes])
                    self.cuts_left -= 1
                    return
                if left_bytes is not None:
                    left_bytes -= len(data)
                writer.write(data)
                await writer.drain()

    async def stop(self) -> None:
        """Close the connections that are left."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def cutting_proxy(to_port: int, seed: int = 1) -> AsyncIterator[CuttingProxy]:
    """Run a proxy to ``to_port`` that cuts no connection until ``cuts_left`` is set."""
    proxy = CuttingProxy(to_port, seed)
    server = await asyncio.start_server(proxy.connected, "127.0.0.1", 0)
    proxy.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        server.close()
        await proxy.stop()
