"""Tenants: the head of a request becomes a Tenant, and code behind that takes no name.

`tenant` is what everything behind the gate takes. The other modules read and judge credentials and
the origins of pages. `credentials` finds a credential in a head; `keys`,
`tokens` (with `signing_keys` and `fetched_keys`) and `tickets` say whose it is;
`topic_permissions` and `origin_rule` say what that allows; `authenticator` is made of all these
and the shapes in `settings`.
"""

from clevrd.tenants.tenant import DEFAULT, DEFAULT_TENANT, Tenant

__all__ = ["DEFAULT", "DEFAULT_TENANT", "Tenant"]
