"""Web pages over real sockets: on each way in, every method and path, before anything is done.

The rule itself: tests/tenants/test_origin_rule; a real browser: tests/streams/test_origins_browser.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final, cast

import pytest
import websockets
from daemons import Daemon, running, until
from held_turns import HeldTurns
from http_wire import Response as Answer
from http_wire import ask, get, post, read_response, responses, talk
from websockets.typing import Origin, Subprotocol

from clevrd.client_addresses import TrustedProxies
from clevrd.errors import ConfigError, OriginNotAllowed
from clevrd.http_values import Request, Response
from clevrd.page_check import PageCheck, loopback_port_of
from clevrd.tenants.origin_rule import OriginRule
from clevrd.tenants.origins import AllowedOrigins
from clevrd.tenants.settings import Access, Auth

LISTED: Final = "https://app.example"
FOREIGN: Final = "https://evil.example"
BODY: Final = '{"topic":"t","data":1}'
WS: Final = (
    "Connection: Upgrade",
    "Upgrade: websocket",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Version: 13",
)

# Method, path, fields; every endpoint in every transport, and what is none.
ASKED: Final = [
    ("POST", "/publish", ()),
    ("POST", "/publish/batch", ()),
    ("POST", "/ticket", ()),
    ("GET", "/publish", WS),
    ("GET", "/publish", ()),
    ("GET", "/subscribe?topic=t", WS),
    ("GET", "/subscribe?topic=t", ("Accept: text/event-stream",)),
    ("GET", "/subscribe?topic=t", ("Accept: application/x-ndjson",)),
    ("HEAD", "/subscribe?topic=t", ("Accept: text/event-stream",)),
    ("GET", "/subscribe?topic=t&poll=1&timeout=0", ()),
    ("GET", "/subscribe?topic=t", ()),
    ("GET", "/subscribe", WS),
    ("GET", "/ws", (*WS, "Sec-WebSocket-Protocol: clevrd.v1")),
    ("GET", "/ws", ()),
    ("GET", "/", ()),
    ("GET", "/clevrd.js", ()),
    ("GET", "/clevrd.d.ts", ()),
    ("HEAD", "/clevrd.js", ()),
    ("GET", "/health", ()),
    ("GET", "/health/live", ()),
    ("GET", "/health/ready", ()),
    ("GET", "/metrics", ()),
    ("GET", "/metrics", ("Accept: application/openmetrics-text",)),
    ("GET", "/nope", ()),
    ("POST", "/nope", ()),
    ("PUT", "/publish", ()),
    ("DELETE", "/metrics", ()),
    ("PATCH", "/subscribe", ()),
    ("PURGE", "/", ()),
    ("OPTIONS", "/publish", ()),
    ("OPTIONS", "/nope", ()),
    ("OPTIONS", "*", ()),
]
IDS: Final = [f"{method} {path} {' '.join(fields)[-20:]}".strip() for method, path, fields in ASKED]
PATHS: Final = [
    *("/", "/clevrd.js", "/clevrd.d.ts", "/publish", "/publish/batch", "/subscribe", "/ws"),
    *("/ticket", "/health", "/health/live", "/health/ready", "/metrics"),
]

# Nothing that a browser would spell so is the daemon's own or listed; nor is any other spelling.
TRICKS: Final = [
    "",
    "null",
    "NULL",
    "*",
    "file://",
    "https://evil.example",
    "https://app.example.evil.example",
    "https://evil-app.example",
    "https://notapp.example",
    "http://app.example",
    "https://app.example:8443",
    "https://app.example.",
    "https://app.example/",
    "https://APP.example",
    "HTTPS://app.example",
    "https://app.example@evil.example",
    "https://evil.example@app.example",
    "https://app.example https://evil.example",
    "https://app.example, https://evil.example",
    "https://app.example,https://app.example",
    "https://example.com",
    "https://evilexample.com",
    "https://a.example.com.",
    "https://a.example.com.evil.example",
    "https://a.example.com:8443",
    "https://xn--pp-yia.example",
    "http://test",
    "http://test:80",
    "http://test.:{port}",
    "http://test.evil.example:{port}",
    "http://TEST:{port}",
    "http://user@test:{port}",
    "http://test:0{port}",
    "http://test:{port}/",
    "http://test:{port}@evil.example",
    "ws://test:{port}",
    "test:{port}",
    "//test:{port}",
    "http://127.0.0.1:{port}",
    "http://localhost:{port}",
]


def request(method: str, path: str, *fields: str, host: str = "test", body: str = "") -> bytes:
    """Return a request; a POST publishes."""
    if method == "POST":
        return post(body or BODY, *fields, line=f"POST {path} HTTP/1.1", host=host)
    return get(path, *fields, method=method).replace(b"Host: test", f"Host: {host}".encode())


async def answer_to(port: int, sent: bytes) -> Answer:
    """Return the head of the answer; the body only of a refusal, which is whole."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(10):
            writer.write(sent)
            head = await reader.readuntil(b"\r\n\r\n")
            (answer,) = responses(head, to_head=True)
            body = b""
            if answer.status >= 400 and not sent.startswith(b"HEAD"):
                body = await reader.readexactly(int(answer.headers["content-length"]))
            return answer._replace(body=body)
    finally:
        writer.close()


