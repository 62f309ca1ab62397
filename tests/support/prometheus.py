"""promtool, and a real Prometheus that scrapes a daemon. No daemon here.

`make prometheus` installs them; without them the tests are skipped, and fail where CI=true.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from daemons import ROOT, until
from ports import accepts, free_port

OPERATIONS = ROOT / "docs" / "operations.md"


def need(name: str) -> str:
    """Return ``name``, a tool on PATH; without it skip the test, or fail it where CI=true."""
    if shutil.which(name) is None:
        reason = f"there is no {name}; on Debian: apt-get install prometheus"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return name


# Where the document has the key that Prometheus asks with.
KEY_FILE = "/etc/prometheus/clevrd.key"


def example(*, has_key: bool = False) -> str:
    """Return the configuration of Prometheus that docs/operations.md has, with a key or without."""
    blocks = re.findall(r"^```yaml\n(.*?)^```$", OPERATIONS.read_text(), re.MULTILINE | re.DOTALL)
    found = [block for block in blocks if "scrape_configs" in block]
    (text,) = (block for block in found if (KEY_FILE in block) is has_key)
    return str(text)


class Prometheus:
    """A running Prometheus, asked over its HTTP API."""

    def __init__(self, url: str, http: aiohttp.ClientSession) -> None:
        self._url = url
        self._http = http

    async def get(self, path: str, **query: str) -> Any:
        """Return the data of an answer of the API."""
        async with self._http.get(f"{self._url}/api/v1/{path}", params=query) as answer:
            found = await answer.json()
            assert found["status"] == "success", found
            return found["data"]

    async def value(self, query: str) -> float | None:
        """Return the one value that ``query`` finds; None while there is none."""
        found = (await self.get("query", query=query))["result"]
        return float(found[0]["value"][1]) if found else None

    async def target(self) -> dict[str, Any]:
        """Return what it says of the daemon."""
        (target,) = (await self.get("targets"))["activeTargets"]
        return dict(target)


@asynccontextmanager
async def scraping(
    daemon_port: int, folder: Path, *, key: str | None = None
) -> AsyncIterator[Prometheus]:
    """Run a Prometheus, configured as the documents say, that scrapes four times a second.

    Args:
        key: the secret that it asks with; None for none.
    """
    name = need("prometheus")
    text = example(has_key=key is not None).replace("clevrd.internal:8080", "localhost:8080")
    assert "localhost:8080" in text
    if key is not None:
        (folder / "clevrd.key").write_text(key)
        text = text.replace(KEY_FILE, f"{folder}/clevrd.key")
    config = folder / "prometheus.yml"
    every = "global: {scrape_interval: 250ms, scrape_timeout: 250ms}\n"
    text = re.sub(r"^ +scrape_interval: .*\n", "", text, flags=re.MULTILINE)
    config.write_text(every + text.replace("localhost:8080", f"127.0.0.1:{daemon_port}"))
    port = free_port()
    with open(folder / "output", "wb") as output:  # noqa: ASYNC230  # a small file, once
        process = await asyncio.create_subprocess_exec(
            name,
            f"--config.file={config}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            env={**os.environ, "HOME": str(folder)},
            stdout=output,
            stderr=output,
        )
    try:
        await until(lambda: accepts(port) or process.returncode is not None)
        assert process.returncode is None, (folder / "output").read_text()
        async with aiohttp.ClientSession() as http:
            await _until_ready(http, f"http://127.0.0.1:{port}/-/ready")
            yield Prometheus(f"http://127.0.0.1:{port}", http)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _until_ready(http: aiohttp.ClientSession, url: str) -> None:
    """Wait until it answers questions, which is some time after it listens."""
    async with asyncio.timeout(20):
        while True:
            async with http.get(url) as answer:
                if answer.status == 200:
                    return
            await asyncio.sleep(0.05)
