"""Paths, methods and pages over real sockets, for the HTTP clients that people have."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import socket
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from clients import CURL, client_of, needs_curl, subscribe
from daemons import Daemon, at_a_socket, running
from http_wire import ask, get, post, responses, talk
from keys import access

from clevrd import __version__
from clevrd.core.publish_request import PublishRequest
from clevrd.handlers.site.pages import DOCS
from clevrd.tenants.settings import Access, Auth

WIRE = Path(__file__).parents[2] / "docs" / "wire.md"
OK = post('{"topic":"t","data":1}')
PATHS = {
    "/": "GET, HEAD",
    "/publish": "GET, HEAD, POST",
    "/ws": "GET, HEAD",
    "/publish/batch": "POST",
    "/subscribe": "GET, HEAD",
    "/health": "GET, HEAD",
    "/health/live": "GET, HEAD",
    "/health/ready": "GET, HEAD",
    "/metrics": "GET, HEAD",
}
METHODS = ["DELETE", "PUT", "PATCH", "TRACE", "GET", "POST"]
WRONG = [
    (path, method)
    for path, allowed in PATHS.items()
    for method in METHODS
    if method not in allowed.split(", ")
]


@pytest.fixture
async def daemon() -> AsyncIterator[Daemon]:
    """A daemon with its defaults."""
    async with running() as running_daemon:
        yield running_daemon


# --- paths and methods ---------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "method"), WRONG)
async def test_wrong_method_is_405_and_lists_the_right_ones(
    daemon: Daemon, path: str, method: str
) -> None:
    """For every path there is; the sentence names method, path and what to use."""
    answer = await ask(daemon.port, get(path, method=method))

    assert (answer.status, answer.code) == (405, "method_not_allowed")
    assert answer.headers["allow"] == f"{PATHS[path]}, OPTIONS"
    assert f"{method} is not allowed on {path}; use " in answer.json["error"]


@pytest.mark.parametrize(
    "path",
    [
        "/nope",
        "//",
        "/publish/",
        "/Publish",
        "/%70ublish",
        "/publish/..",
        "/health/",
        "/favicon.ico",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_unknown_path_is_404(daemon: Daemon, path: str, method: str) -> None:
    """Paths are compared as sent: nothing is decoded, nothing is normalised."""
    answer = await ask(daemon.port, get(path, method=method))

    assert (answer.status, answer.code) == (404, "not_found")
    assert "see /" in answer.json["error"]


@pytest.mark.parametrize("path", [*PATHS, "*"])
async def test_options_lists_the_methods(daemon: Daemon, path: str) -> None:
    """A 204 with nothing in it, and the connection is kept (RFC 9110 §9.3.7)."""
    sent = get(f"{path}?a=b" if path != "*" else path, method="OPTIONS")

    first, second = responses(await talk(daemon.port, [sent + get("/", "Connection: close")]))

    assert (first.version, first.status, first.body) == ("HTTP/1.1", 204, b"")
    assert first.headers["allow"] == f"{PATHS.get(path, 'GET, HEAD, POST, DELETE')}, OPTIONS"
    assert first.headers.keys() == {"allow", "server", "date"}
    assert second.status == 200


async def test_options_of_no_path_is_404(daemon: Daemon) -> None:
    """As with any method."""
    assert (await ask(daemon.port, get("/nope", method="OPTIONS"))).status == 404


@pytest.mark.parametrize("path", [path for path, methods in PATHS.items() if "HEAD" in methods])
async def test_head_has_the_head_of_get(daemon: Daemon, path: str) -> None:
    """Also of a refusal; without a body (RFC 9110 §9.3.2)."""
    with_body = await ask(daemon.port, get(path, "Connection: close"))

    transcript = await talk(daemon.port, [get(path, "Connection: close", method="HEAD")])

    (without,) = responses(transcript, to_head=True)
    assert without.status == with_body.status
    volatile = {"date", "content-length"}
    assert {k: v for k, v in without.headers.items() if k not in volatile} == {
        k: v for k, v in with_body.headers.items() if k not in volatile
    }


@pytest.mark.parametrize(
    "sent",
    [
        get("/"),
        get("/", "Accept: text/html"),
        get("/health"),
        get("/health/live"),
        get("/health/ready"),
        get("/metrics"),
        get("/metrics?topics=x"),
        get("/subscribe?topic=t&poll=1&timeout=0"),
        get("/subscribe?topic=t"),
        get("/nope"),
        get("/publish/batch"),
        post("{"),
        post("", line="POST /publish/batch HTTP/1.1"),
        get("/", "Accept: application/problem+json", "Host: a b"),
        b"nonsense\r\n\r\n",
    ],
)
async def test_no_cache_keeps_what_is_of_this_moment(daemon: Daemon, sent: bytes) -> None:
    """Everything but the files and the answers to POST; refusals too (RFC 9111 §5.2.2.5)."""
    assert (await ask(daemon.port, sent)).headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    ("target", "host"),
    [
        ("http://example.com/", "example.com"),
        ("HTTP://example.com:81", "example.com:81"),
        ("https://[::1]:8080/?a=b", "[::1]:8080"),
    ],
)
async def test_authority_of_the_target_counts_more_than_the_host(
    daemon: Daemon, target: str, host: str
) -> None:
    """RFC 9112 §3.2.2: as if the Host had said it."""
    page = await ask(daemon.port, get(target))

    assert page.status == 200
    assert f"http://{host}/health " in page.body.decode()


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("http://a:b@test/", "no user"),
        ("http://te%73t/", "no user"),
        ("ws://test/", "a path, or an http or https URL"),
        ("test:80", "as this server takes it"),
        ("/é", "percent-encode them"),
        ("http://é/", "percent-encode them"),
    ],
)
async def test_target_that_is_none_is_named(daemon: Daemon, target: str, words: str) -> None:
    """With what to do where something can be done."""
    answer = await ask(daemon.port, get(target))

    assert answer.status == 400
    assert words in answer.json["error"]


async def test_every_answer_names_the_server_and_the_time(daemon: Daemon) -> None:
    """One Server, one Date, one Content-Length, whichever way the answer came."""
    sent = OK + post("{") + get("/") + get("/nope") + get("/health", "Connection: close")

    answers = responses(await talk(daemon.port, [sent]))

    assert len(answers) == 5
    for answer in answers:
        assert answer.headers["server"] == "clevrd"
        assert answer.headers["date"].endswith(" GMT")
        assert int(answer.headers["content-length"]) == len(answer.body)


async def test_requests_that_can_not_have_a_body_refuse_one(daemon: Daemon) -> None:
    """400, and the connection is closed: what follows might be the body or a request."""
    sent = post("GET /nope HTTP/1.1\r\n\r\n", line="GET /health HTTP/1.1")

    [answer] = responses(await talk(daemon.port, [sent + OK]))

    assert (answer.status, answer.headers["connection"]) == (400, "close")
    assert "takes no body" in answer.json["error"]
    assert len(daemon.hub.topics) == 0


# --- pages ---------------------------------------------------------------------------------------


async def test_home_is_text_for_tools(daemon: Daemon) -> None:
    """What it is, how to use it, and addresses that work from where the reader is."""
    answer = await ask(daemon.port, get("/"))

    text = answer.body.decode()
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert text.startswith(f"clevrd {__version__}: ")
    assert "curl http://test/publish -d" in text
    assert "ws://test/subscribe?topic=orders" in text
    for path in ("/publish", "/subscribe", "/topics", "/health", "/metrics"):
        assert path in text


async def test_home_has_every_option_of_subscribe_and_field_of_publish(daemon: Daemon) -> None:
    """As docs/wire.md has them; the position of an EventSource is its own affair."""
    answer = await ask(daemon.port, get("/"))

    text = answer.body.decode()
    _, _, subscribe = WIRE.read_text().partition("\n## GET /subscribe\n")
    options = re.findall(r"^\| `(\w+)`", subscribe.partition("\n### ")[0], re.MULTILINE)
    fields = [field.name for field in msgspec.structs.fields(PublishRequest)]
    assert "subscriber_id" in options
    assert [name for name in options if not re.search(rf"\b{name}=", text)] == []
    assert [name for name in fields if f'"{name}"' not in text] == []


async def test_home_is_a_page_for_browsers(daemon: Daemon) -> None:
    """HTML, complete in itself."""
    accept = "Accept: text/html,application/xhtml+xml,*/*;q=0.8"

    answer = await ask(daemon.port, get("/", accept))

    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.body.startswith(b"<!doctype html>")
    assert b"curl http://test/publish" in answer.body
    assert b'src="http' not in answer.body
    # Without it each visit asks for an icon, and its 404 is a line in the browser's console.
    assert b'<link rel="icon" href="data:,">' in answer.body


@pytest.mark.parametrize("host", ['"><script>alert(1)</script>', "a b", "a/b?c", "\udcff", "é"])
async def test_home_shows_no_host_that_is_none(daemon: Daemon, host: str) -> None:
    """What a client sends as Host is refused or an address, never markup."""
    sent = get("/", "Accept: text/html").replace(
        b"Host: test", b"Host: " + host.encode("utf-8", "surrogateescape")
    )

    answer = await ask(daemon.port, sent)

    assert (answer.status, answer.code) == (400, "invalid_request")
    assert b"script" not in answer.body


@pytest.mark.parametrize(
    ("fields", "url"),
    [
        (
            ["X-Forwarded-Proto: https", "X-Forwarded-Host: events.example"],
            "https://events.example",
        ),
        (["X-Forwarded-Proto: https"], "https://test"),
        (["X-Forwarded-Host: <b>"], "http://test"),
        ([], "http://test"),
    ],
)
async def test_home_has_the_url_that_a_listed_proxy_was_asked_for(
    fields: list[str], url: str
) -> None:
    """And that of the daemon itself where the proxy says none, or none that is one."""
    listed = Access(auth=Auth(trusted_proxies=("127.0.0.1",)))
    async with running(access=listed) as daemon:
        answer = await ask(daemon.port, get("/", *fields))

    assert f"curl {url}/publish" in answer.body.decode()
    assert f"{url.replace('http', 'ws', 1)}/subscribe?topic" in answer.body.decode()


async def test_home_believes_no_other_proxy(daemon: Daemon) -> None:
    """Anybody can send these fields."""
    answer = await ask(daemon.port, get("/", "X-Forwarded-Host: evil.example"))

    assert b"evil" not in answer.body


async def test_home_says_what_becomes_of_messages(tmp_path: Path) -> None:
    """In memory alone, over a planned restart, or in a journal of these topics."""
    table = {"directory": str(tmp_path / "journal"), "topics": ["orders.*"]}
    said = []
    for settings in ({}, {"state_dir": str(tmp_path)}, {"journal_table": table}):
        async with running(**settings) as daemon:
            said.append((await ask(daemon.port, get("/"))).body.decode())

    assert "kept in memory alone" in said[0]
    assert "over a planned restart" in said[1]
    assert "Messages of orders.* are kept in a journal (sqlite)" in said[2]


async def test_home_says_whether_a_credential_is_required(daemon: Daemon) -> None:
    """And links to what browsers can look at, but to nothing that a client named."""
    async with running(access=access()) as closed:
        answer = await ask(closed.port, get("/"))
    assert b"It asks for a credential" in answer.body

    page = (await ask(daemon.port, get("/", "Accept: text/html"))).body.decode()
    assert "It asks for no credential" in page
    links = re.findall(r'<a href="([^"]*)"', page)
    assert [link.removeprefix("http://test") for link in links[:6]] == [
        *("/dashboard", "/topics", "/health", "/metrics", "/config", "/admin/top")
    ]
    assert links[6:] == [DOCS]


async def test_commands_on_the_home_page_work(daemon: Daemon) -> None:
    """The curl line, as it stands there."""
    home = await ask(daemon.port, get("/").replace(b"test", f"127.0.0.1:{daemon.port}".encode()))
    line = next(line for line in home.body.decode().splitlines() if " -d " in line)
    url, body = line.split("curl ")[1].split(" -d ")

    async with daemon.http.post(url, data=body.strip("'")) as response:
        answer = await response.json()

    assert answer["offset"] == 1


# --- clients that people have --------------------------------------------------------------------


async def curl(*arguments: str) -> bytes:
    """Run curl and return what it prints; it fails when the server misbehaves."""
    assert CURL is not None
    process = await asyncio.create_subprocess_exec(
        CURL, "-sS", "--max-time", "10", *arguments, stdout=-1, stderr=-1
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err
    return out


@needs_curl
async def test_curl_publishes(daemon: Daemon) -> None:
    """As the README says it: -d, and curl's own Content-Type."""
    out = await curl(f"{daemon.url}/publish", "-d", '{"topic":"t","data":{"id":1}}')

    assert json.loads(out)["offset"] == 1


