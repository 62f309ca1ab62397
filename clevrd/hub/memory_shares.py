"""Shares of the memory bound for idempotency keys, unfinished input and topics. Decides only.

How the topics divide their share among themselves is in `core/topic_manager`.
"""

from __future__ import annotations

from typing import Final

from clevrd.config import Config
from clevrd.core.idempotency import KEY_COST_BYTES
from clevrd.core.topic_manager import TopicLimits

# Share of the memory bound that answers to publishes with an idempotency key may take.
_KEYS_SHARE: Final = 0.05


def max_keys(config: Config, max_memory_bytes: int) -> int:
    """Return how many idempotency keys may be remembered: the setting, or fewer.

    The answers may take a share of the memory bound; the setting is cut to that.
    """
    affordable = int(max_memory_bytes * _KEYS_SHARE) // KEY_COST_BYTES
    return min(config.max_idempotency_keys, affordable)


def input_bytes(config: Config, max_memory_bytes: int) -> int:
    """Return the bytes of unfinished input: a tenth of memory, or two of the largest bodies."""
    largest_bytes = max(config.max_batch_bytes, config.max_message_bytes)
    return max(max_memory_bytes // 10, 2 * largest_bytes)


def topic_limits(config: Config, max_memory_bytes: int) -> TopicLimits:
    """Return the bounds of all topics."""
    return TopicLimits(
        max_memory_bytes=max_memory_bytes,
        ring_messages=config.ring_messages,
        ring_bytes=config.ring_bytes,
        max_topics=config.max_topics,
        max_topics_per_tenant=config.max_topics_per_tenant,
        circuit_breaker_threshold=config.circuit_breaker_threshold,
        idle_s=config.topic_idle_s,
    )
