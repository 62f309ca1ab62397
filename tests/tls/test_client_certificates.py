"""A client certificate is its holder's tenant, by its whole subject or by one of its names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from cryptography.x509.oid import NameOID
from daemons import Daemon, FakeStats, until
from keys import OTHER, bearer, rules
from tls import Pair, make_pair

from clevrd.admission import Gate
from clevrd.client_certificates import ClientCertificate, parse_san, parse_subject
from clevrd.config import Config
from clevrd.errors import ConfigError, Unauthorized
from clevrd.http_values import Request
from clevrd.server import Server, Setup
from clevrd.tenants.authenticator import Authenticator
from clevrd.tenants.settings import Access, read_access
from clevrd.tls import TlsSettings
from clevrd.tls.settings import CertificateEntry

WEB = "URI:spiffe://acme/web"


def access(mode: str = "required", *holders: dict[str, Any]) -> Access:
    tables = rules(mode)
    tables["tenants"][0]["client_certificates"] = list(holders)
    return read_access(tables, "a test")


def holder(**fields: Any) -> dict[str, Any]:
    return {"id": "certified", "publish": ["orders.*"], "subscribe": ["**"], **fields}


class World:
    """A daemon that asks for certificates, and the authority that makes them."""

    def __init__(self, folder: Path, wanted: str = "optional") -> None:
        self.folder = folder
        self.own = make_pair(folder)
        self.authority = make_pair(folder, "ca", sans=(), is_authority=True)
        entry = CertificateEntry(cert_file=str(self.own.cert), key_file=str(self.own.key))
        self.tls = TlsSettings(
            certificates=(entry,),
            client_ca_file=str(self.authority.cert),
            client_certificates=wanted,  # type: ignore[arg-type]
        )

    def client(self, name: str = "client", **fields: Any) -> Pair:
        return make_pair(self.folder, name, signer=self.authority, **{"sans": (), **fields})

    async def statuses(
        self, rules: Access, shown: Pair | None, *requests: tuple[str, dict[str, str]]
    ) -> list[int]:
        """Publish to each topic with these headers over one connection."""
        server = Server(
            Setup(Config(address="127.0.0.1:0"), rules, tls=self.tls, stats=FakeStats())
        )
        await server.start()
        try:
            connector = aiohttp.TCPConnector(ssl=self.own.client(shown=shown), limit=1)
            async with aiohttp.ClientSession(connector=connector) as http:
                daemon = Daemon(server, http)
                found = []
                for topic, headers in requests:
                    body = json.dumps({"topic": topic, "data": 1}).encode()
                    url = f"{daemon.url}/publish"
                    async with http.post(url, data=body, headers=headers) as answer:
                        found.append(answer.status)
                return found
        finally:
            await server.stop()


@pytest.mark.parametrize("mode", ["open", "required"])
async def test_certificate_is_its_tenant(tmp_path: Path, mode: str) -> None:
    """With its permissions, and no others."""
    world = World(tmp_path)
    shown = world.client(sans=("spiffe://acme/web",))

    found = await world.statuses(
        access(mode, holder(san=WEB)),
        shown,
        ("orders.eu", {}),
        ("secret", {}),
        ("orders.eu", {"X-Tenant-ID": "acme"}),
        ("orders.eu", {"X-Tenant-ID": "other"}),
    )

    assert found == [200, 403, 200, 403]


async def test_subject_is_compared_as_a_whole(tmp_path: Path) -> None:
    """One that has more attributes, or fewer, is another one."""
    world = World(tmp_path)
    name, company = (NameOID.COMMON_NAME, "web"), (NameOID.ORGANIZATION_NAME, "Acme, Inc")
    unit = (NameOID.ORGANIZATIONAL_UNIT_NAME, "x")
    rules = access("required", holder(subject="O=Acme\\, Inc, CN=web"))

    found = [
        await world.statuses(rules, world.client(f"c{at}", subject=subject), ("orders.eu", {}))
        for at, subject in enumerate([(name, company), (name,), (name, company, unit)])
    ]

    assert found == [[200], [401], [401]]


async def test_credential_in_the_request_counts_more(tmp_path: Path) -> None:
    """The certificate may be a proxy's; and without either it is 401."""
    world = World(tmp_path)
    rules = access("required", holder(san=WEB))
    shown = world.client(sans=("spiffe://acme/web",))

    of_key = await world.statuses(rules, shown, ("secret", bearer(OTHER)))
    of_nobody = await world.statuses(rules, None, ("orders.eu", {}))
    of_stranger = await world.statuses(
        rules, world.client("s", sans=("spiffe://acme/web2",)), ("orders.eu", {})
    )

    assert (of_key, of_nobody, of_stranger) == ([200], [401], [401])


