"""The JavaScript client in Node, over the package ws and natively: it leaves nothing behind.

And what it says to wrong arguments, and to servers that are none. In a browser:
test_javascript_client.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from daemons import running, until
from nodes import KINDS, in_node, make_project
from turns import Turn, faking, gap_frame, message, subscribed
from websockets.asyncio.server import ServerConnection, serve
from websockets.typing import Subprotocol

from clevrd.testing.faults import cut_readers


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the client in node_modules."""
    return make_project(tmp_path_factory.mktemp("node"))


@asynccontextmanager
async def answering(answer: bytes | None) -> AsyncIterator[str]:
    """Answer each connection's first bytes so, and close it; with None never answer."""
    waiting = asyncio.Event()

    async def answer_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65_536)
        if answer is None:
            await waiting.wait()
        else:
            writer.write(answer)
        writer.close()

    async with await asyncio.start_server(answer_one, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        waiting.set()


def http(status: int, body: str, content_type: str = "text/html") -> bytes:
    """Return an HTTP answer."""
    return (
        f"HTTP/1.1 {status} So\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
        f"Connection: close\r\n\r\n{body}"
    ).encode()


# --- leaving -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
async def test_leaving_while_messages_arrive_ends_nothing_else(project: Path, kind: str) -> None:
    """By break, by a signal, and for a while because the loop is slow: the process goes on.

    The package ws goes on calling its listeners after it was closed.
    """
    script = """
    const client = new Clevrd(given.url, { WebSocket });
    const pad = "x".repeat(200);
    const flood = async (topic) => {
        for (let first = 0; first < 2000; first += 500)
            await client.publishBatch(
                Array.from({ length: 500 }, (_, at) => ({ topic, data: { n: first + at, pad } })));
    };
    const stop = new AbortController();
    const follow = async (topic, options, take) => {
        const seen = [];
        let flooding;
        const onStatus = ({ status, reason }) => {
            if (status === "open") flooding ??= flood(topic);
            if (reason === "behind") behind++;
        };
        for await (const event of client.subscribe(topic, { last: 0, onStatus, ...options })) {
            seen.push(event.data?.n ?? event.reason);
            if (take(seen.length)) break;
            if (seen.length % 100 === 0) await pause(1);
        }
        await flooding;
        return seen;
    };
    let behind = 0;
    tell(await follow("break", {}, (count) => count === 5));
    const { signal: leaving } = stop;
    tell(await follow("abort", { signal: leaving }, (count) => { if (count === 5) stop.abort(); }));
    const { signal } = new AbortController();
    const slow = { maxWaitingChars: 20_000, signal };
    tell((await follow("slow", slow, (count) => count === 2000)).every((n, at) => n === at));
    tell(behind > 10);
    """
    async with running(ring_messages=10_000) as daemon:
        told = await in_node(project, script, kind, url=daemon.url)
        await until(lambda: daemon.hub.subscribers == 0)

    assert told == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4], True, True]


@pytest.mark.parametrize("kind", KINDS)
async def test_leaving_never_waits(project: Path, kind: str) -> None:
    """Not for a message on a quiet topic, a handshake that stalls, or a server that is away."""
    script = """
    const leave = async (way, url, name, claim) => {
        const stop = new AbortController();
        const statuses = [];
        let reached;
        const isReached = new Promise((done) => (reached = done));
        const onStatus = ({ status }) => {
            statuses.push(status);
            if (status === claim) reached();
        };
        const client = new Clevrd(url, { WebSocket });
        const events = client.subscribe("quiet", { signal: stop.signal, last: 0, onStatus });
        const next = claim === "none" ? null : events.next();
        if (claim !== "none" && claim !== "at once") await isReached;
        const left = way === "abort"
            ? (stop.abort(), { value: "left", done: true })
            : await events[way]("left").catch((error) => ({ value: error, done: true }));
        tell([way, name, left, await next, await events.next(), statuses.at(-1) ?? null]);
    };
    for (const way of ["return", "throw", "abort"]) {
        await leave(way, given.url, "before the first next", "none");
        await leave(way, given.url, "at once", "at once");
        await leave(way, given.url, "quiet", "open");
        await leave(way, given.stalled, "connecting", "connecting");
        await leave(way, "127.0.0.1:9", "backing off", "waiting");
    }
    """
    async with running() as daemon, answering(None) as stalled:
        told = await in_node(project, script, kind, url=daemon.url, stalled=stalled)
        await until(lambda: daemon.hub.subscribers == 0)

    left, end = {"value": "left", "done": True}, {"done": True}
    for way in ("return", "throw", "abort"):
        closed = "closed" if way == "abort" else None
        assert [line[1:] for line in told if line[0] == way] == [
            ["before the first next", left, None, end, closed],
            ["at once", left, end, end, "closed"],
            ["quiet", left, end, end, "closed"],
            ["connecting", left, end, end, "closed"],
            ["backing off", left, end, end, "closed"],
        ]


