"""The JavaScript client in a real Chromium: nothing lost, twice or out of order without a word.

Against daemons in this process and of their own, one that is killed, a proxy that cuts, and a
fake server for what a daemon says only in trouble.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from browsers import chromium, in_page, page_at, site, until_page
from daemons import ROOT, DaemonProcess, daemon_process, running, until
from playwright.async_api import Browser, Page, Request
from ports import free_port
from proxies import cutting_proxy
from turns import WATCHING, Turn, faking, found, gap_frame, message, subscribed

# One Chromium for all: starting it takes longer than most of the tests.
pytestmark = pytest.mark.asyncio(loop_scope="module")

# Follows a topic in the background: seen, statuses and the end are the page's to ask for.
FOLLOW = """
const { Clevrd } = await import("/clevrd.js");
Object.assign(globalThis, { seen: [], statuses: [], end: null, leaving: new AbortController() });
globalThis.client = new Clevrd(url);
globalThis.pauseMs ??= 0;
const onStatus = (status) => statuses.push(status);
const follow = async () => {
    const all = { onStatus, signal: leaving.signal, ...options };
    for await (const event of client.subscribe(topic, all)) {
        seen.push(event);
        if (seen.length % 100 == 0 && pauseMs) await new Promise((go) => setTimeout(go, pauseMs));
    }
};
follow().then(() => (end = "quiet"), (error) => (end = { ...error, message: error.message }));
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    """Return a Chromium."""
    async with chromium() as found:
        yield found


@pytest.fixture
def processes() -> Iterator[ExitStack]:
    """Return a stack that ends daemon processes, in a thread of their own or not."""
    with ExitStack() as stack:
        yield stack


async def start(processes: ExitStack, port: int = 0, **variables: str) -> DaemonProcess:
    """Start a daemon process without holding the loop for it."""
    return await asyncio.to_thread(
        processes.enter_context, daemon_process(ADDRESS=f"127.0.0.1:{port}", **variables)
    )


async def follow(
    page: Page, topic: str | list[str], url: str | None = None, **options: Any
) -> None:
    """Have ``page`` subscribe, and wait until it is open."""
    await in_page(page, FOLLOW, url=url, topic=topic, options=options)
    await until_page(page, "statuses.some(({ status }) => status === 'open') || end !== null")


async def seen(page: Page, count: int) -> list[dict[str, Any]]:
    """Wait for ``count`` events, and return all that were seen."""
    await until_page(page, f"seen.length >= {count} || end !== null", timeout_s=25)
    # As text, since playwright takes long over large values.
    events: list[dict[str, Any]] = json.loads(await page.evaluate("JSON.stringify(seen)"))
    return events


async def publish(url: str, topic: str, *values: Any) -> None:
    """Publish each of ``values`` from outside of the browser."""
    async with aiohttp.ClientSession() as http:
        for value in values:
            body = json.dumps({"topic": topic, "data": value})
            async with http.post(f"{url}/publish", data=body) as response:
                assert response.status == 200, await response.text()


def data_of(events: list[dict[str, Any]]) -> list[Any]:
    """Return what was published of each event; of a gap its reason."""
    return [event["data"] if event["type"] == "message" else event["reason"] for event in events]


# --- subscribing ---------------------------------------------------------------------------------


async def test_messages_arrive_in_order_each_with_its_position(browser: Browser) -> None:
    """Recent ones, then live ones, as values a program can resume from."""
    async with running() as daemon, page_at(browser, daemon.url) as page:
        epoch = (await daemon.publish("t", {"n": 1}))["epoch"]
        await follow(page, "t")
        for number in range(2, 51):
            await daemon.publish("t", {"n": number})
        events = await seen(page, 50)

    assert [event["data"]["n"] for event in events] == list(range(1, 51))
    assert [event["offset"] for event in events] == list(range(1, 51))
    assert {(event["type"], event["epoch"]) for event in events} == {("message", epoch)}


async def test_position_resumes_behind_it(browser: Browser) -> None:
    """A page that kept an event's epoch and offset goes on with the next."""
    async with running() as daemon, page_at(browser, daemon.url) as page:
        answers = [await daemon.publish("t", number) for number in range(10)]
        position = {"epoch": answers[3]["epoch"], "offset": answers[3]["offset"]}
        await follow(page, "t", position=position, last=3)
        events = await seen(page, 6)

    assert data_of(events) == [4, 5, 6, 7, 8, 9]


async def test_tenant_and_odd_names_reach_the_daemon(browser: Browser) -> None:
    """What goes into a URL is escaped, and a client is of one tenant."""
    async with running() as daemon, page_at(browser, daemon.url) as page:
        answer = await in_page(
            page,
            """const { Clevrd } = await import("/clevrd.js");
            const client = new Clevrd("/", { tenant: "acme" });
            await client.publish("a&b=+ü", 1);
            for await (const event of client.subscribe("a&b=+ü")) return event;""",
        )

    assert (answer["topic"], answer["tenant_id"], answer["data"]) == ("a&b=+ü", "acme", 1)


