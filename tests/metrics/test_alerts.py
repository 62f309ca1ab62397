"""The alerts in deploy/prometheus: promtool takes them, each fires, and each is explained."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from daemons import ROOT, running
from prometheus import OPERATIONS, need
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


@pytest.mark.parametrize("text", [RULES], ids=["alerts"])
async def test_each_metric_is_one_of_a_daemon(text: str, tmp_path: Path) -> None:
    """Nothing waits for ever for a name that no daemon has, and no label for such a value."""
    pair = make_pair(tmp_path)
    folder = tmp_path / "journal"
    folder.mkdir(mode=0o700)
    async with (
        running(journal_table={"directory": str(folder)}, **pair.settings) as daemon,
        daemon.http.get(
            f"{daemon.url}/metrics", headers={"Accept": "text/plain"}, ssl=False
        ) as answer,
    ):
        families = list(text_string_to_metric_families(await answer.text()))

    # A counter without a sample yet has its family's name and no sample.
    names = {sample.name for family in families for sample in family.samples}
    names |= {f"{family.name}_total" for family in families if family.type == "counter"}
    used = set(re.findall(r"\bclevrd_\w+", re.sub(r"docs/\S+|summary: .*", "", text)))
    assert used - names == set()
    assert len(used) > 15
    states = {
        sample.labels["state"]
        for family in families
        for sample in family.samples
        if "state" in sample.labels
    }
    named = set("|".join(re.findall(r'state=~"([\w|]+)"', text)).split("|"))
    assert named <= states