@pytest.mark.parametrize("kind", KINDS)
async def test_process_ends_when_all_is_left(project: Path, kind: str) -> None:
    """Publishes, a stream and a subscription leave no timer, no socket and no listener."""
    script = """
    import { getEventListeners } from "node:events";
    const { signal } = new AbortController();
    const client = new Clevrd(given.url, { WebSocket });
    await client.publish("t", 1, { signal });
    await client.publishBatch([{ topic: "t", data: 2 }], { signal });
    const stream = client.publishStream({ signal });
    const answer = await stream.publish("t", 3, { key: "k" });
    await stream.close();
    const seen = [];
    for await (const { data } of client.subscribe("t", { since: new Date(0), signal }))
        if (seen.push(data) === 4) break;
        else if (seen.length === 3) await client.publish("t", 4);
    tell([seen, getEventListeners(signal, "abort").length, Object.keys(answer).sort()]);
    """
    async with running() as daemon:
        told = await in_node(project, script, kind, url=daemon.url)

    answer = ["epoch", "lagging", "message_id", "offset", "slow", "subscribers", "success"]
    # The topic was made later than 1970, so what was before is a gap.
    assert told == [[[None, 1, 2, 3], 0, answer]]


@pytest.mark.parametrize("kind", KINDS)
async def test_what_a_callback_throws_is_thrown_by_the_loop(project: Path, kind: str) -> None:
    """In whatever status, and by an async function too."""
    script = """
    const client = new Clevrd(given.url, { WebSocket });
    for (const at of ["connecting", "open", "closed"])
        for (const isAsync of [false, true]) {
            const fail = ({ status }) => { if (status === at) throw new Error(`at ${at}`); };
            const onStatus = isAsync ? async (status) => fail(status) : fail;
            const stop = new AbortController();
            const ends = said(client.subscribe("t", { onStatus, signal: stop.signal }).next());
            if (at === "closed") stop.abort();
            tell(await ends);
        }
    """
    async with running() as daemon:
        told = await in_node(project, script, kind, url=daemon.url)

    # The last word of an async function comes when all has ended.
    assert told == [
        *["Error: at connecting"] * 2,
        *["Error: at open"] * 2,
        "Error: at closed",
        None,
    ]


async def test_refused_message_that_nobody_looks_at_is_on_the_console(project: Path) -> None:
    """Once for a stream, and it ends no process; the promise says it to who looks."""
    script = """
    const warned = [];
    console.warn = (line) => warned.push(line);
    const stream = new Clevrd(given.url, { WebSocket }).publishStream();
    stream.publish("", 1);
    stream.publish("t", 1n);
    const later = stream.publish("", 2);
    await stream.close();
    tell([warned.length, warned[0], await said(later), await said(stream.publish("t", 1))]);
    const stop = new AbortController();
    const lost = new Clevrd("127.0.0.1:9", { WebSocket }).publishStream({ signal: stop.signal });
    const unanswered = lost.publish("t", 1);
    stop.abort(new Error("enough"));
    tell([warned.length, await said(unanswered), await lost.close() ?? null]);
    """
    async with running() as daemon:
        told = await in_node(project, script, url=daemon.url)

    count, warned, later, closed = told[0]
    assert count == 1
    assert warned.startswith("A message was not published: ")
    assert later == "ClevrdError: The topic is empty; name one of 1 to 255 bytes."
    assert closed == "ClevrdError: The stream is closed."
    assert told[1] == [1, "Error: enough", None]


# --- topics --------------------------------------------------------------------------------------


