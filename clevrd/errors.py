"""Every error clevrd can answer with; each class owns its HTTP status, close code and machine code.

Errors are not rendered here: `http_values` makes HTTP responses of them, `connections` makes
closes.
"""

from __future__ import annotations

# `clevrd health` imports this module, and importing typing would double what that costs.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import ClassVar


class ClevrdError(Exception):
    """Base of clevrd's own errors; the message is one sentence for the person at fault."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False
    close_code: ClassVar[int] = 1011
    # The tenant that it concerns, and that tenant's credential or the client's address; empty where
    # that is not known.
    tenant: str = ""
    credential: str = ""
    # Which of the bounds that have this code it is; empty where there is only one. No client's word
    # is in it.
    bound: str = ""

    def blame(self, tenant: str, credential: str) -> None:
        """Note who asked, if nobody else is to blame and the fault is the request's own."""
        if not self.tenant and not isinstance(self, RetryLater):
            self.tenant, self.credential = tenant, credential

    def headers(self) -> tuple[tuple[str, str], ...]:
        """Return the response headers this refusal carries besides its body."""
        return ()

    def for_operators(self) -> str:
        """Return the sentence as operators see it."""
        return str(self)

    def inputs(self) -> dict[str, float]:
        """Return the figures that it was decided from, by name, for operators."""
        return {}

    def thresholds(self) -> dict[str, float]:
        """Return the limits that the inputs were compared with, by name, for operators."""
        return {}


class InternalError(ClevrdError):
    """A bug of the daemon; the log has it under the request's id."""

    def __init__(self, request_id: str) -> None:
        super().__init__(
            f"Something went wrong here, not in the request; it has been logged as {request_id}."
        )
        self.request_id = request_id

    def headers(self) -> tuple[tuple[str, str], ...]:
        """Return the id, as proxies name it."""
        return (("X-Request-ID", self.request_id),)


class InvalidRequest(ClevrdError):
    """The request can't be understood; the same request will fail again."""

    status = 400
    code = "invalid_request"
    close_code = 4004


class TooManyTopics(InvalidRequest):
    """A connection would have more topics than it may; a later attempt may match fewer."""

    close_code = 1013
    bound = "topics_per_connection"

    def __init__(self, sentence: str, wanted: int, limit: int) -> None:
        """Args: wanted, limit: topics, or bytes of their names, and how many there may be."""
        super().__init__(sentence)
        self.wanted = wanted
        self.limit = limit

    def inputs(self) -> dict[str, float]:
        """Return how many it would have."""
        return {"wanted": self.wanted}

    def thresholds(self) -> dict[str, float]:
        """Return how many it may have."""
        return {"limit": self.limit}


class Unauthorized(ClevrdError):
    """There is no valid credential in the request; the sentence never holds any part of one."""

    status = 401
    code = "unauthorized"
    close_code = 4001

    def __init__(self, sentence: str, *, was_given: bool) -> None:
        """Args: was_given: the request has a credential, which is not valid."""
        super().__init__(sentence)
        self.was_given = was_given
        # The client's, where it is known; set on the way to the answer.
        self.address = ""

    def for_operators(self) -> str:
        """Add the address, since nothing else says who asks."""
        return f"{self} The first was from {self.address}." if self.address else str(self)

    def headers(self) -> tuple[tuple[str, str], ...]:
        """RFC 6750 §3: a challenge, with an error where a credential was given."""
        challenge = 'Bearer realm="clevrd"'
        return (("WWW-Authenticate", challenge + ', error="invalid_token"' * self.was_given),)


class Forbidden(ClevrdError):
    """The request is understood, and not allowed."""

    status = 403
    code = "forbidden"
    close_code = 4003

    def __init__(self, sentence: str, *, tenant: str = "", credential: str = "") -> None:
        """Args: tenant, credential: whose permission it is, where that is known."""
        super().__init__(sentence)
        self.tenant = tenant
        self.credential = credential


class OriginNotAllowed(Forbidden):
    """A web page asks, and is neither the daemon's own nor listed."""

    code = "origin_not_allowed"


