"""Decisions of the hub and of connections, as `metrics/decisions` keeps them: sentences, figures.

The rules are in `control`, `core` and `connections`; nothing is decided here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Final

from clevrd.control.adaptive_buffer import WINDOW_MAX, WINDOW_MIN, BufferDecision
from clevrd.control.adaptive_throttler import (
    CPU_LIMIT,
    DELAY_S,
    DURATION_S,
    MEMORY_LIMIT,
    SLOW_RATIO,
    ThrottleDecision,
    slow_ratio_of,
)
from clevrd.control.memory_ladder import BEGINS_AT, HYSTERESIS, Rung, describe
from clevrd.control.system_stats import HeldMemory
from clevrd.core.budgets import Budget
from clevrd.core.circuit import CircuitBudget
from clevrd.core.subscriber import Subscriber
from clevrd.core.topic import Topic
from clevrd.metrics.decisions import WINDOW_MERGE_S, Decision, Decisions, Figures

# Throttled topics that are noted by name at one evaluation, at 1 us each, and 10 us for a new one.
_NAMED_TOPICS: Final = 256

_THROTTLE_LIMITS: Final[Figures] = {
    "slow_ratio_over": SLOW_RATIO,
    "cpu_over": CPU_LIMIT,
    "memory_over": MEMORY_LIMIT,
    "delay_ms": DELAY_S * 1000,
}
_WINDOW_LIMITS: Final[Figures] = {"least_messages": WINDOW_MIN, "most_messages": WINDOW_MAX}

# Why the daemon closes a connection, by the code, and by the reason where the code has several; a
# drain, an open circuit, an operator's word and what is counted as a refusal are told elsewhere.
_CLOSES: Final = {
    (1002, ""): "the client broke the WebSocket protocol",
    (1003, ""): "the client sent a binary frame",
    (1007, ""): "the client sent a text that is not UTF-8",
    (1008, "message_too_slow"): "the client sent a message too slowly",
    (1008, ""): "the client sent more frames or bytes than it may",
    (1009, ""): "the client sent a larger message than it may",
    (1011, "write_failed"): "writing to it failed, which the log explains",
    (1013, "too_much_unfinished"): "all clients had sent too much that was not whole",
    (4001, ""): "the client's credential is valid no more",
    (4102, ""): "the client's token or certificate is over",
    (4202, ""): "the client's permissions have changed",
}

# The measure that each rung of the memory ladder begins.
_ON_RUNG: Final = {
    Rung.RINGS_SHRINK: "Rings give up messages that no subscriber waits for",
    Rung.NO_NEW_SUBSCRIBERS: "New subscriptions are refused with 503 memory_limit",
    Rung.NO_PUBLISHES: "Publishes are refused with 429 memory_limit",
}


def note_throttled_topics(
    decisions: Decisions, topics: Sequence[Topic], decision: ThrottleDecision
) -> None:
    """Note that publishes to ``topics`` wait, as an evaluation has just found."""
    for topic in islice(topics, _NAMED_TOPICS):
        if decisions.repeated("throttle", "throttled_topic", topic.tenant, topic.name):
            continue
        decisions.begin(
            "throttle",
            "throttled_topic",
            f"Each publish to the topic waits {DELAY_S * 1000:g} ms: more than"
            f" {SLOW_RATIO:.0%} of its subscribers are slow, and more than {CPU_LIMIT:.0%} of the"
            " CPU or of the memory is used.",
            topic.tenant,
            topic.name,
            inputs={
                "slow_ratio": slow_ratio_of(topic.subscribers, topic.slow),
                "slow_subscribers": topic.slow,
                "subscribers": topic.subscribers,
                "cpu": decision.cpu,
                "memory": decision.memory,
            },
            thresholds=_THROTTLE_LIMITS,
            lasts_s=DURATION_S,
        )
    if len(topics) > _NAMED_TOPICS:
        _note_throttle(
            decisions, "throttled_topics", f"Publishes to {len(topics)} topics wait", decision
        )


def note_throttled_daemon(decisions: Decisions, decision: ThrottleDecision) -> None:
    """Note that all publishes wait, as an evaluation has just found."""
    _note_throttle(decisions, "throttled", "All publishes wait", decision)


def _note_throttle(
    decisions: Decisions, code: str, subject: str, decision: ThrottleDecision
) -> None:
    if decisions.repeated("throttle", code):
        return
    decisions.begin(
        "throttle",
        code,
        f"{subject} {DELAY_S * 1000:g} ms each: {decision.reason}.",
        inputs={
            "slow_ratio": decision.slow_ratio,
            "topic_slow_ratio": decision.topic_slow_ratio,
            "slow_subscribers": decision.slow_subscribers,
            "subscribers": decision.subscribers,
            "cpu": decision.cpu,
            "memory": decision.memory,
        },
        thresholds=_THROTTLE_LIMITS,
        lasts_s=DURATION_S,
    )


def note_window(decisions: Decisions, before: int, decision: BufferDecision) -> None:
    """Note that subscribers may lag by another number of messages than ``before``."""
    now = decision.window_messages
    rule = (
        f"Subscribers may lag {now} messages, and {before} before: the memory that is left, divided"
        f" by the subscribers and the mean size of a message, within {WINDOW_MIN} and {WINDOW_MAX}."
    )
    inputs = {
        "window_messages": now,
        "available_bytes": decision.available_bytes,
        "ring_bytes": decision.ring_bytes,
        "machine_available_bytes": decision.machine_available_bytes,
        "subscribers": decision.subscribers,
        "mean_message_bytes": decision.mean_message_bytes,
    }
    _note_window(decisions, "", rule, inputs)


def note_tenant_window(
    decisions: Decisions, tenant: str, before: int, now: int, inputs: Figures
) -> None:
    """Note that the subscribers of a tenant with a share of its own may lag by another number."""
    rule = (
        f"The tenant's subscribers may lag {now} messages, and {before} before: the same rule over"
        " its own share of the memory, where that gives more than the rule for all."
    )
    _note_window(decisions, tenant, rule, {"window_messages": now, **inputs})


def _note_window(decisions: Decisions, tenant: str, rule: str, inputs: Figures) -> None:
    found = decisions.repeated("window", "window", tenant, within_s=WINDOW_MERGE_S)
    if found is None:
        decisions.begin("window", "window", rule, tenant, inputs=inputs, thresholds=_WINDOW_LIMITS)
    else:
        # The newest window is the one that holds.
        found.rule, found.inputs = rule, inputs


def note_circuit(
    decisions: Decisions,
    topic: Topic,
    reader: Subscriber,
    budget: CircuitBudget,
    threshold: int,
    *,
    is_over: bool,
) -> None:
    """Note that a reader's circuit opens, or that it has opened for too long or too often."""
    code = "circuit_broken" if is_over else "circuit_opened"
    if decisions.repeated("circuit", code, topic.tenant, topic.name):
        return
    sentence = (
        "A circuit_breaker subscriber was disconnected (4101): its circuit opened too often, or was"
        " open for too long."
        if is_over
        else "The circuit of a circuit_breaker subscriber opened: it lost too many messages in one"
        " stall, and is given nothing until it takes more."
    )
    decisions.begin(
        "circuit",
        code,
        sentence,
        topic.tenant,
        topic.name,
        inputs={
            "lost_in_stall": reader.drops_in_stall(topic),
            "openings": len(reader.openings),
            "lag_messages": topic.edge - reader.cursor,
        },
        thresholds={
            "lost_in_stall": threshold,
            "openings": budget.openings,
            "period_s": budget.period_s,
            "open_s": budget.open_s,
        },
        lasts_s=None if is_over else budget.open_s,
    )


