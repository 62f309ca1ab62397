"""A double of a journal: the hub's publishes have their place, and their answers come later.

A publish to a topic that begins with "fails" is answered by an error; its message is published as
well.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from clevrd.core.message import PublishRequest
from clevrd.core.topic import Topic
from clevrd.errors import ClevrdError, Unavailable
from clevrd.hub import Hub, PublishAnswer, RunAnswer

FAILS = "fails"

AnswerT = TypeVar("AnswerT")


def disk_is_full() -> ClevrdError:
    """Return the error with which publishes fail."""
    return Unavailable("The disk is full; retry later.")


class LateAnswers:
    """Wraps a hub's `publish` and `publish_run`, and holds their answers back.

    ``is_late`` says of each publish whether its answer is held back; by default all are. An answer
    that fails is always a Future, since an error at once would mean that no message was published.
    """

    def __init__(self, hub: Hub, is_late: Callable[[], bool] = lambda: True) -> None:
        self._publish = hub.publish
        self._publish_run = hub.publish_run
        self._is_late = is_late
        # Functions that make the held answers known, in the order of the publishes.
        self.held: list[Callable[[], None]] = []
        # All Futures that were returned.
        self.futures: list[asyncio.Future[Any]] = []
        double: Any = hub
        double.publish = self.publish
        double.publish_run = self.publish_run
        double.publishing.publish = self.publish

    def publish(self, topic: Topic, request: PublishRequest) -> PublishAnswer:
        """Publish, and answer now or later."""
        answer = self._publish(topic, request)
        assert not isinstance(answer, asyncio.Future)
        return self._hold(topic, answer)

    def publish_run(self, topic: Topic, requests: Sequence[PublishRequest]) -> RunAnswer:
        """Publish a run, and answer now or later."""
        answer = self._publish_run(topic, requests)
        assert not isinstance(answer, asyncio.Future)
        return self._hold(topic, answer)

    def _hold(self, topic: Topic, answer: AnswerT) -> AnswerT | asyncio.Future[AnswerT]:
        fails, is_late = topic.name.startswith(FAILS), self._is_late()
        if not fails and not is_late:
            return answer
        later: asyncio.Future[AnswerT] = asyncio.get_running_loop().create_future()
        self.futures.append(later)

        def settle() -> None:
            if fails:
                later.set_exception(disk_is_full())
            else:
                later.set_result(answer)

        if is_late:
            self.held.append(settle)
        else:
            settle()
        return later

    def answer(self, count: int | None = None, *, source: random.Random | None = None) -> None:
        """Make ``count`` answers known, or all: in order, or chosen at random from ``source``."""
        for _ in range(len(self.held) if count is None else min(count, len(self.held))):
            at = 0 if source is None else source.randrange(len(self.held))
            self.held.pop(at)()

    async def answer_at_random(self, source: random.Random) -> None:
        """Make answers known at random times in random order, until this is cancelled."""
        while True:
            for _ in range(source.choice((0, 1, 2, 5, 20))):
                await asyncio.sleep(0)
            if source.random() < 0.1:
                await asyncio.sleep(0.002)
            self.answer(source.choice((0, 1, 1, 2, 50)), source=source)
            await asyncio.sleep(0)
