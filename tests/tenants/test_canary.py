"""No secret goes astray: whatever is done with a credential, the daemon never shows it.

A key, a token and a ticket are used rightly and wrongly in every place against a daemon process
that logs all it can. Then they are searched in everything that the daemon let out.
"""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from pathlib import Path

import jwt
import pytest
import websockets.sync.client as websockets
from daemons import DaemonProcess, daemon_process
from keys import subprotocol
from websockets.typing import Subprotocol

from clevrd.cli import main
from clevrd.tenants.keys import digest_of, new_key

SIGNING_SECRET = "canary" * 8
KEY = new_key()
OTHER_KEY = new_key()
GOOD = json.dumps({"topic": "orders.eu", "data": 1})


class Heard:
    """A daemon, and everything that it has let out."""

    def __init__(self, daemon: DaemonProcess, file: Path, token: str) -> None:
        self.daemon = daemon
        self.file = file
        self.token = token
        self.tickets: list[str] = []
        self.answers: list[str] = []
        # Answers that may repeat a name which the same request has chosen.
        self.echoes: list[str] = []
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.daemon.process.stderr is not None
        self.log += self.daemon.process.stderr

    def ask(self, line: str, *fields: str, body: str = "", may_echo: bool = False) -> str:
        """Send one request as it is, and return all that comes back."""
        length = f"Content-Length: {len(body)}"
        head = "\r\n".join((f"{line} HTTP/1.1", "Host: x", "Connection: close", length, *fields))
        with socket.create_connection(("127.0.0.1", self.daemon.port), timeout=10) as peer:
            peer.sendall(f"{head}\r\n\r\n{body}".encode())
            answer = b""
            while part := peer.recv(65_536):
                answer += part
        (self.echoes if may_echo else self.answers).append(answer.decode())
        return answer.decode()

    def ticket(self) -> str:
        """Return a new ticket, whose answer is the only one that has it."""
        answer = self.ask(
            "POST /ticket", f"X-API-Key: {KEY.secret}", body='{"topics":["orders.eu"]}'
        )
        self.answers.pop()
        found: str = json.loads(answer.rpartition("\r\n\r\n")[2])["ticket"]
        self.tickets.append(found)
        return found

    def end(self) -> None:
        """Stop the daemon, and read its log to the end."""
        assert self.daemon.stop() == 0
        self._reader.join(10)


@pytest.fixture(params=[True, False], ids=["raw", "aiohttp"])
def heard(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Heard]:
    """A daemon that takes one key, and tokens, in all places."""
    (tmp_path / "jwt.secret").write_text(SIGNING_SECRET)
    (tmp_path / "jwt.secret").chmod(0o600)
    file = tmp_path / "clevrd.toml"
    file.write_text(
        '[auth]\nmode = "required"\nallow_query_token = true\n[[auth.jwt]]\nissuer = "me"\n'
        'audience = "clevrd"\nalgorithms = ["HS256"]\nsecret_file = "jwt.secret"\n'
        '[[tenants]]\nname = "acme"\n[[tenants.keys]]\nid = "web"\nadmin = true\n'
        f'sha256 = "{KEY.sha256}"\npublish = ["orders.*"]\nsubscribe = ["orders.*"]\n'
    )
    claims = {"iss": "me", "aud": "clevrd", "tenant": "acme", "exp": int(time.time()) + 600}
    token = jwt.encode(
        {**claims, "publish": ["orders.*"], "subscribe": ["orders.*"]},
        SIGNING_SECRET,
        algorithm="HS256",
    )
    variables = {
        "CLEVRD_CONFIG": str(file),
        "CLEVRD_LOG_LEVEL": "debug",
        "CLEVRD_RAW_PATHS": str(request.param).lower(),
    }
    with daemon_process(**variables) as daemon:
        yield Heard(daemon, file, token)


def use_rightly(heard: Heard, secret: str) -> None:
    """Publish and subscribe with ``secret`` in each place that may have it."""
    poll = "/subscribe?topic=orders.eu&poll=1&timeout=0"
    for field in (
        *(f"Authorization: Bearer {secret}", f"X-API-Key: {secret}"),
        f"Cookie: a=b; clevrd_token={secret}",
    ):
        assert " 200 " in heard.ask("POST /publish", field, body=GOOD)
        assert " 200 " in heard.ask(f"GET {poll}", field)
    assert " 200 " in heard.ask(f"GET {poll}&token={secret}")
    assert " 204 " in heard.ask("OPTIONS /publish", f"X-API-Key: {secret}")
    offered = [Subprotocol("clevrd.v1"), Subprotocol(subprotocol(secret))]
    for path in ("/publish", "/subscribe?topic=orders.eu", "/ws"):
        with websockets.connect(f"{heard.daemon.ws_url}{path}", subprotocols=offered) as socket:
            assert socket.response is not None
            heard.answers.append(str(socket.response.headers))
            if path == "/ws":
                for kind, token in (("", ""), ("", "x"), ("x", "")):
                    command = {"type": f"authenticate{kind}", "ref": 1, "token": secret + token}
                    socket.send(json.dumps(command))
                    heard.answers.append(str(socket.recv(timeout=10)))
                assert '"authenticated"' in heard.answers[-3]


