"""Certificates for tests, a client that can end its side alone, and a tunnel for other clients.

The tunnel takes plain connections and passes them on over TLS, with their ends and resets, so that
a test whose client knows nothing of TLS asks the same of a daemon that speaks it.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import ipaddress
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

DAY = dt.timedelta(days=1)


class Pair(NamedTuple):
    """The files of a certificate and its key, and what signs others with them."""

    cert: Path
    key: Path
    certificate: x509.Certificate
    private: ec.EllipticCurvePrivateKey

    @property
    def settings(self) -> dict[str, str]:
        """The plain settings that make a daemon show it."""
        return {"tls_cert_file": str(self.cert), "tls_key_file": str(self.key)}

    def client(self, *, shown: Pair | None = None) -> ssl.SSLContext:
        """Return the context of a client that trusts this certificate, and shows one of its own."""
        context = ssl.create_default_context(cafile=str(self.cert))
        if shown is not None:
            context.load_cert_chain(shown.cert, shown.key)
        return context


def make_pair(
    folder: Path,
    name: str = "localhost",
    *,
    sans: Sequence[str] = ("localhost", "127.0.0.1"),
    begins: dt.timedelta = -DAY,
    ends: dt.timedelta = 90 * DAY,
    signer: Pair | None = None,
    is_authority: bool = False,
    subject: Sequence[tuple[x509.ObjectIdentifier, str]] = (),
) -> Pair:
    """Write a certificate and its key to ``folder``; signed by itself, or by ``signer``."""
    private = ec.generate_private_key(ec.SECP256R1())
    attributes = subject or [(NameOID.COMMON_NAME, name)]
    own = x509.Name([x509.NameAttribute(oid, text) for oid, text in attributes])
    now = dt.datetime.now(dt.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(own)
        .issuer_name(own if signer is None else signer.certificate.subject)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + begins)
        .not_valid_after(now + ends)
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
    )
    if sans:
        builder = builder.add_extension(
            x509.SubjectAlternativeName([_san(each) for each in sans]), critical=False
        )
    certificate = builder.sign(private if signer is None else signer.private, hashes.SHA256())
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    cert.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    key.chmod(0o600)
    return Pair(cert, key, certificate, private)


def _san(text: str) -> x509.GeneralName:
    if "://" in text:
        return x509.UniformResourceIdentifier(text)
    if "@" in text:
        return x509.RFC822Name(text)
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


class TlsStream(asyncio.Protocol):
    """A TLS client over one connection that keeps half-closes apart, as asyncio's own does not.

    What is decrypted goes to ``reader``; the peer's close_notify is its EOF.
    """

    def __init__(self, context: ssl.SSLContext, hostname: str | None = "localhost") -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.session = context.wrap_bio(self.incoming, self.outgoing, server_hostname=hostname)
        self.reader = asyncio.StreamReader()
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # True once the peer said that nothing follows; a FIN without that is a cut.
        self.has_notice = False
        self.transport: asyncio.Transport

    @classmethod
    async def open(
        cls, port: int, context: ssl.SSLContext, hostname: str | None = "localhost"
    ) -> TlsStream:
        """Connect and shake hands."""
        loop = asyncio.get_running_loop()
        _, stream = await loop.create_connection(lambda: cls(context, hostname), "127.0.0.1", port)
        await stream.ready
        return stream

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self._go_on()

    def data_received(self, data: bytes) -> None:
        self.incoming.write(data)
        self._go_on()

    def _go_on(self) -> None:
        try:
            if not self.ready.done():
                self.session.do_handshake()
                self.ready.set_result(None)
            while not self.has_notice:
                data = self.session.read(65_536)
                if data:
                    self.reader.feed_data(data)
                else:
                    self._end()
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self._end()
        except ssl.SSLError as error:
            self._fail(error)
        self._send()

    def _end(self) -> None:
        self.has_notice = True
        self.reader.feed_eof()

    def _fail(self, error: Exception) -> None:
        if not self.ready.done():
            self.ready.set_exception(error)
        elif self.reader.exception() is None and not self.has_notice:
            self.reader.set_exception(error)

    def _send(self) -> None:
        if self.outgoing.pending:
            self.transport.write(self.outgoing.read())

    def eof_received(self) -> bool:
        self._fail(ConnectionResetError("closed without a close_notify"))
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(exc or ConnectionResetError("gone"))

    def write(self, data: bytes) -> None:
        """Encrypt and send ``data``."""
        self.session.write(data)
        self._send()

    def write_eof(self, *, fin: bool = True) -> None:
        """Say that nothing follows, with a FIN behind it or without."""
        with suppress(ssl.SSLError):
            self.session.unwrap()
        self._send()
        if fin and self.transport.can_write_eof():
            self.transport.write_eof()

    def close(self) -> None:
        """Close the connection."""
        self.transport.close()


@asynccontextmanager
async def tunnel(port: int, context: ssl.SSLContext) -> AsyncIterator[int]:
    """Pass connections to a port of its own, which is yielded, on to ``port`` over TLS."""
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await _pass_on(reader, writer, await TlsStream.open(port, context))
        except (OSError, ssl.SSLError):
            writer.transport.abort()
        finally:
            tasks.discard(task)
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pass_on(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, stream: TlsStream
) -> None:
    async def upwards() -> None:
        try:
            while data := await reader.read(65_536):
                stream.write(data)
            stream.write_eof()
        except OSError:
            stream.transport.abort()

    async def downwards() -> None:
        try:
            while data := await stream.reader.read(65_536):
                writer.write(data)
                await writer.drain()
            writer.write_eof()
        except OSError:
            writer.transport.abort()

    both: Any = asyncio.gather(upwards(), downwards())
    try:
        await both
    finally:
        stream.close()
