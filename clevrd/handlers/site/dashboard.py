"""GET /dashboard: the live page for operators, one file that asks the daemon for its figures.

The page itself holds nothing of the daemon, so anybody may have it; what it shows comes from
/admin, which asks who is asking. Content Security Policy: https://www.w3.org/TR/CSP3/.
"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files
from typing import Final

from clevrd.admission import Admitted, admit_anybody
from clevrd.http_values import HTML, NOT_STORED, Request, Response

_FILE: Final = "dashboard.html"


class DashboardEndpoint:
    """The page, read once."""

    serves_while_draining = True

    def __init__(self) -> None:
        page = files("clevrd").joinpath("web", _FILE).read_bytes()
        fields = (
            ("Content-Security-Policy", _policy(page)),
            ("Referrer-Policy", "no-referrer"),
            ("X-Content-Type-Options", "nosniff"),
        )
        self._answer = Response(200, page, HTML, (*NOT_STORED, *fields))

    def admit(self, head: Request) -> Admitted:
        """Refuse no request."""
        return admit_anybody(head)

    def answer(self, admitted: Admitted, body: bytes) -> Response:
        """Return the page."""
        return self._answer


def _policy(page: bytes) -> str:
    """Return what the page may do: run its own script and style, and ask its own server."""
    script, style = _hash_of(page, b"script"), _hash_of(page, b"style")
    return (
        f"default-src 'none'; script-src '{script}' 'self'; style-src '{style}';"
        " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'none'"
    )


def _hash_of(page: bytes, element: bytes) -> str:
    """Return the hash of the only element of this name, as a policy names it."""
    (inside,) = re.findall(rb"<%b\b[^>]*>(.*?)</%b>" % (element, element), page, re.DOTALL)
    return "sha256-" + base64.b64encode(hashlib.sha256(inside).digest()).decode()