class NotFound(ClevrdError):
    """No endpoint has this path."""

    status = 404
    code = "not_found"
    close_code = 4004


class Conflict(ClevrdError):
    """A topic of this kind can't be changed in this way; the same request fails again."""

    status = 409
    code = "conflict"
    close_code = 4004


class MethodNotAllowed(ClevrdError):
    """The path exists, but not with this method."""

    status = 405
    code = "method_not_allowed"
    close_code = 4004

    def __init__(self, method: str, path: str, allowed: tuple[str, ...]) -> None:
        super().__init__(f"{method} is not allowed on {path}; use {' or '.join(allowed)}.")
        self.allowed = allowed

    def headers(self) -> tuple[tuple[str, str], ...]:
        """Return the Allow field, which RFC 9110 §15.5.6 requires; every path allows OPTIONS."""
        return (("Allow", ", ".join((*self.allowed, "OPTIONS"))),)


class RequestTimeout(ClevrdError):
    """The request did not arrive whole within its time."""

    status = 408
    code = "request_timeout"
    retryable = True

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"The request did not arrive within {limit_s:g} s.")
        self.limit_s = limit_s

    def thresholds(self) -> dict[str, float]:
        """Return the time that it had."""
        return {"request_timeout_s": self.limit_s}


class MessageTooLarge(ClevrdError):
    """The body is over the limit."""

    status = 413
    code = "message_too_large"
    close_code = 1009

    def __init__(
        self,
        limit_bytes: int,
        size_bytes: int | None = None,
        setting: str = "CLEVRD_MAX_MESSAGE_BYTES, for a batch CLEVRD_MAX_BATCH_BYTES",
        tenant: str = "",
    ) -> None:
        """Make the refusal.

        Args:
            limit_bytes: the most that is taken.
            size_bytes: how much it is; None where that is not known yet.
            setting: where the limit stands.
            tenant: whose limit it is; empty where it is the daemon's own.
        """
        size = "" if size_bytes is None else f" of {size_bytes} bytes"
        super().__init__(
            f"The body{size} is larger than {limit_bytes} bytes; send less, or raise the server's"
            f" limit ({setting})."
        )
        self.limit_bytes = limit_bytes
        self.size_bytes = size_bytes
        self.tenant = tenant

    def inputs(self) -> dict[str, float]:
        """Return the size of the body, where it is known."""
        return {} if self.size_bytes is None else {"size_bytes": self.size_bytes}

    def thresholds(self) -> dict[str, float]:
        """Return the most that is taken."""
        return {"limit_bytes": self.limit_bytes}


class ChunksTooSmall(ClevrdError):
    """The body is within its limit, and its chunks are so small that they cost too much to read."""

    status = 413
    code = "message_too_large"
    bound = "chunks"
    close_code = 1009

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(
            f"The body's chunks are too small: with their sizes and line ends they take more than"
            f" {limit_bytes} bytes; send larger chunks, or a Content-Length."
        )
        self.limit_bytes = limit_bytes

    def thresholds(self) -> dict[str, float]:
        """Return the most that is taken with all chunks' sizes."""
        return {"limit_bytes": self.limit_bytes}


class UnsupportedMediaType(ClevrdError):
    """The body is in an encoding or of a type that is not read here."""

    status = 415
    code = "unsupported_media_type"
    close_code = 1003


class UpgradeRequired(ClevrdError):
    """The endpoint speaks WebSocket and the request does not, or not version 13."""

    status = 426
    code = "upgrade_required"
    close_code = 4004

    def headers(self) -> tuple[tuple[str, str], ...]:
        """Return the upgrade and version that are spoken (RFC 9110 §15.5.22, RFC 6455 §4.4)."""
        return (
            ("Upgrade", "websocket"),
            ("Connection", "Upgrade"),
            ("Sec-WebSocket-Version", "13"),
        )


class HeaderTooLarge(ClevrdError):
    """The request's header section is over the limit."""

    status = 431
    code = "header_too_large"