async def test_connection_of_a_removed_certificate_is_cut(tmp_path: Path) -> None:
    """As one of a removed key is."""
    world = World(tmp_path)
    rules = access("required", holder(san=WEB))
    server = Server(Setup(Config(address="127.0.0.1:0"), rules, tls=world.tls, stats=FakeStats()))
    await server.start()
    try:
        shown = world.client(sans=("spiffe://acme/web",))
        connector = aiohttp.TCPConnector(ssl=world.own.client(shown=shown))
        async with (
            aiohttp.ClientSession(connector=connector) as http,
            http.ws_connect(f"{server.addresses[0]}/subscribe?topic=t") as socket,
        ):
            await until(lambda: server.hub.subscribers == 1)
            await server.access.apply(access("required"), tmp_path)
            message = await socket.receive(10)
            assert (message.type, socket.close_code) == (aiohttp.WSMsgType.CLOSE, 4001)
    finally:
        await server.stop()


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({}, "one of subject and san"),
        ({"subject": "CN=a", "san": WEB}, "one of subject and san"),
        ({"subject": "web"}, "like CN=web,O=Acme"),
        ({"subject": "CN=a,CN=b"}, "none twice"),
        ({"san": "spiffe://acme/web"}, "like URI:"),
        ({"san": "URI:"}, "like URI:"),
        ({"san": WEB, "publish": [], "subscribe": []}, "allows nothing"),
        ({"san": WEB, "id": "web"}, "two holders of 'web'"),
    ],
)
def test_wrong_holders_are_told(fields: dict[str, Any], why: str) -> None:
    """Each with its place in the file."""
    with pytest.raises(ConfigError, match=why) as error:
        access("required", holder(**fields))

    assert "tenants[0].client_certificates[0]" in str(error.value)


def test_two_holders_of_one_certificate_are_told() -> None:
    """It would be one tenant's or the other's by chance."""
    with pytest.raises(ConfigError, match="as well"):
        access("required", holder(san=WEB), holder(id="b", san="uri:spiffe://acme/web"))


async def test_holders_without_a_question_for_certificates_are_told() -> None:
    """No client would show one."""
    with pytest.raises(ConfigError, match="asked for none"):
        Server(Setup(Config(address="127.0.0.1:0"), access("required", holder(san=WEB))))


def test_names_are_written_as_people_do() -> None:
    """Short names and long ones, in any case and order."""
    assert parse_subject("CN=web, O=Acme") == parse_subject("organizationName=Acme,commonName=web")
    assert parse_subject("cn = a\\,b ") == {("commonName", "a,b")}
    assert parse_san("dns:a.example") == "DNS:a.example"
    assert parse_san("IP:10.0.0.1") == "IP Address:10.0.0.1"


def test_certificate_that_ended_meanwhile_is_refused_on_its_kept_connection() -> None:
    """TLS looks at it once, when the connection is opened."""
    rules = access("required", holder(san=WEB))
    head = Request("POST", "/publish", {})
    head.certificate = ClientCertificate(frozenset(), frozenset({WEB}), ends_at_s=100.0)
    now_s = [99.0]
    gate = Gate(Authenticator(rules), lambda: False, lambda: now_s[0])

    admitted = gate.admit_tenant(head)
    now_s[0] = 100.0

    assert admitted.tenant.name == "acme"
    assert gate.is_void(admitted, gate.generation)
    with pytest.raises(Unauthorized, match="expired"):
        gate.admit_tenant(head)


async def test_address_in_a_certificate_matches_however_it_is_written(tmp_path: Path) -> None:
    """OpenSSL spells an IPv6 address in its own way."""
    world = World(tmp_path)
    shown = world.client(sans=("2001:db8::1",))
    rules = access("required", holder(san="IP:2001:DB8:0::1"))

    assert await world.statuses(rules, shown, ("orders.eu", {})) == [200]
    assert parse_san("DNS:Web.Example") == "DNS:web.example"
    with pytest.raises(ValueError, match="does not appear to be"):
        parse_san("IP:nowhere")
    with pytest.raises(ValueError, match="ends with a comma"):
        parse_subject("CN=web,")
