"""GET /clevrd.js and /clevrd.d.ts: serves the JavaScript client from clevrd/web.

The npm package has the same files (clients/javascript); the module served here has one line more,
HOME.

Conditional requests: RFC 9110 §13.1.2.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files
from typing import Final

from clevrd.admission import Admitted, admit_anybody
from clevrd.http_values import JAVASCRIPT, TEXT, Request, Response

# The client has to match its server: after an upgrade, pages have the old client for at most 5
# minutes.
CACHE_CONTROL: Final = "public, max-age=300"

# Longest If-None-Match that is searched: no cache holds more than a few versions.
MAX_IF_NONE_MATCH_CHARS: Final = 1024

# Appended to the served module, so that a page need not name the server it has the module from. The
# file itself lacks this line: bundlers without import.meta, such as React Native's, would not load
# it.
HOME: Final = b"\nhome = import.meta.url;\n"


class AssetEndpoint:
    """One file of clevrd/web, read once."""

    serves_while_draining = True

    def __init__(self, name: str) -> None:
        is_module = name.endswith(".js")
        file = files("clevrd").joinpath("web", name).read_bytes()
        self._body = file + HOME if is_module else file
        self._content_type = JAVASCRIPT if is_module else TEXT
        self._etag = f'"{hashlib.sha256(self._body).hexdigest()[:16]}"'
        self._headers = (
            ("ETag", self._etag),
            ("Cache-Control", CACHE_CONTROL),
            ("X-Content-Type-Options", "nosniff"),
        )

    def admit(self, head: Request) -> Admitted:
        """Refuse no request."""
        return admit_anybody(head)

    def answer(self, admitted: Admitted, body: bytes) -> Response:
        """Return the file, or a 304 if the client's copy is current."""
        if self._is_cached(admitted.head.headers.get("if-none-match", "")):
            return Response(304, b"", self._content_type, self._headers)
        return Response(200, self._body, self._content_type, self._headers)

    def _is_cached(self, tags: str) -> bool:
        if len(tags) > MAX_IF_NONE_MATCH_CHARS:
            return False
        # An asterisk means any version (RFC 9110 §13.1.2).
        known = {tag.strip().removeprefix("W/") for tag in tags.split(",")}
        return self._etag in known or known == {"*"}
