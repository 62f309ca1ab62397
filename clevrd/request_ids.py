"""The id by which a request is found in the logs of several programs: a custom of proxies."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from typing import Final

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


def request_id_of(headers: Mapping[str, str]) -> str:
    """Return the X-Request-ID of a request, or a new one where it has none that can be logged."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
