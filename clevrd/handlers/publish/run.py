"""Publishing many items of one publisher in runs: judged one by one, appended together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final, Generic, Protocol, TypeVar

from clevrd.core.publish_request import PublishRequest
from clevrd.core.topic import Topic
from clevrd.errors import ClevrdError
from clevrd.handlers.publish.endpoint import check_size
from clevrd.hub import RUN_MAX_BYTES, Hub, PublishAnswer, Published, Run
from clevrd.tenants import Tenant

RequestT = TypeVar("RequestT", bound=PublishRequest)
ToldT = TypeVar("ToldT", bound=PublishRequest, contravariant=True)


# Items that are decoded at once at most, and at first.
_MOST_PLAIN: Final = 64
_FIRST_PLAIN: Final = 4

# Decodes the first of several items, which are to the topic that is named.
DecodePlain = Callable[[Sequence[bytes], str], list[RequestT]]


class HasToWait(Exception):
    """Raised by `Outcomes.refused`: the item can't be answered yet, nor what is behind it."""


class Outcomes(Protocol[ToldT]):
    """Is told what became of each item, in the order of the items."""

    def run_published(
        self, topic: Topic, run: Sequence[ToldT], offset: int, ids: list[str]
    ) -> None:
        """Note a run that was published: the first one's offset, and all ids."""

    def run_is_due(self, topic: Topic, run: Sequence[ToldT], known: asyncio.Future[Run]) -> None:
        """Note a run that has its place in the order, and of which all else is ``known`` later."""

    def published(self, request: ToldT, answer: Published) -> None:
        """Note an item with an idempotency key, which was published now or before."""

    def is_due(self, request: ToldT, known: asyncio.Future[Published]) -> None:
        """Note an item with a key that has its place, and of which all else is ``known`` later."""

    def refused(self, error: ClevrdError, item: bytes) -> None:
        """Note an item that was refused.

        Raises:
            HasToWait: out of `take` alone; the item is given to `RunPublisher` again.
        """


