"""Versions of the libraries that engines are made with: one that is too old is told in a line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import metadata
from typing import Final

from clevrd.errors import ConfigError

# The parts of a version that count; what is behind them (`rc1`, `.post2`) does not.
_NUMBERS: Final = re.compile(r"\d+(\.\d+)*")

# Each extra's packages, and the oldest versions that they may have, as pyproject.toml says them.
LEAST: Final[Mapping[str, Mapping[str, str]]] = {
    "kafka": {"confluent-kafka": "2.16"},
    "nats": {"nats-py": "2.16", "nkeys": "0.2.1"},
    "redis": {"redis": "8", "hiredis": "3.2"},
}


def refuse_older(extra: str) -> None:
    """Look whether the packages of an extra, as far as they are installed, are new enough.

    Raises:
        ConfigError: one is too old; the sentence says what to do.
    """
    for package, least in LEAST[extra].items():
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            # The package is missing, which its import tells, or it is there and does not tell its
            # version.
            continue
        if _numbers(version) < _numbers(least):
            raise ConfigError(
                f"The Python package {package} is {version}, and clevrd needs {least} or newer;"
                f' update it: pip install --upgrade "clevrd[{extra}]".'
            )


def _numbers(version: str) -> tuple[int, ...]:
    found = _NUMBERS.match(version)
    return tuple(map(int, found[0].split("."))) if found is not None else ()
