"""FileReading: reads what a reload has to read, so that a disk that hangs can't stop the daemon."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

from clevrd.errors import ConfigError
from clevrd.scheduling.beside_loop import OneAtATime, StillBusy

# The files of a reload have a few MiB at most: whatever takes longer has lost its disk.
TIMEOUT_S: Final = 10.0

ResultT = TypeVar("ResultT")


class FileReading:
    """Calls that read files, one after the other, in a thread and within a time."""

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self._calls = OneAtATime(timeout_s, "clevrd-reload")

    async def run(self, call: Callable[[], ResultT]) -> ResultT:
        """Return what ``call`` returns, or raise what it raises.

        Raises:
            ConfigError: it takes too long, or one that took too long has not ended yet.
        """
        try:
            return await self._calls.run(call)
        except StillBusy:
            raise ConfigError(
                "The files of a reload before are being read still; is the disk there that they"
                " are on?"
            ) from None
        except TimeoutError:
            raise ConfigError(
                f"The configuration and the files that it names were not read within"
                f" {self._calls.timeout_s:g} s; is the disk there that they are on?"
            ) from None
