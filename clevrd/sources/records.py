"""Record: one record of a source, and why one can't be taken. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from clevrd.core.message_headers import Headers

NO_HEADERS: Final[Mapping[str, bytes]] = {}


class Record(msgspec.Struct, frozen=True):
    """A record as its source has it."""

    # The record's place in its source, the same whenever it is read: an entry's ID in Redis,
    # partition and offset in Kafka, the sequence in JetStream.
    position: str
    # None where the record has nothing in the place of a value.
    value: bytes | None
    key: bytes | None = None
    # In Redis the fields of the entry. None where a name among them can't be read.
    headers: Mapping[str, bytes] | None = NO_HEADERS
    # Headers that the message is carried with; None for none.
    carried: Headers | None = None
    # The record says that others of its key are to be forgotten, and is no message: it is passed
    # over.
    is_deletion: bool = False


class CannotTake(Exception):
    """A record that can't become a message; the sentence says why, for whoever writes records."""
