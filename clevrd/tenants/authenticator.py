"""Authenticator: the head of a request becomes a Tenant, or a refusal.

It decides from what it was made of and from the head alone. Changed settings make a new one, which
also says what became of the tenants that the one before it had let in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Protocol

import msgspec

from clevrd.client_certificates import ClientCertificate, Subject
from clevrd.errors import Forbidden, Unauthorized
from clevrd.http_values import Request
from clevrd.tenants.credentials import Credential, credential_of, find_credential
from clevrd.tenants.keys import KeyRing
from clevrd.tenants.settings import (
    Access,
    Holder,
    TenantEntry,
    certificate_name,
)
from clevrd.tenants.tenant import (
    DEFAULT,
    NO_LIMITS,
    CertificateProof,
    KeyProof,
    Limits,
    Proof,
    Tenant,
    TokenProof,
    named_tenant,
)
from clevrd.tenants.tickets import Tickets
from clevrd.tenants.topic_permissions import TopicPermissions

# Tenants of requests without a credential that are kept for requests to come: each takes 0.2 KB,
# and connections of one tenant share it.
_MAX_OPEN: Final = 1_024


class TokenVerifier(Protocol):
    """Takes tokens that are no keys."""

    def verify(self, token: str) -> Tenant:
        """Return the tenant that a token makes of its bearer.

        Raises:
            Unauthorized: it is not valid; the sentence says why and holds nothing of it.
            Unavailable: whether it is valid can't be said in this moment.
        """

    def vouches_for(self, tenant: str, proof: TokenProof) -> bool:
        """Return whether a token for ``tenant`` that was verified before would be valid still."""


class Authenticator:
    """The decision who asks, by the configured tenants and their credentials.

    Args:
        tokens: takes what is no key; None where no issuer is configured.
        tickets: those that were given out; they outlive this object.
    """

    def __init__(
        self,
        access: Access,
        tokens: TokenVerifier | None = None,
        tickets: Tickets | None = None,
    ) -> None:
        self.is_required = access.auth.mode == "required"
        self._tickets = tickets
        self._allow_query_token = access.auth.allow_query_token
        self._tokens = tokens
        self._keys = KeyRing(
            {
                key.sha256: tenant_of(tenant, key, KeyProof(bytes.fromhex(key.sha256)))
                for tenant in access.tenants
                for key in tenant.keys
            }
        )
        # Limits hold for a tenant whether a credential or a name says who it is.
        self._limits = {tenant.name: limits_of(tenant) for tenant in access.tenants}
        # Tenants that only the holder of a key is, in open mode too.
        self._with_keys = frozenset(
            tenant.name for tenant in access.tenants if tenant.has_credentials
        )
        # Subject, or alternative name, of a certificate -> its holder.
        self._certificates: dict[Subject | str, Tenant] = {
            name: tenant_of(tenant, holder, CertificateProof(name))
            for tenant in access.tenants
            for holder in tenant.client_certificates
            for name in (certificate_name(holder),)
        }
        # Without any credential that could be valid none is looked for: an Authorization that is
        # meant for a proxy means nothing here.
        self._looks_for_credentials = bool(self._keys or self._certificates) or tokens is not None
        # Name -> the tenant of requests without a credential; at most _MAX_OPEN.
        self._open: dict[str, Tenant] = {}

    def identify(self, head: Request, options: Mapping[str, list[str]]) -> Tenant:
        """Return who asks.

        Args:
            options: the request's query, decoded.

        Raises:
            Unauthorized: no credential where one is required, or one that is not valid.
            Forbidden: the request names another tenant than its credential's.
            InvalidRequest: two credentials, or a malformed name of a tenant.
            Unavailable: see `TokenVerifier.verify`.
        """
        tenant = self.holder(head, options)
        return self._without_credential(head, options) if tenant is None else tenant

    def holder(self, head: Request, options: Mapping[str, list[str]]) -> Tenant | None:
        """Return who asks by a credential; None where there is none.

        Raises:
            ClevrdError: as `identify`, except for a credential that is missing.
        """
        if not self._looks_for_credentials and not self.is_required:
            return None
        credential = find_credential(head, options, allow_query_token=self._allow_query_token)
        # A credential in the request says more than the connection's certificate, which may be a
        # proxy's.
        tenant = (
            self._of_certificate(head.certificate)
            if credential is None
            else self._of_credential(credential)
        )
        if tenant is None:
            return None
        named = named_tenant(head, options)
        if named not in (None, tenant.name):
            raise Forbidden(
                f"The request names the tenant {named}, and its credential is another's; leave the"
                " name out."
            )
        return tenant

    def _of_certificate(self, shown: ClientCertificate | None) -> Tenant | None:
        """Return whose a certificate is; None for none, and for one that is nobody's here."""
        if shown is None or not self._certificates:
            return None
        names: list[Subject | str] = [shown.subject, *sorted(shown.names)]
        for name in names:
            holder = self._certificates.get(name)
            if holder is not None:
                return msgspec.structs.replace(holder, expires_at_s=shown.ends_at_s)
        return None

    def renew(self, tenant: Tenant, secret: str) -> Tenant:
        """Return ``tenant`` as the bearer of another key or token.

        Raises:
            Unauthorized: it is not valid.
            Forbidden: it is another tenant's.
            Unavailable: see `TokenVerifier.verify`.
        """
        fresh = self._of_credential(credential_of("the field token", secret))
        if fresh.name != tenant.name:
            raise Forbidden("The credential is another tenant's; open another connection with it.")
        return fresh

    def _of_credential(self, credential: Credential) -> Tenant:
        if credential.is_ticket:
            if self._tickets is not None:
                # The credential behind it may have been revoked since it was given out.
                tenant = self.current(self._tickets.redeem(credential.secret))
                if tenant is not None:
                    return tenant
        else:
            tenant = self._keys.find(credential.secret)
            if tenant is not None:
                return tenant
            # A token has three parts (RFC 7515 §7.1); a key may have any form.
            if self._tokens is not None and credential.secret.count(".") == 2:
                return self._tokens.verify(credential.secret)
        raise Unauthorized(
            "The credential is not known here, or is valid no more; ask the operator for another.",
            was_given=True,
        )

    def _without_credential(self, head: Request, options: Mapping[str, list[str]]) -> Tenant:
        if self.is_required:
            raise Unauthorized(
                "A credential is required; send it as Authorization: Bearer or X-API-Key.",
                was_given=False,
            )
        name = named_tenant(head, options)
        if (name or DEFAULT.name) in self._with_keys:
            raise Unauthorized(
                f"The tenant {name or DEFAULT.name} is reached with one of its keys; send it as"
                " Authorization: Bearer or X-API-Key.",
                was_given=False,
            )
        return self._of_name(name)

    def _of_name(self, name: str | None) -> Tenant:
        """Return the tenant of a request without a credential."""
        if name is None:
            name = DEFAULT.name
        tenant = self._open.get(name)
        if tenant is None:
            if len(self._open) >= _MAX_OPEN:
                self._open.clear()
            tenant = self._open[name] = Tenant(name, limits=self._limits_of(name))
        return tenant

    def _limits_of(self, name: str) -> Limits:
        return self._limits.get(name, NO_LIMITS)

    # --- tenants that were let in before ---------------------------------------------------------

    def current(self, tenant: Tenant) -> Tenant | None:
        """Return ``tenant`` by the rules of now; None where it would not be let in any more.

        So it is, too, where its credential is another tenant's now. Whether the credential has
        expired is not asked.
        """
        holder = self._holder_now(tenant)
        if holder is None or holder.name != tenant.name:
            return None
        if not tenant.has_ticket or isinstance(tenant.proof, TokenProof):
            return holder
        return msgspec.structs.replace(
            tenant,
            subscribe=TopicPermissions(tenant.subscribe.entries, within=holder.subscribe),
            limits=holder.limits,
            key_limits=holder.key_limits,
        )

    def _holder_now(self, tenant: Tenant) -> Tenant | None:
        """Return who holds the credential by which ``tenant`` was let in."""
        proof = tenant.proof
        if proof is None:
            is_open = not self.is_required and tenant.name not in self._with_keys
            return self._of_name(tenant.name) if is_open else None
        if isinstance(proof, KeyProof):
            return self._keys.find_digest(proof.digest)
        if isinstance(proof, CertificateProof):
            found = self._certificates.get(proof.name)
            return found and msgspec.structs.replace(found, expires_at_s=tenant.expires_at_s)
        if self._tokens is None or not self._tokens.vouches_for(tenant.name, proof):
            return None
        # The permissions of a token are its own, and so are those of a ticket of it.
        return msgspec.structs.replace(tenant, limits=self._limits_of(tenant.name))


