"""Listening sockets: opens them, watches them, and opens dead ones again.

Accepted connections are the protocol factory's business (`raw_http`).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import stat
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from typing import Final

from clevrd.addresses import TcpAddress, UnixAddress
from clevrd.errors import CannotStart, NotAllowedHere

log = logging.getLogger(__name__)

# Connections that wait in the kernel to be accepted. libuv accepts one in a turn of the loop, so a
# burst waits here; the kernel caps the number (net.core.somaxconn).
BACKLOG: Final = 4096


class Listeners:
    """The daemon's listening sockets on one address, each with the loop's server for it."""

    def __init__(
        self,
        address: TcpAddress | UnixAddress,
        send_buffer_bytes: int,
        make_protocol: Callable[[], asyncio.Protocol],
        loop: asyncio.AbstractEventLoop,
        *,
        is_secure: bool = False,
        named_by: str = "--address or ADDRESS",
        given: Sequence[socket.socket] = (),
    ) -> None:
        """Prepare to listen on ``address``, or at the sockets that are ``given``.

        Args:
            make_protocol: makes the protocol of each connection that is accepted.
            is_secure: it speaks TLS; said in the URLs.
            named_by: the flag and the variable of the setting that has the address, for errors.
            given: sockets that listen already, and go on when this process ends; they are closed
                here, and their address is the one that counts.
        """
        self._given = list(given)
        self._scheme = "https" if is_secure else "http"
        self._named_by = named_by
        self._address = address
        self._send_buffer_bytes = send_buffer_bytes
        self._make_protocol = make_protocol
        self._loop = loop
        # Sockets that are bound and listen, and accept no connection yet; `open` empties the list.
        self._bound: list[socket.socket] = []
        self._servers: list[tuple[socket.socket, asyncio.Server]] = []
        self._is_closed = False

    @property
    def are_given(self) -> bool:
        """Whether the sockets are somebody else's, who keeps connections that wait in them."""
        return bool(self._given)

    @property
    def urls(self) -> list[str]:
        """URLs of the listening sockets, without a path."""
        return [_url_of(bound, self._scheme) for bound, _ in self._servers]

    @property
    def count(self) -> int:
        """Number of sockets, whether they accept connections yet or not."""
        return len(self._bound) + len(self._servers) + len(self._given)

    def is_beyond_loopback(self) -> bool:
        """Whether a socket listens on an address that other machines may reach."""
        return any(
            bound.family != socket.AF_UNIX
            and not ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback
            for bound, _ in self._servers
        )

    def is_listening(self) -> bool:
        """Whether every socket accepts connections.

        The loop closes a listener for good when accepting fails in a way that it did not foresee,
        and tells nobody. The kernel's own state shows that.
        """
        return bool(self._servers) and all(_accepts(bound) for bound, _ in self._servers)

    async def bind(self) -> None:
        """Take the address; clients that connect from here on wait until `open`.

        Raises:
            CannotStart: the address can't be listened on; no socket is left open.
        """
        if self._given:
            self._bound = self._copies_of_given()
        else:
            self._bound = await open_sockets(
                self._address, self._send_buffer_bytes, self._loop, self._named_by
            )
            self._pin_port(self._bound)
        for bound in self._bound:
            bound.listen(BACKLOG)

    async def open(self) -> None:
        """Accept connections, after `bind` where that was not called before.

        Raises:
            CannotStart: the address can't be listened on.
        """
        if not self._bound:
            await self.bind()
        sockets, self._bound = self._bound, []
        self._servers = [(bound, await self._serve(bound)) for bound in sockets]

    async def reopen_if_dead(self) -> bool:
        """Listen again if a socket has stopped listening; return whether one had.

        Raises:
            CannotStart: the address can't be listened on any more.
        """
        if self._is_closed or self.is_listening():
            return False
        address = "of systemd" if self._given else _text_of(self._address)
        log.error("listener died address=%s; opening it again", address)
        for _, server in self._servers:
            server.close()
        await self.open()
        if self._is_closed:
            # The daemon began to stop while the sockets were being opened.
            self.close()
        return True

    def close(self) -> None:
        """Close the sockets, and remove a Unix socket's file."""
        self._is_closed = True
        is_ours = bool(self._servers or self._bound) and not self._given
        for _, server in self._servers:
            server.close()
        for bound in self._bound:
            bound.close()
        for each in self._given:
            each.close()
        self._servers, self._bound = [], []
        if is_ours and isinstance(self._address, UnixAddress):
            _remove_socket(self._address.path)

    def _copies_of_given(self) -> list[socket.socket]:
        """Return descriptors of the given sockets, which stay here for a later opening.

        Raises:
            CannotStart: there is no descriptor left.
        """
        copies: list[socket.socket] = []
        try:
            copies.extend(each.dup() for each in self._given)
        except OSError as error:
            for copy in copies:
                copy.close()
            raise CannotStart(f"Can't listen on a socket of systemd: {_reason(error)}.") from error
        for copy in copies:
            copy.setblocking(False)
            _bound_send_buffer(copy, self._send_buffer_bytes)
        return copies

    def _pin_port(self, sockets: list[socket.socket]) -> None:
        """Keep the port that the kernel chose, for the next opening."""
        if isinstance(self._address, TcpAddress) and self._address.port == 0:
            self._address = TcpAddress(self._address.host, sockets[0].getsockname()[1])

    async def _serve(self, bound: socket.socket) -> asyncio.Server:
        if bound.family == socket.AF_UNIX:
            return await self._loop.create_unix_server(
                self._make_protocol, sock=bound, backlog=BACKLOG
            )
        return await self._loop.create_server(self._make_protocol, sock=bound, backlog=BACKLOG)


