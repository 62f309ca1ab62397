"""Reader: the protocol that each kind of source has to fulfil, and its one error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from clevrd.metrics.sources import SourceState
from clevrd.sources.records import Record

# The state that is shown of a reader, and a reason.
Status = tuple[SourceState, str]

READING: Final[Status] = ("reading", "")
STANDBY: Final[Status] = ("standby", "another process reads it")


class SourceTrouble(Exception):
    """The source can't be read now; the reader is opened again after a while."""

    def __init__(self, state: SourceState, sentence: str, *, soon: bool = False) -> None:
        """Make the error.

        Args:
            state: what to show meanwhile.
            soon: it is no fault, and another look is due within a second.
        """
        super().__init__(sentence)
        self.state = state
        self.soon = soon


class Reader(Protocol):
    """Reads one source, behind the position that is kept for it.

    `open` and `close` take turns. All methods but `close` raise SourceTrouble, and `open` raises it
    with the state "standby" while another process reads.
    """

    # The state of a reader that is open: it reads; another process is sent the records, and this
    # one waits; or its server is away, and it will come back by itself. None while it is not known
    # whether it can read at all: what was shown before is still so.
    status: Status | None

    async def open(self) -> None:
        """Connect, and find the position."""

    async def read(self) -> Sequence[Record]:
        """Return the next records behind those that were returned; what `done` was told is kept.

        It waits for one, at most about half a second, if all that were returned are done with. If
        some are not it waits for none, and may return none although there are some, where it first
        has to know that the others are done with.
        """

    def done(self, records: Sequence[Record]) -> None:
        """Note that these, the next of those that were returned, are done with."""

    async def hold(self) -> None:
        """Show that this process still reads; called now and then while records wait."""

    async def close(self) -> None:
        """Keep the position where that is possible, and disconnect; raises nothing."""
