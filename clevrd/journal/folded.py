"""Folded: the changes that one record has made, as the fold tells them. Values alone."""

from __future__ import annotations

import msgspec

from clevrd.core.publish_request import PublishRequest
from clevrd.journal.base import Placed


class Repeat(msgspec.Struct, frozen=True, gc=False):
    """A message whose idempotency key is that of one before it; it is not counted."""

    line: int
    tenant: str
    topic: str
    # The first one's, in the partition's epoch of the record.
    offset: int
    id_us: int
    time_us: int


class Refused(msgspec.Struct, frozen=True, gc=False):
    """A message whose idempotency key was used for another message; it is not counted."""

    line: int
    tenant: str
    topic: str


class Cleared(msgspec.Struct, frozen=True, gc=False):
    """A topic that has lost its messages up to an offset, and has another epoch now."""

    tenant: str
    topic: str
    upto: int


class Confirmed(msgspec.Struct, frozen=True):
    """A foreign record that was waiting, and has its place now."""

    position: int
    record: bytes
    request: PublishRequest
    placed: Placed


class Folded(msgspec.Struct, frozen=True):
    """The changes that a record has made.

    Each place has the epoch that it is in: `confirmed` come before the new epoch that a record
    with `is_reset` begins, and behind the one that another stamp begins.
    """

    # The places of the record's own messages, in their order.
    placed: tuple[Placed, ...] = ()
    repeats: tuple[Repeat, ...] = ()
    refused: tuple[Refused, ...] = ()
    # Foreign records before this one, in their order; their messages come before `placed`. Without
    # those that readers must not be given.
    confirmed: tuple[Confirmed, ...] = ()
    # The partition's epoch behind the record; empty as long as it is not known.
    partition_epoch: str = ""
    is_new_epoch: bool = False
    # Readers must not be given `placed`: they are in another epoch than the one that is read again.
    is_again: bool = False
    # The record's writer and its number; empty and 0 for a foreign or bad one.
    writer: str = ""
    sequence: int = 0
    # The record was there before: its messages have the places that they were given then.
    is_retry: bool = False
    # A publish of a foreign producer: it waits for the next record of a node.
    foreign: bool = False
    # The writer has counted otherwise: one of both has not read what the log has.
    contradicts: bool = False
    # The writer's version of clevrd, where the record says it.
    version: str = ""
    # Why nothing of it was counted, as a sentence without a full stop.
    bad: str | None = None
    # It is bad since a later clevrd wrote it, which may have counted it: positions may differ.
    is_later: bool = False
    # Topics that it has cleared, behind `placed`.
    cleared: tuple[Cleared, ...] = ()
