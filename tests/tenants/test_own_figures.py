"""/metrics and the home page over real sockets: operators see all, a tenant what is its own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from clients import client_of
from daemons import Daemon, running
from keys import ADMIN, OTHER, READER, WEB, WRITER, access, bearer

from clevrd.tenants.keys import NewKey, new_key

TENANT_FIELDS = {
    "tenant_id",
    "total_topics",
    "total_subscribers",
    "slow_subscribers",
    "open_circuits",
    "topics",
    "messages",
}


@pytest_asyncio.fixture
async def daemon() -> AsyncIterator[Daemon]:
    async with running(access=access()) as daemon:
        await fill(daemon)
        yield daemon


async def fill(daemon: Daemon) -> None:
    """Publish to topics of two tenants."""
    for topic, times in (("orders.eu", 3), ("orders.us", 1), ("payroll", 6)):
        for number in range(times):
            await daemon.publish(topic, number, **bearer(WRITER))
    await daemon.publish("secret-plans", 1, **bearer(OTHER))


async def look(
    daemon: Daemon, path: str = "/metrics", made: NewKey | None = None, /, **fields: str
) -> tuple[int, str]:
    """GET ``path`` with a key; return the status and the body."""
    headers = {name.replace("_", "-"): value for name, value in fields.items()}
    headers |= bearer(made) if made else {}
    async with daemon.http.get(f"{daemon.url}{path}", headers=headers) as answer:
        return answer.status, await answer.text()


async def figures(daemon: Daemon, made: NewKey, path: str = "/metrics") -> dict[str, Any]:
    status, text = await look(daemon, path, made)
    assert status == 200, text
    found: dict[str, Any] = json.loads(text)
    return found


def names(found: dict[str, Any]) -> list[str]:
    return [topic["name"] for topic in found["topics"]]


async def test_admin_sees_all_tenants(daemon: Daemon) -> None:
    """And what is the whole daemon's."""
    found = await figures(daemon, ADMIN)

    assert names(found)[:2] == ["acme:payroll", "acme:orders.eu"]
    assert "other:secret-plans" in names(found)
    assert found["messages"]["published"] == 11
    assert "process" in found


async def test_tenant_sees_its_own(daemon: Daemon) -> None:
    """Its topics, the busiest first, and their sums; no figure is another's or the machine's."""
    url = f"{daemon.ws_url}/subscribe?topic=orders.eu&last=0"
    async with client_of(url, additional_headers=bearer(READER)):
        await daemon.publish("orders.eu", 4, **bearer(WRITER))

        found = await figures(daemon, READER)
        other = await figures(daemon, OTHER)

    assert set(found) == TENANT_FIELDS
    assert (found["tenant_id"], found["total_topics"], found["total_subscribers"]) == ("acme", 3, 1)
    assert names(found) == ["acme:payroll", "acme:orders.eu", "acme:orders.us"]
    messages = found["messages"]
    assert messages["published"] == 11
    waiting = messages["discarded"] + messages["queued"] + sum(messages["dropped"].values())
    assert messages["offered"] == messages["delivered"] + waiting == 1
    assert (other["tenant_id"], names(other)) == ("other", ["other:secret-plans"])
    assert other["messages"]["published"] == 1


async def test_key_sees_the_topics_that_it_may_use(daemon: Daemon) -> None:
    """Not the names, and not the sums, of what else its tenant has."""
    found = await figures(daemon, WEB)

    assert names(found) == ["acme:orders.eu", "acme:orders.us"]
    assert (found["total_topics"], found["messages"]["published"]) == (2, 4)
    assert "payroll" not in json.dumps(found)


async def test_number_of_topics_is_asked_for(daemon: Daemon) -> None:
    """As an operator may; the sums are over all of them."""
    found = await figures(daemon, READER, "/metrics?topics=1")
    none = await figures(daemon, READER, "/metrics?topics=0")
    status, _ = await look(daemon, "/metrics?topics=x", READER)

    assert names(found) == ["acme:payroll"]
    assert (found["total_topics"], none["topics"], none["total_topics"]) == (3, [], 3)
    assert status == 400


async def test_many_topics_are_taken_in_steps(daemon: Daemon) -> None:
    """More topics than one step looks at, all of them summed up, the busiest first."""
    lines = b"\n".join(
        json.dumps({"topic": f"t{number}", "data": 1}).encode() for number in range(1_500)
    )
    for _ in range(2):
        async with daemon.http.post(
            f"{daemon.url}/publish/batch", data=lines, headers=bearer(WRITER)
        ) as answer:
            assert answer.status == 200

    found = await figures(daemon, READER, "/metrics?topics=1200")

    assert (found["total_topics"], len(found["topics"])) == (1_503, 1_200)
    assert found["messages"]["published"] == 3_010
    published = [topic["messages_published"] for topic in found["topics"]]
    assert published == sorted(published, reverse=True)


@pytest.mark.parametrize("form", ["text/plain", "application/openmetrics-text"])
async def test_prometheus_needs_the_admin_permission(daemon: Daemon, form: str) -> None:
    """A tenant's own sums may fall, which a counter may not."""
    status, text = await look(daemon, "/metrics", READER, Accept=form)
    served, all_of_it = await look(daemon, "/metrics", ADMIN, Accept=form)

    assert (status, json.loads(text)["code"]) == (403, "forbidden")
    assert "admin" in text
    assert served == 200
    assert "clevrd_topics 4.0" in all_of_it


