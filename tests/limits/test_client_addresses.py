"""Client addresses: whose request it is, as far as it can be believed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clevrd.client_addresses import (
    TrustedProxies,
    address_of,
    count_as,
    read_address,
)

PROXIES = TrustedProxies(["10.0.0.0/8", "2001:db8:ffff::/48", "192.0.2.1"])


def client(value: str, peer: str = "10.0.0.1", **fields: str) -> str:
    """Return the client of a request with this X-Forwarded-For."""
    return PROXIES.client_of({"x-forwarded-for": value, **fields}, peer)


@pytest.mark.parametrize(
    ("value", "address"),
    [
        ("203.0.113.7", "203.0.113.7"),
        (" 203.0.113.7 ", "203.0.113.7"),
        ("203.0.113.7:4711", "203.0.113.7"),
        ("2001:db8::7", "2001:db8::7"),
        ("[2001:db8::7]", "2001:db8::7"),
        ("[2001:db8::7]:4711", "2001:db8::7"),
        ("2001:DB8:0::7", "2001:db8::7"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        # What stands before the first address that no listed proxy has is its own word.
        ("198.51.100.1, 203.0.113.7", "203.0.113.7"),
        ("127.0.0.1, 203.0.113.7", "203.0.113.7"),
        ("198.51.100.1, 203.0.113.7, 10.1.2.3", "203.0.113.7"),
        ("203.0.113.7, 2001:db8:ffff::1, 10.1.2.3, 192.0.2.1", "203.0.113.7"),
        ("10.9.9.9, 10.1.2.3", "10.9.9.9"),
    ],
)
def test_client_is_the_nearest_address_that_no_listed_proxy_has(value: str, address: str) -> None:
    """A listed proxy's word counts, and the word of one behind it that is listed, too."""
    assert client(value) == address


@pytest.mark.parametrize(
    "value",
    [
        "",
        "unknown",
        "_hidden",
        "203.0.113.7.",
        "203.0.113",
        "203.0.113.256",
        "0203.0.113.7",
        "203.0.113.7:",
        "203.0.113.7:port",
        "203.0.113.7:123456",
        "203.0.113.7;10.0.0.1",
        "[203.0.113.7",
        "[2001:db8::7]x",
        "[2001:db8::7]:",
        "2001:db8::7%eth0",
        "fe80::1%1",
        "2001:db8::7::",
        '"203.0.113.7"',
        "203.0.113.7\t10.0.0.2",
        "for=203.0.113.7",
        "x" * 8_000,
        "203.0.113.7, ",
        "203.0.113.7,,",
        "203.0.113.7, nonsense",
        "\N{ARABIC-INDIC DIGIT ONE}.2.3.4",
        "1.2.3.4:\N{ARABIC-INDIC DIGIT ONE}",
    ],
)
def test_entry_that_is_no_address_leaves_the_proxys_own(value: str) -> None:
    """A client can't hide among others by sending nonsense: the nearest known address counts."""
    assert client(value) == "10.0.0.1"


def test_nonsense_behind_a_listed_proxy_leaves_that_proxys_address() -> None:
    """What is known up to the nonsense still counts."""
    assert client("203.0.113.7, nonsense, 10.1.2.3") == "10.1.2.3"


@pytest.mark.parametrize("peer", ["203.0.113.7", "127.0.0.1", "::1", "", "2001:db8::1"])
def test_field_from_anybody_else_counts_nothing(peer: str) -> None:
    """Any client can send the field."""
    fields = {"x-forwarded-proto": "https", "x-forwarded-host": "app.example"}

    found = PROXIES.client_of({"x-forwarded-for": "198.51.100.1", **fields}, peer)

    assert (found, PROXIES.asked_for(fields, peer)) == (peer, None)


def test_many_hops_are_not_all_read() -> None:
    """A field of 8 KB costs no more than sixteen addresses."""
    hops = ["203.0.113.7"] + ["10.0.0.2"] * 20

    assert client(",".join(hops)) == "10.0.0.2"


@pytest.mark.parametrize(
    ("scheme", "host", "seen"),
    [
        ("https", "app.example", ("https", "app.example")),
        ("HTTPS", "out:1", ("https", "out:1")),
        ("http, https", "evil, out", ("https", "out")),
        ("gopher", "", (None, None)),
        ("https", "", ("https", None)),
        ("http, HTTPS", "evil.example, app.example:8443", ("https", "app.example:8443")),
        ("javascript", "", (None, None)),
        ("", "app.example", (None, "app.example")),
    ],
)
def test_listed_proxy_says_how_its_client_reached_it(
    scheme: str, host: str, seen: tuple[str | None, str | None]
) -> None:
    """The last of several is the nearest proxy's."""
    found = PROXIES.asked_for({"x-forwarded-proto": scheme, "x-forwarded-host": host}, "10.0.0.1")

    assert found == (*seen, "")
    assert PROXIES.asked_for({}, "10.0.0.1") == (None, None, "")


@pytest.mark.parametrize(
    ("said", "prefix"),
    [
        ("/clevrd", "/clevrd"),
        ("/a/b-1/", "/a/b-1"),
        ("/evil, /out", "/out"),
        ("/", ""),
        ("clevrd", ""),
        ("//evil.example", ""),
        ('/"><script>', ""),
        ("/a" * 17, ""),
    ],
)
def test_listed_proxy_says_below_which_path_it_has_the_daemon(said: str, prefix: str) -> None:
    """A path that could not stand in a link is none."""
    found = PROXIES.asked_for({"x-forwarded-prefix": said}, "10.0.0.1")

    assert found is not None
    assert found.prefix == prefix


def test_proxies_on_unix_sockets_are_listed_by_a_word_of_their_own() -> None:
    """They have no address."""
    listed, others = TrustedProxies(["unix:"]), TrustedProxies(["127.0.0.1"])
    fields = {"x-forwarded-for": "203.0.113.7"}

    assert listed.client_of(fields, "") == "203.0.113.7"
    assert others.client_of(fields, "") == ""


@pytest.mark.parametrize("entry", ["", "proxy.example", "10.0.0.1/8", "10.0.0.0/33", "*", "unix"])
def test_list_takes_addresses_and_networks_only(entry: str) -> None:
    """A name could mean another machine tomorrow; a network with host bits is a slip."""
    with pytest.raises(ValueError, match="is neither an address nor a network"):
        TrustedProxies([entry])


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        (("203.0.113.7", 4711), "203.0.113.7"),
        (("::ffff:203.0.113.7", 4711, 0, 0), "203.0.113.7"),
        (("2001:db8::7", 4711, 0, 0), "2001:db8::7"),
        (("fe80::1%eth0", 4711, 0, 2), "fe80::1"),
        ("", ""),
        (b"", ""),
        (None, ""),
    ],
)
def test_peer_has_one_spelling(peer: object, address: str) -> None:
    """A socket of both families spells an IPv4 address in its own way."""
    assert address_of(peer) == address


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("127.0.0.1", None),
        ("127.8.8.8", None),
        ("::1", None),
        ("", None),
    ],
)
def test_clients_count_by_address_or_by_64_bits_of_it(address: str, name: str | None) -> None:
    """An IPv6 client has a whole /64; this machine itself is not counted."""
    assert count_as(address) == name


@given(st.text(max_size=60))
def test_any_text_is_an_address_or_none(text: str) -> None:
    """Nothing that a client sends raises, and what is read is read again as the same."""
    found = read_address(text)

    if found is not None:
        assert read_address(found) == found
        count_as(found)
