"""TlsConnection: encrypts what a connection's owner writes, and decrypts what its client sends.

It stands between two of asyncio's interfaces: it is the protocol of a TCP connection, and the
transport of who owns the connection. uvloop's own TLS transport is not used, since there a
handshake has no owner that could count it, share out its time or answer plain HTTP; a client that
ends its side alone (RFC 8446 §6.1) is cut off; our side can't be ended alone; and what it holds
unsent is unknown. Here everything that is written is encrypted at once and lies in the TCP
connection's buffer, so that sizes, water marks and the kernel's figures mean what they mean without
TLS.

The TLS itself is OpenSSL's (`ssl.SSLObject`). Rules: RFC 8446 §5.1 (records), §6.1 (closing).
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, cast

from clevrd.http_values import LINGER_S
from clevrd.input_budget import NOBODY
from clevrd.proxy_protocol import begins_with_header
from clevrd.tls.server import TlsServer

# The largest plain text of a record (RFC 8446 §5.1), which is what one read can return.
RECORD_BYTES: Final = 16_384
# Records that are decrypted before others get their turn: 0.3 ms. One read of 256 KiB from the
# socket has 17 full records, and 11,000 if each has one byte.
RECORDS_PER_SHARE: Final = 128
# Bytes of a handshake before it is whole: four times what a client with a chain of certificates
# and keys against quantum computers sends.
MAX_HANDSHAKE_BYTES: Final = 65_536
# Bytes that a client can make OpenSSL send of its own accord, such as answers to key updates (RFC
# 8446 §4.6.3): 1,000 of them and more.
MAX_UNASKED_BYTES: Final = 32_768

# The first byte of a record with a handshake in it (RFC 8446 §5.1).
_HANDSHAKE_RECORD: Final = 22

# OpenSSL's reason -> the word under which the failure is counted; any other is "protocol", and
# an alert that the client sent is "refused_by_client".
_REASONS: Final = {
    "CERTIFICATE_VERIFY_FAILED": "client_certificate",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "no_client_certificate",
    "UNSUPPORTED_PROTOCOL": "version",
    "VERSION_TOO_LOW": "version",
    "NO_SHARED_CIPHER": "cipher",
}

_SHAKES_HANDS: Final = 0
_IS_OPEN: Final = 1
# Nothing that arrives means anything any more.
_IS_DEAF: Final = 2

_NOBODY: Final = asyncio.Protocol()
_NO_EXTRA: Final[dict[str, Any]] = {}


class TlsConnection(asyncio.Transport, asyncio.Protocol):
    """One encrypted connection: a TCP connection's protocol, and its owner's transport."""

    __slots__ = (
        "_awaits_turn",
        "_decrypt",
        "_encrypt",
        "_handshake_bytes",
        "_has_eof",
        "_incoming",
        "_is_closing",
        "_is_eof_held",
        "_is_paused",
        "_is_shut",
        "_is_tcp_paused",
        "_owner",
        "_sender",
        "_server",
        "_session",
        "_state",
        "_take_encrypted",
        "_tcp",
        "_unasked_bytes",
        "_unread",
        "deadline_s",
    )

    _tcp: asyncio.Transport

    def __init__(self, server: TlsServer) -> None:
        super().__init__(_NO_EXTRA)
        self._server = server
        self._incoming = ssl.MemoryBIO()
        self._session: ssl.SSLObject | None = server.contexts.wrap(self._incoming, server.outgoing)
        # The methods that each write and each read need; set anew when the connection is lost.
        self._encrypt: Callable[[Any], int] = self._session.write
        self._decrypt: Callable[[int], bytes] = self._session.read
        self._take_encrypted: Callable[[], bytes] = server.outgoing.read
        # The owner, which is given the decrypted bytes; _NOBODY until the handshake is over, and at
        # the end.
        self._owner: asyncio.Protocol = _NOBODY
        self._state = _SHAKES_HANDS
        # Bytes received before the hands were shaken, which the budget of all connections knows of.
        self._handshake_bytes = 0
        # The sender for whom the budget counts them; NOBODY while there are none.
        self._sender = NOBODY
        # Bytes received and not yet given to OpenSSL, whose buffer would keep its largest size.
        self._unread = memoryview(b"")
        # The rest of what was received is decrypted in one of the next turns.
        self._awaits_turn = False
        # The owner wants nothing more for now; and whether TCP is not read, for that or for a turn.
        self._is_paused = False
        self._is_tcp_paused = False
        # The client has ended its side, and the owner knows; and whether it has yet to be told,
        # behind what is held.
        self._has_eof = False
        self._is_eof_held = False
        # Nothing is written any more: our side was ended.
        self._is_shut = False
        self._is_closing = False
        self._unasked_bytes = 0
        # Loop time by which the hands must be shaken, or a failed connection be gone.
        self.deadline_s = 0.0

    # --- asyncio.Protocol: the TCP connection below -----------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the client's first word."""
        self._tcp = cast(asyncio.Transport, transport)
        self._server.begin(self)

    def data_received(self, data: bytes) -> None:
        """Decrypt what has arrived, or go on shaking hands."""
        if self._state == _SHAKES_HANDS:
            self._receive_handshake(data)
        elif self._state == _IS_OPEN and not self._has_eof:
            self._keep(data)
            if not (self._awaits_turn or self._is_paused):
                self._read()

    def _keep(self, data: bytes) -> None:
        if self._unread or len(data) > RECORD_BYTES:
            self._unread = memoryview(bytes(self._unread) + data)
        else:
            self._incoming.write(data)

    def eof_received(self) -> bool:
        """Tell the owner, who decides whether the connection goes on."""
        if self._state == _SHAKES_HANDS:
            self._fail("gone")
        elif self._state == _IS_DEAF:
            self._tcp.close()
        else:
            self._is_eof_held = True
            if not (self._awaits_turn or self._is_paused or self._has_rest):
                self._end_input()
        # TCP stays open: the owner's answer, to close or not, was carried out above or is later.
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the owner, and let go of everything: objects in a circle are freed late."""
        owner, self._owner = self._owner, _NOBODY
        if self._state == _SHAKES_HANDS:
            self._settle_handshake()
            self._server.count_failure("gone")
        if owner is _NOBODY:
            # A PROXY header may have named its client.
            self._server.addresses.left(self._tcp)
        self._state = _IS_DEAF
        self._is_closing = self._is_shut = True
        self._server.forget(self)
        self._unread = memoryview(b"")
        self._session = None
        self._encrypt = _no_write
        self._decrypt = _no_read
        owner.connection_lost(exc)

    def pause_writing(self) -> None:
        """Tell the owner that the buffer of TCP is full."""
        self._owner.pause_writing()

    def resume_writing(self) -> None:
        """Tell the owner that the buffer of TCP has room."""
        self._owner.resume_writing()

    # --- handshake -------------------------------------------------------------------------------

    def _receive_handshake(self, data: bytes) -> None:
        # A request without TLS begins so, or a PROXY header that is not taken from its sender.
        is_plain = data[:1].isupper() or begins_with_header(data)
        if not self._handshake_bytes and data[0] != _HANDSHAKE_RECORD and is_plain:
            self._fail("plain_http", self._server.answer_plain(data))
            return
        self._keep(data)
        size = len(data)
        server = self._server
        if self._sender is NOBODY:
            self._sender = server.budget.sender(None, server.addresses.sender_of(self._tcp, {}))
        before_bytes = self._handshake_bytes
        fits = server.budget.change(before_bytes, before_bytes + size, self._sender)
        self._handshake_bytes += size
        if not fits:
            self._fail("too_much_input")
            return
        if self._awaits_turn:
            return
        # A client's first word costs most: with RSA a millisecond, with P-256 a tenth of that.
        turns = server.turns
        if not turns.begin():
            self._await_turn(size, has_begun=False)
            return
        try:
            self._shake_hands()
        finally:
            turns.end()
        if self._state == _IS_OPEN:
            self._read()

    def _shake_hands(self) -> None:
        """Take the next step, and give the connection to its owner once it was the last one."""
        session = cast(ssl.SSLObject, self._session)
        try:
            while not self._has_shaken(session):
                if not self._unread:
                    self._send()
                    if self._handshake_bytes > MAX_HANDSHAKE_BYTES:
                        self._fail("too_long")
                    return
        except ssl.SSLError as error:
            self._fail(_word_for(error))
            return
        self._send()
        self._settle_handshake()
        server = self._server
        server.forget(self)
        server.count_success()
        self._state = _IS_OPEN
        # The owner knows the connection as this transport.
        server.addresses.rename(self._tcp, self)
        self._owner = server.make_protocol()
        self._owner.connection_made(self)

    def _has_shaken(self, session: ssl.SSLObject) -> bool:
        """Give OpenSSL what is held, and return whether that was the last step."""
        self._feed()
        try:
            session.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def _settle_handshake(self) -> None:
        self._server.budget.change(self._handshake_bytes, 0, self._sender)
        self._handshake_bytes = 0
        self._sender = NOBODY

    def _fail(self, reason: str, answer: bytes = b"") -> None:
        """End a handshake that failed, so that the client can read the alert, or ``answer``."""
        server = self._server
        server.count_failure(reason)
        self._settle_handshake()
        self._send()
        if answer:
            self._tcp.write(answer)
        self._state = _IS_DEAF
        self._is_closing = self._is_shut = True
        if reason == "gone" or not server.linger(self, LINGER_S):
            server.forget(self)
            self._tcp.close()
            return
        self._tcp.write_eof()
        self._follow_reading()

    def expire(self) -> None:
        """End a connection whose client shakes hands too slowly, or has had its last word."""
        if self._state == _SHAKES_HANDS:
            self._fail("timeout")
        else:
            self._tcp.abort()

    def give_way(self) -> None:
        """End the handshake, since others ask as well."""
        self._server.count_failure("no_room")
        self._settle_handshake()
        self._state = _IS_DEAF
        self._is_closing = self._is_shut = True
        self._server.forget(self)
        self._tcp.abort()

    # --- reading ---------------------------------------------------------------------------------

    @property
    def _has_rest(self) -> bool:
        """Whether something was received and is not decrypted."""
        return bool(self._unread) or self._incoming.pending > 0

    def _feed(self) -> None:
        """Give OpenSSL the next slice of what was received, once it has taken the last one."""
        if self._unread and not self._incoming.pending:
            self._incoming.write(self._unread[:RECORD_BYTES])
            self._unread = self._unread[RECORD_BYTES:]

    def _read(self) -> None:
        """Decrypt a share of what has arrived, give it to the owner, and hold the rest."""
        decrypt = self._decrypt
        parts: list[bytes] = []
        for _ in range(RECORDS_PER_SHARE):
            if self._unread:
                self._feed()
            try:
                part = decrypt(RECORD_BYTES)
            except ssl.SSLWantReadError:
                # OpenSSL keeps the part of a record that is left.
                if not self._unread:
                    break
                continue
            except ssl.SSLZeroReturnError:
                part = b""
            except ssl.SSLError:
                self._break()
                return
            if not part:
                # Nothing that follows the client's end means anything (RFC 8446 §6.1).
                self._is_eof_held = True
                self._unread = memoryview(b"")
                self._incoming.read()
                break
            parts.append(part)
            if not self._has_rest:
                break
        if not self._send_unasked():
            self._break()
            return
        if self._has_rest:
            self._await_turn(len(self._unread), has_begun=True)
        if parts:
            self._owner.data_received(parts[0] if len(parts) == 1 else b"".join(parts))
        if self._is_eof_held and not (self._awaits_turn or self._is_paused):
            self._end_input()

    def _end_input(self) -> None:
        self._is_eof_held = False
        if self._has_eof or self._state != _IS_OPEN or self._is_closing:
            return
        self._has_eof = True
        if not self._owner.eof_received():
            self.close()

    def _await_turn(self, size: int, *, has_begun: bool) -> None:
        """Let others be served before the rest, and read nothing meanwhile."""
        self._awaits_turn = True
        self._follow_reading()
        self._server.turns.wait(self._take_turn, size, has_begun=has_begun)

    def _take_turn(self) -> None:
        self._awaits_turn = False
        try:
            if self._state == _SHAKES_HANDS:
                self._shake_hands()
            if self._state == _IS_OPEN and not self._is_paused and not self.is_closing():
                self._read()
        except BaseException:
            # The loop aborts a connection when its protocol raises in a call of TCP's; this is no
            # such call.
            self.abort()
            raise
        self._follow_reading()

    def _follow_reading(self) -> None:
        """Read from TCP, or don't, as it is wanted now."""
        wants_none = (self._is_paused or self._awaits_turn) and self._state != _IS_DEAF
        if wants_none == self._is_tcp_paused or self._tcp.is_closing():
            return
        self._is_tcp_paused = wants_none
        if wants_none:
            self._tcp.pause_reading()
        else:
            self._tcp.resume_reading()

    # --- asyncio.Transport: for the owner -------------------------------------------------------

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Encrypt ``data`` and hand it to TCP."""
        if self._is_shut or not data:
            return
        try:
            self._encrypt(data)
        except ssl.SSLError:
            self._break()
            return
        self._tcp.write(self._take_encrypted())

    def can_write_eof(self) -> bool:
        """Our side can be ended alone."""
        return True

    def write_eof(self) -> None:
        """End our side behind all that was written, and ignore what still arrives."""
        if self._is_shut:
            return
        self._say_end()
        self._state = _IS_DEAF
        self._unread = memoryview(b"")
        self._tcp.write_eof()
        self._follow_reading()

    def close(self) -> None:
        """End the connection behind what was written."""
        if self._is_closing:
            return
        self._is_closing = True
        self._say_end()
        self._tcp.close()

    def abort(self) -> None:
        """End the connection at once."""
        self._is_closing = self._is_shut = True
        self._tcp.abort()

    def is_closing(self) -> bool:
        """Whether the connection ends, or has ended."""
        return self._is_closing or self._tcp.is_closing()

    def pause_reading(self) -> None:
        """Give the owner nothing until `resume_reading`."""
        self._is_paused = True
        self._follow_reading()

    def resume_reading(self) -> None:
        """Give the owner what was held, in a turn of its own, and what arrives."""
        self._is_paused = False
        is_due = self._has_rest or self._is_eof_held
        if is_due and self._state == _IS_OPEN and not self._awaits_turn:
            self._await_turn(len(self._unread), has_begun=True)
        self._follow_reading()

    def is_reading(self) -> bool:
        """Whether the owner wants to be given what arrives."""
        return not self._is_paused and not self.is_closing()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set the water marks, in encrypted bytes."""
        self._tcp.set_write_buffer_limits(high, low)

    def get_write_buffer_size(self) -> int:
        """Return how many encrypted bytes the kernel has not taken."""
        return self._tcp.get_write_buffer_size()

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """Return the water marks, in encrypted bytes."""
        return self._tcp.get_write_buffer_limits()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return what is known of the session, and of TCP otherwise."""
        session = self._session
        if name == "ssl_object":
            return default if session is None else session
        if name == "sslcontext":
            return default if session is None else session.context
        if name == "peercert":
            return default if session is None else session.getpeercert()
        return self._tcp.get_extra_info(name, default)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Give the connection to another owner."""
        self._owner = cast(asyncio.Protocol, protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Return the owner."""
        return self._owner

    # --- what OpenSSL has written -----------------------------------------------------------------

    def _send(self) -> int:
        encrypted = self._take_encrypted()
        if encrypted:
            self._tcp.write(encrypted)
        return len(encrypted)

    def _send_unasked(self) -> bool:
        """Send what reading has made OpenSSL say; return whether that is still little."""
        if self._server.outgoing.pending:
            self._unasked_bytes += self._send()
        return self._unasked_bytes <= MAX_UNASKED_BYTES

    def _say_end(self) -> None:
        """Tell the client that nothing follows, so that it knows a whole answer from a part."""
        if self._is_shut:
            return
        self._is_shut = True
        if self._session is not None:
            # OpenSSL raises to wait for the client's own end, or for another reason: our end is
            # written.
            with suppress(ssl.SSLError):
                self._session.unwrap()
            self._send()

    def _break(self) -> None:
        """End a connection whose client broke the rules of TLS."""
        self._send()
        self._state = _IS_DEAF
        self._is_closing = self._is_shut = True
        self._tcp.close()


def _word_for(error: ssl.SSLError) -> str:
    reason = error.reason or ""
    if "_ALERT_" in reason:
        return "refused_by_client"
    return _REASONS.get(reason, "protocol")


def _no_write(_: Any) -> int:
    return 0


def _no_read(_: int) -> bytes:
    raise ssl.SSLWantReadError
