"""By which weights tenants divide the memory, as the configuration file has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from daemons import Daemon, running

from clevrd.config import MIB, Config
from clevrd.core.portions import OTHERS
from clevrd.hub.memory_shares import (
    OPEN_WEIGHTS,
    input_bytes,
    weights_of,
    with_bodies_that_fit,
)
from clevrd.tenants.settings import read_access

KEY = {"id": "web", "sha256": "0" * 64, "publish": ["**"]}


def ratios(tables: dict[str, Any], *tenants: str) -> list[float]:
    """Return which part each of these tenants has, or has a part in."""
    weights = weights_of(read_access(tables, "test.toml"))
    return [weights.ratio_of(weights.portion_of(tenant)) for tenant in tenants]


def test_without_tenants_the_default_tenant_and_all_others_have_a_half_each() -> None:
    """Made-up tenants can't use up what `default-tenant` needs."""
    assert weights_of(read_access({}, "test.toml")) is OPEN_WEIGHTS
    assert ratios({}, "default-tenant", "made-up", "made-up-too") == [0.5, 0.5, 0.5]
    assert OPEN_WEIGHTS.portion_of("made-up") == OPEN_WEIGHTS.portion_of("made-up-too") == OTHERS


def test_weights_are_those_of_the_file() -> None:
    """One that says nothing has 1.0, and so have `default-tenant` and the rest in open mode."""
    tables = {"tenants": [{"name": "acme", "memory_weight": 3.0}, {"name": "other"}]}

    found = ratios(tables, "acme", "other", "default-tenant", "made-up")

    assert found == pytest.approx([3 / 6, 1 / 6, 1 / 6, 1 / 6])


def test_default_tenant_can_be_weighed() -> None:
    """It is configured like any other."""
    tables = {"tenants": [{"name": "default-tenant", "memory_weight": 9.0}]}

    assert ratios(tables, "default-tenant", "made-up") == pytest.approx([0.9, 0.1])


def test_only_configured_tenants_have_a_share_where_a_credential_is_required() -> None:
    """Nobody else can come, so nothing is kept back for anybody else."""
    tables = {
        "auth": {"mode": "required"},
        "tenants": [{"name": "acme", "memory_weight": 3.0}, {"name": "other", "keys": [KEY]}],
    }

    assert ratios(tables, "acme", "other", "default-tenant") == pytest.approx([0.75, 0.25, 0.0])


@pytest.mark.parametrize(
    ("max_memory_mb", "empty_mb", "batch_mb", "input_mb"),
    [
        (2048, 48, 8, 204.8),
        (128, 48, 8, 24),
        (64, 48, 8, 6.4),
        # Where the bound is too low for the interpreter, a higher one counts.
        (64, 60, 8, 8),
        (2048, 48, 1024, 1692.8),
    ],
)
def test_unfinished_input_ends_below_the_memory_ladder(
    max_memory_mb: int, empty_mb: int, batch_mb: int, input_mb: float
) -> None:
    """A tenth of memory or three of the largest bodies, as far as a daemon has that much left."""
    config = Config(max_batch_bytes=batch_mb * MIB)

    found = input_bytes(config, max_memory_mb * MIB, empty_mb * MIB)

    assert found == pytest.approx(input_mb * MIB, abs=2)


def test_largest_body_fits_into_what_comes_first() -> None:
    """Or it could never arrive: what is larger is refused by its head."""
    config = Config(max_batch_bytes=8 * MIB, max_message_bytes=MIB)

    assert with_bodies_that_fit(config, 24 * MIB) is config
    small = with_bodies_that_fit(config, 6 * MIB)
    assert (small.max_batch_bytes, small.max_message_bytes) == (3 * MIB, MIB)
    tiny = with_bodies_that_fit(config, MIB)
    assert (tiny.max_batch_bytes, tiny.max_message_bytes) == (MIB // 2, MIB // 2)


async def test_shares_follow_the_rules_in_force() -> None:
    """Those of the start, and after a reload those of the new file, with nothing lost."""
    tables: dict[str, Any] = {"tenants": [{"name": "acme", "memory_weight": 3.0}]}
    async with running(access=read_access(tables, "test.toml")) as daemon:
        for tenant in ("acme", "other"):
            await daemon.publish("t", 1, **{"X-Tenant-ID": tenant})
        before = await shares(daemon)

        tables["tenants"].append({"name": "other", "memory_weight": 5.0})
        await daemon.server.access.apply(read_access(tables, "test.toml"), Path())
        after = await shares(daemon)
        await daemon.server.access.apply(read_access({}, "test.toml"), Path())
        without = await shares(daemon)

    assert before == {"acme": (60, 1), None: (20, 1)}
    assert after == {"acme": (30, 1), "other": (50, 1), None: (10, 0)}
    assert without == {None: (50, 2)}


async def shares(daemon: Daemon) -> dict[str | None, tuple[int, int]]:
    """Return what each has of the memory, in per cent, and how many topics."""
    figures = await daemon.get_json("/metrics")
    whole = daemon.hub.topics.limits.max_memory_bytes * 0.8
    return {
        each["tenant_id"]: (round(each["guaranteed_bytes"] * 100 / whole), each["topics"])
        for each in figures["memory_shares"]
    }
