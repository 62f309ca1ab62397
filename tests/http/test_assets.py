"""/clevrd.js and /clevrd.d.ts over real sockets; what the module does: test_javascript_client."""

from __future__ import annotations

import tomllib

import pytest
from daemons import ROOT, Daemon, running
from http_wire import get, responses, talk

WEB = ROOT / "clevrd" / "web"
TYPES = {"clevrd.js": "text/javascript; charset=utf-8", "clevrd.d.ts": "text/plain; charset=utf-8"}


async def ask(daemon: Daemon, name: str, *fields: str, method: str = "GET") -> bytes:
    """Return the answer to a request for one file, as bytes."""
    return await talk(daemon.port, [get(f"/{name}", "Connection: close", *fields, method=method)])


@pytest.mark.parametrize("name", TYPES)
async def test_file_is_served_as_it_lies_there(name: str) -> None:
    """Typed, not to be guessed at; the module knows where it is from."""
    async with running() as daemon:
        (whole,) = responses(await ask(daemon, name))
        (head,) = responses(await ask(daemon, name, method="HEAD"), to_head=True)

    tail = b"\nhome = import.meta.url;\n" if name.endswith(".js") else b""
    assert (whole.status, whole.body) == (200, (WEB / name).read_bytes() + tail)
    assert whole.headers["content-type"] == TYPES[name]
    assert whole.headers["x-content-type-options"] == "nosniff"
    # Pages of other origins: test_browser_origins.
    assert "access-control-allow-origin" not in whole.headers
    assert whole.headers["cache-control"] == "public, max-age=300"
    assert {**head.headers, "date": ""} == {**whole.headers, "date": ""}


@pytest.mark.parametrize(
    ("tags", "status"),
    [
        ("{etag}", 304),
        ('W/{etag}, "other"', 304),
        ('"other"', 200),
        ("", 200),
        ('"x",' * 300 + "{etag}", 200),
        ("*", 304),
        ('"*"', 200),
    ],
    ids=["same", "weak, in a list", "other", "empty", "a list beyond reason", "any", "a star"],
)
async def test_copy_that_is_as_good_is_not_sent_again(tags: str, status: int) -> None:
    """If-None-Match with the current tag is answered 304, without a body."""
    async with running() as daemon:
        (first,) = responses(await ask(daemon, "clevrd.js"))
        etag = first.headers["etag"]
        answer = await ask(daemon, "clevrd.js", f"If-None-Match: {tags.format(etag=etag)}")

    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert f"\r\nETag: {etag}".encode() in head
    assert (body == b"") == (status == 304)


def test_module_stays_small() -> None:
    """Under 32 KiB as served, uncompressed, and without anything it would have to load.

    A third of it are the sentences for wrong arguments and what tells those.
    """
    text = (WEB / "clevrd.js").read_bytes()

    assert len(text) < 32 * 1024
    assert b"import " not in text
    assert b"import(" not in text


def test_packages_contain_the_files() -> None:
    """What is installed from a wheel serves them too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["clevrd"]

    found = {
        path.name
        for pattern in patterns
        if pattern.startswith("web/")
        for path in (ROOT / "clevrd").glob(pattern)
    }

    assert found == {*TYPES, "dashboard.html"} == {path.name for path in WEB.iterdir()}


async def test_home_page_names_it() -> None:
    """Who opens the daemon's address learns of the module."""
    async with running() as daemon, daemon.http.get(daemon.url) as response:
        assert f'from "{daemon.url}/clevrd.js"' in await response.text()
