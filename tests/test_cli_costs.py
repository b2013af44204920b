"""The verbs of the costs room: list profiles, cite, compare. No guest is run here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import made_up_run
import pytest

from vmlab import costs
from vmlab.cli.main import main


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run's directory, made up."""
    results = made_up_run.results(workloads=("rdtsc", "compute"), densities=(50,))
    (tmp_path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return tmp_path


def test_profiles_say_how_many_figures_are_cited(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "profiles", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["profiles"]
    by_name = {row["name"]: row for row in rows}
    assert by_name["prescott-2005"]["cited"] >= 20 and by_name["prescott-2005"]["provides"] == "long shadow vmx x86"
    assert sum(row["cited"] >= 8 for row in rows) >= 8, "at least eight generations with eight cited figures or more"


def test_verbose_lists_every_figure_with_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "profiles", "--verbose", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert len(figures) == sum(len(costs.load(name).costs) for name in costs.names())
    cli = next(row for row in figures if (row["profile"], row["cost"]) == ("prescott-2005", "insn.cli"))
    assert (cli["value"], cli["unit"], cli["provenance"]) == (60, "cycles", "cited")
    assert "adams-agesen-2006" in cli["source"]
    assert main(["list", "claims", "--verbose"]) == 2
    assert "--verbose" in capsys.readouterr().err


def test_cite_prints_the_sources_of_the_costs_used_and_no_other(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cite", str(run), "--profile", "haswell-2013"]) == 0
    haswell = capsys.readouterr().out
    assert "@misc{fog-2021," in haswell and "@misc{torvalds-2014," in haswell
    assert "intel-tj-2008" not in haswell, "no CLI is in the run"
    assert main(["cite", str(run / "results.json"), "--json"]) == 0
    found: dict[str, Any] = {row["key"]: row for row in json.loads(capsys.readouterr().out)["references"]}
    assert "insn.rdtsc" in found["fog-2021"]["costs"]["prescott-2005"]
    assert "path.callout" in found["adams-agesen-2006"]["costs"]["prescott-2005"]
    assert list(found) == sorted(found)


def test_cite_refuses_what_is_no_run(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list.json").write_text("[]", encoding="utf-8")
    for arguments, says in (
        (["cite", str(tmp_path / "nowhere")], "cannot be read"), (["cite", str(tmp_path / "list.json")], "not the results"),
        (["cite", str(run), "--profile", "hasswell-2013"], "haswell-2013"),
    ):
        assert main(arguments) == 2
        assert says in capsys.readouterr().err
