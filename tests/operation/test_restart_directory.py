"""The state directory: taken by one daemon, written whole or not at all, read once."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from conftest import FakeClock
from daemons import FakeStats
from fakes import FakeSink, at_once, totals_of
from world import ManualLoop

from clevrd.config import Config, load
from clevrd.core.beginning import After, Last, Since, resolve
from clevrd.core.message_ids import id_at
from clevrd.core.publish_request import PublishRequest
from clevrd.core.subscriber import Subscriber
from clevrd.core.topic import Topic
from clevrd.errors import CannotStart, ConfigError, Unavailable
from clevrd.hub import Hub, Published
from clevrd.listeners import Listeners
from clevrd.restart.directory import BAD, LOCK, NEW, STATE, SaveReport, StateDir
from clevrd.restart.format import StateReader, end_record, file_head
from clevrd.server import Server, Setup
from clevrd.tenants import Tenant

ACME = Tenant("acme")
NOON_US = 1_800_000_000_000_000
ENDLESS_S = float("inf")


def make_hub(wall_us: int = NOON_US, **settings: Any) -> Hub:
    """Return a hub whose wall clock stands at ``wall_us``."""
    return Hub(
        Config(**settings),
        cast(Any, ManualLoop()),
        stats=FakeStats(),
        wall_ns=lambda: wall_us * 1000,
    )


def publish(hub: Hub, name: str, count: int, data: bytes = b'"..."') -> Topic:
    """Publish ``count`` messages and return their topic."""
    topic = hub.topic(ACME, name)
    for _ in range(count):
        hub.publish(topic, PublishRequest(name, msgspec.Raw(data)))
    return topic


def frames_of(topic: Topic | None) -> list[bytes]:
    """Return the frames of a topic, which must be there."""
    assert topic is not None
    return topic.ring.frames(topic.ring.first - 1, topic.ring.head)


def save(state: StateDir, hub: Hub, until_s: float = ENDLESS_S) -> SaveReport:
    """Save as a daemon that stops does."""
    hub.seal()
    return state.save(hub.last_id_us, hub.saved(), until_s)


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    """Return a state directory of this daemon's."""
    opened = StateDir(str(tmp_path))
    opened.open()
    return opened


def restarted(state: StateDir, wall_us: int = NOON_US + 1_000_000, **settings: Any) -> Hub:
    """Return the hub of the next process."""
    hub = make_hub(wall_us, **settings)
    state.read(hub.restore)
    state.use_up()
    return hub


# --- there and back ------------------------------------------------------------------------------


def test_topics_go_on_where_they_were(state: StateDir) -> None:
    """Epoch, offsets, messages, when it was made; the next message has the next offset."""
    before = make_hub()
    topic = publish(before, "orders", 3)
    save(state, before)

    hub = restarted(state)
    again = hub.topics.find("acme", "orders")

    assert again is not None
    assert (again.epoch, again.head, again.created_at) == (topic.epoch, 3, topic.created_at)
    assert frames_of(again) == frames_of(topic)
    answer = hub.publish(again, PublishRequest("orders", msgspec.Raw(b"1")))
    assert isinstance(answer, Published)
    assert answer.offset == 4


def test_names_that_were_only_read_are_found_again(state: StateDir) -> None:
    """A reader of a quiet name resumes, whether it was there at the stop or had left before."""
    before = make_hub()
    left, read = (before.topic(ACME, name) for name in ("left", "read"))
    reader = Subscriber(FakeSink())
    before.subscribe(read, reader, Last(0))
    before.topics.evict_idle(1e6)
    assert [topic.name for topic in before.topics] == ["read"]
    save(state, before)

    hub = restarted(state)

    assert len(hub.topics) == 0
    for topic in (left, read):
        again = hub.topic(ACME, topic.name)
        assert (again.epoch, again.created_at, again.head) == (topic.epoch, topic.created_at, 0)