async def test_topics_are_read_without_a_subscription_and_cleared(project: Path) -> None:
    """What they have had, page by page and gap by gap, which there are, and who reads them."""
    script = """
    const client = new Clevrd(given.url, { WebSocket });
    const read = async (topic, options) => {
        const found = [];
        for await (const event of client.history(topic, options)) found.push(event);
        return found;
    };
    const data = (events) => events.map((event) => event.data ?? event.reason);
    const items = Array.from({ length: 2500 }, (_, at) => ({ topic: "t", data: at + 1 }));
    await client.publishBatch(items);
    const event = { "ce-type": "paid", "ce-id": '"ä' };
    const end = await client.publish("t", "kept", { ttlS: 60, key: "k", headers: event });
    await client.publish("t", "short", { ttlS: 0.001 });
    await client.publishBatch([{ topic: "t", data: "batch", ttlS: 61, headers: event }]);
    const stream = client.publishStream();
    await stream.publish("t", "stream", { ttlS: 62, headers: event });
    await stream.close();
    await pause(5);

    const all = await read("t");
    const { type, epoch, offset, ttl_s, key } = all.at(-4);
    tell([all.length, all[0].reason, all[0].offset, [all[1].data, all[1].offset]]);
    tell([type, epoch === end.epoch, offset === end.offset, ttl_s, key]);
    tell(all.slice(-4).map((event) => [event.data ?? event.reason, event.ttl_s ?? null]));
    tell(data(await read("t", { last: 2 })));
    tell(data(await read("t", { position: all.at(-3), last: 1 })));
    tell(data(await read("t", { since: new Date(Date.now() - 3.6e6), limit: 1 })));
    tell((await read("t", { limit: 1100 })).length);
    tell(data(await read("t", { last: 0 })));

    const carried = [];
    for await (const each of client.subscribe("t", { last: 4, headers: true }))
        if (carried.push(each.headers ?? null) === 4) break;
    for (const headers of [true, false])
        carried.push((await read("t", { last: 1, headers }))[0].headers ?? null);
    tell(carried);

    const stop = new AbortController();
    let seen = 0;
    const reading = async () => {
        for await (const _ of client.history("t", { signal: stop.signal }))
            if (++seen === 5) stop.abort(new Error("enough"));
    };
    tell([await said(reading()), seen]);

    // Cut once they are open, they come back under their name.
    const opened = [];
    const back = ["t", ["t", "u"]].map((topic) => new Promise((done) => {
        let opens = 0;
        const onStatus = ({ status }) => status === "open" && ++opens === 2 && done();
        const events = client.subscribe(topic, { last: 0, subscriberId: "ann", onStatus });
        opened.push(events);
        events.next();
    }));
    await Promise.all(back);
    let info;
    do info = await client.topic("t", { limit: 1 });
    while (info.subscribers !== 2);
    tell([info.presence.ids, info.presence.count]);
    for (const events of opened) await events.return();

    const odd = ["a/b", "a%2Fb", "ä b", "a+b", "?a=1#b", "%", "a.."];
    for (const name of odd) await client.publish(name, name);
    const names = [];
    for await (const listed of client.topics()) names.push([listed.topic, listed.offset]);
    tell(names);
    for (const name of odd) tell(data(await read(name)));
    const before = client.history("t");
    for (let at = 0; at < 1001; at++) await before.next();
    const cleared = await client.clear("t");
    // More than there were: offsets of two epochs do not compare.
    for (let times = 0; times < 2; times++) await client.publishBatch(items);
    const rest = [];
    for await (const event of before) rest.push(event);
    tell([rest.length, ...data(rest).slice(0, 2), rest[0].epoch === cleared.epoch, cleared.offset]);
    tell([rest[0].offset, rest.at(-1).offset]);
    let read_while_it_grows = 0;
    for await (const _ of client.history("t"))
        if (read_while_it_grows++ % 500 === 0) await client.publishBatch(items);
    tell(read_while_it_grows);
    tell(await said(new Clevrd(given.cutting).clear("t")));
    """
    asked: list[bytes] = []

    async def cut_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readline()).rstrip())
        writer.close()

    async with (
        running(ring_messages=1500) as daemon,
        await asyncio.start_server(cut_one, "127.0.0.1", 0) as cutting,
    ):
        host = f"127.0.0.1:{cutting.sockets[0].getsockname()[1]}"
        running_script = asyncio.create_task(in_node(project, script, url=daemon.url, cutting=host))
        await until(lambda: daemon.hub.subscribers == 3 or running_script.done())
        await cut_readers(daemon.server, None)
        told = await running_script

    event = {"ce-type": "paid", "ce-id": '"ä'}
    odd = ["a/b", "a%2Fb", "ä b", "a+b", "?a=1#b", "%", "a.."]
    listed = sorted([*([name, 1] for name in odd), ["t", 2504]])
    assert told == [
        # 1,499 messages and two gaps.
        [1501, "retention", 1004, [1005, 1005]],
        ["message", True, True, 60, "k"],
        [["kept", 60], ["expired", None], ["batch", 61], ["stream", 62]],
        ["batch", "stream"],
        ["batch", "stream"],
        ["epoch", 1005],
        1101,
        [],
        [event, None, event, event, event, None],
        ["Error: enough", 5],
        [[{"id": "ann", "connections": 2}], 1],
        listed,
        *([name] for name in odd),
        [1501, "epoch", 1001, True, 0],
        [3500, 5000],
        # Two pages, each with a gap; more has come meanwhile.
        2002,
        f"ClevrdError: No answer from {host}.",
    ]
    # Another time it would clear what was published meanwhile.
    assert asked == [b"DELETE /topics/t/messages HTTP/1.1"]


# --- wrong arguments -----------------------------------------------------------------------------

