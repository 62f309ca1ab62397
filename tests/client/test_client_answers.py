"""What the client makes of redirects, of servers that are none of ours, and of later daemons: one
sentence of its own that says what to do, and never an error of a library underneath.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import ssl
import subprocess
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from hashlib import sha1
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import WSMsgType, web
from aiohttp.http import WS_KEY, WSMessage
from daemons import until
from fake_server import Answer, FakeServer, Feed, message, serving, subscribed

from clevrd.client import (
    BadAnswer,
    Client,
    ClientError,
    Closed,
    Gap,
    Message,
    Refused,
    Unreachable,
)
from clevrd.client.redirects import NotFollowed, base_after, target_of


async def publish(client: Client) -> None:
    """Publish one message."""
    await client.publish("t", 1)


async def publish_batch(client: Client) -> None:
    """Publish a batch."""
    await client.publish_batch([("t", 1)])


async def subscribe(client: Client) -> None:
    """Subscribe to one topic."""
    async with client.subscribe("t") as items:
        await anext(items)


async def subscribe_many(client: Client) -> None:
    """Subscribe to several topics."""
    async with client.subscribe("a", "b"):
        pass


async def stream(client: Client) -> None:
    """Publish over a stream."""
    async with client.publisher() as publisher:
        await publisher.publish("t", 1)


async def history(client: Client) -> None:
    """Read what a topic has had."""
    async for _ in client.history("t"):
        pass


async def clear(client: Client) -> None:
    """Clear a topic."""
    await client.clear("t")


CALLS = [publish, publish_batch, subscribe, subscribe_many, stream, history, clear]
Call = Callable[[Client], Awaitable[None]]


@pytest.fixture(autouse=True)
async def nothing_is_left_unretrieved() -> AsyncIterator[None]:
    """Fail a test in which a task's error reached nobody."""
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    yield
    await asyncio.sleep(0)
    assert told == []


