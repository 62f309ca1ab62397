"""The name of a topic in a path: one segment, percent-encoded. RFC 3986 §2.1, §3.3."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import unquote_to_bytes

from clevrd.core.names import check_topic
from clevrd.errors import InvalidRequest

_NO_ENCODING: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")


def topic_in(path: str) -> str:
    """Return the topic that is named in ``path``, a path below /topics/.

    Raises:
        InvalidRequest: its name is not percent-encoded UTF-8, or can't be a topic's.
    """
    segment = path.split("/")[2]
    if _NO_ENCODING.search(segment):
        raise InvalidRequest(
            "The topic in the path holds a % that begins no percent-encoding; send % as %25."
        )
    try:
        name = unquote_to_bytes(segment).decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest("The topic in the path is not UTF-8 once percent-decoded.") from error
    check_topic(name)
    return name