URL_SENTENCE = (
    "TypeError: The URL must be like http://127.0.0.1:8080, 127.0.0.1:8080 or https://host,"
    " without a user and a query."
)
SUBSCRIBE_OPTIONS = (
    "position, positions, patterns, last, since, policy, buffer, subscriberId, headers, signal,"
    " onStatus, maxWaitingChars"
)
TOPIC_SENTENCE = 'TypeError: The topic must be a name, as "orders", or an array of names.'
POSITION_SENTENCE = "TypeError: position must be { epoch, offset }, as every event has them."
SINCE_SENTENCE = 'TypeError: since must be text, as "90s" or "all", or a Date.'
ONE_POSITION = (
    "TypeError: A position is of one topic: for several pass positions,"
    " as { orders: { epoch, offset } }."
)
UNSUBSCRIBED = (
    'TypeError: positions name "T", which is not subscribed: name it as a topic,'
    " or a pattern for it."
)
# Calls, and what they throw; an empty sentence where the call is right.
WRONG = {
    "client.subscribe([]).next()": 'TypeError: Name a topic, as "orders", or patterns, as [],'
    ' { patterns: ["orders.*"] }.',
    "client.subscribe().next()": TOPIC_SENTENCE,
    "client.subscribe(7).next()": TOPIC_SENTENCE,
    "client.subscribe('').next()": TOPIC_SENTENCE,
    "client.subscribe(['a', 7]).next()": TOPIC_SENTENCE,
    "client.subscribe('t', null).next()": "TypeError: An object is expected, with any of:"
    f" {SUBSCRIBE_OPTIONS}.",
    "client.subscribe('t', 'all').next()": "TypeError: An object is expected, with any of:"
    f" {SUBSCRIBE_OPTIONS}.",
    "client.subscribe('t', { last: -1 }).next()": "TypeError: last must be a whole number, 0 or"
    " more.",
    "client.subscribe('t', { last: '5' }).next()": "TypeError: last must be a whole number, 0 or"
    " more.",
    "client.subscribe('t', { buffer: 0 }).next()": "TypeError: buffer must be a whole number, 1 or"
    " more.",
    "client.subscribe('t', { policy: 1 }).next()": "TypeError: policy must be text, and not empty.",
    "client.subscribe('t', { policy: 'drop_oldset' }).next()": "ClevrdError: Unknown policy; use"
    " one of drop_oldest, drop_newest, circuit_breaker, latest.",
    "client.subscribe('t', { since: 5 }).next()": SINCE_SENTENCE,
    "client.subscribe('t', { since: new Date(NaN) }).next()": SINCE_SENTENCE,
    "client.subscribe('t', { position: 'e:1' }).next()": POSITION_SENTENCE,
    "client.subscribe('t', { position: { epoch: 'e' } }).next()": POSITION_SENTENCE,
    "client.subscribe(['a', 'b'], { position: { epoch: 'e', offset: 1 } }).next()": ONE_POSITION,
    "client.subscribe('t', {positions: {}, position: {epoch:'e', offset: 1}}).next()": ONE_POSITION,
    **{
        f"client.subscribe('t', {{ {options} }}).next()": f"TypeError: {names} each say where to"
        " begin; give one of them."
        for options, names in {
            "last: 1, since: 'all'": "last and since",
            "last: 1, since: 'all', positions: { t: { epoch: 'e', offset: 1 } }": "last and since",
        }.items()
    },
    **{
        f"client.subscribe({topic}, {{ positions: {{ t: null, T: {{ epoch: 'e', offset: 1 }} }},"
        f" {more} signal: AbortSignal.abort() }}).next()": expected
        for topic, more, expected in [
            ("'t'", "", UNSUBSCRIBED),
            ("['t', 'u']", "patterns: [],", UNSUBSCRIBED),
            ("['t', 'T']", "", ""),
            ("'t'", "patterns: ['p.*'],", ""),
        ]
    },
    "client.subscribe('t', { positions: { u: null }, signal: AbortSignal.abort() }).next()": "",
    "client.subscribe('t', { positions: [1] }).next()": "TypeError: positions must be positions by"
    " topic, as { orders: { epoch, offset } }.",
    "client.subscribe('t', { patterns: 'a.*' }).next()": "TypeError: patterns must be an array of"
    ' texts, as ["orders.*"].',
    "client.subscribe('t', { signal: new AbortController() }).next()": "TypeError: signal must be"
    " an AbortSignal, as the signal of an AbortController.",
    "client.subscribe('t', { onStatus: 1 }).next()": "TypeError: onStatus must be a function.",
    "client.subscribe('t', { maxWaitingChars: NaN }).next()": "TypeError: maxWaitingChars must be a"
    " whole number, 1 or more.",
    "client.subscribe('t', { own: 1n }).next()": "TypeError: This has no JSON form: Do not know how"
    " to serialize a BigInt",
    "client.publish(7, 1)": 'TypeError: The topic must be a name, as "orders".',
    "client.publish('t')": "ClevrdError: The data is missing or null; send",
    "client.publish('t', 1n)": "TypeError: This has no JSON form: Do not know how to serialize a"
    " BigInt",
    "client.publish('t', 1, null)": "TypeError: An object is expected, with any of: key,"
    " idempotencyKey, ttlS, headers, signal.",
    "client.publish('t', 1, { key: 7 })": "TypeError: key must be text, and not empty.",
    **{
        f"client.publish('t', 1, {{ ttlS: {ttl} }})": "TypeError: ttlS must be a number of seconds"
        " from 0.001 to 100000000; leave it out for a message that does not expire."
        for ttl in ("'60'", "0", "-1", "0.0009", "100_000_001", "NaN", "Infinity", "true")
    },
    "client.publish('t', 1, { headers: true })": "TypeError: headers must be an object of texts"
    ' with names traceparent, tracestate and ce-*, as { "ce-type": "order.paid" }.',
    "client.publish('t', 1, { headers: { 'ce-type': 5 } })": "TypeError: headers must be an object",
    "client.publish('t', 1, { headers: { other: 'x' } })": "TypeError: headers must be an object",
    "client.subscribe('t', { headers: {} }).next()": "TypeError: headers must be true or false.",
    "client.history('t', { headers: 1 }).next()": "TypeError: headers must be true or false.",
    "client.publish('t', 1, { ttl_s: 60 })": "TypeError: ttl_s is no option, ttlS is.",
    "client.publishBatch([{ topic: 't', data: 1, ttlS: 0 }])": "TypeError: ttlS must be",
    "client.publishStream().publish('t', 1, { ttlS: 0 })": "TypeError: ttlS must be",
    "client.subscribe('t', { subscriberId: 5 }).next()": "TypeError: subscriberId must be text, and"
    " not empty.",
    "client.subscribe('t', { subscriber_id: 'a' }).next()": "TypeError: subscriber_id is no option,"
    " subscriberId is.",
    "client.subscribe('t', { subscriberId: 'x'.repeat(129) }).next()": "ClevrdError: The"
    " subscriber_id has 129 bytes; 128 are allowed.",
    **{
        f"client.history({topic}).next()": "TypeError: The topic must be a name, as"
        ' "orders", and not "." or "..".'
        for topic in ("", "7", "''", "['t']", "'.'", "'..'", "'\\ud800'")
    },
    "client.topic('..')": "TypeError: The topic must be a name",
    "client.clear('..')": "TypeError: The topic must be a name",
    "client.history('t', null).next()": "TypeError: An object is expected, with any of: position,"
    " last, since, limit, headers, signal.",
    "client.history('t', { limit: 0 }).next()": "TypeError: limit must be a whole number, 1 or"
    " more.",
    "client.history('t', { last: 1, since: 'all' }).next()": "TypeError: last and since each say"
    " where to begin; give one of them.",
    "client.history('none').next()": "ClevrdError: There is no such topic",
    "client.topic('none')": "ClevrdError: There is no such topic",
    "client.topic('t', { limit: 1001 })": "ClevrdError: The option limit must be a whole number"
    " from 1 to 1000.",
    "client.clear('none')": "ClevrdError: There is no such topic",
    "client.clear('t', { signal: AbortSignal.abort(new Error('enough')) })": "Error: enough",
    "client.history('t', { signal: AbortSignal.abort(new Error('no')) }).next()": "Error: no",
    "client.topics({ signal: AbortSignal.abort(new Error('no')) }).next()": "Error: no",
    "client.publish('t', 1, { signal: 7 })": "TypeError: signal must be an AbortSignal",
    "client.publish('t', 1, { signal: AbortSignal.abort(new Error('enough')) })": "Error: enough",
    "client.publishBatch()": "TypeError: The items must be an array, as [{ topic, data }].",
    "client.publishBatch('text')": "TypeError: An object is expected, with any of: topic, data,",
    "client.publishBatch([null])": "TypeError: An object is expected, with any of: topic, data,",
    "client.publishBatch([{ data: 1 }])": 'TypeError: The topic must be a name, as "orders".',
    "client.publishBatch([])": "ClevrdError: The batch is empty",
    "client.publishStream().publish(7, 1)": 'TypeError: The topic must be a name, as "orders".',
    "(async () => client.publishStream(null))()": "TypeError: An object is expected",
    "(async () => client.publishStream({ maxInFlight: 0 }))()": "TypeError: maxInFlight must be",
    "(async () => new Clevrd(given.url, null))()": "TypeError: An object is expected, with any of:"
    " tenant, token, retryForMs, WebSocket.",
    "(async () => new Clevrd(given.url, { tenant: 'a b' }))()": "TypeError: tenant must be a name"
    " of 1 to 64 of A-Z a-z 0-9 . _ -.",
    **{
        f"(async () => new Clevrd(given.url, {{ tenant: {tenant} }}))()": "TypeError: tenant must"
        " be a name of 1 to 64 of A-Z a-z 0-9 . _ -."
        for tenant in ("5", "true", "['acme']", "''")
    },
    "(async () => new Clevrd(given.url, { retryForMs: -1 }))()": "TypeError: retryForMs must be a"
    " number from 0 to 2147483647.",
    "(async () => new Clevrd(given.url, { WebSocket: {} }))()": "TypeError: WebSocket must be a"
    " class, as that of the package ws.",
    "(async () => new Clevrd(given.url, { WebSocket: () => 1 }))()": "TypeError: WebSocket must be"
    " a class, as that of the package ws.",
    "(async () => new Clevrd())()": 'TypeError: Name the server, as in new Clevrd("http://127.0.0.1:8080").',
}


