"""A daemon for users' own tests: in this process, on a free port, with faults on request.

With pytest: ``pytest_plugins = ["clevrd.testing"]`` in conftest.py, then the fixtures
``clevrd_daemon``, ``clevrd_server`` and ``clevrd_url``. Without pytest: `running_daemon` and
`daemon_in_thread`. How to use them: docs/testing.md.

PYTEST_DONT_REWRITE: a conftest.py may import this module before pytest registers it.
"""

from importlib.util import find_spec
from typing import NoReturn

from clevrd.testing.daemon import RunningDaemon, SlowReader, running_daemon
from clevrd.testing.threaded import DaemonThread, SlowReaderThread, daemon_in_thread

__all__ = [
    "DaemonThread",
    "RunningDaemon",
    "SlowReader",
    "SlowReaderThread",
    "daemon_in_thread",
    "running_daemon",
]

_FIXTURES = ("clevrd_daemon", "clevrd_server", "clevrd_settings", "clevrd_url")

if find_spec("pytest") is not None:
    from clevrd.testing.fixtures import (
        clevrd_daemon,
        clevrd_server,
        clevrd_settings,
        clevrd_url,
    )

    __all__ += ["clevrd_daemon", "clevrd_server", "clevrd_settings", "clevrd_url"]
else:

    def __getattr__(name: str) -> NoReturn:
        """Say why a fixture is not there."""
        if name in _FIXTURES:
            raise ImportError(
                f"{name} is a pytest fixture, and pytest is not installed; install it, or use"
                " running_daemon() or daemon_in_thread()."
            )
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
