"""The client without asyncio, with a real daemon: the same as the other one, from threads, scripts,
forked processes and notebooks, and nothing of it is left behind.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import math
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from queue import Queue
from typing import Any

import pytest
from daemons import ROOT

import clevrd.client
from clevrd.client import sync
from clevrd.client.intake import MAX_ITEMS
from clevrd.client.sync import (
    BadData,
    BadRecord,
    Client,
    Gap,
    Message,
    Misuse,
    Outgoing,
    Position,
    Published,
    Refusal,
    Refused,
    Subscription,
    Unreachable,
)
from clevrd.testing import DaemonThread, daemon_in_thread


@pytest.fixture
def daemon() -> Iterator[DaemonThread]:
    """Return a daemon."""
    with daemon_in_thread() as started:
        yield started


@pytest.fixture
def client(daemon: DaemonThread) -> Iterator[Client]:
    """Return an open client of it."""
    with Client(daemon.url) as opened:
        yield opened


def own_threads() -> set[str]:
    """Return the names of the client's threads that there are."""
    names = {thread.name for thread in threading.enumerate()}
    return {name for name in names if name.startswith("clevrd-client")}


def data_of(items: Any, count: int) -> list[Any]:
    """Return the data of the next ``count`` messages, by a loop that is then left."""
    taken: list[Any] = []
    for item in items:
        assert isinstance(item, Message)
        taken.append(item.data)
        if len(taken) == count:
            break
    return taken