def plain_vary(answer: Answer) -> list[str]:
    """Return what an answer varies by beside the Origin."""
    return [
        name for name in answer.headers.get("vary", "").split(", ") if name not in ("", "Origin")
    ]


@pytest.fixture(params=[True, False], ids=["raw", "aiohttp"])
async def daemon(request: pytest.FixtureRequest) -> AsyncIterator[Daemon]:
    """Return a daemon that lets in the pages of one other origin and of all below a domain."""
    origins = f"{LISTED}, https://*.example.com"
    async with running(raw_paths=request.param, allowed_origins=origins) as daemon:
        yield daemon


@pytest.mark.parametrize(("method", "path", "fields"), ASKED, ids=IDS)
async def test_page_that_is_not_listed_is_refused_wherever_it_asks(
    daemon: Daemon, method: str, path: str, fields: tuple[str, ...]
) -> None:
    """Before the path is looked up; the sentence names the setting, and no page may read it."""
    sent = request(method, path, f"Origin: {FOREIGN}", *fields)

    answer = await answer_to(daemon.port, sent)

    assert answer.status == 403
    if method != "HEAD":
        assert answer.code == "origin_not_allowed"
        assert "CLEVRD_ALLOWED_ORIGINS" in answer.json["error"]
    assert answer.headers["vary"] == "Origin"
    assert answer.headers["cache-control"] == "no-store"
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert daemon.hub.counters.refused == {"origin_not_allowed": 1}
    assert len(daemon.hub.topics) == 0
    assert len(daemon.server.connections) == 0


@pytest.mark.parametrize(("method", "path", "fields"), ASKED, ids=IDS)
async def test_listed_page_may_read_every_answer(
    daemon: Daemon, method: str, path: str, fields: tuple[str, ...]
) -> None:
    """Errors too, which tell it what is wrong; a handshake needs no fields for it."""
    sent = request(method, path, f"Origin: {LISTED}", *fields)

    plain = await answer_to(daemon.port, request(method, path, *fields))
    answer = await answer_to(daemon.port, sent)

    assert answer.status == plain.status != 403
    if answer.status != 101:
        assert answer.headers["access-control-allow-origin"] == LISTED
        assert answer.headers["access-control-allow-credentials"] == "true"
        assert "Retry-After" in answer.headers["access-control-expose-headers"]
        assert answer.headers["vary"] == ", ".join((*plain_vary(plain), "Origin"))
        volatile = {"date", "etag", "content-length", "transfer-encoding", "vary"}
        added = answer.headers.keys() - plain.headers.keys() - {"vary"}
        assert {name for name in added if not name.startswith("access-control-")} == set()
        assert {k: v for k, v in plain.headers.items() if k not in volatile} == {
            k: v for k, v in answer.headers.items() if k not in {*volatile, *added}
        }