def test_published_goes_on_and_the_other_counters_begin_anew(state: StateDir) -> None:
    """A topic's published stays its newest offset; the sums count since the daemon's start."""
    before = make_hub()
    publish(before, "orders", 3)
    save(state, before)

    hub = restarted(state)
    (topic,) = hub.topics
    totals = totals_of(hub.topics)

    assert topic.published == topic.head == 3
    assert (totals.published, totals.offered, totals.delivered) == (0, 0, 0)
    assert at_once(hub.topics.busiest(1)) == [topic]


def test_ids_never_go_back_although_the_clock_did(state: StateDir) -> None:
    """An hour back over the restart: ids go on behind the last, also where topics begin."""
    before = make_hub()
    publish(before, "orders", 3)
    save(state, before)

    hub = restarted(state, NOON_US - 3_600_000_000)
    topic = publish(hub, "orders", 1)
    other = publish(hub, "new", 1)

    assert b'"id":"' + id_at(NOON_US + 3).encode() in frames_of(topic)[-1]
    # Who knows an id of an earlier life of this name is told that this is another.
    gap = resolve(other, Since(id_at(NOON_US + 2), is_time=False)).gap
    assert gap is not None
    assert gap.reason == "epoch"


def test_sealed_hub_takes_nothing() -> None:
    """A publish that waited too long is refused, not acknowledged and then forgotten."""
    hub = make_hub()
    topic = publish(hub, "orders", 3)

    hub.seal()

    with pytest.raises(Unavailable):
        publish(hub, "orders", 1)
    assert topic.head == 3


def test_what_was_saved_is_read_once(state: StateDir, tmp_path: Path) -> None:
    """It is gone before anything is served: after a crash there is nothing to go back to."""
    before = make_hub()
    publish(before, "orders", 3)
    save(state, before)

    first = restarted(state)
    second = restarted(state)

    assert (len(first.topics), len(second.topics)) == (1, 0)
    assert os.listdir(tmp_path) == [LOCK]


def test_file_is_for_the_daemon_alone(state: StateDir, tmp_path: Path) -> None:
    """Messages are their publishers' business, whatever the umask."""
    old = os.umask(0)
    try:
        save(state, make_hub())
    finally:
        os.umask(old)

    assert (tmp_path / STATE).stat().st_mode & 0o777 == 0o600


# --- when there is less room, or time ------------------------------------------------------------


def test_smaller_ring_keeps_the_newest(state: StateDir) -> None:
    """A position that the smaller ring no longer reaches is told what is missing, exactly."""
    before = make_hub()
    topic = publish(before, "orders", 300)
    save(state, before)

    hub = restarted(state, ring_messages=100)
    (again,) = hub.topics

    assert frames_of(again) == frames_of(topic)[-100:]
    start = resolve(again, After(150, topic.epoch))
    assert start.gap is not None
    assert (start.gap.first, start.gap.last, start.gap.count) == (151, 200, 50)


def test_fewer_topics_keep_the_last_used(state: StateDir, caplog: pytest.LogCaptureFixture) -> None:
    """Over the limit it is those that were used last that go on; how many don't is logged once."""
    before = make_hub()
    for second, name in enumerate(["a", "b", "c"]):
        cast(ManualLoop, before._loop).now_s = second
        publish(before, name, 2)
    save(state, before)

    hub = restarted(state, max_topics=2)

    assert [topic.name for topic in hub.topics] == ["c", "b"]
    (record,) = caplog.records
    assert "topics not restored count=1" in record.getMessage()
    assert "CLEVRD_MAX_TOPICS" in record.getMessage()


def test_rings_stay_within_memory(state: StateDir) -> None:
    """Less memory than before: messages go, of the least used topics first; no position does."""
    before = make_hub(max_memory_mb=64)
    for name in "abcd":
        publish(before, name, 25, b'"%b"' % (b"x" * 250_000))
    save(state, before)

    hub = restarted(state, max_memory_mb=16)

    assert hub.topics.ring_bytes == sum(topic.ring.size_bytes for topic in hub.topics)
    assert hub.topics.ring_bytes <= hub.topics.max_ring_bytes
    assert [topic.head for topic in hub.topics] == [25] * 4
    assert sum(len(topic.ring) for topic in hub.topics) >= 30
    assert {topic.ring.max_bytes for topic in hub.topics} == {64 << 20}