class RetryLater(ClevrdError):
    """A refusal that may succeed later; carries Retry-After in whole seconds, at least 1."""

    retryable = True

    def __init__(
        self,
        sentence: str,
        retry_after_s: float = 1.0,
        *,
        tenant: str = "",
        bound: str = "",
        inputs: dict[str, float] | None = None,
        thresholds: dict[str, float] | None = None,
    ) -> None:
        """Make the refusal.

        Args:
            retry_after_s: seconds after which the client may come back.
            tenant: the tenant that it concerns; empty for the whole daemon.
            bound: which of the bounds that have this code it is.
            inputs: the figures that it was decided from.
            thresholds: what these were compared with.
        """
        super().__init__(sentence)
        self.retry_after_s = retry_after_s
        self.tenant = tenant
        self.bound = bound
        self._inputs = inputs or {}
        self._thresholds = thresholds or {}

    def inputs(self) -> dict[str, float]:
        """Return the figures that it was decided from."""
        return self._inputs

    def thresholds(self) -> dict[str, float]:
        """Return what these were compared with."""
        return self._thresholds

    def headers(self) -> tuple[tuple[str, str], ...]:
        """Return Retry-After, rounded up: RFC 9110 §10.2.3 wants whole seconds."""
        return (("Retry-After", str(self.whole_seconds)),)

    @property
    def whole_seconds(self) -> int:
        """The wait in whole seconds, rounded up, at least 1."""
        return max(1, -int(-self.retry_after_s // 1))


class RateLimited(RetryLater):
    """A tenant, or one of its keys, has spent its publish budget."""

    status = 429
    code = "rate_limited"
    close_code = 1013

    def __init__(
        self,
        tenant: str,
        rate_per_s: float,
        burst: int,
        retry_after_s: float,
        *,
        left: int = 0,
        key: str = "",
        setting: str = "CLEVRD_PUBLISH_RATE, CLEVRD_PUBLISH_BURST",
        credential: str = "",
    ) -> None:
        """Make the refusal.

        Args:
            left: messages that it could still publish now, fewer than it wanted to.
            key: the key whose budget is spent; empty where it is the tenant's.
            setting: where the rate stands.
            credential: who wanted to publish, whosever budget is spent; empty where nobody knows.
        """
        who = f"The key {key} of tenant {tenant}" if key else f"Tenant {tenant}"
        super().__init__(
            f"{who} is over its publish rate of {rate_per_s:g} messages per second"
            f" with a burst of {burst} ({setting}), of which {left} are left;"
            f" slow down and retry in {max(retry_after_s, 0.001):.3g} s.",
            retry_after_s,
            tenant=tenant,
            bound="key" if key else "tenant",
            inputs={"left": left},
            thresholds={"rate_per_s": rate_per_s, "burst": burst},
        )
        self.rate_per_s = rate_per_s
        self.burst = burst
        self.left = left
        self.key = key
        self.credential = credential or key

    def headers(self) -> tuple[tuple[str, str], ...]:
        """Add the IETF draft's RateLimit fields (draft-ietf-httpapi-ratelimit-headers)."""
        policy = "publish-key" if self.key else "publish"
        window_s = max(1, -int(-self.burst / self.rate_per_s // 1))
        return (
            *super().headers(),
            ("RateLimit-Policy", f'"{policy}";q={self.burst};w={window_s}'),
            ("RateLimit", f'"{policy}";r={self.left};t={self.whole_seconds}'),
        )


class ConnectionLimit(RetryLater):
    """There are as many connections of one tenant, key or client address as there may be."""

    status = 429
    code = "connection_limit"
    close_code = 1013

    # Connections end when their clients want that, which nobody knows; a client that comes back
    # this often costs a limit of 100 ten handshakes a second.
    RETRY_S: ClassVar[float] = 10.0

    def __init__(
        self,
        who: str,
        open_now: int,
        limit: int,
        setting: str,
        *,
        tenant: str = "",
        credential: str = "",
    ) -> None:
        """Make the refusal.

        Args:
            who: whose connections are too many, as the subject of the sentence.
            open_now: its connections that are open.
            limit: connections that it may have.
            setting: where the limit stands.
            tenant: the tenant that is meant; empty for none.
            credential: the tenant's key, or the client's address, that is meant; empty for none.
        """
        super().__init__(
            f"{who} has {open_now} connections of {limit} that it may have ({setting});"
            f" close some, or come back in {self.RETRY_S:g} s.",
            self.RETRY_S,
            tenant=tenant,
            bound=setting,
            inputs={"connections": open_now},
            thresholds={"limit": limit},
        )
        self.open_now = open_now
        self.limit = limit
        self.credential = credential

    def headers(self) -> tuple[tuple[str, str], ...]:
        """Add the IETF draft's RateLimit fields, in connections at a time and not by time."""
        return (
            *super().headers(),
            ("RateLimit-Policy", f'"connections";q={self.limit};qu="concurrent-requests"'),
            ("RateLimit", f'"connections";r=0;t={self.whole_seconds}'),
        )


class Throttled(RetryLater):
    """Too many publishes wait already: the daemon is the bottleneck."""

    status = 429
    code = "throttled"
    close_code = 1013


class MemoryShort(RetryLater):
    """The daemon has so little memory left that it takes no messages."""

    status = 429
    code = "memory_limit"
    close_code = 1013


class Unavailable(RetryLater):
    """The daemon can't take this now: it is draining, or at one of its limits."""

    status = 503
    code = "unavailable"
    close_code = 1013


class NoMemoryForSubscribers(Unavailable):
    """The daemon has so little memory left that it takes no new subscribers."""

    code = "memory_limit"


class JournalUnavailable(Unavailable):
    """The journal does not answer; a publish may have been accepted all the same."""

    code = "journal_unavailable"


class JournalFull(Unavailable):
    """The journal has no room; nothing was accepted."""

    status = 507
    code = "journal_full"


class TopicLimit(Unavailable):
    """A tenant has as many topics as it may have."""

    def __init__(
        self, tenant: str, topics: int, limit: int, setting: str, retry_after_s: float
    ) -> None:
        """Make the refusal.

        Args:
            topics: the topics that the tenant has.
            limit: topics that it may have.
            setting: where the limit stands.
        """
        super().__init__(
            f"Tenant {tenant} has {topics} topics ({setting}), of {limit} that it may have;"
            f" use an existing one, or come back in {retry_after_s:g} s.",
            retry_after_s,
            tenant=tenant,
            bound="topics_of_tenant",
            inputs={"topics": topics},
            thresholds={"limit": limit},
        )
        self.topics = topics
        self.limit = limit

    def headers(self) -> tuple[tuple[str, str], ...]:
        """Add the IETF draft's RateLimit fields, in topics at a time."""
        return (
            *super().headers(),
            ("RateLimit-Policy", f'"topics";q={self.limit};qu="topics"'),
            ("RateLimit", f'"topics";r=0;t={self.whole_seconds}'),
        )


class ShuttingDown(Unavailable):
    """The daemon drains: work begun before is finished, and new work is refused."""

    def __init__(self, retry_after_s: float = 1.0) -> None:
        super().__init__(
            "The daemon is shutting down; come back in a moment.", retry_after_s, bound="draining"
        )


class ConfigError(ClevrdError):
    """A setting is wrong; the message names it, where it came from and what is allowed."""

    exit_code: ClassVar[int] = 78  # EX_CONFIG of sysexits.h

    code = "bad_configuration"


class CannotStart(ClevrdError):
    """The configuration is right, but the machine refuses: port in use, no permission."""

    exit_code: ClassVar[int] = 69  # EX_UNAVAILABLE of sysexits.h

    code = "cannot_start"


class NotAllowedHere(CannotStart):
    """The machine refuses for good, until somebody changes it: no permission, no such directory.

    A supervisor need not try again, as it may where a port is in use.
    """

    exit_code: ClassVar[int] = 77  # EX_NOPERM of sysexits.h