async def test_killed_daemon_is_told_as_a_gap(browser: Browser, processes: ExitStack) -> None:
    """After kill -9 and a new start nobody knows what was lost: a gap says so, and it goes on."""
    daemon = await start(processes)
    async with page_at(browser, daemon.url) as page:
        await follow(page, "t", last=0)
        await publish(daemon.url, "t", 1, 2, 3)
        await seen(page, 3)

        daemon.process.kill()
        await asyncio.to_thread(daemon.process.wait, 5)
        again = await start(processes, daemon.port)
        await publish(again.url, "t", 4, 5)
        events = await seen(page, 6)

    assert data_of(events) == [1, 2, 3, "epoch", 4, 5]
    assert events[3]["type"] == "gap"
    assert events[0]["epoch"] != events[3]["epoch"] == events[4]["epoch"]


@pytest.mark.parametrize(
    ("keeps", "expected"),
    [(False, [1, "epoch", 2]), (True, [1, 2])],
    ids=["in memory", "with a state directory"],
)
async def test_planned_restart_is_followed(
    browser: Browser, processes: ExitStack, tmp_path: Path, keeps: bool, expected: list[Any]
) -> None:
    """SIGTERM closes with 1012, and the page is back after it, without a gap where that can be."""
    variables = {"CLEVRD_STATE_DIR": str(tmp_path)} if keeps else {}
    daemon = await start(processes, 0, **variables)
    async with page_at(browser, daemon.url) as page:
        await follow(page, "t")
        await publish(daemon.url, "t", 1)
        await seen(page, 1)

        assert await asyncio.to_thread(daemon.stop) == 0
        again = await start(processes, daemon.port, **variables)
        await publish(again.url, "t", 2)
        events = await seen(page, len(expected))
        statuses = await page.evaluate("statuses")

    assert data_of(events) == expected
    assert {"status": "waiting", "code": 1012, "reason": "restarting"}.items() <= statuses[
        2
    ].items()


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_cut_connections_lose_and_repeat_nothing(browser: Browser, seed: int) -> None:
    """Forty cuts at random bytes, most within a frame: every message once, in order, no gap."""
    async with (
        running() as daemon,
        cutting_proxy(daemon.port, seed) as proxy,
        page_at(browser, proxy.url) as page,
    ):
        await follow(page, "t", last=0)
        proxy.cuts_left = 40
        number = 0
        while proxy.cuts_left or number < 200:
            await daemon.publish("t", f"{number:0200}")
            number += 1
        events = await seen(page, number)

    assert [event["type"] for event in events] == ["message"] * number
    assert [event["offset"] for event in events] == list(range(1, number + 1))


async def test_slow_consumer_loses_nothing(browser: Browser) -> None:
    """At its bound the client leaves and resumes: many times its bound arrives, all of it."""
    async with running(ring_messages=10_000) as daemon, page_at(browser, daemon.url) as page:
        await page.evaluate("globalThis.pauseMs = 5")
        await follow(page, "t", last=0, maxWaitingChars=10_000)
        lines = "\n".join(json.dumps({"topic": "t", "data": number}) for number in range(2_000))
        async with daemon.http.post(f"{daemon.url}/publish/batch", data=lines) as response:
            assert response.status == 200
        events = await seen(page, 2_000)
        left = await page.evaluate("statuses.filter(({ reason }) => reason === 'behind').length")

    assert data_of(events) == list(range(2_000))
    assert left >= 5


async def test_abort_ends_the_loop_quietly(browser: Browser) -> None:
    """A signal ends the loop and the connection, and so does leaving the loop."""
    async with running() as daemon, page_at(browser, daemon.url) as page:
        await follow(page, "t")
        assert daemon.hub.subscribers == 1

        await page.evaluate("leaving.abort()")
        await until_page(page, "end !== null")
        await until(lambda: daemon.hub.subscribers == 0)
        ended = await page.evaluate("[end, statuses.at(-1).status]")
        await daemon.publish("t", 1)
        await in_page(page, "for await (const event of client.subscribe('t')) break;")

        await until(lambda: daemon.hub.subscribers == 0)
        assert ended == ["quiet", "closed"]


async def test_leaving_a_quiet_topic_does_not_wait_for_it(browser: Browser) -> None:
    """return() ends what waits: a handshake, the next message, and before the first of them."""
    async with running() as daemon, page_at(browser, daemon.url) as page:
        left = await in_page(
            page,
            """const { Clevrd } = await import("/clevrd.js");
            const client = new Clevrd();
            const left = [];
            for (const wanted of [null, "connecting", "open"]) {
                let reached;
                const isReached = new Promise((done) => (reached = done));
                const onStatus = ({ status }) => status === wanted && reached();
                const events = client.subscribe("quiet", { onStatus });
                const next = wanted && events.next();
                if (wanted) await isReached;
                left.push(await events.return("left"), await next);
            }
            return left;""",
        )
        await until(lambda: daemon.hub.subscribers == 0)

    returned, ended = {"value": "left", "done": True}, {"done": True}
    assert [each and {k: v for k, v in each.items() if v is not None} for each in left] == [
        *(returned, None),
        *(returned, ended),
        *(returned, ended),
    ]


