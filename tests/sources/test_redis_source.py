"""Streams in Redis as sources, seen from outside: order, repeats, dead letters, trims, outages.

redis-py writes, and a reader of the package websockets looks what comes.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from daemons import Daemon, running, until
from held_journals import hold_journal, under_way
from redis import Redis
from redis_servers import RedisServer
from websockets.asyncio.client import ClientConnection, connect

from clevrd.sources import redis_stream
from clevrd.sources.taking import MAX_UNDER_WAY


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """Give a running Redis to all tests of the module."""
    started = RedisServer(tmp_path_factory.mktemp("redis"))
    try:
        yield started.start()
    finally:
        started.kill()


@pytest.fixture
def redis(server: RedisServer) -> Iterator[Redis]:
    """Give a client of an empty Redis."""
    with server.client as client:
        client.flushall()
        yield client


def table(server: RedisServer, stream: str = "orders", **fields: Any) -> dict[str, Any]:
    """Return the table of a source that reads a stream from its beginning."""
    return {
        "name": "orders",
        "url": f"{server.url}/{stream}",
        "topic": "t",
        "field": "data",
        "start": "earliest",
        **fields,
    }


def figures(daemon: Daemon, index: int = 0) -> Any:
    """Return the figures of a source, as /metrics has them."""
    return daemon.server.parts.messaging.sources.figures()[index]


async def received(reader: ClientConnection, count: int) -> list[Any]:
    """Return the next messages."""
    async with asyncio.timeout(20):
        return [json.loads(await reader.recv()) for _ in range(count)]


@asynccontextmanager
async def reading(daemon: Daemon, topic: str = "t", last: int = 10_000) -> AsyncIterator[Any]:
    """Subscribe to a topic, with all that it has."""
    async with connect(f"{daemon.ws_url}/subscribe?topic={topic}&last={last}") as reader:
        yield reader


def add(redis: Redis, *values: Any, stream: str = "orders", **fields: str) -> list[bytes]:
    """Add records with JSON in the field data; return their IDs."""
    pipe = redis.pipeline(transaction=False)
    for value in values:
        record: dict[Any, Any] = {"data": json.dumps(value), **fields}
        pipe.xadd(stream, record)
    added: list[Any] = pipe.execute()
    return added


async def test_records_become_messages_in_their_order(server: RedisServer, redis: Redis) -> None:
    """What was there and what comes later: topics and keys made of headers and pointers."""
    add(redis, {"customer": {"id": 7}, "n": 0}, region="eu")
    source = table(server, topic="orders.{header:region}.{/customer/id}", key="{/n}")
    async with (
        running(sources=[source]) as daemon,
        reading(daemon, "orders.eu.7") as reader,
    ):
        (first,) = await received(reader, 1)
        later = [{"customer": {"id": 7}, "n": number} for number in range(1, 500)]
        add(redis, *later, region="eu")
        rest = await received(reader, 499)
        metrics = await daemon.get_json("/metrics")

    assert [each["data"]["n"] for each in [first, *rest]] == list(range(500))
    assert [each["key"] for each in [first, *rest]] == [str(number) for number in range(500)]
    (source,) = metrics["sources"]
    assert (source["state"], source["taken"], source["dead"], source["lost"]) == (
        "reading",
        500,
        0,
        0,
    )


async def test_operators_see_figures_and_settings_without_secrets(
    server: RedisServer, redis: Redis
) -> None:
    """Prometheus has each figure by the source's name, and /config the table."""
    redis.acl_setuser("me", enabled=True, passwords=["+hush"], keys=["*"], categories=["+@all"])
    add(redis, 1, 2)
    source = table(server, url=f"redis://me:hush@127.0.0.1:{server.port}/orders")
    async with running(sources=[source]) as daemon:
        await until(lambda: figures(daemon).lag == 0)
        text = {"Accept": "text/plain"}
        async with daemon.http.get(f"{daemon.url}/metrics", headers=text) as response:
            lines = (await response.text()).splitlines()
        (shown,) = (await daemon.get_json("/config"))["sources"]

    assert 'clevrd_source_records_total{outcome="taken",source="orders"} 2.0' in lines
    assert 'clevrd_source_state{source="orders",state="reading"} 1.0' in lines
    assert 'clevrd_source_lag{source="orders"} 0.0' in lines
    assert (shown["name"], shown["dead_letter"]) == ("orders", "sources.dead")
    assert "hush" not in str(shown)


