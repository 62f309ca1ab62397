"""Shares of the memory bound for idempotency keys, unfinished input and topics. Decides only.

By which weights tenants divide what they have in common is decided here as well. How they do it:
`core/portions`.
"""

from __future__ import annotations

from typing import Final

import msgspec

from clevrd.config import Config
from clevrd.control.memory_ladder import SHRINK_AT
from clevrd.control.system_stats import own_limit_bytes
from clevrd.core.idempotency import KEY_COST_BYTES
from clevrd.core.portions import Weights
from clevrd.core.topic_manager import TopicLimits
from clevrd.tenants import DEFAULT_TENANT
from clevrd.tenants.settings import Access

# Share of the memory bound that answers to publishes with an idempotency key may take.
_KEYS_SHARE: Final = 0.05


# The weight of `default-tenant` where it is not configured, and that of all other tenants together
# that are not.
_USUAL_WEIGHT: Final = 1.0

# Without tenants in the configuration: made-up ones can't use up what `default-tenant` needs.
OPEN_WEIGHTS: Final = Weights({DEFAULT_TENANT: _USUAL_WEIGHT}, _USUAL_WEIGHT)


def weights_of(access: Access) -> Weights:
    """Return by which weights tenants divide the memory: those of the configured tenants.

    In open mode `default-tenant` has a portion too, and all other tenants have one together. Where
    a credential is required nobody else can come: others have what is idle, for topics from before.
    """
    configured = {tenant.name: tenant.memory_weight for tenant in access.tenants}
    if not configured:
        return OPEN_WEIGHTS
    if access.auth.mode == "required":
        return Weights(configured, 0.0)
    return Weights({DEFAULT_TENANT: _USUAL_WEIGHT, **configured}, _USUAL_WEIGHT)


def max_keys(config: Config, max_memory_bytes: int) -> int:
    """Return how many idempotency keys may be remembered: the setting, or fewer.

    The answers may take a share of the memory bound; the setting is cut to that.
    """
    affordable = int(max_memory_bytes * _KEYS_SHARE) // KEY_COST_BYTES
    return min(config.max_idempotency_keys, affordable)


def input_bytes(config: Config, max_memory_bytes: int, empty_bytes: int) -> int:
    """Return the bytes of unfinished input: a tenth of memory, or three of the largest bodies.

    One such body fits into the half that is given to the first client that comes. With little
    memory it is the part between an empty daemon and the first rung of the memory ladder: bodies
    that arrive slowly, and stay for minutes, must not have publishers refused. Connections take the
    part behind it, up to the rung where publishers are refused.

    Args:
        empty_bytes: the resident set of a daemon with nothing in it.
    """
    largest_bytes = max(config.max_batch_bytes, config.max_message_bytes)
    wanted_bytes = max(max_memory_bytes // 10, 3 * largest_bytes)
    limit_bytes = own_limit_bytes(max_memory_bytes, empty_bytes)
    return min(wanted_bytes, int(limit_bytes * SHRINK_AT) - empty_bytes)


def with_bodies_that_fit(config: Config, max_input_bytes: int) -> Config:
    """Return ``config`` with bodies that fit into the half of the input that comes first."""
    most_bytes = max_input_bytes // 2
    if max(config.max_batch_bytes, config.max_message_bytes) <= most_bytes:
        return config
    return msgspec.structs.replace(
        config,
        max_message_bytes=min(config.max_message_bytes, most_bytes),
        max_batch_bytes=min(config.max_batch_bytes, most_bytes),
    )


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