async def test_foreign_page_can_not_publish(browser: Browser, tmp_path: Path) -> None:
    """As docs/javascript.md says: not by a plain form either, which browsers let it send."""
    page_text = """<iframe name="answer"></iframe>
        <form method="post" enctype="text/plain" target="answer">
        <input name='{"topic":"t","data":1,"of":"' value='"}'></form>"""
    file = tmp_path / "foreign.html"
    file.write_text(page_text)

    async with running() as daemon, page_at(browser, file.as_uri()) as page:
        await page.evaluate(
            "url => { document.forms[0].action = url; document.forms[0].submit(); }",
            f"{daemon.url}/publish",
        )
        await until(lambda: daemon.hub.counters.refused == {"origin_not_allowed": 1})
        assert [topic.published for topic in daemon.hub.topics] == []


async def test_network_that_returns_is_used_at_once(browser: Browser) -> None:
    """After `online` the old connection is not trusted: the page resumes, and misses nothing."""
    async with running() as daemon, page_at(browser, daemon.url) as page:
        await follow(page, "t", last=0)
        await daemon.publish("t", 1)

        await page.context.set_offline(True)
        await daemon.publish("t", 2)
        await page.context.set_offline(False)
        await daemon.publish("t", 3)
        await until_page(page, "statuses.at(-1).status === 'open' && statuses.length > 2")
        await daemon.publish("t", 4)
        events = await seen(page, 4)
        reasons = await page.evaluate("statuses.map(({ reason }) => reason)")

    assert data_of(events) == [1, 2, 3, 4]
    assert "online" in reasons


async def test_frozen_page_resumes(browser: Browser) -> None:
    """A page that the browser had frozen comes back by its position."""
    async with running() as daemon, page_at(browser, daemon.url) as page:
        await follow(page, "t", last=0)

        await daemon.publish("t", 1)
        # By hand: a headless Chromium does not freeze pages.
        await page.evaluate("document.dispatchEvent(new Event('resume'))")
        await daemon.publish("t", 2)
        events = await seen(page, 2)
        await until_page(page, "statuses.some(({ reason }) => reason === 'resume')")

    assert data_of(events) == [1, 2]


async def test_refused_subscription_is_told_in_the_servers_words(browser: Browser) -> None:
    """An option that is wrong ends it: the client does not come back for nothing."""
    async with running() as daemon, page_at(browser, daemon.url) as page:
        await follow(page, "t", policy="wrong")
        await until_page(page, "end !== null")
        end = await page.evaluate("end")

    assert end["code"] == "invalid_request"
    assert "Unknown policy" in end["message"]


async def test_refused_handshake_is_told_in_the_servers_words(browser: Browser) -> None:
    """Browsers hide why a handshake failed, so the client asks."""
    async with running() as daemon, page_at(browser, daemon.url) as page:
        end = await in_page(
            page,
            """const { Clevrd } = await import("/clevrd.js");
            const events = new Clevrd("/", { tenant: "-" }).subscribe("t");
            return events.next().catch(({ status, message }) => [status, message]);""",
        )

    assert end[0] == 400
    assert "tenant" in end[1]


async def test_example_page_works(browser: Browser) -> None:
    """The page of docs/javascript.md, from a server of its own, shows what is published."""
    text = (ROOT / "docs" / "javascript.md").read_text()
    (example,) = re.findall(r"^```html\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    port = free_port()
    example = example.replace("http://localhost:8080", f"http://127.0.0.1:{port}")

    async with (
        site(example) as origin,
        running(address=f"127.0.0.1:{port}", allowed_origins=origin) as daemon,
        page_at(browser, origin) as page,
    ):
        await until_page(page, "document.querySelector('#status').textContent === 'open'")
        await daemon.publish("demo", {"hello": 1})
        await until_page(page, """events.textContent === '{"hello":1}\\n'""")


# --- names that are misspelt ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "name", "meant"),
    [
        ("new Clevrd(undefined, { Tenant: 'a' })", "Tenant", "tenant"),
        ("await client.subscribe('t', { polcy: 'x' }).next()", "polcy", "policy"),
        ("await client.subscribe('t', { pattern: [] }).next()", "pattern", "patterns"),
        ("await client.subscribe('t', { on_status: 1 }).next()", "on_status", "onStatus"),
        ("await client.publish('t', 1, { idempotency_key: 'k' })", "idempotency_key", ""),
        ("await client.publishBatch([{ topicc: 't' }])", "topicc", "topic"),
        ("client.publishStream({ maxInFligth: 1 })", "maxInFligth", None),
        ("client.publishStream({ maxInflight: 1 })", "maxInflight", "maxInFlight"),
        ("await client.publishStream().publish('t', 1, { Key: 1 })", "Key", "key"),
        ("await client.publish('t', 1, { source: 1 })", "source", None),
    ],
)
async def test_misspelt_option_is_a_type_error(
    browser: Browser, call: str, name: str, meant: str | None
) -> None:
    """It names the one that was meant; what is near to none goes to the server as it is."""
    script = f"""
        const {{ Clevrd }} = await import("/clevrd.js");
        const client = new Clevrd();
        try {{ {call}; }} catch (error) {{ return [error.name, error.message]; }}
    """
    async with running() as daemon, page_at(browser, daemon.url) as page:
        found = await in_page(page, script)

    if meant is None:
        assert found is None
    else:
        assert found == ["TypeError", f"{name} is no option, {meant or 'idempotencyKey'} is."]


