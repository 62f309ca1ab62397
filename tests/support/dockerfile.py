"""Reads instructions of the Dockerfile."""

from __future__ import annotations

import json
import sys
from pathlib import Path

DOCKERFILE = Path(__file__).parents[2] / "Dockerfile"


def dockerfile_instruction(name: str) -> str:
    """Return the arguments of the image's own (last) instruction ``name``, as one line."""
    lines = DOCKERFILE.read_text().replace("\\\n", "").splitlines()
    return [line for line in lines if line.startswith(f"{name} ")][-1].removeprefix(f"{name} ")


def health_check() -> list[str]:
    """Return the image's health check as a command for this Python."""
    command = json.loads(dockerfile_instruction("HEALTHCHECK").partition("CMD ")[2])
    assert command[0] == "clevrd"
    return [sys.executable, "-m", *command]
