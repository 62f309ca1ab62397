"""The home page: what it says is true of this daemon, and of the way on which its client came."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import shutil
from pathlib import Path

import aiohttp
import pytest
from daemons import ROOT, at_a_socket, running
from http_wire import ask, get


async def home(path: Path, **headers: str) -> str:
    """Return the home page at a Unix socket."""
    connector = aiohttp.UnixConnector(str(path))
    async with (
        aiohttp.ClientSession(connector=connector) as http,
        http.get("http://localhost/", headers=headers) as answer,
    ):
        return await answer.text()


async def test_page_over_a_unix_socket_has_commands_that_go_there(tmp_path: Path) -> None:
    """`http://localhost` by itself would reach whoever has port 80."""
    path = tmp_path / "a b.sock"
    async with at_a_socket(path, admin_address=f"unix:{tmp_path}/admin"):
        page = await home(path)
        operators = await home(tmp_path / "admin")

    assert f"clevrd subscribe orders --url {shlex.quote(f'unix:{path}')}\n" in page
    assert f"{shlex.quote(f'ws-c:unix:{path}')}  " in page
    assert f"Ask with: curl --unix-socket {tmp_path}/admin http://localhost/health" in operators


async def test_command_of_the_page_publishes_over_the_unix_socket(tmp_path: Path) -> None:
    """As it stands there, in a shell, by the real curl."""
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    path = tmp_path / "a b.sock"
    async with at_a_socket(path) as server:
        (command,) = re.findall(r"^    (curl .*/publish -d .*)$", await home(path), re.MULTILINE)
        ran = await asyncio.create_subprocess_shell(command + " -s", stdout=asyncio.subprocess.PIPE)
        output, _ = await ran.communicate()

        assert json.loads(output)["success"] is True
        assert [topic.name for topic in server.hub.topics] == ["orders"]


async def test_page_through_a_proxy_at_a_unix_socket_names_the_proxy(tmp_path: Path) -> None:
    """Its client has no such socket."""
    path = tmp_path / "s"
    async with at_a_socket(path):
        page = await home(path, Host="app.example")

    assert "curl http://app.example/publish -d" in page
    assert "unix" not in page


async def test_page_names_the_daemons_own_address_where_the_client_names_none() -> None:
    """As HTTP/1.0 allows."""
    async with running() as daemon:
        answer = await ask(daemon.port, b"GET / HTTP/1.0\r\n\r\n")

        own = daemon.server.addresses[0]
    assert f"curl {own}/publish -d" in answer.body.decode()


async def test_page_has_every_option_of_subscribe() -> None:
    """The wire contract has their list."""
    contract = (ROOT / "docs" / "wire.md").read_text(encoding="utf-8")
    table = contract.split("\n## GET /subscribe\n")[1].split("\nNumbers of messages")[0]
    options = re.findall(r"^\| (`\w+`.*?) \|", table, re.MULTILINE)
    names = [name for each in options for name in re.findall(r"`(\w+)`", each)]
    async with running() as daemon:
        page = (await ask(daemon.port, get("/"))).body.decode()

    listed = page.split("Options of /subscribe:")[1]
    # The second spelling is EventSource's own.
    missing = [name for name in names if f"{name}=" not in listed and name != "lastEventId"]
    assert missing == []
    assert "topic" in names
    assert "ticket=" in listed
