"""nats-py as the engine uses it: single connections, and what servers refuse in a sentence.

nats-py makes no connection again by itself: what it had buffered would go to another server, or to
another start of the same one, and a record must reach the incarnation that it was made for. Nor
are its requests used, whose time limit loses cancellations on Python 3.11, nor its subscriptions to
streams, which do not notice a stream that was made again.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from clevrd.errors import ConfigError, JournalFull, JournalUnavailable
from clevrd.journal.library_versions import refuse_older
from clevrd.journal.nats.settings import NatsSettings
from clevrd.journal.tls import tls_context
from clevrd.journal.url_parts import Host

try:
    import nats.errors
    import nkeys  # type: ignore[import-untyped]
    from nats.aio.client import Client, RawCredentials
    from nats.protocol.parser import AWAITING_CONTROL_LINE, Parser
except ImportError as error:
    refuse_older("nats")
    raise ConfigError(
        "The journal is in NATS, and the Python packages nats-py and nkeys are not installed;"
        ' install them: pip install "clevrd[nats]".'
    ) from error

refuse_older("nats")

# How long a connection may take until requests can be sent over it.
CONNECT_S: Final = 4.0
# nats-py asks a server so often whether it is there, and gives it up after so many silent times.
_PING_S: Final = 2
_PINGS: Final = 3
# Bytes of a file with a seed or with credentials at most.
_MAX_SECRET_BYTES: Final = 64 << 10
# A message of nats-py's, as it hands it over.
Message = Any
# Takes a message: its subject, where it is answered, its data, and its headers, if it has any.
Take = Callable[[bytes, bytes, bytes, dict[str, str] | None], None]
# Bytes that are copied into one piece to be sent, which is quicker than three pieces.
_MAX_JOINED_BYTES: Final = 16 << 10

# The rights that a user has to have, as they stand in a server's configuration.
PERMISSIONS: Final = 'permissions { publish: ["$JS.API.>", "PREFIX.>"], subscribe: ["_INBOX.>"] }'

# Words for faults that no server numbers.
LOST: Final = "LOST"
SILENT: Final = "SILENT"
NOBODY: Final = "NOBODY"
DENIED: Final = "DENIED"
REFUSED: Final = "REFUSED"
NO_TLS: Final = "NO_TLS"
NOT_NATS: Final = "NOT_NATS"
BAD_TLS: Final = "BAD_TLS"
BAD_FILE: Final = "BAD_FILE"

# Numbers of JetStream's own errors (nats-server, server/errors.json).
NO_STREAM: Final = "10059"
NO_MESSAGE: Final = "10037"
NAME_IN_USE: Final = "10058"
_SUBJECT_OVERLAP: Final = "10065"
_NO_PEERS: Final = frozenset({"10005", "10074"})
_MAX_BYTES_WANTED: Final = "10113"
_NOT_ENABLED: Final = frozenset({"10039", "10076"})
# No room in the server, the account, or the memory and files that they may take.
_FULL: Final = frozenset({"10002", "10023", "10028", "10047"})
# A stream can't write: its disk has no room, or another reason, which it tells.
_STORE_FAILED: Final = "10077"


class NatsFault(Exception):
    """A server refuses, or can't be reached; ``code`` is JetStream's number or a word of ours."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{code} {text}".strip())
        self.code = code
        self.text = text


# Faults that go by themselves; a start waits for that.
PASSING: Final = frozenset(
    # No peers, no leader, a stream that is offline.
    {LOST, SILENT, NOBODY, "10005", "10008", "10009", "10118"}
)


def sentence_of(fault: NatsFault, shown: str) -> str:
    """Return what happened and what to do about it; ``shown`` is the URL without its secret."""
    code, text = fault.code, fault.text.rstrip(".")
    at = f"NATS at {shown}"
    if code == REFUSED:
        return (
            f"{at} refuses the credentials ({text}); give user and password, or a token, in the URL"
            " or password_file, or name an nkey_seed_file or a creds_file."
        )
    if code == DENIED:
        return (
            f"{at} does not allow its user what the journal needs ({text}); it needs:"
            f" {PERMISSIONS}."
        )
    if code == NO_TLS:
        return f"{at} does not speak TLS; write nats://, or set up TLS in the server."
    if code == BAD_TLS:
        return f"{at} can't be spoken to over TLS: {text}."
    if code == NOT_NATS:
        return f"What answers at {shown} is not NATS ({text}); look at host and port."
    if code == BAD_FILE:
        return f"The journal's {text}."
    if code == NOBODY or code in _NOT_ENABLED:
        return (
            f"JetStream does not answer in {at}: it is switched off in the server (jetstream {{"
            " store_dir: ... }), or for this account, or its servers have no majority."
        )
    if code == SILENT:
        return (
            f"{at} does not answer; a server hangs, or the servers that have the stream have no"
            " majority."
        )
    if code == _SUBJECT_OVERLAP:
        return (
            f"In {at} a stream of others has subjects of the journal's already; remove it, or give"
            " the journal another prefix."
        )
    if code in _NO_PEERS:
        return (
            f"{at} has not enough servers for the copies that replicas asks for ({text}); let more"
            " servers join, or write replicas = 1."
        )
    if code == _MAX_BYTES_WANTED:
        return f"{at} wants a bound for each stream; give retention_bytes."
    if is_full(fault):
        return (
            f"{at} has no room for messages ({text}); give JetStream more (max_file_store, or the"
            " account's limits), or keep less (retention_bytes, retention_s)."
        )
    if code == LOST:
        return f"{at} can't be reached: {text}; see whether it runs there."
    return f"{at} refuses what the journal asks: {text} (error {code})."


