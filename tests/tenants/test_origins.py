"""A page is let in by its exact origin or by a rule that can't be met by a trick of spelling."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clevrd.errors import ConfigError
from clevrd.tenants.origins import (
    AllowedOrigins,
    Origin,
    own_origin,
    parse_origin,
    read_allowed_origins,
)

LISTED = AllowedOrigins(
    ["https://app.example", "https://*.example.com", "http://localhost:3000", "https://*.a.b:8443"]
)


@pytest.mark.parametrize(
    "origin",
    [
        "https://app.example",
        "https://app.example:443",
        "https://a.example.com",
        "https://a.b.example.com",
        "http://localhost:3000",
        "https://x.a.b:8443",
    ],
)
def test_listed_pages_are_allowed(origin: str) -> None:
    """The default port may be said; browsers leave it out."""
    assert LISTED.allows(origin)


@pytest.mark.parametrize(
    "origin",
    [
        "https://app.example.evil.example",
        "https://evilapp.example",
        "https://evil-app.example",
        "https://example.com",
        "https://evilexample.com",
        "https://a.example.com.evil.net",
        "https://a.example.com.",
        "https://.example.com",
        "https://a..example.com",
        "http://app.example",
        "https://app.example:8443",
        "https://app.example:0443",
        "https://app.example:",
        "https://app.example:99999",
        "https://app.example/",
        "https://app.example/..",
        "https://app.example#",
        "https://app.example?",
        "https://app.example\\@evil.net",
        "https://app.example@evil.net",
        "https://evil.net@app.example",
        "https://user:pass@app.example",
        "HTTPS://app.example",
        "https://APP.example",
        "https://app.example ",
        " https://app.example",
        "https://app.example,https://evil.net",
        "https://app.example https://evil.net",
        "https://app.examp\u0142e",
        "https://app.example\x00",
        "https://app.example\n",
        "https://xn--app-9cd.example",
        "http://localhost",
        "http://localhost:30000",
        "http://localhost.evil.net:3000",
        "http://127.0.0.1:3000",
        "file://",
        "chrome-extension://abcdefgh",
        "null",
        "NULL",
        "*",
        "",
        "https://*.example.com",
        "https://" + "a" * 64 + ".example.com",
        "https://" + "a." * 200 + "example.com",
    ],
)
def test_tricks_of_spelling_are_not_allowed(origin: str) -> None:
    """Suffixes, prefixes, case, ports, users, dots, punycode, null, control characters."""
    assert not LISTED.allows(origin)


def test_null_is_allowed_only_where_it_is_listed() -> None:
    """A sandboxed frame of any page has it, so a star does not include it."""
    assert not AllowedOrigins(["*"]).allows("null")
    assert AllowedOrigins(["null"]).allows("null")
    assert not AllowedOrigins(["null"]).allows("https://app.example")


@pytest.mark.parametrize(
    "origin", ["capacitor://localhost", "chrome-extension://abcdefgh", "moz-extension://0a-1b"]
)
def test_app_is_allowed_by_its_whole_origin(origin: str) -> None:
    """Its scheme is nobody's on the web, so neither a star nor another entry means it."""
    assert AllowedOrigins([origin]).allows(origin)
    assert AllowedOrigins([origin])
    for other in (f"{origin}x", origin.upper(), f"{origin}/", f"{origin}:80", f"{origin}\n"):
        assert not AllowedOrigins([origin]).allows(other)
    assert not AllowedOrigins(["*", "null", "https://*.localhost"]).allows(origin)


def test_star_allows_what_is_an_origin() -> None:
    """And nothing that no browser sends."""
    assert AllowedOrigins(["*"]).allows("https://any.example")
    assert not AllowedOrigins(["*"]).allows("https://any.example/path")


@pytest.mark.parametrize(
    "entry",
    [
        *("app.example", "https://app.example/", "https://*", "https://*example.com"),
        *(
            "https://a.*.com",
            "*.example.com",
            "ws://app.example",
            "",
            "file://",
            "https://u@app.example",
        ),
        *("https://app.example:0", "https://app.example:99999"),
    ],
)
def test_entry_that_is_no_origin_is_told(entry: str) -> None:
    """With what to write instead."""
    with pytest.raises(ValueError, match="write it as browsers do"):
        AllowedOrigins([entry])


@pytest.mark.parametrize(
    ("scheme", "host", "origin"),
    [
        ("http", "clevrd.example", Origin("http", "clevrd.example", 80)),
        ("https", "Clevrd.Example", Origin("https", "clevrd.example", 443)),
        ("http", "10.0.0.1:8080", Origin("http", "10.0.0.1", 8080)),
        ("http", "[::1]:8080", Origin("http", "[::1]", 8080)),
        ("http", "", None),
        ("http", "a b", None),
        ("http", "a:b", None),
        ("http", "a:70000", None),
        ("http", "user@a", None),
    ],
)
def test_own_origin_is_as_the_client_sees_it(scheme: str, host: str, origin: Origin | None) -> None:
    """The scheme that it speaks and the host that it names, with the default port said."""
    assert own_origin(scheme, host) == origin


@given(st.text(max_size=40))
def test_no_text_is_an_error(text: str) -> None:
    """Whatever a client writes is an origin or none."""
    for listed in (LISTED, AllowedOrigins(["*", "null"])):
        assert listed.allows(text) in (True, False)
    assert own_origin("http", text) is None or parse_origin(f"http://{text.lower()}") is not None


def test_setting_lists_origins_between_commas() -> None:
    """As a variable of a container has them; blanks and a last comma mean nothing."""
    found = read_allowed_origins(" https://a.example ,null, https://*.b.example, ")

    assert [found.allows(each) for each in ("https://a.example", "null", "https://x.b.example")]
    assert not found.allows("https://b.example")
    assert not read_allowed_origins("")
    assert read_allowed_origins("", ["https://a.example"]).allows("https://a.example")


@pytest.mark.parametrize(
    ("setting", "listed", "sentence"),
    [
        ("app.example", [], "'app.example' is no origin: write it as browsers do"),
        ("https://a.example/", [], "is no origin"),
        ("https://a.example https://b.example", [], "is no origin"),
        ("https://a.example", ["https://b.example"], "keep one of them"),
    ],
)
def test_wrong_setting_is_told_in_a_sentence(
    setting: str, listed: list[str], sentence: str
) -> None:
    """It names the setting, and the entry that is wrong."""
    with pytest.raises(ConfigError, match="allowed_origins") as raised:
        read_allowed_origins(setting, listed)

    assert sentence in str(raised.value)
