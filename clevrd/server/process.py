"""The process of a daemon: it builds a server, serves until a signal, and tells systemd of it.

The life of the server itself is in `server/server`; the signals are in `daemon_signals`.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import uvloop
from aiohttp import http_parser

from clevrd import logs
from clevrd.config import Loaded
from clevrd.daemon_signals import EXIT_FORCED, DaemonSignals, exit_at_once
from clevrd.descriptors import raise_limit
from clevrd.errors import CannotStart, ConfigError
from clevrd.scheduling.timers import Timers
from clevrd.server.collector import collect_rarely, leave_out_what_is_there
from clevrd.server.greeting import greet, warn_of_drain
from clevrd.server.planned_restart import SAVE_GRACE_S
from clevrd.server.reload import reloading_of
from clevrd.server.server import Server
from clevrd.server.setup import setup_of
from clevrd.service.given_sockets import GivenSockets, given_sockets
from clevrd.service.manager import STATUS_EVERY_S, ServiceManager
from clevrd.tenants.from_settings import access_of
from clevrd.tenants.settings import Access
from clevrd.tls import tls_of

log = logging.getLogger(__name__)

# The time that systemd is asked to wait for a stop, beyond the one that the daemon takes at most,
# and for a stop of a daemon that has not served yet.
_STOP_BEYOND_S: Final = 5.0
_STOP_BEFORE_SERVING_S: Final = 5.0


def run(loaded: Loaded, load: Callable[[], Loaded]) -> int:
    """Run the daemon until a signal ends it; return the exit code.

    Args:
        loaded: the configuration.
        load: returns the configuration as it is at a SIGHUP.

    Raises:
        ConfigError: the configuration is wrong.
        CannotStart: the address can't be listened on, or aiohttp lacks its C parser.
    """
    # The descriptors that are handed over are looked at before others are opened.
    given = given_sockets(os.environ, os.getpid())
    access = access_of(loaded)
    logs.log_what_python_says()
    faulthandler.enable()
    _check_parser()
    raise_limit()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve_and_tell(loaded, access, load, given))


def _check_parser() -> None:
    """Refuse to run on aiohttp's Python parser: slower, and laxer about what is HTTP."""
    if http_parser.HttpRequestParser is http_parser.HttpRequestParserPy:
        raise CannotStart(
            "aiohttp's C parser is missing; install aiohttp from a wheel, without"
            " AIOHTTP_NO_EXTENSIONS."
        )


async def _serve_and_tell(
    loaded: Loaded, access: Access, load: Callable[[], Loaded], given: GivenSockets
) -> int:
    """Serve until a signal, and tell systemd about it, also why the daemon can't."""
    service = ServiceManager.from_environ(os.environ, os.getpid(), asyncio.get_running_loop())
    try:
        return await _serve(loaded, access, load, given, service)
    except (CannotStart, ConfigError) as error:
        service.status(str(error))
        raise
    finally:
        service.close()


async def _serve(
    loaded: Loaded,
    access: Access,
    load: Callable[[], Loaded],
    given: GivenSockets,
    service: ServiceManager,
) -> int:
    """Build the server, start it, serve until a signal, and stop it."""
    loop = asyncio.get_running_loop()
    # Without a file there is nothing to read again, and SIGHUP stops the daemon.
    signals = DaemonSignals(loop, reloads=bool(loaded.path) or tls_of(loaded).is_on)
    signals.install()
    server = Server(setup_of(loaded, access, os.environ, given))
    reloading = reloading_of(server, loaded, load, service)
    loop.set_exception_handler(server.on_loop_error)
    # The thresholds are set before `prepare`: with CPython's own, 100,000 restored topics would be
    # scanned again and again.
    collect_rarely()
    if await _start(server, signals.stopping, service):
        leave_out_what_is_there()
        greet(server, is_open=access.auth.mode == "open")
        if loaded.sources.get("drain_s") != "default":
            warn_of_drain(server.config)
        signals.on_reload = reloading.begin
        with _telling_status(server, service):
            await signals.stopping.wait()
        await _stop(server, service)
    signals.finish(0)
    return 0


async def _start(server: Server, stopping: asyncio.Event, service: ServiceManager) -> bool:
    """Start the server; return False where a signal stops it before it serves."""
    with service.extending("Starting: what was saved is read."):
        is_prepared = await _unless(stopping, server.prepare())
        if is_prepared:
            await server.serve()
    if not is_prepared:
        service.stopping(_STOP_BEFORE_SERVING_S)
        server.abandon()
        log.info("stopped before it served; what was saved is as it was")
    return is_prepared


async def _unless(stopping: asyncio.Event, preparing: Coroutine[Any, Any, None]) -> bool:
    """Run ``preparing`` until it ends or ``stopping`` is set; return whether to go on."""
    task = asyncio.ensure_future(preparing)
    told = asyncio.ensure_future(stopping.wait())
    try:
        await asyncio.wait({task, told}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        told.cancel()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    return not stopping.is_set()


@contextmanager
def _telling_status(server: Server, service: ServiceManager) -> Iterator[None]:
    """Say that the daemon is ready, and then now and then what it does."""
    service.ready(server.sentence())
    timers = Timers(asyncio.get_running_loop(), server.hub.counters.count_background_error)
    if service.is_told:
        timers.every(STATUS_EVERY_S, lambda: service.status(server.sentence()))
    try:
        yield
    finally:
        timers.stop()


async def _stop(server: Server, service: ServiceManager) -> None:
    """Stop the server; end the process at once where a part of it can't be ended."""
    within_s = server.config.shutdown_timeout_s + SAVE_GRACE_S + _STOP_BEYOND_S
    service.stopping(within_s)
    with service.extending("Stopping: readers are sent away, topics are saved.", within_s):
        await server.stop()
    if server.is_cut_short:
        # A thread that hangs would hold the interpreter's own end up as well.
        exit_at_once(EXIT_FORCED)
    log.info("stopped")