def use_wrongly(heard: Heard, secret: str) -> None:
    """Make every mistake with ``secret``, or with what it looks like."""
    right, bearer = f"X-API-Key: {KEY.secret}", f"Authorization: Bearer {secret}"
    refused: list[tuple[str, ...]] = [
        (bearer, right),
        (bearer, bearer),
        (f"Authorization: Basic {secret}",),
        (f"Authorization: {secret}",),
        (f"{bearer}x",),
        (f"{bearer} {secret}",),
        (f"X-API-Key: {secret}\x01",),
        (f"X-API-Key: {secret * 100}",),
        (f"X-API-Key: {secret}, {secret}",),
        (f"Cookie: clevrd_token={secret}; clevrd_token={secret}",),
        (f"Cookie: clevrd_token={secret}x",),
        (f"Sec-WebSocket-Protocol: clevrd.bearer.{secret}",),
        (f"Sec-WebSocket-Protocol: {subprotocol(secret)}x",),
        (f"X-{secret}: 1 2",),
        (f"{secret} : 1",),
        (f"Accept: {secret}", f"Last-Event-ID: {secret}"),
    ]
    for fields in refused:
        heard.ask("POST /publish", *fields, body=GOOD)
        heard.ask("GET /subscribe?topic=orders.eu&poll=1&timeout=0", *fields)
        heard.ask("GET /metrics", *fields)
    for target in (
        *(f"token={secret}x", f"token={secret}&token={secret}", f"ticket={secret}x"),
        *(f"Token={secret}", f"last={secret}", f"policy={secret}", f"since={secret}"),
        *(f"offset={secret}", f"buffer={secret}", f"timeout={secret}", f"{secret}={secret}"),
    ):
        heard.ask(f"GET /subscribe?topic=orders.eu&poll=1&timeout=0&{target}", right)
    for line in (f"GET /{secret}", f"{secret} /publish", f"GET {secret}"):
        heard.ask(line, right)
    # A name that the sender chose is repeated to the sender, who is told that it is wrong.
    heard.ask(f"GET /subscribe?topic={secret}&poll=1&timeout=0", right, may_echo=True)
    heard.ask(f"GET /subscribe?pattern={secret}.*&poll=1&timeout=0", right, may_echo=True)
    heard.ask("POST /publish", right, f"X-Tenant-ID: {secret}", body=GOOD, may_echo=True)
    heard.ask("POST /publish", right, body=GOOD.replace("orders.eu", secret), may_echo=True)
    for body in (
        *(secret, f'"{secret}"', f'{{"{secret}"', f'{{"topic":"orders.eu","data":{secret}}}'),
        # Messages go to their readers, so these are in a topic that is not read here.
        f'{{"topic":"orders.us","data":1,"token":"{secret}"}}',
        f'{{"topic":"orders.us","data":1,"key":"{secret}"}}',
        f'{{"topic":"orders.us","data":"{secret}","idempotency_key":"{secret}"}}',
    ):
        heard.ask("POST /publish", right, body=body)
        heard.ask("POST /publish/batch", right, body=f"[{body}]")
        heard.ask("POST /ticket", right, body=body)


def needles(heard: Heard) -> dict[str, str]:
    """Return what may be found nowhere, by what it is."""
    token = heard.token
    found = {
        "key": KEY.secret,
        "other key": OTHER_KEY.secret,
        "key's digest": KEY.sha256,
        "signing secret": SIGNING_SECRET,
        "token": token,
        "token's signature": token.rpartition(".")[2],
        "token's digest": digest_of(token),
    }
    found |= {f"ticket {at}": each for at, each in enumerate(heard.tickets)}
    encoded = {
        f"{name} in base64": urlsafe_b64encode(text.encode()).decode().rstrip("=")
        for name, text in found.items()
    }
    return found | encoded


def test_no_secret_is_in_anything_that_the_daemon_lets_out(
    heard: Heard, capfd: pytest.CaptureFixture[str]
) -> None:
    """Logs, stacks, answers and their headers, metrics, and what the commands print."""
    poll = "GET /subscribe?topic=orders.eu&poll=1&timeout=0"
    for secret in (KEY.secret, heard.token):
        use_rightly(heard, secret)
        use_wrongly(heard, secret)
    use_wrongly(heard, OTHER_KEY.secret)
    ticket = heard.ticket()
    assert " 200 " in heard.ask(f"{poll}&ticket={ticket}")
    assert " 401 " in heard.ask(f"{poll}&ticket={ticket}")
    heard.ask(f"{poll}&ticket={ticket}&ticket={ticket}")
    use_wrongly(heard, heard.ticket())
    for kind in ("application/json", "text/plain", "application/openmetrics-text"):
        answer = heard.ask("GET /metrics", f"X-API-Key: {KEY.secret}", f"Accept: {kind}")
        assert " 200 " in answer
    assert KEY.sha256[:8] not in heard.ask("GET /config", f"X-API-Key: {KEY.secret}")
    heard.daemon.process.send_signal(signal.SIGQUIT)
    heard.daemon.process.send_signal(signal.SIGHUP)
    assert main(["checkconfig", "--config", str(heard.file)]) == 0
    heard.end()

    printed = "".join(capfd.readouterr())
    log = "".join(heard.log)
    assert "stack thread=" in log
    assert "INFO reloaded" in log
    assert any(" 401 " in answer for answer in heard.answers)
    places = {"the log": log, "checkconfig": printed, "answers": "\n".join(heard.answers)}
    leaks = [
        f"{name} in {place}: {text[max(0, text.index(needle) - 200) : text.index(needle)]!r}"
        for place, text in places.items()
        for name, needle in needles(heard).items()
        if needle in text
    ]
    assert leaks == []