@needs_curl
@pytest.mark.parametrize("options", [[], ["-H", "Transfer-Encoding: chunked"], ["--http1.0"]])
async def test_curl_sends_a_large_body(daemon: Daemon, tmp_path: Path, options: list[str]) -> None:
    """With Expect: 100-continue, which it waits for; in chunks; in HTTP/1.0."""
    data = tmp_path / "body.json"
    data.write_text('{"topic":"t","data":"%s"}' % ("x" * 1_000_000))
    expect = [] if "--http1.0" in options else ["-H", "Expect: 100-continue"]

    out = await curl(f"{daemon.url}/publish", "--data-binary", f"@{data}", *expect, *options)

    assert json.loads(out)["success"] is True


@needs_curl
async def test_curl_reads_the_refusal_of_a_body_that_is_too_large(
    daemon: Daemon, tmp_path: Path
) -> None:
    """Whether it waits for the 100 or just sends 8 MiB: a 413, not a broken pipe."""
    data = tmp_path / "body.json"
    data.write_bytes(b" " * (8 << 20))
    arguments = [f"{daemon.url}/publish", "--data-binary", f"@{data}", "-w", "%{http_code}"]

    waits = await curl(*arguments, "-H", "Expect: 100-continue")
    sends = await curl(*arguments, "-H", "Expect:")
    in_chunks = await curl(*arguments, "-H", "Expect:", "-H", "Transfer-Encoding: chunked")

    for out in (waits, sends, in_chunks):
        assert out.endswith(b"413")
        assert b'"code":"message_too_large"' in out


