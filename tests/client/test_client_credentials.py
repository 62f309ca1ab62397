"""The client's credential: presented everywhere, renewed in time, and told nowhere.

Against the fake server; real daemons, with tokens that last a second, are in
test_client_tokens_e2e.py.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import traceback
from base64 import urlsafe_b64encode
from collections.abc import Callable
from math import inf
from typing import Any

import pytest
from fake_server import Answer, FakeServer, Feed, failure, message, refusal, subscribed, watching

from clevrd.client import (
    BadAnswer,
    BadUrl,
    Client,
    ClientError,
    Closed,
    Message,
    NoToken,
    Refused,
    Unauthorized,
    sync,
)
from clevrd.client.credential import Credential, life_s, renewal_s

KEY = "clevrd_canary0123456789"


def jwt_of(**claims: Any) -> str:
    """Return what has the form of a token; nothing verifies it here."""
    parts = ({"alg": "HS256"}, claims)
    head, payload = (urlsafe_b64encode(json.dumps(part).encode()).decode() for part in parts)
    return f"{head.rstrip('=')}.{payload.rstrip('=')}.c2ln"


class Issuer:
    """Returns tokens t1, t2 and so on, or what it is told to."""

    def __init__(self, *answers: Any) -> None:
        self.calls = 0
        self._answers = list(answers)

    def __call__(self) -> str:
        """Return the next token, or raise."""
        self.calls += 1
        answer = self._answers.pop(0) if self._answers else f"t{self.calls}"
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def later(self) -> str:
        """Return the next token, after other tasks had a turn."""
        await asyncio.sleep(0)
        return self()


def shown(server: FakeServer) -> list[str | None]:
    """Return the credential of each request."""
    return [request.headers.get("Authorization") for request in server.requests]


def unauthorized() -> Answer:
    return refusal(401, "The token has expired.")


# --- presenting ---


async def test_every_transport_presents_it(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """In one header: publishes, batches, a topic's WebSocket and that of several topics."""
    server.feeds.append(Feed([subscribed("e", 0)], has_control=True))
    server.feeds.append(Feed([watching("p.*", 1)], has_control=True, commands=1))
    async with new_client(token=KEY) as client:
        await client.publish("t", 1)
        await client.publish_batch([("t", 1)])
        async with client.subscribe("t"), client.subscribe(patterns=["p.*"]):
            pass

    assert [request.path for request in server.requests] == ["/publish", "/subscribe", "/ws"]
    assert set(shown(server)) == {f"Bearer {KEY}"}
    assert server.batch_heads[0]["Authorization"] == f"Bearer {KEY}"


