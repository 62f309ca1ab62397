"""Authenticator: the head of a request becomes a Tenant, or a refusal.

It decides from what it was made of and from the head alone. Changed settings make a new one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from clevrd.errors import Forbidden, Unauthorized
from clevrd.http_values import Request
from clevrd.tenants.credentials import Credential, find_credential
from clevrd.tenants.keys import KeyRing
from clevrd.tenants.settings import Access, Key, TenantEntry
from clevrd.tenants.tenant import Limits, Tenant, identify, named_tenant
from clevrd.tenants.topic_permissions import TopicPermissions


class TokenVerifier(Protocol):
    """Takes tokens that are no keys."""

    def verify(self, token: str) -> Tenant:
        """Return the tenant that a token makes of its bearer.

        Raises:
            Unauthorized: it is not valid; the sentence says why and holds nothing of it.
            Unavailable: whether it is valid can't be said in this moment.
        """


class Authenticator:
    """The decision who asks, by the configured tenants and their credentials."""

    def __init__(self, access: Access, tokens: TokenVerifier | None = None) -> None:
        self.is_required = access.auth.mode == "required"
        self._allow_query_token = access.auth.allow_query_token
        self._tokens = tokens
        self._keys = KeyRing(
            {
                key.sha256: tenant_of_key(tenant, key)
                for tenant in access.tenants
                for key in tenant.keys
            }
        )
        # Limits hold for a tenant however it is named.
        self._limits = {tenant.name: limits_of(tenant) for tenant in access.tenants}
        # Tenants that only the holder of a key is, in open mode too.
        self._with_keys = frozenset(tenant.name for tenant in access.tenants if tenant.keys)
        # Without any credential that could be valid none is looked for: an Authorization that is
        # meant for a proxy means nothing here.
        self._looks_for_credentials = bool(self._keys) or tokens is not None

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
        if not self._looks_for_credentials and not self.is_required:
            return self._limited(identify(head, options))
        credential = find_credential(head, options, allow_query_token=self._allow_query_token)
        if credential is None:
            return self._without_credential(head, options)
        tenant = self._of_credential(credential)
        named = named_tenant(head, options)
        if named not in (None, tenant.name):
            raise Forbidden(
                f"The request names the tenant {named}, and its credential is another's; leave the"
                " name out."
            )
        return tenant

    def _of_credential(self, credential: Credential) -> Tenant:
        if not credential.is_ticket:
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
        tenant = identify(head, options)
        if tenant.name in self._with_keys:
            raise Unauthorized(
                f"The tenant {tenant.name} is reached with one of its keys; send it as"
                " Authorization: Bearer or X-API-Key.",
                was_given=False,
            )
        return self._limited(tenant)

    def _limited(self, tenant: Tenant) -> Tenant:
        limits = self._limits.get(tenant.name)
        return tenant if limits is None else Tenant(tenant.name, limits=limits)


def tenant_of_key(tenant: TenantEntry, key: Key) -> Tenant:
    """Return what the holder of ``key`` is."""
    return Tenant(
        tenant.name,
        publish=TopicPermissions(key.publish),
        subscribe=TopicPermissions(key.subscribe),
        is_admin=key.admin,
        limits=limits_of(tenant),
        credential_id=key.id,
    )


def limits_of(tenant: TenantEntry) -> Limits:
    """Return the limits of a tenant as a whole."""
    return Limits(
        publish_rate_per_s=tenant.publish_rate_per_s,
        publish_burst=tenant.publish_burst,
        max_connections=tenant.max_connections,
        max_topics=tenant.max_topics,
        max_message_bytes=tenant.max_message_bytes,
        max_subscriptions_per_connection=tenant.max_subscriptions_per_connection,
    )