@pytest.mark.parametrize(("method", "path", "fields"), ASKED, ids=IDS)
async def test_own_page_is_served(
    daemon: Daemon, method: str, path: str, fields: tuple[str, ...]
) -> None:
    """By any name that its browser and the request agree on."""
    sent = request(
        method, path, f"Origin: http://test:{daemon.port}", *fields, host=f"test:{daemon.port}"
    )

    plain = await answer_to(daemon.port, request(method, path, *fields))
    answer = await answer_to(daemon.port, sent)

    assert answer.status == plain.status != 403
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("origin", TRICKS, ids=lambda text: text or "empty")
async def test_no_spelling_passes_for_another_origin(daemon: Daemon, origin: str) -> None:
    """Suffixes, case, ports, users, trailing dots, punycode and null, for a page and a socket."""
    field = "Origin: " + origin.format(port=daemon.port)
    host = f"test:{daemon.port}"
    socket = ("GET", "/subscribe?topic=t", *WS)

    publishes = (("POST", path) for path in ("/publish", "/publish/batch", "/topics/t/messages"))
    for method, path, *fields in (*publishes, socket):
        answer = await answer_to(daemon.port, request(method, path, field, *fields, host=host))
        assert (answer.status, answer.code) == (403, "origin_not_allowed")

    assert len(daemon.hub.topics) == 0


@pytest.mark.parametrize(
    "origin", [LISTED, f"{LISTED}:443", "https://a.example.com", "https://a.b.example.com"]
)
async def test_listed_spellings_are_let_in(daemon: Daemon, origin: str) -> None:
    """The answer names the page as it named itself."""
    answer = await ask(daemon.port, post(BODY, f"Origin: {origin}"))

    assert answer.status == 200
    assert answer.headers["access-control-allow-origin"] == origin


@pytest.mark.parametrize("listed", ["null", "*"])
async def test_null_is_let_in_if_it_is_listed(listed: str) -> None:
    """A file, or a sandboxed frame, is not meant by the star: it may be anybody's."""
    async with running(allowed_origins=listed) as daemon:
        answer = await ask(daemon.port, post(BODY, "Origin: null"))

    assert answer.status == (200 if listed == "null" else 403)


async def test_star_lets_in_every_page_without_its_visitor(daemon: Daemon) -> None:
    """With a star no cookie counts."""
    async with running(allowed_origins="*") as daemon:
        answer = await ask(daemon.port, post(BODY, f"Origin: {FOREIGN}"))

    assert answer.status == 200
    assert answer.headers["access-control-allow-origin"] == FOREIGN
    assert "access-control-allow-credentials" not in answer.headers


async def test_without_a_list_only_own_pages_are_served() -> None:
    """As it comes: the daemon's own home page, and programs."""
    async with running() as daemon:
        own = f"127.0.0.1:{daemon.port}"
        statuses = [
            (await ask(daemon.port, post(BODY, *fields, host=own))).status
            for fields in ((), (f"Origin: http://{own}",), (f"Origin: {LISTED}",))
        ]
        answer = await ask(daemon.port, get("/health"))

    assert statuses == [200, 200, 403]
    assert "vary" not in answer.headers


# What a browser sends of a page's form without asking first (Fetch, "CORS-safelisted
# request-header"), curl -d too.
FORMS: Final = [
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "text/plain",
]


@pytest.mark.parametrize("content_type", FORMS)
@pytest.mark.parametrize("path", ["/publish", "/publish/batch", "/topics/t/messages"])
async def test_forms_of_foreign_pages_publish_nothing_and_curl_does(
    daemon: Daemon, path: str, content_type: str
) -> None:
    """A Content-Type protects from nobody and refuses no operator: the Origin decides."""
    form = (f"Content-Type: {content_type}",)
    line = f"POST {path} HTTP/1.1"

    for origin in (FOREIGN, "null"):
        answer = await ask(daemon.port, post(BODY, *form, f"Origin: {origin}", line=line))
        assert (answer.status, answer.code) == (403, "origin_not_allowed")
    assert len(daemon.hub.topics) == 0

    assert (await ask(daemon.port, post(BODY, *form, line=line))).status == 200


