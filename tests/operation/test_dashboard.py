"""The live page in a real Chromium: what it shows, asks for, survives, and who can read it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio
from browsers import chromium, page_at
from daemons import running, until
from http_wire import ask, get
from keys import ADMIN, READER, access
from playwright.async_api import Browser, Error, Page, Route, expect
from ports import free_port

from clevrd.core.topic_totals import Totals

# One Chromium for all: starting it takes longer than most of the tests.
pytestmark = pytest.mark.asyncio(loop_scope="module")

AXE: Final = Path(__file__).parents[1] / "javascript/node_modules/axe-core/axe.min.js"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    """Return a Chromium."""
    async with chromium() as found:
        yield found


@asynccontextmanager
async def looking(browser: Browser, url: str) -> AsyncIterator[Page]:
    """Open the live page at ``url``; fail where the browser reports anything about it."""
    async with page_at(browser, f"{url}/dashboard") as page:
        told: list[str] = []
        page.on("console", lambda message: told.append(message.text))
        yield page
        # Refused and failed requests are what some of the tests are about.
        assert [text for text in told if "Failed to load resource" not in text] == []


async def shows(page: Page, selector: str, text: str) -> None:
    """Wait until the element has ``text``."""
    # In a world of its own: the page's policy lets nobody evaluate text in it.
    await expect(page.locator(selector)).to_contain_text(text, timeout=15_000)


async def test_page_is_one_file_that_may_ask_its_own_server_alone() -> None:
    """No build step, no other host: its policy would let nothing else happen."""
    async with running() as daemon:
        answer = await ask(daemon.port, get("/dashboard"))

    assert answer.status == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert (
        b"//" not in answer.body.replace(b"http://www.w3.org/2000/svg", b"").split(b"<script", 1)[0]
    )


async def test_figures_are_live(browser: Browser) -> None:
    """Totals, rates, tables and the state follow what happens, and nothing is asked elsewhere."""
    async with running() as daemon, daemon.http.ws_connect(f"{daemon.url}/subscribe?topic=o"):
        await daemon.publish("o", 1)
        async with looking(browser, daemon.url) as page:
            asked: list[str] = []
            page.on("request", lambda request: asked.append(request.url))
            await shows(page, "#state", "healthy")
            await shows(page, "#charts", "1 in all")
            await shows(page, "#tables", "default-tenant")
            await shows(page, "#reason-title", "not throttled")

            for number in range(41):
                await daemon.publish("busy", number)

            await shows(page, "#charts", "42 in all")
            await shows(page, "#tables", "busy")
            for reason in Totals().lost:
                await shows(page, "#charts", reason.replace("_", " "))
            label = await page.locator("#charts svg").first.get_attribute("aria-label")
            assert label is not None
            assert label.startswith("Published: messages ")
            assert all(url.startswith(daemon.url) for url in asked)


async def test_page_survives_a_restart_of_the_daemon(browser: Browser) -> None:
    """It says since when there is no answer, and goes on with the next process by itself."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    async with running(address=address) as daemon:
        for number in range(3):
            await daemon.publish("o", number)
        opened = looking(browser, daemon.url)
        page = await opened.__aenter__()
        await shows(page, "#charts", "3 in all")
    try:
        await shows(page, "#state", "asking again")
        async with running(address=address) as daemon:
            await daemon.publish("o", 1)
            await shows(page, "#state", "healthy")
            await shows(page, "#charts", "1 in all")
            await shows(page, "#about", "restarted at")
    finally:
        await opened.__aexit__(None, None, None)


