"""Sends events to one URL: in batches, signed, retried with backoff, from a bounded queue.

Signatures: Standard Webhooks (standardwebhooks.com), symmetric. No redirect is followed, and of an
answer only the status counts.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import logging
import random
import secrets
import time
from collections import deque
from collections.abc import Callable
from typing import Final

import aiohttp
import msgspec

from clevrd.webhooks.settings import Webhook
from clevrd.webhooks.targets import RefusedTarget, SocketFactory

log = logging.getLogger(__name__)

# Events that wait for one webhook: 3 MB. One more is dropped, and counted.
MAX_QUEUED: Final = 10_000
# Events of one request.
MAX_BATCH: Final = 100
# A whole attempt, from looking up the name to the status of the answer.
TIMEOUT_S: Final = 10.0
# Waits between attempts double from the first to the second figure, and each is drawn from its
# upper half, so that many daemons do not come back together.
RETRY_S: Final = 1.0
MAX_RETRY_S: Final = 300.0
# A batch is given up after so many attempts: 40 minutes.
MAX_ATTEMPTS: Final = 15
# Bytes of an answer's head and body that are taken at most.
_MAX_HEAD_BYTES: Final = 8_190


class WebhookEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """One event as it is posted."""

    # The id of the message in `$events`.
    message_id: str
    tenant_id: str
    type: str
    topic: str
    time: str
    node: str
    id: str | None = None


class _Body(msgspec.Struct, frozen=True):
    events: list[WebhookEvent]


class _Failed(Exception):
    """An attempt that failed, as the log says it."""


_encode = msgspec.json.Encoder().encode


class WebhookSender:
    """The way of events to one URL."""

    def __init__(
        self,
        webhook: Webhook,
        counts: dict[str, int],
        loop: asyncio.AbstractEventLoop,
        *,
        wall_s: Callable[[], float] = time.time,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """Send nothing until the first event is offered.

        Args:
            counts: by outcome, events of all webhooks; changed here.
            wall_s: the wall clock, seconds since 1970, for the signature.
            jitter: returns a number from 0 to 1.
        """
        self.webhook = webhook
        self._counts = counts
        self._loop = loop
        self._wall_s = wall_s
        self._jitter = jitter
        self._queue: deque[WebhookEvent] = deque()
        self._woken = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        # Whether the last attempt failed, and whether events are dropped: a change is logged once.
        self._is_failing = False
        self._is_dropping = False

    def __len__(self) -> int:
        """Return how many events wait."""
        return len(self._queue)

    def offer(self, event: WebhookEvent) -> None:
        """Have ``event`` sent, if it is one of those that the webhook wants; never waits."""
        webhook = self.webhook
        if event.tenant_id != webhook.tenant or event.type not in webhook.events:
            return
        if not webhook.topics.allows(event.topic):
            return
        if len(self._queue) >= MAX_QUEUED:
            self._drop(1)
            return
        self._queue.append(event)
        self._woken.set()
        if self._task is None:
            self._task = self._loop.create_task(self._run())

    async def stop(self) -> None:
        """End, and take no event any more; what waits is dropped."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._counts["dropped"] += len(self._queue)
        self._queue.clear()

    async def _run(self) -> None:
        # The session has no cookie jar and no proxies of the environment, and a connection for each
        # batch.
        connector = aiohttp.TCPConnector(
            force_close=True,
            use_dns_cache=False,
            socket_factory=SocketFactory(self.webhook.allowed_targets),
        )
        async with aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
            auto_decompress=False,
            max_line_size=_MAX_HEAD_BYTES,
            max_field_size=_MAX_HEAD_BYTES,
        ) as session:
            while True:
                await self._woken.wait()
                self._woken.clear()
                while self._queue:
                    count = min(len(self._queue), MAX_BATCH)
                    batch = [self._queue[place] for place in range(count)]
                    try:
                        await self._deliver(session, batch)
                    except Exception:
                        # One batch's fault must not keep all that follow from being sent.
                        log.exception("webhook failed id=%s", self.webhook.id)
                        self._drop(len(batch))
                    # The events stayed in the queue until now, so that they count as waiting.
                    for _ in batch:
                        self._queue.popleft()
                    # A queue that stays at its bound, since the target is slow, is one line.
                    if len(self._queue) <= MAX_QUEUED // 2:
                        self._is_dropping = False

    async def _deliver(self, session: aiohttp.ClientSession, batch: list[WebhookEvent]) -> None:
        """Send a batch until it is taken, or given up."""
        body = _encode(_Body(batch))
        # The id is the same for each attempt: by it a receiver knows a batch that it has had.
        batch_id = f"msg_{secrets.token_hex(16)}"
        wait_s = RETRY_S
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                await self._post(session, batch_id, body)
            except _Failed as error:
                self._note_failure(str(error))
            else:
                self._note_success()
                self._counts["delivered"] += len(batch)
                return
            if attempt < MAX_ATTEMPTS:
                self._counts["retried"] += len(batch)
                await asyncio.sleep(wait_s * (0.5 + 0.5 * self._jitter()))
                wait_s = min(2 * wait_s, MAX_RETRY_S)
        self._drop(len(batch))

    async def _post(self, session: aiohttp.ClientSession, batch_id: str, body: bytes) -> None:
        timestamp = str(int(self._wall_s()))
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "clevrd",
            "webhook-id": batch_id,
            "webhook-timestamp": timestamp,
            "webhook-signature": signature_of(self.webhook.secret, batch_id, timestamp, body),
        }
        try:
            async with session.post(
                self.webhook.url, data=body, headers=headers, allow_redirects=False
            ) as response:
                status = response.status
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise _Failed(_why(error)) from error
        if 300 <= status < 400:
            raise _Failed(f"it redirects ({status}), which is not followed")
        if not 200 <= status < 300:
            raise _Failed(f"it was answered {status}")

    def _note_failure(self, why: str) -> None:
        if not self._is_failing:
            self._is_failing = True
            log.warning("webhook fails, and is tried again id=%s why=%r", self.webhook.id, why)

    def _note_success(self) -> None:
        if self._is_failing:
            self._is_failing = False
            log.warning("webhook takes events again id=%s", self.webhook.id)

    def _drop(self, count: int) -> None:
        self._counts["dropped"] += count
        if not self._is_dropping:
            self._is_dropping = True
            log.error("webhook has taken too little; events are dropped id=%s", self.webhook.id)