def test_restored_topics_are_forgotten_when_nobody_uses_them(state: StateDir) -> None:
    """As all others are: their time begins with the start."""
    before = make_hub()
    publish(before, "orders", 3)
    save(state, before)
    hub = restarted(state, topic_idle_s=10.0)

    cast(ManualLoop, hub._loop).now_s = 9.0
    hub.evict_idle_topics()
    early = len(hub.topics)
    cast(ManualLoop, hub._loop).now_s = 10.0
    hub.evict_idle_topics()

    assert (early, len(hub.topics), hub.topics.ring_bytes) == (1, 0, 0)


def test_short_time_costs_messages_and_no_position(tmp_path: Path) -> None:
    """When the time is up within a topic, it and the less used ones are positions only."""
    clock = FakeClock(0.0)

    def tick() -> float:
        return clock.advance(1.0)

    state = StateDir(str(tmp_path), tick)
    state.open()
    before = make_hub()
    for second, name in enumerate(["least used", "middle", "last used"]):
        cast(ManualLoop, before._loop).now_s = second
        publish(before, name, 5)

    report = save(state, before, until_s=5.0)
    hub = restarted(state)

    assert (report.topics, report.without_messages) == (3, 2)
    assert [len(topic.ring) for topic in hub.topics] == [5, 0, 0]
    assert [topic.head for topic in hub.topics] == [5, 5, 5]
    gone = hub.topics.find("acme", "middle")
    assert gone is not None
    assert resolve(gone, After(5, gone.epoch)).is_recovered
    start = resolve(gone, After(3, gone.epoch))
    assert start.gap is not None
    assert (start.gap.first, start.gap.count, start.gap.reason) == (4, 2, "retention")


