"""Keys and rules for tests that ask with a credential."""

from __future__ import annotations

from base64 import urlsafe_b64encode
from typing import Any

from clevrd.tenants.keys import NewKey, new_key
from clevrd.tenants.settings import Access, read_access

# Keys of the tenants in `rules`: what each may do stands there.
WEB, WRITER, READER, ADMIN, OTHER = (new_key() for _ in range(5))


def key(id: str, made: NewKey, **rights: Any) -> dict[str, Any]:  # as in the file
    """Return an entry of [[tenants.keys]]."""
    return {"id": id, "sha256": made.sha256, **rights}


def rules(mode: str = "required", **auth: Any) -> dict[str, Any]:
    """Return the tables of a file with two tenants."""
    return {
        "auth": {"mode": mode, **auth},
        "tenants": [
            {
                "name": "acme",
                "keys": [
                    key("web", WEB, publish=["orders.*"], subscribe=["orders.**", "news"]),
                    key("writer", WRITER, publish=["**"]),
                    key("reader", READER, subscribe=["**"]),
                    key("admin", ADMIN, publish=["**"], subscribe=["**"], admin=True),
                ],
            },
            {"name": "other", "keys": [key("all", OTHER, publish=["**"], subscribe=["**"])]},
        ],
    }


def access(mode: str = "required", **auth: Any) -> Access:
    """Return the rules of `rules`, read."""
    return read_access(rules(mode, **auth), "a test")


def bearer(made: NewKey) -> dict[str, str]:
    """Return the header that presents a key."""
    return {"Authorization": f"Bearer {made.secret}"}


def subprotocol(secret: str) -> str:
    """Return the WebSocket subprotocol that presents a credential."""
    return "clevrd.bearer." + urlsafe_b64encode(secret.encode()).decode().rstrip("=")
