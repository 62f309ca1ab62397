"""A daemon that speaks TLS, over real sockets: with OpenSSL's client, curl, websockets and our own.

The same requests have the same answers with TLS and without; half-closes, slow clients and limits
mean the same.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from clients import needs_curl
from daemons import Daemon, FakeStats, daemon_process, until
from http_corpus import CORPUS, numbered
from http_wire import get, post, responses, settled
from tls import DAY, Pair, TlsStream, make_pair, tunnel
from websockets.asyncio.client import connect

from clevrd.cli.command_line import main
from clevrd.client import Client
from clevrd.config import Config
from clevrd.errors import ConfigError
from clevrd.health_check import main as health
from clevrd.server import Server, Setup
from clevrd.tls import TlsSettings
from clevrd.tls.connection import RECORDS_PER_SHARE, TlsConnection
from clevrd.tls.server import MAX_BEYOND
from clevrd.tls.settings import CertificateEntry

needs_openssl = pytest.mark.skipif(
    subprocess.run(["which", "openssl"], capture_output=True).returncode != 0,
    reason="openssl is not installed",
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("tls"))


@asynccontextmanager
async def secure(
    pair: Pair, tls: TlsSettings | None = None, **settings: Any
) -> AsyncIterator[Daemon]:
    """Run a daemon that speaks TLS; its own URL begins with https."""
    plain = pair.settings if tls is None else {}
    fixed = {"address": "127.0.0.1:0", "shutdown_timeout_s": 2.0, **plain}
    server = Server(Setup(Config(**{**fixed, **settings}), tls=tls, stats=FakeStats()))
    await server.start()
    try:
        connector = aiohttp.TCPConnector(ssl=pair.client())
        async with aiohttp.ClientSession(connector=connector) as http:
            yield Daemon(server, http)
    finally:
        await server.stop()


def failed(daemon: Daemon) -> dict[str, int]:
    return daemon.hub.counters.tls_failed


async def run(*command: str, stdin: bytes = b"") -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    output, _ = await asyncio.wait_for(process.communicate(stdin), 20)
    return process.returncode or 0, output.decode(errors="replace")


async def talk(
    port: int, pieces: Sequence[bytes], context: ssl.SSLContext, *, shut: bool = True
) -> bytes:
    """Send ``pieces`` over TLS, end this side alone, and return all that comes until the notice.

    The daemon has to say that nothing follows: a cut would be an error.
    """
    stream = await TlsStream.open(port, context)
    try:
        for piece in pieces:
            if stream.has_notice or stream.transport.is_closing():
                break
            stream.write(piece)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        if shut and not stream.has_notice:
            stream.write_eof()
        async with asyncio.timeout(15):
            return await stream.reader.read()
    finally:
        stream.close()


# --- the same as without TLS ---------------------------------------------------------------------


@pytest.mark.parametrize("raw_paths", [True, False], ids=["raw", "aiohttp"])
@pytest.mark.parametrize("part", range(4))
async def test_corpus_means_the_same_over_tls(pair: Pair, raw_paths: bool, part: int) -> None:
    """Each request of the corpus has the answer that it has without TLS, half-closes included."""
    cases = [case for _, case in numbered(CORPUS)][part::4]
    settings: dict[str, Any] = {"raw_paths": raw_paths}
    async with secure(pair, **settings) as daemon:
        context = pair.client()
        ours = [settled(await talk(daemon.port, [case], context)) for case in cases]
        count = daemon.hub.counters.tls_handshakes
    async with secure(pair, TlsSettings(), **settings) as daemon:
        theirs = [settled(await daemon_talk(daemon, case)) for case in cases]

    for case, one, other in zip(cases, ours, theirs, strict=True):
        assert without_scheme(one) == without_scheme(other), case[:200]
    assert count == len(cases)


def without_scheme(transcript: bytes) -> bytes:
    """Return a transcript without what TLS changes: the home page names its own URLs."""
    plain = transcript.replace(b"https://", b"http://").replace(b"wss://", b"ws://")
    return re.sub(rb"(?<=\r\nContent-Length: )\d+", b"#", plain)


async def daemon_talk(daemon: Daemon, case: bytes) -> bytes:
    from http_wire import talk as plain_talk

    return await plain_talk(daemon.port, [case], shut=True)


async def test_all_transports_work_over_tls(pair: Pair) -> None:
    """Publish, batch, WebSocket, publish socket, stream and poll, by clients that are not ours."""
    async with secure(pair) as daemon:
        url, context = daemon.url, pair.client()
        ws_url = url.replace("https", "wss")
        async with connect(f"{ws_url}/subscribe?topic=t&last=0", ssl=context) as reader:
            assert (await daemon.publish("t", 1))["offset"] == 1
            async with daemon.http.post(
                f"{url}/publish/batch", data=b'[{"topic":"t","data":2}]'
            ) as r:
                assert r.status == 200
            async with connect(f"{ws_url}/publish?topic=t", ssl=context) as publisher:
                await publisher.send('{"topic":"t","data":3}')
                seen = [msgspec.json.decode(await reader.recv())["data"] for _ in range(3)]
        assert seen == [1, 2, 3]
        accept = {"Accept": "text/event-stream"}
        async with daemon.http.get(f"{url}/subscribe?topic=t&last=3", headers=accept) as stream:
            text = b""
            while b'"data":3' not in text:
                text += await stream.content.readany()
        assert (await daemon.get_json("/metrics"))["tls"]["handshakes"] >= 3
        async with daemon.http.get(f"{url}/") as page:
            assert f"https://127.0.0.1:{daemon.port}/" in await page.text()


async def test_large_messages_arrive_whole_in_both_directions(pair: Pair) -> None:
    """Records are cut at 16 KiB, and read in shares."""
    data = "x" * 900_000
    async with secure(pair) as daemon:
        url = daemon.url.replace("https", "wss")
        settings: dict[str, Any] = {"ssl": pair.client(), "max_size": None}
        async with connect(f"{url}/subscribe?topic=t&last=0", **settings) as reader:
            for _ in range(3):
                await daemon.publish("t", data)
            for _ in range(3):
                assert msgspec.json.decode(await reader.recv())["data"] == data


async def test_records_of_one_byte_do_not_hold_the_loop(pair: Pair) -> None:
    """What takes long to decrypt is decrypted in shares, and nothing is lost or exchanged."""
    body = b'{"topic":"t","data":"' + b"y" * (RECORDS_PER_SHARE * 20) + b'"}'
    async with secure(pair) as daemon:
        stream = await TlsStream.open(daemon.port, pair.client())
        for at in range(0, len(post(body))):
            stream.session.write(post(body)[at : at + 1])
        stream._send()
        stream.write_eof()

        (answer,) = responses(await stream.reader.read())

        assert answer.status == 200
        assert daemon.hub.turns is not None
        stream.close()


async def test_client_may_end_its_side_before_it_is_answered(pair: Pair) -> None:
    """A close_notify alone, without a FIN, ends the requests and not the answers."""
    async with secure(pair) as daemon:
        for fin in (True, False):
            stream = await TlsStream.open(daemon.port, pair.client())
            stream.write(post() + post())
            stream.write_eof(fin=fin)

            answers = responses(await asyncio.wait_for(stream.reader.read(), 5))

            assert [each.status for each in answers] == [200, 200]
            assert stream.has_notice
            stream.close()


async def test_answer_that_comes_later_reaches_who_has_ended_its_side(pair: Pair) -> None:
    """A poll that waits is answered behind the client's close_notify and FIN."""
    async with secure(pair) as daemon:
        stream = await TlsStream.open(daemon.port, pair.client())
        stream.write(get("/subscribe?topic=t&poll=1&last=0"))
        stream.write_eof()
        await until(lambda: daemon.hub.subscribers == 1)
        await asyncio.sleep(0.1)
        await daemon.publish("t", 7)

        (answer,) = responses(await asyncio.wait_for(stream.reader.read(), 5))

        assert b'"data":7' in answer.body
        stream.close()


