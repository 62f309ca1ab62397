"""A page is let in if it is the daemon's own or listed; the log names the setting."""

from __future__ import annotations

import logging

import pytest

from clevrd.errors import OriginNotAllowed
from clevrd.http_values import Request
from clevrd.tenants.origin_rule import DIRECT, OriginRule, Seen
from clevrd.tenants.origins import AllowedOrigins


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def head(method: str = "POST", **fields: str) -> Request:
    return Request(method, "/publish", {k.replace("_", "-"): v for k, v in fields.items()})


def make_rule(*allowed: str) -> OriginRule:
    return OriginRule(AllowedOrigins(allowed), Clock())


def is_let_in(rule: OriginRule, request: Request, seen: Seen = DIRECT) -> bool:
    try:
        rule.check(request, seen)
    except OriginNotAllowed:
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
        # A proxy that is not listed may have ended TLS.
        ({"host": "clevrd.example", "origin": "https://clevrd.example"}, True),
        ({"host": "clevrd.example:8443", "origin": "https://clevrd.example:8443"}, True),
        ({"host": "clevrd.example:80", "origin": "https://clevrd.example"}, False),
        ({"host": "clevrd.example:8080", "origin": "https://clevrd.example"}, False),
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
    seen = Seen("https", is_from_proxy=True, host="app.example")
    request = head(host="inner:8080", origin="https://app.example")
    inner = head(host="inner:8080", origin="http://inner:8080")
    rule = make_rule()

    assert not is_let_in(rule, request)
    assert is_let_in(rule, request, seen)
    assert is_let_in(rule, inner)
    assert not is_let_in(rule, inner, seen)


def test_page_over_http_is_not_own_where_https_is_spoken() -> None:
    """Anybody on the way could have written it."""
    secure = Seen("https")
    rule = make_rule()

    assert is_let_in(rule, head(host="app.example", origin="https://app.example"), secure)
    assert not is_let_in(rule, head(host="app.example", origin="http://app.example"), secure)


@pytest.mark.parametrize(
    ("host", "is_astray"),
    [
        ("evil.example:8080", True),
        ("EVIL.Example:8080", True),
        ("evil.example.:8080", True),
        ("127.0.0.1.nip.io:8080", True),
        ("localhost.evil.example:8080", True),
        ("xn--80ak6aa92e.com:8080", True),
        # The port of a proxy on the same machine, or of nothing at all.
        ("app.example", False),
        ("app.example:443", False),
        ("evil.example:99999", False),
        ("evil.example:8080x", False),
        # Names and addresses that nobody elsewhere decides about.
        ("localhost:8080", False),
        ("LOCALHOST:8080", False),
        ("app.localhost:8080", False),
        ("app.localhost.:8080", False),
        ("build-host:8080", False),
        ("127.0.0.1:8080", False),
        ("127.1:8080", False),
        ("[::1]:8080", False),
        ("", False),
    ],
)
def test_names_that_were_made_to_mean_this_machine_are_not_own(host: str, is_astray: bool) -> None:
    """DNS rebinding: for the browser such a page is the daemon's own, and reads without Origin."""
    local = Seen(loopback_port=8080)
    rule = make_rule()
    read = head("GET", host=host)
    write = head("POST", host=host, origin=f"http://{host.lower()}")

    assert is_let_in(rule, read, local) is not is_astray
    assert not (is_astray and is_let_in(rule, write, local))
    # Not over the loopback interface, or as a listed proxy's, Host is taken at its word.
    assert is_let_in(rule, read)
    assert is_let_in(rule, read, Seen(loopback_port=8080, is_from_proxy=True))
    # Programs send what no page can: a POST or a handshake without Origin.
    assert is_let_in(rule, head("POST", host=host), local)
    assert is_let_in(rule, head("GET", host=host, upgrade="websocket"), local)


def test_name_of_this_machine_can_be_listed() -> None:
    """An alias in /etc/hosts is one to its operator, who lists it with its port."""
    local = Seen(loopback_port=8080)
    read = head("GET", host="Clevrd.test:8080")
    write = head("POST", host="clevrd.test:8080", origin="http://clevrd.test:8080")

    for listed in ("http://clevrd.test:8080", "https://*.test:8080", "*"):
        assert is_let_in(make_rule(listed), read, local)
    assert is_let_in(make_rule("http://clevrd.test:8080"), write, local)
    assert not is_let_in(make_rule("http://clevrd.test"), read, local)


def test_default_port_is_meant_where_host_has_none() -> None:
    """A daemon on port 80 or 443 of its own is asked without a port."""
    rule = make_rule()

    assert not is_let_in(rule, head("GET", host="evil.example"), Seen("http", 80))
    assert not is_let_in(rule, head("GET", host="evil.example"), Seen("https", 443))
    assert is_let_in(rule, head("GET", host="evil.example"), Seen("https", 80))


def test_rule_is_asked_where_a_page_may_ask() -> None:
    """Publishes of programs, which are most requests, are not looked at further."""
    rule = make_rule()

    assert not rule.concerns(head("POST", host="a.example"))
    assert not rule.concerns(head("GET", host="a.example", upgrade="websocket"))
    assert not rule.concerns(head("GET", host="localhost:8080"))
    assert rule.concerns(head("GET", host="a.example"))
    assert rule.concerns(head("POST", host="localhost", origin=""))


def test_listed_page_may_read_what_it_is_answered() -> None:
    """And only a listed page; caches are told that it depends."""
    rule = make_rule("https://app.example")
    listed = head(host="x", origin="https://app.example")

    assert is_let_in(rule, listed)
    assert dict(rule.response_fields(listed))["Access-Control-Allow-Origin"] == (
        "https://app.example"
    )
    for other in (
        head("GET", host="x"),
        head(host="x", origin="http://x"),
        head(origin="http://y"),
    ):
        assert rule.response_fields(other) == (("Vary", "Origin"),)
    # No cache keeps the answer to a POST, and nothing depends on the Origin without a list.
    assert rule.response_fields(head("POST", host="x")) == ()
    assert make_rule().response_fields(head("GET", host="x")) == ()


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
    foreign = head(origin="https://evil.example", access_control_request_method="POST")
    assert rule.preflight_fields(foreign, "POST") == ()


def test_page_of_the_internet_reaches_a_private_network_if_it_is_named() -> None:
    """A star does not let the whole internet into its visitors' networks."""
    fields = {"access_control_request_method": "GET", "origin": "https://app.example"}
    asks = {**fields, "access_control_request_private_network": "true"}
    told = ("Access-Control-Allow-Private-Network", "true")

    assert told in make_rule("https://app.example").preflight_fields(head(**asks), "GET")
    assert told not in make_rule("*").preflight_fields(head(**asks), "GET")
    assert told not in make_rule("https://app.example").preflight_fields(head(**fields), "GET")


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
        is_let_in(rule, head(host="x\nforged", origin="https://a.example"))

    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert all("allowed_origins" in line and "\n" not in line for line in lines)


def test_origins_that_the_log_has_told_of_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    """Thousands of made-up ones are some lines and some memory."""
    rule = make_rule()
    for number in range(3_000):
        is_let_in(rule, head(host="x" * 8_000, origin=f"https://{number}.example" + "x" * 8_000))

    assert len(caplog.records) <= 1_000
    assert len(rule._told) <= 1_000
    assert max(map(len, rule._told)) <= 100
    assert all(len(record.getMessage()) < 400 for record in caplog.records)