async def test_page_asks_for_a_key_and_says_what_is_wrong_with_it(browser: Browser) -> None:
    """A credential is asked for where one is required, and one without admin will not do."""
    async with running(access=access()) as daemon, looking(browser, daemon.url) as page:
        await page.wait_for_selector("#ask:not([hidden])")
        assert not await page.is_visible("#figures")

        await page.fill("#key", READER.secret)
        await page.press("#key", "Enter")
        await shows(page, "#why", "admin")
        assert not await page.is_visible("#figures")

        await page.fill("#key", ADMIN.secret)
        await page.press("#key", "Enter")
        await page.wait_for_selector("#figures:not([hidden])")
        assert not await page.is_visible("#ask")
        assert ADMIN.secret not in await page.content()
        # The tenant's topics are read and published to with the same key.
        await page.fill("#tail-topic", "orders.new")
        await page.press("#tail-topic", "Enter")
        await shows(page, "#tail-state", "reading orders.new")
        await page.fill("#publish-topic", "orders.new")
        await page.press("#publish-topic", "Enter")
        await shows(page, "#messages", '#1 {"hello":1}')


async def test_topics_and_patterns_are_read_and_published_to_by_keyboard(browser: Browser) -> None:
    """Messages appear as text, gaps are told, and a mistake in the data is named."""
    async with running() as daemon, looking(browser, daemon.url) as page:
        await page.wait_for_selector("#try:not([hidden])")
        await page.focus("#tail-topic")
        await page.keyboard.type("orders.**")
        await page.keyboard.press("Enter")
        await shows(page, "#tail-state", "reading orders.**")
        await page.focus("#publish-topic")
        await page.keyboard.type("orders.eu.new")
        await page.keyboard.press("Tab")
        await page.keyboard.press("Tab")
        await page.keyboard.press("Control+A")
        await page.keyboard.type('"<img src=x>"')
        await page.keyboard.press("Tab")
        await page.keyboard.press("Enter")

        await shows(page, "#publish-state", "Published as #1, to 1 subscribers.")
        await shows(page, "#messages", 'orders.eu.new #1 "<img src=x>"')
        assert await page.locator("#messages img").count() == 0

        cleared = f"{daemon.url}/admin/messages?topic=orders.eu.new"
        async with daemon.http.delete(cleared) as answer:
            assert answer.status == 200
        await shows(page, "#messages", "orders.eu.new: unknown many messages are missing (epoch)")
        await page.fill("#publish-data", "{no json")
        await page.click("#publish-form button")
        await shows(page, "#publish-state", "The data is no JSON")

        await page.click("#tail-button")
        await until(lambda: sum(topic.subscribers for topic in daemon.hub.topics) == 0)
        assert await page.inner_text("#tail-button") == "Read"


async def test_state_is_explained(browser: Browser) -> None:
    """While publishers wait the page says why, for whom, and how long; and of a journal alike."""
    changes: dict[str, Any] = {
        "throttler_metrics": {
            "is_throttling": True,
            "reason": "9 of 10 subscribers are slow",
            "throttled_topics": 1,
            "throttled": ["default-tenant:o"],
            "delay_ms": 12.5,
        }
    }

    async def change(route: Route) -> None:
        # A request that is under way when the page goes has no answer any more.
        with suppress(Error):
            answer = await route.fetch()
            view = await answer.json()
            for name, fields in changes.items():
                view["figures"].setdefault(name, {}).update(fields)
            await route.fulfill(json=view)

    async with running() as daemon, looking(browser, daemon.url) as page:
        await page.route("**/admin/top?*", change)
        await shows(page, "#reason-title", "Publishers are throttled")
        await shows(page, "#reason-text", "9 of 10 subscribers are slow. It concerns 1 topics")
        await shows(page, "#reason-text", "Each publish waits 13 ms")

        changes["throttler_metrics"] = {"is_throttling": False, "throttled_topics": 0}
        changes["journal"] = {"state": "unavailable", "engine": "redis", "nodes": 2}
        await shows(page, "#reason-title", "The journal is unavailable")
        await shows(page, "#tables", "redis")

        changes["journal"] = {"state": "ok"}
        changes["memory_ladder"] = {"state": "no_new_subscribers", "limit": "max_memory_mb"}
        await shows(page, "#reason-title", "Memory is short: no new subscribers")
        await page.unroute_all(behavior="wait")


