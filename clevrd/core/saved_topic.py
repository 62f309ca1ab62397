"""Where a topic stands when the daemon stops, as the file of a planned restart says it.

Reading and writing that file: restart/format.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from clevrd.core.names import MAX_TOPIC_BYTES

# The largest offset that a resume can spell (handlers/subscribe/resume.py).
MAX_OFFSET: Final = 10**18 - 1
Offset = Annotated[int, Meta(ge=1, le=MAX_OFFSET)]


class SavedTopic(msgspec.Struct, frozen=True):
    """Where a topic stands. Fields it does not name are ignored, so that others can be added."""

    tenant: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}\Z")]
    name: Annotated[str, Meta(min_length=1, max_length=MAX_TOPIC_BYTES)]
    epoch: Annotated[str, Meta(pattern=r"^[0-9A-Za-z._-]{1,64}\Z")]
    created_at: Annotated[
        str, Meta(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z\Z")
    ]
    # Offset of the first message that follows; of the next one to come where none does.
    first: Offset
    # How many follow.
    messages: Annotated[int, Meta(ge=0, le=MAX_OFFSET)]

    @property
    def head(self) -> int:
        """Offset of the topic's newest message."""
        return self.first + self.messages - 1