class RunPublisher(Generic[RequestT]):
    """Publishes one publisher's items in order and reports what became of each, in that order.

    A run costs a message 3.0 us, frame to ring, where one by one it costs 4.8. An item with an
    idempotency key goes by itself, so that a repeat finds the answer even to the one before it.
    """

    __slots__ = ("_decode", "_decode_plain", "_hub", "_max_plain_bytes", "_outcomes", "_tenant")

    def __init__(
        self,
        hub: Hub,
        tenant: Tenant,
        decode: Callable[[bytes], RequestT],
        outcomes: Outcomes[RequestT],
        decode_plain: DecodePlain[RequestT] | None = None,
        max_bytes: int | None = None,
    ) -> None:
        """Publish for ``tenant``, and tell ``outcomes``.

        Args:
            decode: returns the request in an item, or raises a ClevrdError.
            decode_plain: returns those in the first of several items, all to the same topic, as far
                as there is nothing to say of them; None where one at a time is decoded.
            max_bytes: an item that ``decode_plain`` is given has no more; None for no bound.
        """
        self._hub = hub
        self._tenant = tenant
        self._decode = decode
        self._decode_plain = decode_plain
        self._max_plain_bytes = max_bytes
        self._outcomes = outcomes

    def take_tenant(self, tenant: Tenant) -> None:
        """Publish as ``tenant`` from the next item on."""
        self._tenant = tenant

    def take(self, items: Sequence[bytes]) -> tuple[int, bool]:
        """Publish ``items`` until the share of this turn is used up or one has to wait.

        Returns how many were taken, one at least unless it has to wait; and whether the next one
        is for `wait_for`.
        """
        is_spent = self._hub.turns.is_spent
        taken = 0
        while taken < len(items) and not (taken and is_spent()):
            run, fault = self._gather(items, taken, self._most())
            if run and not self._append(items[taken : taken + len(run)], run):
                return taken, True
            taken += len(run)
            if fault is not None:
                try:
                    self._outcomes.refused(fault, items[taken])
                except HasToWait:
                    return taken, True
                taken += 1
        return taken, False

    async def wait_for(self, items: Sequence[bytes]) -> int:
        """Publish the first of ``items`` when its time has come, and what can go with it.

        Returns how many were published or refused. The throttle is for each message by itself.
        """
        run, fault = self._gather(items, 0, 1)
        if not run:
            if fault is not None:
                self._outcomes.refused(fault, items[0])
            return 1
        if not self._hub.is_throttled(self._tenant, run[0].topic):
            run, _ = self._gather(items, 0, self._most())
        try:
            if (key := run[0].idempotency_key) is not None:
                answer = await self._hub.publish_once_later(self._tenant, run[0], key)
                self._note(run[0], answer)
                return 1
            self._hub.check_rate(self._tenant, len(run))
            topic = self._hub.topic(self._tenant, run[0].topic)
            size_bytes = sum(map(len, items[: len(run)]))
            topic = await self._hub.turn(self._tenant, topic, len(run), size_bytes)
        except ClevrdError as error:
            self._refuse(error, items[: len(run)])
        else:
            self._publish(topic, run)
        return len(run)

    def _most(self) -> int:
        """Return how many messages a run may have now: what is left of the budget, at least one.

        So the budget is spent to its last message, and the next one is refused by itself.
        """
        left = self._hub.most_now(self._tenant)
        return self._hub.max_run if left >= self._hub.max_run else max(1, int(left))

    def _gather(
        self, items: Sequence[bytes], start: int, most: int
    ) -> tuple[list[RequestT], ClevrdError | None]:
        """Decode from ``start`` on what can be appended at once, up to a faulty item.

        An item with a key is a run of its own.
        """
        decode = self._decode
        limit_bytes = self._tenant.limits.max_message_bytes
        run: list[RequestT] = []
        run_bytes = 0
        # How many are decoded at once next: more from time to time, since those of another topic
        # are decoded again, and none where topics alternate. From the first item on that is not
        # plain it is 0.
        at_once = 0 if self._decode_plain is None else _FIRST_PLAIN
        place, end = start, min(start + most, len(items))
        while place < end:
            if len(run) > 1 and at_once:
                some = items[place : min(place + at_once, end)]
                plain = self._plain(some, run[0].topic, RUN_MAX_BYTES - run_bytes)
                run += plain
                place += len(plain)
                if len(plain) == len(some):
                    run_bytes += sum(map(len, some))
                    at_once = min(2 * at_once, _MOST_PLAIN)
                    continue
                run_bytes += sum(map(len, some[: len(plain)]))
                at_once = 0
            item = items[place]
            place += 1
            try:
                request = decode(item)
                if limit_bytes is not None:
                    check_size(self._tenant, len(item))
            except ClevrdError as error:
                error.blame(self._tenant.name, self._tenant.credential_id)
                return run, error
            run_bytes += len(item)
            has_key = request.idempotency_key is not None
            if run and (has_key or request.topic != run[0].topic or run_bytes > RUN_MAX_BYTES):
                break
            run.append(request)
            if has_key:
                break
        return run, None

    def _plain(self, items: Sequence[bytes], topic: str, room_bytes: int) -> list[RequestT]:
        """Return the requests of the first of ``items`` that are plain and to ``topic``."""
        if self._decode_plain is None or sum(map(len, items)) > room_bytes:
            return []
        for bound in (self._max_plain_bytes, self._tenant.limits.max_message_bytes):
            if bound is not None and max(map(len, items)) > bound:
                return []
        return self._decode_plain(items, topic)

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
        published = hub.publish_run(topic, run)
        # This is `_publish` written out, since the call would cost each run 50 ns.
        if isinstance(published, tuple):
            self._outcomes.run_published(topic, run, *published)
        else:
            self._outcomes.run_is_due(topic, run, published)
        return True

    def _publish(self, topic: Topic, run: Sequence[RequestT]) -> None:
        published = self._hub.publish_run(topic, run)
        if isinstance(published, tuple):
            self._outcomes.run_published(topic, run, *published)
        else:
            self._outcomes.run_is_due(topic, run, published)

    def _append_once(self, item: bytes, request: RequestT, key: str) -> bool:
        """Publish what has a key, or answer as before; return False if it has to wait."""
        try:
            # A publish that has to wait has paid already.
            self._hub.check_rate(self._tenant)
            answer = self._hub.publish_once(self._tenant, request, key)
        except ClevrdError as error:
            self._outcomes.refused(error, item)
            return True
        if answer is None:
            return False
        self._note(request, answer)
        return True

    def _note(self, request: RequestT, answer: PublishAnswer) -> None:
        if isinstance(answer, Published):
            self._outcomes.published(request, answer)
        else:
            self._outcomes.is_due(request, answer)

    def _refuse(self, error: ClevrdError, items: Sequence[bytes]) -> None:
        for item in items:
            self._outcomes.refused(error, item)
