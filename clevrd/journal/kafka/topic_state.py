"""TopicState: what Kafka says of the journal's topic, and what of it the journal can't work with.

Pure: it is asked in `questions`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import msgspec

from clevrd.journal.kafka.settings import KafkaSettings
from clevrd.journal.records import MAX_RECORD_BYTES

# Bytes of a record beyond its lines, and of Kafka's own batch around it.
_FRAMING_BYTES: Final = 64 << 10
LEAST_MAX_BYTES: Final = MAX_RECORD_BYTES + _FRAMING_BYTES
# The largest batch of topics that are made here, so that a single large message has room too.
MADE_MAX_BYTES: Final = 8 << 20
# Kafka's own default.
DEFAULT_MAX_BYTES: Final = 1_048_588
# Bytes that a publisher may send by the daemon's defaults.
_USUAL_BYTES: Final = 1 << 20
# The id of a topic in a cluster that has none: before Kafka 2.8.
NO_ID: Final = "0" * 32
_MAX_SEGMENT_BYTES: Final = 1 << 30
# Files of checkpoints are removed whole, too.
_CHECKPOINT_SEGMENT_BYTES: Final = 16 << 20


class TopicState(msgspec.Struct, frozen=True):
    """The topic as it is."""

    topic_id: str
    partitions: int
    replicas: int
    # Its configuration by name; empty where the user may not see it.
    config: Mapping[str, str]

    @property
    def max_record_bytes(self) -> int:
        """Bytes that a record may have."""
        return _number(self.config, "max.message.bytes", DEFAULT_MAX_BYTES)

    @property
    def is_synced(self) -> bool:
        """Whether a record is on the disks before it is answered."""
        return _number(self.config, "flush.messages", 1 << 62) == 1

    @property
    def is_kept(self) -> bool:
        """Whether no change of leaders loses a record that was read.

        A leader that was not in sync is never chosen, and either a second broker has each record
        or it is on the disk.
        """
        if self.is_unclean:
            return False
        return self.is_synced or self.in_sync >= 2

    @property
    def is_unclean(self) -> bool:
        """Whether a leader that was not in sync may be chosen, as far as is known."""
        return self.config.get("unclean.leader.election.enable", "true") != "false"

    @property
    def in_sync(self) -> int:
        """Replicas that have a record before it is answered.

        A topic may ask for more than it has; newer brokers take that for all that it has.
        """
        return min(_number(self.config, "min.insync.replicas", 1), self.replicas)

    @property
    def durability(self) -> str:
        """The worst that an answered record survives."""
        if not self.is_kept:
            return "memory"
        return "fsync" if self.is_synced else "replicas"


def _number(config: Mapping[str, str], name: str, default: int) -> int:
    try:
        return int(config[name])
    except (KeyError, ValueError):
        return default


def refusal_of(state: TopicState, settings: KafkaSettings) -> str | None:
    """Return why the journal can't be in this topic, and what to do; None if it can."""
    shown, config = settings.shown, state.config
    if state.topic_id == NO_ID:
        return f"Kafka at {shown} gives topics no ids; the journal needs 3.0 or newer; update it."
    if state.partitions != settings.partitions:
        return (
            f"The topic at {shown} has {state.partitions} partitions, and the settings say"
            f" {settings.partitions}; write partitions = {state.partitions}, or name another topic."
        )
    if "compact" in config.get("cleanup.policy", "delete"):
        return (
            f"The topic at {shown} is compacted, which would remove messages from its middle; set"
            " its cleanup.policy to delete, or name another topic."
        )
    if state.max_record_bytes < LEAST_MAX_BYTES:
        return (
            f"The topic at {shown} takes {state.max_record_bytes} bytes at once, and the journal"
            f" appends up to {LEAST_MAX_BYTES}; raise its max.message.bytes."
        )
    in_sync = _number(config, "min.insync.replicas", settings.min_replicas)
    if in_sync < settings.min_replicas:
        return (
            f"The topic at {shown} has min.insync.replicas {in_sync}, and the settings say"
            f" {settings.min_replicas} (min_replicas); raise the topic's."
        )
    if settings.min_replicas > state.replicas:
        return (
            f"The topic at {shown} has {state.replicas} replicas, and the settings ask for"
            f" {settings.min_replicas} (min_replicas); give it more."
        )
    return None