def in_thread(work: Callable[[], Any]) -> Queue[Any]:
    """Run ``work`` in a thread; the queue gets what it returns or raises."""
    outcome: Queue[Any] = Queue(1)

    def run() -> None:
        try:
            outcome.put(work())
        except BaseException as error:
            outcome.put(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome


# --- the same names ---


def test_names_are_those_of_the_client_for_asyncio() -> None:
    """Who knows one knows the other."""
    assert sync.__all__ == clevrd.client.__all__


@pytest.mark.parametrize(
    ("ours", "theirs", "own"),
    [
        (Client, clevrd.client.Client, set()),
        (Subscription, clevrd.client.Subscription, {"get"}),
        (sync.Publisher, clevrd.client.Publisher, set()),
        (sync.History, clevrd.client.History, set()),
    ],
)
def test_methods_and_their_arguments_are_too(ours: Any, theirs: Any, own: set[str]) -> None:
    """All that users call; what only tests and the two clients call is not meant."""
    internal = {"publish_encoded", "before", "keep", "leave", "only_topic", "aclose"}
    internal |= {"topics_page", "read_page"}

    def public(kind: Any) -> dict[str, Any]:
        return {name: each for name, each in vars(kind).items() if not name.startswith("_")}

    assert public(ours).keys() == (public(theirs).keys() - internal) | own
    for name, method in public(ours).items():
        if callable(method) and name not in own | {"close"}:
            mine = inspect.signature(method).parameters
            assert mine == inspect.signature(public(theirs)[name]).parameters
    injected = {"random", "sleep", "clock"}
    if ours is Client:
        made = inspect.signature(theirs).parameters
        assert inspect.signature(ours).parameters.keys() == made.keys() - injected


# --- what it does ---


def test_messages_and_answers_are_those_of_the_client_for_asyncio(client: Client) -> None:
    """One of each call."""
    answer = client.publish("t", {"n": 1}, key="k", idempotency_key="x")
    repeated = client.publish("t", {"n": 1}, key="k", idempotency_key="x")
    client.publish_raw("t", '{"n":2}')
    results = client.publish_batch([("t", 3), Outgoing("t", 4), ("t", None)])
    with client.subscribe("t", since="all") as items:
        taken = data_of(items, 4)
        position = items.position
        is_connected = items.is_connected

    assert isinstance(answer, Published)
    assert (answer.offset, repeated.offset, repeated.repeated) == (1, 1, True)
    assert [type(result) for result in results] == [Published, Published, Refusal]
    assert taken == [{"n": 1}, {"n": 2}, 3, 4]
    assert position == Position(answer.epoch, 4)
    assert (is_connected, items.is_connected, client.repeated_messages) == (True, False, 0)


def test_questions_about_topics_are_those_of_the_client_for_asyncio(client: Client) -> None:
    """A history over its pages, which there are, the readers of one, and to clear it."""
    client.publish_batch([("t", number) for number in range(1500)])
    client.publish("u", 1, ttl_s=60)
    items = client.history("t")
    with client.subscribe("t", subscriber_id="ann"):
        info = client.topic("t")
    seen = data_of(items, 1100)
    position = items.position
    rest = [item.data for item in items if isinstance(item, Message)]
    listed = list(client.topics())
    (short,) = client.history("u")
    cleared = client.clear("t")

    assert [*seen, *rest] == list(range(1500))
    assert position == Position(info.epoch, 1100)
    assert [each.id for each in info.presence.ids] == ["ann"]
    assert [(each.topic, each.offset) for each in listed] == [("t", 1500), ("u", 1)]
    assert isinstance(short, Message)
    assert short.ttl_s == 60
    assert cleared.offset == 0
    assert list(client.history("t", position=cleared)) == []
    with pytest.raises(Refused, match="There is no such topic"):
        client.topic("v")


@pytest.mark.parametrize("headers", [True, False])
def test_headers_of_a_history_are_those_that_were_asked_for(client: Client, headers: bool) -> None:
    """As in the client for asyncio."""
    client.publish("t", 1, headers={"ce-type": "paid"})

    (message,) = client.history("t", headers=headers)

    assert isinstance(message, Message)
    assert message.headers == ({"ce-type": "paid"} if headers else {})


def test_threads_share_a_history(client: Client) -> None:
    """Each item comes to one of them."""
    client.publish_batch([("t", number) for number in range(3000)])
    items = client.history("t")
    outcomes = [in_thread(lambda: list(items)) for _ in range(4)]

    taken = [item for outcome in outcomes for item in outcome.get(timeout=10)]

    assert sorted(item.data for item in taken) == list(range(3000))


def test_history_of_a_forked_processs_parent_is_not_read(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread of the parent may have held its lock for ever."""
    items = client.history("t")
    assert client._running is not None
    monkeypatch.setattr(client._running.thread, "is_forked", True)

    with pytest.raises(Misuse, match="made before a fork; make another one in the child"):
        next(items)
    monkeypatch.undo()


def test_stream_of_publishes_waits_for_its_answers(client: Client) -> None:
    """A receipt's answer can be waited for; the others are by the end of the block."""
    with client.publisher(max_in_flight=4) as publisher:
        first = publisher.publish("t", 0)
        for number in range(1, 50):
            publisher.publish_raw("t", str(number))
        publisher.flush()
        offset = first.result(timeout_s=5).offset
    with client.subscribe("t", since="all") as items:
        taken = data_of(items, 50)

    assert (offset, taken) == (1, list(range(50)))
    with pytest.raises(Misuse, match="Publisher is closed"):
        publisher.publish("t", 1)


def test_gaps_are_items_and_positions_go_on(client: Client, daemon: DaemonThread) -> None:
    """Over connections that are cut, and with several topics."""
    with client.subscribe("a", patterns=["p.*"], last=0) as items:
        client.publish("a", 1)
        assert data_of(items, 1) == [1]
        daemon.gap("a", 2)
        daemon.cut()
        client.publish("p.x", 2)
        client.publish("a", 3)
        taken = [next(iter(items)) for _ in range(3)]
        positions = items.positions

    found = [(item.topic, type(item)) for item in taken]
    assert sorted(found, key=str) == [("a", Gap), ("a", Message), ("p.x", Message)]
    assert {topic: position.offset for topic, position in positions.items()} == {"a": 4, "p.x": 1}
    client.publish("a", 5)
    with client.subscribe("a", patterns=["p.*"], positions=positions) as again:
        assert data_of(again, 1) == [5]


def test_position_is_that_of_what_was_taken_and_not_of_what_was_read(client: Client) -> None:
    """The loop reads ahead, and who stores the position then misses nothing of it."""
    client.publish_batch([("t", number) for number in range(200)])
    client.publish_batch([("u", number) for number in range(200)])

    with client.subscribe("t", since="all") as items:
        seen = [
            (item.offset, items.position.offset)
            for _, item in zip(range(150), items, strict=False)
            if isinstance(item, Message) and items.position is not None
        ]
    with client.subscribe("t", "u", since="all") as many:
        had: dict[str, int] = {}
        for item in many:
            assert isinstance(item, Message)
            had[item.topic] = item.offset
            told = {topic: position.offset for topic, position in many.positions.items()}
            assert {topic: told.get(topic, 0) or None for topic in had} == had
            if had == {"t": 200, "u": 200}:
                break

    assert seen == [(number, number) for number in range(1, 151)]
    assert items.position is not None
    assert items.position.offset == 150


def test_slow_thread_is_a_slow_reader_to_the_daemon(client: Client, daemon: DaemonThread) -> None:
    """What it does not take is not read, but for what is read ahead, and is lost as announced."""
    with client.subscribe("t", last=0, buffer=100) as items:
        text = "x" * 60_000
        client.publish_batch([("t", text) for _ in range(400)])
        intake = items._intake
        held = len(intake._waiting), intake._bytes
        lost = 0
        for item in items:
            lost += item.count or 0 if isinstance(item, Gap) else 0
            offset = item.last if isinstance(item, Gap) else item.offset
            if offset == 400:
                break

    assert held[0] <= MAX_ITEMS
    assert held[1] <= (1 << 20) + 70_000
    assert lost > 0


def test_wait_may_have_an_end(client: Client) -> None:
    """And loses nothing by it."""
    with client.subscribe("t", last=0) as items:
        nothing = items.get(timeout_s=0)
        client.publish("t", 1)
        something = items.get(timeout_s=10)
    outside = client.subscribe("t", last=1)
    also = outside.get(timeout_s=10)
    outside.close()

    assert nothing is None
    assert isinstance(something, Message)
    assert isinstance(also, Message)
    with pytest.raises(Misuse, match="has ended"):
        outside.get()


# --- loops, as of the client for asyncio ---


def no_subscribers(daemon: DaemonThread, topic: str = "t") -> None:
    """Wait until nobody is subscribed."""

    async def wait() -> None:
        while daemon._daemon._subscribers(topic):  # noqa: ASYNC110
            await asyncio.sleep(0.002)

    daemon.call(wait())


def fail_in(items: Subscription) -> None:
    """Leave a loop by an error, which keeps this function's frame."""
    for _ in items:
        raise ZeroDivisionError


def test_plain_loop_that_is_left_lets_go(client: Client, daemon: DaemonThread) -> None:
    """However it is left; another one goes on behind it."""
    client.publish_batch([("t", number) for number in range(200)])
    items = client.subscribe("t", since="all")

    first = data_of(items, 3)
    no_subscribers(daemon)
    with pytest.raises(ZeroDivisionError) as caught:
        fail_in(items)
    no_subscribers(daemon)
    rest = data_of(items, 196)
    no_subscribers(daemon)

    assert caught.value.__traceback__ is not None
    assert [*first, 3, *rest] == list(range(200))


def test_loop_in_a_block_leaves_the_connection_to_the_block(
    client: Client, daemon: DaemonThread
) -> None:
    """Who entered or opened it closes it."""
    with client.subscribe("t", last=0) as items:
        client.publish_batch([("t", 1), ("t", 2)])
        taken = [data_of(items, 1), data_of(items, 1)]
        was_connected = items.is_connected
    no_subscribers(daemon)

    assert (taken, was_connected) == ([[1], [2]], True)


def test_subscription_that_nobody_holds_is_closed(client: Client, daemon: DaemonThread) -> None:
    """Also where it was opened, and never closed."""
    client.subscribe("t").open()
    gc.collect()

    no_subscribers(daemon)


def test_loop_that_is_freed_during_a_call_does_not_wait_for_it(client: Client) -> None:
    """Python frees cycles wherever it happens to, also while the thread is given work."""
    client.publish("t", 1)
    loop = iter(client.subscribe("t", last=1))
    assert isinstance(next(loop), Message)
    running = client._running
    assert running is not None

    with running.thread._lock:
        del loop

    assert client.publish("t", 2).offset == 2


# --- errors ---


def test_errors_are_those_of_the_client_for_asyncio(client: Client) -> None:
    """Raised in the thread that calls, with its frames."""
    with pytest.raises(BadRecord, match="data holds nan"):
        client.publish("t", float("nan"))
    with pytest.raises(Refused, match="The topic is empty"):
        client.publish("", 1)
    with pytest.raises(TypeError, match="The topic is text"):
        client.publish(5, 1)  # type: ignore[arg-type]
    with pytest.raises(BadRecord, match="Item 1 of the batch"):
        client.publish_batch([("t", 1), ("t", object())])
    with pytest.raises(TypeError, match="not an int"):
        client.publish_batch(5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="how long ago"):
        client.subscribe("t", since=timedelta(-1))
    with pytest.raises(Refused, match="can match everything"):
        client.subscribe(patterns=["**"]).open()
    with pytest.raises(Refused, match="can match everything"):
        list(client.subscribe(patterns=["**"]))
    with pytest.raises(ValueError, match="max_in_flight"):
        client.publisher(max_in_flight=0)
    client.publish_raw("t", "1e999")
    item = next(iter(client.subscribe("t", last=1)))
    with pytest.raises(BadData, match="The data of message"):
        _ = item.data  # type: ignore[union-attr]


def test_failed_item_of_a_batch_tells_what_was_published(client: Client) -> None:
    """Items come from the caller's own generator, in the caller's thread."""
    threads = []

    def items() -> Iterator[tuple[str, Any]]:
        for data in (1, 2, 3, object()):
            threads.append(threading.current_thread())
            yield "t", data

    with pytest.raises(BadRecord) as caught:
        client.publish_batch(items(), max_items=2)

    assert [result.offset for result in caught.value.results] == [1, 2]
    assert set(threads) == {threading.current_thread()}


def test_server_that_is_none_is_told() -> None:
    """In the sentences of the client for asyncio."""
    with Client("http://127.0.0.1:1") as client:
        with pytest.raises(Unreachable, match="Can't reach"):
            client.publish("t", 1)
        with pytest.raises(Unreachable, match="Can't reach"):
            next(iter(client.subscribe("t")))
        with pytest.raises(Unreachable, match="Can't reach"):
            client.publisher().open()


def test_wrong_arguments_are_told_when_it_is_made() -> None:
    """Before there is a thread."""
    with pytest.raises(clevrd.client.BadUrl, match="must be like"):
        Client("nowhere")

    assert own_threads() == set()


# --- opening, closing, and what is left ---


def test_client_that_is_not_open_says_so(daemon: DaemonThread) -> None:
    """Before, and after; it may be opened again."""
    client = Client(daemon.url)
    calls: list[Callable[[], Any]] = [
        lambda: client.publish("t", 1),
        lambda: client.publish_raw("t", "1"),
        lambda: client.publish_batch([("t", 1)]),
        lambda: client.subscribe("t"),
        client.publisher,
    ]

    for call in calls:
        with pytest.raises(Misuse, match="Client is not open; use it in 'with', or open"):
            call()
    assert client.open() is client.open()
    items = client.subscribe("t")
    publisher = client.publisher()
    client.close()
    client.close()
    for call in calls:
        with pytest.raises(Misuse, match="Client is closed; open"):
            call()
    with pytest.raises(Misuse, match="Client is closed"):
        list(items)
    with pytest.raises(Unreachable, match="was closed"):
        publisher.open()
    assert (items.position, own_threads()) == (None, set())
    with client:
        assert client.publish("t", 1).offset == 1


def test_close_ends_what_other_threads_wait_for(daemon: DaemonThread) -> None:
    """Loops end, calls say that the client was closed, and no thread is left."""
    client = Client(daemon.url).open()
    opened = client.subscribe("t", last=0).open()
    waiting = [
        in_thread(lambda: list(opened)),
        in_thread(lambda: list(client.subscribe("t", last=0))),
        in_thread(lambda: client.subscribe("t", last=0).get()),
    ]
    daemon.wait_for_subscribers("t", 3)

    client.close()

    assert [outcome.get(timeout=10) for outcome in waiting] == [[], [], None]
    assert own_threads() == set()


def test_call_that_is_under_way_when_it_is_closed_says_so() -> None:
    """Nobody knows whether the message arrived."""
    listener = socket.create_server(("127.0.0.1", 0))
    client = Client(f"http://127.0.0.1:{listener.getsockname()[1]}").open()
    publishing = in_thread(lambda: client.publish("t", 1))
    connection, _ = listener.accept()
    connection.recv(1)

    client.close()

    error = publishing.get(timeout=10)
    assert isinstance(error, Unreachable)
    assert error.may_have_arrived
    connection.close()
    listener.close()


def test_client_that_nobody_holds_ends_its_thread(daemon: DaemonThread) -> None:
    """Without a close; a subscription of it holds it."""
    items = Client(daemon.url).open().subscribe("t", last=0).open()
    gc.collect()
    daemon.publish("t", 1)
    taken = data_of(items, 1)
    threads = [thread for thread in threading.enumerate() if thread.name == "clevrd-client"]
    del items
    gc.collect()
    for thread in threads:
        thread.join(10)

    assert (taken, own_threads()) == ([1], set())


def test_threads_share_a_client(client: Client) -> None:
    """Publishing and reading at the same time; each item comes to one of the readers."""
    items = client.subscribe("t", last=0).open()
    publishing = [
        in_thread(lambda n=n: [client.publish("t", (n, m)).offset for m in range(50)])  # type: ignore[misc]
        for n in range(4)
    ]
    taken: Queue[Any] = Queue()

    def read() -> None:
        for item in items:
            assert isinstance(item, Message)
            taken.put(item.offset)

    reading = [in_thread(read) for _ in range(3)]
    offsets = sorted(offset for each in publishing for offset in each.get(timeout=20))
    seen = sorted(taken.get(timeout=20) for _ in range(200))
    items.close()

    assert offsets == seen == list(range(1, 201))
    assert [each.get(timeout=10) for each in reading] == [None, None, None]


async def test_notebook_with_a_loop_of_its_own_uses_it(daemon: DaemonThread) -> None:
    """The calling thread may run an event loop; it waits meanwhile, as any call does."""
    with Client(daemon.url) as client:
        client.publish("t", 1)
        assert data_of(client.subscribe("t", last=1), 1) == [1]


@pytest.mark.parametrize("timeout_s", ["x", -1, math.nan, True])
def test_time_that_is_none_closes_nothing(timeout_s: Any, client: Client) -> None:
    """It is refused before anything is done, by each call that waits for a time."""
    items = client.subscribe("t")
    with client.publisher() as publisher:
        receipt = publisher.publish("t", 1)
        for wait in (client.close, items.get, receipt.result):
            with pytest.raises((TypeError, ValueError), match="timeout_s is a number of seconds"):
                wait(timeout_s)

    assert client.publish("t", 1).offset == 2


@pytest.mark.parametrize("timeout_s", [math.inf, 1e300, 10**400])
def test_time_without_an_end_is_one(timeout_s: float, client: Client) -> None:
    """A thread can't wait for longer than some centuries."""
    items = client.subscribe("t", last=1)
    with client.publisher() as publisher:
        answer = publisher.publish("t", 1).result(timeout_s)
    item = items.get(timeout_s)
    client.close(timeout_s)

    assert answer.offset == 1
    assert isinstance(item, Message)
    assert own_threads() == set()


# --- processes ---


# Debug mode says on standard error when a callback took a tenth of a second, which is no fault of
# the client's on a busy machine. In names of its own: a filter would keep the program's alive.
NO_WORD_OF_SLOWNESS = """
exec(
    "import logging\\n"
    "is_wanted = lambda said: not str(said.msg).startswith('Executing')\\n"
    "logging.getLogger('asyncio').addFilter(is_wanted)",
    {},
)
"""


def script(code: str, url: str, **options: Any) -> subprocess.Popen[str]:
    """Start a program that has a client's module and a URL."""
    head = f"{NO_WORD_OF_SLOWNESS}from clevrd.client.sync import *\nimport os, sys\nURL = {url!r}\n"
    return subprocess.Popen(
        [sys.executable, "-X", "dev", "-W", "error", "-u", "-c", head + code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.parametrize(
    "code",
    [
        "items = Client(URL).open().subscribe('t', last=0).open()\nprint('done')",
        "p = Client(URL).open().publisher().open()\np.publish('t', 1)\nprint('done')",
        "client = Client(URL).open()\nitems = client.subscribe('t', last=0)\n"
        "it = iter(items)\nimport threading\n"
        "threading.Thread(target=next, args=(it, None), daemon=True).start()\nprint('done')",
    ],
)
def test_program_that_closes_nothing_ends(code: str, daemon: DaemonThread) -> None:
    """At once, and without a word."""
    with script(code, daemon.url) as program:
        out, error = program.communicate(timeout=20)

    assert (out, error, program.returncode) == ("done\n", "", 0)


@pytest.mark.parametrize(
    "code",
    [
        "with Client(URL) as c:\n    items = c.subscribe('t', last=0)\n    print('ready')\n"
        "    for item in items: pass",
        "with Client(URL) as c:\n    print('ready')\n    c.subscribe('t', last=0).get()",
    ],
)
def test_interrupt_ends_a_waiting_loop_at_once(code: str, daemon: DaemonThread) -> None:
    """Ctrl-C is KeyboardInterrupt where the program waits."""
    with script(code, daemon.url) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        daemon.wait_for_subscribers("t")
        program.send_signal(signal.SIGINT)
        _, error = program.communicate(timeout=20)

    assert error.rstrip().endswith("KeyboardInterrupt")
    assert error.count("Traceback") == 1
    no_subscribers(daemon)


def test_interrupt_ends_a_publish_at_once() -> None:
    """One that waits for an answer which does not come."""
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with script("with Client(URL) as c:\n    c.publish('t', 1)", url) as program:
        connection, _ = listener.accept()
        connection.recv(1)
        program.send_signal(signal.SIGINT)
        _, error = program.communicate(timeout=20)

    assert error.rstrip().endswith("KeyboardInterrupt")
    connection.close()
    listener.close()


FORKED = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)
client = Client(URL).open()
items = client.subscribe("t", last=0).open()
publisher = client.publisher().open()
client.publish("t", "parent")
children = []
for number in range(2):
    child = os.fork()
    if child == 0:
        told = []
        for use in (lambda: next(iter(items)), items.get, lambda: publisher.publish("t", 1)):
            try:
                use()
            except Misuse as error:
                told.append(str(error))
        items.close()
        answers = [client.publish("t", ["child", number, n]) for n in range(3)]
        assert not any(answer.repeated for answer in answers)
        assert all("made before a fork" in each for each in told) and len(told) == 3, told
        client.close()
        sys.exit(0)
    children.append(child)
codes = [os.waitpid(child, 0)[1] for child in children]
client.publish("t", "parent")
publisher.publish("t", "parent")
publisher.flush()
taken = [item.data for _, item in zip(range(9), items)]
print(codes, taken.count("parent"), sorted(map(str, taken))[:6])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="There is no fork here.")
def test_forked_process_has_a_client_of_its_own(daemon: DaemonThread) -> None:
    """As of Celery and gunicorn: each child publishes, and the parent's connections go on."""
    with script(FORKED, daemon.url) as program:
        out, error = program.communicate(timeout=25)

    children = [f"['child', {number}, {n}]" for number in range(2) for n in range(3)]
    assert (out, error) == (f"[0, 0] 3 {children}\n", "")


LAST_WORDS = """
import gc
class Holder:
    def __init__(self):
        self.client = Client(URL).open()
    def __del__(self):
        try:
            self.client.publish("t", 1)
        except Unreachable as error:
            print(error, error.may_have_arrived)
one = Holder()
one.itself = one
del one
gc.collect()
at_the_end = Holder()
"""


def test_publish_while_a_client_is_freed_is_told_as_not_sent(daemon: DaemonThread) -> None:
    """By the collector and at the program's end its client is closed first; nothing hangs."""
    with script(LAST_WORDS, daemon.url) as program:
        out, error = program.communicate(timeout=20)

    told = "The client was closed before the call. False\n"
    assert (out, error, program.returncode) == (told * 2, "", 0)


def test_thread_that_is_no_daemon_ends_with_its_subscription(daemon: DaemonThread) -> None:
    """Python waits for it at the program's end; closing what it reads lets it go."""
    code = (
        "import threading\nitems = Client(URL).open().subscribe('t', last=0).open()\n"
        "loop = iter(items)\n"
        "threading.Thread(target=lambda: print([*loop])).start()\nitems.close()"
    )
    with script(code, daemon.url) as program:
        out, error = program.communicate(timeout=20)

    assert (out, error, program.returncode) == ("[]\n", "", 0)


FORKED_AND_ENDED = """
import gc, warnings
warnings.simplefilter("ignore", DeprecationWarning)
client = Client(URL).open()
client.publish("t", "parent")
%s
child = os.fork()
if child == 0:
    %s
    sys.exit(0)
code = os.waitpid(child, 0)[1]
client.publish("t", "parent")
print(code)
"""
READING = "items = client.subscribe('t', last=0).open(); publisher = client.publisher().open()"
# The loop waits for room, so that nothing but the reader itself holds it.
FULL = "items = client.subscribe('t', last=0).open()\nfor n in range(200): client.publish('t', n)"
AGAIN = "if os.fork() == 0: client.publish('t', 2); sys.exit(0)\n    os.wait()"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="There is no fork here.")
@pytest.mark.parametrize(
    ("before", "child"),
    [
        ("", "pass"),
        ("", "client.publish('t', 1)"),
        ("", "client.publish('t', 1); client.close()"),
        ("", "del client; gc.collect()"),
        ("", f"client.publish('t', 1)\n    {AGAIN}"),
        (READING, "client.publish('t', 1)"),
        (READING, "del items, publisher, client; gc.collect()"),
        (FULL, "items = None; gc.collect()"),
        (f"{FULL}\nnext(iter(items))", "del items, client; gc.collect()"),
    ],
)
def test_forked_process_ends_without_a_word(before: str, child: str, daemon: DaemonThread) -> None:
    """Its copies of the parent's connections are neither closed nor told of as left open."""
    with script(FORKED_AND_ENDED % (before, child), daemon.url) as program:
        out, error = program.communicate(timeout=25)

    assert (out, error, program.returncode) == ("0\n", "", 0)


async def test_keys_of_a_forked_client_for_asyncio_are_not_its_parents() -> None:
    """A client that was made before the fork draws its keys when it is opened."""
    client = clevrd.client.Client("http://127.0.0.1:1")

    await client.open()
    first = client._new_key()
    await client.close()
    await client.open()
    second = client._new_key()
    await client.close()

    assert first.rpartition("-")[0] != second.rpartition("-")[0]
