"""Progress: what the peer of a connection has taken so far, as the kernel counts it.

What follows from it is decided elsewhere. Sources: struct tcp_info in the kernel's
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

# How often the kernel asks, within the time to answer, before it gives a silent peer up.
_ASKED_AGAIN: Final = 2

_RESET: Final = struct.pack("ii", 1, 0)
_INT: Final = struct.Struct("i")

# Fields of struct tcp_info, which only ever grows at its end: repetitions of a segment that nobody
# acknowledges, segments under way, bytes that the peer's kernel has acknowledged (since 4.1), that
# were not sent yet (4.6), and that the peer's kernel last offered room for (5.4).
_RETRANSMITS: Final = struct.Struct("@2xB")
_UNACKED_SEGMENTS: Final = struct.Struct("@24xI")
_ACKED_BYTES: Final = struct.Struct("@120xQ")
_NOT_SENT_BYTES: Final = struct.Struct("@144xI")
_OFFERED_WINDOW: Final = struct.Struct("@228xI")
_TCP_INFO_BYTES: Final = 232
# Linux's own number where Python's socket module lacks it.
_TCP_INFO: Final = getattr(socket, "TCP_INFO", 11)
_HAS_TCP_INFO: Final = sys.platform == "linux"


class Progress(msgspec.Struct, frozen=True):
    """How far a peer had got at one moment."""

    # Rises when the peer's kernel takes bytes; only the difference of two means anything.
    taken_bytes: int
    # Written and not acknowledged, in this process or in its kernel; not 0 if anything is.
    is_behind: bool
    # Up to where the peer's kernel would take bytes: what it took and the room it last offered. It
    # rises when the peer's process reads, and not when its kernel fills up. Where nobody knows the
    # room, ``taken_bytes``.
    edge_bytes: int
    # The kernel counts acknowledgements, so that silence on a stream means something.
    is_exact: bool = False
    # What was sent is repeated, since nobody acknowledges it: not even the peer's kernel is there.
    is_repeating: bool = False


def progress_of(transport: asyncio.Transport) -> Progress:
    """Return how far the peer of ``transport`` has got; 2 us."""
    buffered_bytes = transport.get_write_buffer_size()
    # A transport that is closed has none, here and below.
    sock = transport.get_extra_info("socket")
    if _HAS_TCP_INFO and sock is not None and sock.family != socket.AF_UNIX:
        try:
            info = sock.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _TCP_INFO_BYTES)
        except (OSError, ValueError):
            # Closed in between: what is left is the process's own.
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
    """Return how much of what was written to ``transport`` is not acknowledged, as far as is known.

    What the kernel holds counts: it asks for more only when a third of its buffer is free, which a
    reader at some KB/s takes many seconds for. tcp(7), SIOCOUTQ.
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
    """Have the kernel ask the peer's kernel whether it is there, and end the connection if not.

    For connections on which nobody says anything for a while, and neither side may. A peer that is
    gone is found within the sum of both times, in whole seconds. tcp(7), TCP_KEEPIDLE; where the
    system has no such options its own patience counts.
    """
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family == socket.AF_UNIX:
        return
    # macOS's name for it.
    idle = getattr(socket, "TCP_KEEPIDLE", None) or getattr(socket, "TCP_KEEPALIVE", None)
    # It may be closed by now.
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

    Without the reset the kernel would go on offering what nobody takes, up to SO_SNDBUF for each,
    for minutes after the process forgot the connection. socket(7), SO_LINGER.
    """
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family != socket.AF_UNIX:
        # It may be closed by now.
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    transport.abort()