def refusal_of_checkpoints(
    state: TopicState, name: str, partitions: int, settings: KafkaSettings
) -> str | None:
    """Return why checkpoints can't be in the topic ``name``, and what to do; None if they can."""
    if state.partitions != partitions or "compact" in state.config.get("cleanup.policy", ""):
        return (
            f"The topic {name} beside the one at {settings.shown} has {state.partitions} partitions"
            f" with cleanup.policy {state.config.get('cleanup.policy', 'not known')}, and the"
            f" journal needs {partitions} with delete; remove it, and it is made again."
        )
    if state.max_record_bytes < LEAST_MAX_BYTES:
        return (
            f"The topic {name} takes {state.max_record_bytes} bytes at once; raise its"
            f" max.message.bytes to {LEAST_MAX_BYTES} or more."
        )
    return None


def warnings_of(state: TopicState, settings: KafkaSettings) -> Iterator[str]:
    """Yield what an operator should know, and what to do about it."""
    config = state.config
    if state.max_record_bytes < _USUAL_BYTES + _FRAMING_BYTES:
        yield (
            f"the topic at {settings.shown} takes no messages above {state.max_record_bytes} bytes;"
            " raise its max.message.bytes for larger ones"
        )
    wanted = topic_config(settings)
    for name in ("retention.ms", "retention.bytes"):
        if name in config and config[name] != wanted[name]:
            yield (
                f"the topic at {settings.shown} has {name} {config[name]}, and the settings say"
                f" {wanted[name]}; the topic's counts"
            )
    yield from _weaknesses(state, settings.shown)


def _weaknesses(state: TopicState, shown: str) -> Iterator[str]:
    """Yield what of the topic loses messages, or refuses them, sooner than it has to."""
    replicas, in_sync = state.replicas, state.in_sync
    if not state.config:
        yield (
            f"the configuration of the topic at {shown} can't be seen, so each change of leaders is"
            " taken for a loss of messages; allow its user DescribeConfigs"
        )
        return
    if state.is_unclean and replicas > 1:
        yield (
            f"the topic at {shown} may get a leader that was not in sync, which loses messages that"
            " were answered; set its unclean.leader.election.enable to false"
        )
    if replicas == 1 and not state.is_synced:
        yield (
            f"the topic at {shown} has one replica, and the newest messages that were answered go"
            " with its broker; give it 3, and min.insync.replicas 2"
        )
    elif in_sync < 2 and not state.is_synced:
        yield (
            f"the topic at {shown} has min.insync.replicas 1, so messages are answered that one"
            " broker alone has; set it to 2"
        )
    elif replicas > 1 and in_sync == replicas:
        fewer = "give it 3 replicas" if replicas == 2 else f"set it to {replicas - 1}"
        yield (
            f"the topic at {shown} takes nothing while one of its {replicas} replicas is away"
            f" (min.insync.replicas {in_sync}); {fewer}"
        )


def topic_config(settings: KafkaSettings) -> dict[str, str]:
    """Return the configuration of a topic for the logs that is made here."""
    retention_bytes = settings.retention_bytes // settings.partitions
    config = {
        "cleanup.policy": "delete",
        "max.message.bytes": str(MADE_MAX_BYTES),
        "retention.ms": str(int(settings.retention_s * 1000) or -1),
        "retention.bytes": str(retention_bytes or -1),
    }
    if retention_bytes:
        # Files are removed whole, and the newest one never.
        segment_bytes = min(_MAX_SEGMENT_BYTES, max(MADE_MAX_BYTES, retention_bytes // 4))
        config["segment.bytes"] = str(segment_bytes)
    return config | _in_sync(settings)


def checkpoints_config(settings: KafkaSettings, state: TopicState) -> dict[str, str]:
    """Return the configuration of the topic for checkpoints.

    They are removed when others have taken their place; its age is a bound where that is not
    allowed. Where the topic of the log may go on with a leader that was not in sync, this one may
    too, or nodes could not read the log again: a checkpoint is checked before it is used.

    Args:
        state: the topic of the log.
    """
    config = {
        "cleanup.policy": "delete",
        "max.message.bytes": str(MADE_MAX_BYTES),
        "retention.ms": str(int(settings.retention_s * 1000) or -1),
        "retention.bytes": "-1",
        "segment.bytes": str(_CHECKPOINT_SEGMENT_BYTES),
    }
    if state.config and state.is_unclean:
        config["unclean.leader.election.enable"] = "true"
    return config | _in_sync(settings)


def _in_sync(settings: KafkaSettings) -> dict[str, str]:
    if not settings.min_replicas:
        return {}
    return {"min.insync.replicas": str(settings.min_replicas)}