async def test_function_is_asked_once_for_many_requests(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """Also when they begin together, while it is still asked."""
    issuer = Issuer()
    async with new_client(token=issuer.later) as client:
        await asyncio.gather(*(client.publish("t", number) for number in range(10)))
        await client.publish("t", 10)

    assert issuer.calls == 1
    assert set(shown(server)) == {"Bearer t1"}


async def test_token_near_its_end_is_not_presented_again(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """From the time on at which it would be renewed, the next request asks for another one."""
    short = [jwt_of(iat=0, exp=life) for life in (0.02, 1000)]
    issuer = Issuer(*short)
    async with new_client(token=issuer) as client:
        await client.publish("t", 1)
        await asyncio.sleep(0.03)
        await client.publish("t", 2)
        await client.publish("t", 3)

    assert shown(server) == [f"Bearer {each}" for each in (short[0], short[1], short[1])]


@pytest.mark.parametrize(
    ("url", "headers"),
    [
        ("http://user:password@127.0.0.1:1", {}),
        ("http://127.0.0.1:1", {"authorization": "Basic x"}),
        ("http://127.0.0.1:1", {"X-Api-Key": "x"}),
    ],
)
def test_second_credential_is_refused(url: str, headers: dict[str, str]) -> None:
    """A request presents one; the server would refuse it with two."""
    with pytest.raises((BadUrl, ValueError), match="beside token; leave one of them out"):
        Client(url, token=KEY, headers=headers)


@pytest.mark.parametrize("token", ["", "with space", "ü", "a\r\nb", "x" * 5601, 5, b"x", ["x"]])
def test_wrong_token_is_refused_without_being_shown(token: Any) -> None:
    """Where the client is made, in a sentence that holds nothing of it."""
    with pytest.raises((TypeError, ValueError)) as refused:
        Client("http://127.0.0.1:1", token=token)

    assert not token or str(token) not in str(refused.value)


@pytest.mark.parametrize("token", [None, 5, "", "with space"])
async def test_wrong_answer_of_a_function_is_told(
    server: FakeServer, new_client: Callable[..., Client], token: Any
) -> None:
    """It is a mistake in the program, so it is not tried again."""
    issuer = Issuer(token, token)
    async with new_client(token=issuer) as client:
        with pytest.raises((TypeError, ValueError), match="token"):
            await client.publish("t", 1)
        with pytest.raises((TypeError, ValueError), match="token"):
            await anext(client.subscribe("t"))

    assert (issuer.calls, server.requests) == (2, [])


# --- refused ---


async def test_401_asks_the_function_once_more(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """The same request is made again, and later requests keep the fresh token."""
    server.answers.append(unauthorized())
    server.feeds.append(Feed(refusal=unauthorized()))
    server.feeds.append(Feed([subscribed("e", 0)], has_control=True))
    async with new_client(token=Issuer()) as client:
        await client.publish("t", 1)
        async with client.subscribe("t"):
            pass

    assert shown(server) == ["Bearer t1", "Bearer t2", "Bearer t2", "Bearer t3"]
    assert server.bodies[0] == server.bodies[1]


@pytest.mark.parametrize(("is_function", "requests"), [(True, 2), (False, 1)])
async def test_401_is_final_when_there_is_nothing_fresh(
    server: FakeServer, new_client: Callable[..., Client], is_function: bool, requests: int
) -> None:
    """With a text at once; with a function, when its second token is refused too."""
    server.answers += [unauthorized()] * 2
    server.feeds += [Feed(refusal=unauthorized())] * 2
    async with new_client(token=Issuer() if is_function else KEY) as client:
        with pytest.raises(Unauthorized, match=r"The token has expired\.") as refused:
            await client.publish("t", 1)
        with pytest.raises(Unauthorized):
            await anext(client.subscribe("t"))

    assert (refused.value.status, refused.value.is_transient) == (401, False)
    assert len(server.requests) == 2 * requests


async def test_403_is_final(server: FakeServer, new_client: Callable[..., Client]) -> None:
    """A fresh token has the same permissions, so the function is not asked."""
    server.feeds.append(Feed(refusal=refusal(403, "The credential lacks the permission.")))
    issuer = Issuer()
    async with new_client(token=issuer) as client:
        with pytest.raises(Refused, match="lacks the permission"):
            await anext(client.subscribe("t"))

    assert issuer.calls == 1


async def test_function_that_fails_is_told_at_first_and_asked_again_later(
    server: FakeServer, new_client: Callable[..., Client], caplog: pytest.LogCaptureFixture
) -> None:
    """As an unreachable server is; the function's error is the cause, and stays out of the log."""
    caplog.set_level(logging.DEBUG)
    down = OSError(f"no answer for {KEY}")
    issuer = Issuer(down, "t2", down, down, "t5")
    server.answers.append(unauthorized())
    async with new_client(token=issuer) as client:
        with pytest.raises(NoToken, match="The token function failed with an OSError") as failed:
            await client.publish("t", 1)
        await client.publish("t", 2)

    assert failed.value.__cause__ is down
    assert shown(server) == ["Bearer t2", "Bearer t5"]
    assert KEY not in caplog.text


# --- ended ---


async def items_of(items: Any, count: int) -> list[int]:
    """Return the offsets of so many messages."""
    found: list[int] = []
    async for item in items:
        assert isinstance(item, Message)
        found.append(item.offset)
        if len(found) == count:
            break
    return found


async def test_expired_connection_comes_back_fresh_by_position(
    server: FakeServer, new_client: Callable[..., Client], pause: Any
) -> None:
    """At once: 4102 is no trouble of the server's."""
    for first, code in ((1, 4102), (3, None)):
        frames = [subscribed("e", first - 1), message(first), message(first + 1)]
        server.feeds.append(Feed(frames, code, b"credential_expired", has_control=True))
    async with new_client(token=Issuer()) as client:
        offsets = await items_of(client.subscribe("t"), 4)

    assert offsets == [1, 2, 3, 4]
    assert shown(server) == ["Bearer t1", "Bearer t2"]
    assert dict(server.requests[1].query) == {"topic": "t", "epoch": "e", "offset": "2"}
    assert pause.slept_s == [0.0]


async def test_expired_text_ends_in_the_server_s_words(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """It comes back once, and the answer says what is wrong."""
    server.feeds.append(Feed([subscribed("e", 0)], 4102, has_control=True))
    server.feeds.append(Feed(refusal=unauthorized()))
    async with new_client(token=KEY) as client:
        with pytest.raises(Unauthorized, match=r"The token has expired\."):
            await anext(client.subscribe("t"))


@pytest.mark.parametrize(("code", "is_final"), [(4001, True), (4202, False)])
async def test_revoked_is_final_and_changed_permissions_are_not(
    server: FakeServer, new_client: Callable[..., Client], pause: Any, code: int, is_final: bool
) -> None:
    """4202 comes back at once, with the token it has."""
    server.feeds.append(Feed([subscribed("e", 0)], code, has_control=True))
    server.feeds.append(Feed([subscribed("e", 0), message(1)], has_control=True))
    issuer = Issuer()
    async with new_client(token=issuer) as client:
        items = client.subscribe("t")
        if is_final:
            with pytest.raises(Closed, match="4001"):
                await anext(items)
        else:
            assert await items_of(items, 1) == [1]

    assert issuer.calls == 1
    assert pause.slept_s == ([] if is_final else [0.0])


async def test_refused_renewal_is_logged_and_ends_nothing(
    server: FakeServer, new_client: Callable[..., Client], caplog: pytest.LogCaptureFixture
) -> None:
    """The server leaves the connection as it was."""
    told = failure("The token is another tenant's.", ref="authenticate", code="forbidden")
    renewed = b'{"type":"authenticated","ref":"authenticate","expires_in_s":60.0}'
    greetings = [subscribed("e", 0, topic=topic, ref=ref) for ref, topic in ((1, "t"), (2, "u"))]
    frames = [*greetings, told, renewed, message(1, topic="t")]
    server.feeds.append(Feed(frames, has_control=True, commands=2))
    async with new_client(token=Issuer()) as client:
        assert await items_of(client.subscribe("t", "u"), 1) == [1]

    assert "token not renewed why=The token is another tenant's." in caplog.text


# --- told nowhere ---


@pytest.mark.parametrize(
    "answer", [Answer(200), Answer(500, b"?"), Answer(302, headers={"Location": "http://x/"})]
)
async def test_no_error_holds_the_secret(
    server: FakeServer,
    new_client: Callable[..., Client],
    caplog: pytest.LogCaptureFixture,
    answer: Answer,
) -> None:
    """Neither its text, nor its repr, nor those of its causes; nor does the log."""
    caplog.set_level(logging.DEBUG)
    server.feeds.append(Feed(refusal=answer))
    async with new_client(token=KEY) as client:
        with pytest.raises(ClientError) as failed:
            await anext(client.subscribe("t", reconnect=False))

    error: BaseException | None = failed.value
    while error is not None:
        assert KEY not in f"{error} {error!r} {vars(error)}"
        error = error.__context__
    assert KEY not in "".join(traceback.format_exception(failed.value))
    assert KEY not in f"{client!r} {client._session!r} {client._session._credential!r}"
    assert KEY not in caplog.text


async def test_answer_that_is_not_http_holds_no_secret(new_client: Callable[..., Client]) -> None:
    """The library's error for it would have the request's headers."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"220 mail.example ESMTP\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        async with Client(f"127.0.0.1:{port}", token=KEY) as client:
            with pytest.raises(ClientError) as failed:
                await client.publish("t", 1)

    error: BaseException | None = failed.value
    while error is not None:
        assert KEY not in f"{error!r} {vars(error)}"
        error = error.__context__
    assert not isinstance(failed.value, BadAnswer)


# --- without asyncio ---


def test_client_without_asyncio_calls_the_function_in_a_thread() -> None:
    """A function that waits must not hold the client's own thread, which answers pings."""
    names: list[str] = []

    def ask() -> str:
        names.append(threading.current_thread().name)
        return "with space"

    with (
        sync.Client("127.0.0.1:1", token=ask) as client,
        pytest.raises(ValueError, match="visible ASCII"),
    ):
        client.publish("t", 1)

    assert names
    assert names[0] not in ("clevrd-client", threading.main_thread().name)


# --- when ---


@pytest.mark.parametrize(
    ("secret", "life"),
    [
        (KEY, inf),
        ("a.b", inf),
        ("a.!.c", inf),
        ("a.bm90IGpzb24.c", inf),  # not json
        (jwt_of(sub="x"), inf),
        (jwt_of(exp="soon"), inf),
        (jwt_of(exp=1e300), inf),
        (jwt_of(exp=1060), 60),
        (jwt_of(exp=900), 0),
        (jwt_of(iat=990, exp=1060), 60),
        # The clock of this machine is wrong: too late, or too early.
        (jwt_of(iat=500, exp=900), 400),
        (jwt_of(iat=5000, exp=5400), 400),
    ],
)
def test_life_of_a_token(secret: str, life: float) -> None:
    """It is read from the token, whose signature is not looked at."""
    assert life_s(secret, 1000) == life


@pytest.mark.parametrize(("life", "wait"), [(1, 0.5), (8, 4), (20, 15), (100, 80), (3600, 2880)])
def test_time_of_renewal(life: float, wait: float) -> None:
    """At 80 % of the life, 5 s before its end at least, and never in the first half."""
    assert renewal_s(life) == pytest.approx(wait)


async def test_wait_for_a_renewal() -> None:
    """It has jitter, and there is none for what has no end."""
    token = jwt_of(exp=1100)
    by_function = Credential(lambda: token, lambda: 1000)
    await by_function.get()

    assert by_function.renew_in_s(token, 0.0) == pytest.approx(80, abs=1)
    assert by_function.renew_in_s(token, 1.0) == pytest.approx(72, abs=1)
    assert by_function.renew_in_s("older", 0.0) == 0
    assert Credential(token).renew_in_s(token, 0.0) is None
    endless = Credential(lambda: KEY)
    await endless.get()
    assert endless.renew_in_s(KEY, 0.0) is None


async def test_tasks_that_ask_at_once_share_what_becomes_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A function that fails or hangs is not called once for each of them, one after the other."""
    monkeypatch.setattr("clevrd.client.credential.TOKEN_TIMEOUT_S", 0.1)
    calls = 0

    async def hang() -> str:
        nonlocal calls
        calls += 1
        await asyncio.Event().wait()
        return ""

    credential = Credential(hang)
    async with asyncio.timeout(5):
        found = await asyncio.gather(*[credential.get() for _ in range(20)], return_exceptions=True)

    assert {type(each) for each in found} == {NoToken}
    assert calls == 1


async def test_call_ends_when_nobody_waits_for_it_any_more() -> None:
    """And not before: one of two that leaves takes nothing from the other."""
    ended = asyncio.Event()
    release = asyncio.Event()

    async def slow() -> str:
        try:
            await release.wait()
        except asyncio.CancelledError:
            ended.set()
            raise
        return "t1"

    credential = Credential(slow)
    first, second = (asyncio.ensure_future(credential.get()) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    release.set()
    assert await second == "t1"

    release.clear()
    credential.refuse("t1")
    only = asyncio.ensure_future(credential.get())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    only.cancel()
    async with asyncio.timeout(5):
        await ended.wait()