def test_full_disk_costs_messages_and_no_position(
    state: StateDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the messages don't fit, the positions do."""
    before = make_hub()
    publish(before, "orders", 5, b'"%b"' % (b"x" * 100_000))
    fsync = os.fsync

    def fsync_on_a_full_disk(file: int) -> None:
        if os.fstat(file).st_size > 100_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    monkeypatch.setattr(os, "fsync", fsync_on_a_full_disk)

    report = save(state, before)

    assert (report.topics, report.without_messages) == (1, 1)
    assert [topic.head for topic in restarted(state).topics] == [5]


def test_failed_save_leaves_no_file_under_the_final_name(
    state: StateDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails at the last moment: new epochs, never half a file."""
    before = make_hub()
    publish(before, "orders", 5)

    def broken(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)

    with pytest.raises(OSError, match="Input/output error"):
        save(state, before)

    assert not (tmp_path / STATE).exists()


def test_rest_of_a_killed_save_is_removed(tmp_path: Path) -> None:
    """What was being written when the process was killed is not read."""
    (tmp_path / NEW).write_bytes(b"half")

    state = StateDir(str(tmp_path))
    state.open()

    assert not (tmp_path / NEW).exists()
    assert len(restarted(state).topics) == 0


# --- what can't be read --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not a state file"),
        (b"something else", "not a state file"),
        (file_head(b"m" * 16, 0)[:-1], "damaged"),
        (file_head(b"m" * 16, 0), "its end is missing"),
        (file_head(b"m" * 16, 0) + b"?" * 50 + end_record(b"m" * 16, 0), "1 of its records"),
    ],
)
def test_bad_file_is_put_aside_and_said_once(
    state: StateDir, tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes, why: str
) -> None:
    """One line says why and where it is; the one before it goes, and the daemon starts."""
    (tmp_path / BAD).write_bytes(b"an older one")
    (tmp_path / STATE).write_bytes(content)

    hub = restarted(state)

    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert why in record.getMessage()
    assert str(tmp_path / BAD) in record.getMessage()
    assert (tmp_path / BAD).read_bytes() == content
    assert not (tmp_path / STATE).exists()
    assert len(hub.topics) == 0


def test_damage_in_one_topic_leaves_the_others(
    state: StateDir, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They go on; it begins a new epoch; the file is kept for who wants to look."""
    before = make_hub()
    for name in ("a", "b", "c"):
        publish(before, name, 3)
    epochs = {topic.name: topic.epoch for topic in before.topics}
    save(state, before)
    content = bytearray((tmp_path / STATE).read_bytes())
    content[content.index(epochs["b"].encode())] ^= 1
    (tmp_path / STATE).write_bytes(content)

    hub = restarted(state)

    assert {topic.name: topic.epoch for topic in hub.topics} == {
        name: epoch for name, epoch in epochs.items() if name != "b"
    }
    assert hub.topic(ACME, "b").epoch != epochs["b"]
    assert "1 of its records are damaged" in caplog.text
    assert (tmp_path / BAD).exists()


def test_damaged_messages_leave_the_position(state: StateDir, tmp_path: Path) -> None:
    """The topic goes on in its epoch behind its newest offset; what is missing is told exactly."""
    before = make_hub()
    topic = publish(before, "a", 3, b'"find me"')
    save(state, before)
    path = tmp_path / STATE
    path.write_bytes(path.read_bytes().replace(b"find me", b"foundme", 1))

    (again,) = restarted(state).topics

    assert (again.epoch, again.head, len(again.ring)) == (topic.epoch, 3, 0)
    assert resolve(again, After(3, topic.epoch)).is_recovered
    gap = resolve(again, After(1, topic.epoch)).gap
    assert gap is not None
    assert (gap.first, gap.last, gap.reason) == (2, 3, "retention")


@pytest.mark.parametrize("kind", ["pipe", "link", "directory", "stranger's"])
def test_what_is_no_file_of_ours_is_put_aside(
    state: StateDir, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """Nothing is followed, waited for or read that the daemon did not write."""
    path = tmp_path / STATE
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to("/dev/zero")
    elif kind == "directory":
        path.mkdir()
    else:
        if os.geteuid():
            pytest.skip("only root can give a file away")
        save(state, make_hub())
        os.chown(path, 12_345, 12_345)

    restarted(state)

    assert not os.path.lexists(path)
    assert os.path.lexists(tmp_path / BAD)
    assert len(caplog.records) == 1


def test_unreadable_disk_is_survived(state: StateDir, caplog: pytest.LogCaptureFixture) -> None:
    """A bad sector costs what lies behind it; the daemon starts, and says so."""
    before = make_hub()
    publish(before, "a", 3)
    save(state, before)
    hub = make_hub()

    def failing(reader: StateReader) -> None:
        hub.restore(reader)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    state.read(failing)
    state.use_up()

    assert len(hub.topics) == 1
    assert "Input/output error" in caplog.text


def test_file_that_stays_there_stops_the_start(
    state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Served with it in place, a crash would bring old offsets back."""
    save(state, make_hub())

    def refused(_: str) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "unlink", refused)

    with pytest.raises(CannotStart, match="Permission denied; remove it"):
        restarted(state)


# --- the directory -------------------------------------------------------------------------------


def is_file(path: Path) -> str:
    (path / "file").write_text("")
    return str(path / "file")


@pytest.mark.parametrize(
    ("make_path", "why"),
    [
        (lambda path: str(path / "missing"), "No such file or directory; create it"),
        (is_file, "Not a directory; name a directory"),
        # Nobody can write there, not even root.
        (lambda _: "/proc/self", "No such file or directory|Permission denied"),
    ],
    ids=["missing", "file", "not writable"],
)
async def test_directory_that_cannot_be_used_stops_the_start(
    tmp_path: Path, make_path: Callable[[Path], str], why: str
) -> None:
    """One line at the start, with what to do, instead of a surprise at the stop."""
    path = make_path(tmp_path)
    server = Server(Setup(Config(address="127.0.0.1:0", state_dir=path)))

    with pytest.raises(CannotStart, match=why) as refusal:
        await server.start()

    assert path in str(refusal.value)
    assert "CLEVRD_STATE_DIR" in str(refusal.value)
    assert server.addresses == []


async def test_second_daemon_on_a_directory_is_refused(tmp_path: Path) -> None:
    """Two would take each other's topics; the sentence names the other one."""
    config = Config(address="127.0.0.1:0", state_dir=str(tmp_path), shutdown_timeout_s=2.0)
    first, second = Server(Setup(config)), Server(Setup(config))
    await first.start()

    with pytest.raises(CannotStart, match=rf"another clevrd's \(process {os.getpid()}\)"):
        await second.start()

    await first.stop()
    await second.start()
    await second.stop()


async def test_daemon_without_its_address_uses_nothing_up(tmp_path: Path) -> None:
    """A start that fails because the port is taken leaves what was saved for the next one."""
    state = StateDir(str(tmp_path))
    state.open()
    save(state, make_hub())
    state.close()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = Server(Setup(Config(address=f"127.0.0.1:{port}", state_dir=str(tmp_path))))

        with pytest.raises(CannotStart, match="in use"):
            await server.start()

    assert (tmp_path / STATE).exists()


async def test_daemon_that_cannot_listen_after_all_saves_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong after it was taken away, the next start has it."""
    hub = make_hub()
    publish(hub, "t", 3)
    state = StateDir(str(tmp_path))
    state.open()
    save(state, hub)
    state.close()
    server = Server(
        Setup(Config(address="127.0.0.1:0", state_dir=str(tmp_path)), stats=FakeStats())
    )

    async def refuse(_: Listeners) -> None:
        raise CannotStart("no")

    monkeypatch.setattr(Listeners, "open", refuse)

    with pytest.raises(CannotStart, match="no"):
        await server.start()

    state.open()
    assert len(restarted(state).topics) == 1


async def test_save_is_given_a_part_of_the_time_to_stop(tmp_path: Path) -> None:
    """What it takes, half of all at most; nothing where no state is kept."""
    for state_dir, timeout_s, expected in (("", 30.0, 0.0), (str(tmp_path), 1.0, 0.5)):
        server = Server(
            Setup(Config(address="127.0.0.1:0", state_dir=state_dir, shutdown_timeout_s=timeout_s))
        )
        await server.start()

        assert server.parts.restart.saving_takes_s() == expected

        await server.stop()


async def test_nothing_can_be_published_while_it_is_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A publish that was cut short and goes on meanwhile is refused: it would be forgotten."""
    server = Server(
        Setup(Config(address="127.0.0.1:0", state_dir=str(tmp_path), shutdown_timeout_s=2.0))
    )
    await server.start()
    topic = server.hub.topic(ACME, "t")
    state = server.parts.restart.directory
    assert state is not None
    refused: list[Exception] = []

    def save_beside_a_publish(*_: object) -> SaveReport:
        try:
            server.hub.publish(topic, PublishRequest("t", msgspec.Raw(b"1")))
        except Unavailable as error:
            refused.append(error)
        return SaveReport(1, 0, 0)

    monkeypatch.setattr(state, "save", save_beside_a_publish)

    await server.stop()

    assert len(refused) == 1
    assert topic.head == 0


async def test_disk_that_hangs_does_not_hold_the_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The process says that nothing was saved, and ends without the disk."""
    monkeypatch.setattr("clevrd.server.planned_restart.SAVE_GRACE_S", 0.1)
    server = Server(
        Setup(Config(address="127.0.0.1:0", state_dir=str(tmp_path), shutdown_timeout_s=0.1))
    )
    await server.start()
    assert server.parts.restart.directory is not None
    reading, writing = os.pipe()

    def hang(*_: object) -> SaveReport:
        os.read(reading, 1)
        return SaveReport(0, 0, 0)

    monkeypatch.setattr(server.parts.restart.directory, "save", hang)

    async with asyncio.timeout(5):
        await server.stop()

    os.write(writing, b"x")
    assert "state not saved reason='the disk took too long'" in caplog.text


# --- the setting ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["state", "./state", "~/state", "/var/lib\0/clevrd"])
def test_path_must_be_absolute(path: str) -> None:
    """A relative one would depend on where the daemon was started."""
    with pytest.raises(ConfigError, match="absolute path"):
        load({"state_dir": path}, {}, None)


@pytest.mark.parametrize("path", ["", "/var/lib/clevrd"])
def test_path_is_taken_as_it_is(path: str) -> None:
    """Empty is off."""
    assert load({"state_dir": path}, {}, None).config.state_dir == path