def signature_of(secret: bytes, batch_id: str, timestamp: str, body: bytes) -> str:
    """Return the header field that proves who sent a body, and when."""
    signed = b"%b.%b.%b" % (batch_id.encode(), timestamp.encode(), body)
    return "v1," + base64.b64encode(hmac.digest(secret, signed, "sha256")).decode()


# Errors without words that an operator could go by; the text of some has the URL in it.
_REASONS: Final = (
    (aiohttp.InvalidURL, "its URL's host is no name and no address"),
    (aiohttp.ServerDisconnectedError, "it closed the connection without an answer"),
    (aiohttp.ClientResponseError, "its answer is no HTTP, or its head is too large"),
)


def _why(error: BaseException) -> str:
    """Return why there was no answer, without the URL, which may hold a secret."""
    if isinstance(error, TimeoutError):
        return f"no answer within {TIMEOUT_S:g} s"
    refused: BaseException | None = error
    while refused is not None and not isinstance(refused, RefusedTarget):
        refused = refused.__cause__ or refused.__context__
    if refused is not None:
        return str(refused)
    for kind, why in _REASONS:
        if isinstance(error, kind):
            return why
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"it can't be reached: {error.os_error.strerror or type(error.os_error).__name__}"
    return f"it can't be reached: {type(error).__name__}"
