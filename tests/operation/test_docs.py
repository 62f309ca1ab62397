"""The documents say what the code does: settings, endpoints, codes, metrics, modules, links."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import collector  # noqa: F401  # what tracing imports would hold a test's loop
import msgspec
import pytest
import redis.asyncio  # noqa: F401  # as what a source imports would
from daemons import running
from fakes import at_once
from prometheus_client.metrics_core import Metric

import clevrd.server.process  # noqa: F401  # it imports every module, so that all errors are known
from clevrd.cli import main
from clevrd.config import SETTINGS, Setting
from clevrd.connections.poll import PollView
from clevrd.control.adaptive_buffer import BufferDecision
from clevrd.control.system_stats import ProcessFigures
from clevrd.core.client_frames import FrameError
from clevrd.core.drop_strategy import DropStrategy
from clevrd.core.message import KeyedMessage, Message
from clevrd.core.notices import (
    ErrorNotice,
    Gap,
    GoingAway,
    Pong,
    Subscribed,
    Unsubscribed,
    Watching,
)
from clevrd.core.portions import Weights
from clevrd.errors import CannotStart, ClevrdError, ConfigError
from clevrd.handlers.commands.commands import Ping, PublishedNotice, Subscribe, Unsubscribe
from clevrd.handlers.operate.actions import Disconnected, TailView
from clevrd.handlers.operate.explain import DecisionView, ExplainView, Scope
from clevrd.handlers.operate.figures import Figures
from clevrd.handlers.operate.health import HealthView, MemoryView
from clevrd.handlers.operate.subscriber_rows import SubscribersView
from clevrd.hub import Published
from clevrd.hub.clearing import Cleared
from clevrd.metrics.histograms import HistogramView
from clevrd.metrics.json import MetricsView, ThrottlerView
from clevrd.metrics.prometheus.families import families
from clevrd.metrics.prometheus.tenants import families_of_tenants
from clevrd.metrics.snapshot import IdempotencyView, MessageTotals, TopicView, Traffic
from clevrd.metrics.tenants import TenantFigures, TenantsView
from clevrd.metrics.top import LimitedRow, SubscriberRow, TopicRow, TopView
from clevrd.tenants import Tenant

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "clevrd"
README = ROOT / "README.md"
WIRE = ROOT / "docs" / "wire.md"
OPERATIONS = ROOT / "docs" / "operations.md"
# A collector that nobody asks here, since no publish is traced.
NOWHERE = "http://127.0.0.1:9"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
DOCUMENTS = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Everything that is sent as JSON; its fields are the contract.
WIRE_STRUCTS = (
    Message,
    KeyedMessage,
    Subscribed,
    Gap,
    GoingAway,
    Watching,
    Unsubscribed,
    Pong,
    ErrorNotice,
    PublishedNotice,
    Subscribe,
    Unsubscribe,
    Ping,
    Published,
    PollView,
    HealthView,
    MemoryView,
    MetricsView,
    TopicView,
    ThrottlerView,
    IdempotencyView,
    BufferDecision,
    MessageTotals,
    ProcessFigures,
    Traffic,
    HistogramView,
    TenantsView,
    TenantFigures,
    TopView,
    SubscriberRow,
    TopicRow,
    LimitedRow,
    ExplainView,
    DecisionView,
    Scope,
    SubscribersView,
    Disconnected,
    Cleared,
    TailView,
)


class Close(NamedTuple):
    """A close that the code performs; the reason is empty where it is not written out."""

    code: int
    reason: str


# --- reading documents ---------------------------------------------------------------------------


def rows_after(document: Path, first_column: str) -> list[list[str]]:
    """Return the cells of the one table whose head begins with ``first_column``."""
    pattern = rf"^\| {first_column} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)"
    (block,) = re.findall(pattern, document.read_text(), re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]


def code_spans(text: str) -> set[str]:
    """Return what stands between backticks."""
    return set(re.findall(r"`([^`\n]+)`", text))


def without_code(text: str) -> str:
    """Return ``text`` less its fenced blocks, in which # and [] mean something else."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors_of(document: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_code(document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links_of(document: Path) -> list[str]:
    """Return the targets of a document's links to this repository."""
    targets = re.findall(r"\]\(([^)\s]+)\)", without_code(document.read_text()))
    return [target for target in targets if "://" not in target]


