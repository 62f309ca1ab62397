"""Tenant: to whom a request belongs, what its sender may reach, and how much of it.

Everything behind the gate takes a Tenant, never a name from the request. Whether a credential is
asked for, and which: authenticator.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from clevrd.client_certificates import Subject
from clevrd.core.names import check_topic
from clevrd.core.patterns import Words
from clevrd.errors import Forbidden, InvalidRequest
from clevrd.http_values import Request
from clevrd.tenants.topic_permissions import ALL_TOPICS, TopicPermissions

DEFAULT_TENANT: Final = "default-tenant"

# No colon, since "tenant:topic" is how people see a topic; no slash, dot first or spaces, so that
# the name can become part of a path, a metric label or a broker's subject as it is.
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")


class Limits(msgspec.Struct, frozen=True):
    """The most that a tenant may use; None where only the daemon's own limit holds."""

    publish_rate_per_s: float | None = None
    # Messages at once beyond the rate; None for one second's.
    publish_burst: int | None = None
    max_connections: int | None = None
    max_topics: int | None = None
    max_message_bytes: int | None = None
    max_subscriptions_per_connection: int | None = None


NO_LIMITS: Final = Limits()


class KeyProof(msgspec.Struct, frozen=True):
    """An API key was presented, of which this is the SHA-256."""

    digest: bytes

    def __repr__(self) -> str:
        """Return nothing of the digest: this may reach a log by mistake."""
        return "KeyProof(...)"


class TokenProof(msgspec.Struct, frozen=True):
    """A token was presented that this key of this issuer had signed."""

    issuer: str
    audience: str
    key_id: str | None
    algorithm: str
    # The key itself, as PyJWT takes it: another key of the same id is another one.
    key: Any = None

    def __repr__(self) -> str:
        """Return nothing of the key, which may be a secret: this may reach a log by mistake."""
        return f"TokenProof({self.issuer!r}, {self.audience!r})"


class CertificateProof(msgspec.Struct, frozen=True):
    """A client certificate was shown; ``name`` is what of it the file has."""

    name: Subject | str


Proof = KeyProof | TokenProof | CertificateProof


class Tenant(msgspec.Struct, frozen=True):
    """A tenant as the holder of one credential is one: what it may reach, and how much of it."""

    name: str
    publish: TopicPermissions = ALL_TOPICS
    subscribe: TopicPermissions = ALL_TOPICS
    # The topics whose messages it may have removed.
    clear: TopicPermissions = ALL_TOPICS
    is_admin: bool = False
    limits: Limits = NO_LIMITS
    # Limits of the credential alone, which hold beside those of the tenant: rate and connections.
    key_limits: Limits = NO_LIMITS
    # The credential, as logs and refusals call it; empty where there was none.
    credential_id: str = ""
    # When the credential ends, seconds since 1970; None for never.
    expires_at_s: float | None = None
    # The proof that was presented, by which it can be judged again; None where none was.
    proof: Proof | None = None
    # Whether the request came by a ticket of the holder of ``proof``, who may subscribe to more.
    has_ticket: bool = False

    def check_publish(self, topic: str) -> None:
        """Raise Forbidden unless it may publish to ``topic``, InvalidRequest if it is no name."""
        check_topic(topic)
        if not self.publish.allows(topic):
            raise self._missing("publish", topic)

    def check_subscribe(self, topic: str) -> None:
        """Raise Forbidden unless it may subscribe to ``topic``, InvalidRequest if it is no name."""
        check_topic(topic)
        if not self.subscribe.allows(topic):
            raise self._missing("subscribe", topic)

    def check_clear(self, topic: str) -> None:
        """Raise Forbidden unless it may clear ``topic``, InvalidRequest if it is no name."""
        check_topic(topic)
        if not self.clear.allows(topic):
            raise self._missing("clear", topic)

    def check_pattern(self, text: str, words: Words) -> None:
        """Raise Forbidden unless it may subscribe to some topic that a pattern matches.

        Args:
            text: the pattern as its client spells it.
            words: the same, read.
        """
        if not self.subscribe.allows_some_of(words):
            raise self._missing("subscribe", text)

    def may_use(self, topic: str) -> bool:
        """Return whether it may publish or subscribe to ``topic``, so may know of it."""
        return self.subscribe.allows(topic) or self.publish.allows(topic)

    def check_admin(self) -> None:
        """Raise Forbidden unless it may operate the daemon."""
        if not self.is_admin:
            raise self._lacks("the permission admin")

    def _missing(self, permission: str, topic: str) -> Forbidden:
        return self._lacks(f"the permission to {permission}: {topic[:80]!a}")

    def _lacks(self, what: str) -> Forbidden:
        sentence = f"{self._who()} lacks {what}."
        return Forbidden(sentence, tenant=self.name, credential=self.credential_id)

    def _who(self) -> str:
        if not self.credential_id:
            return f"Tenant {self.name}"
        return f"The credential {self.credential_id} of tenant {self.name}"


# The tenant of requests that name none, and of requests whose answer is the same for all.
DEFAULT: Final = Tenant(DEFAULT_TENANT)


def named_tenant(request: Request, options: Mapping[str, list[str]]) -> str | None:
    """Return the tenant that ``request`` names in ``X-Tenant-ID`` or ``tenant=``; None for none.

    Browsers can't set headers on a WebSocket, hence the query.

    Args:
        request: the request's head.
        options: the request's decoded query.

    Raises:
        InvalidRequest: the name is malformed, or given twice with different values.
    """
    header = request.headers.get("x-tenant-id")
    names = options.get("tenant")
    if header is None and names is None:
        return None
    given = set(names or ()) | ({header} if header is not None else set())
    if len(given) > 1:
        raise InvalidRequest("The tenant is given twice with different names; give it once.")
    name = given.pop()
    check_tenant_name(name)
    return name


def check_tenant_name(name: str) -> None:
    """Raise InvalidRequest unless ``name`` can be a tenant's."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            "The tenant's name must be 1 to 64 letters, digits, dots, underscores or hyphens,"
            " and not begin with a dot or hyphen."
        )
