"""Idempotency keys by log time: which messages are repeats. Pure, and the same on every node.

Memory: 0.5 KB for a key of 36 characters (tracemalloc), its topic's name aside.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Final

import msgspec

# Tenant, topic and key.
Slot = tuple[str, str, str]

# Entries that stand together: a snapshot copies one list of references for each.
_CHUNK: Final = 1_000

# Each new key pays for looking at two old ones whose time may be up, and for pushing out eight
# where a record asks for fewer than there are. Both numbers are part of the format: they decide
# which keys are known, so nodes with other numbers would count differently.
_SWEPT_PER_KEY: Final = 2
_PUSHED_OUT_PER_KEY: Final = 8


class LoggedKey(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """A counted message that had a key."""

    tenant: str
    topic: str
    key: str
    content: str
    offset: int
    id_us: int
    time_us: int
    # The log time from which on the key is free again.
    until_us: int

    @property
    def slot(self) -> Slot:
        """The tenant, topic and key that the entry is found by."""
        return self.tenant, self.topic, self.key


class LoggedKeys:
    """The keys of one partition and epoch, in the order of the log."""

    __slots__ = ("_by_slot", "_chunks", "_gone", "_size")

    def __init__(self) -> None:
        self._by_slot: dict[Slot, LoggedKey] = {}
        # The entries, oldest first. A chunk only grows at its end, so whoever has its length has
        # what it was then.
        self._chunks: deque[list[LoggedKey]] = deque()
        # Entries at the beginning of the first chunk that are forgotten.
        self._gone = 0
        self._size = 0

    def __len__(self) -> int:
        """Return how many are held, those included whose time is up and that wait for it."""
        return self._size

    def find(self, slot: Slot, now_us: int) -> LoggedKey | None:
        """Return the message that has the key at log time ``now_us``."""
        entry = self._by_slot.get(slot)
        return entry if entry is not None and now_us < entry.until_us else None

    def add(self, entry: LoggedKey, now_us: int, max_keys: int) -> None:
        """Remember ``entry``, whose key is free; forget the oldest ones beyond ``max_keys``."""
        self.put(entry)
        for _ in range(_SWEPT_PER_KEY):
            if now_us < self._oldest().until_us:
                break
            self._forget_oldest()
        for _ in range(_PUSHED_OUT_PER_KEY):
            if self._size <= max_keys:
                break
            self._forget_oldest()

    def put(self, entry: LoggedKey) -> None:
        """Add ``entry`` as the newest, and forget none."""
        if not self._chunks or len(self._chunks[-1]) == _CHUNK:
            self._chunks.append([])
        self._chunks[-1].append(entry)
        self._by_slot[entry.slot] = entry
        self._size += 1

    def snapshot(self) -> Iterator[list[LoggedKey]]:
        """Return the entries as they are now, oldest first, in parts that are made when asked for.

        The snapshot itself costs a reference for each thousand entries.
        """
        parts = [(chunk, 0, len(chunk)) for chunk in self._chunks]
        if parts:
            parts[0] = (parts[0][0], self._gone, parts[0][2])
        return (list(islice(chunk, first, end)) for chunk, first, end in parts)

    def clear_some(self) -> bool:
        """Let go of some of what is held, when nobody uses it any more; return whether any is."""
        for _ in range(min(len(self._by_slot), _CHUNK)):
            self._by_slot.popitem()
        if self._chunks:
            self._chunks.pop()
        return bool(self._by_slot or self._chunks)

    def _oldest(self) -> LoggedKey:
        return self._chunks[0][self._gone]

    def _forget_oldest(self) -> None:
        entry = self._oldest()
        # The key may be another message's by now, if this one's time was up.
        if self._by_slot.get(entry.slot) is entry:
            del self._by_slot[entry.slot]
        self._size -= 1
        self._gone += 1
        if self._gone == len(self._chunks[0]):
            self._chunks.popleft()
            self._gone = 0
