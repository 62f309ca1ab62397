"""Builds the container image and tries it out: `make image-test`, as root on Debian 12.

No container engine and no registry take part. buildah builds on a stand-in for the base image, made
of debootstrap's Debian and a CPython 3.12 of this machine (--python, or python3.12 on PATH). The
image is run as its own configuration says, in its own namespaces, with a read-only root and without
capabilities. The real base image and an engine's own behaviour are not tested.

    apt-get install --no-install-recommends buildah debootstrap
    make image-test ARGS="--python /usr/local/bin/python3.12"
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clevrd.cli.completion import SHELLS

ROOT = Path(__file__).parents[2]
DEBIAN = "bookworm"
# Debian packages that the official image has beside its Python.
PACKAGES = (
    *("ca-certificates", "netbase", "tzdata", "libbz2-1.0", "libexpat1", "libffi8", "liblzma5"),
    *("libncursesw6", "libreadline8", "libsqlite3-0", "libssl3", "libuuid1", "zlib1g"),
    *("libgdbm6", "libdb5.3", "libnsl2", "libcrypt1"),
)
# Files that must not reach the build, and files that must.
STRAYS = (".env", "cli/old.py.orig", "core/fast.so", "web/draft.html", "__pycache__/x.pyc", "notes")
START_S = 20.0


def run(*command: str | Path, **options: Any) -> str:
    """Run a command, end unless it succeeds, and return its output."""
    options = {"check": True, "text": True, "stdout": subprocess.PIPE, **options}
    done = subprocess.run([str(word) for word in command], **options)
    return str(done.stdout).strip()


def claim(holds: bool, text: str) -> None:
    """Print ``text`` and whether it holds; end the program if it does not."""
    print(f"{'ok  ' if holds else 'FAIL'} {text}", flush=True)
    if not holds:
        sys.exit(1)


class Builder:
    """Runs buildah with storage of its own."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self._environ = {**os.environ, "BUILDAH_ISOLATION": "chroot"}

    def __call__(self, *words: str | Path) -> str:
        """Run a buildah command and return its output."""
        where = ("--root", self._work / "storage", "--runroot", self._work / "run")
        command = ["buildah", *where, "--storage-driver", "vfs", *words]
        done = subprocess.run(
            [str(word) for word in command], env=self._environ, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"{done.stdout}{done.stderr}")
        return done.stdout.strip()


# --- the base ------------------------------------------------------------------------------------


def make_base(root: Path, python: str, packages: str) -> None:
    """Put a Debian with a CPython in /usr/local into ``root``, like the official image."""
    if (root / "complete").exists():
        return
    shutil.rmtree(root, ignore_errors=True)
    run("debootstrap", "--variant=minbase", f"--include={packages}", DEBIAN, root)
    prefix = Path(run(python, "-c", "import sys; print(sys.base_prefix)"))
    local = root / "usr" / "local"
    ignored = shutil.ignore_patterns("__pycache__", "test", "tests", "idlelib", "*.a")
    for name in ("bin", "lib", "include"):
        shutil.copytree(
            prefix / name, local / name, symlinks=True, dirs_exist_ok=True, ignore=ignored
        )
    for package in (local / "lib" / "python3.12" / "site-packages").iterdir():
        if not package.name.startswith("pip"):
            shutil.rmtree(package) if package.is_dir() else package.unlink()
    for script in (local / "bin").iterdir():
        if script.is_file() and script.read_bytes()[:2] == b"#!":
            rest = script.read_bytes().partition(b"\n")[2]
            script.write_bytes(b"#!/usr/local/bin/python3.12\n" + rest)
    run("chroot", root, "ldconfig")
    (root / "complete").touch()


def commit_base(buildah: Builder, root: Path, name: str) -> None:
    """Make a base image of ``root`` with the name in the Dockerfile."""
    container = buildah("from", "scratch")
    buildah("add", container, root, "/")
    path = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
    buildah("config", "--env", f"PATH={path}", "--cmd", "python3", container)
    buildah("commit", "--rm", "--format", "docker", container, name)


