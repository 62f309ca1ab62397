"""Node and the tools in tests/javascript, and projects that have the npm package. No daemon here.

`make node` installs the tools; without them the tests are skipped, and fail where CI=true.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
from daemons import ROOT

TOOLS: Final = ROOT / "tests" / "javascript"
PACKAGE: Final = ROOT / "clients" / "javascript"
MIN_NODE: Final = 20
# From this version on Node has a WebSocket without an option.
NODE_WITH_WEBSOCKET: Final = 22

# Sources of a WebSocket: the package ws, or Node itself.
KINDS: Final = ("ws", "native")

PRELUDE: Final = """
import { Clevrd, ClevrdError } from "clevrd";
import { WebSocket as OfPackage } from "ws";
const { kind, ...given } = JSON.parse(process.env.GIVEN);
const WebSocket = kind === "ws" ? OfPackage : globalThis.WebSocket;
const tell = (value) => console.log(JSON.stringify(value));
const said = (promise) => promise.then(() => null, (error) => `${error.name}: ${error.message}`);
const pause = (ms) => new Promise((done) => setTimeout(done, ms));
"""


def node_version() -> int:
    """Return Node's major version; without the tools skip the test, or fail it where CI=true."""
    reason = ""
    version = 0
    if not (shutil.which("node") and shutil.which("npm")):
        reason = "node or npm is not on PATH; on Debian: apt-get install nodejs npm"
    else:
        said = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True)
        version = int(said.stdout.strip().lstrip("v").split(".")[0])
        if version < MIN_NODE:
            reason = f"node is {version}, and the tests need {MIN_NODE}"
        elif not (TOOLS / "node_modules" / ".package-lock.json").exists():
            reason = f"the tools in {TOOLS} are not installed: make node"
    if not reason:
        return version
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Run a tool to its end and return its output; fail with the output when the tool fails."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "npm_config_cache": str(cwd / ".npm"), **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def packed(folder: Path) -> Path:
    """Return the npm package that `npm pack` makes of a copy of the committed files."""
    for name in ("clients/javascript", "clevrd/web"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("node_modules"))
    shutil.copy(ROOT / "LICENSE", folder)
    run("npm", "pack", cwd=folder / "clients" / "javascript")
    (found,) = (folder / "clients" / "javascript").glob("*.tgz")
    return found


def make_project(folder: Path) -> Path:
    """Return the folder of a project with the package installed and the tools beside it."""
    node_version()
    project = folder / "project"
    project.mkdir()
    (project / "package.json").write_text('{"private": true, "type": "module"}')
    tarball = packed(folder)
    run("npm", "install", "--offline", "--no-audit", "--no-fund", tarball, cwd=project)
    for tool in (TOOLS / "node_modules").iterdir():
        if not tool.name.startswith("."):
            (project / "node_modules" / tool.name).symlink_to(tool)
    return project


async def in_node(project: Path, script: str, kind: str = "ws", **arguments: Any) -> list[Any]:
    """Run a module in its own Node process, and return its output.

    The process has to end by itself without output on stderr: no timer and no socket is left, no
    rejection is unhandled, and Node warns of no listener leak.
    """
    options = [] if node_version() >= NODE_WITH_WEBSOCKET else ["--experimental-websocket"]
    process = await asyncio.create_subprocess_exec(
        *("node", *options, "--input-type=module", "-"),
        cwd=project,
        env={**os.environ, "GIVEN": json.dumps({"kind": kind, **arguments})},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        # Less than pytest's own timeout, which would leave the process running.
        async with asyncio.timeout(25):
            out, err = await process.communicate((PRELUDE + script).encode())
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert (process.returncode, err.decode()) == (0, "")
    return [json.loads(line) for line in out.decode().splitlines()]


def blocks_of(language: str) -> list[str]:
    """Return the blocks of docs/javascript.md that are in ``language``."""
    text = (ROOT / "docs" / "javascript.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
