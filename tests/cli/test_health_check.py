"""`clevrd health`: it finds the daemon as the daemon finds its address, and says what it found."""

from __future__ import annotations

import itertools
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from daemons import ROOT
from dockerfile import health_check
from tls import make_pair

from clevrd import __version__
from clevrd import health_check as module
from clevrd.argv import argv_of_process
from clevrd.config import load
from clevrd.errors import ConfigError
from clevrd.health_check import find_address, listed_proxies, main
from clevrd.health_options import Options, parse, plain_options

has_ipv6 = socket.has_dualstack_ipv6()


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the developer's own settings, and what process 1 of this machine is."""
    for name in ("ADDRESS", "CLEVRD_ADDRESS", "CLEVRD_CONFIG", "CLEVRD_PROXY_PROTOCOL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "argv_of_process", lambda: [])


@contextmanager
def serving(address: str, *flags: str, **variables: str) -> Iterator[int]:
    """Serve at ``address`` until the block ends; give its port, 0 for a socket's file."""
    process = subprocess.Popen(
        [sys.executable, "-m", "clevrd", "serve", *flags],
        cwd=ROOT,
        env={**os.environ, **variables},
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if found := re.search(r"listening .*address=(\S+) ", line):
                    break
            else:
                raise AssertionError(f"it ended before it listened at {address}")
            port = re.search(r":(\d+)$", found[1])
            yield int(port[1]) if port else 0
        finally:
            process.terminate()
            process.wait(15)


# --- a real daemon at each form ------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        "",
        "127.0.0.1",
        "0.0.0.0",  # noqa: S104  # it is what is tested
        "localhost",
        pytest.param("[::]", marks=pytest.mark.skipif(not has_ipv6, reason="there is no IPv6")),
        pytest.param("[::1]", marks=pytest.mark.skipif(not has_ipv6, reason="there is no IPv6")),
    ],
)
def test_daemon_is_found_at_each_address(host: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Who listens everywhere answers on the loopback of that family."""
    with serving(host, "--address", f"{host}:0") as port:
        live = main(["--address", f"{host}:{port}"])
        ready = main(["--ready", "--address", f"{host}:{port}"])

    said = capfd.readouterr()
    assert (live, ready, said.err) == (0, 0, "")
    assert said.out == (
        f"{host}:{port} answered /health/live with 200.\n"
        f"{host}:{port} answered /health/ready with 200.\n"
    )


def test_daemon_is_found_at_a_unix_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """By the variable that the daemon has as well."""
    monkeypatch.setenv("ADDRESS", f"unix:{tmp_path}/clevrd.sock")

    with serving("unix"):
        well = main([])
    gone = main([])

    assert (well, gone) == (0, 69)
    assert "no such file" in capfd.readouterr().err


@pytest.mark.parametrize("is_secure", [False, True])
@pytest.mark.parametrize("listed", ["127.0.0.1", "192.0.2.1", "0.0.0.0/0"])
def test_daemon_that_expects_a_proxys_header_of_this_machine_is_sent_one(
    listed: str, is_secure: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy on the same machine is listed often; a header from anybody else would be refused."""
    pair = make_pair(tmp_path)
    settings = [f"tls_{kind}_file = '{getattr(pair, kind)}'" for kind in ("cert", "key")]
    file = tmp_path / "clevrd.toml"
    table = f'proxy_protocol = true\n[auth]\ntrusted_proxies = ["{listed}"]\n'
    file.write_text("\n".join([*(settings if is_secure else []), table]))
    monkeypatch.setenv("CLEVRD_CONFIG", str(file))

    with serving("port", "--address", "127.0.0.1:0") as port:
        answers = [main(["--address", f"127.0.0.1:{port}", *more]) for more in ([], ["--ready"])]
        monkeypatch.setattr(module, "_is_listed", lambda *_: listed == "192.0.2.1")
        wrong = main(["--address", f"127.0.0.1:{port}"])

    assert answers == [0, 0]
    assert wrong in (1, 69)


@pytest.mark.parametrize(
    ("flag", "variable", "in_file", "is_on"),
    [
        (None, "", False, False),
        (None, "", True, True),
        (None, "yes", False, True),
        (None, "no", True, False),
        ("TRUE", "no", False, True),
        ("0", "yes", True, False),
    ],
)
def test_proxies_are_those_of_whom_a_header_is_expected(
    flag: str | None, variable: str, in_file: bool, is_on: bool, tmp_path: Path
) -> None:
    """By the setting, wherever it stands; the list is the file's."""
    file = tmp_path / "clevrd.toml"
    table = '[auth]\ntrusted_proxies = ["unix:", "10.0.0.0/8"]\n'
    file.write_text(f"proxy_protocol = {str(in_file).lower()}\n{table}")
    environ = {"CLEVRD_PROXY_PROTOCOL": variable} if variable else {}

    assert listed_proxies(flag, str(file), environ) == (["unix:", "10.0.0.0/8"] if is_on else [])
    assert listed_proxies("true", None, environ) == []


def test_check_of_the_image_finds_the_daemon(tmp_path: Path) -> None:
    """As it stands in the Dockerfile, beside a daemon that has its address from a file."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    file = tmp_path / "clevrd.toml"
    file.write_text(f'address = "127.0.0.1:{port}"\n')
    environ = {**os.environ, "CLEVRD_CONFIG": str(file)}

    with serving("file", **environ):
        well = subprocess.run(health_check(), cwd=ROOT, env=environ, timeout=20)
    gone = subprocess.run(health_check(), cwd=ROOT, env=environ, timeout=20, capture_output=True)

    assert (well.returncode, gone.returncode) == (0, 69)
    assert (
        gone.stderr == f"clevrd: Nobody answers at 127.0.0.1:{port}: connection refused.\n".encode()
    )


# --- where it asks -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "environ", "file"),
    list(
        itertools.product(
            (None, "127.0.0.1:1"),
            ({}, {"ADDRESS": ""}, {"ADDRESS": ":2"}, {"ADDRESS": ":2", "CLEVRD_ADDRESS": ":4"}),
            (None, "", "[::1]:3"),
        )
    ),
)
def test_address_is_the_one_that_serve_finds(
    flag: str | None, environ: dict[str, str], file: str | None, tmp_path: Path
) -> None:
    """Flag, variable, file, default: this order is decided in two places, and is one."""
    path = None
    if file is not None:
        path = str(tmp_path / "clevrd.toml")
        Path(path).write_text(f'address = "{file}"\n' if file else "")
    flags = {} if flag is None else {"address": flag}

    served = load(flags, environ, path).config.address

    assert find_address(flag, path, environ) == served
    if path:
        assert find_address(flag, None, {**environ, "CLEVRD_CONFIG": path}) == served


def test_file_that_is_wrong_elsewhere_still_says_where(tmp_path: Path) -> None:
    """A daemon that runs is not unhealthy because its settings were changed since."""
    file = tmp_path / "clevrd.toml"
    file.write_text('address = ":9"\nno_such_setting = 1\n')

    assert find_address(None, str(file), {}) == ":9"


@pytest.mark.parametrize("text", ["address = 5", "address = ", "\xff", "a=" + "[" * 5_000])
def test_file_without_an_address_that_can_be_read_is_an_error(text: str, tmp_path: Path) -> None:
    """It is named in the line."""
    file = tmp_path / "clevrd.toml"
    file.write_bytes(text.encode("latin-1"))

    with pytest.raises(ConfigError, match=re.escape(str(file))):
        find_address(None, str(file), {})


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        (
            ["/opt/clevrd/bin/python", "/opt/clevrd/bin/clevrd", "serve", "--address", ":9"],
            "--address :9",
        ),
        (["/opt/clevrd/bin/python3.12", "/opt/clevrd/bin/clevrd", "--address=:9"], "--address=:9"),
        (["/sbin/docker-init", "--", "clevrd", "serve", "--address", ":9"], "--address :9"),
        (["python", "-m", "clevrd", "serve"], ""),
        (["/usr/lib/systemd/systemd", "--system"], ""),
        (["sh", "-c", "clevrd serve --address :9"], ""),
    ],
)
def test_process_1_of_a_container_says_how_it_was_started(
    words: list[str], flags: str, tmp_path: Path
) -> None:
    """As a script, as a module, or behind an init that names it; another program says nothing."""
    path = tmp_path / "cmdline"
    path.write_bytes(b"".join(word.encode() + b"\0" for word in words))

    found = argv_of_process(str(path))

    assert " ".join(word for word in found if word != "serve") == flags


@pytest.mark.parametrize(
    ("first", "own", "asked"),
    [
        (["serve", "--ring-messages", "100", "--address", "127.0.0.1:1"], [], "127.0.0.1:1"),
        (["--address=127.0.0.1:1"], [], "127.0.0.1:1"),
        (["serve", "--address", "127.0.0.1:1"], ["--address", "127.0.0.1:3"], "127.0.0.1:3"),
        (["serve"], [], "127.0.0.1:2"),
        (["publish", "t", "--address", "127.0.0.1:1"], [], "127.0.0.1:2"),
        (["serve", "--address"], [], "127.0.0.1:2"),
    ],
)
def test_flags_of_process_1_count_as_well(
    first: list[str],
    own: list[str],
    asked: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A container that was started with serve --address X has no variable that says so."""
    monkeypatch.setattr(module, "argv_of_process", lambda: first)
    monkeypatch.setenv("ADDRESS", "127.0.0.1:2")

    main(own)

    assert f"Nobody answers at {asked}: " in capfd.readouterr().err


def test_configuration_of_process_1_counts_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its file says where it listens, where nothing stronger does."""
    file = tmp_path / "clevrd.toml"
    file.write_text('address = "127.0.0.1:4"\n')
    monkeypatch.setattr(module, "argv_of_process", lambda: ["serve", "--config", str(file)])

    main([])

    assert "Nobody answers at 127.0.0.1:4: " in capfd.readouterr().err


# --- what it finds -------------------------------------------------------------------------------


@contextmanager
def answering(serve: Callable[[socket.socket], object]) -> Iterator[str]:
    """Let ``serve`` answer one connection; give the address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(1_000)
                serve(peer)

        thread = threading.Thread(target=run)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join(5)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", "with 503"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "with 204"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "with what is not HTTP"),
        (b"HTTP/1.1 \xb2\xb3 ?\r\n", "with what is not HTTP"),
        (b"x" * 100_000, "with what is not HTTP"),
        (b"", "with what is not HTTP"),
    ],
)
def test_any_other_answer_is_not_well(
    answer: bytes, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """A daemon that drains, and another program on the port."""
    with answering(lambda peer: peer.sendall(answer)) as address:
        code = main(["--address", address])

    said = capfd.readouterr()
    assert (code, said.out) == (1, "")
    assert words in said.err
    assert said.err.count("\n") == 1


def test_daemon_that_hangs_is_not_well(capfd: pytest.CaptureFixture[str]) -> None:
    """It has its time, however it is used up."""
    asked = threading.Event()
    with answering(lambda _: asked.wait(10)) as address:
        code = main(["--address", address, "--timeout", "0.05"])
        asked.set()

    assert code == 1
    assert "did not answer /health/live within 0.05 s." in capfd.readouterr().err


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["--address", "127.0.0.1:1"], 69, "connection refused"),
        (["--address", "127.0.0.1:0"], 2, "name it: --address"),
        (["--address", "8080"], 78, "The port is missing"),
        (["--address", "unix:/nowhere/s"], 69, "no such file"),
        (["--address", "no-such-host.invalid:1"], 69, "Nobody answers at no-such-host.invalid:1: "),
        (["--config", "/nowhere"], 78, "Can't read the configuration file /nowhere"),
        (["--timeout", "-1"], 2, "not a number of seconds"),
        (["--timeout", "0"], 2, "not a number of seconds"),
        (["--nonsense"], 2, "unrecognized arguments: --nonsense (try: clevrd health --help)"),
    ],
)
def test_failure_is_one_line_and_its_own_exit_code(
    argv: list[str], code: int, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """A health check's log has room for that."""
    try:
        found = main(argv)
    except SystemExit as ended:
        found = int(ended.code or 0)

    said = capfd.readouterr()
    assert (found, said.out) == (code, "")
    assert words in said.err
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "module_name"),
    [
        (["health", "--address", "127.0.0.1:1", "--timeout", "1", "--ready"], "health_check"),
        (["--version"], "entry"),
    ],
    ids=["health", "version"],
)
def test_command_that_is_run_often_imports_little(words: list[str], module_name: str) -> None:
    """A check runs every few seconds beside a daemon that needs the CPU."""
    script = "import sys; from clevrd.entry import main; main(); print(sorted(sys.modules))"
    done = subprocess.run(
        # Without site, which imports modules of its own where the package is installed to be
        # edited.
        [sys.executable, "-S", "-c", script, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=20,
    )
    loaded = set(re.findall(r"'([\w.]+)'", done.stdout))

    assert f"clevrd.{module_name}" in loaded
    assert not loaded & {"aiohttp", "msgspec", "uvloop", "cryptography"}
    assert not loaded & {"asyncio", "http.client", "logging", "ssl", "subprocess", "threading"}
    # Each of these takes as much CPU as all of the command's own modules.
    assert not loaded & {"argparse", "ipaddress", "pathlib", "re", "typing"}


@pytest.mark.parametrize("words", [["--version"], ["-V"], ["version"]])
def test_version_is_one_line(words: list[str]) -> None:
    """Every form prints it, and says why where it can't."""
    command = [sys.executable, "-m", "clevrd", *words]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    with open("/dev/full", "w") as full:
        failed = subprocess.run(
            command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=20
        )

    assert (told.returncode, told.stdout, told.stderr) == (0, f"clevrd {__version__}\n", "")
    assert failed.returncode == 1
    assert failed.stderr == "clevrd: Standard input or output failed: No space left on device.\n"


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--ready"],
        ["--address", "127.0.0.1:9", "--timeout", "0.5"],
        ["--timeout=3", "--config=a=b.toml", "--ready", "--address=[::1]:9"],
        ["--address", "a:1", "--address", "b:2"],
    ],
)
def test_plain_options_are_what_argparse_takes_them_for(argv: list[str]) -> None:
    """Options that are read at a look mean the same as behind the slow parser."""
    plain, parsed = plain_options(argv), parse(argv)

    assert plain is not None
    assert [getattr(plain, name) for name in Options.__slots__] == [
        getattr(parsed, name) for name in Options.__slots__
    ]


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["--address"],
        ["--address", "--ready"],
        ["--address="],
        ["--ready=1"],
        ["--timeout", "nan"],
        ["--time", "1"],
        ["word"],
        ["--"],
    ],
)
def test_all_other_options_are_left_to_argparse(argv: list[str]) -> None:
    """It has the sentences about mistakes."""
    assert plain_options(argv) is None
