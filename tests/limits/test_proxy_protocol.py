"""PROXY headers: bytes in, an address or a fault out."""

from __future__ import annotations

import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clevrd.proxy_protocol import (
    SIGNATURE,
    V2_MAX_REST_BYTES,
    BadProxyHeader,
    ProxyHeader,
    begins_with_header,
    read_header,
)

TCP4 = socket.inet_aton("203.0.113.7") + socket.inet_aton("192.0.2.1") + struct.pack("!HH", 1, 2)
TCP6 = (
    socket.inet_pton(socket.AF_INET6, "2001:db8::7")
    + socket.inet_pton(socket.AF_INET6, "2001:db8::1")
    + struct.pack("!HH", 1, 2)
)
MAPPED = (
    socket.inet_pton(socket.AF_INET6, "::ffff:203.0.113.7")
    + socket.inet_pton(socket.AF_INET6, "::1")
    + struct.pack("!HH", 1, 2)
)
# PP2_TYPE_AUTHORITY and a NOOP, and bytes that are no TLV at all.
TLVS = b"\x02\x00\x03abc" + b"\x04\x00\x01x" + b"\xff"


def v2(rest: bytes, *, command: int = 0x21, family: int = 0x11, length: int | None = None) -> bytes:
    """Return a header of version 2."""
    size = len(rest) if length is None else length
    return SIGNATURE + struct.pack("!BBH", command, family, size) + rest


WHOLE = {
    b"PROXY TCP4 203.0.113.7 192.0.2.1 56324 443\r\n": "203.0.113.7",
    b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n": "255.255.255.255",
    b"PROXY TCP6 2001:db8::7 2001:db8::1 0 443\r\n": "2001:db8::7",
    b"PROXY TCP6 ::ffff:203.0.113.7 ::1 1 443\r\n": "203.0.113.7",
    b"PROXY UNKNOWN\r\n": None,
    b"PROXY UNKNOWN 203.0.113.7 what ever\r\n": None,
    b"PROXY UNKNOWN " + b"f" * 91 + b"\r\n": None,
    v2(TCP4): "203.0.113.7",
    v2(TCP4 + TLVS): "203.0.113.7",
    v2(TCP6, family=0x21): "2001:db8::7",
    v2(TCP6 + TLVS, family=0x21): "2001:db8::7",
    v2(MAPPED, family=0x21): "203.0.113.7",
    v2(bytes(216), family=0x31): "",
    v2(b"", family=0x00): None,
    v2(TLVS, family=0x00): None,
    v2(b"", command=0x20, family=0x00): None,
    v2(TCP4, command=0x20): None,
    v2(TCP4 + bytes(V2_MAX_REST_BYTES - 12)): "203.0.113.7",
}

BAD = [
    b"GET / HTTP/1.1\r\n",
    b"\x16\x03\x01",
    b"\r\n\r\nGET",
    b"PROXYTCP4 ",
    b"proxy TCP4 1.1.1.1 1.1.1.1 1 1\r\n",
    b"PROXY \r\n",
    b"PROXY TCP4\r\n",
    b"PROXY TCP4 203.0.113.7 192.0.2.1 56324\r\n",
    b"PROXY TCP4 203.0.113.7 192.0.2.1 56324 443 5\r\n",
    b"PROXY TCP4  203.0.113.7 192.0.2.1 56324 443\r\n",
    b"PROXY TCP4 203.0.113.7 192.0.2.1 56324 443 \r\n",
    b"PROXY TCP4 203.0.113.7 192.0.2.1 56324 65536\r\n",
    b"PROXY TCP4 203.0.113.7 192.0.2.1 056324 443\r\n",
    b"PROXY TCP4 203.0.113.7 192.0.2.1 -1 443\r\n",
    b"PROXY TCP4 203.0.113.300 192.0.2.1 1 443\r\n",
    b"PROXY TCP4 203.0.113.07 192.0.2.1 1 443\r\n",
    b"PROXY TCP4 2001:db8::7 2001:db8::1 1 443\r\n",
    b"PROXY TCP6 203.0.113.7 192.0.2.1 1 443\r\n",
    b"PROXY TCP6 fe80::1%eth0 ::1 1 443\r\n",
    b"PROXY TCP6 \xff\xff ::1 1 443\r\n",
    b"PROXY TCP5 203.0.113.7 192.0.2.1 1 443\r\n",
    b"PROXY UDP4 203.0.113.7 192.0.2.1 1 443\r\n",
    b"PROXY TCP4 203.0.113.7 192.0.2.1 1 443\n",
    b"PROXY TCP4 203.0.113.7 192.0.2.1 1\r443\r\n",
    b"PROXY UNKNOWN\rx\r\n",
    b"PROXY UNKNOWN " + b"f" * 92 + b"\r\n",
    b"PROXY TCP4 " + b"1" * 200,
    v2(TCP4, command=0x11),
    v2(TCP4, command=0x22),
    v2(TCP4, command=0x2F),
    v2(TCP4, family=0x12),
    v2(TCP6, family=0x22),
    v2(TCP4, family=0x41),
    v2(TCP4[:-1]),
    v2(b""),
    v2(TCP4, family=0x21),
    v2(bytes(215), family=0x31),
    v2(b"", length=V2_MAX_REST_BYTES + 1),
    v2(b"", length=65_535, command=0x20),
]


@pytest.mark.parametrize(("data", "address"), WHOLE.items())
def test_header_gives_the_clients_address(data: bytes, address: str | None) -> None:
    """Both versions; what follows is not looked at."""
    assert read_header(data + b"GET / HTTP/1.1\r\n") == ProxyHeader(len(data), address)


@pytest.mark.parametrize("data", WHOLE)
def test_header_is_waited_for_until_it_is_whole(data: bytes) -> None:
    """However it is split, no byte less is a header, and none of its parts is a fault."""
    assert [read_header(data[:size]) for size in range(len(data))] == [None] * len(data)


@pytest.mark.parametrize("data", BAD)
def test_what_is_no_header_is_refused(data: bytes) -> None:
    """Nothing is guessed."""
    with pytest.raises(BadProxyHeader):
        read_header(data)


@given(st.binary(max_size=300), st.sampled_from([b"", b"PROXY ", b"PROXY TCP4 ", SIGNATURE]))
def test_any_bytes_are_a_header_or_a_fault_or_too_few(data: bytes, begin: bytes) -> None:
    """Nothing else is raised, and no header is longer than what there is."""
    try:
        header = read_header(begin + data)
    except BadProxyHeader:
        return
    assert header is None or header.size_bytes <= len(begin + data)


def test_header_is_told_from_a_request() -> None:
    """A method called PROXY is none of a header."""
    assert all(map(begins_with_header, WHOLE))
    assert not begins_with_header(b"PROXY /publish HTTP/1.1\r\n")