def unavailable(fault: NatsFault, shown: str) -> JournalUnavailable | JournalFull:
    """Return the error that the node and its publishers understand."""
    sentence = sentence_of(fault, shown)
    return JournalFull(sentence) if is_full(fault) else JournalUnavailable(sentence)


def is_full(fault: NatsFault) -> bool:
    """Return whether there was no room, so that nothing was taken."""
    return fault.code in _FULL or (fault.code == _STORE_FAILED and "space" in fault.text)


class _OwnParser(Parser):
    """nats-py's parser, which takes whole messages without headers in a third of the time.

    All else, and what a read has cut in two, is left to nats-py's own.
    """

    async def parse(self, data: bytes = b"") -> None:
        client, at = self.nc, 0
        if not self.buf and self.state == AWAITING_CONTROL_LINE:
            while data.startswith(b"MSG ", at):
                end = data.find(b"\r\n", at)
                if end < 0:
                    break
                # Subject, number of the subscription, where it is answered if it is, bytes.
                words = data[at + 4 : end].split()
                try:
                    number, size_bytes = int(words[1]), int(words[-1])
                except (IndexError, ValueError):
                    break
                first = end + 2
                last = first + size_bytes
                if last + 2 > len(data):
                    break
                reply = words[2] if len(words) == 4 else b""
                await client._process_msg(number, words[0], reply, data[first:last], b"")
                at = last + 2
        if at < len(data):
            await super().parse(data[at:] if at else data)


class OwnClient(Client):
    """nats-py's client, which sends no credentials in the clear where TLS was asked for.

    Beside its own ways it has shorter ones, since a record of the journal comes and goes by it: a
    message is handed on as it is parsed, and not by a queue and a task of its subscription, and one
    is sent without a queue and a task that flushes.
    """

    must_encrypt = False

    def __init__(self) -> None:
        super().__init__()
        self._ps = _OwnParser(self)
        # A subscription's number -> the function that takes its messages.
        self._takers: dict[int, Take] = {}

    async def listen(self, subject: str, take: Take) -> Any:
        """Subscribe; have ``take`` called with each message. Return what `leave` needs."""
        subscription = await self.subscribe(subject)
        self._takers[subscription._id] = take
        return subscription

    async def leave(self, subscription: Any) -> None:
        """End a subscription that `listen` has made."""
        self._takers.pop(subscription._id, None)
        await subscription.unsubscribe()

    def send_now(self, subject: str, payload: bytes, reply: str) -> bool:
        """Send a message; return False, and send nothing, where others have to be sent first."""
        if self._pending_data_size or not self.is_connected:
            return False
        head = f"PUB {subject} {reply} {len(payload)}\r\n".encode()
        if len(payload) > _MAX_JOINED_BYTES:
            self._transport.writelines([head, payload, b"\r\n"])  # type: ignore[union-attr]
        else:
            self._transport.write(b"%b%b\r\n" % (head, payload))  # type: ignore[union-attr]
        return True

    async def _process_msg(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes
    ) -> None:
        take = self._takers.get(sid)
        if take is None:
            await super()._process_msg(sid, subject, reply, data, headers)
            return
        try:
            take(subject, reply, data, await self._process_headers(headers) if headers else None)
        except Exception as error:
            # One message's fault must not end the reading of all, as with nats-py's own.
            await self._error_cb(error)

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        if initial_connection and self.must_encrypt and not info.get("tls_required"):
            if not info.get("tls_available"):
                raise _NoTls
            # The server leaves it to its clients.
            info["tls_required"] = True
        await super()._process_info(info, initial_connection)


class _NoTls(nats.errors.Error):
    """The server does not speak TLS."""


