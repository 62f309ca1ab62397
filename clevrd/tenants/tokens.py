"""Tokens: JSON Web Tokens of the issuers that the configuration names, verified by PyJWT.

A token is believed about nothing before its signature: its issuer and key id choose among what was
configured, and an issuer's algorithms are fixed there. No key and no URL is ever taken from a
token. Sources: RFC 7519 (JWT), RFC 7515 (JWS), RFC 8725 (best current practices).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from typing import Any, Final, NamedTuple, Protocol

import jwt

from clevrd.errors import InvalidRequest, Unauthorized, Unavailable
from clevrd.tenants.settings import JwtIssuer
from clevrd.tenants.tenant import NO_LIMITS, Limits, Tenant, TokenProof, check_tenant_name
from clevrd.tenants.topic_permissions import TopicPermissions

# Tokens whose signature was verified lately; the one verified longest ago goes. An RS256 signature
# takes 60 us, a look-up 2 us.
MAX_REMEMBERED: Final = 10_000
# The longest key id that is looked at, in a header that nobody has verified yet.
MAX_KEY_ID_CHARS: Final = 256
# Patterns of one claim; each costs a publish to a new topic a microsecond.
MAX_PATTERNS: Final = 100

_REQUIRED: Final = ("exp", "iss", "aud", "tenant")


class SigningKeys(Protocol):
    """The keys of one issuer."""

    def find(self, key_id: str | None, algorithm: str) -> Any:
        """Return the key in PyJWT's form, or None where there is none.

        Raises:
            Unavailable: the keys are being fetched; whether this one exists is not known.
        """


class Issuer:
    """An issuer as it was configured, and its keys."""

    __slots__ = ("keys", "settings")

    def __init__(self, settings: JwtIssuer, keys: SigningKeys) -> None:
        self.settings = settings
        self.keys = keys


class _Verified(NamedTuple):
    """A token whose signature was verified: what it made, and with which key."""

    tenant: Tenant
    issuer: Issuer
    proof: TokenProof


class Tokens:
    """Turns tokens into tenants.

    Args:
        issuers: of them, and of nobody else, tokens are taken.
        limits: of the tenants that are configured, by name.
        now_s: the wall clock, seconds since 1970.
    """

    def __init__(
        self,
        issuers: Sequence[Issuer],
        limits: Mapping[str, Limits],
        now_s: Callable[[], float],
    ) -> None:
        self._issuers: dict[str, list[Issuer]] = {}
        for issuer in issuers:
            self._issuers.setdefault(issuer.settings.issuer, []).append(issuer)
        self._limits = limits
        self._now_s = now_s
        # A token's digest -> what it made; at most MAX_REMEMBERED.
        self._remembered: OrderedDict[bytes, _Verified] = OrderedDict()

    def verify(self, token: str) -> Tenant:
        """Return the tenant that ``token`` makes of its bearer.

        Raises:
            Unauthorized: it is not valid; the sentence says why and holds nothing of it.
            Unavailable: its issuer's keys are being fetched.
        """
        digest = sha256(token.encode()).digest()
        verified = self._remembered.get(digest)
        if verified is not None:
            if self._still_holds(verified):
                return verified.tenant
            del self._remembered[digest]
        verified = self._verify(token)
        self._remembered[digest] = verified
        if len(self._remembered) > MAX_REMEMBERED:
            self._remembered.popitem(last=False)
        return verified.tenant

    def vouches_for(self, tenant: str, proof: TokenProof) -> bool:
        """Return whether a token for ``tenant`` that was verified before would be valid still.

        While the keys of its issuer are being fetched the answer is yes: they were its once.
        """
        for issuer in self._issuers.get(proof.issuer, ()):
            settings = issuer.settings
            if settings.audience == proof.audience and proof.algorithm in settings.algorithms:
                try:
                    key = issuer.keys.find(proof.key_id, proof.algorithm)
                except Unavailable:
                    key = proof.key
                return key is not None and key == proof.key and self._may_name(tenant, issuer)
        return False

    def _may_name(self, tenant: str, issuer: Issuer) -> bool:
        """Return whether tokens of ``issuer`` are taken for ``tenant``."""
        return tenant in self._limits or issuer.settings.any_tenant

    def _still_holds(self, verified: _Verified) -> bool:
        """Return whether a token is neither over nor signed with a key that was withdrawn."""
        expires_at_s = verified.tenant.expires_at_s
        if expires_at_s is not None and self._now_s() >= expires_at_s:
            return False
        proof = verified.proof
        return verified.issuer.keys.find(proof.key_id, proof.algorithm) is proof.key

    def _verify(self, token: str) -> _Verified:
        header = _read_header(token)
        claimed = _read_unverified(token)
        issuers = self._issuers.get(claimed.get("iss", ""), ()) if _has_text(claimed, "iss") else ()
        if not issuers:
            raise _refused("it is of no issuer that is known here")
        issuer = _of_audience(issuers, claimed.get("aud"))
        algorithm = header["alg"]
        if algorithm not in issuer.settings.algorithms:
            raise _refused("its algorithm is not one that its issuer may use")
        key = issuer.keys.find(header.get("kid"), algorithm)
        if key is None:
            raise _refused("it is signed with a key that its issuer does not have")
        proof = TokenProof(
            issuer.settings.issuer, issuer.settings.audience, header.get("kid"), algorithm, key
        )
        tenant = self._tenant_of(self._claims(token, issuer, algorithm, key), issuer, proof)
        return _Verified(tenant, issuer, proof)

    def _claims(self, token: str, issuer: Issuer, algorithm: str, key: Any) -> dict[str, Any]:
        """Return the claims of a token once everything about it is verified."""
        settings = issuer.settings
        try:
            claims = jwt.decode(
                token,
                key,
                algorithms=[algorithm],
                audience=settings.audience,
                issuer=settings.issuer,
                # Times are checked below, by the daemon's own clock.
                options={
                    "require": list(_REQUIRED),
                    "verify_exp": False,
                    "verify_nbf": False,
                    "verify_iat": False,
                },
            )
        except jwt.MissingRequiredClaimError as error:
            raise _refused(f"it has no claim {error.claim}") from None
        except jwt.InvalidAudienceError:
            raise _refused("it is meant for another audience") from None
        except jwt.PyJWTError:
            raise _refused("its signature or form is not valid") from None
        self._check_times(claims, settings.leeway_s)
        return claims

    def _check_times(self, claims: Mapping[str, Any], leeway_s: float) -> None:
        now_s = self._now_s()
        for name in ("exp", "nbf", "iat"):
            if name in claims and not _is_time(claims[name]):
                raise _refused(f"its claim {name} is no time (RFC 7519 §2, NumericDate)")
        if claims["exp"] + leeway_s <= now_s:
            raise _refused("it has expired")
        if claims.get("nbf", -math.inf) - leeway_s > now_s:
            raise _refused("it is not valid yet")
        if claims.get("iat", -math.inf) - leeway_s > now_s:
            raise _refused("it was issued in the future; compare the clocks")

    def _tenant_of(self, claims: Mapping[str, Any], issuer: Issuer, proof: TokenProof) -> Tenant:
        name, subject = claims["tenant"], claims.get("sub", "")
        try:
            if not isinstance(name, str):
                raise InvalidRequest("The tenant's name must be a text.")
            check_tenant_name(name)
        except InvalidRequest:
            raise _refused("its claim tenant is no name of a tenant") from None
        if not self._may_name(name, issuer):
            raise _refused("its tenant is not configured here")
        return Tenant(
            name,
            publish=_permissions(claims, "publish"),
            subscribe=_permissions(claims, "subscribe"),
            clear=_permissions(claims, "clear"),
            limits=self._limits.get(name, NO_LIMITS),
            credential_id=_shown(subject) or "of a token",
            expires_at_s=float(claims["exp"]) + issuer.settings.leeway_s,
            proof=proof,
        )


def _read_header(token: str) -> dict[str, Any]:
    try:
        header = jwt.get_unverified_header(token)
    except jwt.PyJWTError:
        raise _refused("it is no JSON Web Token") from None
    if not _has_text(header, "alg"):
        raise _refused("its header names no algorithm")
    if "crit" in header or "b64" in header:
        # Nothing that would be critical is understood here (RFC 7515 §4.1.11).
        raise _refused("its header has an extension that is not understood here")
    key_id = header.get("kid")
    if key_id is not None and not (isinstance(key_id, str) and len(key_id) <= MAX_KEY_ID_CHARS):
        raise _refused("the key id in its header is not one")
    return header


def _read_unverified(token: str) -> dict[str, Any]:
    """Return the claims as they stand there, only to find out whose keys decide."""
    try:
        claims: dict[str, Any] = jwt.decode(token, options={"verify_signature": False})
    except jwt.PyJWTError:
        raise _refused("it is no JSON Web Token") from None
    return claims


def _of_audience(issuers: Sequence[Issuer], audience: object) -> Issuer:
    named = audience if isinstance(audience, list) else [audience]
    for issuer in issuers:
        if issuer.settings.audience in named:
            return issuer
    raise _refused("it is meant for another audience")


def _permissions(claims: Mapping[str, Any], name: str) -> TopicPermissions:
    """Return what a claim allows; nothing where it is missing."""
    entries = claims.get(name, [])
    is_list = isinstance(entries, list) and all(isinstance(entry, str) for entry in entries)
    if not is_list or len(entries) > MAX_PATTERNS:
        raise _refused(f"its claim {name} is no list of at most {MAX_PATTERNS} topics and patterns")
    try:
        return TopicPermissions(entries)
    except InvalidRequest:
        raise _refused(f"its claim {name} has an entry that is no topic and no pattern") from None


def _has_text(values: Mapping[str, Any], name: str) -> bool:
    return isinstance(values.get(name), str) and bool(values[name])


def _is_time(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # A century beyond 9999 is no date, and float(10**400) would raise.
    return is_number and -1e12 < value < 1e12  # type: ignore[operator]


def _shown(subject: object) -> str:
    """Return a subject for logs and refusals, on its line and not too long."""
    return ascii(subject)[1:-1][:64] if isinstance(subject, str) else ""


def _refused(why: str) -> Unauthorized:
    return Unauthorized(f"The token is not valid: {why}.", was_given=True)
