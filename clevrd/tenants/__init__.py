"""Tenants: the head of a request becomes a Tenant, and code behind that takes no name.

`tenant` is what all requests pass today: the request itself names its tenant. The other modules
read and judge credentials and the origins of pages; no endpoint asks them yet, and the
configuration file has no table for them. `credentials` finds a credential in a head; `keys`,
`tokens` (with `signing_keys` and `fetched_keys`) and `tickets` say whose it is;
`topic_permissions` and `origin_rule` say what that allows; `authenticator` is made of all these
and the shapes in `settings`.
"""

from clevrd.tenants.tenant import DEFAULT, DEFAULT_TENANT, Tenant, identify

__all__ = ["DEFAULT", "DEFAULT_TENANT", "Tenant", "identify"]
