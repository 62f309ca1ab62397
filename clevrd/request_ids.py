"""The names by which a request is found in the logs of several programs.

Sources: W3C Trace Context §3.2 (traceparent); X-Request-ID is a custom of proxies.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from typing import Final

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
# Later versions may have more behind the flags; ff is no version, and zeros are no id.
_TRACEPARENT: Final = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-[!-~]{0,64})?"
)


def request_id_of(headers: Mapping[str, str]) -> str:
    """Return the X-Request-ID of a request, or a new one where it has none that can be logged."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)


def traceparent_of(headers: Mapping[str, str]) -> str:
    """Return the traceparent of a request; empty where it has none, or none that is one."""
    given = headers.get("traceparent", "")
    return given if _TRACEPARENT.fullmatch(given) else ""
