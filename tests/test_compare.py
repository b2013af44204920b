"""``vmlab compare``: the same cells of two runs, what changed, and limits on it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import made_up_run
import pytest

from vmlab.cli.main import main
from vmlab.errors import ConfigError
from vmlab.experiment import compare


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path, dict[str, Any]]:
    """A run, a copy of it to be changed, and what is in the copy."""
    results = made_up_run.results(workloads=("rdtsc", "compute"), densities=(50,))
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return tmp_path / "old", tmp_path / "new", copy.deepcopy(results)


def change(path: Path, results: dict[str, Any]) -> None:
    (path / "results.json").write_text(json.dumps(results), encoding="utf-8")


def test_the_same_run_has_no_changes(runs: tuple[Path, Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    old, new, _ = runs
    assert main(["compare", str(old), str(new), "--fail-over", "*:0%", "--fail-over", "slowdown:0%"]) == 0
    assert "Nothing that is compared changed." in capsys.readouterr().out


def test_a_metric_that_grew_is_shown_and_a_limit_fails(
    runs: tuple[Path, Path, dict[str, Any]], capsys: pytest.CaptureFixture[str],
) -> None:
    old, new, results = runs
    cell = next(cell for cell in results["cells"] if cell["technique"] == "hardware-assisted" and cell["events"].get("exit.rdtsc"))
    before = cell["events"]["exit.rdtsc"]
    cell["events"]["exit.rdtsc"] = before * 106 // 100
    cell["slowdown"]["penryn-2008"]["value"] *= 1.04
    change(new, results)
    assert main(["compare", str(old), str(new), "--fail-over", "slowdown:5%", "--fail-over", "exit.*:10%"]) == 0
    out = capsys.readouterr().out
    assert "exit.rdtsc" in out and "+6 %" in out and "slowdown penryn-2008" in out and "+4 %" in out
    assert main(["compare", str(old), str(new), "--fail-over", "slowdown:3%", "--fail-over", "exit.*:10%"]) == 1
    assert "over the limit" in capsys.readouterr().err
    assert main(["compare", str(new), str(old), "--fail-over", "slowdown:0%"]) == 0, "what shrinks is no failure"


def test_events_that_only_one_run_has_count_from_zero(runs: tuple[Path, Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    old, new, results = runs
    results["cells"][0]["events"]["trap.gp"] = 7
    change(new, results)
    assert main(["compare", str(old), str(new), "--json", "--fail-over", "trap.gp:1000%"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["changes"] == found["over"] == [
        {"cell": results["cells"][0]["id"], "metric": "trap.gp", "old": 0, "new": 7, "relative": None}]


def test_cells_outcomes_and_verdicts_that_differ_are_listed(
    runs: tuple[Path, Path, dict[str, Any]], capsys: pytest.CaptureFixture[str],
) -> None:
    old, new, results = runs
    gone = results["cells"].pop(1)
    results["cells"][0]["fidelity"]["outcome"] = "other"
    results["cells"][2] |= {"status": "failed", "error": "x"}
    results["claims"][0]["verdict"] = "fails"
    change(new, results)
    assert main(["compare", str(old), str(new)]) == 0
    out = capsys.readouterr().out
    assert f"only in the old run: {gone['id']}" in out and f"another outcome: {results['cells'][0]['id']}" in out
    assert f"verdict: {results['claims'][0]['id']}: holds became fails" in out and "ok became failed" in out


def test_runs_of_other_sizes_have_nothing_in_common(runs: tuple[Path, Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    old, new, results = runs
    for cell in results["cells"]:
        cell["id"] += ",iterations=7"
    change(new, results)
    for more in ([], ["--fail-over", "slowdown:5%"], ["--json"]):
        assert main(["compare", str(old), str(new), *more]) == 2
        out, err = capsys.readouterr()
        assert "no cell in common" in err and ",iterations=7" in err and not out


def test_a_limit_fails_where_a_cell_is_lost(runs: tuple[Path, Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    old, new, results = runs
    gone = results["cells"].pop(1)
    results["cells"][2] |= {"status": "failed", "error": "x"}
    change(new, results)
    assert main(["compare", str(old), str(new), "--fail-over", "slowdown:5%"]) == 1
    err = capsys.readouterr().err
    assert err.count("no limit can be checked") == 2 and gone["id"] in err and results["cells"][2]["id"] in err
    assert main(["compare", str(new), str(old), "--fail-over", "slowdown:5%"]) == 0, "what is new has no limit yet"


def test_long_lists_are_cut(runs: tuple[Path, Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    old, new, results = runs
    del results["cells"][1:]
    change(new, results)
    assert main(["compare", str(old), str(new)]) == 0
    out = capsys.readouterr().out
    assert out.count("only in the old run: ") == 6 and "more (--json names them)" in out


@pytest.mark.parametrize(("limit", "says"), [
    ("slowdown", "METRIC:PERCENT%"), ("slowdown:5", "METRIC:PERCENT%"), ("slowdown:x%", "METRIC:PERCENT%"), ("slowdwn:5%", "slowdown"),
    ("slowdown:-1%", "METRIC:PERCENT%"),
])
def test_a_limit_that_means_nothing_is_refused(limit: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        compare.parse_limit(limit)


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(tmp_path), str(tmp_path)]) == 2
    assert "cannot be read" in capsys.readouterr().err
