"""The daemon as a whole: it is built of its parts, it serves, and it ends in order."""

from clevrd.server.server import Server
from clevrd.server.setup import Setup

__all__ = ["Server", "Setup"]