async def test_all_fields_are_an_object_where_no_field_is_named(
    server: RedisServer, redis: Redis
) -> None:
    """The fields are text, and pointers reach them as headers do."""
    redis.xadd("orders", {"kind": "new", "count": "3"})
    source = table(server, field="", topic="o.{/kind}")
    async with running(sources=[source]) as daemon, reading(daemon, "o.new") as reader:
        (message,) = await received(reader, 1)

    assert message["data"] == {"kind": "new", "count": "3"}


async def test_filter_passes_over_what_does_not_fulfil_all_conditions(
    server: RedisServer, redis: Redis
) -> None:
    """Conditions on headers and pointers; true is not 1, and null is not there."""
    add(redis, {"n": 1, "paid": True, "gone": None}, region="eu")
    add(redis, {"n": 2, "paid": 1}, {"n": 3}, {"n": 4, "paid": True, "gone": 1}, region="eu")
    add(redis, {"n": 5, "paid": True}, region="us")
    conditions = [
        {"at": "/paid", "equals": True},
        {"at": "header:region", "equals": "eu"},
        {"at": "/gone", "exists": False},
    ]
    source = table(server, filter=conditions)
    async with running(sources=[source]) as daemon, reading(daemon) as reader:
        (message,) = await received(reader, 1)
        await until(lambda: figures(daemon).filtered == 4)

    assert message["data"]["n"] == 1
    assert figures(daemon).taken == 1


async def test_records_that_cannot_be_taken_are_dead_letters(
    server: RedisServer, redis: Redis
) -> None:
    """Each has its reason, its position and what it was, cut; the source goes on."""
    redis.xadd("orders", {"data": "no json"})
    redis.xadd("orders", {"other": "1"})
    redis.xadd("orders", {"data": b'"\xff"'})
    add(redis, {"id": 1}, None, {"topic": "a\nb"}, {"topic": ["a"]}, {"topic": ""})
    add(redis, {"topic": "t", "long": "x" * 5_000})
    add(redis, {"topic": "x" * 300})
    last = add(redis, {"topic": "t"})[0].decode()
    source = table(server, topic="{/topic}")
    async with (
        running(sources=[source], max_message_bytes=4_500) as daemon,
        reading(daemon, "sources.dead") as graveyard,
        reading(daemon) as reader,
    ):
        dead = [each["data"] for each in await received(graveyard, 10)]
        (message,) = await received(reader, 1)
        await until(lambda: figures(daemon).position == last)

    assert message["data"] == {"topic": "t"}
    assert (figures(daemon).dead, figures(daemon).taken, figures(daemon).state) == (
        *(10, 1),
        "stopped",
    )
    assert [each["reason"] for each in dead] == [
        "The value is not JSON at byte 4.",
        "The record has no value.",
        "The value is not UTF-8 at byte 1.",
        "The value at /topic is missing, and the name is made of it.",
        "The value at /topic is missing, and the name is made of it.",
        "The topic holds a control character; remove it.",
        "The value at /topic is no text and no whole number.",
        "The value at /topic is empty, and the name is made of it.",
        "The value has 5026 bytes, and 4500 are allowed (max_message_bytes).",
        "The topic has 300 bytes; 255 are allowed.",
    ]
    assert dead[0]["value"] == "no json"
    assert "value" not in dead[1]
    assert dead[2]["value"] == '"\ufffd"'
    assert (len(dead[8]["value"]), dead[8]["value_bytes"], dead[8]["is_cut"]) == (
        4_096,
        5_026,
        True,
    )
    assert all(each["source"] == "orders" and "-" in each["position"] for each in dead)


async def test_without_a_dead_letter_topic_they_are_counted_alone(
    server: RedisServer, redis: Redis
) -> None:
    """Nothing is published for them."""
    redis.xadd("orders", {"data": "no json"})
    add(redis, 1)
    source = table(server, dead_letter="")
    async with running(sources=[source]) as daemon, reading(daemon) as reader:
        assert (await received(reader, 1))[0]["data"] == 1
        assert (figures(daemon).dead, len(daemon.hub.topics)) == (1, 1)