async def test_warnings_of_the_server_are_told_on_the_console(browser: Browser) -> None:
    """Of a subscription, a publish, an item of a batch and a message of a stream."""
    script = """
        const { Clevrd } = await import("/clevrd.js");
        const client = new Clevrd();
        const leaving = new AbortController();
        const onStatus = ({ status }) => status === "open" && client.publish("a.*", 1);
        for await (const _ of client.subscribe("a.*", { last: 1, strategy: 'x', onStatus })) break;
        await client.publish("t", 1, { Ke_y: 1 }).catch(() => {});
        const answer = await client.publish("t", 1, { content: 1 });
        await client.publishBatch([{ topic: "t", data: 1, subject: 1 }]);
        return answer.warnings ?? null;
    """
    texts: list[str] = []
    async with running() as daemon, page_at(browser, daemon.url) as page:
        page.on("console", lambda message: texts.append(f"{message.type}: {message.text}"))
        answered = await in_page(page, script)
        await until(lambda: len(texts) >= 2)

    # Other words for what is there are a publisher's own fields.
    assert answered is None
    assert [text for text in texts if "'strategy' is not known" in text]
    assert [text for text in texts if "'a.*' is taken as a name" in text]
    assert {text.split(":")[0] for text in texts if "The " in text} == {"warning"}


# --- several topics ------------------------------------------------------------------------------


