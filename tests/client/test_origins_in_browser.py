"""Pages of two origins in a real Chromium: a listed one can do everything, the other nothing.

The same by bytes, which no browser sends: tests/http/test_browser_origins.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

import pytest
import pytest_asyncio
from browsers import chromium, in_page, page_at, site, until_page
from daemons import Daemon, running, until
from playwright.async_api import Browser, Page

from clevrd.http_values import Request as HttpRequest
from clevrd.page_check import PageCheck

# One Chromium for all: starting it takes longer than most of the tests.
pytestmark = pytest.mark.asyncio(loop_scope="module")

# A name that is nobody's machine but this one's: its owner had it mean 127.0.0.1.
REBOUND: Final = "evil.example"

# Each way in which a page can reach a daemon at `url`, and what came of it: true, or false for what
# the browser reports to the page as a failure.
WAYS: Final = """
const attempt = async (call) => { try { return await call(); } catch { return false; } };
const opens = (source, event) => new Promise((done) => {
    source.addEventListener(event, () => { source.close(); done(true); });
    source.addEventListener("error", () => { source.close(); done(false); });
});
const text = '{"topic":"t","data":1}';
const json = { "Content-Type": "application/json" };
const post = { method: "POST", body: text };
const send = async (path, init) => (await fetch(url + path, { ...post, ...init })).ok;
const publishes = (client) => client.publish("t", 1).then(() => true);
return {
    plain: await attempt(() => send("/publish")),
    json: await attempt(() => send("/publish", { headers: json })),
    more: await attempt(() => send("/publish", {
        headers: { ...json, "X-Tenant-ID": "acme", "Idempotency-Key": "k1" },
    })),
    batch: await attempt(() => send("/publish/batch")),
    opaque: await attempt(async () => {
        // A page is never told what came of it.
        await fetch(url + "/publish", { ...post, mode: "no-cors" });
        return navigator.sendBeacon(url + "/publish", text);
    }),
    cookies: await attempt(() => send("/publish", { credentials: "include" })),
    health: await attempt(async () => (await fetch(url + "/health")).ok),
    metrics: await attempt(async () => (await fetch(url + "/metrics")).ok),
    poll: await attempt(async () => (await fetch(url + "/subscribe?topic=t&poll=1&timeout=0")).ok),
    refusal: await attempt(async () => {
        const answer = await fetch(url + "/nope");
        return answer.status === 404 && (await answer.json()).code === "not_found";
    }),
    ndjson: await attempt(async () => {
        const leaving = new AbortController();
        const init = { headers: { Accept: "application/x-ndjson" }, signal: leaving.signal };
        const { ok } = await fetch(url + "/subscribe?topic=t", init);
        leaving.abort();
        return ok;
    }),
    events: await opens(new EventSource(url + "/subscribe?topic=t"), "open"),
    subscribe: await opens(new WebSocket(url.replace("http", "ws") + "/subscribe?topic=t"), "open"),
    publishSocket: await opens(new WebSocket(url.replace("http", "ws") + "/publish"), "open"),
    commands: await opens(new WebSocket(url.replace("http", "ws") + "/ws", "clevrd.v1"), "open"),
    module: await attempt(async () => {
        const { Clevrd } = await import(url + "/clevrd.js");
        const client = new Clevrd(undefined, { retryForMs: 0 });
        const [one] = await client.publishBatch([{ topic: "t", data: 2 }]);
        const stream = client.publishStream();
        const three = await stream.publish("t", 3);
        await stream.close();
        await publishes(client);
        for await (const event of client.subscribe("t")) return one.success && three.success;
    }),
};
"""
ALL: Final = {
    *("plain", "json", "more", "batch", "opaque", "cookies", "health", "metrics", "poll"),
    *("refusal", "ndjson", "events", "subscribe", "publishSocket", "commands", "module"),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    """Return a Chromium for which one name means this machine."""
    async with chromium(f"--host-resolver-rules=MAP {REBOUND} 127.0.0.1") as found:
        yield found


async def ways_of(page: Page, url: str) -> tuple[set[str], set[str]]:
    """Try each way to ``url`` from ``page``; return those that worked and those that failed."""
    came: dict[str, Any] = await in_page(page, WAYS, url=url)
    worked = {name for name, ended in came.items() if ended is True}
    return worked, came.keys() - worked


def published(daemon: Daemon) -> int:
    """Return how many messages the daemon has taken."""
    return sum(topic.published for topic in daemon.hub.topics)


async def test_listed_page_can_do_everything(browser: Browser) -> None:
    """Publish with any header, stream, open sockets, import the module, read refusals."""
    async with site() as origin, running(allowed_origins=origin) as daemon:
        async with page_at(browser, origin) as page:
            worked, failed = await ways_of(page, daemon.url)

        assert (worked, failed) == (ALL, set())
        assert "origin_not_allowed" not in daemon.hub.counters.refused
        assert {topic.tenant for topic in daemon.hub.topics} == {"acme", "default-tenant"}


async def test_page_that_is_not_listed_can_do_nothing(browser: Browser) -> None:
    """It reads nothing, opens nothing, and nothing that it sends is published."""
    async with site() as listed, site() as origin, running(allowed_origins=listed) as daemon:
        async with page_at(browser, origin) as page:
            worked, failed = await ways_of(page, daemon.url)

        # A browser never says what came of these.
        assert worked == {"opaque"}
        assert failed == ALL - {"opaque"}
        assert len(daemon.hub.topics) == 0
        assert len(daemon.server.connections) == 0
        assert daemon.hub.counters.refused.keys() == {"origin_not_allowed"}


async def test_browser_stops_what_the_module_sends_before_it_is_sent(
    browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of the module, as from npm, asks first by its type of content."""
    async with site() as origin, running() as daemon:
        asked: list[str] = []
        check = PageCheck.check

        def noted(
            pages: PageCheck, head: HttpRequest, transport: asyncio.BaseTransport | None
        ) -> None:
            asked.append(f"{head.method} {head.path}")
            check(pages, head, transport)

        monkeypatch.setattr(PageCheck, "check", noted)
        async with page_at(browser, origin) as page:
            # From its own origin, where the page has the file; `home` is then no daemon's.
            source = await (await daemon.http.get(f"{daemon.url}/clevrd.js")).text()
            came = await in_page(
                page,
                """const blob = new Blob([source], { type: "text/javascript" });
                const { Clevrd } = await import(URL.createObjectURL(blob));
                const client = new Clevrd(url, { retryForMs: 0 });
                const words = (error) => error.message;
                return [
                    await client.publish("t", 1).catch(words),
                    await client.publishBatch([{ topic: "t", data: 1 }]).catch(words),
                ];""",
                source=source,
                url=daemon.url,
            )

        assert came == [f"No answer from 127.0.0.1:{daemon.port}."] * 2
        assert asked[1:] == ["OPTIONS /publish", "OPTIONS /publish/batch"]
        assert len(daemon.hub.topics) == 0


