"""Listening: clear refusals, stale sockets, and a listener that dies is opened again."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest
from daemons import running

from clevrd.addresses import TcpAddress, UnixAddress
from clevrd.errors import CannotStart
from clevrd.listeners import Listeners, open_sockets


async def test_listener_that_died_is_opened_on_the_same_port() -> None:
    """A loop closes a listener silently when accept fails oddly; clients must not notice long."""
    async with running() as daemon:
        listeners = daemon.listener.listeners
        bound, _ = listeners._servers[0]
        bound.shutdown(socket.SHUT_RDWR)  # what a failing accept leaves behind

        assert not daemon.server.parts.is_ready()
        reopened = await listeners.reopen_if_dead()

        assert reopened
        assert daemon.server.parts.is_ready()
        assert (await daemon.get_json("/health"))["status"] == "healthy"


async def test_host_is_looked_up_beside_everything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow name server holds no loop: not at the start, and not when a listener is reopened."""

    def blocking(*_: object, **__: object) -> None:
        raise AssertionError("looked up on the loop")

    monkeypatch.setattr(socket, "getaddrinfo", blocking)
    loop = asyncio.get_running_loop()
    listeners = Listeners(TcpAddress("localhost", 0), 0, asyncio.Protocol, loop)

    await listeners.open()

    assert listeners.is_listening()
    listeners.close()


async def test_bound_address_is_nobody_elses_until_it_is_served() -> None:
    """Between taking the address and serving it, nobody else can have it, and closing lets go."""
    loop = asyncio.get_running_loop()
    listeners = Listeners(TcpAddress("127.0.0.1", 0), 0, asyncio.Protocol, loop)
    await listeners.bind()
    address = listeners._address

    with pytest.raises(CannotStart):
        await Listeners(address, 0, asyncio.Protocol, loop).bind()
    assert isinstance(address, TcpAddress)
    # Who connects meanwhile waits.
    socket.create_connection(("127.0.0.1", address.port), timeout=2).close()
    listeners.close()

    other = Listeners(address, 0, asyncio.Protocol, loop)
    await other.open()
    assert other.is_listening()
    other.close()


async def test_healthy_listener_is_left_alone() -> None:
    """The watch opens nothing while all is well."""
    async with running() as daemon:
        assert not await daemon.listener.listeners.reopen_if_dead()


async def test_closed_listeners_stay_closed() -> None:
    """Shutting down is not dying."""
    loop = asyncio.get_running_loop()
    listeners = Listeners(TcpAddress("127.0.0.1", 0), 0, asyncio.Protocol, loop)
    await listeners.open()

    listeners.close()

    assert not await listeners.reopen_if_dead()


async def test_port_in_use_is_one_clear_line() -> None:
    """The sentence names the address and what to do."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        with pytest.raises(CannotStart, match=rf"127\.0\.0\.1:{port}.*choose another"):
            await open_sockets(TcpAddress("127.0.0.1", port), 0, asyncio.get_running_loop())


async def test_all_interfaces_share_one_port() -> None:
    """Port 0 means one port, for IPv4 and IPv6 alike."""
    (bound,) = await open_sockets(TcpAddress(None, 0), 0, asyncio.get_running_loop())
    with bound:
        bound.listen()
        port = bound.getsockname()[1]

        with socket.create_connection(("127.0.0.1", port), timeout=2) as client:
            assert client.getpeername()[1] == port


async def test_send_buffer_is_inherited_by_accepted_connections() -> None:
    """SO_SNDBUF is set once, on the listener (the kernel doubles what it is given)."""
    (bound,) = await open_sockets(TcpAddress("127.0.0.1", 0), 40_000, asyncio.get_running_loop())
    with bound:
        bound.listen()
        with socket.create_connection(bound.getsockname(), timeout=2):
            accepted, _ = bound.accept()
            with accepted:
                assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 80_000


async def test_stale_unix_socket_is_replaced(tmp_path: Path) -> None:
    """A killed daemon leaves its file; the next one must start all the same."""
    path = str(tmp_path / "clevrd.sock")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)

    (bound,) = await open_sockets(UnixAddress(path), 0, asyncio.get_running_loop())

    with bound:
        assert bound.getsockname() == path


async def test_unix_socket_in_use_is_left_alone(tmp_path: Path) -> None:
    """Two daemons don't take each other's socket away."""
    path = str(tmp_path / "clevrd.sock")
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        other.listen()

        with pytest.raises(CannotStart, match="in use"):
            await open_sockets(UnixAddress(path), 0, asyncio.get_running_loop())


async def test_unix_socket_with_a_full_backlog_is_in_use(tmp_path: Path) -> None:
    """Its daemon is busy, not dead; asking must not wait for it."""
    path = str(tmp_path / "clevrd.sock")
    with socket.socket(socket.AF_UNIX) as other, socket.socket(socket.AF_UNIX) as waiting:
        other.bind(path)
        other.listen(0)
        waiting.connect(path)

        with pytest.raises(CannotStart, match="in use"):
            await open_sockets(UnixAddress(path), 0, asyncio.get_running_loop())


async def test_other_file_at_the_unix_path_is_not_removed(tmp_path: Path) -> None:
    """A wrong path must not cost anybody a file."""
    path = tmp_path / "precious"
    path.write_text("data")

    with pytest.raises(CannotStart, match="no socket"):
        await open_sockets(UnixAddress(str(path)), 0, asyncio.get_running_loop())

    assert path.read_text() == "data"


async def test_listeners_that_took_nothing_remove_nothing(tmp_path: Path) -> None:
    """Given up before its turn, a second daemon leaves the first one's socket alone."""
    path = tmp_path / "clevrd.sock"
    loop = asyncio.get_running_loop()
    first = Listeners(UnixAddress(str(path)), 0, asyncio.Protocol, loop)
    await first.open()
    second = Listeners(UnixAddress(str(path)), 0, asyncio.Protocol, loop)

    second.close()

    assert first.is_listening()
    assert path.exists()
    first.close()
    assert not path.exists()