async def test_required_mode_shows_a_local_client_nothing(daemon: Daemon) -> None:
    """The machine may have many users; the key decides."""
    status, text = await look(daemon)

    assert (status, json.loads(text)["code"]) == (401, "unauthorized")


# --- the open mode -------------------------------------------------------------------------------


async def test_open_daemon_shows_this_machine_everything() -> None:
    """Over loopback and over a Unix socket."""
    async with running() as daemon:
        await daemon.publish("a", 1)
        await daemon.publish("b", 1, **{"X-Tenant-ID": "other"})

        found = await daemon.get_json("/metrics")

    assert sorted(names(found)) == ["default-tenant:a", "other:b"]


async def test_open_daemon_shows_a_unix_socket_everything(tmp_path: Path) -> None:
    """Whoever may open the file is on this machine."""
    path = f"{tmp_path}/s"
    async with running(address="127.0.0.1:0", admin_address=f"unix:{path}") as daemon:
        assert daemon.server.admin_addresses == [f"unix:{path}"]
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(path)) as http,
            http.get("http://localhost/metrics") as answer,
        ):
            assert answer.status == 200
            assert "process" in await answer.json()
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "fields",
    [{"X_Forwarded_For": "127.0.0.1"}, {"Via": "1.1 proxy"}, {"Host": "evil.example:8080"}],
)
async def test_open_daemon_shows_others_nothing(fields: dict[str, str]) -> None:
    """Through a proxy on this machine, or from a page whose name means 127.0.0.1."""
    # The page's name is listed, or the check of pages would refuse it first.
    async with running(allowed_origins="http://evil.example:8080") as daemon:
        await daemon.publish("a", 1)

        status, text = await look(daemon, "/metrics", None, **fields)
        home, page = await look(daemon, "/", None, **fields)

        assert (status, json.loads(text)["code"]) == (403, "forbidden")
        for way in ("permission admin", "admin_address", "localhost"):
            assert way in text
        assert daemon.hub.counters.refused["forbidden"] == 1
        assert home == 200
        assert "Topics of" not in page


async def test_keys_count_in_the_open_mode_too() -> None:
    """Wherever the request comes from: a key says who asks."""
    async with running(access=access("open")) as daemon:
        await fill(daemon)
        from_afar = {"X_Forwarded_For": "203.0.113.7"}

        _, own = await look(daemon, "/metrics", READER, **from_afar)
        _, everything = await look(daemon, "/metrics", ADMIN, **from_afar)
        here, local = await look(daemon)
        wrong, _ = await look(daemon, "/metrics", new_key())

    assert json.loads(own)["tenant_id"] == "acme"
    assert json.loads(everything)["total_topics"] == 4
    assert (here, json.loads(local)["total_topics"]) == (200, 4)
    assert wrong == 401


# --- the home page -------------------------------------------------------------------------------


async def test_home_page_lists_topics_that_may_be_read(daemon: Daemon) -> None:
    """Of the key's tenant, and only those that the key may subscribe to."""
    _, reader = await look(daemon, "/", READER)
    _, web = await look(daemon, "/", WEB)
    _, writer = await look(daemon, "/", WRITER)

    assert "Topics of acme now, 3 of 3:\n    payroll    messages: 6, subscribers: 0\n" in reader
    assert "orders.eu    messages: 3" in web
    assert "payroll" not in web
    assert "Topics of" not in writer
    for page in (reader, web, writer):
        assert "secret-plans" not in page


async def test_home_page_without_a_credential_is_the_text_alone(daemon: Daemon) -> None:
    """Also with a wrong one: a person sees how to go on."""
    for made in (None, new_key()):
        status, page = await look(daemon, "/", made)

        assert status == 200
        assert "Subscribe to a topic" in page
        assert "Topics of" not in page


async def test_home_page_of_an_open_daemon_is_escaped() -> None:
    """A topic's name may look like HTML; a client on this machine sees the default tenant's."""
    async with running() as daemon:
        await daemon.publish("<script>alert(1)</script>", 1)
        await daemon.publish("b", 1, **{"X-Tenant-ID": "other"})

        _, page = await look(daemon, "/", Accept="text/html")

    assert "&lt;script&gt;alert(1)&lt;/script&gt;    messages: 1" in page
    assert "<script>" not in page
    assert "Topics of default-tenant now, 1 of 1" in page


async def test_home_page_lists_twenty() -> None:
    """The busiest; the rest is only counted."""
    async with running() as daemon:
        for number in range(25):
            await daemon.publish(f"topic-{number}", 1)
        await daemon.publish("topic-24", 1)

        _, page = await look(daemon, "/")

    assert "now, 20 of 25:\n    topic-24    messages: 2," in page
    assert page.count("messages: ") == 20


async def test_draining_daemon_still_shows_figures(daemon: Daemon) -> None:
    """Operators look at it most then."""
    daemon.hub.is_draining = True

    async with asyncio.timeout(10):
        found = await figures(daemon, READER)

    assert found["total_topics"] == 3
