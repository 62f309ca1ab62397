"""Which requests come from this machine itself: not those of a proxy, nor of a page elsewhere."""

from __future__ import annotations

import socket

import pytest

from clevrd.http_values import Request
from clevrd.local_requests import is_local, is_local_peer


def request(headers: dict[str, str], *, is_local_peer: bool = True) -> Request:
    made = Request("GET", "/metrics", headers)
    made.is_local_peer = is_local_peer
    return made


@pytest.mark.parametrize(
    ("peername", "family", "is_one"),
    [
        (("127.0.0.1", 4711), socket.AF_INET, True),
        (("127.9.9.9", 4711), socket.AF_INET, True),
        (("::1", 4711, 0, 0), socket.AF_INET6, True),
        (("::ffff:127.0.0.1", 4711, 0, 0), socket.AF_INET6, True),
        ("", socket.AF_UNIX, True),
        (None, socket.AF_UNIX, True),
        (("192.168.1.7", 4711), socket.AF_INET, False),
        (("::ffff:192.168.1.7", 4711, 0, 0), socket.AF_INET6, False),
        (("fe80::1%eth0", 4711, 0, 2), socket.AF_INET6, False),
        (("2001:db8::1", 4711, 0, 0), socket.AF_INET6, False),
        # A connection that was reset before anybody asked.
        (None, socket.AF_INET, False),
        ((), socket.AF_INET, False),
        (("", 0), socket.AF_INET, False),
    ],
)
def test_peer_is_local_on_loopback_and_on_a_unix_socket(
    peername: object, family: int, is_one: bool
) -> None:
    """Every other address is not, nor is a peer whose address nobody knows."""
    assert is_local_peer(peername, family) is is_one


@pytest.mark.parametrize(
    "host",
    [
        *("", "localhost", "LOCALHOST:8080", "127.0.0.1", "127.0.0.1:8080", "127.1.2.3"),
        *("[::1]", "[::1]:8080", "clevrd:8080", "a.localhost:80", "[::ffff:127.0.0.1]:80"),
    ],
)
def test_request_to_this_machine_is_local(host: str) -> None:
    """By the names and addresses that mean this machine to a program on it."""
    assert is_local(request({"host": host}))


@pytest.mark.parametrize(
    "host",
    [
        *("app.example", "app.example:8080", "localhost.", "localhost.example", "127.0.0.1.nip.io"),
        *("192.168.1.7:8080", "[2001:db8::1]:80", "xlocalhost.a", "127.0.0.999", "1.2"),
    ],
)
def test_request_to_another_host_is_not_local(host: str) -> None:
    """A page whose name was made to mean 127.0.0.1 sends that name; so do most proxies."""
    assert not is_local(request({"host": host}))


@pytest.mark.parametrize(
    "field",
    [
        *("x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip", "forwarded"),
        *("via", "x-forwarded-port", "x-forwarded-prefix", "x-forwarded-server", "x-client-ip"),
        *("cf-connecting-ip", "true-client-ip", "x-envoy-external-address", "x-cluster-client-ip"),
        "x-original-forwarded-for",
    ],
)
def test_request_through_a_proxy_is_not_local(field: str) -> None:
    """Whatever the field says, since the client may have written it."""
    assert not is_local(request({"host": "localhost", field: "127.0.0.1"}))
    assert not is_local(request({"host": "localhost", field: ""}))


def test_request_in_http_1_0_is_not_local() -> None:
    """nginx asks so, with the address behind proxy_pass as its host, unless told otherwise."""
    asked = Request("GET", "/metrics", {"host": "127.0.0.1:8080"}, is_http_1_0=True)
    asked.is_local_peer = True

    assert not is_local(asked)


def test_request_from_elsewhere_is_not_local() -> None:
    """Its host is the client's own word."""
    assert not is_local(request({"host": "localhost"}, is_local_peer=False))
