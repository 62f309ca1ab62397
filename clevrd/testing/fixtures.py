"""The pytest fixtures. Imported only where pytest is installed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from importlib.util import find_spec
from typing import Any, TypeVar, cast

import pytest

from clevrd.testing.daemon import RunningDaemon, running_daemon
from clevrd.testing.threaded import DaemonThread, daemon_in_thread

FixtureT = TypeVar("FixtureT", bound=Callable[..., Any])


def _async_fixture(function: FixtureT) -> FixtureT:
    """Make an async fixture: pytest-asyncio's where that is installed, else pytest's own.

    pytest-asyncio's strict mode takes only its own fixtures; anyio's plugin takes pytest's.
    """
    if find_spec("pytest_asyncio") is None:
        return cast(FixtureT, pytest.fixture(function))
    import pytest_asyncio

    return cast(FixtureT, pytest_asyncio.fixture(function))


@pytest.fixture
def clevrd_settings() -> dict[str, Any]:
    """Settings for the daemons of the other fixtures; define your own fixture to change them."""
    return {}


@_async_fixture
async def clevrd_daemon(clevrd_settings: dict[str, Any]) -> AsyncIterator[RunningDaemon]:
    """A daemon of the test's own, in the test's event loop, with faults on request."""
    async with running_daemon(**clevrd_settings) as daemon:
        yield daemon


@pytest.fixture
def clevrd_server(clevrd_settings: dict[str, Any]) -> Iterator[DaemonThread]:
    """A daemon of the test's own, in a thread, for tests without asyncio."""
    with daemon_in_thread(**clevrd_settings) as daemon:
        yield daemon


@pytest.fixture
def clevrd_url(clevrd_server: DaemonThread) -> str:
    """The URL of `clevrd_server`, for any HTTP or WebSocket client."""
    return clevrd_server.url
