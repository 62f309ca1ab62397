"""The JavaScript client with tokens that last a second, in a real Chromium and in Node."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from browsers import chromium, in_page, page_at, until_page
from keys import READER, WEB, rules
from nodes import in_node, make_project
from playwright.async_api import Browser, Page
from tokens import Issuer, token, trusting

from clevrd.client import Client
from clevrd.tenants.settings import read_access

pytestmark = pytest.mark.asyncio(loop_scope="module")

# Follows topics by tokens that the test gives out; seen and the end are the page's to ask for.
FOLLOW = """
const { Clevrd } = await import("/clevrd.js");
Object.assign(globalThis, { seen: [], statuses: [], end: null });
globalThis.client = new Clevrd(undefined, { token: text ?? (() => globalThis.fresh()) });
const onStatus = ({ status, code }) => statuses.push(code ?? status);
const follow = async () => {
    for await (const event of client.subscribe(topics, { last: 0, onStatus })) {
        if (event.data === "end") break;
        seen.push([event.type, event.topic, event.data]);
    }
};
follow().then(
    () => (end = "left"),
    ({ message, status, code, closeCode }) => (end = { message, status, code, closeCode }),
);
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    """Return a Chromium."""
    async with chromium() as found:
        yield found


async def follow(page: Page, topics: list[str], text: str | None = None) -> None:
    await in_page(page, FOLLOW, topics=topics, text=text)
    await until_page(page, "statuses.includes('open') || end !== null")


async def value(page: Page, expression: str) -> Any:
    return json.loads(await page.evaluate(f"JSON.stringify({expression})"))


async def test_nothing_is_lost_while_tokens_end(browser: Browser, tmp_path: Path) -> None:
    """Over one connection, which is renewed in place; the page's publishes take fresh ones too."""
    issuer = Issuer(1.0)
    async with trusting(tmp_path) as daemon, page_at(browser, daemon.url, script="") as page:
        await page.expose_function("fresh", issuer)
        await follow(page, ["orders.eu", "orders.us"])
        sent = await in_page(
            page,
            """const stream = client.publishStream();
            const until = Date.now() + 4000;
            let count = 0;
            for (; Date.now() < until; count++) {
                await stream.ready;
                stream.publish("orders.eu", count);
                await client.publish("orders.us", count);
                await new Promise((go) => setTimeout(go, 5));
            }
            await stream.close();
            await client.publish("orders.us", "end");
            return count;""",
        )
        await until_page(page, "end !== null")
        seen, statuses = await value(page, "seen"), await value(page, "statuses")

    for topic in ("orders.eu", "orders.us"):
        found = [(kind, data) for kind, of, data in seen if of == topic]
        assert found == [("message", number) for number in range(sent)]
    assert statuses == ["connecting", "open", "closed"]
    assert 3 <= len(issuer.tokens) < 20


async def test_token_that_can_not_be_renewed_comes_back(browser: Browser, tmp_path: Path) -> None:
    """A token without a time of its own in the page's eyes ends by 4102, and nothing is lost."""
    issuer = Issuer(1.0)
    # A page that reads no token: each connection lasts until the daemon ends it.
    blind = "globalThis.atob = () => { throw new Error('none'); };"
    async with (
        trusting(tmp_path) as daemon,
        Client(daemon.url, token=token(60)) as writer,
        page_at(browser, daemon.url, script=blind) as page,
    ):
        await page.expose_function("fresh", issuer)
        await follow(page, ["orders.eu"])
        for number in range(150):
            await writer.publish("orders.eu", number)
            await asyncio.sleep(0.02)
        await writer.publish("orders.eu", "end")
        await until_page(page, "end !== null")
        seen, statuses = await value(page, "seen"), await value(page, "statuses")

    assert [data for _, _, data in seen] == list(range(150))
    assert statuses.count(4102) >= 2


@pytest.mark.parametrize(
    ("secret", "status"),
    [("nonsense", 401), (WEB.secret, 403)],
    ids=["unknown", "not permitted"],
)
async def test_refused_credential_ends_the_loop(
    browser: Browser, tmp_path: Path, secret: str, status: int
) -> None:
    """A text at once, and a permission that is missing; in the daemon's words."""
    async with trusting(tmp_path) as daemon, page_at(browser, daemon.url, script="") as page:
        await follow(page, ["secrets"], text=secret)
        await until_page(page, "end !== null")
        end = await value(page, "end")

    assert end["code"] == ("unauthorized" if status == 401 else "forbidden")
    assert secret not in json.dumps(end)


async def test_function_is_asked_once_more_after_401(browser: Browser, tmp_path: Path) -> None:
    """By a handshake and a publish; the second refusal is thrown."""
    answers = ["bad", READER.secret]
    asked: list[str] = []

    def fresh() -> str:
        asked.append(answers.pop(0) if answers else "nonsense")
        return asked[-1]

    async with trusting(tmp_path) as daemon, page_at(browser, daemon.url, script="") as page:
        await page.expose_function("fresh", fresh)
        await follow(page, ["news"])
        await until_page(page, "statuses.includes('open')")
        assert len(asked) == 2
        answers.clear()
        refused = await in_page(
            page,
            """const { Clevrd } = await import("/clevrd.js");
            const other = new Clevrd(undefined, { token: () => globalThis.fresh() });
            const why = ({ status, code }) => [status, code];
            return other.publish("orders.eu", 1).then(String, why);""",
        )
        assert (refused, len(asked)) == ([401, "unauthorized"], 4)


async def test_revoked_key_ends_the_loop(browser: Browser, tmp_path: Path) -> None:
    """4001 is thrown with its code."""
    async with trusting(tmp_path) as daemon, page_at(browser, daemon.url, script="") as page:
        await follow(page, ["news"], text=WEB.secret)
        without = {**rules(), "tenants": rules()["tenants"][1:]}
        await daemon.server.access.apply(read_access(without, "a test"), Path())
        await until_page(page, "end !== null")

        assert (await value(page, "end"))["closeCode"] == 4001


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the client in node_modules."""
    return make_project(tmp_path_factory.mktemp("node"))


@pytest.mark.parametrize("kind", ["ws", "native"])
async def test_node_leaves_no_timer_and_shows_it_over_both(
    project: Path, tmp_path: Path, kind: str
) -> None:
    """A renewal that is a minute away keeps no process from ending."""
    async with trusting(tmp_path) as daemon:
        said = await in_node(
            project,
            """const client = new Clevrd(given.url, { WebSocket, token: async () => given.token });
            await client.publish("news", 1);
            for await (const event of client.subscribe("news", { last: 1 })) {
                tell(event.data);
                break;
            }
            const of = (token) => new Clevrd(given.url, { WebSocket, token, retryForMs: 0 });
            tell(await said(of(() => undefined).publish("news", 1)));
            tell(await said(of(() => { throw new Error("secret"); }).publish("news", 1)));
            try { of("a b"); } catch (error) { tell(String(error)); }""",
            kind=kind,
            url=daemon.url,
            token=token(60),
        )

    assert said == [
        1,
        "TypeError: The token function must return 1 to 5,600 visible ASCII characters, without"
        " spaces.",
        "ClevrdError: The token function failed.",
        "TypeError: token must be 1 to 5,600 visible ASCII characters, without spaces, or a"
        " function that returns them.",
    ]
