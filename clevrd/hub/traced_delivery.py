"""Deliveries with a span for each traced message: one for all its readers, not one for each.

They are made where tracing is configured, in the place of `Delivery` and `Rounds`. A message is
traced if its own traceparent says so, whoever has published it: a client here, one on another node
of the journal, or the producer of a source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

from clevrd.core.publish_request import PublishRequest
from clevrd.core.round import Round
from clevrd.core.subscriber import Subscriber
from clevrd.core.topic import Topic
from clevrd.hub.delivery import Delivery
from clevrd.hub.rounds import Rounds
from clevrd.hub.stamping import Stamp
from clevrd.tracing.spans import SYSTEM, TraceContext, read_context
from clevrd.tracing.tracing import Tracing

# Traced messages that wait for their rounds, over all topics: as many spans end in a turn of the
# loop at most, in a millisecond. One more has no span, and is counted as dropped.
MAX_NOTED: Final = 256


class _Noted:
    """A traced message that is appended, and not offered to all live readers yet."""

    __slots__ = ("given", "link", "message_id", "offset", "start_ns")

    def __init__(self, link: TraceContext, message_id: str, offset: int, start_ns: int) -> None:
        self.link = link
        self.message_id = message_id
        self.offset = offset
        self.start_ns = start_ns
        # Readers that it was written to.
        self.given = 0


class TracedRounds(Rounds):
    """Rounds that count the readers of traced messages, and end the spans of these."""

    __slots__ = ("_noted", "_tracing", "noted_messages")

    def __init__(self, tracing: Tracing, *parts: Any) -> None:
        super().__init__(*parts)
        self._tracing = tracing
        self._noted: dict[Topic, list[_Noted]] = {}
        # How many messages are noted, over all topics.
        self.noted_messages = 0

    def note(self, topic: Topic, link: TraceContext, message_id: str, offset: int) -> None:
        """Have the span of a message end with the round that offers it."""
        if self.noted_messages >= MAX_NOTED:
            self._forget_lost()
        if self.noted_messages >= MAX_NOTED:
            self._tracing.sender.drop()
            return
        self.noted_messages += 1
        noted = _Noted(link, message_id, offset, self._tracing.wall_ns())
        self._noted.setdefault(topic, []).append(noted)

    def _forget_lost(self) -> None:
        """Forget the messages of topics that have no round to come: their epochs are over."""
        for topic in [each for each in self._noted if not each.flush_is_scheduled]:
            self.noted_messages -= len(self._noted.pop(topic))

    def _write_to(self, topic: Topic, step: Round, readers: list[Subscriber]) -> None:
        noted = self._noted.get(topic)
        if noted is None or not step.messages:
            super()._write_to(topic, step, readers)
            return
        before = topic.delivered
        super()._write_to(topic, step, readers)
        given = (topic.delivered - before) // step.messages
        for each in noted:
            if step.start < each.offset <= step.end:
                each.given += given

    def _end(self, topic: Topic) -> None:
        noted = self._noted.pop(topic, None)
        super()._end(topic)
        if noted is not None:
            self._end_spans(topic, noted)

    def _end_spans(self, topic: Topic, noted: list[_Noted]) -> None:
        """End the spans of what is offered; the rest waits for the round that is to come."""
        end_ns = self._tracing.wall_ns()
        waiting = [each for each in noted if each.offset > topic.edge]
        for each in noted:
            if each.offset > topic.edge:
                continue
            self._tracing.end_delivery(
                *(each.link, each.start_ns, end_ns),
                {
                    "messaging.system": SYSTEM,
                    "messaging.operation.name": "deliver",
                    "messaging.operation.type": "process",
                    "messaging.destination.name": topic.name,
                    "messaging.message.id": each.message_id,
                    "clevrd.tenant": topic.tenant,
                    "clevrd.offset": each.offset,
                    "clevrd.epoch": topic.epoch,
                    "clevrd.subscribers": each.given,
                    "clevrd.lagging": len(topic.lagging),
                },
            )
        self.noted_messages -= len(noted) - len(waiting)
        if waiting:
            self._noted[topic] = waiting


class TracedDelivery(Delivery):
    """Delivers as `Delivery` does, and notes which messages are traced."""

    rounds: TracedRounds

    def __init__(self, tracing: Tracing, *parts: Any, **more: Any) -> None:
        more["make_rounds"] = partial(TracedRounds, tracing)
        super().__init__(*parts, **more)

    def deliver(
        self, topic: Topic, offset: int, requests: Sequence[PublishRequest], stamps: Sequence[Stamp]
    ) -> None:
        """Append ``topic``'s messages from ``offset`` on, and have them offered to its readers."""
        super().deliver(topic, offset, requests, stamps)
        if topic.ring.head == topic.edge:
            # Nobody reads the topic, so nothing is delivered.
            return
        for number, request in enumerate(requests):
            if not request.headers:
                continue
            context = read_context(request.headers)
            if context is not None and context.is_sampled:
                self.rounds.note(topic, context, stamps[number][0], offset + number)


def delivery_maker(tracing: Tracing | None) -> Callable[..., Delivery]:
    """Return what makes a daemon's delivery, from the parts that `Delivery` takes."""
    return Delivery if tracing is None else partial(TracedDelivery, tracing)