async def test_two_origins_are_none(daemon: Daemon) -> None:
    """Which of them a browser would have meant can't be told."""
    sent = post(BODY, f"Origin: {LISTED}", f"Origin: {LISTED}", "Connection: close")

    (answer,) = responses(await talk(daemon.port, [sent]))

    assert answer.status == 400
    assert len(daemon.hub.topics) == 0


@pytest.mark.parametrize("path", PATHS)
async def test_preflight_is_answered_on_every_path(daemon: Daemon, path: str) -> None:
    """It comes without a credential, whatever the request behind it will have."""
    asks = ("Access-Control-Request-Method: POST", "Access-Control-Request-Headers: content-type")

    told = await answer_to(daemon.port, get(path, f"Origin: {LISTED}", *asks, method="OPTIONS"))
    refused = await answer_to(daemon.port, get(path, f"Origin: {FOREIGN}", *asks, method="OPTIONS"))
    plain = await answer_to(daemon.port, get(path, method="OPTIONS"))

    assert told.status == plain.status == 204
    assert told.headers["access-control-allow-origin"] == LISTED
    assert told.headers["access-control-allow-methods"] == told.headers["allow"]
    allowed = told.headers["access-control-allow-headers"].lower().split(", ")
    assert {"authorization", "content-type", "x-api-key", "last-event-id"} <= set(allowed)
    assert {"idempotency-key", "x-tenant-id"} <= set(allowed)
    assert int(told.headers["access-control-max-age"]) >= 600
    assert refused.status == 403
    assert not [name for name in plain.headers if name.startswith("access-control")]


async def test_refusal_does_not_wait_for_the_body(daemon: Daemon) -> None:
    """A megabyte that was announced is not read."""
    for path in ("/publish", "/publish/batch", "/nope"):
        sent = post("", f"Origin: {FOREIGN}", line=f"POST {path} HTTP/1.1", length="1000000")

        (answer,) = responses(await talk(daemon.port, [sent]))

        assert answer.status == 403
        assert answer.headers["connection"] == "close"


async def test_page_behind_programs_on_one_connection_is_judged_by_its_own_head(
    daemon: Daemon,
) -> None:
    """As a proxy shares connections: nothing is remembered of one head for the next."""
    host = f"test:{daemon.port}"
    page = post(BODY, f"Origin: {FOREIGN}")
    own = post(BODY, f"Origin: http://{host}", host=host)
    program = post(BODY)

    answers = [
        responses(await talk(daemon.port, [b"".join(sent)]))
        for sent in ([program, own, program, page], [own, own, page, program], [page, program])
    ]

    statuses = [[answer.status for answer in each] for each in answers]
    # The refused one's body is not read, so its connection ends.
    assert statuses == [[200, 200, 200, 403], [200, 200, 403], [403]]


async def test_head_that_comes_again_is_refused_again(daemon: Daemon) -> None:
    """A refused handshake and a refused read leave the connection open; the next is no better."""
    sent = [
        get("/ws", f"Origin: {FOREIGN}", *WS, "Sec-WebSocket-Protocol: clevrd.v1"),
        get("/health", f"Origin: {FOREIGN}"),
    ]

    answers = responses(await talk(daemon.port, [b"".join(sent * 2)], shut=True))

    assert [answer.status for answer in answers] == [403] * 4


async def test_draining_daemon_asks_too(daemon: Daemon) -> None:
    """A page that may not is told so, and not to come back."""
    daemon.hub.is_draining = True

    for method, path, fields in ASKED:
        answer = await answer_to(daemon.port, request(method, path, f"Origin: {FOREIGN}", *fields))
        assert answer.status == 403, (method, path)