@asynccontextmanager
async def talking(say: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]) -> Any:
    """Run a server that says what ``say`` does, whatever it is asked, and yield its URL."""

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await say(reader, writer)
        writer.close()

    server = await asyncio.start_server(speak, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a certificate that nobody trusts, and its key."""
    if shutil.which("openssl") is None and not os.environ.get("CI"):
        pytest.skip("There is no openssl to make a certificate with.")
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -keyout key -out cert -days 1 -subj /CN=a"
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    return folder


async def sentence_of(call: Call, url: str, **options: Any) -> ClientError:
    """Return what a call to ``url`` fails of; it is one sentence."""
    async with asyncio.timeout(10), Client(url, retry_for_s=0, **options) as client:
        with pytest.raises(ClientError) as caught:
            await call(client)
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert "Error" not in sentence
    return caught.value


# --- redirects ---


@pytest.mark.parametrize("status", [301, 302, 307, 308])
@pytest.mark.parametrize("call", CALLS)
async def test_redirect_of_the_same_host_is_followed_by_every_call(
    call: Call, status: int, server: FakeServer
) -> None:
    """As the request that it was: a POST stays one, with its body, tenant and headers."""
    asked: list[web.Request] = []
    many = Feed(
        [subscribed("e", 0, topic="a", ref=1), subscribed("e", 0, topic="b", ref=2)],
        has_control=True,
        commands=2,
    )
    server.feeds.append(many if call is subscribe_many else Feed([message(1)]))

    async def move(request: web.Request) -> web.StreamResponse:
        asked.append(request)
        path = request.path_qs.removeprefix("/old")
        if path != request.path_qs:
            raise _moved(status, path)
        if path == "/publish" and request.method == "GET":
            return await answer_publishes(request)
        if path.startswith("/topics/"):
            return answer_topics()
        routes = {"/publish": server.publish, "/publish/batch": server.publish_batch}
        return await routes.get(request.path, server.subscribe)(request)

    async with (
        serving(move) as url,
        Client(f"{url}/old", "acme", headers={"X-Mine": "1"}) as client,
    ):
        await call(client)

    # A history is two questions, of which the second one goes where the first has moved for good.
    times = 2 if call is not history else 3 if status in (301, 308) else 4
    assert [request.method for request in asked] == [asked[0].method] * times
    assert [request.headers["X-Tenant-ID"] for request in asked] == ["acme"] * times
    assert [request.headers["X-Mine"] for request in asked] == ["1"] * times
    assert asked[1].path_qs == asked[0].path_qs.removeprefix("/old")
    if call is publish:
        assert server.data == [b"1"]


def _moved(status: int, location: str) -> web.HTTPException:
    kinds: dict[int, Any] = {
        301: web.HTTPMovedPermanently,
        302: web.HTTPFound,
        307: web.HTTPTemporaryRedirect,
        308: web.HTTPPermanentRedirect,
    }
    error: web.HTTPException = kinds[status](location)
    return error


async def answer_publishes(request: web.Request) -> web.StreamResponse:
    """Answer each publish of a stream."""
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    async for frame in socket:
        ref = json.loads(frame.data)["ref"]
        await socket.send_json({"success": True, "message_id": "m", "offset": 1, "ref": ref})
    return socket


def answer_topics() -> web.StreamResponse:
    """Answer each question about a topic: it is empty."""
    return web.json_response(
        {"topic": "t", "messages": [], "epoch": "e", "offset": 0, "success": True}
    )


@pytest.mark.parametrize("status", [301, 302, 307, 308])
@pytest.mark.parametrize("call", CALLS)
async def test_redirect_to_another_host_is_told_and_not_followed(call: Call, status: int) -> None:
    """Its tenant and its headers are for the server that was named."""
    reached: list[str] = []

    async def other(request: web.Request) -> web.StreamResponse:
        reached.append(request.path)
        return web.Response()

    async with serving(other) as target:

        async def move(request: web.Request) -> web.StreamResponse:
            raise _moved(status, f"{target}{request.path_qs}")

        async with serving(move) as url:
            error = await sentence_of(call, url, tenant="acme")

    assert type(error) is BadAnswer
    assert f"answered {status} and points to '{target}/" in str(error)
    assert str(error).endswith("give the daemon's own address as the URL.")
    assert reached == []


@pytest.mark.parametrize("call", CALLS)
async def test_redirects_in_circles_end(call: Call) -> None:
    """After five, as what they are."""
    asked: list[str] = []

    async def move(request: web.Request) -> web.StreamResponse:
        asked.append(request.path)
        raise web.HTTPTemporaryRedirect(request.path_qs)

    async with serving(move) as url:
        error = await sentence_of(call, url)

    assert "redirects in circles" in str(error)
    assert len(asked) == 6


async def test_move_for_good_is_remembered(server: FakeServer) -> None:
    """The second publish goes where the first one was sent to."""
    asked: list[str] = []

    async def move(request: web.Request) -> web.StreamResponse:
        asked.append(request.path)
        if request.path.startswith("/old"):
            raise web.HTTPPermanentRedirect("/new/publish")
        return await server.publish(request)

    async with serving(move) as url, Client(f"{url}/old") as client:
        await client.publish("t", 1)
        await client.publish("t", 2)

    assert asked == ["/old/publish", "/new/publish", "/new/publish"]


@pytest.mark.parametrize(
    ("asked", "location", "target"),
    [
        ("http://a/publish", "/b/publish", "http://a/b/publish"),
        ("http://a/publish", "https://a/publish", "https://a/publish"),
        ("http://a:8080/publish", "https://A:8443/publish", "https://A:8443/publish"),
        ("https://a/publish", "https://a:443/b", "https://a:443/b"),
        ("http://u:p@a/publish", "https://a/publish", "https://u:p@a/publish"),
        ("http://a/publish", "http://x:y@a/b", "http://a/b"),
        ("http://a/p?t=1", "/q?t=1#f", "http://a/q?t=1"),
    ],
)
def test_redirect_keeps_to_the_host_and_to_its_user(asked: str, location: str, target: str) -> None:
    """With the user and password that the client was given, and no others."""
    assert target_of(asked, 308, location) == target


@pytest.mark.parametrize(
    ("asked", "status", "location", "words"),
    [
        ("https://a/publish", 308, "http://a/publish", "points to 'http://a/publish'"),
        ("http://a/publish", 308, "http://b/publish", "points to 'http://b/publish'"),
        ("http://a/publish", 308, "//b/publish", "points to 'http://b/publish'"),
        ("http://a/publish", 308, "http://a:81/publish", "points to"),
        ("http://a/publish", 308, "http://a.b/publish", "points to"),
        ("http://a@b/publish", 308, "http://a/publish", "points to"),
        ("http://a/publish", 308, "http://u:p@b/x?t=1", "points to 'http://b/x'"),
        ("http://a/publish", 308, "ftp://a/publish", "points to"),
        ("http://a/publish", 308, "javascript:x", "points to"),
        ("http://a/publish", 303, "/other", "answered 303 and points to"),
        ("http://a/publish", 300, "/other", "answered 300 and points to"),
        ("http://a/publish", 308, "", "answered 308 without a Location"),
        ("http://a/publish", 304, "", "answered 304 without a Location"),
        ("http://a/publish", 308, "http://[::1/x", "a Location that is no URL"),
        ("http://a/publish", 308, "http://a:x/", "a Location that is no URL"),
    ],
)
def test_redirect_elsewhere_is_none(asked: str, status: int, location: str, words: str) -> None:
    """Never from TLS to plain text, never to another host or port, never as a GET."""
    with pytest.raises(NotFollowed) as caught:
        target_of(asked, status, location)

    assert words in str(caught.value)
    assert "u:p" not in str(caught.value)


def test_only_a_move_for_good_changes_the_base() -> None:
    """And only one that keeps the path behind it."""
    assert base_after("http://a", "/publish", 308, "https://a/x/publish?q=1") == "https://a/x"
    assert base_after("http://a", "/publish", 307, "https://a/publish") == "http://a"
    assert base_after("http://a", "/publish", 308, "https://a/other") == "http://a"


# --- servers that are none of ours ---


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("status", "words"),
    [
        (200, "check the URL"),
        (204, "check the URL"),
        (404, "answered 404 Not Found, but not as clevrd does; check the URL."),
        (405, "answered 405 Method Not Allowed, but not as clevrd does; check the URL."),
        (401, "answered 401 Unauthorized; check the credentials."),
    ],
)
async def test_page_of_another_service_is_named(call: Call, status: int, words: str) -> None:
    """The likely mistake is the URL."""

    async def page(_: web.Request) -> web.StreamResponse:
        return web.Response(status=status, text="<html>welcome</html>", content_type="text/html")

    async with serving(page) as url:
        error = await sentence_of(call, url)

    assert words in str(error)
    assert isinstance(error, (BadAnswer, Refused))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.2p1\r\n",
        b"HTTP/1.1 200\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"\x16\x03\x01\x00\x05hello",
    ],
)
async def test_port_that_speaks_something_else_is_named(call: Call, said: bytes) -> None:
    """Or that closes at once; the sentence has nothing of a parser in it."""

    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(said)

    async with talking(say) as url:
        error = await sentence_of(call, url)

    assert isinstance(error, (BadAnswer, Unreachable))
    assert "message=" not in str(error)


@pytest.mark.parametrize("call", CALLS)
async def test_nobody_there_is_named(call: Call) -> None:
    """The reason is the system's."""
    async with talking(lambda *_: None) as url:
        pass

    error = await sentence_of(call, url)

    assert str(error) == f"Can't reach {url}: connection refused."


@pytest.mark.parametrize("call", CALLS)
async def test_plain_text_to_a_port_with_tls_is_named(call: Call, certificate: Path) -> None:
    """And TLS to a plain one, by every call."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate / "cert", certificate / "key")

    async def say(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read(1)

    server = await asyncio.start_server(say, "127.0.0.1", 0, ssl=tls)
    async with server:
        port = server.sockets[0].getsockname()[1]
        plain = await sentence_of(call, f"http://127.0.0.1:{port}")
        untrusted = await sentence_of(call, f"https://127.0.0.1:{port}")
    async with talking(say) as url:
        no_tls = await sentence_of(call, url.replace("http:", "https:"))

    assert isinstance(plain, (Unreachable, BadAnswer))
    assert "its certificate is not trusted" in str(untrusted)
    assert isinstance(no_tls, Unreachable)


# --- servers that are gone when their ping is read ---


@pytest.mark.parametrize(
    ("code", "behind"), [(None, "lost"), (1012, "lost"), (1012, "told"), (4001, "refused")]
)
async def test_subscription_whose_server_went_behind_a_ping_comes_back(
    code: int | None, behind: str
) -> None:
    """aiohttp answers the ping inside a read: its own error was raised, and nobody came back."""
    queries: list[dict[str, str]] = []
    gone = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        queries.append(dict(request.query))
        socket = web.WebSocketResponse(protocols=["clevrd.v1"])
        await socket.prepare(request)
        await socket.send_frame(subscribed("e", len(queries)), WSMsgType.TEXT)
        if len(queries) > 1:
            await socket.send_frame(message(9), WSMsgType.TEXT)
            await socket.receive()
            return socket
        await gone.wait()
        for _ in range(3):
            await socket.ping()
        if behind == "told":
            await socket.send_frame(message(2), WSMsgType.TEXT)
        if code is not None:
            await socket._writer.close(code, b"why")  # type: ignore[union-attr]  # and no wait
        assert request.transport is not None
        request.transport.close()
        return socket

    async with (
        serving(answer) as url,
        Client(url, random=lambda: 0.0) as client,
        client.subscribe("t") as items,
    ):
        transport = items._socket._writer.transport  # type: ignore[union-attr]
        gone.set()
        await until(transport.is_closing)
        if behind == "refused":
            with pytest.raises(Closed, match=r"closed with 4001 \(why\)"):
                await anext(items)
            return
        taken = [(await anext(items)).offset for _ in range(1 + (behind == "told"))]  # type: ignore[union-attr]

    assert taken == ([2, 9] if behind == "told" else [9])
    assert queries[1]["offset"] == ("2" if behind == "told" else "1")


async def test_stream_whose_server_went_behind_a_ping_goes_on() -> None:
    """What has no answer is sent again over the next connection."""
    asked = asyncio.Event()
    attempts: list[str] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        attempts.append(request.path)
        if len(attempts) > 1:
            return await answer_publishes(request)
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.receive()
        asked.set()
        await socket.receive()
        return socket

    async with (
        serving(answer) as url,
        Client(url, random=lambda: 0.0) as client,
        client.publisher() as publisher,
    ):
        receipt = await publisher.publish("t", 1)
        await asked.wait()
        (opened,) = client._session._sockets
        # In one step, or aiohttp would read the ping before it hears of the end.
        opened._reader.feed_data(WSMessage(WSMsgType.PING, b"", None), 0)
        opened._writer.transport.abort()
        assert (await receipt).offset == 1

    assert attempts == ["/publish"] * 2


# --- answers and frames that are not as they have to be, and those of later daemons ---


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"null", b"[]", b'{"success":true}', b'{"message_id":5}', b"\xff", b"[" * 100_000],
)
@pytest.mark.parametrize("call", [publish, publish_batch, history, clear])
async def test_answer_that_is_not_ours_is_named(call: Call, body: bytes) -> None:
    """Success alone is not enough."""

    async def answer(_: web.Request) -> web.StreamResponse:
        return web.Response(body=body, content_type="application/json")

    async with serving(answer) as url:
        error = await sentence_of(call, url)

    assert str(error) == f"{url} answered 200, but not as clevrd does; check the URL."


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"hello",
        b"null",
        b'{"hello":1}',
        b'{"type":"gap","topic":5}',
        b'{"type":"subscribed","topic":"t","epoch":"e","offset":"x"}',
        b'{"type":5}',
        b'{"id":"m","offset":"1"}',
        b'{"id":"m","offset":1e99}',
        b'{"id":"m","key":"\xff"}',
        b"[" * 100_000,
    ],
)
@pytest.mark.parametrize("is_first", [True, False])
async def test_frame_that_is_not_ours_is_named(
    frame: bytes, is_first: bool, server: FakeServer
) -> None:
    """Instead of a greeting, and behind one."""
    before = [] if is_first else [subscribed("e", 0)]
    server.feeds.append(Feed([*before, frame], has_control=True))

    error = await sentence_of(subscribe, server.url)

    assert isinstance(error, BadAnswer)
    assert "`" not in str(error)
    assert str(error).startswith(f"{server.url} sent what is not a message of clevrd's; check")


async def subscribe_once(client: Client) -> None:
    """Subscribe to one topic, and don't come back."""
    async with client.subscribe("t", reconnect=False) as items:
        await anext(items)


async def subscribe_many_once(client: Client) -> None:
    """Subscribe to several topics, and don't come back."""
    async with client.subscribe("a", "b", reconnect=False) as items:
        await anext(items)


@pytest.mark.parametrize("call", [subscribe_once, subscribe_many_once, stream])
@pytest.mark.parametrize(
    ("frame", "error", "words"),
    [
        (b"\x82\x02hi", BadAnswer, "sent a binary frame, where clevrd sends text; check the URL"),
        (b"\x83\x00", Closed, "closed with 1002 (what came is not WebSocket)."),
        (b"\xf1\x00", Closed, "closed with 1002 (what came is not WebSocket)."),
        (b"\x81\x01\xff", BadAnswer, "check the URL"),
        (b"\x88\x02\x0f\xa1", Closed, "closed with 4001."),
    ],
)
async def test_frame_that_can_not_be_is_named(
    call: Call, frame: bytes, error: type[ClientError], words: str
) -> None:
    """In words of the client, not of aiohttp's reader of frames."""

    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        names = dict(line.split(b": ", 1) for line in head.split(b"\r\n") if b": " in line)
        key = {name.lower(): value for name, value in names.items()}[b"sec-websocket-key"]
        accept = b64encode(sha1(key + WS_KEY, usedforsecurity=False).digest())
        protocol = b"Sec-WebSocket-Protocol: clevrd.v1\r\n" if call is not stream else b""
        writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + accept + b"\r\n" + protocol + b"\r\n" + frame
        )
        await reader.read(1)

    async with talking(say) as url, asyncio.timeout(10), Client(url, retry_for_s=0) as client:
        with pytest.raises(error) as caught:
            await call(client)

    assert words in str(caught.value)