async def test_last_word_is_read_though_the_client_still_sends(pair: Pair) -> None:
    """A refusal before the body, an end of our side, and no reset that would overtake it."""
    async with secure(pair, max_message_bytes=2048) as daemon:
        stream = await TlsStream.open(daemon.port, pair.client())
        stream.write(post(b"x" * 100, length="999999999"))
        for _ in range(20):
            stream.write(b"z" * 16_384)
            await asyncio.sleep(0)

        (answer,) = responses(await asyncio.wait_for(stream.reader.read(), 5))

        assert answer.status == 413
        assert stream.has_notice
        stream.close()


async def test_stalled_reader_lags_and_reads_on(pair: Pair) -> None:
    """Water marks hold in encrypted bytes: a reader that stops lags, and catches up in order."""
    settings: dict[str, Any] = {
        "send_buffer_bytes": 8192,
        "write_high_bytes": 8192,
        "write_low_bytes": 2048,
    }
    async with secure(pair, **settings) as daemon:
        stream = await TlsStream.open(daemon.port, pair.client())
        stream.write(
            get("/subscribe?topic=t&last=0&policy=drop_newest", "Accept: text/event-stream")
        )
        await stream.reader.readuntil(b"\r\n\r\n")
        stream.transport.pause_reading()
        count, data = 900, "x" * 5_000
        for _ in range(count):
            await daemon.publish("t", data)
        (topic,) = daemon.hub.topics
        await until(lambda: bool(topic.lagging))

        stream.transport.resume_reading()
        text = b""
        async with asyncio.timeout(20):
            while f'"offset":{count}}}'.encode() not in text:
                text += await stream.reader.read(65_536)

        assert text.count(b"\ndata: ") >= count
        assert not topic.lagging
        stream.close()


