"""Listening sockets that systemd has opened and hands over, so that a restart refuses nobody.

They are descriptors from 3 on, and variables of the environment say how many (sd_listen_fds(3)).
A variable that is wrong has a line in the log, and the daemon opens its own sockets.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from clevrd.service.variables import whole_number

log = logging.getLogger(__name__)

# The first descriptor that is handed over (SD_LISTEN_FDS_START).
FIRST_FD: Final = 3
# More sockets than this are no setup of a daemon with two addresses.
MAX_SOCKETS: Final = 64
# The name of a socket for operators in its unit (FileDescriptorName=); each other name is that of a
# socket for clients.
ADMIN_NAME: Final = "admin"


class GivenSockets(NamedTuple):
    """Sockets that listen already, by whom they are for."""

    clients: Sequence[socket.socket] = ()
    operators: Sequence[socket.socket] = ()


def given_sockets(environ: Mapping[str, str], pid: int) -> GivenSockets:
    """Return the listening sockets that systemd hands over to the process ``pid``.

    A descriptor that is no listening socket is left out, with a line in the log.
    """
    text = environ.get("LISTEN_FDS", "")
    if not text:
        return GivenSockets()
    if environ.get("LISTEN_PID", "") != str(pid):
        log.warning(
            "sockets not taken: LISTEN_PID names another process value=%.100r pid=%d",
            environ.get("LISTEN_PID", ""),
            pid,
        )
        return GivenSockets()
    count = whole_number(text)
    if count is None or count > MAX_SOCKETS:
        log.warning(
            "sockets not taken: LISTEN_FDS is no whole number up to %d value=%.100r",
            MAX_SOCKETS,
            text,
        )
        return GivenSockets()
    names = _names(environ, count)
    clients: list[socket.socket] = []
    operators: list[socket.socket] = []
    for descriptor, name in enumerate(names, start=FIRST_FD):
        given = _listening(descriptor)
        if given is not None:
            (operators if name == ADMIN_NAME else clients).append(given)
    return GivenSockets(clients, operators)


def _names(environ: Mapping[str, str], count: int) -> list[str]:
    """Return a name for each socket; where the names don't fit, all are for clients."""
    text = environ.get("LISTEN_FDNAMES")
    names = [] if text is None else text.split(":")
    if len(names) == count:
        return names
    if text is not None and count:
        log.warning(
            "LISTEN_FDNAMES does not fit LISTEN_FDS, all sockets are for clients names=%d fds=%d",
            len(names),
            count,
        )
    return [""] * count


def _listening(descriptor: int) -> socket.socket | None:
    """Return the socket that listens at ``descriptor``; log why there is none."""
    try:
        given = socket.socket(fileno=descriptor)
    except OSError as error:
        log.warning(
            "socket not taken fd=%d reason=%s", descriptor, error.strerror or "it is no socket"
        )
        return None
    try:
        is_stream = given.type == socket.SOCK_STREAM
        is_known = given.family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
        listens = bool(given.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError as error:
        is_stream, is_known, listens = False, False, False
        log.debug("socket can't be asked fd=%d reason=%s", descriptor, error.strerror)
    if is_stream and is_known and listens:
        given.set_inheritable(False)
        return given
    # The descriptor may be anything of the process's own, so it is left open as it was.
    given.detach()
    log.warning(
        "socket not taken fd=%d reason=%s", descriptor, "it is no TCP or Unix socket that listens"
    )
    return None
