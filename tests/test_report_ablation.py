"""The chart of a translator taken apart, and the warm-up that a cell records."""

from __future__ import annotations

from typing import Any

import pytest

from vmlab.experiment.cell import run_cell
from vmlab.report import draw
from vmlab.report.ablation import ablation_title, shown, taken_apart
from vmlab.report.view import View

PROFILE = "prescott-2005"


def cell(workload: str, cycles: float | None, **off: str | int) -> dict[str, Any]:
    technique = "binary-translation" if cycles is not None else "native"
    total = 100.0 if cycles is None else cycles
    return {"id": f"{technique}/{workload}/{sorted(off.items())}", "technique": technique, "status": "ok", "error": None,
            "parameters": {"guest": "minios", "workload": workload, **({"memory": "tracing"} if cycles is not None else {}), **off},
            "work": {"operations": 9}, "events": {"machine.alu": int(total)}, "cycles": {PROFILE: {"total": total, "breakdown": {"callouts": total}}},
            "slowdown": {PROFILE: {"value": total / 100, "low": total / 110, "high": total / 90}},
            "warm_up": [{"instructions": 1 << n, "translated": 3 * n, "chained": n} for n in range(1, 12)]}


def results(*cells: dict[str, Any]) -> dict[str, Any]:
    return {"schema_version": 1, "experiment": {"name": "x"}, "cells": list(cells), "claims": []}


MIXED = (cell("mixed", None), cell("mixed", 200.0), cell("mixed", 800.0, chaining="off"), cell("mixed", 220.0, lookup="callout"),
         cell("mixed", 210.0, unit=1), cell("mixed", 300.0, adaptation="off"), cell("mixed", 2000.0, chaining="off", lookup="callout"))


def test_each_mechanism_is_priced_against_all_of_them() -> None:
    found = taken_apart(View(results(*MIXED)), "mixed")
    assert found == {"all of these off": 10.0, "no chaining": 4.0, "no adaptation": 1.5, "no look-up in the cache": pytest.approx(1.1),
                     "units of one instruction": pytest.approx(1.05)}
    assert ablation_title(View(results(*MIXED))) == (
        "mixed: no chaining takes 4.0× as long and no adaptation takes 1.50× as long; with all of it off, 10×")


def test_a_run_without_the_whole_has_no_chart() -> None:
    assert shown(View(results(*(c for c in MIXED if len(c["parameters"]) != 3)))) == []
    assert "ablation" not in draw(results(MIXED[0], MIXED[1]))


def test_the_chart_draws_dots_and_the_warm_up() -> None:
    title, forms = draw(results(*MIXED), ["ablation"])["ablation"]
    assert title.startswith("mixed: no chaining")
    assert forms["png"].startswith(b"\x89PNG")
    assert forms["svg"] == draw(results(*MIXED), ["ablation"])["ablation"][1]["svg"]


def test_a_cell_records_how_its_translator_warmed_up() -> None:
    record = run_cell("binary-translation", {"guest": "nano", "workload": "cli_sti", "iterations": 50})
    curve = record["warm_up"]
    phases = record["phases"].values()
    assert curve[-1]["translated"] == sum(p["events"].get("bt.translate.unit", 0) for p in phases) > 0
    assert curve[-1]["chained"] == sum(p["events"].get("bt.chain", 0) for p in phases) > 0
    assert [row["instructions"] for row in curve[:-1]] == [1 << n for n in range(len(curve) - 1)]
    assert "warm_up" not in run_cell("native", {"guest": "nano", "workload": "cli_sti", "iterations": 50})