def tenant_of(tenant: TenantEntry, holder: Holder, proof: Proof) -> Tenant:
    """Return what the holder of a credential is, and by which ``proof``."""
    return Tenant(
        tenant.name,
        publish=TopicPermissions(holder.publish),
        subscribe=TopicPermissions(holder.subscribe),
        clear=TopicPermissions(holder.clear),
        is_admin=holder.admin,
        limits=limits_of(tenant),
        key_limits=limits_of_key(holder),
        credential_id=holder.id,
        proof=proof,
    )


def limits_of(tenant: TenantEntry) -> Limits:
    """Return the limits of a tenant as a whole."""
    return _or_none(
        Limits(
            publish_rate_per_s=tenant.publish_rate_per_s,
            publish_burst=tenant.publish_burst,
            max_connections=tenant.max_connections,
            max_topics=tenant.max_topics,
            max_message_bytes=tenant.max_message_bytes,
            max_subscriptions_per_connection=tenant.max_subscriptions_per_connection,
        )
    )


def limits_of_key(key: Holder) -> Limits:
    """Return the limits of a key, which hold beside those of its tenant."""
    return _or_none(
        Limits(
            publish_rate_per_s=key.publish_rate_per_s,
            publish_burst=key.publish_burst,
            max_connections=key.max_connections,
        )
    )


def _or_none(limits: Limits) -> Limits:
    """Return ``limits``, or the one object that says that there are none."""
    return limits if limits != NO_LIMITS else NO_LIMITS