@pytest.mark.parametrize("own", [True, False], ids=["own", "foreign"])
@pytest.mark.parametrize(
    "enctype", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
async def test_form_of_another_origin_publishes_nothing(
    browser: Browser, enctype: str, own: bool
) -> None:
    """Browsers send forms anywhere without asking; the same form on an own page is served."""
    async with (
        site() as origin,
        running() as daemon,
        page_at(browser, daemon.url if own else origin) as page,
    ):
        await page.evaluate(
            """([url, enctype]) => {
                document.body.innerHTML = `<iframe name="answer"></iframe>
                    <form method="post" target="answer">
                    <input name='{"topic":"t","data":1,"of":"' value='"}'></form>`;
                Object.assign(document.forms[0], { action: url, enctype });
                document.forms[0].submit();
            }""",
            [f"{daemon.url}/publish", enctype],
        )
        if own and enctype == "text/plain":
            await until(lambda: published(daemon) == 1)
        else:
            code = "invalid_request" if own else "origin_not_allowed"
            await until(lambda: daemon.hub.counters.refused.get(code) == 1)
            assert len(daemon.hub.topics) == 0


async def test_page_without_an_origin_is_refused(browser: Browser) -> None:
    """A sandboxed frame says null, which is anybody's."""
    async with running() as daemon, page_at(browser, daemon.url) as page:
        await page.evaluate(
            """url => {
                const frame = document.createElement("iframe");
                frame.sandbox = "allow-scripts";
                frame.srcdoc = `<script>
                    fetch("${url}/publish", { method: "POST", body: '{"topic":"t","data":1}' })
                        .catch(() => 0);
                    new WebSocket("${url.replace("http", "ws")}/subscribe?topic=t");
                <\\/script>`;
                document.body.append(frame);
            }""",
            daemon.url,
        )
        await until(lambda: daemon.hub.counters.refused.get("origin_not_allowed") == 2)
        assert len(daemon.hub.topics) == 0


async def test_own_page_can_do_everything(browser: Browser) -> None:
    """The daemon's own address, by name or number; nothing needs a setting."""
    for host in ("127.0.0.1", "localhost"):
        async with running() as daemon:
            url = f"http://{host}:{daemon.port}"
            async with page_at(browser, url) as page:
                worked, failed = await ways_of(page, url)

            assert (worked, failed) == (ALL, set())


async def test_page_whose_name_was_made_to_mean_this_machine_can_do_nothing(
    browser: Browser,
) -> None:
    """DNS rebinding: its browser takes the daemon for the page's own server, and asks nobody."""
    async with running() as daemon:
        url = f"http://{REBOUND}:{daemon.port}"
        # What the daemon answers is a refusal, but the page that shows it has that origin.
        async with page_at(browser, url) as page:
            assert await page.evaluate("location.origin") == url
            worked, failed = await ways_of(page, url)

        assert worked == {"opaque"}
        assert failed == ALL - {"opaque"}
        assert len(daemon.hub.topics) == 0
        assert len(daemon.server.connections) == 0


async def test_event_source_of_a_listed_page_resumes(browser: Browser) -> None:
    """Its Last-Event-ID is the browser's own field, and needs no preflight."""
    async with (
        site() as origin,
        running(allowed_origins=origin) as daemon,
        page_at(browser, origin) as page,
    ):
        await page.evaluate(
            """url => {
                globalThis.heard = [];
                const source = new EventSource(`${url}/subscribe?topic=t&last=0`);
                source.onmessage = ({ data }) => heard.push(JSON.parse(data).data);
            }""",
            daemon.url,
        )
        await until(lambda: daemon.hub.subscribers == 1)
        await daemon.publish("t", 1)
        await until_page(page, "heard.length === 1")
        (transport,) = daemon.server.connections.transports()
        transport.abort()
        await daemon.publish("t", 2)
        await until(lambda: daemon.hub.subscribers == 1)
        await daemon.publish("t", 3)
        await until_page(page, "heard.length === 3")
        assert await page.evaluate("heard") == [1, 2, 3]
