"""The log as JSON: what becomes of an event, that each line is whole, and what a daemon writes."""

from __future__ import annotations

import ast
import json
import logging
import os
import re
import signal
import subprocess
import sys
from typing import Any

import pytest
from daemons import ROOT, running, until
from hypothesis import given
from hypothesis import strategies as st

from clevrd.json_log import JsonFormatter, event_of
from clevrd.logs import MAX_LINE_BYTES

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


LEVELS = {"debug", "info", "warning", "error", "exception", "critical", "log"}


def record(text: Any, *values: Any, **fields: Any) -> logging.LogRecord:
    """Return a warning of the daemon's, written at time 0.25."""
    found = logging.LogRecord("clevrd.hub", logging.WARNING, "hub.py", 7, text, values, None)
    found.__dict__.update({"created": 0.25, **fields})
    return found


def line_of(text: Any, *values: Any, for_journal: bool = False, **fields: Any) -> str:
    """Return the line of such a warning."""
    return JsonFormatter(for_journal=for_journal).format(record(text, *values, **fields))


def test_event_is_an_object_with_its_values() -> None:
    """Numbers stay numbers, texts are not quoted twice, and the time is RFC 3339 in UTC."""
    line = line_of("window changed from=%d to=%r share=%.1f%% why=%s", 5, "a b", 12.345, None)

    assert json.loads(line) == {
        "time": "1970-01-01T00:00:00.250Z",
        "level": "warning",
        "event": "window changed",
        "from": 5,
        "to": "a b",
        "share": 12.3,
        "why": None,
    }


def test_line_for_the_journal_keeps_its_priority() -> None:
    """So `journalctl -p warning` finds it; journald takes the prefix off."""
    assert line_of("listening", for_journal=True).startswith('<4>{"time":')


def test_value_among_the_words_is_a_part_of_the_event() -> None:
    """The values behind it are fields all the same; a text that is none stays whole."""
    assert event_of(record("operator %s by=%r", "clears", "k")) == {
        "event": "operator clears",
        "by": "k",
    }
    assert event_of(record("a=%d is more; taking %d", 2, 1)) == {"event": "a=2 is more; taking 1"}


def test_line_of_a_library_names_it() -> None:
    """Its text is the event, whatever its form."""
    found = json.loads(line_of("%s closed", "connection", name="asyncio"))

    assert (found["event"], found["logger"]) == ("connection closed", "asyncio")


def test_value_can_not_pass_for_a_field_of_every_line() -> None:
    """A value called time or level gets another name."""
    assert event_of(record("slow time=%s", 3)) == {"event": "slow", "time_": 3}


def test_traceback_is_one_field_of_a_line() -> None:
    """It is cut in its middle, so that the line is whole JSON within its bound."""
    try:
        raise ValueError("x\n" * 40_000)
    except ValueError:
        line = line_of("failed", exc_info=sys.exc_info())

    assert len(line.encode()) <= MAX_LINE_BYTES
    assert "\n" not in line
    assert json.loads(line)["error"].startswith("Traceback")


@given(st.lists(st.one_of(st.text(), st.integers(), st.floats(allow_nan=False)), max_size=3))
def test_line_is_one_object_whatever_is_logged(values: list[Any]) -> None:
    """No client's words make a second line, break the object, or move a cursor."""
    text = "".join(f" v{number}=%s" for number in range(len(values)))

    line = line_of(f"event{text}", *values)

    assert line.isprintable() or not any(
        ord(letter) < 0x20 or 0x7F <= ord(letter) < 0xA0 for letter in line
    )
    assert json.loads(line)["event"] == "event"


def logged_texts(*, constant: bool = True) -> list[str]:
    """Return the text of each event that the daemon's code logs, or the files of those without."""
    found = []
    package = ROOT / "clevrd"
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = node.func.value
            if not (isinstance(owner, ast.Name) and owner.id == "log"):
                continue
            texts = [each.value for each in node.args[:2] if isinstance(each, ast.Constant)]
            said = [each for each in texts if isinstance(each, str)]
            if constant:
                found += said
            elif not said and node.func.attr in LEVELS:
                found.append(str(path.relative_to(package)))
    return found