@pytest.mark.parametrize(
    "broken",
    [
        aiohttp.ClientOSError(None, "Can not write request body for http://h/publish/batch"),
        aiohttp.ServerDisconnectedError(),
        aiohttp.ClientConnectionResetError("Cannot write to closing transport"),
    ],
)
async def test_connection_that_breaks_is_named(broken: Exception) -> None:
    """While the rest of the request is on its way: what aiohttp says of that is not told."""
    client = Client("http://h:1", retry_for_s=0)

    sentence = str(client._session._unreachable(broken))

    assert sentence == (
        "The connection to http://h:1 broke before the answer: the server, or a proxy, closed"
        " it; if it always does, check the URL."
    )


@pytest.mark.parametrize("frame", [b"hello", b"{}", b'{"ref":null}', b'{"ref":1}', b'{"ref":"x"}'])
async def test_answer_on_a_stream_that_is_not_ours_is_named(frame: bytes) -> None:
    """The stream ends, and says why."""

    async def answer(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.receive()
        await socket.send_str(frame.decode())
        await socket.receive()
        return socket

    async with serving(answer) as url:
        error = await sentence_of(stream, url)

    assert isinstance(error, BadAnswer)


async def test_later_daemon_is_understood(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """Notices and fields that are not known yet are passed over."""
    news = {"type": "news", "topic": "t", "of": {"the": ["day"]}}
    greeting = subscribed("e", 0, compression={"a": 1}, window="many")
    lost = json.dumps(
        {"type": "gap", "topic": "t", "from": 1, "to": 1, "count": 1, "reason": "x", "why": []}
    ).encode()
    first = b'{"id":"m","topic":"t","data":1,"offset":2,"trailers":{"a":[]},"v":2}'
    server.feeds.append(Feed([greeting, json.dumps(news).encode(), lost, first], has_control=True))
    server.answers.append(_later_answer())

    async with new_client() as client:
        answer = await client.publish("t", 1)
        async with client.subscribe("t") as items:
            taken = [await anext(items), await anext(items)]

    assert (answer.message_id, answer.offset) == ("m", 7)
    assert taken[0] == Gap("t", 1, 1, 1, "x")
    assert isinstance(taken[1], Message)
    assert (taken[1].offset, taken[1].data) == (2, 1)


def _later_answer() -> Answer:
    body = {"success": True, "message_id": "m", "offset": 7, "shards": [1], "v": 2}
    return Answer(body=json.dumps(body).encode())