async def test_full_daemon_asks_too() -> None:
    """Beyond the limit a page that may not learns nothing; one that may is told to come back."""
    async with running(max_connections=1, allowed_origins=LISTED) as daemon:
        _, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
        await until(lambda: len(daemon.listener.raw.open) == 1)
        events = "/subscribe?topic=t"
        answers = {
            (path, origin): await answer_to(
                daemon.port, get(path, f"Origin: {origin}", "Accept: text/event-stream")
            )
            for path in ("/health", events)
            for origin in (LISTED, FOREIGN)
        }
        writer.close()

    statuses = {asked: answer.status for asked, answer in answers.items()}
    assert statuses == {
        ("/health", LISTED): 200,
        ("/health", FOREIGN): 403,
        (events, LISTED): 200,
        (events, FOREIGN): 403,
    }
    for path in ("/health", events):
        assert answers[path, LISTED].headers["access-control-allow-origin"] == LISTED


async def test_name_that_was_made_to_mean_this_machine_is_refused(daemon: Daemon) -> None:
    """DNS rebinding: the page is of the same origin for its browser, so its reads say no Origin."""
    host = f"evil.example:{daemon.port}"
    origin = f"Origin: http://{host}"

    for method, path, fields in (
        ("GET", "/metrics", ()),
        ("GET", "/subscribe?topic=t&poll=1&timeout=0", ()),
        ("GET", "/subscribe?topic=t", ("Accept: text/event-stream",)),
        ("HEAD", "/health", ()),
        ("POST", "/publish", (origin,)),
        ("GET", "/ws", (origin, *WS)),
    ):
        answer = await answer_to(daemon.port, request(method, path, *fields, host=host))
        assert answer.status == 403, (method, path)
    # A proxy on this machine passes on its client's Host, which has another port.
    for host in ("app.example", "app.example:81", "localhost:{}", "127.0.0.1:{}", "[::1]:{}"):
        sent = request("GET", "/health", host=host.format(daemon.port))
        assert (await answer_to(daemon.port, sent)).status == 200, host
    # A program that names it so and sends no Origin is no page: no page can do either.
    sent = request("POST", "/publish", host=f"evil.example:{daemon.port}")
    assert (await answer_to(daemon.port, sent)).status == 200


