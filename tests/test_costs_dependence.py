"""Changing one cost changes exactly the figures that depend on it: every cost of every profile, on every event and every validation row.

What depends on what is derived here from the rules' terms alone: the keys themselves (or the family's default where the profile has no
figure), the class costs for a handler's length, the clock for a time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vmlab import costs
from vmlab.claims.evidence import Cell
from vmlab.costs import RULES, Profile, Quantity
from vmlab.costs.model import CostModel

ROWS: list[dict[str, Any]] = [
    row for row in json.loads((Path(__file__).resolve().parent.parent / "docs/validation.json").read_text("utf-8"))["rows"] if row["events"]]


def named(profile: Profile) -> list[str]:
    """Every cost that prices something on this profile: its own figures, the path table's, what all share."""
    table = costs.path_table()
    return [*profile.costs, *table.paths, *table.shared]


def dependence(profile: Profile) -> dict[str, set[str]]:
    """Event kind -> costs in its price; kinds that this profile cannot price are left out."""
    table = costs.path_table()
    found: dict[str, set[str]] = {}
    for kind, rule in RULES.items():
        keys: set[str] = set()
        for _factor, key in rule.terms:
            family = key.split(".")[0]
            own = key in profile.costs or key in table.paths or key in table.shared
            keys.add(key if own else f"{family}.default")
            keys |= {f"class.{name}" for name, share in table.mix.items() if share} if family == "path" else set()
            keys |= {"mhz"} if family == "shared" else set()
        if all(key in profile.costs or key in table.paths or key in table.shared for key in keys):
            found[kind] = keys
    return found


@pytest.mark.parametrize("name", costs.names())
def test_a_cost_moves_exactly_the_events_that_it_prices(name: str) -> None:
    profile = costs.load(name)
    depends = dependence(profile)
    before = {kind: CostModel.of(profile).unit(kind) for kind in depends}
    assert len(depends) > 100
    for key in named(profile):
        altered = CostModel.of(profile.with_values({key: 2 * profile.figure(key).value}))  # type: ignore[union-attr]
        moved = {kind for kind in depends if altered.unit(kind) != before[kind]}
        assert moved == {kind for kind, keys in depends.items() if key in keys}, key
    assert CostModel.of(profile).unit("machine.alu") == before["machine.alu"]


@pytest.mark.parametrize("name", sorted({row["profile"] for row in ROWS}))
def test_a_cost_moves_exactly_the_rows_whose_events_it_prices(name: str) -> None:
    """Without a run: the rows' events are in the committed document."""
    profile, depends = costs.load(name), dependence(costs.load(name))
    rows = {row["id"]: Quantity(row["events"]) for row in ROWS}
    here = [row["id"] for row in ROWS if row["profile"] == name]
    before = {row: rows[row].value(profile) for row in here}
    reached = set()
    for key in named(profile):
        altered = profile.with_values({key: 2 * profile.figure(key).value})  # type: ignore[union-attr]
        moved = {row for row in here if rows[row].value(altered) != before[row]}
        needs = {row for row in here if any(key in depends[kind] for kind in rows[row].events)}
        # What an iteration takes away may cancel to the last digit what it adds; nothing else may move.
        assert moved <= needs, key
        assert {row for row in needs - moved if sum(key in depends[kind] for kind in rows[row].events) == 1} == set(), key
        reached |= {key} if moved else set()
    assert "class.load" in reached and "path.emulate" in reached


def test_a_profile_that_was_not_altered_gives_what_it_gave() -> None:
    cells: list[Cell] = [{"events": dict.fromkeys(dependence(costs.load(name)), 7)} for name in costs.names()]
    before = [costs.nominal(cell["events"], costs.load(name), "x86") for cell, name in zip(cells, costs.names(), strict=True)]
    costs.load("prescott-2005").with_values({"insn.cli": 1})
    assert before == [costs.nominal(cell["events"], costs.load(name), "x86") for cell, name in zip(cells, costs.names(), strict=True)]
