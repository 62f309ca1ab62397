"""The tables ``[auth]`` and ``[[tenants]]`` of the configuration file: their shapes, checked.

Their meaning for a request is `authenticator`'s. Files that they name are not read here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from clevrd.client_addresses import TrustedProxies
from clevrd.client_certificates import Subject, parse_san, parse_subject
from clevrd.errors import ConfigError, InvalidRequest
from clevrd.table_faults import table_fault
from clevrd.tenants.origins import AllowedOrigins
from clevrd.tenants.tenant import check_tenant_name
from clevrd.tenants.topic_permissions import TopicPermissions

TABLES: Final = ("auth", "tenants")

# Digests that `clevrd key new` prints.
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
# The name of a key in logs and refusals; it is no secret.
KeyId = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}\Z")]
# The algorithms that are taken: never "none", and no symmetric one beside a public key.
PUBLIC_ALGORITHMS: Final = frozenset(
    {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"}
)
SECRET_ALGORITHMS: Final = frozenset({"HS256", "HS384", "HS512"})
# More tenants than this in one file of 1 MiB are not possible.
_COUNT: Final = Meta(ge=1, le=1_000_000_000)


class Table(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """A table of the file; a field that it does not have is a mistake, and told as one."""


class JwtIssuer(Table, frozen=True):
    """``[[auth.jwt]]``: an issuer whose tokens are taken, and where its keys are."""

    issuer: Annotated[str, Meta(min_length=1, max_length=1_024)]
    audience: Annotated[str, Meta(min_length=1, max_length=1_024)]
    algorithms: Annotated[tuple[str, ...], Meta(min_length=1)]
    # One of these three; files are relative to the configuration file.
    jwks_file: str = ""
    jwks_url: str = ""
    secret_file: str = ""
    # Take tokens for tenants that have no [[tenants]] entry, and so no limits of their own.
    any_tenant: bool = False
    # How far the clocks of the issuer and this machine may be apart.
    leeway_s: Annotated[float, Meta(ge=0, le=300)] = 10.0


class Auth(Table, frozen=True):
    """``[auth]``: whether a credential is required, and which web pages are let in."""

    mode: Literal["open", "required"] = "open"
    allow_query_token: bool = False
    allowed_origins: tuple[str, ...] = ()
    # Addresses and networks of proxies whose X-Forwarded-For, -Proto, -Host and -Prefix are
    # believed, and which may send PROXY headers; "unix:" for those on a Unix socket.
    trusted_proxies: tuple[str, ...] = ()
    jwt: tuple[JwtIssuer, ...] = ()


class Holder(Table, frozen=True):
    """A credential of a tenant: a list that is left out allows no topic."""

    id: KeyId
    publish: tuple[str, ...] = ()
    subscribe: tuple[str, ...] = ()
    clear: tuple[str, ...] = ()
    admin: bool = False
    publish_rate_per_s: Annotated[float, Meta(gt=0, le=1e9)] | None = None
    publish_burst: Annotated[int, _COUNT] | None = None
    max_connections: Annotated[int, _COUNT] | None = None


class Key(Holder, frozen=True, kw_only=True):
    """``[[tenants.keys]]``: an API key of a tenant."""

    sha256: Sha256


class CertificateHolder(Holder, frozen=True):
    """``[[tenants.client_certificates]]``: a certificate of a client that TLS has verified."""

    # One of these two, and all of it: `CN=web,O=Acme`, or `URI:spiffe://acme/web`.
    subject: Annotated[str, Meta(max_length=1_024)] = ""
    san: Annotated[str, Meta(max_length=1_024)] = ""


class TenantEntry(Table, frozen=True):
    """``[[tenants]]``: a tenant, its limits and its keys. A limit left out does not hold."""

    name: str
    publish_rate_per_s: Annotated[float, Meta(gt=0, le=1e9)] | None = None
    publish_burst: Annotated[int, _COUNT] | None = None
    max_connections: Annotated[int, _COUNT] | None = None
    max_topics: Annotated[int, _COUNT] | None = None
    max_message_bytes: Annotated[int, _COUNT] | None = None
    max_subscriptions_per_connection: Annotated[int, _COUNT] | None = None
    # Its part of the memory, against the sum of all weights.
    memory_weight: Annotated[float, Meta(gt=0, le=1_000_000)] = 1.0
    # Topics of which `$events` tells when they are occupied and vacated; and topics of which it
    # tells who joined and left, by the ids that subscribers gave.
    lifecycle: tuple[str, ...] = ()
    presence: tuple[str, ...] = ()
    keys: tuple[Key, ...] = ()
    client_certificates: tuple[CertificateHolder, ...] = ()

    @property
    def has_credentials(self) -> bool:
        """Whether somebody holds a key or a certificate of it."""
        return bool(self.keys or self.client_certificates)


class Access(Table, frozen=True):
    """All that the file says of who may do what."""

    auth: Auth = Auth()
    tenants: tuple[TenantEntry, ...] = ()


OPEN: Final = Access()


def read_access(tables: Mapping[str, Any], source: str) -> Access:
    """Return what the tables ``auth`` and ``tenants`` say.

    Args:
        tables: by name, as TOML has them.
        source: where they stand, for errors.

    Raises:
        ConfigError: something is wrong; each mistake has a line of its own, but of mistakes of
            shape only the first one is known.
    """
    try:
        access = msgspec.convert(
            {name: tables[name] for name in TABLES if name in tables}, Access, strict=True
        )
    except msgspec.ValidationError as error:
        raise ConfigError(_shape_mistake(error, source)) from error
    mistakes = [f"{place} ({source}) is not allowed: {why}" for place, why in _mistakes(access)]
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return access


def _shape_mistake(error: msgspec.ValidationError, source: str) -> str:
    place, what = table_fault(error, Access)
    if place.endswith("sha256"):
        # Never with the value: an operator may have pasted the secret itself.
        what = "must be the 64 hexadecimal digits that `clevrd key new` prints, not the secret"
    return f"{place or 'the file'} ({source}) {what}."


def _mistakes(access: Access) -> Iterator[tuple[str, str]]:
    """Yield where something is wrong that no shape says, and why."""
    yield from _auth_mistakes(access)
    names: set[str] = set()
    ids: set[tuple[str, str]] = set()
    digests: dict[str, str] = {}
    for number, tenant in enumerate(access.tenants):
        place = f"tenants[{number}]"
        try:
            check_tenant_name(tenant.name)
        except InvalidRequest as error:
            yield f"{place}.name", str(error)
        if tenant.name in names:
            yield (
                f"{place}.name",
                f"there are two tenants called {tenant.name!a}; give the keys of both to one.",
            )
        names.add(tenant.name)
        if tenant.publish_burst is not None and tenant.publish_rate_per_s is None:
            yield f"{place}.publish_burst", "it means nothing without publish_rate_per_s."
        yield from _list_mistakes(
            place, {"lifecycle": tenant.lifecycle, "presence": tenant.presence}
        )
        for at, key in enumerate(tenant.keys):
            here = f"{place}.keys[{at}]"
            if (tenant.name, key.id) in ids:
                yield f"{here}.id", f"the tenant {tenant.name!a} has two keys called {key.id!a}."
            ids.add((tenant.name, key.id))
            if key.sha256 in digests:
                yield f"{here}.sha256", f"it is the digest of {digests[key.sha256]} as well."
            digests[key.sha256] = here
            yield from _holder_mistakes(here, key)
    yield from _certificate_mistakes(access)


def _certificate_mistakes(access: Access) -> Iterator[tuple[str, str]]:
    seen: dict[object, str] = {}
    for number, tenant in enumerate(access.tenants):
        ids = {key.id for key in tenant.keys}
        for at, holder in enumerate(tenant.client_certificates):
            here = f"tenants[{number}].client_certificates[{at}]"
            if holder.id in ids:
                yield f"{here}.id", f"the tenant {tenant.name!a} has two holders of {holder.id!a}."
            ids.add(holder.id)
            yield from _holder_mistakes(here, holder)
            if bool(holder.subject) == bool(holder.san):
                yield here, "it needs one of subject and san."
                continue
            field = "subject" if holder.subject else "san"
            try:
                name = certificate_name(holder)
            except ValueError as error:
                yield f"{here}.{field}", str(error)
                continue
            if name in seen:
                yield f"{here}.{field}", f"it is that of {seen[name]} as well."
            seen[name] = here


def certificate_name(holder: CertificateHolder) -> Subject | str:
    """Return what has to stand in a certificate: all of its subject, or one of its names.

    Raises:
        ValueError: it is malformed.
    """
    return parse_subject(holder.subject) if holder.subject else parse_san(holder.san)


def _holder_mistakes(place: str, key: Holder) -> Iterator[tuple[str, str]]:
    if not (key.publish or key.subscribe or key.clear or key.admin):
        yield (
            place,
            'it allows nothing; give it publish = ["**"], subscribe = ["**"] or admin = true.',
        )
    yield from _list_mistakes(
        place, {"publish": key.publish, "subscribe": key.subscribe, "clear": key.clear}
    )
    if key.publish_burst is not None and key.publish_rate_per_s is None:
        yield f"{place}.publish_burst", "it means nothing without publish_rate_per_s."


def _list_mistakes(place: str, lists: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, str]]:
    """Yield what is wrong in lists of topics and patterns, by their names."""
    for field, entries in lists.items():
        for entry in entries:
            try:
                TopicPermissions([entry])
            except InvalidRequest as error:
                yield f"{place}.{field}", f"{entry[:80]!a}: {error}"


def _auth_mistakes(access: Access) -> Iterator[tuple[str, str]]:
    auth = access.auth
    try:
        AllowedOrigins(auth.allowed_origins)
    except ValueError as error:
        yield "auth.allowed_origins", str(error)
    try:
        TrustedProxies(auth.trusted_proxies)
    except ValueError as error:
        yield "auth.trusted_proxies", f"{error}."
    for number, issuer in enumerate(auth.jwt):
        yield from _issuer_mistakes(f"auth.jwt[{number}]", issuer)
        if not access.tenants and not issuer.any_tenant:
            yield (
                f"auth.jwt[{number}]",
                "its tokens can be for no tenant, since there is no [[tenants]]; add them, or set"
                " any_tenant = true.",
            )
    if len({(each.issuer, each.audience) for each in auth.jwt}) < len(auth.jwt):
        yield "auth.jwt", "an issuer stands there twice with the same audience."
    if (
        auth.mode == "required"
        and not auth.jwt
        and not any(t.has_credentials for t in access.tenants)
    ):
        yield (
            "auth.mode",
            "nobody could ask for anything, since there is no key and no issuer; make a key with"
            " `clevrd key new`.",
        )


def _issuer_mistakes(place: str, issuer: JwtIssuer) -> Iterator[tuple[str, str]]:
    sources = [name for name in ("jwks_file", "jwks_url", "secret_file") if getattr(issuer, name)]
    if len(sources) != 1:
        yield place, "it needs one of jwks_file, jwks_url and secret_file."
        return
    allowed = SECRET_ALGORITHMS if sources == ["secret_file"] else PUBLIC_ALGORITHMS
    if wrong := [name for name in issuer.algorithms if name not in allowed]:
        yield (
            f"{place}.algorithms",
            f"{wrong[0][:40]!a} is none of {', '.join(sorted(allowed))}, which are for"
            f" {sources[0]}.",
        )
    if issuer.jwks_url and not issuer.jwks_url.startswith("https://"):
        yield f"{place}.jwks_url", "keys are fetched over https:// alone."
