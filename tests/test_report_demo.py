"""``vmlab demo``: one screen, every technique on every CPU, and what it says follows from the counts."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

import made_up_run
import pytest

from vmlab.cli import demo
from vmlab.cli.main import main
from vmlab.errors import UnsupportedByStrategy


def made_up(technique: str, parameters: dict[str, Any]) -> Mapping[str, Any]:
    told = {key: value for key, value in parameters.items() if key in ("sensitive", "emulation")}
    return made_up_run.cell(technique, told, "cli_sti", parameters["density"])


def test_it_fits_one_screen_and_names_what_to_read_and_type() -> None:
    lines = demo.screen(demo.measure(made_up)).splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    assert "p. 490" in lines[-2] and lines[-1] == "Next: vmlab experiment cli_heavy"


def test_a_pair_costs_what_its_events_cost() -> None:
    rows = {row["label"]: row for row in demo.measure(made_up)["techniques"]}
    assert rows["native"]["cycles"]["prescott-2005"] == pytest.approx(124)
    assert rows["hardware-assisted"]["cycles"]["k8-2005"] is None
    assert rows["trap-and-emulate"]["per_pair"]["trap.gp"] == 2
    assert "2 traps a pair" in rows["trap-and-emulate"]["why"]


def test_more_traps_are_said_and_cost_more() -> None:
    def twice(technique: str, parameters: dict[str, Any]) -> Mapping[str, Any]:
        cell = dict(made_up(technique, parameters))
        cell["events"] = {kind: n * (2 if kind == "trap.gp" else 1) for kind, n in cell["events"].items()}
        return cell

    once, more = (demo.measure(run)["techniques"][1] for run in (made_up, twice))
    assert "4 traps a pair" in more["why"]
    assert more["cycles"]["haswell-2013"] > once["cycles"]["haswell-2013"] + 1000


def test_a_technique_that_cannot_run_does_not_hide_the_others() -> None:
    def broken(technique: str, parameters: dict[str, Any]) -> Mapping[str, Any]:
        if technique == "hardware-assisted":
            raise UnsupportedByStrategy("no AMD-V in this build")
        return made_up(technique, parameters)

    result = demo.measure(broken)
    assert result["techniques"][-1]["error"] == "no AMD-V in this build"
    assert "did not run: no AMD-V" in demo.screen(result) and "3,857" in demo.screen(result)


def test_the_real_thing_runs_in_seconds_and_agrees_with_native(capsys: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    assert main(["demo", "--json"]) == 0
    assert time.monotonic() - started < 15, "meant to take under five on an idle machine"
    result = json.loads(capsys.readouterr().out)
    cycles = {row["label"]: row["cycles"] for row in result["techniques"]}
    assert cycles["native"]["prescott-2005"] == pytest.approx(124)
    assert cycles["translation, in the cache"]["prescott-2005"] < 124 < cycles["trap-and-emulate"]["prescott-2005"]
