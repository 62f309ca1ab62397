"""A machine with a real systemd as process 1, in which the units of this checkout are installed.

It is a container of systemd-nspawn on an overlay over this machine's own files, so that nothing
outside changes, with a network of its own. It needs root, and Debian's packages systemd,
systemd-container and dbus. Left out are limits that such a container can't have: MemoryMax,
TasksMax, and more than 20,000 descriptors.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from daemons import ROOT
from packaging.requirements import Requirement

INIT = Path("/lib/systemd/systemd")
PYTHON = Path("/usr/bin/python3")
TOOLS = ("systemd-nspawn", "nsenter", "unshare", "setpriv", "mount")
UNITS = ("clevrd.service", "clevrd.socket")
BOOT_S = 30.0
COMMAND_S = 40.0
# Where commands are looked for inside.
PATH = "/opt/clevrd/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"

# Runs in a private mount namespace. $1: an empty directory, $2: what is copied over the files of
# the machine, $3: a name for cgroups. nspawn makes fixed names in the cgroup of its caller, so that
# each machine has one of its own.
_BOOT = r"""
set -eu
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"
root=$1/root
rm -rf "$root"/etc/systemd/system/* "$root"/etc/init.d/* "$root"/etc/rc?.d/* \
  "$root"/etc/systemd/network/* "$root"/var/log/journal "$root"/var/lib/clevrd \
  "$root"/var/lib/private/clevrd "$root"/opt/clevrd "$root"/etc/clevrd
: > "$root/etc/machine-id"
cp -a "$2/." "$root/"
for group in /sys/fs/cgroup/systemd /sys/fs/cgroup/unified /sys/fs/cgroup; do
  if [ -w "$group/cgroup.procs" ]; then
    mkdir -p "$group/$3"
    echo $$ > "$group/$3/cgroup.procs"
  fi
done
exec systemd-nspawn --quiet --boot -D "$root" --register=no --keep-unit --private-network \
  --link-journal=no --console=pipe
"""


def need_machine() -> None:
    """Skip the test where no such machine can be had, or fail it where CI=true."""
    missing = [name for name in TOOLS if shutil.which(name) is None]
    missing += [str(path) for path in (INIT, PYTHON) if not path.exists()]
    reason = ""
    if os.geteuid() != 0:
        reason = "only root can boot a machine"
    elif missing:
        reason = f"there is no {missing[0]}; make systemd"
    if not reason:
        return
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


class Machine:
    """A booted machine; every command has a time within which it ends."""

    def __init__(self, leader: int) -> None:
        self._leader = leader

    def command(self, *words: str) -> list[str]:
        """Return the command by which ``words`` are run inside."""
        enter = ["nsenter", "-t", str(self._leader), "-a", "env", "-i", f"PATH={PATH}"]
        return [*enter, *words]

    def run(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command inside, and fail unless it succeeds."""
        done = subprocess.run(
            self.command(*words), capture_output=True, text=True, timeout=COMMAND_S
        )
        assert not check or done.returncode == 0, (words, done.stdout, done.stderr)
        return done

    def property(self, name: str, unit: str = "clevrd.service") -> str:
        """Return what systemd knows of a unit."""
        return self.run("systemctl", "show", "--value", "-p", name, unit).stdout.strip()

    def journal(self, *options: str) -> str:
        """Return the log of the service."""
        return self.run("journalctl", "-q", "-o", "cat", "-u", "clevrd.service", *options).stdout

    def write(self, path: str, text: str) -> None:
        """Write a file inside."""
        where = f"/proc/{self._leader}/root{path}"
        Path(where).parent.mkdir(parents=True, exist_ok=True)
        Path(where).write_text(text)

    def outside_python(self, *words: str) -> list[str]:
        """Return a command of this test's own Python, in the machine's network."""
        return ["nsenter", "-t", str(self._leader), "-n", sys.executable, *words]


@contextmanager
def booted(folder: Path) -> Iterator[Machine]:
    """Boot a machine with the daemon and its units in it, and switch it off in the end.

    Args:
        folder: an empty directory.
    """
    need_machine()
    mount, files = folder / "machine", folder / "files"
    mount.mkdir()
    _install(files)
    group = f"clevrd-test-{os.getpid()}"
    log = folder / "console"
    with log.open("wb") as console:
        process = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL"),
                *("unshare", "--mount", "--propagation", "private"),
                *("sh", "-c", _BOOT, "sh", str(mount), str(files), group),
            ],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        machine = Machine(_leader_of(process, log))
        _wait_until_running(machine, log)
        yield machine
        with suppress(subprocess.TimeoutExpired):
            machine.run("systemctl", "poweroff", check=False)
            process.wait(10)
    finally:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
        _remove_groups(group)


def _install(files: Path) -> None:
    """Put the daemon and its units where the documents say, below ``files``."""
    environment = files / "opt" / "clevrd"
    subprocess.run([PYTHON, "-m", "venv", "--without-pip", environment], check=True)
    version = subprocess.run(
        [PYTHON, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    packages = environment / "lib" / f"python{version}" / "site-packages"
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        _copy_packages(packages)
    else:
        # The packages of this test's Python have been built for another version.
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
        where = ["--python", str(PYTHON), "install", "--target", str(packages)]
        subprocess.run([*pip, *where, str(ROOT)], check=True)
    shutil.copytree(ROOT / "clevrd", packages / "clevrd", dirs_exist_ok=True)
    script = environment / "bin" / "clevrd"
    script.write_text(
        "#!/opt/clevrd/bin/python3\nimport sys\nfrom clevrd.entry import main\nsys.exit(main())\n"
    )
    script.chmod(0o755)
    units = files / "etc" / "systemd" / "system"
    units.mkdir(parents=True)
    for name in UNITS:
        shutil.copy(ROOT / "systemd" / name, units / name)
    (files / "etc" / "clevrd").mkdir()
    shutil.copy(ROOT / "systemd" / "clevrd.toml", files / "etc" / "clevrd" / "clevrd.toml")


def _copy_packages(to: Path) -> None:
    """Copy what the daemon needs of the packages that this test's own Python has."""
    seen: set[str] = set()
    wanted = _requirements("clevrd")
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        for path in distribution(name).files or ():
            # Compiled modules come along: the service can't write what it compiles itself.
            if ".." not in path.parts and path.locate().is_file():  # type: ignore[attr-defined]
                (to / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path.locate(), to / path)
        wanted += _requirements(name)


def _requirements(name: str) -> list[str]:
    """Return the packages that ``name`` needs, extras aside."""
    if name == "clevrd":
        import tomllib

        text = (ROOT / "pyproject.toml").read_text()
        lines = tomllib.loads(text)["project"]["dependencies"]
    else:
        lines = distribution(name).requires or []
    found = []
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            with suppress(PackageNotFoundError):
                found.append(distribution(requirement.name).metadata["Name"])
    return found


def _leader_of(process: subprocess.Popen[bytes], log: Path) -> int:
    """Return process 1 of the machine: the child of nspawn that is systemd."""
    end_s = time.monotonic() + BOOT_S
    while process.poll() is None and time.monotonic() < end_s:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        with suppress(OSError):
            for child in children.read_text().split():
                if Path(f"/proc/{child}/comm").read_text().strip() == "systemd":
                    return int(child)
        time.sleep(0.05)
    raise AssertionError(f"the machine did not boot: {_tail(log)}")


def _wait_until_running(machine: Machine, log: Path) -> None:
    end_s = time.monotonic() + BOOT_S
    state = ""
    while time.monotonic() < end_s:
        done = machine.run("systemctl", "is-system-running", check=False)
        state = done.stdout.strip()
        if state in ("running", "degraded"):
            return
        time.sleep(0.1)
    raise AssertionError(f"the machine is {state}: {_tail(log)}")


def _tail(log: Path) -> str:
    return re.sub(r"\x1b\S*?[a-zA-Z]", "", log.read_bytes()[-2000:].decode(errors="replace"))


def _remove_groups(name: str) -> None:
    """Remove the cgroups of a machine that is off, the innermost first."""
    for root in ("/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified", "/sys/fs/cgroup"):
        top = Path(root) / name
        if top.is_dir():
            for folder in sorted(top.rglob("*"), reverse=True):
                if folder.is_dir():
                    with suppress(OSError):
                        folder.rmdir()
            with suppress(OSError):
                top.rmdir()