# --- handshakes ----------------------------------------------------------------------------------


@needs_openssl
async def test_openssl_gets_tls_1_2_and_1_3_with_alpn_and_nothing_older(pair: Pair) -> None:
    """Versions and ALPN as a client that is not ours sees them."""
    async with secure(pair) as daemon:
        at = ["openssl", "s_client", "-connect", f"127.0.0.1:{daemon.port}", "-alpn", "h2,http/1.1"]
        for version in ("-tls1_2", "-tls1_3"):
            code, output = await run(*at, version, "-CAfile", str(pair.cert))
            assert code == 0, output
            assert "ALPN protocol: http/1.1" in output
            assert "Verify return code: 0 (ok)" in output
        code, _ = await run(*at, "-tls1_1", "-cipher", "ALL:@SECLEVEL=0")
        assert code != 0
        assert failed(daemon).keys() <= {"version", "gone", "refused_by_client", "protocol"}
        assert sum(failed(daemon).values()) == 1


@needs_curl
async def test_curl_publishes_and_plain_http_is_told_what_to_do(pair: Pair) -> None:
    """curl trusts the certificate by its file; http:// at the port is a 400 with a sentence."""
    async with secure(pair) as daemon:
        url = f"https://localhost:{daemon.port}/publish"
        code, output = await run(
            "curl", "-sS", "--cacert", str(pair.cert), "-d", '{"topic":"t","data":1}', url
        )
        assert code == 0
        assert '"success":true' in output
        code, output = await run("curl", "-sS", "-i", url.replace("https", "http"))
        assert output.startswith("HTTP/1.1 400 ")
        assert "This port speaks TLS" in output
        assert failed(daemon) == {"plain_http": 1}
        code, _ = await run("curl", "-sS", url)
        assert code == 60  # the certificate is not trusted
        await until(lambda: "refused_by_client" in failed(daemon))


async def test_bytes_that_are_no_tls_end_the_connection(pair: Pair) -> None:
    """Each is counted under a word of ours, and costs nothing that stays."""
    async with secure(pair, request_timeout_s=0.3) as daemon:
        for data in (b"\0\1\2", b"\x16\x03\x01\x00\x05hello", os.urandom(100)):
            reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
            writer.write(data)
            await asyncio.wait_for(reader.read(), 5)
            writer.close()
        assert failed(daemon).keys() <= {"protocol", "version", "plain_http", "timeout"}
        tls = daemon.listener.tls
        assert tls is not None
        await until(lambda: not tls._lingering and not tls.handshakes)


async def test_handshake_has_the_time_of_a_request(pair: Pair) -> None:
    """Nobody keeps a place with a handshake that does not go on."""
    async with secure(pair, request_timeout_s=0.2) as daemon:
        reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
        writer.write(b"\x16\x03\x01")

        await asyncio.wait_for(reader.read(), 5)

        assert failed(daemon) == {"timeout": 1}
        assert daemon.hub.input_budget.used_bytes == 0
        writer.close()


