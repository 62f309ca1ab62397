"""A credential is found wherever a client can put one, once, and never shown."""

from __future__ import annotations

from base64 import urlsafe_b64encode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clevrd.errors import ClevrdError, InvalidRequest, Unauthorized
from clevrd.http_values import Request
from clevrd.tenants.credentials import Credential, find_credential

CANARY = "clevrd_canary-5up3r.s3cr3t~value"
PROTOCOL = "clevrd.bearer." + urlsafe_b64encode(CANARY.encode()).decode().rstrip("=")


def find(query: str = "", **headers: str) -> Credential | None:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    head = Request("GET", f"/subscribe?{query}", fields)
    return find_credential(head, head.options(), allow_query_token=False)


@pytest.mark.parametrize(
    "headers",
    [
        {"x_api_key": CANARY},
        {"authorization": f"Bearer {CANARY}"},
        {"authorization": f"bearer   {CANARY} "},
        {"sec_websocket_protocol": PROTOCOL},
        {"sec_websocket_protocol": f"clevrd.v1, {PROTOCOL}"},
        {"cookie": f"clevrd_token={CANARY}"},
        {"cookie": f"a=b; clevrd_token={CANARY}; c=d"},
    ],
)
def test_credential_is_found(headers: dict[str, str]) -> None:
    """In a field that a program sets, a subprotocol that a page sets, or a cookie."""
    assert find(**headers) == Credential(CANARY)


def test_credential_of_the_query() -> None:
    """A ticket always, since it is used up; a token only where that is allowed."""
    assert find(f"ticket={CANARY}") == Credential(CANARY, is_ticket=True)
    head = Request("GET", f"/subscribe?token={CANARY}", {})
    found = find_credential(head, head.options(), allow_query_token=True)
    assert found == Credential(CANARY)
    with pytest.raises(Unauthorized, match="URLs end up in logs"):
        find(f"token={CANARY}")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"sec_websocket_protocol": "clevrd.v1"},
        {"cookie": "a=b"},
        {"cookie": "xclevrd_token=1"},
        {"host": "a"},
    ],
)
def test_request_without_a_credential_has_none(headers: dict[str, str]) -> None:
    """What is there for something else is no credential."""
    assert find("topic=t", **headers) is None


@pytest.mark.parametrize(
    ("query", "headers"),
    [
        ("", {"x_api_key": CANARY, "authorization": f"Bearer {CANARY}"}),
        ("", {"x_api_key": CANARY, "cookie": f"clevrd_token={CANARY}"}),
        (f"ticket={CANARY}", {"x_api_key": CANARY}),
        (f"ticket={CANARY}&ticket={CANARY}", {}),
        ("", {"sec_websocket_protocol": f"{PROTOCOL}, {PROTOCOL}"}),
        ("", {"cookie": f"clevrd_token={CANARY}; clevrd_token=other"}),
    ],
)
def test_two_credentials_are_refused(query: str, headers: dict[str, str]) -> None:
    """Which one counts would be a guess, and proxies guess otherwise."""
    with pytest.raises(InvalidRequest, match="send one") as caught:
        find(query, **headers)

    assert CANARY not in str(caught.value)


@pytest.mark.parametrize(
    "headers",
    [
        {"x_api_key": ""},
        {"x_api_key": "two words"},
        {"x_api_key": "k\u00e9y"},
        {"x_api_key": "x" * 5_601},
        {"x_api_key": f"{CANARY}, {CANARY}"},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": f"Basic {CANARY}"},
        {"authorization": CANARY},
        {"authorization": f"Bearer {CANARY} {CANARY}"},
        {"sec_websocket_protocol": "clevrd.bearer."},
        {"sec_websocket_protocol": "clevrd.bearer.!!!"},
        {"sec_websocket_protocol": "clevrd.bearer.a"},
        {"sec_websocket_protocol": "clevrd.bearer.w6k"},
        {"cookie": "clevrd_token="},
    ],
)
def test_what_can_be_no_credential_is_refused(headers: dict[str, str]) -> None:
    """With a challenge, and without the value."""
    with pytest.raises(Unauthorized) as caught:
        find(**headers)

    assert CANARY not in str(caught.value)
    assert caught.value.status == 401
    assert caught.value.headers() == (
        ("WWW-Authenticate", 'Bearer realm="clevrd", error="invalid_token"'),
    )


def test_credential_shows_nothing() -> None:
    """Neither printed, nor in a struct that is printed."""
    assert CANARY not in f"{Credential(CANARY)!r} {Credential(CANARY)} {[Credential(CANARY)]}"


@given(
    st.dictionaries(
        st.sampled_from(["x-api-key", "authorization", "sec-websocket-protocol", "cookie"]),
        st.text(max_size=60),
    )
)
def test_whatever_stands_there_is_a_credential_or_an_error(headers: dict[str, str]) -> None:
    """Never another exception."""
    head = Request("GET", "/", headers)
    try:
        found = find_credential(head, {}, allow_query_token=False)
    except ClevrdError:
        return
    assert found is None or found.secret
