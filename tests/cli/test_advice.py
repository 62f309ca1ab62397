"""What a command says to do about a daemon that it can't talk to: the option that helps."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from daemons import DaemonProcess, daemon_process
from tls import make_pair

from clevrd import health_check
from clevrd.cli import main


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon whose certificate the system does not trust."""
    pair = make_pair(tmp_path_factory.mktemp("pair"))
    variables = {"CLEVRD_TLS_CERT_FILE": str(pair.cert), "CLEVRD_TLS_KEY_FILE": str(pair.key)}
    with daemon_process(**variables) as daemon:
        yield daemon


@pytest.mark.parametrize(
    "argv", [["publish", "t", "1"], ["history", "t"], ["checkconfig"], ["top", "--once"]]
)
def test_certificate_that_is_not_trusted_is_told_with_the_option_that_helps(
    argv: list[str], secure: DaemonProcess, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whatever command meets it."""
    code = main([*argv, "--url", f"https://localhost:{secure.port}"])

    errors = capfd.readouterr().err
    assert code == 69
    assert errors.endswith(" Trust it by --ca-file FILE.\n")
    assert errors.count("\n") == 1


def test_health_check_that_does_not_know_of_tls_says_how_to_tell_it(
    secure: DaemonProcess, capfd: pytest.CaptureFixture[str]
) -> None:
    """The daemon answers a request in the clear with the status 400 alone."""
    code = health_check.main(["--address", f"127.0.0.1:{secure.port}"])

    assert code == 1
    assert "400; if it speaks TLS, name its settings: --config FILE." in capfd.readouterr().err