def with_urllib(url: str) -> list[tuple[int, Any]]:
    """Publish well and badly, and look at the health, with urllib."""
    found = []
    for path, body in (
        ("/publish", b'{"topic":"t","data":1}'),
        ("/publish", b"{"),
        ("/publish", b" " * (24 << 20)),
        ("/health/live", None),
    ):
        request = urllib.request.Request(url + path, body)  # noqa: S310  # http, our own
        try:
            with urllib.request.urlopen(request, timeout=10) as response:  # noqa: S310
                found.append((response.status, json.load(response)))
        except urllib.error.HTTPError as error:
            with error:
                found.append((error.code, json.load(error)))
    return found


async def test_urllib_publishes_and_reads_refusals(daemon: Daemon) -> None:
    """It sends Connection: close, and whole bodies without waiting."""
    found = await asyncio.to_thread(with_urllib, daemon.url)

    assert [status for status, _ in found] == [200, 400, 413, 200]
    assert found[0][1]["offset"] == 1


def with_http_client(port: int) -> list[tuple[int, int]]:
    """Publish over one kept connection; return statuses and the local ports used."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    found = []
    for body in ('{"topic":"t","data":1}', "{", '{"topic":"t","data":2}'):
        connection.request("POST", "/publish", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
        found.append((response.status, connection.sock.getsockname()[1]))
    connection.request("GET", "/metrics")
    found.append((connection.getresponse().status, connection.sock.getsockname()[1]))
    connection.close()
    return found


async def test_kept_connection_serves_everything(daemon: Daemon) -> None:
    """Good, bad, good, and a page at the end: one connection, as sessions of clients keep it."""
    found = await asyncio.to_thread(with_http_client, daemon.port)

    assert [status for status, _ in found] == [200, 400, 200, 200]
    assert len({local for _, local in found}) == 1
    assert daemon.hub.counters.connections == 1


async def test_aiohttp_client_publishes_in_every_way(daemon: Daemon) -> None:
    """json=, bytes, a stream in chunks, and a hundred at once."""

    async def stream() -> AsyncIterator[bytes]:
        yield b'{"topic":"t",'
        yield b'"data":1}'

    url = f"{daemon.url}/publish"
    answers: list[Any] = []
    for body in ({"json": {"topic": "t", "data": 1}}, {"data": OK[-22:]}, {"data": stream()}):
        async with daemon.http.post(url, **body) as response:
            answers.append(await response.json())
    many = await asyncio.gather(*(daemon.publish("t", n) for n in range(100)))

    assert [answer["offset"] for answer in answers] == [1, 2, 3]
    assert sorted(answer["offset"] for answer in many) == list(range(4, 104))


# --- where it listens ----------------------------------------------------------------------------


async def test_unix_socket_serves_publishers_and_subscribers(tmp_path: Path) -> None:
    """The same paths over a socket file, raw and through aiohttp; the file goes at the end."""
    path = tmp_path / "clevrd.sock"
    async with at_a_socket(path) as server:
        connector = aiohttp.UnixConnector(str(path))
        client = socket.socket(socket.AF_UNIX)
        client.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client, str(path))
        async with (
            aiohttp.ClientSession(connector=connector) as http,
            client_of("ws://localhost/subscribe?topic=t", sock=client) as reader,
        ):
            async with http.post("http://localhost/publish", data=OK[-22:]) as response:
                published = await response.json()
            message = json.loads(await reader.recv())
            async with http.get("http://localhost/health") as response:
                health = await response.json()

    assert server.addresses == []
    assert (published["offset"], message["offset"], health["subscribers"]) == (1, 1, 1)
    assert not path.exists()


@pytest.mark.skipif(not socket.has_ipv6, reason="this Python has no IPv6")
async def test_ipv6_address_serves() -> None:
    """The address in brackets, in the setting and in the URL."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    async with running(address="[::1]:0") as daemon:
        assert daemon.url == f"http://[::1]:{daemon.port}"

        async with subscribe(f"ws://[::1]:{daemon.port}") as reader:
            answer = await daemon.publish("t", 1)
            message = json.loads(await reader.recv())

        assert message["id"] == answer["message_id"]
