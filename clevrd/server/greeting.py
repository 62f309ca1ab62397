"""The first lines of a daemon that serves: where it is reached, and the settings to watch."""

from __future__ import annotations

import logging
import os
import sys

from clevrd import __version__, logs
from clevrd.config import Config
from clevrd.server.server import Server
from clevrd.server.stop import CLOSE_ALL_TIMEOUT_S

log = logging.getLogger(__name__)


def greet(server: Server, *, is_open: bool) -> None:
    """Log the addresses, commands to try on a terminal, and who reaches what.

    Args:
        is_open: no client is asked for a credential.
    """
    has_terminal = os.isatty(logs.STDERR)
    _tell_addresses(server)
    if has_terminal:
        _show_commands(server)
    _tell_admin_addresses(server)
    reached = [*server.admin_addresses, *server.addresses]
    urls = [each for each in reached if not each.startswith("unix:")]
    if has_terminal and urls:
        log.info("try look:       curl %s/metrics", urls[0])
    if is_open:
        _tell_it_is_open(server)


def warn_of_drain(config: Config) -> None:
    """Say that a drain which was asked for does not fit into the time of a stop."""
    fits_s = max(0.0, config.shutdown_timeout_s - CLOSE_ALL_TIMEOUT_S)
    if config.drain_s > fits_s:
        log.warning(
            "drain_s is more than fits into shutdown_timeout_s wanted=%g taken=%g hint=%r",
            config.drain_s,
            fits_s,
            f"raise shutdown_timeout_s to {config.drain_s + CLOSE_ALL_TIMEOUT_S:g} or more",
        )


def _tell_addresses(server: Server) -> None:
    for url in server.addresses:
        log.info("listening version=%s address=%s pid=%d", __version__, url, os.getpid())
    if server.are_sockets_given:
        log.info("sockets are from systemd; the setting address does not count")


def _show_commands(server: Server) -> None:
    url = server.addresses[0]
    command = _own_command()
    log.info("try subscribe:  %s subscribe demo --url %s", command, url)
    log.info("try publish:    %s publish demo '{\"hello\":1}' --url %s", command, url)


def _own_command() -> str:
    """Return the command that started this program, for examples that can be copied."""
    name = sys.argv[0]
    return name if os.path.basename(name) == "clevrd" else f"{sys.executable} -m clevrd"


def _tell_admin_addresses(server: Server) -> None:
    for url in server.admin_addresses:
        log.info("for operators address=%s", url)
    if server.is_operated_from_afar():
        log.warning(
            "admin_address is reached from other machines: everyone who reaches it sees all tenants"
            " hint=%r",
            "keep it on a private network",
        )


def _tell_it_is_open(server: Server) -> None:
    if server.is_reached_from_afar():
        log.warning(
            "open: everyone who reaches the address may publish and subscribe as any tenant"
            " hint=%r",
            'set mode = "required" in [auth], or listen on 127.0.0.1',
        )
    else:
        log.info("open: every program of this machine may publish and subscribe as any tenant")
