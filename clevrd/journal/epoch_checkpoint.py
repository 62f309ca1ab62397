"""A partition epoch in a checkpoint: taken, and read back, in steps of less than 1 ms. Pure.

How the parts are spelled is decided in `checkpoints`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple

from clevrd.journal.base import TopicHead
from clevrd.journal.checkpoints import VERSION, FoldState, spell_keys, spell_state
from clevrd.journal.cleared_topics import ClearedTopics
from clevrd.journal.logged_keys import LoggedKey
from clevrd.journal.partition_epoch import PartitionEpoch
from clevrd.journal.writer_sequences import WriterSequences


class TakenEpoch(NamedTuple):
    """The parts of a checkpoint that are an epoch's."""

    state: bytes
    topics: list[TopicHead]
    is_whole: bool


def state_of(epoch: PartitionEpoch, partition: int, partitions: int, stamp: str) -> FoldState:
    """Return all of an epoch but topics and keys; a record was counted in it."""
    return FoldState(
        VERSION,
        partition,
        partitions,
        stamp,
        epoch.name,
        epoch.began_us,
        epoch.time_us,
        epoch.last_id_us,
        epoch.chain.position,
        epoch.chain.value,
        epoch.writers.rows(),
        len(epoch.keys),
        epoch.cleared.rows(),
    )


def take_epoch(
    epoch: PartitionEpoch, state: FoldState, *, is_whole: bool
) -> Generator[None, None, TakenEpoch]:
    """Take an epoch as it is at the first step; return it behind the last one.

    Args:
        state: the epoch's, as it is at the first step.
        is_whole: put in all topics, though the engine may have them.
    """
    heads = epoch.heads
    is_whole = is_whole or not heads.is_saved
    # The next checkpoint is whole if this one is given up: topics that are in it would be missing.
    heads.is_saved = False
    key_lists = epoch.keys.snapshot()
    topics: list[TopicHead] = []
    for some in heads.take(is_whole=is_whole):
        topics += some
        yield
    lines = [spell_state(state)]
    for keys in key_lists:
        lines.append(spell_keys(keys))
        yield
    heads.is_saved = heads.keeps_changed
    return TakenEpoch(b"\n".join(lines), topics, is_whole)


def epoch_of(state: FoldState, *, keeps_topics: bool) -> PartitionEpoch:
    """Return the epoch of a checkpoint, still without its topics and keys."""
    epoch = PartitionEpoch(state.epoch, state.epoch_began_us, keeps_topics=keeps_topics)
    epoch.time_us = state.time_us
    epoch.last_id_us = state.last_id_us
    epoch.chain.go_on(state.chain_position, state.chain)
    epoch.writers = WriterSequences(state.writers)
    epoch.cleared = ClearedTopics(state.cleared)
    return epoch


def fill_epoch(
    epoch: PartitionEpoch, topics: Sequence[TopicHead], key_lists: Iterator[list[LoggedKey]]
) -> Iterator[None]:
    """Add a checkpoint's topics and keys to an epoch, in steps.

    Raises:
        BadCheckpoint: the keys are damaged.
    """
    yield from epoch.heads.restore(topics)
    for keys in key_lists:
        for key in keys:
            epoch.keys.put(key)
        yield