def shell_lines(document: Path) -> list[str]:
    """Return the lines of a document's shell examples, continued ones joined."""
    blocks = re.findall(r"^```sh\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)
    return "".join(blocks).replace("\\\n", "").splitlines()


# --- reading code --------------------------------------------------------------------------------


def table_row(setting: Setting) -> list[str]:
    """Return a setting as the README shows it."""
    default = setting.default
    if isinstance(default, bool):
        default = str(default).lower()
    elif isinstance(default, float):
        default = f"{default:.15g}"
    name, env, value = (f"`{cell}`" for cell in (setting.field, setting.env, default))
    value = "empty" if default == "" else value
    return [name, env, value, setting.allowed, setting.help]


def routes() -> set[str]:
    """Return "METHOD /path" for each route that the server makes, for clients and for operators.

    A segment that may be any topic's name is a T.
    """
    tree = ast.parse((PACKAGE / "server" / "routes.py").read_text())
    tables = [
        node.args[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "PathRouter"
    ]
    assert len(tables) == 2
    # Both have the paths that two functions return.
    of_admin = ast.parse((PACKAGE / "handlers" / "operate" / "admin.py").read_text())
    tables += [
        node.value
        for each in (tree, of_admin)
        for node in ast.walk(each)
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Dict)
    ]
    assert len(tables) == 4
    return {
        f"{ast.literal_eval(method)} {ast.literal_eval(path).replace('*', 'T')}"
        for table in tables
        if isinstance(table, ast.Dict)
        for path, methods in zip(table.keys, table.values, strict=True)
        if path is not None and isinstance(methods, ast.Dict)
        for method in methods.keys
        if method is not None
    }


def with_subclasses(error: type[ClevrdError]) -> Iterator[type[ClevrdError]]:
    """Yield ``error`` and everything derived from it."""
    yield error
    for each in error.__subclasses__():
        yield from with_subclasses(each)


def answered_errors() -> set[type[ClevrdError]]:
    """Return the errors that an HTTP answer can be made of."""
    own_code = {
        each
        for each in with_subclasses(ClevrdError)
        # Other tests may have made errors of their own.
        if "code" in vars(each) and each.__module__.startswith("clevrd.")
    }
    return own_code - {CannotStart, ConfigError, FrameError}


def closes() -> set[Close]:
    """Return every close that the sources write out as (code, reason)."""
    return {close for path in SOURCES for close in closes_in(path)}


def closes_in(path: Path) -> Iterator[Close]:
    """Yield the closes in one module: calls of close(), close_all(), _fail() and FrameError()."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or len(node.args) < 2:
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name in {"close", "close_all", "_fail", "FrameError"}:
            code, reason = (value_of(argument, path) for argument in node.args[:2])
            if isinstance(code, int):
                yield Close(code, reason if isinstance(reason, str) else "")


def value_of(node: ast.expr, path: Path) -> object:
    """Return a literal's value, or that of the constant of its module that it names."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return getattr(importlib.import_module(module_of(path)), node.id, None)
    return None


def module_of(path: Path) -> str:
    """Return the dotted name of the module in ``path``."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def help_of(command: str) -> str:
    """Return what `clevrd COMMAND --help` prints."""
    with redirect_stdout(StringIO()) as output:
        assert main([*command.split(), "--help"]) == 0
    return output.getvalue()


# --- settings ------------------------------------------------------------------------------------


def test_readme_lists_every_setting_as_it_is() -> None:
    """Names, defaults, ranges and help in the README are those of the code, in its order."""
    assert rows_after(README, "Setting") == [table_row(setting) for setting in SETTINGS]


# --- the wire ------------------------------------------------------------------------------------


def test_every_endpoint_is_documented() -> None:
    """docs/wire.md has a section for each route, and none for what is not there."""
    sections = set(re.findall(r"^## ([A-Z]+ /\S*)$", WIRE.read_text(), re.MULTILINE))

    assert sections == routes()


def test_every_error_code_is_documented() -> None:
    """Code, status and whether to retry stand in docs/wire.md as the classes have them."""
    documented = {tuple(row[:3]) for row in rows_after(WIRE, "Code \\| Status")}

    assert documented == {
        (f"`{error.code}`", str(error.status), "yes" if error.retryable else "no")
        for error in answered_errors()
    }


def test_every_error_code_has_advice_for_operators() -> None:
    """Who is woken by a refusal finds what to do about it in docs/operations.md."""
    advised = code_spans(OPERATIONS.read_text())

    assert {error.code for error in answered_errors()} <= advised


def test_every_close_is_documented() -> None:
    """Each code that can be closed with stands in docs/wire.md, with its reasons beside it."""
    documented = {
        int(code): code_spans(reasons) for code, reasons, *_ in rows_after(WIRE, "Code \\| Reason")
    }
    written = closes()

    # A reading that misses these has missed more.
    assert {1002, 1008, 1012, 4101} <= {close.code for close in written}
    assert {error.close_code for error in answered_errors()} <= documented.keys()
    assert [each for each in written if each.reason not in documented.get(each.code, set())] == []


@pytest.mark.parametrize("struct", WIRE_STRUCTS, ids=lambda struct: struct.__name__)
def test_every_field_on_the_wire_is_documented(struct: type[msgspec.Struct]) -> None:
    """docs/wire.md names each field of what is sent."""
    text = WIRE.read_text()

    missing = [
        field
        for field in struct.__struct_encode_fields__
        if f"`{field}`" not in text and f'"{field}":' not in text
    ]

    assert missing == []


def test_every_drop_policy_is_documented() -> None:
    """docs/wire.md has a row for each policy that `policy=` takes."""
    documented = {name for row in rows_after(WIRE, "Policy") for name in code_spans(row[0])}

    assert documented == {strategy.value for strategy in DropStrategy}


# --- operating -----------------------------------------------------------------------------------


def found_in(metrics: dict[str, Any], path: str) -> bool:
    """Say whether ``path``, like ``messages.dropped.memory``, leads to a figure."""
    place: Any = metrics
    for name in path.replace("[]", ".0").split("."):
        place = place[int(name)] if isinstance(place, list) else place.get(name)
        if place is None:
            return False
    return True


async def test_metrics_to_watch_are_there(tmp_path: Path) -> None:
    """Each figure that docs/operations.md tells to watch is in /metrics under that name."""
    # Nobody listens on this port, so that the source is one that is away.
    source = {"name": "s", "url": "redis://127.0.0.1:9/s", "topic": "t"}
    settings: dict[str, Any] = {"journal": str(tmp_path / "journal"), "otel_endpoint": NOWHERE}
    async with running(sources=[source], **settings) as daemon:
        daemon.server.parts.messaging.sources._sources[0].progress.lag = 0
        await daemon.publish("demo", 1)
        daemon.hub.evaluate_buffers()
        assert daemon.hub.journal is not None
        await daemon.hub.journal.node._save_checkpoint(daemon.hub.journal.node._partitions[0])
        metrics = await daemon.get_json("/metrics")
    cells = [row[0] for row in rows_after(OPERATIONS, "Metric")]

    missing = [path for cell in cells for path in code_spans(cell) if not found_in(metrics, path)]

    assert cells
    assert sorted(missing) == []


def metric_row(family: Metric) -> list[str]:
    """Return a metric as docs/operations.md shows it."""
    suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
    labels = {label for sample in family.samples for label in sample.labels} - {"le"}
    shown = ", ".join(f"`{label}`" for label in sorted(labels))
    return [f"`{family.name}{suffix}`", family.type, shown, family.documentation]


async def test_every_metric_is_documented() -> None:
    """docs/operations.md has each metric of Prometheus's forms as the code has it, in its order."""
    async with running() as daemon:
        daemon.hub.counters.count_refusal("not_found")
        daemon.hub.counters.count_close(1012)
        daemon.hub.share_out(Weights({"acme": 1.0}, 1.0))
        daemon.hub.topic(Tenant("acme"), "t")
        figures = Figures(daemon.hub, daemon.server.parts.count_connections, 0.0)
        snapshot = at_once(figures.snapshot(0))
        tenants = at_once(figures.of_tenants())

    assert rows_after(OPERATIONS, "Prometheus metric") == [
        metric_row(family) for family in families(snapshot)
    ]
    assert rows_after(OPERATIONS, "Metric of tenants") == [
        metric_row(family) for family in families_of_tenants(tenants)
    ]


async def test_every_metric_of_a_journal_is_documented(tmp_path: Path) -> None:
    """docs/operations.md has them in a table of their own."""
    async with running(journal=str(tmp_path / "journal")) as daemon:
        assert daemon.hub.journal is not None
        await daemon.hub.journal.node._save_checkpoint(daemon.hub.journal.node._partitions[0])
        snapshot = at_once(
            Figures(daemon.hub, daemon.server.parts.count_connections, 0.0).snapshot(0)
        )

    assert rows_after(OPERATIONS, "Prometheus metric of the journal") == [
        metric_row(family)
        for family in families(snapshot)
        if family.name.startswith("clevrd_journal")
    ]


async def test_every_metric_of_tracing_is_documented() -> None:
    """docs/operations.md has them in a table of their own."""
    async with running(otel_endpoint=NOWHERE) as daemon:
        figures = Figures(
            *(daemon.hub, daemon.server.parts.count_connections, 0.0),
            tracing=daemon.server.parts.messaging.tracing_figures,
        )
        snapshot = at_once(figures.snapshot(0))

    assert rows_after(OPERATIONS, "Prometheus metric of tracing") == [
        metric_row(family)
        for family in families(snapshot)
        if family.name.startswith("clevrd_trace")
    ]


async def test_kinds_of_connections_are_documented() -> None:
    """docs/operations.md says which values the label has."""
    async with running() as daemon:
        counted = daemon.server.parts.count_connections()
    (kinds,) = re.findall(r"`kind` is (.*?)\. ", OPERATIONS.read_text())

    assert code_spans(kinds) == counted.keys()


def test_exit_codes_are_documented() -> None:
    """docs/operations.md lists the exit codes that errors carry."""
    documented = {row[0] for row in rows_after(OPERATIONS, "Exit code")}

    assert {str(ConfigError.exit_code), str(CannotStart.exit_code)} <= documented


# --- structure -----------------------------------------------------------------------------------


def test_every_module_has_its_place_in_the_architecture() -> None:
    """docs/architecture.md names each module, and none that is gone."""
    cells = [row[1] for row in rows_after(ARCHITECTURE, "Floor")]
    documented = set().union(*(code_spans(cell) for cell in cells))
    modules = {path.relative_to(PACKAGE).with_suffix("").as_posix() for path in SOURCES}

    assert documented == {name for name in modules if "__" not in name}


def test_the_map_names_modules_that_are_there() -> None:
    """Each step of the way of a publish, and of a subscribe, has a module to read on in."""
    ways = ("Of a publish", "Of a subscribe")
    cells = [row[1] for way in ways for row in rows_after(ARCHITECTURE, way)]

    named = set().union(*(code_spans(cell) for cell in cells))

    assert len(cells) > 10
    assert all(code_spans(cell) for cell in cells)
    assert [name for name in named if not (PACKAGE / f"{name}.py").is_file()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_resolve(document: Path) -> None:
    """Each link inside the repository leads to a file, and its anchor to a heading there."""
    broken = []
    for link in links_of(document):
        name, _, anchor = link.partition("#")
        target = (document.parent / name) if name else document
        if not target.is_file() or (anchor and anchor not in anchors_of(target)):
            broken.append(link)

    assert broken == []


# --- examples ------------------------------------------------------------------------------------


def test_make_targets_in_examples_exist() -> None:
    """Every `make TARGET` that a document prints is a target of the Makefile."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = "\n".join(document.read_text() for document in DOCUMENTS)
    printed = set(re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE))

    assert {"run", "test", "check", "bench"} <= printed <= targets


def test_commands_in_examples_exist() -> None:
    """Every `clevrd COMMAND` of a shell example is a command, with options that it has."""
    lines = "\n".join(line for document in DOCUMENTS for line in shell_lines(document))
    # A command may have a second word.
    printed = re.findall(
        r"(?:^|\| |bin/)clevrd ((?:key |token |journal )?\w+)((?: +[^\s#|]+)*)", lines, re.MULTILINE
    )

    helps = {command: help_of(command) for command, _ in printed}
    unknown = [
        f"{command} {word}"
        for command, options in printed
        for word in options.split()
        if word.startswith("--") and word not in helps[command]
    ]

    assert {"publish", "subscribe", "checkconfig"} <= helps.keys()
    assert unknown == []
