"""A subscriber's request: topics and patterns, where each begins, and how it is delivered.

Pure values; the handlers read them out of requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import msgspec

from clevrd.core.beginning import After, Beginning
from clevrd.core.drop_strategy import DropStrategy
from clevrd.core.notices import Warnings

# Everything that a topic ever had: it began while nobody read the pattern that matches it.
FROM_THE_START: Final = After(0)


class DeliveryOptions(msgspec.Struct, frozen=True):
    """How a subscriber wants its messages, of whichever topic."""

    strategy: DropStrategy
    # Messages it may lag; None takes what is allowed.
    wanted_window: int | None
    # Notices stand between its messages: where it begins, what it loses, when to come back.
    has_notices: bool
    # The name by which it wants to be known among the topic's readers; None for none.
    subscriber_id: str | None = None
    # Whether the subscriber is given the headers of messages.
    has_headers: bool = False


class PatternBeginning(msgspec.Struct, frozen=True):
    """Where the subscriptions that a pattern brings begin."""

    # In topics that exist; a topic that is made later is read from its start.
    beginning: Beginning
    # By topic, where the subscriber had been; a position counts more than `beginning`.
    positions: Mapping[str, After] = MappingProxyType({})


class SubscribeRequest(msgspec.Struct, frozen=True):
    """All that a subscriber asks for on a URL."""

    # Topic -> where to begin.
    topics: dict[str, Beginning]
    # Pattern -> where to begin.
    patterns: dict[str, PatternBeginning]
    options: DeliveryOptions
    # The warnings that the client is told with the first notice.
    warnings: Warnings = msgspec.UNSET

    @property
    def is_for_one_topic(self) -> bool:
        """Whether it can never bring a second topic."""
        return len(self.topics) == 1 and not self.patterns

    @property
    def is_resumed(self) -> bool:
        """Whether the subscriber has said where it is, in any topic."""
        return any(
            each.beginning == FROM_THE_START or each.positions for each in self.patterns.values()
        ) or any(isinstance(beginning, After) for beginning in self.topics.values())
