"""NodesSeen: which nodes have written to the log lately, and with which version of clevrd. Pure.

A record is another process's word, so all that is kept of it is bounded here.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Final

# Nodes that are known; a start of a process is one, so a log of many restarts has many.
MAX_NODES: Final = 256
# Versions that are told apart, so that nobody can make labels without end in /metrics.
MAX_VERSIONS: Final = 16

# The version of a node that has not said it: an older clevrd, or one that was not heard out yet.
UNKNOWN: Final = "unknown"
# The versions beyond MAX_VERSIONS.
OTHERS: Final = "others"
_VERSION: Final = re.compile(r"[0-9A-Za-z.+_-]{1,32}")


class NodesSeen:
    """The nodes of which records were read, the one read last at the end."""

    __slots__ = ("_seen_s", "_versions")

    def __init__(self) -> None:
        # When the last record of each was read, on the loop's clock.
        self._seen_s: dict[str, float] = {}
        # The version that each has said last.
        self._versions: dict[str, str] = {}

    def note(self, writer: str, version: str, now_s: float) -> None:
        """Note that a record of a node was read.

        Args:
            version: its writer's, as the record says it; empty where it does not.
        """
        seen_s = self._seen_s
        seen_s.pop(writer, None)
        seen_s[writer] = now_s
        if version:
            self._versions[writer] = version if _VERSION.fullmatch(version) else UNKNOWN
        if len(seen_s) > MAX_NODES:
            self._forget(next(iter(seen_s)))

    def forget_before(self, time_s: float) -> None:
        """Forget nodes of which nothing was read since ``time_s``."""
        for writer, seen_s in tuple(self._seen_s.items()):
            if seen_s >= time_s:
                break
            self._forget(writer)

    def versions(self, own: str, own_version: str) -> dict[str, int]:
        """Return how many nodes have each version, the node ``own`` included."""
        counted = Counter(
            own_version if writer == own else self._versions.get(writer, UNKNOWN)
            for writer in {*self._seen_s, own}
        )
        told = dict(counted.most_common(MAX_VERSIONS))
        if others := counted.total() - sum(told.values()):
            told[OTHERS] = others
        return told

    def _forget(self, writer: str) -> None:
        del self._seen_s[writer]
        self._versions.pop(writer, None)