def by_topic(events: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return for each topic what was published, of a gap its reason, in the order of arrival."""
    topics: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        topics[event["topic"]].append(event)
    return {topic: data_of(seen) for topic, seen in topics.items()}


async def test_several_topics_survive_cuts_and_a_killed_daemon(
    browser: Browser, processes: ExitStack
) -> None:
    """Two names and a pattern, cut twenty times in each of two lives: a gap between, else all."""
    daemon = await start(processes)
    topics = ["a", "b", "p.old", "p.new"]
    async with (
        cutting_proxy(daemon.port, seed=6) as proxy,
        page_at(browser, proxy.url) as page,
    ):

        async def publish_through_cuts(first: int) -> list[str]:
            proxy.cuts_left = 20
            values: list[str] = []
            while proxy.cuts_left or len(values) < 50:
                values.append(f"{first + len(values):0200}")
                for topic in topics:
                    await publish(daemon.url, topic, values[-1])
            return values

        await publish(daemon.url, "p.old", "first")
        await follow(page, ["a", "b"], patterns=["p.*"], last=1_000)
        before = await publish_through_cuts(0)
        await seen(page, 1 + 4 * len(before))

        daemon.process.kill()
        await asyncio.to_thread(daemon.process.wait, 5)
        daemon = await start(processes, daemon.port)
        after = await publish_through_cuts(1_000)
        events = await seen(page, 1 + 4 * (len(before) + 1 + len(after)))

    whole = [*before, "epoch", *after]
    assert by_topic(events) == {"a": whole, "b": whole, "p.old": ["first", *whole], "p.new": whole}
    assert all(event["epoch"] and event["offset"] >= 0 for event in events)


async def test_stored_positions_resume_several_topics(browser: Browser) -> None:
    """Each goes on behind its own; a name without one begins by last, a matching topic in full."""
    async with running() as daemon, page_at(browser, daemon.url) as page:
        for topic in ("a", "b", "p.known", "p.unknown"):
            for number in range(5):
                await daemon.publish(topic, number)
        await follow(page, ["a", "b"], patterns=["p.*"], last=1_000)
        events = await seen(page, 20)
        await page.evaluate("leaving.abort()")
        positions = {
            event["topic"]: event
            for event in events
            if (event["topic"], event["data"]) in [("a", 1), ("p.known", 3)]
        }

        await follow(page, ["a", "b"], patterns=["p.*"], last=2, positions=positions)
        resumed = await seen(page, 11)

    assert by_topic(resumed) == {
        "a": [2, 3, 4],
        "b": [3, 4],
        "p.known": [4],
        "p.unknown": [0, 1, 2, 3, 4],
    }


async def test_no_positions_yet_begin_by_last(browser: Browser) -> None:
    """An application that has stored nothing so far passes what it has: none."""
    async with running() as daemon, page_at(browser, daemon.url) as page:
        for number in range(5):
            await daemon.publish("p.a", number)

        await follow(page, [], patterns=["p.*"], last=1, positions={})
        events = await seen(page, 1)

    assert data_of(events) == [4]


async def test_topic_that_begins_while_the_page_is_away_is_read_in_full(browser: Browser) -> None:
    """Its first message is not missed, and what was read of another topic does not come again."""
    async with running() as daemon, page_at(browser, daemon.url) as page:
        await follow(page, [], patterns=["p.*"], last=0)
        await until(lambda: len(daemon.hub.patterns) == 1)
        await daemon.publish("p.old", 1)
        await seen(page, 1)

        await page.context.set_offline(True)
        for connection in list(daemon.server.connections._open):
            connection.transport.abort()
        # One attempt has failed, so it is away.
        await until_page(page, "statuses.filter(({ code }) => code === 1006).length >= 2")
        for topic, value in [("p.new", 1), ("p.old", 2), ("p.new", 2)]:
            await daemon.publish(topic, value)
        await page.context.set_offline(False)
        events = await seen(page, 4)

    assert by_topic(events) == {"p.old": [1, 2], "p.new": [1, 2]}


async def test_slow_consumer_of_several_topics_loses_nothing(browser: Browser) -> None:
    """What may wait is bounded for the connection: it leaves, and each topic resumes."""
    async with running() as daemon, page_at(browser, daemon.url) as page:
        await page.evaluate("globalThis.pauseMs = 5")
        await follow(page, ["a", "b"], patterns=["p.*"], last=0, maxWaitingChars=10_000)
        await until(lambda: len(daemon.hub.patterns) == 1)
        lines = "\n".join(
            json.dumps({"topic": topic, "data": number})
            for number in range(500)
            for topic in ("a", "b", "p.a", "p.b")
        )
        async with daemon.http.post(f"{daemon.url}/publish/batch", data=lines) as response:
            assert response.status == 200
        events = await seen(page, 2_000)
        left = await page.evaluate("statuses.filter(({ reason }) => reason === 'behind').length")

    whole = list(range(500))
    assert by_topic(events) == {"a": whole, "b": whole, "p.a": whole, "p.b": whole}
    assert left >= 1


async def test_more_topics_than_a_connection_may_have_are_an_error(browser: Browser) -> None:
    """A pattern that matches too many is not read in part without a word."""
    async with (
        running(max_topics_per_connection=3) as daemon,
        page_at(browser, daemon.url) as page,
    ):
        for topic in ("p.a", "p.b", "p.c"):
            await daemon.publish(topic, 1)

        await follow(page, [], patterns=["p.*"])
        await until_page(page, "end !== null")
        end = await page.evaluate("end")

    assert end["code"] == "invalid_request"
    assert "3 subscriptions" in end["message"]


async def test_any_event_is_a_position(browser: Browser) -> None:
    """The whole event will do, whatever else is in it."""
    async with running() as daemon, page_at(browser, daemon.url) as page:
        for number in range(3):
            await daemon.publish("t", number)
        value = await in_page(
            page,
            """const { Clevrd } = await import("/clevrd.js");
            for await (const position of new Clevrd().subscribe("t", { last: 2 }))
                for await (const event of new Clevrd().subscribe("t", { position }))
                    return event.data;""",
        )

    assert value == 2


# --- what a server says only in trouble ----------------------------------------------------------


@pytest.mark.parametrize("code", [4001, 4099, 1009])
async def test_close_that_forbids_it_is_not_come_back_from(browser: Browser, code: int) -> None:
    """What was received is handed out, then the loop throws; there is one connection only."""
    async with (
        running() as daemon,
        faking(Turn([subscribed(), message(1)], code)) as fake,
        page_at(browser, daemon.url) as page,
    ):
        await follow(page, "t", fake.url)
        await until_page(page, "end !== null")
        events = await seen(page, 1)
        end = await page.evaluate("end")

    assert data_of(events) == [1]
    assert end["closeCode"] == code
    assert len(fake.wishes) == 1


@pytest.mark.parametrize("code", [1000, 1001, 1012, 4100, 4201])
async def test_other_closes_are_come_back_from_by_position(browser: Browser, code: int) -> None:
    """Whatever else ends a connection, the next resumes behind the last message."""
    async with (
        running() as daemon,
        faking(
            Turn([subscribed(), message(1)], code),
            Turn([subscribed(1, recovered=True), message(2)]),
        ) as fake,
        page_at(browser, daemon.url) as page,
    ):
        await follow(page, "t", fake.url, last=5, policy="drop_newest")
        events = await seen(page, 2)

    assert data_of(events) == [1, 2]
    asked = {"type": "subscribe", "topic": "t", "policy": "drop_newest"}
    assert fake.wishes[0] == {**asked, "last": 5}
    assert fake.wishes[1] == {**asked, "epoch": "e1", "offset": 1}


async def test_server_that_goes_away_says_when_to_come_back(browser: Browser) -> None:
    """The wait is the one that going_away asks for; its own jitter is 0 here."""
    going = json.dumps({"type": "going_away", "reconnect_after_ms": 740, "positions": {}})
    async with (
        running() as daemon,
        faking(
            Turn([subscribed(), going], 1012),
            Turn([subscribed(0, recovered=True)]),
        ) as fake,
        page_at(browser, daemon.url) as page,
    ):
        await follow(page, "t", fake.url)
        await until_page(page, "statuses.filter(({ status }) => status === 'open').length == 2")
        delays = await page.evaluate("delays")

    assert delays == [740]


async def test_cut_before_the_gap_does_not_hide_it(browser: Browser) -> None:
    """A resume that is not whole counts once its gap is told; until then the old position does."""
    gap = {"type": "gap", "topic": "t", "from": 2, "to": 9, "count": 8, "reason": "retention"}
    async with (
        running() as daemon,
        faking(
            Turn([subscribed(), message(1)], 1001),
            Turn([subscribed(9)], 1001),
            Turn([subscribed(9), json.dumps(gap), message(10)]),
        ) as fake,
        page_at(browser, daemon.url) as page,
    ):
        await follow(page, "t", fake.url)
        events = await seen(page, 3)

    assert fake.wishes[2]["offset"] == 1
    assert data_of(events) == [1, "retention", 10]
    assert gap.items() <= events[1].items()
    assert events[1]["offset"] == 9


async def test_pattern_begins_by_last_until_it_is_watched(browser: Browser) -> None:
    """Who was cut before the answer asks the same again; behind it, for what began meanwhile."""
    async with (
        running() as daemon,
        faking(Turn([], 1001), Turn([WATCHING], 1001), Turn([])) as fake,
        page_at(browser, daemon.url) as page,
    ):
        await follow(page, [], fake.url, patterns=["p.*"], last=3, policy="latest")
        await until(lambda: len(fake.wishes) == 3)

    asked = {"type": "subscribe", "pattern": "p.*", "policy": "latest"}
    assert fake.wishes == [{**asked, "last": 3}, {**asked, "last": 3}, {**asked, "positions": {}}]


async def test_position_of_a_topic_that_is_gone_stays_known(browser: Browser) -> None:
    """It may come back later, in a new life: the gap between the two is told, cut or not."""
    async with (
        running() as daemon,
        faking(
            Turn([WATCHING, found("p.a", "e1"), message(1, "p.a")], 1001),
            Turn([WATCHING], 1001),
            Turn([WATCHING, found("p.a", "e2")], 1001),
            Turn(
                [
                    WATCHING,
                    found("p.a", "e2"),
                    gap_frame("p.a", None, None, "epoch"),
                    message(1, "p.a"),
                ]
            ),
        ) as fake,
        page_at(browser, daemon.url) as page,
    ):
        await follow(page, [], fake.url, patterns=["p.*"])
        events = await seen(page, 3)

    known = {"p.a": {"epoch": "e1", "offset": 1}}
    assert [wish.get("positions") for wish in fake.wishes] == [None, known, known, known]
    assert data_of(events) == [1, "epoch", 1]
    assert [(event["epoch"], event["offset"]) for event in events] == [
        ("e1", 1),
        ("e2", 0),
        ("e2", 1),
    ]


async def test_cut_before_all_was_found_goes_on_with_what_was(browser: Browser) -> None:
    """Topics that had begun resume, the others begin as they were asked to."""
    async with (
        running() as daemon,
        faking(
            Turn([found("p.a", "e1", 3), message(4, "p.a")], 1001),
            Turn([found("p.a", "e1", 4, recovered=True), found("p.b", "e2", 7), WATCHING]),
        ) as fake,
        page_at(browser, daemon.url) as page,
    ):
        await follow(page, [], fake.url, patterns=["p.*"], last=0)
        await until(lambda: len(fake.wishes) == 2)

    begins = {"type": "subscribe", "pattern": "p.*", "last": 0}
    known = {"p.a": {"epoch": "e1", "offset": 4}}
    assert fake.wishes == [begins, {**begins, "positions": known}]


async def test_forgotten_topic_is_none_to_come_back_to(browser: Browser) -> None:
    """All of it was had, so a page that follows short-lived topics for days knows only a few."""
    gone = {"type": "forgotten", "topic": "p.a", "epoch": "e1", "offset": 1}
    async with (
        running() as daemon,
        faking(
            Turn([WATCHING, found("p.a", "e1"), message(1, "p.a"), json.dumps(gone)], 1001),
            Turn([]),
        ) as fake,
        page_at(browser, daemon.url) as page,
    ):
        await follow(page, [], fake.url, patterns=["p.*"])
        events = await seen(page, 1)
        await until(lambda: len(fake.wishes) == 2)

    assert data_of(events) == [1]
    assert fake.wishes[1]["positions"] == {}


async def test_cut_before_the_gap_of_a_new_topic_does_not_hide_it(browser: Browser) -> None:
    """What a topic that began meanwhile has lost already is told, however often it is cut."""
    begins = found("p.new", "e1", 9)
    async with (
        running() as daemon,
        faking(
            Turn([WATCHING], 1001),
            Turn([WATCHING, begins], 1001),
            Turn([WATCHING, begins, gap_frame("p.new", 1, 9, "retention"), message(10, "p.new")]),
        ) as fake,
        page_at(browser, daemon.url) as page,
    ):
        await follow(page, [], fake.url, patterns=["p.*"])
        events = await seen(page, 2)

    assert fake.wishes[2]["positions"] == {}
    assert data_of(events) == ["retention", 10]


async def test_new_life_on_the_same_connection_is_followed(browser: Browser) -> None:
    """A topic that was forgotten and comes back counts from 1 again, and nothing is missing."""
    async with (
        running() as daemon,
        faking(
            Turn(
                [
                    WATCHING,
                    found("p.a", "e1"),
                    message(1, "p.a"),
                    message(2, "p.a"),
                    found("p.a", "e2", recovered=True),
                    message(1, "p.a"),
                ],
                1001,
            ),
            Turn([]),
        ) as fake,
        page_at(browser, daemon.url) as page,
    ):
        await follow(page, [], fake.url, patterns=["p.*"])
        events = await seen(page, 3)
        await until(lambda: len(fake.wishes) == 2)

    assert [(event["epoch"], event["offset"]) for event in events] == [
        ("e1", 1),
        ("e1", 2),
        ("e2", 1),
    ]
    assert fake.wishes[1]["positions"] == {"p.a": {"epoch": "e2", "offset": 1}}


@pytest.mark.parametrize("frame", ["no JSON", b"binary", '{"id":"msg-1","offset":1}'])
async def test_what_is_not_clevrd_ends_it(browser: Browser, frame: str | bytes) -> None:
    """A server of another kind is not asked again and again."""
    async with (
        running() as daemon,
        faking(Turn([frame])) as fake,
        page_at(browser, daemon.url) as page,
    ):
        await follow(page, "t", fake.url)
        await until_page(page, "end !== null && end !== 'quiet'")

    assert len(fake.wishes) == 1


async def test_server_that_answers_is_kept(browser: Browser) -> None:
    """A topic may be silent for as long as it likes."""
    async with (
        running() as daemon,
        faking(Turn([subscribed()])) as fake,
        page_at(browser, daemon.url, "") as page,
    ):
        await page.clock.install()
        await follow(page, "t", fake.url)
        for beat in range(1, 4):
            await page.clock.run_for(25_000)
            await until(lambda count=beat: len(fake.heard) == count)
        assert len(fake.wishes) == 1


async def test_dead_path_is_left(browser: Browser) -> None:
    """Who does not answer a ping until the next is due is gone, even if nothing says so."""
    async with (
        running() as daemon,
        faking(Turn([subscribed(7)], pongs=False), Turn([subscribed(7, recovered=True)])) as fake,
        page_at(browser, daemon.url, "") as page,
    ):
        await page.clock.install()
        await follow(page, "t", fake.url)
        await page.clock.run_for(50_000)
        await page.clock.resume()
        await until(lambda: len(fake.wishes) == 2)

    assert fake.wishes[1]["offset"] == 7


# --- publishing ----------------------------------------------------------------------------------


def keys_by_data(bodies: list[str]) -> dict[Any, set[str]]:
    """Return the idempotency keys that each value was published with."""
    keys = defaultdict(set)
    for body in bodies:
        publish = json.loads(body)
        keys[publish["data"]].add(publish["idempotency_key"])
    return keys


async def published(page: Page, topic: str, count: int) -> list[Any]:
    """Return all that a topic has, ``count`` messages, and the last word behind them."""
    await follow(page, topic, last=1_000)
    await in_page(page, "await client.publish(topic, 'the end')", topic=topic)
    return data_of(await seen(page, count + 1))


async def test_publish_is_repeated_with_its_key(browser: Browser) -> None:
    """Through thirty cuts each message gets in once: all its attempts carry one key of its own."""
    bodies: list[str] = []

    def note(request: Request) -> None:
        if request.method == "POST":
            bodies.append(request.post_data or "")

    async with (
        running() as daemon,
        cutting_proxy(daemon.port, seed=4) as proxy,
        page_at(browser, proxy.url) as page,
    ):
        await page.evaluate("import('/clevrd.js')")
        page.on("request", note)
        proxy.cuts_left = 30
        await in_page(
            page,
            """const { Clevrd } = await import("/clevrd.js");
            for (let number = 0; number < 40; number++) await new Clevrd().publish("t", number);""",
        )
        proxy.cuts_left = 0
        attempts = keys_by_data(bodies)
        values = await published(page, "t", 40)

    assert values == [*range(40), "the end"]
    assert [len(keys) for keys in attempts.values()] == [1] * 40
    assert len(set.union(*attempts.values())) == 40
    assert len(bodies) > 40, "nothing had to be repeated"


async def test_publish_waits_as_long_as_it_is_asked_to(browser: Browser) -> None:
    """429 is tried again after its Retry-After; what time does not heal is thrown."""
    async with (
        running(publish_rate=5, publish_burst=1) as daemon,
        page_at(browser, daemon.url) as page,
    ):
        refused = await in_page(
            page,
            """const { Clevrd } = await import("/clevrd.js");
            const client = new Clevrd();
            for (let number = 0; number < 3; number++) await client.publish("t", number);
            return client.publish("", 1).catch((error) => [error.status, error.message]);""",
        )
        delays = await page.evaluate("delays")
        values = [topic.published for topic in daemon.hub.topics]

    assert values == [3]
    assert set(delays) == {1000}
    assert refused == [400, "The topic is empty; name one of 1 to 255 bytes."]


async def test_publish_gives_up_in_time(browser: Browser) -> None:
    """A daemon that stays full is not asked for ever."""
    async with (
        running(publish_rate=0.001, publish_burst=1) as daemon,
        page_at(browser, daemon.url, "") as page,
    ):
        status = await in_page(
            page,
            """const { Clevrd } = await import("/clevrd.js");
            const client = new Clevrd("", { retryForMs: 200 });
            await client.publish("t", 1);
            return client.publish("t", 2).catch((error) => error.status);""",
        )

    assert status == 429


async def test_batch_is_answered_item_by_item(browser: Browser) -> None:
    """A refused item has its reason at its place."""
    async with running() as daemon, page_at(browser, daemon.url) as page:
        results = await in_page(
            page,
            """const { Clevrd } = await import("/clevrd.js");
            const items = [{ topic: "t", data: 1 }, { topic: "t" }, { topic: "t", data: 3 }];
            return new Clevrd().publishBatch(items);""",
        )

    assert [result.get("offset") for result in results] == [1, None, 2]
    assert results[1]["code"] == "invalid_request"


async def test_stream_is_answered_across_cuts(browser: Browser) -> None:
    """Sixteen at a time through thirty cuts: each is answered, and there once, in order."""
    async with (
        running() as daemon,
        cutting_proxy(daemon.port, seed=5) as proxy,
        page_at(browser, proxy.url) as page,
    ):
        await page.evaluate("import('/clevrd.js')")
        proxy.cuts_left = 30
        answers = await in_page(
            page,
            """const { Clevrd } = await import("/clevrd.js");
            const stream = new Clevrd().publishStream({ maxInFlight: 16 });
            const answers = [];
            for (let number = 0; number < 400; number++) {
                await stream.ready;
                answers.push(stream.publish("t", number));
            }
            await stream.close();
            return Promise.all(answers);""",
        )
        proxy.cuts_left = 0
        values = await published(page, "t", 400)

    assert all(answer["success"] for answer in answers)
    assert values == [*range(400), "the end"]


async def test_stream_is_bounded_and_refuses_one_by_one(browser: Browser) -> None:
    """A refusal is its message's own; more than the bound is refused here; closing waits."""
    async with running() as daemon, page_at(browser, daemon.url) as page:
        outcomes = await in_page(
            page,
            """const { Clevrd } = await import("/clevrd.js");
            const stream = new Clevrd().publishStream({ maxInFlight: 2 });
            const all = ["t", "", "t"].map((topic) => stream.publish(topic, 1));
            const settled = await Promise.allSettled(all);
            await stream.ready;
            const last = stream.publish("t", 4);
            await stream.close();
            const late = await Promise.allSettled([stream.publish("t", 5)]);
            settled.push({ value: await last }, ...late);
            return settled.map(({ value, reason }) => value?.offset ?? reason.message);""",
        )
        subscribers = daemon.hub.subscribers

    assert outcomes[0] == 1
    assert "topic is empty" in outcomes[1]
    assert "await ready" in outcomes[2]
    assert outcomes[3] == 2
    assert isinstance(outcomes[4], str), "the stream is closed"
    assert subscribers == 0


async def test_stream_repeats_what_time_heals(browser: Browser) -> None:
    """A rate limit slows a stream down; nothing is refused for it."""
    async with (
        running(publish_rate=100, publish_burst=5) as daemon,
        page_at(browser, daemon.url) as page,
    ):
        count = await in_page(
            page,
            """const { Clevrd } = await import("/clevrd.js");
            const stream = new Clevrd().publishStream();
            const answers = Array.from({ length: 20 }, (_, number) => stream.publish("t", number));
            return (await Promise.all(answers)).length;""",
        )
        values = [topic.published for topic in daemon.hub.topics]

    assert count == 20
    assert values == [20]
