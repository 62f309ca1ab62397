"""Tenants: one function turns a request's head into a Tenant.

There are no credentials yet: the request names its tenant itself, so tenants are kept apart but not
authenticated. Code behind this function takes a Tenant, never a name from the request.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from clevrd.errors import InvalidRequest
from clevrd.http_values import Request

DEFAULT_TENANT: Final = "default-tenant"

# A tenant's name. No colon, since people write "tenant:topic"; no slash, leading dot or space, so
# that the name can become part of a path, a metric label or a broker's subject.
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")


class Tenant(msgspec.Struct, frozen=True):
    """One tenant, by its name."""

    name: str


# The tenant of requests that name none, and of requests whose answer is the same for all.
DEFAULT: Final = Tenant(DEFAULT_TENANT)


def identify(request: Request, options: dict[str, list[str]]) -> Tenant:
    """Return the tenant that ``request`` names in ``X-Tenant-ID`` or ``tenant=``.

    The query is for browsers, which can't set headers on a WebSocket. A request that names no
    tenant gets the default one.

    Args:
        request: the request's head.
        options: the request's decoded query.

    Raises:
        InvalidRequest: the name is malformed, or given twice with different values.
    """
    header = request.headers.get("x-tenant-id")
    names = options.get("tenant")
    if header is None and names is None:
        return DEFAULT
    given = set(names or ()) | ({header} if header is not None else set())
    if len(given) > 1:
        raise InvalidRequest("The tenant is given twice with different names; give it once.")
    name = given.pop()
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            "The tenant's name must be 1 to 64 letters, digits, dots, underscores or hyphens,"
            " and not begin with a dot or hyphen."
        )
    return Tenant(name)