# --- the build -----------------------------------------------------------------------------------


def copy_context(to: Path) -> None:
    """Copy the files that git knows, and files that must not get in."""
    shutil.rmtree(to, ignore_errors=True)
    names = run("git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard")
    for name in names.splitlines():
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    for name in STRAYS:
        (to / "clevrd" / name).parent.mkdir(parents=True, exist_ok=True)
        (to / "clevrd" / name).write_text("stray")


def sent_files(buildah: Builder, context: Path, work: Path) -> set[str]:
    """Return the files of the context that a build gets."""
    recipe = work / "Context"
    recipe.write_text("FROM scratch\nCOPY . /\n")
    ignore = context / ".dockerignore"
    flags = ("--format", "docker", "--layers=false", "--ignorefile", ignore)
    buildah("build", *flags, "-f", recipe, "-t", "context", context)
    container = buildah("from", "context")
    root = Path(buildah("mount", container))
    names = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    buildah("rm", container)
    return names


def check_context(buildah: Builder, context: Path, work: Path) -> None:
    """Fail unless the build gets exactly the files that the wheel is made of."""
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "clevrd").rglob("*.py")}
    web = {f"clevrd/web/{name}" for name in os.listdir(ROOT / "clevrd" / "web")} - {
        "clevrd/web/__pycache__"
    }
    files = {"pyproject.toml", "setup.py", "README.md", "LICENSE", "requirements.lock"}
    files |= {"requirements-build.lock"}
    files |= {"clevrd/py.typed", *(f"clevrd/cli/completions/clevrd.{shell}" for shell in SHELLS)}

    sent = sent_files(buildah, context, work)

    wrong = sent ^ (modules | web | files)
    claim(not wrong, f"the build is given {len(sent)} files and no stray one {sorted(wrong)[:5]}")


# --- the container -------------------------------------------------------------------------------


