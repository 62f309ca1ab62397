"""Real input: the machine's package database, streamed through the command to ten subscribers.

Where there is no dpkg, the installed Python distributions stand in for it.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from contextlib import AsyncExitStack
from importlib.metadata import distributions

import pytest
from clients import subscribe
from daemons import ROOT, running
from websockets.asyncio.client import ClientConnection

READERS = 10
FIELDS = ("binary:Package", "Version", "Architecture", "Installed-Size", "Description")


@pytest.fixture
def records() -> list[bytes]:
    """Return one line of JSON for each installed package, spelled as other programs spell it."""
    packages = list(debian_packages() if shutil.which("dpkg-query") else python_packages())
    assert len(packages) > 20
    # Some with blanks after the separators, some without, some with escapes where UTF-8 would do.
    return [
        json.dumps(
            package,
            ensure_ascii=index % 2 == 0,
            separators=(",", ":") if index % 3 else None,
        ).encode()
        for index, package in enumerate(packages)
    ]


def debian_packages() -> list[dict[str, str]]:
    """Return the packages that dpkg knows of."""
    shown = "".join(f"${{{field}}}\x1f" for field in FIELDS) + "\x1e"
    listed = subprocess.run(["dpkg-query", "-W", "-f", shown], capture_output=True, check=True)
    rows = listed.stdout.decode().split("\x1e")[:-1]
    return [dict(zip(FIELDS, row.split("\x1f"), strict=False)) for row in rows]


def python_packages() -> list[dict[str, str]]:
    """Return the metadata of the installed distributions."""
    return [{name: each.metadata[name] for name in each.metadata} for each in distributions()]


async def test_every_record_reaches_every_reader_byte_for_byte(records: list[bytes]) -> None:
    """Ten independent clients each get the whole database, in order, as it was sent."""
    async with running() as daemon, AsyncExitStack() as stack, asyncio.timeout(25):
        readers = [
            await stack.enter_async_context(subscribe(daemon.ws_url, "packages"))
            for _ in range(READERS)
        ]
        reading = asyncio.gather(*(read(reader, len(records)) for reader in readers))

        publisher = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "clevrd", "publish", "packages", "-", "--url", daemon.url),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        _, told = await publisher.communicate(b"\n".join(records) + b"\n")
        received = await reading

    count = len(records)
    assert told.decode().startswith(f"clevrd: published {count} of {count} records in ")
    assert publisher.returncode == 0
    for each in received:
        assert [offset for offset, _ in each] == list(range(1, count + 1))
        assert [data for _, data in each] == records


async def read(reader: ClientConnection, count: int) -> list[tuple[int, bytes]]:
    """Return the offset and the data, byte for byte, of the next ``count`` messages."""
    received = []
    for _ in range(count):
        text = await reader.recv(decode=False)
        # What stands between the fields around it, so that no parser touches it.
        data = text.partition(b',"data":')[2].rpartition(b',"timestamp":')[0]
        received.append((json.loads(text)["offset"], data))
    return received