def test_each_event_of_the_daemon_has_fields() -> None:
    """Nearly each has values behind their names; few are sentences by themselves."""
    texts = [text for text in logged_texts() if "%" in text.replace("%%", "")]
    whole = [
        text
        for text in texts
        if len(event_of(record(text, *[1] * text.replace("%%", "").count("%")))) == 1
    ]

    assert len(texts) > 60
    assert len(whole) < len(texts) / 8, whole


# Values that stand among the words of an event: a few words of the code's own, whole sentences, and
# commands to copy.
WORDS = {
    "%s",
    "%s refused status=%d delay_s=%.2f",
    "%s interrupted delay_s=%.2f why=%s",
    "operator %s by=%r tenant=%s topic=%r",
    "source %s name=%s",
    "source %s name=%s why=%s",
    "sockets not taken: LISTEN_FDS is no whole number up to %d value=%.100r",
    "try subscribe:  %s subscribe demo --url %s",
    "try publish:    %s publish demo '{\"hello\":1}' --url %s",
    "try look:       curl %s/metrics",
}


def test_every_other_value_of_an_event_is_a_whole_field() -> None:
    """With a name, and nothing that belongs to it behind it but a percent sign."""
    conversion = r"%[-#0 +]*\d*(?:\.\d+)?[a-zA-Z]"
    field = re.compile(rf"(?<![\w.])[A-Za-z_][\w.]*={conversion}(?:%%)?(?=[ ;,]|\Z)")
    texts = set(logged_texts())

    mixed = [text for text in texts - WORDS if "%" in field.sub("", text)]
    late = [text for text in texts if field.search(text) and event_of(whole(text)).keys() <= EVENT]

    assert not mixed
    assert not late
    assert texts >= WORDS


EVENT = {"event"}


def whole(text: str) -> logging.LogRecord:
    """Return a record of such an event, with a number for each of its values."""
    return record(text, *[1] * text.replace("%%", "").count("%"))


def test_text_that_is_made_at_run_time_is_rare() -> None:
    """Where the code has no constant text, no other test sees it."""
    assert logged_texts(constant=False) == ["tls/server.py"]


async def test_refused_page_is_an_event_with_fields(caplog: pytest.LogCaptureFixture) -> None:
    """A program finds the page by its name, as the browser said it."""
    odd = "https://ä.example"
    async with running() as daemon:
        for origin in (odd, "https://a.example"):
            url = f"{daemon.url}/publish"
            async with daemon.http.post(url, data=b"{}", headers={"Origin": origin}) as answer:
                assert answer.status == 403
        headers = {"Host": f"a.example:{daemon.port}"}
        async with daemon.http.get(f"{daemon.url}/metrics", headers=headers) as answer:
            assert answer.status == 403

    events = [event_of(each) for each in caplog.records if "page refused" in each.getMessage()]
    assert [each["event"] for each in events] == ["page refused"] * 3
    assert [each["origin"] for each in events[:2]] == [odd, "https://a.example"]
    assert events[0]["asked_host"] == f"127.0.0.1:{daemon.port}"
    assert events[0]["hint"] == "allowed_origins lists the pages that may ask"
    assert events[2]["host"] == events[2]["asked_host"] == f"a.example:{daemon.port}"
    assert "page refused origin='https://\\xe4.example'" in caplog.text


# --- a daemon --------------------------------------------------------------------------------