def note_pings_unanswered(
    decisions: Decisions,
    tenant: str,
    credential: str,
    address: str,
    inputs: Figures,
    thresholds: Figures,
) -> None:
    """Note that a connection was cut whose peer is not there.

    Args:
        decisions: where it is noted.
        tenant: the client's.
        credential: the id of the client's key; empty for none.
        address: the client's; empty over a Unix socket.
        inputs: what is known of the connection.
        thresholds: the times that a peer has.
    """
    if decisions.repeated("disconnect", "pings_unanswered", tenant, "", credential):
        return
    whose = f" The first was of {address}." if address else ""
    decisions.begin(
        *("disconnect", "pings_unanswered"),
        "Connections were cut since their clients neither answered pings in time nor took what was"
        " sent: the network on the way is gone, or a client's process stands still."
        f"{whose}",
        *(tenant, "", credential),
        inputs=inputs,
        thresholds=thresholds,
    )


def note_closed(decisions: Decisions, code: int, reason: str, tenant: str, credential: str) -> None:
    """Note that a connection was closed, unless that is told as something else.

    Args:
        decisions: where it is noted.
        code: the close code; of a stream that which a WebSocket would have got.
        reason: the reason beside it.
        tenant: the client's.
        credential: the id of the client's key; empty for none.
    """
    why = _CLOSES.get((code, reason)) or _CLOSES.get((code, ""))
    if why is None or decisions.repeated("disconnect", reason, tenant, "", credential):
        return
    decisions.begin(
        *("disconnect", reason),
        f"Connections were closed with {code}: {why}.",
        *(tenant, "", credential),
    )


def note_idle_topics(decisions: Decisions, topics: Sequence[Topic], idle_s: float) -> None:
    """Note that ``topics`` were forgotten because nobody used them."""
    for topic in topics:
        if decisions.repeated("eviction", "idle_topic", topic.tenant):
            continue
        decisions.begin(
            "eviction",
            "idle_topic",
            "Topics without subscribers and publishes were forgotten, with their messages; the"
            " first was the one whose figures these are.",
            topic.tenant,
            inputs={"offset": topic.head, "ring_bytes": topic.held_bytes},
            thresholds={"topic_idle_s": idle_s},
        )