class Image:
    """The image: its files and its configuration."""

    def __init__(self, root: Path, config: dict[str, Any]) -> None:
        self.root = root
        self.config = config
        self.environ = dict(pair.split("=", 1) for pair in config["Env"])
        self.user = config["User"].split(":")[0]

    def command(self, words: Sequence[str], **variables: str) -> list[str]:
        """Return the command that runs ``words`` in the image, as its user."""
        environ = [f"{name}={text}" for name, text in {**self.environ, **variables}.items()]
        path = self.environ["PATH"]
        return [
            *("setpriv", f"--reuid={self.user}", f"--regid={self.user}", "--clear-groups"),
            *("--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "--"),
            *("env", "-i", f"PATH={path}", *environ, *words),
        ]


MOUNT = """
set -e
mount --bind "$1" "$1"
mount -o remount,bind,ro "$1"
mount -t proc proc "$1/proc"
mount -t tmpfs tmpfs "$1/dev"
for name in null zero random urandom; do
  touch "$1/dev/$name"
  mount --bind "/dev/$name" "$1/dev/$name"
done
mount --bind "$2" "$1/var/lib/clevrd"
ip link set lo up 2>/dev/null || true
root=$1
shift 2
exec chroot "$root" "$@"
"""


class Container:
    """A running container; its process 1 has this number outside."""

    def __init__(self, image: Image, process: subprocess.Popen[str], pid: int) -> None:
        self.image = image
        self.process = process
        self.pid = pid

    def exec(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the container, as `docker exec` does."""
        enter = ("nsenter", "-t", str(self.pid), "-m", "-n", "-p", "-r", "-w")
        command = [*enter, *self.image.command(words, **variables)]
        return subprocess.run(command, capture_output=True, text=True, timeout=30)

    def health(self, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run the image's own health check."""
        kind, *words = self.image.config["Healthcheck"]["Test"]
        assert kind == "CMD", kind
        return self.exec(*words, **variables)

    def until_healthy(self, **variables: str) -> str:
        """Return the output of the first health check that succeeds."""
        end_s = time.monotonic() + START_S
        while (done := self.health(**variables)).returncode:
            if self.process.poll() is not None or time.monotonic() > end_s:
                claim(False, f"it is healthy in time: {done.stderr.strip()}")
            time.sleep(0.2)
        return done.stdout.strip()

    def publish(self, *options: str) -> int:
        """Publish a message and return its offset."""
        done = self.exec("clevrd", "publish", "orders", '{"id":1}', *options)
        claim(done.returncode == 0, f"a message is published {done.stderr.strip()}")
        return int(json.loads(done.stdout)["offset"])

    def stop(self) -> tuple[int, str]:
        """Stop the container as an engine does; return its exit code and its log."""
        os.kill(self.pid, signal.Signals[self.image.config["StopSignal"]])
        _, log = self.process.communicate(timeout=40)
        return self.process.returncode, log


@contextmanager
def running(image: Image, state: Path, *words: str, **variables: str) -> Iterator[Container]:
    """Run the image with ``words`` in place of its CMD."""
    command = [*image.config["Entrypoint"], *(words or image.config["Cmd"])]
    spaces = ("unshare", "--pid", "--fork", "--net", "--mount")
    process = subprocess.Popen(
        [
            *(*spaces, "sh", "-c", MOUNT, "sh", str(image.root), str(state)),
            *image.command(command, **variables),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    pid = first_process(process.pid)
    try:
        yield Container(image, process, pid)
    finally:
        # The container's process 1 is killed, not the process outside: with the change of user the
        # kernel forgot that both end together.
        if process.poll() is None:
            os.kill(pid, signal.SIGKILL)
        process.communicate()


def first_process(parent: int) -> int:
    """Return the outer number of the namespace's process 1, once it is the daemon's Python."""
    end_s = time.monotonic() + START_S
    while time.monotonic() < end_s:
        for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
            words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
            if b"python" in words[0]:
                return int(child)
        time.sleep(0.001)
    raise SystemExit("the container does not start")


def try_out(image: Image, state: Path) -> None:
    """Start, check, publish and stop, twice; check that positions go on."""
    keeps = {"CLEVRD_STATE_DIR": "/var/lib/clevrd"}
    with running(image, state, **keeps) as container:
        said = container.until_healthy()
        claim(said == ":8080 answered /health/live with 200.", "it is healthy with its defaults")
        first = container.publish()
        code, log = container.stop()
    claim((first, code) == (1, 0), f"SIGTERM ends process 1 in order, code {code}")
    claim("state saved topics=1" in log, "its state is saved")
    stop_early(image, state, keeps)
    with running(image, state, **keeps) as container:
        container.until_healthy()
        claim(container.publish() == 2, "positions go on over restarts that were stopped early")
        claim(container.stop()[0] == 0, "it stops again")


def stop_early(image: Image, state: Path, variables: dict[str, str]) -> None:
    """Stop the container at many moments of its start: it always ends, and loses no message."""
    ends: list[tuple[float, int, float]] = []
    deaf_s = []
    for step in range(25):
        with running(image, state, **variables) as container:
            deaf_s.append(until_it_hears(container.pid))
            time.sleep(step * 0.04)
            began_s = time.monotonic()
            code, _ = container.stop()
            ends.append((step * 0.04, code, time.monotonic() - began_s))
    slowest_s = max(took_s for _, _, took_s in ends)
    claim(
        all(code == 0 for _, code, _ in ends) and slowest_s < 5,
        f"it hears after {min(deaf_s):.3f} s, and stopped 0 to {ends[-1][0]:.2f} s later it ends"
        f" in {slowest_s:.2f} s at most",
    )


def until_it_hears(pid: int) -> float:
    """Wait until SIGTERM has a handler, since process 1 ignores it before; return the seconds."""
    began_s = time.monotonic()
    caught = 0
    while not caught >> (signal.SIGTERM - 1) & 1:
        status = Path(f"/proc/{pid}/status").read_text()
        caught = int(re.findall(r"^SigCgt:\s*(\w+)$", status, re.MULTILINE)[0], 16)
        time.sleep(0.001)
    return time.monotonic() - began_s


def try_addresses(image: Image, state: Path) -> None:
    """The image's health check finds the daemon wherever it listens."""
    for words, variables in (
        (("serve", "--address", "[::]:9000"), {}),
        (("serve", "--address=[::1]:9001"), {}),
        (("--address", "127.0.0.1:9002", "--log-level", "warning"), {}),
        (("serve", "--address", "unix:/var/lib/clevrd/clevrd.sock"), {}),
        (("serve",), {"ADDRESS": "0.0.0.0:9003"}),
    ):
        with running(image, state, *words, **variables) as container:
            said = container.until_healthy(**variables)
            claim(container.stop()[0] == 0, f"{' '.join(words)} {variables or ''}: {said}")
    with running(image, state, "serve", "--address", ":9004") as container:
        container.until_healthy()
        done = container.exec("clevrd", "health", "--address", ":9005")
        claim(done.returncode == 69, f"a wrong address is not healthy: {done.stderr.strip()}")


def check_costs(image: Image, state: Path) -> None:
    """Check that no start and no health check compiles a module, which keeps both cheap."""
    with running(image, state) as container:
        container.until_healthy()
        for module in ("clevrd.server.process", "clevrd.health_check"):
            done = container.exec("python", "-v", "-c", f"import {module}")
            compiled = re.findall(r"^# code object from '?(\S+\.py)\b", done.stderr, re.MULTILINE)
            claim(not compiled, f"{module} finds bytecode of all that it imports {compiled[:3]}")
        spent_s = []
        for _ in range(5):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            container.health()
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            spent_s.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        print(f"     a health check takes {min(spent_s) * 1000:.0f} ms of CPU here")


def main() -> None:
    """Build the image, then test all of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--python", default="python3.12", help="a CPython 3.12 of this machine")
    parser.add_argument("--work", default="/var/tmp/clevrd-image", type=Path)  # noqa: S108
    options = parser.parse_args()
    missing = [name for name in ("buildah", "debootstrap", "nsenter") if not shutil.which(name)]
    if missing or os.geteuid() != 0 or not shutil.which(options.python):
        sys.exit(f"This needs root, a CPython 3.12 (--python) and {missing or 'nothing else'}.")
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    for name in ("storage", "run"):
        shutil.rmtree(work / name, ignore_errors=True)
    buildah = Builder(work)
    recipe = (ROOT / "Dockerfile").read_text()
    (base,) = re.findall(r"^ARG BASE=(\S+)$", recipe, re.MULTILINE)

    make_base(work / "base", options.python, ",".join(PACKAGES))
    commit_base(buildah, work / "base", base)
    copy_context(work / "context")
    check_context(buildah, work / "context", work)
    try_image(build_image(buildah, work / "context"), work / "state")
    print("the image is fine")


def build_image(buildah: Builder, context: Path) -> Image:
    """Build the image as an engine would, without a cache, and lay it out."""
    began_s = time.monotonic()
    flags = ("--pull=never", "--layers=false", "--format", "docker")
    buildah("build", *flags, "-t", "clevrd", context)
    config = json.loads(buildah("inspect", "--type", "image", "clevrd"))["Docker"]["config"]
    root = Path(buildah("mount", buildah("from", "--pull=never", "clevrd")))
    claim(True, f"it is built in {time.monotonic() - began_s:.0f} s")
    return Image(root, config)


def try_image(image: Image, state: Path) -> None:
    """Run the image in all the ways that the documents promise."""
    shutil.rmtree(state, ignore_errors=True)
    state.mkdir()
    os.chown(state, int(image.user), int(image.user))
    state.chmod(0o700)
    try_out(image, state)
    try_addresses(image, state)
    check_costs(image, state)


if __name__ == "__main__":
    main()
