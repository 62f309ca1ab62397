"""Reader: the protocol that each kind of source has to fulfil, and its one error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from clevrd.metrics.sources import SourceState
from clevrd.sources.records import Record


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

    # Whether another process is sent the records, and this one waits.
    is_standby: bool

    async def open(self) -> None:
        """Connect, and find the position."""

    async def read(self) -> Sequence[Record]:
        """Return the next records; wait for one, at most about half a second.

        All records that were returned before are done with. Before it returns others, what was
        said to `done` is kept for good.
        """

    def done(self, records: Sequence[Record]) -> None:
        """Note that these, the next of those that were returned, are done with."""

    async def hold(self) -> None:
        """Show that this process still reads; called now and then while records wait."""

    async def close(self) -> None:
        """Keep the position where that is possible, and disconnect; raises nothing."""