# --- where it begins, and goes on ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ("earliest", [1, 2, 3, 4]),
        ("latest", [4]),
        ("2000-0", [2, 3, 4]),
        ("1970-01-01T00:00:03Z", [3, 4]),
    ],
)
async def test_source_begins_where_it_is_told(
    server: RedisServer, redis: Redis, start: str, expected: list[int]
) -> None:
    """At an end, with the record of a position, or with the first one from a moment on."""
    for number in (1, 2, 3):
        redis.xadd("orders", {"data": number}, id=f"{number}000-0")
    async with running(sources=[table(server, start=start)]) as daemon, reading(daemon) as reader:
        await until(lambda: figures(daemon).lag == 0)
        redis.xadd("orders", {"data": 4})

        found = await received(reader, len(expected))

    assert [each["data"] for each in found] == expected
    assert figures(daemon).lost == 0


async def test_source_goes_on_where_it_was_after_a_restart(
    server: RedisServer, redis: Redis
) -> None:
    """A stop keeps the position, in a consumer group that Redis's own tools show, with its lag."""
    add(redis, *range(100))
    async with running(sources=[table(server)]) as daemon, reading(daemon) as reader:
        await received(reader, 100)
    add(redis, 100, 101)
    (group,) = redis.xinfo_groups("orders")
    assert (group["name"], group["lag"], group["pending"]) == (b"clevrd-orders", 2, 0)
    async with running(sources=[table(server)]) as daemon, reading(daemon) as reader:
        found = await received(reader, 2)
        await until(lambda: figures(daemon).lag == 0)

    assert [each["data"] for each in found] == [100, 101]
    assert redis.keys("clevrd:source:*") == []


async def test_trimmed_records_are_counted_as_lost(server: RedisServer, redis: Redis) -> None:
    """Those that the stream gave up before they were read; never those that were read."""
    add(redis, *range(100))
    async with running(sources=[table(server)]) as daemon:
        await until(lambda: figures(daemon).taken == 100)
        redis.xtrim("orders", maxlen=0)
        add(redis, 100)
        await until(lambda: figures(daemon).taken == 101)
        assert figures(daemon).lost == 0
    add(redis, *range(101, 151))
    redis.xtrim("orders", maxlen=20, approximate=False)
    async with running(sources=[table(server)]) as daemon, reading(daemon) as reader:
        found = await received(reader, 20)

        assert figures(daemon).lost == 30
    add(redis, 151, 152)
    redis.xtrim("orders", maxlen=0)
    async with running(sources=[table(server)]) as daemon:
        await until(lambda: figures(daemon).lost == 2)

    assert [each["data"] for each in found] == list(range(131, 151))


async def test_stream_that_is_not_there_yet_is_read_from_its_beginning(
    server: RedisServer, redis: Redis
) -> None:
    """Also with "latest": whatever comes was not there when the source began."""
    source = table(server, start="latest")
    async with running(sources=[source]) as daemon, reading(daemon) as reader:
        await until(lambda: figures(daemon).state == "missing")
        add(redis, 1, 2)
        found = await received(reader, 2)

    assert [each["data"] for each in found] == [1, 2]


async def test_stream_made_anew_is_read_from_its_beginning(
    server: RedisServer, redis: Redis
) -> None:
    """A deleted stream, and a removed group: nothing is left out, and nothing comes twice."""
    add(redis, 1, 2, 3)
    async with running(sources=[table(server)]) as daemon, reading(daemon) as reader:
        await received(reader, 3)
        redis.delete("orders")
        await until(lambda: figures(daemon).state == "missing")
        for number in (4, 5):
            redis.xadd("orders", {"data": number}, id=f"{number}-0")
        found = await received(reader, 2)
        redis.xgroup_destroy("orders", "clevrd-orders")
        add(redis, 6)
        found += await received(reader, 1)
        redis.delete("orders")
        add(redis, 7)
        found += await received(reader, 1)
        await until(lambda: figures(daemon).lag == 0)

    assert [each["data"] for each in found] == [4, 5, 6, 7]
    assert (figures(daemon).taken, figures(daemon).lost) == (7, 0)


