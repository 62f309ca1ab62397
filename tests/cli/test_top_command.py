"""clevrd top: what it shows, where it looks for the daemon, and what it says when that is away."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from daemons import ROOT, DaemonProcess, daemon_process
from ports import free_port

from clevrd.cli import main
from clevrd.cli.top_text import cut, quantile, screen, shown, since_then, width_of
from clevrd.metrics.histograms import HistogramView
from clevrd.metrics.top import TopView
from clevrd.tenants.keys import new_key

KEY = new_key()
SETTINGS = ("ADDRESS", "CLEVRD_ADDRESS", "CLEVRD_CONFIG", "CLEVRD_ADMIN_ADDRESS", "CLEVRD_KEY")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon that asks for a key on its own address, and for none on that for operators."""
    file = tmp_path_factory.mktemp("top") / "clevrd.toml"
    file.write_text(
        '[auth]\nmode = "required"\n[[tenants]]\nname = "ops"\n[[tenants.keys]]\nid = "on-call"\n'
        f'sha256 = "{KEY.sha256}"\nadmin = true\npublish = ["**"]\n'
    )
    admin = f"127.0.0.1:{free_port()}"
    with daemon_process(CLEVRD_CONFIG=str(file), CLEVRD_ADMIN_ADDRESS=admin) as daemon:
        daemon.admin = admin  # type: ignore[attr-defined]
        run(
            "publish", "night \x7f-shift".replace("\x7f", "é"), "1", "--url", daemon.url, **secret()
        )
        yield daemon


def secret() -> dict[str, str]:
    return {"CLEVRD_KEY": KEY.secret}


def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run clevrd with these arguments, and no settings but ``variables``."""
    return subprocess.run(
        [sys.executable, "-m", "clevrd", *words],
        cwd=ROOT,
        env={**clean(), **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )


def clean() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in SETTINGS}


# --- a real daemon ---


def test_once_prints_the_tables(daemon: DaemonProcess) -> None:
    """In plain lines, where the settings say that it listens and with the credential."""
    done = run("top", "--once", ADDRESS=f"127.0.0.1:{daemon.port}", **secret())

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("clevrd ")
    assert "\x1b" not in done.stdout
    assert "night é-shift" in done.stdout
    for words in ("published", "dropped   slow_consumer", "to socket p50", "loop lag p50"):
        assert words in done.stdout
    for title in ("slowest subscribers by lag", "busiest topics", "largest rings", "most limited"):
        assert title in done.stdout


def test_json_is_the_daemons_own(daemon: DaemonProcess) -> None:
    """One line, which a program can read."""
    done = run("top", "--once", "--json", "--rows", "1", "--url", daemon.url, **secret())

    (line,) = done.stdout.splitlines()
    view = json.loads(line)
    assert [row["topic"] for row in view["largest_rings"]] == ["night é-shift"]
    assert view["figures"]["messages"]["published"] == 1


def test_admin_address_is_asked_first_and_gets_no_key(daemon: DaemonProcess) -> None:
    """It needs none; the daemon's own address does."""
    admin: str = daemon.admin  # type: ignore[attr-defined]
    settings = {"ADDRESS": f"127.0.0.1:{daemon.port}", "CLEVRD_ADMIN_ADDRESS": admin}
    found = run("top", "--once", "--json", **settings)
    refused = run("top", "--once", "--address", f"127.0.0.1:{daemon.port}", **settings)

    assert found.returncode == 0, found.stderr
    assert refused.returncode == 1
    assert "refused to answer (401)" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_pipe_gets_one_view_after_the_other(daemon: DaemonProcess) -> None:
    """Without a terminal's codes; and it ends when nobody reads any more."""
    command = [sys.executable, "-m", "clevrd", "top", "--interval", "1", "--url", daemon.url]
    top = subprocess.Popen(
        command, cwd=ROOT, env={**clean(), **secret()}, stdout=subprocess.PIPE, text=True
    )
    with top:
        assert top.stdout is not None
        heads = 0
        for line in top.stdout:
            assert "\x1b" not in line
            heads += line.startswith("clevrd ")
            if heads == 2:
                break
        top.stdout.close()
        assert top.wait(30) == 0


