"""The files in deploy/ that read a daemon's figures: alerts, and the dashboard.

promtool takes the alerts, each fires, and each is explained; a real Prometheus that scrapes a real
daemon has an answer to every query of the dashboard.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from clients import subscribe
from daemons import ROOT, Daemon, running
from prometheus import OPERATIONS, Prometheus, need, scraping
from prometheus_client.parser import text_string_to_metric_families
from tls import make_pair

FOLDER = ROOT / "deploy" / "prometheus"
RULES = (FOLDER / "alerts.yml").read_text()
ALERTS = re.findall(r"^ +- alert: (\w+)$", RULES, re.MULTILINE)


def promtool(*arguments: str) -> tuple[int, str]:
    """Return the exit code and the output of promtool."""
    done = subprocess.run(
        [need("promtool"), *arguments], cwd=FOLDER, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def test_rules_are_rules() -> None:
    """As Prometheus reads them."""
    code, said = promtool("check", "rules", "alerts.yml")

    assert (code, f"{len(ALERTS)} rules found" in said) == (0, True), said


def test_each_alert_fires_when_it_should() -> None:
    """And not otherwise: promtool's own unit tests."""
    code, said = promtool("test", "rules", "alerts_test.yml")

    assert code == 0, said


def test_each_alert_is_tested_both_ways() -> None:
    """One series that fires it, and one near to that which doesn't."""
    tests = (FOLDER / "alerts_test.yml").read_text()

    assert re.findall(r"name: (\w+), well$", tests, re.MULTILINE) == ALERTS
    assert re.findall(r"name: (\w+), not well$", tests, re.MULTILINE) == ALERTS


def test_each_alert_has_a_section_for_operators() -> None:
    """Its runbook is a heading of docs/operations.md, in the order of the rules."""
    text = OPERATIONS.read_text()
    part = text[text.index("\n## Alerts\n") : text.index("\n## What each refusal means\n")]
    sections = re.findall(r"^### (\w+)\n\n(.+)", part, re.MULTILINE)

    assert [name for name, _ in sections] == ALERTS
    assert re.findall(r"runbook: docs/operations\.md#(\w+)$", RULES, re.MULTILINE) == [
        name.lower() for name in ALERTS
    ]


def test_configuration_of_prometheus_is_one() -> None:
    """As the compose file gives it: it finds the rules beside it."""
    code, said = promtool("check", "config", "prometheus.yml")

    assert (code, f"{len(ALERTS)} rules found" in said) == (0, True), said


async def test_each_metric_of_an_alert_is_one_of_a_daemon(tmp_path: Path) -> None:
    """Nothing waits for ever for a name that no daemon has, and no label for such a value."""
    settings: dict[str, Any] = {**make_pair(tmp_path).settings}
    folder = tmp_path / "journal"
    folder.mkdir(mode=0o700)
    # Nobody has to answer there for its families to be shown.
    source = {"name": "orders", "url": "redis://127.0.0.1:1/orders", "topic": "t"}
    async with (
        running(journal_table={"directory": str(folder)}, sources=[source], **settings) as daemon,
        daemon.http.get(
            f"{daemon.url}/metrics", headers={"Accept": "text/plain"}, ssl=False
        ) as answer,
    ):
        families = list(text_string_to_metric_families(await answer.text()))

    # A counter without a sample yet has its family's name and no sample.
    names = {sample.name for family in families for sample in family.samples}
    names |= {f"{family.name}_total" for family in families if family.type == "counter"}
    used = set(re.findall(r"\bclevrd_\w+", re.sub(r"docs/\S+|summary: .*", "", RULES)))
    assert used - names == set()
    assert len(used) > 15
    states = {
        sample.labels["state"]
        for family in families
        for sample in family.samples
        if "state" in sample.labels
    }
    named = set("|".join(re.findall(r'state=~"([\w|]+)"', RULES)).split("|"))
    assert named <= states


# --- the dashboard ---------------------------------------------------------------------------


def expressions() -> dict[str, str]:
    """Return each query of the dashboard by its panel and its legend, as Grafana would send it."""
    dashboard = json.loads((ROOT / "deploy/grafana/dashboards/clevrd.json").read_text())
    found = {
        f"{panel['title']}: {target['legendFormat']}": target["expr"]
        for panel in dashboard["panels"]
        for target in panel["targets"]
    }
    found |= {each["name"]: each["expr"] for each in dashboard["annotations"]["list"]}
    values = {"$__rate_interval": "2s", "$instance": ".*"}
    for name, expression in found.items():
        for variable, value in values.items():
            expression = expression.replace(variable, value)
        found[name] = expression
    return found


async def publish_on(daemon: Daemon) -> None:
    """Publish without an end, and be refused something now and then."""
    while True:
        await daemon.publish("t", 1)
        async with daemon.http.post(f"{daemon.url}/publish", data=b"no JSON") as answer:
            await answer.read()
        await asyncio.sleep(0.01)


async def unanswered(prometheus: Prometheus, queries: dict[str, str]) -> dict[str, str]:
    """Return those of ``queries`` that Prometheus finds nothing for; an error fails."""
    return {name: query for name, query in queries.items() if await has_no_value(prometheus, query)}


async def has_no_value(prometheus: Prometheus, query: str) -> bool:
    """Say whether Prometheus finds nothing."""
    return not (await prometheus.get("query", query=query))["result"]


@pytest.mark.timeout(60)
async def test_prometheus_answers_each_query_of_the_dashboard(tmp_path: Path) -> None:
    """With a daemon that is used, has refused something and closed a connection, and a journal."""
    folder = tmp_path / "journal"
    folder.mkdir(mode=0o700)
    # Only a daemon that has just started has this.
    queries = {name: query for name, query in expressions().items() if name != "Starts"}
    async with (
        running(journal_table={"directory": str(folder)}) as daemon,
        scraping(daemon.port, tmp_path) as prometheus,
        subscribe(daemon.ws_url) as reader,
    ):
        async with subscribe(daemon.ws_url) as refused:
            for _ in range(200):  # more than a subscriber may send
                await refused.send("x")
            await refused.wait_closed()
        publishing = asyncio.create_task(publish_on(daemon))
        await reader.recv()
        async with asyncio.timeout(30):
            while await unanswered(prometheus, queries):
                await reader.recv()
        publishing.cancel()
        await has_no_value(prometheus, expressions()["Starts"])

    assert len(queries) > 30


def test_dashboard_is_what_grafana_is_provisioned_with() -> None:
    """Its data source has the name that the panels use, and panels lie beside one another."""
    dashboard = json.loads((ROOT / "deploy/grafana/dashboards/clevrd.json").read_text())
    source = (ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text()
    cells: set[tuple[int, int]] = set()

    for panel in dashboard["panels"]:
        assert f"uid: {panel['datasource']['uid']}\n" in source
        place = panel["gridPos"]
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not own & cells, panel["title"]
        cells |= own
    assert max(x for x, _ in cells) == 23
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