# --- trouble -------------------------------------------------------------------------------------


async def test_server_that_is_away_is_shown_and_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The daemon serves meanwhile and is healthy; the source goes on by itself."""
    own = RedisServer(tmp_path / "redis")
    try:
        async with running(sources=[table(own)]) as daemon, reading(daemon) as reader:
            await until(lambda: figures(daemon).errors >= 2)
            assert figures(daemon).state == "away"
            assert (await daemon.get_json("/health"))["status"] == "healthy"
            own.start()
            with own.client as client:
                add(client, 1)
            assert (await received(reader, 1))[0]["data"] == 1
            own.kill()
            await until(lambda: figures(daemon).state == "away")
            own.start()
            with own.client as client:
                add(client, 2)
            assert (await received(reader, 1))[0]["data"] == 2
    finally:
        own.kill()
    told = [each.getMessage() for each in caplog.records if "source away" in each.getMessage()]
    assert len(told) == 2
    assert all("can't be reached" in each for each in told)


async def test_server_that_refuses_says_why(
    server: RedisServer, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """A wrong password, rights that are missing, and a key that is no stream."""
    redis.set("text", "1")
    redis.acl_setuser(
        "few", enabled=True, passwords=["+secret"], keys=["*"], commands=["+@connection", "+info"]
    )
    places = {
        "password": f"redis://nobody:wrong@127.0.0.1:{server.port}/orders",
        "rights": f"redis://few:secret@127.0.0.1:{server.port}/orders",
        "kind": f"{server.url}/text",
        "database": f"{server.url}/99/orders",
    }
    sources = [table(server, name=name, url=url) for name, url in places.items()]
    async with running(sources=sources) as daemon:
        await until(lambda: all(figures(daemon, index).state == "refused" for index in range(4)))
        errors = [figures(daemon, index).last_error for index in range(4)]

    assert "refuses the user or the password" in errors[0]
    assert "an ACL for it is: ~clevrd:source:* ~STREAM" in errors[1]
    assert "The key 'text' in Redis" in errors[2]
    assert "is no stream" in errors[2]
    assert "the number of one that it has" in errors[3]
    assert "secret" not in caplog.text
    assert ":wrong" not in caplog.text


async def test_server_that_is_too_old_is_refused(
    server: RedisServer, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis 6 does not say how many entries a stream ever had."""
    fields_of = redis_stream._fields_of

    def of_redis_6(flat: Any) -> dict[bytes, Any]:
        return {name: each for name, each in fields_of(flat).items() if name != b"entries-added"}

    monkeypatch.setattr(redis_stream, "_fields_of", of_redis_6)
    add(redis, 1)
    async with running(sources=[table(server)]) as daemon:
        await until(lambda: figures(daemon).state == "refused")
        assert "older than 7.0, which a source needs; update it." in figures(daemon).last_error


async def test_documented_rights_are_enough(server: RedisServer, redis: Redis) -> None:
    """A user with the rules of the sentence reads a source."""
    from clevrd.sources.redis_stream import ACL_RULES

    rules = ACL_RULES.replace("STREAM", "orders").split()
    run: Any = redis.execute_command
    run("ACL", "SETUSER", "reader", "on", ">secret", *rules)
    add(redis, 1)
    source = table(server, url=f"redis://reader:secret@127.0.0.1:{server.port}/orders")
    async with running(sources=[source]) as daemon, reading(daemon) as reader:
        assert (await received(reader, 1))[0]["data"] == 1


async def test_refused_publishes_stop_the_reading_and_go_on(
    server: RedisServer, redis: Redis
) -> None:
    """At a limit on topics nothing behind is taken, and nothing is lost when there is room."""
    add(redis, {"t": "a", "n": 1}, {"t": "b", "n": 2}, {"t": "b", "n": 3})
    source = table(server, topic="{/t}")
    async with running(sources=[source], max_topics_per_tenant=1, topic_idle_s=2.0) as daemon:
        await until(lambda: figures(daemon).state == "waiting")
        assert (figures(daemon).taken, figures(daemon).refused >= 1) == (1, True)
        assert "max_topics_per_tenant" in figures(daemon).last_error.lower()
        await until(lambda: figures(daemon).taken == 3)
        await until(lambda: figures(daemon).state == "reading")
        async with reading(daemon, "b") as reader:
            found = await received(reader, 2)

    assert [each["data"]["n"] for each in found] == [2, 3]
    assert figures(daemon).dead == 0