class Connector:
    """Makes connections to one server or another."""

    def __init__(self, settings: NatsSettings) -> None:
        """Raises ConfigError: a file of certificates can't be used."""
        self._settings = settings
        self._context = (
            tls_context(settings.ca_file, settings.client_cert_file, settings.client_key_file)
            if settings.address.is_tls
            else None
        )

    async def connect(
        self,
        host: Host,
        on_error: Callable[[str], None],
        on_closed: Callable[[], None],
    ) -> OwnClient:
        """Return an open connection that has said who it is.

        Args:
            on_error: told what a server reports of what was sent to it.
            on_closed: called when the connection has ended.

        Raises:
            NatsFault: there is none.
        """
        errors: list[Exception] = []

        async def note_error(error: Exception) -> None:
            errors.append(error)
            del errors[:-4]
            on_error(str(error))

        async def note_closed() -> None:
            on_closed()

        client = OwnClient()
        client.must_encrypt = self._context is not None
        try:
            async with asyncio.timeout(CONNECT_S):
                await client.connect(
                    servers=[_url_of(host, is_tls=self._context is not None)],
                    error_cb=note_error,
                    closed_cb=note_closed,
                    name="clevrd",
                    allow_reconnect=False,
                    # One try, and one at once where the first one failed.
                    max_reconnect_attempts=1,
                    reconnect_time_wait=0,
                    connect_timeout=int(CONNECT_S),
                    ping_interval=_PING_S,
                    max_outstanding_pings=_PINGS,
                    tls=self._context,
                    **self._credentials(),
                )
        except BaseException as error:
            await close(client)
            if isinstance(error, TimeoutError):
                raise NatsFault(LOST, f"no answer within {CONNECT_S:.0f} s") from error
            if isinstance(error, Exception):
                raise _connect_fault(error, errors) from error
            raise
        if self._context is not None:
            # Without this asyncio warns at the end of each such connection of something that has no
            # effect: nats-py does not tell its protocol that it is under TLS.
            client._transport._io_writer.transport.get_protocol()._over_ssl = True  # type: ignore[union-attr]
        return client

    def _credentials(self) -> dict[str, Any]:
        """Return who we are, as files say it now; raises NatsFault."""
        settings = self._settings
        address = settings.address
        if path := settings.creds_file:
            text = _secret_in(path, "credentials file")
            if "BEGIN NATS USER JWT" not in text or "BEGIN USER NKEY SEED" not in text:
                # nats-py would look for these lines for ever.
                raise NatsFault(
                    BAD_FILE,
                    f"credentials file {path} has no user JWT or no seed; make it with nsc"
                    " (nsc generate creds)",
                )
            return {"user_credentials": RawCredentials(text)}
        if path := settings.nkey_seed_file:
            seed = _secret_in(path, "nkey seed file").strip()
            try:
                nkeys.from_seed(bytearray(seed.encode())).wipe()
            except Exception as error:
                raise NatsFault(
                    BAD_FILE,
                    f"nkey seed file {path} has no seed of a user; make one with nk (nk -gen user)",
                ) from error
            return {"nkeys_seed_str": seed}
        if address.user:
            return {"user": address.user, "password": address.password}
        return {"token": address.token} if address.token else {}


async def close(client: Client) -> None:
    """Close a connection without waiting for its peer."""
    # An error that a broken connection has at its end is of no use any more.
    with suppress(Exception):
        async with asyncio.timeout(0.5):
            await client.close()
    transport = getattr(client, "_transport", None)
    writer = getattr(transport, "_io_writer", None)
    if writer is not None:
        writer.transport.abort()


def _url_of(host: Host, *, is_tls: bool) -> str:
    name = f"[{host[0]}]" if ":" in host[0] else host[0]
    return f"{'tls' if is_tls else 'nats'}://{name}:{host[1]}"


def _secret_in(path: str, what: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read(_MAX_SECRET_BYTES)
    except (OSError, UnicodeError) as error:
        raise NatsFault(BAD_FILE, f"{what} {path} can't be read: {error}") from error


def _connect_fault(error: Exception, noted: list[Exception]) -> NatsFault:
    """Return why no connection was made, with a cause that the server or TLS gave."""
    if isinstance(error, NatsFault):
        return error
    for found in (error, *reversed(noted)):
        cause: BaseException | None = found
        while cause is not None:
            if isinstance(cause, _NoTls):
                return NatsFault(NO_TLS, "")
            if isinstance(cause, ssl.SSLCertVerificationError):
                return NatsFault(
                    BAD_TLS,
                    f"its certificate is not trusted ({cause.verify_message}); write tls://, name"
                    " its CA (ca_file), and the host as the certificate does",
                )
            if isinstance(cause, ssl.SSLError):
                return NatsFault(
                    BAD_TLS,
                    f"{cause.reason or cause}; the server may ask for a certificate"
                    " (client_cert_file)",
                )
            cause = cause.__cause__ or cause.__context__
    told = [error, *reversed(noted)]
    for found in told:
        text = str(found)
        if "uthoriz" in text or "uthentic" in text:
            return NatsFault(REFUSED, text.removeprefix("nats: ").strip("'"))
    for found in told:
        text = str(found)
        if "INFO" in text or "info message" in text or isinstance(found, UnicodeDecodeError):
            return NatsFault(NOT_NATS, "it does not begin with INFO")
        if isinstance(found, OSError):
            return NatsFault(LOST, found.strerror or text or type(found).__name__)
    return NatsFault(LOST, str(error) or type(error).__name__)