def test_terminal_is_refreshed_and_left_as_it_was(daemon: DaemonProcess) -> None:
    """Whatever ends it: the other screen is left, and the cursor is there again."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, (30, 60))
    command = [sys.executable, "-m", "clevrd", "top", "--interval", "1", "--url", daemon.url]
    top = subprocess.Popen(
        command, cwd=ROOT, env={**clean(), **secret()}, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    seen = read_until(ours, lambda text: text.count(b"\x1b[H") >= 2)
    top.send_signal(signal.SIGTERM)
    seen += read_until(ours, lambda text: b"\x1b[?1049l" in text)
    code = top.wait(30)
    os.close(ours)

    assert code == 143
    assert seen.startswith(b"\x1b[?1049h\x1b[?25l\x1b[H")
    assert b"\x1b[?25h\x1b[?1049l" in seen
    # No line is longer than the terminal is wide, so that none is broken.
    first = seen.split(b"\x1b[H")[1].split(b"\x1b[J")[0].decode()
    lines = [line.replace("\x1b[K", "").rstrip("\r") for line in first.split("\n")]
    assert max(map(width_of, lines)) <= 60
    assert len(lines) <= 30


def read_until(descriptor: int, is_there: Callable[[bytes], bool]) -> bytes:
    text = b""
    while not is_there(text):
        text += os.read(descriptor, 65_536)
    return text


# --- a daemon that is away, and wrong words ---


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the developer's own settings, and what process 1 of this machine is."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("clevrd.health_check.argv_of_process", lambda: [])


@pytest.mark.usefixtures("no_settings")
def test_nobody_there_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    """With the exit code that says so."""
    free = free_port()

    code = main(["top", "--once", "--address", f"127.0.0.1:{free}"])

    assert code == 69
    told = capfd.readouterr().err
    assert told == f"clevrd: Nobody answers at 127.0.0.1:{free}: Connection refused.\n"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--url", "http://a", "--address", ":1"), "leave --address and --config out"),
        (("--url", "not a url"), "The URL must be like"),
        (("--interval", "0.5"), "is not a number of seconds from 1 to 3600"),
        (("--rows", "101"), "is more than 100"),
        (("--address", ":0"), "port 0 is chosen when the daemon starts"),
        (("--address", "http://a:1"), "Write an address, not a URL"),
    ],
)
@pytest.mark.usefixtures("no_settings")
def test_wrong_words_are_explained(
    words: tuple[str, ...], part: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """In one line."""
    code = main(["top", "--once", *words])

    told = capfd.readouterr().err
    assert code in (2, 78)
    assert part in told
    assert len(told.splitlines()) == 1


@pytest.mark.usefixtures("no_settings")
def test_key_is_not_sent_where_the_certificate_is_not_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A daemon with TLS is to be named by a URL, before a key goes there."""
    file = tmp_path / "clevrd.toml"
    file.write_text('address = "127.0.0.1:1"\ntls_cert_file = "cert.pem"\n')
    monkeypatch.setenv("CLEVRD_KEY", KEY.secret)

    code = main(["top", "--once", "--config", str(file)])

    told = capfd.readouterr().err
    assert code == 2
    assert "name it by --url https://NAME" in told
    assert KEY.secret not in told


# --- the text ---


def view(**changes: Any) -> TopView:
    """Return the view of a daemon in which something of everything has happened."""
    body = json.loads((Path(__file__).parent / "top_view.json").read_text())
    return msgspec.convert({**body, **changes}, TopView)


@pytest.mark.parametrize("width", [20, 60, 80, 200])
def test_no_line_is_wider_than_the_screen(width: int) -> None:
    """Names give way to figures; what a terminal would act upon is not shown."""
    lines = list(screen(view(), None, "127.0.0.1:8080", 5, width))

    assert max(map(width_of, lines)) <= width
    assert all(line.isprintable() for line in lines)
    text = "\n".join(lines)
    if width == 200:
        for part in ("acme", "orders.eu", "10.0.0.7", "stalled", "1,234", "64.0 KiB", "on-call"):
            assert part in text
        assert "THROTTLING" in text


def test_rates_are_of_what_happened_between_two_views() -> None:
    """Counters that fell are those of another daemon, which are not compared."""
    before, now = view(), view()
    figures = msgspec.structs.replace(
        now.figures,
        uptime_s=before.figures.uptime_s + 2.0,
        messages=msgspec.structs.replace(now.figures.messages, published=1_000 + 500),
    )
    later = msgspec.structs.replace(now, figures=figures)

    text = "\n".join(screen(later, before, "a", 5, 200))
    anew = "\n".join(screen(before, later, "a", 5, 200))

    assert "published 250/s" in text
    assert "within 2.0 s" in text
    assert "since its start" in anew


def test_quantiles_are_those_of_prometheus() -> None:
    """Within a bucket values lie evenly; without a value there is none."""
    histogram = HistogramView((1.0, 2.0, 4.0), (0, 5, 10, 10), 20.0)

    assert quantile(histogram, 0.5) == 2.0
    assert quantile(histogram, 0.75) == 3.0
    assert quantile(HistogramView((1.0,), (0, 3), 9.0), 0.5) == 1.0
    assert quantile(since_then(histogram, histogram), 0.5) is None


def test_text_is_cut_by_the_columns_that_it_takes() -> None:
    """Wide letters take two, marks above a letter none."""
    assert cut("orders", 6) == "orders"
    assert cut("orders.eu", 6) == "order…"
    assert width_of("日本") == 4
    assert cut("日本語", 5) == "日本…"
    assert width_of("e\u0301") == 1
    assert shown("a\x1b[2J\u202eb") == "a?[2J?b"
