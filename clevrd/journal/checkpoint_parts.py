"""The parts of a checkpoint, for engines that can't keep a large one in one piece. Pure."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Final

import msgspec

from clevrd.journal.base import Checkpoint, TopicHead

# Topics in a part: 200 KB, 0.5 ms of the loop.
_TOPICS: Final = 4_000
_STATE_BYTES: Final = 256 << 10
# Parts of several checkpoints that are loaded at once: older ones are left where they are.
MAX_LOADED: Final = 400

_encoder: Final = msgspec.json.Encoder()
_topics_decoder: Final = msgspec.json.Decoder(list[TopicHead])


def state_parts(checkpoint: Checkpoint) -> Iterator[bytes]:
    """Yield the parts of a checkpoint's state."""
    state = checkpoint.state
    for first in range(0, len(state), _STATE_BYTES):
        yield state[first : first + _STATE_BYTES]


def topic_parts(checkpoint: Checkpoint) -> Iterator[bytes]:
    """Yield the parts of its topics, each spelled when it is asked for."""
    topics = checkpoint.topics
    for first in range(0, len(topics), _TOPICS):
        yield _encoder.encode(topics[first : first + _TOPICS])


class Joined:
    """A checkpoint's parts as they are read back, state first."""

    def __init__(self, states: int) -> None:
        """Args: states: how many parts are of its state."""
        self._states = states
        self._parts = 0
        self._state: list[bytes] = []
        self._topics: list[TopicHead] = []
        # CRC-32 of all parts, one after the other.
        self.crc = 0

    def add(self, part: bytes) -> None:
        """Take the next part; raises msgspec.MsgspecError."""
        self.crc = zlib.crc32(part, self.crc)
        if self._parts < self._states:
            self._state.append(part)
        else:
            self._topics += _topics_decoder.decode(part)
        self._parts += 1

    def checkpoint(self, position: int, digest: str, epoch: str) -> Checkpoint:
        """Return what they are together."""
        return Checkpoint(
            position, digest, epoch, b"".join(self._state), self._topics, is_whole=True
        )
