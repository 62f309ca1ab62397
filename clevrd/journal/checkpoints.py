"""How the fold's state is spelled in a checkpoint: a line of JSON, and lines with its keys. Pure.

Each line begins with its CRC-32, so that a damaged checkpoint is passed over and not believed.
Topics are not in it: see `base.Checkpoint`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from clevrd.journal.logged_keys import LoggedKey

# The version rises when a state means something else than before.
VERSION: Final = 1


class BadCheckpoint(ValueError):
    """A checkpoint that can't be used: its sentence says why."""


class FoldState(msgspec.Struct, frozen=True):
    """All of a fold's state but topics and keys."""

    version: int
    partition: int
    partitions: int
    stamp: str
    epoch: str
    epoch_began_us: int
    time_us: int
    last_id_us: int
    # The last record in the chain, and the chain behind it.
    chain_position: int
    chain: int
    # The last sequence of each writer, the latest writer last.
    writers: tuple[tuple[str, int], ...]
    keys: int
    # Tenant, name and offset of topics that were cleared. A clevrd that does not know this reads
    # the rest, and leaves it out of the checkpoints that it makes.
    cleared: tuple[tuple[str, str, int], ...] = ()


_encoder: Final = msgspec.json.Encoder()
_state_decoder: Final = msgspec.json.Decoder(FoldState)
_keys_decoder: Final = msgspec.json.Decoder(list[LoggedKey])


def spell_state(state: FoldState) -> bytes:
    """Return the first line of a checkpoint's state."""
    return _line(_encoder.encode(state))


def spell_keys(keys: Sequence[LoggedKey]) -> bytes:
    """Return some keys as a further line."""
    return _line(_encoder.encode(keys))


def read_state(spelled: bytes) -> tuple[FoldState, Iterator[list[LoggedKey]]]:
    """Return a checkpoint's state and, line by line as they are asked for, its keys.

    Raises:
        BadCheckpoint: it is damaged, or of another version. The iterator raises it too.
    """
    first, *others = spelled.split(b"\n")
    try:
        state = _state_decoder.decode(_checked(first))
    except msgspec.MsgspecError as error:
        raise BadCheckpoint("its state can't be read") from error
    if state.version != VERSION:
        raise BadCheckpoint(f"its state has version {state.version}; this clevrd has {VERSION}")
    return state, _read_keys(state, others)


def _read_keys(state: FoldState, lines: Sequence[bytes]) -> Iterator[list[LoggedKey]]:
    count = 0
    for line in lines:
        try:
            keys = _keys_decoder.decode(_checked(line))
        except msgspec.MsgspecError as error:
            raise BadCheckpoint("its keys can't be read") from error
        count += len(keys)
        yield keys
    if count != state.keys:
        raise BadCheckpoint(f"it has {count} keys and should have {state.keys}")


def _line(text: bytes) -> bytes:
    return b"%08x %b" % (zlib.crc32(text), text)


def _checked(line: bytes) -> bytes:
    """Return the text of a line; raise BadCheckpoint if it is damaged."""
    text = line[9:]
    if line[:9] != b"%08x " % zlib.crc32(text):
        raise BadCheckpoint("it is damaged: a checksum does not fit")
    return text
