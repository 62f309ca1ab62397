"""Stamps of a log in Kafka, and which records are of the log that they were made for. Pure.

Kafka runs nothing of ours beside an append, so it takes records that were made for another life of
the log. Instead all readers leave these out, and all alike, since they go by what the log itself
says of each record. The stamp in a record's header is

- the topic's id (KIP-516), which is new when a topic is deleted and made again;
- and where a change of leaders may lose records, behind it the leader's epoch (KIP-101). The broker
  notes in each batch the epoch in which it was taken. So a record that was made before a change of
  leaders, and taken behind it, is told by the two.

A *void* record has a stamp that is not its log's. It was given no position, and is given none.
"""

from __future__ import annotations

from typing import Final

from clevrd.journal.records import MAGIC

# Hexadecimal digits of a topic's id, and of a leader's epoch.
_ID_DIGITS: Final = 32
_EPOCH_DIGITS: Final = 8
# A record of a node is: the magic, 8 digits of its checksum, a space, `["`, and the stamp.
_OPENING: Final = b' ["'
_STAMP_AT: Final = len(MAGIC) + 8 + len(_OPENING)


def topic_digits(high: int, low: int) -> str:
    """Return a topic's id, given as two signed halves, as hexadecimal digits."""
    mask = (1 << 64) - 1
    return f"{high & mask:016x}{low & mask:016x}"


def spell_stamp(topic_id: str, leader_epoch: int, *, is_kept: bool) -> str:
    """Return the stamp of a log.

    Args:
        is_kept: no change of leaders loses what was read, so its epoch does not matter.
    """
    return topic_id if is_kept else f"{topic_id}{leader_epoch:0{_EPOCH_DIGITS}x}"


def stamp_in(record: bytes) -> str | None:
    """Return the stamp of a node's record; None for any other, and for one that can't be read."""
    if not record.startswith(MAGIC) or not record.startswith(_OPENING, _STAMP_AT - len(_OPENING)):
        return None
    end = record.find(b'"', _STAMP_AT, _STAMP_AT + _ID_DIGITS + _EPOCH_DIGITS + 1)
    return record[_STAMP_AT:end].decode("ascii", "replace") if end > 0 else None


def is_void(record: bytes, topic_id: str, leader_epoch: int | None) -> bool:
    """Return whether ``record`` was made for another life of the log that has it.

    Args:
        leader_epoch: that in which the record was taken; None where the broker does not say.
    """
    stamp = stamp_in(record)
    if stamp is None or stamp == topic_id:
        return False
    if leader_epoch is None or leader_epoch < 0:
        return not stamp.startswith(topic_id)
    return stamp != spell_stamp(topic_id, leader_epoch, is_kept=False)


def is_of_topic(record: bytes, topic_id: str) -> bool:
    """Return whether ``record`` does not name another topic."""
    stamp = stamp_in(record)
    return stamp is None or stamp.startswith(topic_id)