async def test_wrong_arguments_are_told_in_a_sentence(project: Path) -> None:
    """At once, and what would be right; the stream that is left open is ended with the rest."""
    calls = "".join(f"tell(await said({call}));\n" for call in WRONG)
    script = f"""
    console.warn = () => {{}};
    const client = new Clevrd(given.url, {{ WebSocket }});
    const opened = client.publishStream;
    const streams = [];
    client.publishStream = (...all) => (streams.push(opened.apply(client, all)), streams.at(-1));
    {calls}
    for (const stream of streams) await stream.close();
    """
    async with running() as daemon:
        told = await in_node(project, script, url=daemon.url)

    for call, said, expected in zip(WRONG, told, WRONG.values(), strict=True):
        assert (said or "").startswith(expected), call
        assert bool(said) == bool(expected), call
        assert "\n" not in (said or "")


async def test_url_may_be_short_or_a_websockets(project: Path) -> None:
    """As the Python client and the command line take it."""
    forms = ["127.0.0.1:{}", "localhost:{}/", "ws://127.0.0.1:{}", "HTTP://127.0.0.1:{}"]
    script = """
    for (const url of given.urls) {
        const client = new Clevrd(url, { WebSocket });
        await client.publish("t", url);
        for await (const { data } of client.subscribe("t", { last: 1 })) { tell(data); break; }
    }
    """
    async with running() as daemon:
        urls = [form.format(daemon.port) for form in forms]
        told = await in_node(project, script, urls=urls)

    assert told == urls


