"""A page is let in if it is the daemon's own or listed; the log names the setting."""

from __future__ import annotations

import logging

import pytest

from clevrd.errors import Forbidden
from clevrd.http_values import Request
from clevrd.tenants.origin_rule import OriginRule, forwarded
from clevrd.tenants.origins import AllowedOrigins


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def head(**fields: str) -> Request:
    return Request("POST", "/publish", {k.replace("_", "-"): v for k, v in fields.items()})


def make_rule(*allowed: str, is_secure: bool = False) -> OriginRule:
    return OriginRule(AllowedOrigins(allowed), Clock(), is_secure=is_secure)


def is_let_in(rule: OriginRule, request: Request, seen_as: tuple[str, str] | None = None) -> bool:
    try:
        rule.check(request, seen_as)
    except Forbidden:
        return False
    return True


@pytest.mark.parametrize(
    ("fields", "is_allowed"),
    [
        ({"host": "clevrd.example"}, True),
        ({"host": "clevrd.example", "origin": "http://clevrd.example"}, True),
        ({"host": "clevrd.example:80", "origin": "http://clevrd.example"}, True),
        ({"host": "CLEVRD.example", "origin": "http://clevrd.example"}, True),
        ({"host": "10.0.0.1:8080", "origin": "http://10.0.0.1:8080"}, True),
        ({"host": "clevrd.example:8080", "origin": "http://clevrd.example"}, False),
        ({"host": "clevrd.example", "origin": "https://clevrd.example"}, False),
        ({"host": "clevrd.example", "origin": "http://evil.example"}, False),
        ({"host": "clevrd.example", "origin": "http://clevrd.example.evil.example"}, False),
        ({"host": "clevrd.example", "origin": "null"}, False),
        ({"host": "clevrd.example", "origin": ""}, False),
        ({"host": "", "origin": "http://"}, False),
        ({"origin": "http://clevrd.example"}, False),
    ],
)
def test_own_pages_are_let_in(fields: dict[str, str], is_allowed: bool) -> None:
    """Own is what the client names, by scheme, host and port."""
    assert is_let_in(make_rule(), head(**fields)) is is_allowed


def test_own_is_as_the_client_of_a_proxy_sees_it() -> None:
    """Behind TLS the scheme is https, which the daemon does not see itself."""
    request = head(host="inner:8080", origin="https://app.example")
    rule = make_rule()

    assert not is_let_in(rule, request)
    assert is_let_in(rule, request, ("https", "app.example"))
    assert is_let_in(
        make_rule(is_secure=True), head(host="app.example", origin="https://app.example")
    )


def test_listed_page_may_read_what_it_is_answered() -> None:
    """And only a listed page; caches are told that it depends."""
    rule = make_rule("https://app.example")
    listed = head(host="x", origin="https://app.example")

    assert is_let_in(rule, listed)
    assert dict(rule.response_fields(listed))["Access-Control-Allow-Origin"] == (
        "https://app.example"
    )
    for other in (head(host="x"), head(host="x", origin="http://x"), head(origin="http://y")):
        assert rule.response_fields(other) == (("Vary", "Origin"),)
    assert make_rule().response_fields(head(host="x")) == ()


def test_cookies_are_for_pages_that_are_named() -> None:
    """With a star every page may ask, but not in the name of its visitor."""
    listed = head(host="x", origin="https://app.example")

    named = dict(make_rule("https://*.example").response_fields(listed))
    any_page = dict(make_rule("*").response_fields(listed))

    assert named["Access-Control-Allow-Credentials"] == "true"
    assert any_page["Access-Control-Allow-Origin"] == "https://app.example"
    assert "Access-Control-Allow-Credentials" not in any_page


def test_preflight_is_told_what_may_be_sent() -> None:
    """An OPTIONS of a program is not."""
    rule = make_rule("https://app.example")
    preflight = head(origin="https://app.example", access_control_request_method="POST")

    fields = dict(rule.preflight_fields(preflight, "POST, OPTIONS"))

    assert fields["Access-Control-Allow-Methods"] == "POST, OPTIONS"
    assert {"Authorization", "X-API-Key", "Content-Type"} <= set(
        fields["Access-Control-Allow-Headers"].split(", ")
    )
    assert rule.preflight_fields(head(), "POST") == ()


def test_log_names_the_setting_once_a_minute_for_each_origin(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An operator finds out why; an attacker can't fill the log."""
    clock = Clock()
    rule = OriginRule(AllowedOrigins([]), clock)

    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            is_let_in(rule, head(host="x", origin="https://a.example"))
        is_let_in(rule, head(host="x", origin="https://b.example\nforged"))
        clock.now_s = 60.0
        is_let_in(rule, head(host="x", origin="https://a.example"))

    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert all("allowed_origins" in line and "\n" not in line for line in lines)


def test_origins_that_the_log_has_told_of_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    """Thousands of made-up ones are some lines and some memory."""
    rule = make_rule()
    for number in range(3_000):
        is_let_in(rule, head(host="x", origin=f"https://{number}.example"))

    assert len(caplog.records) <= 1_000
    assert len(rule._told) <= 1_000


@pytest.mark.parametrize(
    ("fields", "seen"),
    [
        ({"host": "in"}, None),
        ({"host": "in", "x_forwarded_proto": "https"}, ("https", "in")),
        ({"host": "in", "x_forwarded_host": "out"}, ("http", "out")),
        ({"x_forwarded_proto": "HTTPS", "x_forwarded_host": "out:1"}, ("https", "out:1")),
        ({"x_forwarded_proto": "http, https", "x_forwarded_host": "evil, out"}, ("https", "out")),
        ({"host": "in", "x_forwarded_proto": "gopher"}, ("http", "in")),
    ],
)
def test_what_a_trusted_proxy_says(fields: dict[str, str], seen: tuple[str, str] | None) -> None:
    """The last one counts: that is what the nearest proxy, which is trusted, has added."""
    assert forwarded(head(**fields).headers, "http") == seen
