"""Publishing many items of one publisher in runs: judged one by one, appended together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Generic, TypeVar

from clevrd.core.message import PublishRequest
from clevrd.core.topic import Topic
from clevrd.errors import ClevrdError
from clevrd.hub import RUN_MAX_BYTES, Hub, Published
from clevrd.tenants import Tenant

RequestT = TypeVar("RequestT", bound=PublishRequest)

# Told of each run that was published: topic, requests, the first one's offset, all their ids.
OnRun = Callable[[Topic, Sequence[RequestT], int, Sequence[str]], None]
# Told of each item with an idempotency key, and of the answer to it.
OnPublished = Callable[[RequestT, Published], None]
# Told of each item that was refused: why, and the item.
OnRefused = Callable[[ClevrdError, bytes], None]


class RunPublisher(Generic[RequestT]):
    """Publishes one publisher's items in order and reports what became of each, in that order.

    A run costs a message 3.0 us, frame to ring, where one by one it costs 4.8. An item with an
    idempotency key goes by itself, so that a repeat finds the answer even to the one before it.
    """

    __slots__ = ("_decode", "_hub", "_on_published", "_on_refused", "_on_run", "_tenant")

    def __init__(
        self,
        hub: Hub,
        tenant: Tenant,
        decode: Callable[[bytes], RequestT],
        on_run: OnRun[RequestT],
        on_published: OnPublished[RequestT],
        on_refused: OnRefused,
    ) -> None:
        self._hub = hub
        self._tenant = tenant
        self._decode = decode
        self._on_run = on_run
        self._on_published = on_published
        self._on_refused = on_refused

    def take(self, items: Sequence[bytes]) -> tuple[int, bool]:
        """Publish ``items`` until the share of this turn is used up or one has to wait.

        Returns how many were taken, one at least unless it has to wait; and whether the next one
        is for `wait_for`.
        """
        is_spent = self._hub.turns.is_spent
        taken = 0
        while taken < len(items) and not (taken and is_spent()):
            run, fault = self._gather(items, taken, self._hub.max_run)
            if run and not self._append(items[taken : taken + len(run)], run):
                return taken, True
            taken += len(run)
            if fault is not None:
                self._on_refused(fault, items[taken])
                taken += 1
        return taken, False

    async def wait_for(self, items: Sequence[bytes]) -> int:
        """Publish the first of ``items`` when its time has come, and what can go with it.

        Returns how many were published or refused. The throttle is for each message by itself.
        """
        most = 1 if self._hub.is_throttling() else self._hub.max_run
        run, fault = self._gather(items, 0, most)
        if not run:
            if fault is not None:
                self._on_refused(fault, items[0])
            return 1
        try:
            if (key := run[0].idempotency_key) is not None:
                answer = await self._hub.publish_once_later(self._tenant, run[0], key)
                self._on_published(run[0], answer)
                return 1
            self._hub.check_rate(self._tenant, len(run))
            topic = await self._hub.turn(self._hub.topic(self._tenant, run[0].topic), len(run))
        except ClevrdError as error:
            self._refuse(error, items[: len(run)])
        else:
            self._on_run(topic, run, *self._hub.publish_run(topic, run))
        return len(run)

    def _gather(
        self, items: Sequence[bytes], start: int, most: int
    ) -> tuple[list[RequestT], ClevrdError | None]:
        """Decode from ``start`` on what can be appended at once, up to a faulty item.

        An item with a key is a run of its own.
        """
        decode = self._decode
        run: list[RequestT] = []
        run_bytes = 0
        for item in islice(items, start, start + most):
            try:
                request = decode(item)
            except ClevrdError as error:
                return run, error
            run_bytes += len(item)
            has_key = request.idempotency_key is not None
            if run and (has_key or request.topic != run[0].topic or run_bytes > RUN_MAX_BYTES):
                break
            run.append(request)
            if has_key:
                break
        return run, None

    def _append(self, items: Sequence[bytes], run: Sequence[RequestT]) -> bool:
        """Append ``run``, or refuse all of it; return False if it has to wait."""
        hub = self._hub
        if run[0].idempotency_key is not None:
            return self._append_once(items[0], run[0], run[0].idempotency_key)
        try:
            topic = hub.topic(self._tenant, run[0].topic)
            if hub.must_wait(topic):
                return False
            hub.check_rate(self._tenant, len(run))
        except ClevrdError as error:
            self._refuse(error, items)
            return True
        self._on_run(topic, run, *hub.publish_run(topic, run))
        return True

    def _append_once(self, item: bytes, request: RequestT, key: str) -> bool:
        """Publish what has a key, or answer as before; return False if it has to wait."""
        try:
            # What has to wait has paid already.
            self._hub.check_rate(self._tenant)
            answer = self._hub.publish_once(self._tenant, request, key)
        except ClevrdError as error:
            self._on_refused(error, item)
            return True
        if answer is not None:
            self._on_published(request, answer)
        return answer is not None

    def _refuse(self, error: ClevrdError, items: Sequence[bytes]) -> None:
        for item in items:
            self._on_refused(error, item)
