"""SharedTexts: a topic's messages in one wire form, made once for all its readers of that form.

How a form spells a message: core/stream_forms. WebSocket readers get the ring's own frames, so a
topic that nobody reads in another way has nothing here. In a topic whose messages have headers that
holds for readers that ask for these, and all others are here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from clevrd.core.budgets import Budget
from clevrd.core.notices import Notice
from clevrd.core.stream_forms import StreamForm, plain_message

# Messages of a topic that are kept spelled in one form, for readers that lag together or come back
# together: the largest window. Messages further back are spelled for each reader alone.
SHARED_MESSAGES: Final = 1_024

# The cost of a kept text besides its bytes: the object's header, its key and the dict's entry.
TEXT_OVERHEAD_BYTES: Final = 160


class SharedTexts:
    """One topic's messages in one form, shared by its readers of that form: their `Spelling`.

    The last SHARED_MESSAGES that were made are kept, while there is budget. A text that is not kept
    is made again for each reader that wants it.
    """

    __slots__ = (
        *("_budget", "_epoch", "_made", "_spell"),
        *("form", "max_messages", "readers", "size_bytes"),
    )

    def __init__(self, form: StreamForm, epoch: str, budget: Budget) -> None:
        self.form = form
        # Spells one message; changes in note_headers only.
        self._spell: Callable[[bytes, bytes, int], bytes] = form.message
        self.max_messages = form.max_messages
        self._epoch = epoch.encode()
        # Changes in `move` only.
        self._budget = budget
        # Offset -> text, in the order in which they were made.
        self._made: dict[int, bytes] = {}
        # Bytes of the texts that are kept, as taken from the budget.
        self.size_bytes = 0
        # How many joined readers have this form; changed by TextsByForm only.
        self.readers = 0

    def texts(self, frames: list[bytes], first: int) -> list[bytes]:
        """Return the messages in ``frames``, of offsets from ``first`` on, in this form."""
        made = self._made
        return [
            made.get(offset) or self._make(frame, offset)
            for offset, frame in enumerate(frames, first)
        ]

    def joined(self, texts: list[bytes]) -> bytes:
        """Return ``texts`` as one piece of the body, for all who are given the same."""
        return self.form.framed(texts[0] if len(texts) == 1 else b"".join(texts))

    def told(self, notice: Notice, offset: int | None = None) -> bytes:
        """Return ``notice`` as a part of a piece."""
        return self.form.notice(notice, self._epoch, offset)

    def notice(self, notice: Notice, offset: int | None = None) -> bytes:
        """Return ``notice`` as one piece of the body."""
        return self.form.framed(self.told(notice, offset))

    def note_headers(self) -> None:
        """Leave out the headers that messages have from now on, unless the form has them."""
        if not self.form.has_headers:
            self._spell = partial(plain_message, self.form)

    def clear(self) -> None:
        """Forget what was made: nobody reads this form any more."""
        self._made.clear()
        self._free(self.size_bytes)

    def give_back(self, wanted_bytes: int, /) -> int:
        """Forget the oldest texts, ``wanted_bytes`` or all; return how many came free."""
        before_bytes = self.size_bytes
        while self._made and before_bytes - self.size_bytes < wanted_bytes:
            self._forget_oldest()
        return before_bytes - self.size_bytes

    def move(self, budget: Budget) -> None:
        """Have the texts counted in another ``budget`` from now on."""
        del self._budget.holders[self]
        budget.holders[self] = None
        self._budget.hand_over(self.size_bytes, budget)
        self._budget = budget

    def _make(self, frame: bytes, offset: int) -> bytes:
        text = self._spell(frame, self._epoch, offset)
        if text is frame:
            # The ring has it anyway.
            return text
        cost = len(text) + TEXT_OVERHEAD_BYTES
        if len(self._made) >= SHARED_MESSAGES:
            self._forget_oldest()
        if self._budget.take(cost):
            self._made[offset] = text
            self.size_bytes += cost
        return text

    def _forget_oldest(self) -> None:
        oldest = next(iter(self._made))
        self._free(len(self._made.pop(oldest)) + TEXT_OVERHEAD_BYTES)

    def _free(self, size_bytes: int) -> None:
        self.size_bytes -= size_bytes
        self._budget.give(size_bytes)


class TextsByForm:
    """The texts of one topic in each form that somebody reads, the ring's own frames excepted."""

    __slots__ = ("_epoch", "budget", "has_headers", "shared")

    def __init__(self, epoch: str, budget: Budget) -> None:
        self._epoch = epoch
        self.budget = budget
        # Some of the topic's messages have headers; changes in note_headers only.
        self.has_headers = False
        # Changes in join and leave only; empty where all readers are given the ring's own frames.
        self.shared: dict[StreamForm, SharedTexts] = {}

    def join(self, form: StreamForm) -> SharedTexts:
        """Count one more reader of ``form``; return how it is given the topic's messages."""
        texts = self.shared.get(form)
        if texts is None:
            texts = self.shared[form] = SharedTexts(form, self._epoch, self.budget)
            if self.has_headers:
                texts.note_headers()
            self.budget.holders[texts] = None
        texts.readers += 1
        return texts

    def leave(self, form: StreamForm) -> None:
        """Count one reader of ``form`` less; the texts go with its last reader."""
        texts = self.shared[form]
        texts.readers -= 1
        if not texts.readers:
            texts.clear()
            del self.shared[form]
            del self.budget.holders[texts]

    def note_headers(self) -> None:
        """Note that messages from now on may have headers."""
        self.has_headers = True
        for texts in self.shared.values():
            texts.note_headers()

    def move(self, budget: Budget) -> None:
        """Have all texts counted in another ``budget`` from now on."""
        for texts in self.shared.values():
            texts.move(budget)
        self.budget = budget
