"""Client certificates as credentials: what stands in one, and whose it is.

TLS has verified a certificate by then (`tls/`). Here its subject, or one of its alternative names,
is compared as a whole: no part of a name, and no pattern, ever decides. Sources: RFC 5280 §4.1.2.6
(subject), §4.2.1.6 (subject alternative names); RFC 4514 (how a subject is written).
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Any, Final

import msgspec

# Short names of attributes (RFC 4514 §3, and the usual one for e-mail) -> OpenSSL's long ones.
_LONG_NAMES: Final = {
    "CN": "commonName",
    "O": "organizationName",
    "OU": "organizationalUnitName",
    "C": "countryName",
    "ST": "stateOrProvinceName",
    "L": "localityName",
    "DC": "domainComponent",
    "UID": "userId",
    "E": "emailAddress",
}
_ADDRESS: Final = "IP Address"
SAN_KINDS: Final = ("DNS", "URI", "email", _ADDRESS)
# An attribute of a subject: its name, and a value in which a comma stands behind a backslash.
_ATTRIBUTE: Final = re.compile(r"\s*([A-Za-z]+)\s*=\s*((?:[^,\\]|\\.)+?)\s*(?:,|\Z)")

Subject = frozenset[tuple[str, str]]


class ClientCertificate(msgspec.Struct, frozen=True):
    """The holder of a verified certificate, as it says itself."""

    # Each attribute and its value.
    subject: Subject
    # Alternative names, each as `URI:spiffe://acme/web`.
    names: frozenset[str]
    # When it ends, seconds since 1970.
    ends_at_s: float


def read_certificate(found: Mapping[str, Any] | None) -> ClientCertificate | None:
    """Return what `ssl.SSLObject.getpeercert` found; None where the client showed none."""
    if not found:
        return None
    attributes = [pair for rdn in found.get("subject", ()) for pair in rdn]
    names = (_name(kind, value) for kind, value in found.get("subjectAltName", ()))
    return ClientCertificate(
        frozenset(attributes), frozenset(names), ssl.cert_time_to_seconds(found["notAfter"])
    )


def _name(kind: str, value: str) -> str:
    """Return an alternative name in one spelling; raises ValueError for what is no address.

    An IPv6 address has several, and the names of hosts have no case (RFC 5280 §4.2.1.6).
    """
    if kind == _ADDRESS:
        value = str(ip_address(value.strip()))
    elif kind == "DNS":
        value = value.lower()
    return f"{kind}:{value}"


def parse_subject(text: str) -> Subject:
    """Return the attributes in ``text``, like `CN=web,O=Acme`; their order means nothing.

    Raises:
        ValueError: it is no subject, or has an attribute twice; the text says which.
    """
    attributes: list[tuple[str, str]] = []
    at = 0
    while at < len(text):
        match = _ATTRIBUTE.match(text, at)
        if match is None:
            raise ValueError("it must be like CN=web,O=Acme, with \\, for a comma in a value.")
        name = _LONG_NAMES.get(match[1].upper(), match[1])
        attributes.append((name, re.sub(r"\\(.)", r"\1", match[2])))
        at = match.end()
        if at == len(text) and match[0].endswith(","):
            raise ValueError("it ends with a comma, and an attribute is to follow.")
    if not attributes or len({name for name, _ in attributes}) < len(attributes):
        raise ValueError("it needs at least one attribute, and none twice; use san instead.")
    return frozenset(attributes)


def parse_san(text: str) -> str:
    """Return an alternative name as `ClientCertificate.names` has it.

    Raises:
        ValueError: it is none; the text says how one is written.
    """
    kind, _, value = text.partition(":")
    for known in SAN_KINDS:
        if kind.lower() == known.lower().removesuffix(" address") and value:
            return _name(known, value)
    raise ValueError("it must be like URI:spiffe://acme/web, DNS:web.acme.example, email: or IP:.")