async def test_url_that_names_no_server_is_told(project: Path) -> None:
    """Before anything is sent; a host alone would be a guess."""
    wrong = [
        *(
            "localhost",
            "example.com/x",
            "unix:/run/clevrd.sock",
            "ftp://host",
            "http://",
            "/events",
        ),
        *("http://user:word@host", "http://host/?a=1", "http://host/#a", "http://a b"),
        *("host:0", "host:65536", "http://999.999.999.999", 7, {}, "[::1", "?", "::1:8080"),
    ]
    script = """
    for (const url of given.wrong) tell(await said((async () => new Clevrd(url))()));
    for (const url of given.right) tell(await said((async () => new Clevrd(url))()));
    tell(await said((async () => new Clevrd(new URL("http://host/path")))()));
    """
    right = ["wss://host", "[::1]:8080", "https://host:8443/events", "host.name:80"]
    told = await in_node(project, script, wrong=wrong, right=right)

    assert told == [URL_SENTENCE] * len(wrong) + [None] * (len(right) + 1)


# --- servers that are none -----------------------------------------------------------------------

NOT_CLEVRD = (
    (http(404, "<h1>Not Found</h1>"), "answered 404, but is no clevrd: check the URL."),
    (http(200, "<!doctype html>"), "answered 200, but is no clevrd: check the URL."),
    (http(200, '{"a":1}', "application/json"), "answered 200, but is no clevrd: check the URL."),
    (http(200, "null", "application/json"), "answered 200, but is no clevrd: check the URL."),
    (http(403, '{"error":{"a":1}}', "application/json"), "answered 403, but is no clevrd"),
    (http(426, "Upgrade Required"), "answered 426, but is no clevrd: check the URL."),
    (http(404, "", "application/json"), "answered 404, but is no clevrd: check the URL."),
)


@pytest.mark.parametrize("kind", KINDS)
async def test_other_web_servers_are_told(project: Path, kind: str) -> None:
    """To who subscribes, publishes or asks of topics; nobody comes back for it."""
    script = """
    console.warn = () => {};
    for (const url of given.urls) {
        const client = new Clevrd(url, { WebSocket });
        const stream = client.publishStream();
        tell([
            await said(client.subscribe("t").next()),
            await said(client.publish("t", 1)),
            await said(client.publishBatch([{ topic: "t", data: 1 }])),
            await said(stream.publish("t", 1)),
            await said(client.history("t").next()),
            await said(client.topics().next()),
            await said(client.clear("t")),
        ]);
        await stream.close();
    }
    """
    async with AsyncExitStack() as stack:
        urls = [await stack.enter_async_context(answering(each)) for each, _ in NOT_CLEVRD]
        told = await in_node(project, script, kind, urls=urls)

    for url, sentences, (_, expected) in zip(urls, told, NOT_CLEVRD, strict=True):
        start = f"ClevrdError: {url.removeprefix('http://')} {expected}"
        assert [said[: len(start)] for said in sentences] == [start] * 7