@pytest.mark.parametrize(("scheme", "width"), [("dark", 360), ("light", 1280), ("light", 320)])
async def test_page_is_readable_by_everybody(browser: Browser, scheme: Any, width: int) -> None:
    """On a phone nothing is cut off; labels, roles, order and contrast are as WCAG 2.2 AA wants."""
    if not AXE.exists():
        pytest.skip("axe-core is not installed: make node")
    async with running() as daemon:
        await daemon.publish("a.topic.with.a.long.name.that.does.not.fit.on.a.phone", 1)
        await daemon.http.post(f"{daemon.url}/publish", data=b'{"topic":""}')
        async with looking(browser, daemon.url) as page:
            await page.emulate_media(color_scheme=scheme)
            await page.set_viewport_size({"width": width, "height": 800})
            await shows(page, "#tables", "a.topic.with")
            # The rule of a decision is what an operator has to see without scrolling to a side.
            left, right = await page.evaluate(
                "(({ left, right }) => [left, right])"
                "(document.querySelector('#tables td.text').getBoundingClientRect())"
            )
            assert 0 <= left < right <= width

            wide = await page.evaluate("document.documentElement.scrollWidth - innerWidth")
            await page.evaluate(AXE.read_text())
            found = await page.evaluate(
                "axe.run({ runOnly: ['wcag2a', 'wcag2aa', 'wcag21aa', 'wcag22aa',"
                " 'best-practice'] })"
            )

        faults = [
            (fault["id"], [each["html"] for each in fault["nodes"]])
            for fault in found["violations"]
        ]
        assert (wide <= 0, faults) == (True, [])


async def test_screen_reader_is_told_of_the_state_and_not_of_each_figure(browser: Browser) -> None:
    """Figures change every two seconds; only what a person waits for is announced."""
    async with running() as daemon, looking(browser, daemon.url) as page:
        await shows(page, "#state", "healthy")

        live = page.locator("[aria-live], output, [role=status], [role=alert], [role=log]")
        told = [await each.get_attribute("id") for each in await live.all()]

    assert told == ["state", "tail-state", "publish-state"]


# The contrast of two colours, as WCAG 2.2 defines it.
CONTRAST: Final = """([one, two]) => {
    const light = (text) => {
        const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map((each) => each / 255)
            .map((each) => (each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const [low, high] = [light(one), light(two)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
}"""


@pytest.mark.parametrize("scheme", ["dark", "light"])
async def test_fields_and_their_hints_are_seen_by_everybody(browser: Browser, scheme: Any) -> None:
    """WCAG 2.2 1.4.11 and 1.4.3, of which axe-core looks at neither edges nor placeholders."""
    async with running() as daemon, looking(browser, daemon.url) as page:
        await page.emulate_media(color_scheme=scheme)
        await page.wait_for_selector("#try:not([hidden])")

        edge, field, card, hint = await page.locator("#tail-tenant").evaluate(
            "(field) => [getComputedStyle(field).borderTopColor,"
            " getComputedStyle(field).backgroundColor,"
            " getComputedStyle(field.closest('section')).backgroundColor,"
            " getComputedStyle(field, '::placeholder').color]"
        )
        contrasts = [
            await page.evaluate(CONTRAST, [one, two])
            for one, two in ((edge, field), (edge, card), (hint, field))
        ]

    assert contrasts[0] >= 3
    assert contrasts[1] >= 3
    assert contrasts[2] >= 4.5


async def test_page_is_at_the_address_for_operators_too(browser: Browser) -> None:
    """There it needs no key, and offers nothing to publish to."""
    async with (
        running(access=access(), admin_address="127.0.0.1:0") as daemon,
        looking(browser, daemon.server.admin_addresses[0]) as page,
    ):
        await shows(page, "#state", "healthy")
        assert not await page.is_visible("#try")


async def test_page_of_a_daemon_that_hangs_says_so(browser: Browser) -> None:
    """An answer that never comes is given up, and asked for again."""
    async with running() as daemon, looking(browser, daemon.url) as page:
        await shows(page, "#state", "healthy")

        async def hang(route: Route) -> None:
            await asyncio.sleep(0)
            await route.abort("timedout")

        await page.route("**/admin/top?*", hang)
        await shows(page, "#state", "no answer since")
        await page.unroute("**/admin/top?*")
        await shows(page, "#state", "healthy")