async def test_stop_while_publishes_are_refused_keeps_the_position_before_them(
    server: RedisServer, redis: Redis
) -> None:
    """What was taken is not read again, and what was not comes after the restart."""
    add(redis, {"t": "a", "n": 1}, {"t": "b", "n": 2})
    source = table(server, topic="{/t}")
    async with running(sources=[source], max_topics_per_tenant=1) as daemon:
        await until(lambda: figures(daemon).state == "waiting")
    async with running(sources=[source]) as daemon:
        await until(lambda: figures(daemon).lag == 0)

    assert figures(daemon).taken == 1


# --- a journal that takes its time ---------------------------------------------------------------


async def test_records_are_read_while_the_journal_has_those_before_on_their_way(
    server: RedisServer, redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to a bound, and each is one message, in order; the position is behind all at the end."""
    goes_on = hold_journal(monkeypatch)
    add(redis, *range(3_000))
    journal = {"directory": str(tmp_path / "journal")}
    async with running(sources=[table(server)], journal_table=journal) as daemon:
        await until(lambda: under_way(daemon) > MAX_UNDER_WAY)
        assert under_way(daemon) <= MAX_UNDER_WAY + 256
        assert (figures(daemon).taken, figures(daemon).position) == (0, "0-0")
        goes_on.set()
        await until(lambda: figures(daemon).lag == 0)
        async with reading(daemon) as reader:
            found = await received(reader, 3_000)

    assert [each["data"] for each in found] == list(range(3_000))
    assert (figures(daemon).taken, figures(daemon).repeated, figures(daemon).lost) == (3_000, 0, 0)
    (group,) = redis.xinfo_groups("orders")
    assert (group["entries-read"], group["lag"]) == (3_000, 0)


async def test_records_trimmed_behind_those_on_their_way_are_counted_exactly(
    server: RedisServer, redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those on their way are messages all the same, and no loss."""
    goes_on = hold_journal(monkeypatch)
    added = add(redis, *range(3_000))
    journal = {"directory": str(tmp_path / "journal")}
    async with running(sources=[table(server)], journal_table=journal) as daemon:
        await until(lambda: under_way(daemon) > MAX_UNDER_WAY)
        # Behind all that can be on their way: a read that has begun adds its records still.
        redis.xtrim("orders", minid=added[1_000], approximate=False)
        goes_on.set()
        await until(lambda: figures(daemon).taken + figures(daemon).lost == 3_000)
        async with reading(daemon) as reader:
            found = await received(reader, figures(daemon).taken)

    taken = 1_000 - figures(daemon).lost
    assert MAX_UNDER_WAY < taken < 1_000
    assert [each["data"] for each in found] == [*range(taken), *range(1_000, 3_000)]
    assert figures(daemon).repeated == 0


# --- several processes, and kills ----------------------------------------------------------------


async def test_one_node_reads_and_another_takes_over(
    server: RedisServer, redis: Redis, tmp_path: Path
) -> None:
    """Two nodes on one journal: each record is one message, in order, over a node's end."""
    journal = {"url": server.url, "partitions": 1}
    source = table(server)
    async with running(sources=[source], journal_table=journal) as one:
        add(redis, *range(100))
        await until(lambda: figures(one).state == "reading")
        async with (
            running(sources=[source], journal_table=journal) as two,
            reading(two) as reader,
        ):
            await until(lambda: figures(two).state == "standby")
            add(redis, *range(100, 300))
            await until(lambda: figures(one).taken >= 150)
            await one.server.crash()
            add(redis, *range(300, 400))

            found = await received(reader, 400)
            await until(lambda: figures(two).lag == 0)

    assert [each["data"] for each in found] == list(range(400))
    assert figures(two).taken >= 100
