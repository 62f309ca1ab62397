"""The npm package: what is in it, its types, and an application that is built with it.

What the module does: test_javascript_client and test_javascript_node.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from browsers import chromium, page_at, until_page
from daemons import ROOT, running, until
from nodes import PACKAGE, TOOLS, blocks_of, in_node, make_project, run

import clevrd

WEB = ROOT / "clevrd" / "web"
VITE = TOOLS / "node_modules" / "vite" / "bin" / "vite.js"
TSC = TOOLS / "node_modules" / "typescript" / "bin" / "tsc"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the package in node_modules."""
    return make_project(tmp_path_factory.mktemp("package"))


def test_package_has_the_daemons_files_and_nothing_else(project: Path) -> None:
    """There is one source, clevrd/web; packing leaves no second copy behind."""
    (tarball,) = project.parent.glob("clients/javascript/*.tgz")
    with tarfile.open(tarball) as opened:
        names = {name.removeprefix("package/") for name in opened.getnames()}
    left = {path.name for path in (project.parent / "clients" / "javascript").iterdir()}
    installed = project / "node_modules" / "clevrd"

    assert names == {"LICENSE", "README.md", "package.json", "clevrd.js", "clevrd.d.ts"}
    assert left - {".npm"} == {"README.md", "package.json", tarball.name}
    for name in ("clevrd.js", "clevrd.d.ts"):
        assert (installed / name).read_bytes() == (WEB / name).read_bytes()


def test_package_has_the_daemons_version_and_license() -> None:
    """They are released together."""
    package = json.loads((PACKAGE / "package.json").read_text())

    assert package["version"] == clevrd.__version__
    assert package["license"] == "MIT"
    assert "dependencies" not in package


def test_tools_are_pinned_to_no_mirror() -> None:
    """The lock names versions and checksums, and leaves where they come from to npm."""
    lock = json.loads((TOOLS / "package-lock.json").read_text())
    packages = [each for name, each in lock["packages"].items() if name]

    assert all(each["integrity"] for each in packages)
    assert not [each for each in packages if "resolved" in each]


def test_file_is_read_by_bundlers_that_know_no_import_meta(project: Path) -> None:
    """React Native's, say: they make a script of it, in which import.meta is a syntax error."""
    script = project / "as_script.mjs"
    script.write_text(
        "import { readFileSync } from 'node:fs'; import { Script } from 'node:vm';\n"
        "const text = readFileSync('node_modules/clevrd/clevrd.js', 'utf8');\n"
        "const make = (text) => new Script(text.replace(/^export /gm, ''));\n"
        "make(text);\n"
        "try { make(text + 'home = import.meta.url;'); }\n"
        "catch (error) { console.log(error.name); }\n"
    )

    assert run("node", script, cwd=project) == "SyntaxError\n"


@pytest.mark.parametrize("resolution", ["bundler", "nodenext"])
def test_types_are_exact(project: Path, resolution: str) -> None:
    """The compiler takes what is right, and refuses each line that says so of itself."""
    shutil.copy(TOOLS / "types.ts", project)
    module = "esnext" if resolution == "bundler" else resolution
    options = ["--strict", "--noEmit", "--exactOptionalPropertyTypes", "--target", "es2022"]
    libraries = ["--lib", "es2022,dom,esnext.disposable", "--types", "ws"]
    where = ["--module", module, "--moduleResolution", resolution]

    run("node", TSC, *options, *libraries, *where, "types.ts", cwd=project)


def test_types_name_what_the_module_has(project: Path) -> None:
    """A class, or a method, that is in one of the two is in the other."""
    script = project / "names.mjs"
    script.write_text(
        "import * as all from 'clevrd';\n"
        "const [, ...own] = Object.getOwnPropertyNames(all.Clevrd.prototype);\n"
        "console.log([...Object.keys(all), ...own].join(' '));\n"
    )
    names = set(run("node", script, cwd=project).split())
    types = (WEB / "clevrd.d.ts").read_text()
    classes = set(re.findall(r"^export class (\w+)", types, re.MULTILINE))
    of_client = types[types.index("export class Clevrd {") :]
    methods = set(re.findall(r"^\t(\w+)[<(]", of_client, re.MULTILINE)) - {"constructor"}

    assert names == classes | methods


