"""Round: what one step forward of a topic brings its live readers. hub/rounds writes it."""

from __future__ import annotations

from clevrd.core.shared_texts import SharedTexts
from clevrd.core.stream_forms import FRAMES, Spelling
from clevrd.core.subscriber import Subscriber


class Round:
    """One step forward of a topic's live readers; a value that could be carried out elsewhere.

    A round is for readers of one wire form. ``then`` is the same step of the next form, or the next
    part of a step that this form makes in several.
    """

    __slots__ = ("end", "messages", "payload", "readers", "start", "then", "tripped")

    def __init__(
        self,
        start: int,
        frames: list[bytes],
        readers: list[Subscriber],
        spelling: Spelling = FRAMES,
        then: Round | None = None,
    ) -> None:
        # Readers whose cursor is ``start`` get offsets start + 1 to end.
        self.start = start
        self.messages = messages = len(frames)
        self.end = start + messages
        self.payload = spelling.joined(spelling.texts(frames, start + 1)) if readers else b""
        self.readers = readers
        self.then = then
        # Readers whose circuit opens; the caller suspends or closes them: they still lag. A round
        # may carry nothing but these, when there were too many for the round before.
        self.tripped: list[Subscriber] = []


def round_in_forms(
    start: int,
    frames: list[bytes],
    readers: list[Subscriber],
    shared: list[SharedTexts],
    everybody: int,
) -> Round:
    """Return the round that brings ``frames`` to live ``readers``, form by form.

    Args:
        shared: the texts of each form but WebSocket that the topic's readers have, at least one.
        everybody: how many readers the topic has, live or not.
    """
    if len(shared) == 1 and shared[0].readers == everybody:
        return _parts_of(start, frames, readers, shared[0], None)
    by_spelling: dict[Spelling, list[Subscriber]] = {}
    for reader in readers:
        by_spelling.setdefault(reader.spelling, []).append(reader)
    step: Round | None = None
    for spelling, alike in by_spelling.items():
        step = _parts_of(start, frames, alike, spelling, step)
    return step or Round(start, frames, [])


def _parts_of(
    start: int,
    frames: list[bytes],
    readers: list[Subscriber],
    spelling: Spelling,
    then: Round | None,
) -> Round:
    """Return the round of one form, in as many parts as its bound on a write makes of it."""
    size = spelling.max_messages
    *others, last = range(0, len(frames), size)
    step = Round(start + last, frames[last:], readers, spelling, then)
    for first in reversed(others):
        step = Round(start + first, frames[first : first + size], readers, spelling, step)
    return step