def test_daemon_writes_json_alone() -> None:
    """From its start to its stop; a program finds the address that it listens at."""
    with subprocess.Popen(
        [sys.executable, "-m", "clevrd", "serve", "--log-format", "json"],
        cwd=ROOT,
        env={**os.environ, "ADDRESS": "127.0.0.1:0"},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stderr is not None
            lines = []
            for line in process.stderr:
                lines.append(json.loads(line))
                if lines[-1]["event"] == "listening":
                    process.send_signal(signal.SIGTERM)
            code = process.wait(20)
        finally:
            process.kill()

    (listening,) = [line for line in lines if line["event"] == "listening"]
    assert code == 0
    assert listening["address"].startswith("http://127.0.0.1:")
    assert {line["level"] for line in lines} <= {"info", "warning"}
    assert any("stop" in line["event"] for line in lines[lines.index(listening) :])


@pytest.mark.parametrize("raw_paths", [True, False], ids=["raw", "aiohttp"])
@pytest.mark.parametrize("is_named", [True, False], ids=["named", "unnamed"])
async def test_bug_is_logged_with_what_names_its_request(
    raw_paths: bool,
    is_named: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The answer has the same id; what a client sends in its place that is none is not logged."""
    headers = {"X-Request-ID": "order/42", "traceparent": TRACEPARENT}
    if not is_named:
        headers = {"X-Request-ID": "a b", "traceparent": "00-zz"}
    async with running(raw_paths=raw_paths) as daemon:

        def fail(*_: Any) -> Any:
            raise KeyError("a bug")

        monkeypatch.setattr(daemon.hub, "check_rate", fail)
        body = b'{"topic":"t","data":1}'
        async with daemon.http.post(f"{daemon.url}/publish", data=body, headers=headers) as answer:
            status, said = answer.status, await answer.json()
            request_id = answer.headers["X-Request-ID"]

    (failed,) = [each for each in caplog.records if each.message.startswith("request failed")]
    fields = event_of(failed)
    assert (status, said["code"]) == (500, "internal_error")
    assert said["error"].endswith(f"it has been logged as {request_id}.")
    assert fields["request_id"] == request_id
    assert (request_id == "order/42") is is_named
    assert fields["traceparent"] == (TRACEPARENT if is_named else "")
    assert "a bug" in str(failed.exc_info)


@pytest.mark.parametrize("waits", [False, True], ids=["at once", "later"])
@pytest.mark.parametrize(
    ("path", "kind"), [("/publish", ""), ("/ws", '"type":"publish",')], ids=["publish", "ws"]
)
async def test_bug_on_a_socket_is_logged_with_what_names_its_handshake(
    path: str,
    kind: str,
    waits: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The client is told by the close code, is answered what went well, and is held by nothing."""
    headers = {"X-Request-ID": "socket/42", "traceparent": TRACEPARENT}
    async with running() as daemon:
        good, bad = (f'{{{kind}"topic":"t","data":1,"ref":{ref}}}' for ref in (1, 2))
        real = daemon.hub.publish_run

        def fail(topic: Any, run: Any) -> Any:
            if run[-1].ref == 2:
                raise KeyError("a bug")
            return real(topic, run)

        monkeypatch.setattr(daemon.hub, "publish_run", fail)
        url, protocols = f"{daemon.url}{path}", ("clevrd.v1",)
        async with daemon.http.ws_connect(url, headers=headers, protocols=protocols) as socket:
            await socket.send_str(good)
            answered = await socket.receive_json()
            if waits:
                # What waits for its time is published by a task of its own.
                monkeypatch.setattr(daemon.hub, "must_wait", lambda _: True)
            await socket.send_str(bad)
            await socket.receive()
            closed = socket.close_code
        counted = dict(daemon.hub.counters.refused)
        await until(lambda: len(daemon.server.connections) == 0)
        left_bytes = daemon.hub.input_budget.used_bytes

    (failed,) = [each for each in caplog.records if each.message.startswith("request failed")]
    fields = event_of(failed)
    assert answered["ref"] == 1
    assert closed == 1011
    assert (fields["request_id"], fields["traceparent"]) == ("socket/42", TRACEPARENT)
    assert fields["path"] == path
    assert counted == {"internal_error": 1}
    assert left_bytes == 0