async def test_example_of_the_package_works(project: Path) -> None:
    """What its README shows, over the package ws."""
    blocks = re.findall(r"^```js\n(.*?)^```", (PACKAGE / "README.md").read_text(), re.M | re.S)
    async with running() as daemon:
        script = blocks[0].replace("http://127.0.0.1:8080", daemon.url)
        # Which the prelude has, from the same package.
        script = script.replace('import { Clevrd } from "clevrd";', "")
        script = script.replace(f'"{daemon.url}"', f'"{daemon.url}", {{ WebSocket }}')
        script = script.replace("console.log(event.data);", "{ tell(event.data); break; }")
        told = await in_node(project, script)

    assert told == [{"id": 1}]


async def test_node_example_works(project: Path) -> None:
    """The lines of docs/javascript.md for Node, as they stand but for the daemon's address."""
    (example,) = [block for block in blocks_of("js") if 'from "ws"' in block]
    async with running() as daemon:
        await daemon.publish("demo", {"n": 1}, **{"X-Tenant-ID": "acme"})
        script = project / "example.mjs"
        code = example.replace("http://localhost:8080", daemon.url)
        script.write_text(
            code.replace("console.log(event);", "{ console.log(event.data); break; }")
        )
        printed = await asyncio.to_thread(run, "node", script, cwd=project)

    assert printed == "{ n: 1 }\n"


@asynccontextmanager
async def previewing(folder: Path, daemon_url: str) -> AsyncIterator[str]:
    """Serve what was built in ``folder``, the daemon under /events; return the page's address."""
    process = await asyncio.create_subprocess_exec(
        *("node", VITE, "preview"),
        cwd=folder,
        env={**os.environ, "DAEMON": daemon_url, "NO_COLOR": "1"},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(20):
            while not (
                found := re.search(rb"http://[\d.:]+/", line := await process.stdout.readline())
            ):
                assert line, "the preview has ended"
        yield found[0].decode()
    finally:
        process.terminate()
        await process.wait()


@pytest.mark.long
@pytest.mark.timeout(90)
async def test_application_with_the_package_works(project: Path) -> None:
    """Built by Vite, in Chromium: strict mode mounts twice, and one subscription is left."""
    app = project / "app"
    shutil.copytree(TOOLS / "app", app)
    (hook,) = [block for block in blocks_of("js") if "useEffect" in block]
    (app / "hook.js").write_text(hook)
    build = ("node", VITE, "build", "--mode", "development")
    # Only the development build of React mounts twice.
    await asyncio.to_thread(run, *build, cwd=app, NODE_ENV="development")

    async with (
        running() as daemon,
        previewing(app, daemon.url) as url,
        chromium() as browser,
        page_at(browser, url, "") as page,
    ):
        # Of the page as it was opened, which is not counted.
        await until(lambda: daemon.hub.subscribers == 1)
        handshakes: list[str] = []
        page.on("websocket", lambda socket: handshakes.append(socket.url))
        await page.reload()
        await until(lambda: daemon.hub.subscribers == 1)
        await page.click("#publish")
        await until_page(
            page, """document.querySelector("#orders").textContent === '{"by":"the page"}'"""
        )
        await daemon.publish("orders", 2)
        await until_page(page, """document.querySelector("#orders").children.length === 2""")
        assert len(handshakes) == 1, "strict mode's first mount opens nothing"

        await daemon.publish("prices", 3)
        await page.click("#other")
        await until_page(page, """document.querySelector("#prices")?.textContent === '3'""")
        await until(lambda: daemon.hub.subscribers == 1)

        await page.click("#none")
        await until(lambda: daemon.hub.subscribers == 0)
