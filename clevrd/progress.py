"""Progress: how much the peer of a connection has taken, as the kernel counts it.

The callers decide what follows from the figures. Sources: struct tcp_info in the kernel's
include/uapi/linux/tcp.h; tcp(7), SIOCOUTQ.
"""

from __future__ import annotations

import asyncio
import fcntl
import socket
import struct
import sys
import termios
from contextlib import suppress
from typing import Final

import msgspec

# Keepalive probes that the kernel sends within the time to answer before it gives a silent peer up.
_ASKED_AGAIN: Final = 2

_RESET: Final = struct.pack("ii", 1, 0)
_INT: Final = struct.Struct("i")

# Offsets of fields in struct tcp_info, which only ever grows at its end: retransmissions of a
# segment that is not acknowledged; segments under way; bytes that the peer's kernel has
# acknowledged (since Linux 4.1); bytes not sent yet (4.6); bytes that the peer's kernel last
# offered room for (5.4).
_RETRANSMITS: Final = struct.Struct("@2xB")
_UNACKED_SEGMENTS: Final = struct.Struct("@24xI")
_ACKED_BYTES: Final = struct.Struct("@120xQ")
_NOT_SENT_BYTES: Final = struct.Struct("@144xI")
_OFFERED_WINDOW: Final = struct.Struct("@228xI")
_TCP_INFO_BYTES: Final = 232
# Linux's number for TCP_INFO, for a socket module that lacks the name.
_TCP_INFO: Final = getattr(socket, "TCP_INFO", 11)
_HAS_TCP_INFO: Final = sys.platform == "linux"


class Progress(msgspec.Struct, frozen=True):
    """The progress of a peer at one moment."""

    # Bytes that the peer's kernel has taken, up to a constant; only the difference of two values
    # means anything.
    taken_bytes: int
    # True if any bytes are written and not acknowledged, in this process or in its kernel.
    is_behind: bool
    # The number that ``taken_bytes`` could rise to: bytes taken and the room that the peer's kernel
    # last offered. It rises when the peer's process reads, and not when only its kernel fills up.
    # Equal to ``taken_bytes`` where the room is not known.
    edge_bytes: int
    # True where the kernel counts acknowledgements, so that a stream without progress means
    # something.
    is_exact: bool = False
    # True while the kernel repeats a segment because not even the peer's kernel acknowledges it.
    is_repeating: bool = False


def progress_of(transport: asyncio.Transport) -> Progress:
    """Return the progress of ``transport``'s peer; takes 2 us."""
    buffered_bytes = transport.get_write_buffer_size()
    # A closed transport has no socket.
    sock = transport.get_extra_info("socket")
    if _HAS_TCP_INFO and sock is not None and sock.family != socket.AF_UNIX:
        try:
            info = sock.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _TCP_INFO_BYTES)
        except (OSError, ValueError):
            # The socket was closed in between, so only this process's own buffer is known.
            info = b""
        if len(info) == _TCP_INFO_BYTES:
            unsent_bytes = buffered_bytes + _NOT_SENT_BYTES.unpack_from(info)[0]
            (acked_bytes,) = _ACKED_BYTES.unpack_from(info)
            return Progress(
                taken_bytes=acked_bytes,
                is_behind=bool(unsent_bytes or _UNACKED_SEGMENTS.unpack_from(info)[0]),
                edge_bytes=acked_bytes + _OFFERED_WINDOW.unpack_from(info)[0],
                is_exact=True,
                is_repeating=_RETRANSMITS.unpack_from(info)[0] > 0,
            )
    unsent_bytes = unsent_bytes_of(transport)
    return Progress(-unsent_bytes, is_behind=unsent_bytes > 0, edge_bytes=-unsent_bytes)


def unsent_bytes_of(transport: asyncio.Transport) -> int:
    """Return the bytes written to ``transport`` that are not acknowledged, as far as known.

    Bytes that the kernel holds count too: the kernel takes more only when a third of its buffer is
    free, which takes a reader at some KB/s many seconds. tcp(7), SIOCOUTQ.
    """
    unsent_bytes = transport.get_write_buffer_size()
    sock = transport.get_extra_info("socket")
    if sock is None:
        return unsent_bytes
    try:
        (in_kernel,) = _INT.unpack(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))
    except (OSError, ValueError):
        return unsent_bytes
    return unsent_bytes + int(in_kernel)


def ask_when_silent(transport: asyncio.Transport, interval_s: float, timeout_s: float) -> None:
    """Have the kernel ask whether the peer is there, and end the connection if not.

    For connections on which neither side says anything for a while. A peer that is gone is found
    within the sum of both times, in whole seconds. tcp(7), TCP_KEEPIDLE; a system without such
    options uses its own times.
    """
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family == socket.AF_UNIX:
        return
    # macOS calls the option TCP_KEEPALIVE.
    idle = getattr(socket, "TCP_KEEPIDLE", None) or getattr(socket, "TCP_KEEPALIVE", None)
    # The socket may be closed by now.
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if idle is not None:
            sock.setsockopt(socket.IPPROTO_TCP, idle, max(1, int(interval_s)))
        if hasattr(socket, "TCP_KEEPINTVL"):
            pause_s = max(1, int(timeout_s / _ASKED_AGAIN))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, pause_s)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _ASKED_AGAIN)


def reset(transport: asyncio.Transport) -> None:
    """End the connection now, in the kernel as well.

    Without a reset the kernel would keep up to SO_SNDBUF bytes for each connection and go on
    offering them for minutes after the process forgot it. socket(7), SO_LINGER.
    """
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family != socket.AF_UNIX:
        # The socket may be closed by now.
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    transport.abort()