async def test_handshakes_count_as_connections_and_probes_still_pass(pair: Pair) -> None:
    """Silent connections fill the limit and no more; health is answered beyond it."""
    async with secure(pair, max_connections=2) as daemon:
        silent = [await asyncio.open_connection("127.0.0.1", daemon.port) for _ in range(2)]
        await until(lambda: daemon.server.parts.count_connections().get("tls_handshake") == 2)

        (live,) = responses(
            await talk(daemon.port, [get("/health/live", "Connection: close")], pair.client())
        )
        (refused,) = responses(await talk(daemon.port, [post()], pair.client()))

        assert (live.status, refused.status) == (200, 503)
        beyond = [
            await asyncio.open_connection("127.0.0.1", daemon.port) for _ in range(MAX_BEYOND + 2)
        ]
        await until(lambda: failed(daemon).get("no_room") == 2)
        for _, writer in [*silent, *beyond]:
            writer.close()


async def test_failed_handshakes_are_one_line_a_minute(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    """A scanner must not fill the log."""
    async with secure(pair) as daemon:
        tls = daemon.listener.tls
        assert tls is not None
        for _ in range(5):
            tls.count_failure("protocol")
        tls.report_failures()
        tls.report_failures()

        lines = [each for each in caplog.messages if "handshakes failed" in each]

        assert lines == ["tls handshakes failed protocol=5"]


# --- names, and other certificates ---------------------------------------------------------------


def entry(pair: Pair, *names: str) -> CertificateEntry:
    return CertificateEntry(cert_file=str(pair.cert), key_file=str(pair.key), names=names)


async def common_name(port: int, name: str | None) -> str:
    """Return whose certificate a client is shown that asks for ``name``."""
    from cryptography import x509

    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    stream = await TlsStream.open(port, context, name)
    der = stream.session.getpeercert(binary_form=True)
    stream.close()
    assert der is not None
    found = x509.load_der_x509_certificate(der).subject.rfc4514_string()
    return found.removeprefix("CN=")


async def test_name_decides_which_certificate_is_shown(tmp_path: Path) -> None:
    """Names of the entry, else of the certificate; a star is one label; else the first one."""
    first = make_pair(tmp_path, "first", sans=("localhost",))
    second = make_pair(tmp_path, "second", sans=("b.example", "*.c.example"))
    third = make_pair(tmp_path, "third", sans=("d.example",))
    tls = TlsSettings(certificates=(entry(first), entry(second), entry(third, "e.example")))
    expected: dict[str | None, str] = {
        None: "first",
        "b.example": "second",
        "B.EXAMPLE": "second",
        "x.c.example": "second",
        "x.y.c.example": "first",
        "c.example": "first",
        "d.example": "first",
        "e.example": "third",
        "localhost": "first",
    }
    async with secure(first, tls) as daemon:
        shown = {name: await common_name(daemon.port, name) for name in expected}
    assert shown == expected


async def test_new_certificate_is_for_new_handshakes_alone(tmp_path: Path) -> None:
    """An open connection goes on, and a bad new file changes nothing."""
    old, new = make_pair(tmp_path, "old"), make_pair(tmp_path, "new")
    async with secure(old) as daemon:
        stream = await TlsStream.open(daemon.port, old.client())
        daemon.server.parts.certificates.prepare(TlsSettings(certificates=(entry(new),)))()

        assert await common_name(daemon.port, "localhost") == "new"
        stream.write(post())
        stream.write_eof()
        (answer,) = responses(await stream.reader.read())
        assert answer.status == 200
        stream.close()

        new.cert.write_text("")
        with pytest.raises(ConfigError, match="is empty"):
            daemon.server.parts.certificates.prepare(TlsSettings(certificates=(entry(new),)))
        with pytest.raises(ConfigError, match="by a restart"):
            daemon.server.parts.certificates.prepare(TlsSettings())
        assert await common_name(daemon.port, "localhost") == "new"


async def test_config_shows_the_certificates_in_force(tmp_path: Path) -> None:
    """With their ends, as they are after a change; of a key there is a file's name and no more."""
    old, new = make_pair(tmp_path, "old"), make_pair(tmp_path, "new", ends=30 * DAY)
    authority = make_pair(tmp_path, "ca", sans=(), is_authority=True)
    async with secure(old) as daemon:
        asked = [get("/config", "Connection: close")]
        (before,) = responses(await talk(daemon.port, asked, old.client()))
        later = TlsSettings(
            certificates=(entry(new, "new.example"),),
            client_ca_file=str(authority.cert),
            client_certificates="optional",
        )
        daemon.server.parts.certificates.prepare(later)()
        (after,) = responses(await talk(daemon.port, asked, new.client()))

    assert [each["cert_file"] for each in before.json["tls"]["certificates"]] == [str(old.cert)]
    assert before.json["tls"]["client_certificates"] == "none"
    assert after.json["tls"] == {
        "certificates": [
            {
                "cert_file": str(new.cert),
                "key_file": str(new.key),
                "names": ["new.example"],
                "ends_at": f"{new.certificate.not_valid_after_utc:%Y-%m-%dT%H:%M:%S}.000000Z",
            }
        ],
        "client_ca_file": str(authority.cert),
        "client_certificates": "optional",
        "minimum_version": "TLSv1.2",
    }


async def test_client_certificates_are_asked_for_and_checked(tmp_path: Path) -> None:
    """Required: nobody without a known one gets through; optional: without is fine."""
    own, authority = make_pair(tmp_path), make_pair(tmp_path, "ca", sans=(), is_authority=True)
    client = make_pair(tmp_path, "client", sans=(), signer=authority)
    stranger = make_pair(tmp_path, "stranger", sans=())
    for wanted, statuses in (("required", (200, 0, 0)), ("optional", (200, 200, 0))):
        tls = TlsSettings(
            certificates=(entry(own),),
            client_ca_file=str(authority.cert),
            client_certificates=wanted,  # type: ignore[arg-type]
        )
        async with secure(own, tls) as daemon:
            seen = []
            for shown in (client, None, stranger):
                try:
                    answer = await talk(daemon.port, [post()], own.client(shown=shown))
                    seen.append(responses(answer)[0].status)
                except (OSError, ssl.SSLError):
                    seen.append(0)
            assert tuple(seen) == statuses
            assert failed(daemon).get("client_certificate") == 1
            assert ("no_client_certificate" in failed(daemon)) is (wanted == "required")


# --- the whole process ---------------------------------------------------------------------------


def test_sighup_shows_the_renewed_certificate_and_drops_nobody(tmp_path: Path) -> None:
    """The files are read again; a bad one is told in the log, and the old one is still shown."""
    old = make_pair(tmp_path, "old")
    with daemon_process(**{f"CLEVRD_{k.upper()}": v for k, v in old.settings.items()}) as daemon:
        context = old.client()
        with (
            socket.create_connection(("127.0.0.1", daemon.port)) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as kept,
        ):
            renewed = make_pair(tmp_path, "old")
            daemon.process.send_signal(signal.SIGHUP)
            _wait_for(daemon.port, renewed)
            renewed.cert.write_text("")
            daemon.process.send_signal(signal.SIGHUP)
            kept.sendall(get("/health/live", "Connection: close"))
            assert b" 200 OK" in kept.recv(100)
            _wait_for(daemon.port, renewed)
            assert daemon.stop() == 0
        assert daemon.process.stderr is not None
        log = daemon.process.stderr.read()
        assert "is empty" in log


def _wait_for(port: int, pair: Pair) -> None:
    """Wait until a client that trusts ``pair`` alone gets through."""
    context = ssl.create_default_context(cadata=_pem(pair))
    for _ in range(200):
        try:
            with (
                socket.create_connection(("127.0.0.1", port)) as plain,
                context.wrap_socket(plain, server_hostname="localhost"),
            ):
                return
        except ssl.SSLError:
            import time

            time.sleep(0.05)
    raise AssertionError("the new certificate is not shown")


def _pem(pair: Pair) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding

    return pair.certificate.public_bytes(Encoding.PEM).decode()


def test_bad_certificate_ends_the_start_with_78_and_a_sentence(tmp_path: Path) -> None:
    """Nothing listens without the certificate that was asked for."""
    import sys

    pair = make_pair(tmp_path)
    pair.key.chmod(0o644)
    done = subprocess.run(
        [sys.executable, "-m", "clevrd", "serve", "--address", "127.0.0.1:0", "--tls-cert-file",
         str(pair.cert), "--tls-key-file", str(pair.key)],
        capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    assert done.returncode == 78
    assert f"chmod 640 {pair.key}" in done.stderr


async def test_health_check_works_over_tls(
    tmp_path: Path, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The container's check asks the daemon that its settings describe."""
    async with secure(pair) as daemon:
        file = tmp_path / "clevrd.toml"
        file.write_text('[[tls.certificates]]\ncert_file = "x"\nkey_file = "y"\n')
        at = ["--address", f"127.0.0.1:{daemon.port}"]
        assert await asyncio.to_thread(health, [*at, "--config", str(file)]) == 0
        assert await asyncio.to_thread(health, at) == 1
        monkeypatch.setenv("CLEVRD_TLS_CERT_FILE", "x")
        assert await asyncio.to_thread(health, [*at, "--ready"]) == 0


async def test_our_client_works_over_tls(pair: Pair) -> None:
    """Publishing and subscribing with https:// and a context."""
    async with secure(pair) as daemon:
        url = f"https://localhost:{daemon.port}"
        async with Client(url, tls=pair.client()) as client:
            await client.publish("t", 1)
            async with client.subscribe("t", last=1) as messages:
                message: Any = await anext(aiter(messages))
                assert message.data == 1


async def test_tunnel_of_the_tests_passes_half_closes_on(pair: Pair) -> None:
    """The tests that run through it would otherwise prove nothing."""
    from http_wire import talk as plain_talk

    async with secure(pair) as daemon, tunnel(daemon.port, pair.client()) as port:
        (answer,) = responses(await plain_talk(port, [post()], shut=True))
        assert answer.status == 200


async def test_ended_connection_lets_go_of_its_session(pair: Pair) -> None:
    """Without the collector, which runs rarely: a session is 15 KiB."""
    import gc

    async with secure(pair) as daemon:
        gc.collect()
        gc.disable()
        try:
            for _ in range(20):
                await talk(daemon.port, [post()], pair.client())
            await until(lambda: not daemon.listener.raw.open)
            sessions = [
                each
                for each in gc.get_objects()
                if isinstance(each, TlsConnection) and each._session is not None
            ]
        finally:
            gc.enable()
        assert sessions == []


class Raising(asyncio.Protocol):
    """An owner that raises when it is given so many reads."""

    def __init__(self, at: int) -> None:
        self.at, self.reads = at, 0
        self.lost = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        """Count, and raise when it is time."""
        self.reads += 1
        if self.reads == self.at:
            raise RuntimeError("a fault of the owner")

    def connection_lost(self, exc: Exception | None) -> None:
        """Note the end."""
        self.lost.set()


@pytest.mark.parametrize("at", [1, 2])
async def test_fault_of_the_owner_ends_its_connection(pair: Pair, at: int) -> None:
    """Also in a later turn, of which the loop knows nothing; and nothing is read after it."""
    async with secure(pair) as daemon:
        owners: list[Raising] = []

        def make() -> Raising:
            owners.append(Raising(at))
            return owners[-1]

        assert daemon.listener.tls is not None
        daemon.listener.tls.make_protocol = make
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        session = pair.client().wrap_bio(incoming, outgoing, server_hostname="localhost")
        reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
        while True:
            try:
                session.do_handshake()
                break
            except ssl.SSLWantReadError:
                writer.write(outgoing.read())
                incoming.write(await reader.read(65_536))
        for _ in range(400):
            session.write(b"x")
        writer.write(outgoing.read())

        async with asyncio.timeout(5):
            await until(lambda: bool(owners))
            await owners[0].lost.wait()
        writer.close()

    assert owners[0].reads == at


def test_certificate_that_cannot_be_written_leaves_no_key(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It would be in the way of the next try."""
    key = tmp_path / "k.pem"
    wrong = ["cert", "new", "--cert", str(tmp_path / "none" / "c.pem"), "--key", str(key)]

    failed = main(wrong)
    made = main([*wrong[:3], str(tmp_path / "c.pem"), *wrong[4:]])

    assert (failed, made) == (1, 0)
    assert "Can't write" in capfd.readouterr().err
    assert key.stat().st_mode & 0o777 == 0o600
