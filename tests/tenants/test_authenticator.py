"""A request is its credential's tenant, and nobody's by a name alone where that is not open."""

from __future__ import annotations

import pytest

from clevrd.errors import ClevrdError, Forbidden, InvalidRequest, Unauthorized
from clevrd.http_values import Request
from clevrd.tenants.authenticator import Authenticator
from clevrd.tenants.keys import new_key
from clevrd.tenants.settings import OPEN, Access, read_access
from clevrd.tenants.tenant import DEFAULT_TENANT, Tenant, TokenProof
from clevrd.tenants.tickets import Tickets
from clevrd.tenants.topic_permissions import TopicPermissions

WEB, PUBLISHER, OTHER = new_key(), new_key(), new_key()


def access(mode: str = "required") -> Access:
    return read_access(
        {
            "auth": {"mode": mode},
            "tenants": [
                {
                    "name": "acme",
                    "max_topics": 7,
                    "keys": [
                        {
                            "id": "web",
                            "sha256": WEB.sha256,
                            "publish": ["orders.*"],
                            "subscribe": ["**"],
                        },
                        {"id": "in", "sha256": PUBLISHER.sha256, "publish": ["**"], "admin": True},
                    ],
                },
                {"name": "other", "keys": [{"id": "k", "sha256": OTHER.sha256, "admin": True}]},
                {"name": "free", "max_topics": 3},
            ],
        },
        "a test",
    )


def ask(authenticator: Authenticator, query: str = "", **headers: str) -> Tenant:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    head = Request("POST", f"/publish?{query}", fields)
    return authenticator.identify(head, head.options())


@pytest.mark.parametrize("mode", ["open", "required"])
def test_key_is_its_tenant_with_its_permissions(mode: str) -> None:
    """And its tenant's limits."""
    web = ask(Authenticator(access(mode)), x_api_key=WEB.secret)
    publisher = ask(Authenticator(access(mode)), authorization=f"Bearer {PUBLISHER.secret}")

    assert (web.name, web.credential_id, web.is_admin, web.limits.max_topics) == (
        *("acme", "web", False),
        7,
    )
    web.check_publish("orders.eu")
    web.check_subscribe("anything")
    with pytest.raises(Forbidden, match=r"The credential web of tenant acme lacks .* publish: 'x'"):
        web.check_publish("x")
    with pytest.raises(Forbidden, match="admin"):
        web.check_admin()
    assert publisher.is_admin
    with pytest.raises(Forbidden, match=r"subscribe: 'orders\.eu'"):
        publisher.check_subscribe("orders.eu")


def test_nobody_without_a_credential_where_it_is_required() -> None:
    """With a challenge, whatever tenant is named."""
    for headers in ({}, {"x_tenant_id": "acme"}, {"x_tenant_id": "made-up"}):
        with pytest.raises(Unauthorized, match="is required") as caught:
            ask(Authenticator(access()), **headers)
        assert caught.value.headers() == (("WWW-Authenticate", 'Bearer realm="clevrd"'),)


def test_open_daemon_serves_who_has_no_credential() -> None:
    """But a tenant with keys is reached with a key, and a limit holds for a name as well."""
    authenticator = Authenticator(access("open"))

    assert ask(authenticator).name == DEFAULT_TENANT
    assert ask(authenticator, x_tenant_id="made-up").name == "made-up"
    assert ask(authenticator, "tenant=free").limits.max_topics == 3
    with pytest.raises(Unauthorized, match="acme is reached with one of its keys"):
        ask(authenticator, "tenant=acme")


@pytest.mark.parametrize("mode", ["open", "required"])
@pytest.mark.parametrize(
    "secret",
    ["nobodys", WEB.sha256, WEB.secret[:-1], "a.b.c", "x" * 2_000],
    ids=["nobodys", "digest", "cut short", "like a token", "too long"],
)
def test_credential_that_is_not_known_is_refused(mode: str, secret: str) -> None:
    """In an open daemon with keys too: its sender believes to be somebody."""
    with pytest.raises(Unauthorized, match="not known") as caught:
        ask(Authenticator(access(mode)), x_api_key=secret)

    assert secret not in str(caught.value)


