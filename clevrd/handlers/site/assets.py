"""GET /clevrd.js and /clevrd.d.ts: the JavaScript client, as it lies in clevrd/web.

The npm package has the same files (clients/javascript). What is served has one line more.

Conditional requests: RFC 9110 §13.1.2.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files
from typing import Final

from clevrd.admission import Admitted, admit_anybody
from clevrd.http_values import JAVASCRIPT, TEXT, Request, Response

# The client goes with its server: after an upgrade pages have the old one for at most 5 minutes.
CACHE_CONTROL: Final = "public, max-age=300"

# Longer ones are not looked through: no cache holds more than a few versions.
MAX_IF_NONE_MATCH_CHARS: Final = 1024

# Behind what is served, so that a page need not name the server it has the module from. It is
# not in the file: bundlers that know no import.meta, as that of React Native, would not load it.
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
            # It holds nothing that is not public: pages of other origins may import it too.
            ("Access-Control-Allow-Origin", "*"),
        )

    def admit(self, head: Request) -> Admitted:
        """Refuse nothing."""
        return admit_anybody(head)

    def answer(self, admitted: Admitted, body: bytes) -> Response:
        """Return the file, or that the client's copy is as good."""
        if self._is_cached(admitted.head.headers.get("if-none-match", "")):
            return Response(304, b"", self._content_type, self._headers)
        return Response(200, self._body, self._content_type, self._headers)

    def _is_cached(self, tags: str) -> bool:
        if len(tags) > MAX_IF_NONE_MATCH_CHARS:
            return False
        # An asterisk is any version (RFC 9110 §13.1.2).
        known = {tag.strip().removeprefix("W/") for tag in tags.split(",")}
        return self._etag in known or known == {"*"}