async def test_log_names_the_setting_once_a_minute_for_each_page(
    daemon: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    """An operator who forgot a page finds it there."""
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            await ask(daemon.port, post(BODY, f"Origin: {FOREIGN}"))
            await answer_to(daemon.port, get("/ws", f"Origin: {FOREIGN}", *WS))
        await ask(daemon.port, post(BODY, "Origin: https://other.example"))

    lines = [each.getMessage() for each in caplog.records if "refused" in each.getMessage()]
    assert len(lines) == 2
    assert FOREIGN in lines[0]
    assert all("allowed_origins" in line for line in lines)


async def test_name_is_refused_on_every_interface_that_is_this_machines_own() -> None:
    """By default one socket listens for IPv4 and IPv6, and spells 127.0.0.1 in its own way."""
    async with running(address=":0") as daemon:
        sent = request("GET", "/metrics", host=f"evil.example:{daemon.port}")
        answer = await answer_to(daemon.port, sent)

    assert answer.status == 403


@pytest.mark.parametrize(
    ("address", "port"),
    [
        (("127.0.0.1", 80), 80),
        (("127.9.9.9", 80), 80),
        (("::1", 80, 0, 0), 80),
        (("::ffff:127.0.0.1", 80, 0, 0), 80),
        (("10.0.0.1", 80), None),
        (("::ffff:10.0.0.1", 80, 0, 0), None),
        (("fe80::1%eth0", 80, 0, 2), None),
        ("/run/clevrd.sock", None),
        ("", None),
        (None, None),
    ],
)
def test_loopback_interface_is_known_by_its_addresses(address: object, port: int | None) -> None:
    """A Unix socket is none: no browser reaches it."""
    assert loopback_port_of(address) == port


class FakeTransport(asyncio.BaseTransport):
    """A connection that was made over TLS, or by a listed proxy."""

    def get_extra_info(self, name: str, default: object = None) -> object:
        """Return what the test gave."""
        return self._extra.get(name, default)  # type: ignore[attr-defined]  # asyncio's own


HOSTS: Final = ("in.example", "out.example", "out.example:1", "evil.example")


def is_let_in(head: Request, transport: asyncio.BaseTransport, *, is_proxy: bool) -> bool:
    """Return whether a page may ask over a connection, which is perhaps a listed proxy's."""
    proxies = TrustedProxies(["10.0.0.1"] if is_proxy else [])
    rule = OriginRule(AllowedOrigins([]), lambda: 0.0)
    pages = PageCheck(rule, lambda headers, _: proxies.asked_for(headers, "10.0.0.1"))
    try:
        pages.check(head, transport)
    except OriginNotAllowed:
        return False
    return True


@pytest.mark.parametrize(
    ("is_secure", "is_proxy", "origin", "is_served"),
    [
        (False, False, "http://app.example", True),
        (True, False, "https://app.example", True),
        (True, False, "http://app.example", False),
        (False, False, "https://out.example", False),
        (False, True, "https://out.example", True),
        (False, True, "http://app.example", False),
    ],
)
def test_connection_says_what_is_own(
    is_secure: bool, is_proxy: bool, origin: str, is_served: bool
) -> None:
    """Its TLS, and whether it is a listed proxy's, whose word counts."""
    transport = FakeTransport({"sslcontext": object() if is_secure else None})
    said = {"x-forwarded-proto": "https", "x-forwarded-host": "out.example"}
    head = Request("POST", "/publish", {"host": "app.example", "origin": origin, **said})

    assert is_let_in(head, transport, is_proxy=is_proxy) is is_served


@pytest.mark.parametrize(
    ("said", "own"),
    [
        ({}, "http://in.example"),
        ({"x-forwarded-proto": "https"}, "https://in.example"),
        ({"x-forwarded-proto": "gopher"}, "http://in.example"),
        ({"x-forwarded-host": "out.example"}, "http://out.example"),
        (
            {"x-forwarded-proto": "http, HTTPS", "x-forwarded-host": "evil.example, out.example:1"},
            "https://out.example:1",
        ),
    ],
)
def test_what_a_listed_proxy_does_not_say_is_as_the_daemon_sees_it(
    said: dict[str, str], own: str
) -> None:
    """And of what is said several times the last counts, which the nearest proxy has added."""
    origins = [f"{scheme}://{host}" for scheme in ("http", "https") for host in HOSTS]
    heads = [
        Request("POST", "/publish", {"host": "in.example", "origin": origin, **said})
        for origin in origins
    ]

    let_in = {
        head.headers["origin"] for head in heads if is_let_in(head, FakeTransport(), is_proxy=True)
    }

    # The same page over https is own as well: see the rule.
    assert let_in == {own, own.replace("http://", "https://")}


def test_rule_can_change_while_the_daemon_runs() -> None:
    """As after a reload of its configuration."""
    rule = OriginRule(AllowedOrigins([]), lambda: 0.0)
    head = Request("POST", "/publish", {"host": "a.example", "origin": FOREIGN})
    pages = PageCheck(rule, lambda *_: None)
    with pytest.raises(OriginNotAllowed):
        pages.check(head, None)

    rule.change(AllowedOrigins([FOREIGN]))

    pages.check(head, None)
    answer = pages.marked(Response(200, b"", headers=(("Vary", "Accept"),)), head)
    assert dict(answer.headers)["Vary"] == "Accept, Origin"


async def test_file_lists_pages_and_a_reload_changes_the_list(tmp_path: Path) -> None:
    """The next request of a connection that is open is judged by the new list already."""
    listed = Access(auth=Auth(allowed_origins=(LISTED,)))
    async with running(access=listed) as daemon:
        reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
        statuses = []
        for access in (listed, Access(), listed):
            await daemon.server.access.apply(access, tmp_path)
            writer.write(get("/health", f"Origin: {LISTED}"))
            statuses.append((await read_response(reader)).status)
        writer.close()

    assert statuses == [200, 403, 200]


async def test_list_in_two_places_changes_nothing(tmp_path: Path) -> None:
    """A file that is read again may not contradict the setting."""
    async with running(allowed_origins=LISTED) as daemon:
        with pytest.raises(ConfigError, match="keep one of them"):
            await daemon.server.access.apply(
                Access(auth=Auth(allowed_origins=(FOREIGN,))), tmp_path
            )
        answers = [
            await ask(daemon.port, get("/health", f"Origin: {origin}"))
            for origin in (LISTED, FOREIGN)
        ]

    assert [answer.status for answer in answers] == [200, 403]


@pytest.mark.parametrize("path", PATHS)
async def test_preflight_needs_no_credential_and_a_page_reads_that_one_is_missing(
    path: str,
) -> None:
    """Browsers send a preflight without any, whatever the request behind it has."""
    access = Access(auth=Auth(mode="required", allowed_origins=(LISTED,)))
    async with running(access=access) as daemon:
        asks = (f"Origin: {LISTED}", "Access-Control-Request-Method: POST")
        preflight = await answer_to(daemon.port, get(path, *asks, method="OPTIONS"))
        sent = request("POST", "/publish", f"Origin: {LISTED}")
        missing = await answer_to(daemon.port, sent)
        foreign = await answer_to(daemon.port, request("POST", path, f"Origin: {FOREIGN}"))

    assert preflight.status == 204
    assert preflight.headers["access-control-allow-origin"] == LISTED
    assert (missing.status, foreign.status) == (401, 403)
    assert missing.headers["access-control-allow-origin"] == LISTED


# --- open connections obey a changed list --------------------------------------------------------


def allowing(*origins: str, proxies: tuple[str, ...] = ()) -> Access:
    """Return the rules that list these pages and proxies."""
    return Access(auth=Auth(allowed_origins=origins, trusted_proxies=proxies))


def page_socket(daemon: Daemon, path: str, origin: str | None = LISTED) -> websockets.connect:
    """Return a WebSocket as a page of ``origin`` opens it, None for a program's."""
    protocol = Subprotocol("clevrd.v1")
    shown = None if origin is None else Origin(origin)
    return websockets.connect(f"{daemon.ws_url}{path}", origin=shown, subprotocols=[protocol])


@pytest.mark.parametrize("is_raw", [True, False])
@pytest.mark.parametrize(
    "path", ["/subscribe?topic=t", "/subscribe?topic=t&pattern=a.*", "/ws", "/publish"]
)
async def test_socket_of_a_page_that_is_listed_no_more_is_closed(path: str, is_raw: bool) -> None:
    """By the code of a refused handshake; a program's, and an own or still listed page's, stay."""
    other = "https://other.example"
    async with running(access=allowing(LISTED, other), raw_paths=is_raw) as daemon:
        own = f"http://127.0.0.1:{daemon.port}"
        async with (
            page_socket(daemon, path) as cut,
            page_socket(daemon, path, other) as listed,
            page_socket(daemon, path, own) as page,
            page_socket(daemon, path, None) as program,
        ):
            kept_all = await daemon.server.access.apply(allowing(LISTED, other), Path())
            closed = await daemon.server.access.apply(allowing(other), Path())

            async with asyncio.timeout(10):
                await cut.wait_closed()
                for kept in (listed, page, program):
                    await (await kept.ping())
        counters = daemon.hub.counters

    assert (kept_all, closed) == (0, 1)
    assert (cut.close_code, cut.close_reason) == (4003, "origin_not_allowed")
    assert counters.closed[4003] == 1
    assert counters.refused["origin_not_allowed"] == 1
    assert not daemon.server.connections._pages


@pytest.mark.parametrize("form", ["text/event-stream", "application/x-ndjson"])
async def test_stream_of_a_page_that_is_listed_no_more_is_told_and_ends(
    form: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The response is whole, and the log names the page and the setting."""
    async with running(access=allowing(LISTED)) as daemon:
        url = f"{daemon.url}/subscribe?topic=t&control=1"
        async with daemon.http.get(url, headers={"Accept": form, "Origin": LISTED}) as stream:
            await until(lambda: daemon.hub.subscribers == 1)
            closed = await daemon.server.access.apply(allowing(), Path())
            text = await stream.text()
        refused = daemon.hub.counters.refused["origin_not_allowed"]

    assert (closed, refused) == (1, 1)
    assert '"code":"origin_not_allowed"' in text
    assert '"retryable":false' in text
    assert "page refused origin='https://app.example'" in caplog.text
    assert "allowed_origins" in caplog.text


@pytest.mark.parametrize("topics", ["topic=t", "topic=t&topic=u"])
async def test_poll_of_a_page_that_is_listed_no_more_is_refused(topics: str) -> None:
    """It has waited while the list changed; a program's is answered with what there is."""
    async with running(access=allowing(LISTED)) as daemon:
        url = f"{daemon.url}/subscribe?{topics}&poll=1&timeout=30"
        of_page = asyncio.ensure_future(daemon.http.get(url, headers={"Origin": LISTED}))
        of_program = asyncio.ensure_future(daemon.http.get(url))
        await until(lambda: len(daemon.polls) == 2)

        await daemon.server.access.apply(allowing(), Path())

        async with asyncio.timeout(10):
            page, program = await of_page, await of_program
        answer = await page.json()
        refused = daemon.hub.counters.refused["origin_not_allowed"]

    assert (page.status, program.status, refused) == (403, 200, 1)
    assert answer["code"] == "origin_not_allowed"
    assert "Access-Control-Allow-Origin" not in page.headers


async def test_name_of_this_machine_that_is_listed_no_more_ends_its_streams() -> None:
    """Pages of a listed alias read without an Origin, as pages of the daemon's own do."""
    async with running() as daemon:
        alias = f"clevrd.test:{daemon.port}"
        access = allowing(f"http://{alias}")
        await daemon.server.access.apply(access, Path())
        fields = {"Accept": "application/x-ndjson", "Host": alias}
        url = f"{daemon.url}/subscribe?topic=t&control=1"
        async with (
            daemon.http.get(url, headers=fields) as cut,
            daemon.http.get(url, headers={"Accept": fields["Accept"]}) as kept,
        ):
            await until(lambda: daemon.hub.subscribers == 2)
            closed = await daemon.server.access.apply(allowing(), Path())
            text = await cut.text()
            await until(lambda: daemon.hub.subscribers == 1)
            assert kept.status == 200

    assert closed == 1
    assert '"code":"origin_not_allowed"' in text


async def test_page_that_was_own_by_a_proxys_word_is_closed_with_the_proxy() -> None:
    """What the proxy said of its client counts as long as the proxy is listed."""
    async with running(access=allowing(proxies=("127.0.0.1",))) as daemon:
        said = {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "out.example"}
        url = f"{daemon.ws_url}/subscribe?topic=t"
        origin = Origin("https://out.example")
        async with websockets.connect(url, origin=origin, additional_headers=said) as socket:
            closed = await daemon.server.access.apply(allowing(), Path())
            async with asyncio.timeout(10):
                await socket.wait_closed()

    assert (closed, socket.close_code) == (1, 4003)


async def test_page_that_waits_for_its_turn_is_judged_by_the_new_list() -> None:
    """It would become a connection that nobody judges again."""
    async with running(access=allowing(LISTED)) as daemon:
        turns = HeldTurns()
        daemon.listener.front._turns = cast(Any, turns)
        url = f"{daemon.url}/subscribe?topic=t"
        headers = {"Accept": "text/event-stream", "Origin": LISTED}
        asking = asyncio.ensure_future(daemon.http.get(url, headers=headers))
        await turns.waits.wait()

        await daemon.server.access.apply(allowing(), Path())
        turns.come.set()
        answer = await asking

    assert answer.status == 403
    assert daemon.hub.subscribers == 0