@pytest.mark.parametrize("mode", ["open", "required"])
def test_name_that_contradicts_the_credential_is_refused(mode: str) -> None:
    """And one that agrees is not."""
    authenticator = Authenticator(access(mode))

    assert ask(authenticator, x_api_key=WEB.secret, x_tenant_id="acme").name == "acme"
    for headers, query in (({"x_tenant_id": "other"}, ""), ({}, "tenant=other")):
        with pytest.raises(Forbidden, match="names the tenant other"):
            ask(authenticator, query, x_api_key=WEB.secret, **headers)
    with pytest.raises(InvalidRequest, match="twice"):
        ask(authenticator, "tenant=acme", x_api_key=WEB.secret, x_tenant_id="other")


def test_daemon_without_credentials_does_not_look_for_any() -> None:
    """An Authorization that is a proxy's, or a key that is somebody else's, changes nothing."""
    authenticator = Authenticator(OPEN)

    assert ask(authenticator, authorization="Basic eDp5", x_api_key="a b").name == DEFAULT_TENANT
    assert ask(authenticator, "token=x&ticket=y").name == DEFAULT_TENANT


class Tokens:
    """Takes one token."""

    def verify(self, token: str) -> Tenant:
        if token != ".".join(["a", "good", "token"]):
            raise Unauthorized("No.", was_given=True)
        return Tenant("of-token")

    def vouches_for(self, tenant: str, proof: TokenProof) -> bool:
        return True


def test_token_is_asked_for_where_no_key_is_meant() -> None:
    """By its three parts; a key that has them is found first."""
    authenticator = Authenticator(access(), Tokens())

    assert ask(authenticator, authorization="Bearer a.good.token").name == "of-token"
    for secret in ("a.bad.token", "agoodtoken"):
        with pytest.raises(ClevrdError):
            ask(authenticator, authorization=f"Bearer {secret}")


def test_key_that_moved_to_another_tenant_is_nobodys_of_the_first() -> None:
    """What is open by it would read the first tenant's topics with the second one's key."""
    before = ask(Authenticator(access()), x_api_key=WEB.secret)
    tables = {
        "tenants": [
            {"name": "acme"},
            {"name": "other", "keys": [{"id": "k", "sha256": WEB.sha256, "subscribe": ["**"]}]},
        ]
    }
    after = Authenticator(read_access(tables, "a test"))

    assert ask(after, x_api_key=WEB.secret).name == "other"
    assert after.current(before) is None


def test_ticket_ends_with_the_key_behind_it() -> None:
    """Also if it is used only afterwards."""
    tickets = Tickets(lambda: 0.0)
    holder = ask(Authenticator(access(), tickets=tickets), x_api_key=WEB.secret)
    used, kept = (tickets.issue(holder, ["news"]) for _ in range(2))
    assert ask(Authenticator(access(), tickets=tickets), f"ticket={used}").has_ticket

    tables = {"auth": {"mode": "open"}, "tenants": [{"name": "acme"}]}
    without = Authenticator(read_access(tables, "a test"), Tokens(), tickets)

    with pytest.raises(Unauthorized):
        ask(without, f"ticket={kept}")


def test_ticket_of_a_token_stays_as_it_is() -> None:
    """However often it is judged again: its permissions are those that it was given."""
    proof = TokenProof("issuer", "audience", None, "RS256")
    holder = Tenant("acme", subscribe=TopicPermissions(["news.*"]), proof=proof)
    tickets = Tickets(lambda: 0.0)
    authenticator = Authenticator(access(), Tokens(), tickets)
    tenant = ask(authenticator, f"ticket={tickets.issue(holder, ['news.*', 'secret'])}")

    for _ in range(2_000):
        now = authenticator.current(tenant)
        assert now is not None
        assert now.subscribe == tenant.subscribe
        tenant = now

    assert tenant.subscribe.allows("news.eu")
    assert not tenant.subscribe.allows("secret")


@pytest.mark.parametrize(
    ("mode", "name", "goes_on"),
    [
        ("open", "free", True),
        ("open", "anybody", True),
        # It has keys by now, which have to be shown in the open mode too.
        ("open", "acme", False),
        ("required", "free", False),
        ("required", "anybody", False),
        ("required", "acme", False),
    ],
)
def test_who_came_without_a_credential_goes_on_where_that_is_still_open(
    mode: str, name: str, goes_on: bool
) -> None:
    """With the limits that its tenant has now."""
    before = ask(Authenticator(OPEN), x_tenant_id=name)

    now = Authenticator(access(mode)).current(before)

    assert (now is not None) is goes_on
    if now is not None:
        assert (now.name, now.limits.max_topics) == (name, 3 if name == "free" else None)