def note_rings_cut(
    decisions: Decisions, portion: str, rings: int, freed_bytes: int, max_bytes: int
) -> None:
    """Note that rings of one portion were cut because all rings together had too much."""
    found = decisions.repeated("eviction", "rings_cut", portion)
    if found is not None:
        return
    decisions.begin(
        "eviction",
        "rings_cut",
        "The oldest messages of the largest rings were given up, since all rings together reached"
        " their bound; those with more than their share of the memory give first.",
        portion,
        inputs={"rings": rings, "freed_bytes": freed_bytes},
        thresholds={"max_ring_bytes": max_bytes},
    )


def note_rings_shrunk(
    decisions: Decisions, portion: str, freed_bytes: int, held: HeldMemory
) -> None:
    """Note that rings of one portion gave up messages because the memory runs out."""
    found = decisions.repeated("eviction", "rings_shrunk", portion)
    if found is not None:
        freed = found.inputs["freed_bytes"] + freed_bytes
        found.inputs = {"freed_bytes": freed, **held_figures(held)}
        return
    decisions.begin(
        "eviction",
        "rings_shrunk",
        "Messages that no subscriber waits for were given up, the largest rings first and those"
        " with more than their share of the memory before others: the memory runs out.",
        portion,
        inputs={"freed_bytes": freed_bytes, **held_figures(held)},
        thresholds=rung_limits(Rung.RINGS_SHRINK),
    )


def note_rung(decisions: Decisions, rung: Rung, held: HeldMemory) -> Decision:
    """Note that the memory ladder has reached ``rung``; the decision holds until it is ended."""
    limits, figures = rung_limits(rung), held_figures(held)
    found = decisions.repeated("memory", rung.word)
    if found is None:
        found = decisions.begin(
            "memory",
            rung.word,
            f"{_ON_RUNG[rung]}, from {limits['begins_at']:.0%} of the memory on until less than"
            f" {limits['ends_below']:.0%} is used: it was {describe(held)}.",
            inputs=figures,
            thresholds=limits,
        )
    else:
        found.inputs = figures
    decisions.hold(found)
    return found


def held_figures(held: HeldMemory) -> dict[str, float]:
    """Return how much of the tightest limit on memory is used, by name."""
    return {
        "used_share": round(held.share, 4),
        "used_bytes": held.used_bytes,
        "limit_bytes": held.limit_bytes,
    }


def rung_limits(rung: Rung) -> dict[str, float]:
    """Return from where on and until where a rung of the memory ladder holds, by name."""
    begins_at = BEGINS_AT[rung]
    return {"begins_at": begins_at, "ends_below": round(begins_at - HYSTERESIS, 4)}


def note_frames_given_back(
    decisions: Decisions, portion: str, kept: Budget, freed_bytes: int
) -> None:
    """Note that lagging readers of one portion lost frames that they kept to another one's."""
    if decisions.repeated("eviction", "kept_frames_given_back", portion):
        return
    decisions.begin(
        "eviction",
        "kept_frames_given_back",
        "Lagging drop_newest and circuit_breaker subscribers lost the newest messages that were"
        " kept for them beyond the rings: they took more than their share, and another tenant"
        " needed its own.",
        portion,
        inputs={"freed_bytes": freed_bytes, "kept_bytes": kept.taken_bytes},
        thresholds={"share_bytes": kept.guaranteed_bytes, "max_kept_bytes": kept.pool.max_bytes},
    )


def note_frames_not_kept(decisions: Decisions, portion: str, kept: Budget) -> None:
    """Note that lagging readers of one portion lost what there was no memory to keep for."""
    if decisions.repeated("eviction", "kept_frames_full", portion):
        return
    decisions.begin(
        "eviction",
        "kept_frames_full",
        "Lagging drop_newest and circuit_breaker subscribers lost messages within their window:"
        " too many lag at once, and as much is kept for them beyond the rings as may be.",
        portion,
        inputs={"kept_bytes": kept.taken_bytes, "left_bytes": kept.left_bytes},
        thresholds={"share_bytes": kept.guaranteed_bytes, "max_kept_bytes": kept.pool.max_bytes},
    )


def note_keys_pushed_out(decisions: Decisions, keys: int, max_keys: int) -> None:
    """Note that idempotency keys were forgotten before their time."""
    found = decisions.repeated("eviction", "idempotency_keys", times=keys)
    if found is None:
        decisions.begin(
            "eviction",
            "idempotency_keys",
            "Idempotency keys were forgotten before their time, since there were as many as may be"
            " remembered; a later repeat is published again.",
            inputs={"keys": keys},
            thresholds={"max_keys": max_keys},
        ).count = keys