@pytest.mark.parametrize("kind", KINDS)
async def test_port_that_is_no_web_server_is_an_outage(project: Path, kind: str) -> None:
    """A publish gives up in a sentence, a subscription says that it waits and tries on."""
    script = """
    for (const url of given.urls) {
        const client = new Clevrd(url, { WebSocket, retryForMs: 300 });
        const once = new Clevrd(url, { WebSocket, retryForMs: 0 });
        const stop = new AbortController();
        let waits = 0;
        const onStatus = ({ status }) => {
            if (status === "waiting" && ++waits === 3) stop.abort();
        };
        tell([
            await said(client.publish("t", 1)),
            await said(once.publish("t", 1)),
            await said(client.subscribe("t", { signal: stop.signal, onStatus }).next()),
        ]);
    }
    """
    answers = [
        *(b"", b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 200 OK\r\nContent-Le"),
        # As what was cut looks in Chromium.
        http(426, '{"success":fal', "application/json"),
    ]
    async with AsyncExitStack() as stack:
        urls = [await stack.enter_async_context(answering(each)) for each in answers]
        told = await in_node(project, script, kind, urls=urls)

    sentences = [f"ClevrdError: No answer from {url.removeprefix('http://')}." for url in urls]
    assert told == [[sentence, sentence, None] for sentence in sentences]


FOREIGN: tuple[str | bytes, ...] = (
    *("no JSON", "", "null", "7", "[]", b"binary", b'{"type":"pong"}'),
    '{"id":"msg-1","topic":"t","data":1,"offset":1}',
    '{"type":"gap","topic":"t","from":1,"to":2,"count":2,"reason":"retention"}',
    '{"type":"subscribed","topic":"t"}',
    '{"type":"subscribed","topic":"t","epoch":7,"offset":"1"}',
)


@pytest.mark.parametrize("kind", KINDS)
async def test_frames_that_are_not_clevrds_end_it(project: Path, kind: str) -> None:
    """In a sentence, and once: a server of another kind is not asked again and again."""
    script = """
    const client = new Clevrd(given.url, { WebSocket });
    for (let at = 0; at < given.count; at++) tell(await said(client.subscribe(`t${at}`).next()));
    """
    async with faking(*(Turn([frame]) for frame in FOREIGN)) as fake:
        told = await in_node(project, script, kind, url=fake.url, count=len(FOREIGN))

    host = fake.url.removeprefix("http://")
    sentence = f"ClevrdError: {host} sends what clevrd does not: check the URL."
    assert told == [sentence] * len(FOREIGN)
    assert [wish["topic"] for wish in fake.wishes] == [f"t{at}" for at in range(len(FOREIGN))]


ANSWER: dict[str, Any] = {"success": True, "message_id": "msg-1", "offset": 1, "epoch": "e1"}
NOT_ANSWERS: tuple[dict[str, Any], ...] = (
    {"success": True, "message_id": 5, "offset": "x"},
    {"success": True},
    {**ANSWER, "message_id": 5},
    {**ANSWER, "offset": "1"},
    {**ANSWER, "epoch": ""},
)


@pytest.mark.parametrize("kind", KINDS)
async def test_publish_answers_that_are_not_clevrds_are_told(project: Path, kind: str) -> None:
    """Of a publish, a batch, and a message of a stream, which ends: none of them was a success."""

    async def answer_each(connection: ServerConnection) -> None:
        async for frame in connection:
            wish = json.loads(frame)
            answer = wish["data"]["answer"]
            await connection.send(json.dumps({"type": "published", **answer, "ref": wish["ref"]}))

    script = """
    console.warn = () => {};
    for (const url of given.urls) tell(await said(new Clevrd(url).publish("t", 1)));
    const items = [{ topic: "t", data: 1 }];
    for (const url of given.batches) tell(await said(new Clevrd(url).publishBatch(items)));
    for (const answer of given.answers) {
        const stream = new Clevrd(given.socket, { WebSocket }).publishStream();
        const good = await stream.publish("t", { answer: given.good });
        const all = [stream.publish("t", { answer }), stream.publish("t", { answer: given.good })];
        tell([good.offset, ...(await Promise.all(all.map(said)))]);
        await stream.close();
    }
    """
    wrong = [
        [],
        [ANSWER, ANSWER],
        [None],
        [{"success": False}],
        [{**ANSWER, "success": 1}],
        *([each] for each in NOT_ANSWERS),
    ]
    bodies = [*NOT_ANSWERS, {"success": False}, {"success": False, "error": "no"}]
    batches = [{"success": True, "results": each} for each in wrong]
    async with AsyncExitStack() as stack:
        served = []
        for body in [*bodies, *batches]:
            answer = http(200, json.dumps(body), "application/json")
            served.append(await stack.enter_async_context(answering(answer)))
        protocols = [Subprotocol("clevrd.v1")]
        server = await stack.enter_async_context(
            serve(answer_each, "127.0.0.1", 0, subprotocols=protocols)
        )
        socket = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        told = await in_node(
            project,
            script,
            kind,
            urls=served[: len(bodies)],
            batches=served[len(bodies) :],
            socket=socket,
            answers=NOT_ANSWERS,
            good=ANSWER,
        )

    said = "ClevrdError: {} sends what clevrd does not: check the URL."
    once = [said.format(url.removeprefix("http://")) for url in served]
    assert told[: len(served)] == once
    assert told[len(served) :] == [[1, said.format(socket), said.format(socket)]] * len(NOT_ANSWERS)


@pytest.mark.parametrize("kind", KINDS)
async def test_server_of_another_protocol_is_left(project: Path, kind: str) -> None:
    """An echo, say, which did not choose ours; most runtimes see that, some don't look."""

    async def echo(connection: ServerConnection) -> None:
        async for frame in connection:
            await connection.send(frame)

    script = """
    class Lax extends WebSocket { constructor(url) { super(url); } }
    for (const each of [WebSocket, Lax])
        tell(await said(new Clevrd(given.url, { WebSocket: each }).subscribe("t").next()));
    """
    async with serve(echo, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        told = await in_node(project, script, kind, url=url)

    host = url.removeprefix("http://")
    assert told == [
        f"ClevrdError: {host} answered 426, but is no clevrd: check the URL.",
        f"ClevrdError: {host} sends what clevrd does not: check the URL.",
    ]


@pytest.mark.parametrize("kind", KINDS)
async def test_daemon_of_a_later_version_is_understood(project: Path, kind: str) -> None:
    """Notices and fields that are not known yet mean nothing; reasons and messages pass through."""
    later = [
        '{"type":"hello","version":9}',
        subscribed(compression="none"),
        '{"type":"lag","topic":"t","behind":3,"offset":99}',
        message(1)[:-1] + ',"trace":"abc"}',
        '{"type":"subscribed2","topic":"u"}',
        gap_frame("t", 2, 4, "too_cold"),
        '{"type":"watching","pattern":"q.*","more":[1]}',
        message(5),
    ]
    script = """
    const seen = [];
    const client = new Clevrd(given.url, { WebSocket });
    for await (const { type, offset, trace, reason } of client.subscribe("t"))
        if (seen.push([type, offset, trace ?? reason ?? null]) === 3) break;
    tell(seen);
    """
    async with faking(Turn(list(later))) as fake:
        told = await in_node(project, script, kind, url=fake.url)

    assert told == [[["message", 1, "abc"], ["gap", 4, "too_cold"], ["message", 5, None]]]


async def test_no_websocket_is_told(project: Path) -> None:
    """Where the runtime has none, the sentence says where one comes from."""
    script = """
    delete globalThis.WebSocket;
    tell(await said(new Clevrd("127.0.0.1:9").subscribe("t").next()));
    class Refusing { constructor() { throw new SyntaxError("not here"); } }
    tell(await said(new Clevrd("127.0.0.1:9", { WebSocket: Refusing }).subscribe("t").next()));
    """
    told: list[Any] = await in_node(project, script)

    assert told == [
        "TypeError: There is no WebSocket here: pass that of the package ws,"
        " new Clevrd(url, { WebSocket }).",
        "ClevrdError: No WebSocket to 127.0.0.1:9 can be made: not here",
    ]


@pytest.mark.parametrize("kind", KINDS)
async def test_class_that_is_no_websockets_is_told_and_leaves_nothing(
    project: Path, kind: str
) -> None:
    """Whatever it lacks or throws, and whenever: one sentence, no beat, and nothing later."""
    script = """
    const fail = () => { throw new Error("own"); };
    const classes = [
        class Bare { constructor() {} close() {} },
        class Deaf extends WebSocket { addEventListener(type, ...all) {
            if (type === "close") fail();
            super.addEventListener(type, ...all);
        } },
        class Mute extends WebSocket { get send() { return undefined; } },
        class Stateless { addEventListener() {} send() {} close() {} },
        class Stuck extends WebSocket { send() { fail(); } },
        class Shy extends WebSocket { get protocol() { return fail(); } },
        class Empty extends WebSocket { addEventListener(type, call) {
            super.addEventListener(type, () => call(type === "message" ? undefined : { type }));
        } },
    ];
    const { setInterval: set, clearInterval: clear } = globalThis;
    const beats = new Set();
    globalThis.setInterval = (...all) => [set(...all)].map((beat) => (beats.add(beat), beat))[0];
    globalThis.clearInterval = (beat) => { beats.delete(beat); clear(beat); };
    for (const each of classes) {
        const client = new Clevrd(given.url, { WebSocket: each });
        const statuses = [];
        const onStatus = ({ status }) => statuses.push(status);
        const failed = await said(client.subscribe("t", { onStatus }).next());
        const left = beats.size;
        const stream = client.publishStream();
        const published = await said(stream.publish("t", 1));
        await stream.close();
        tell([each.name, failed, published, statuses.at(-1), left]);
    }
    const stop = new AbortController();
    class Leaving extends WebSocket { constructor(...all) { super(...all); stop.abort(); } }
    const { signal } = stop;
    tell(await new Clevrd(given.url, { WebSocket: Leaving }).subscribe("t", { signal }).next());
    """
    async with running() as daemon:
        told = await in_node(project, "console.warn = () => {};" + script, kind, url=daemon.url)
        await until(lambda: daemon.hub.subscribers == 0)

    advice = "pass that of the package ws, new Clevrd(url, { WebSocket })."
    causes = {
        "Bare": "socket.addEventListener is not a function",
        "Deaf": "own",
        "Mute": "it has no send",
        "Stateless": "it has no readyState",
        "Stuck": "own",
        "Shy": "own",
        "Empty": "Cannot destructure property 'data' of 'undefined' as it is undefined.",
    }
    for (name, *sentences, status, left), (expected, cause) in zip(
        told[:-1], causes.items(), strict=True
    ):
        sentence = f"ClevrdError: The WebSocket does not work as one ({cause}): {advice}"
        assert (name, sentences, status, left) == (expected, [sentence] * 2, "closed", 0)
    assert told[-1] == {"done": True}


async def test_subprotocol_is_offered_by_name(project: Path) -> None:
    """What a proxy or a server goes by; the daemon refuses /ws without it."""
    offered: list[Any] = []

    async def note(connection: ServerConnection) -> None:
        assert connection.request is not None
        offered.append(connection.request.headers["Sec-WebSocket-Protocol"])
        await connection.send(subscribed())
        await connection.send(message(1))
        await connection.wait_closed()

    script = "for await (const _ of new Clevrd(given.url, { WebSocket }).subscribe('t')) break;"
    protocols = [Subprotocol("clevrd.v1")]
    async with serve(note, "127.0.0.1", 0, subprotocols=protocols) as server:
        port = server.sockets[0].getsockname()[1]
        await in_node(project, script, url=f"ws://127.0.0.1:{port}")

    assert offered == ["clevrd.v1"]