def _accepts(bound: socket.socket) -> bool:
    try:
        return bool(bound.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError:
        return False


async def open_sockets(
    address: TcpAddress | UnixAddress,
    send_buffer_bytes: int,
    loop: asyncio.AbstractEventLoop,
    named_by: str = "--address or ADDRESS",
) -> list[socket.socket]:
    """Return bound sockets for ``address`` that do not accept connections yet.

    Args:
        address: where to listen.
        send_buffer_bytes: SO_SNDBUF of accepted TCP connections, which inherit it; 0 keeps the
            kernel's default.
        loop: resolves a host's name in a thread.
        named_by: the flag and the variable of the setting that has the address.

    Raises:
        CannotStart: one line saying why not and what to do.
    """
    try:
        if isinstance(address, UnixAddress):
            return [_unix_socket(address.path)]
        sockets = await _tcp_sockets(address, loop)
    except OSError as error:
        refusal = NotAllowedHere if error.errno == errno.EACCES else CannotStart
        raise refusal(_why_not(address, error, named_by)) from error
    for each in sockets:
        _bound_send_buffer(each, send_buffer_bytes)
    return sockets


def _bound_send_buffer(listening: socket.socket, send_buffer_bytes: int) -> None:
    """Bound what the kernel buffers for each TCP connection that ``listening`` accepts.

    A kernel buffer hides a dead reader: at its default limit of 4 MiB the kernel swallowed ten
    times as many messages before the first sign of one, at no gain in throughput.
    """
    if send_buffer_bytes and listening.family != socket.AF_UNIX:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)


async def _tcp_sockets(address: TcpAddress, loop: asyncio.AbstractEventLoop) -> list[socket.socket]:
    if address.host is None:
        if socket.has_dualstack_ipv6():
            # One socket for both families, so that port 0 is the same port on both.
            return [
                socket.create_server(
                    ("::", address.port), family=socket.AF_INET6, dualstack_ipv6=True
                )
            ]
        return [socket.create_server(("0.0.0.0", address.port))]  # noqa: S104  # asked for
    infos = await loop.getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    seen = dict.fromkeys((family, sockaddr) for family, _, _, _, sockaddr in infos)
    opened: list[socket.socket] = []
    try:
        for family, sockaddr in seen:
            opened.append(socket.create_server(sockaddr, family=family))
    except OSError:
        for each in opened:
            each.close()
        raise
    return opened


def _unix_socket(path: str) -> socket.socket:
    _clear_stale_socket(path)
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        bound.bind(path)
    except OSError:
        bound.close()
        raise
    return bound


def _clear_stale_socket(path: str) -> None:
    """Remove a socket that a killed daemon left; raise for one that answers, or another file."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise OSError(errno.EEXIST, "a file that is no socket is in the way")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        # A socket whose backlog is full would block the loop.
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            log.debug("socket answers path=%s; its backlog is full", path)
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _remove_socket(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        log.debug("socket file is gone already path=%s", path)


def _why_not(address: TcpAddress | UnixAddress, error: OSError, named_by: str) -> str:
    advice = {
        errno.EADDRINUSE: f"stop what listens there, or choose another address ({named_by})",
        errno.EACCES: "choose a port above 1023, or run with the permission",
        errno.EADDRNOTAVAIL: f"choose an address of this machine ({named_by})",
    }.get(error.errno or 0, f"choose another address ({named_by})")
    return f"Can't listen on {_text_of(address)}: {_reason(error)}; {advice}."


def _reason(error: OSError) -> str:
    # socket.create_server adds the address to strerror, as a tuple; our sentence has the address
    # already.
    return (error.strerror or str(error)).partition(" (while")[0]


def _text_of(address: TcpAddress | UnixAddress) -> str:
    if isinstance(address, UnixAddress):
        return f"unix:{address.path}"
    host = address.host or ""
    return f"[{host}]:{address.port}" if ":" in host else f"{host}:{address.port}"


def _url_of(bound: socket.socket, scheme: str) -> str:
    if bound.family == socket.AF_UNIX:
        return f"unix:{bound.getsockname()}"
    host, port = bound.getsockname()[:2]
    if host in ("::", "0.0.0.0"):  # noqa: S104  # compared, not bound
        host = "localhost"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
