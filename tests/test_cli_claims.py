"""``vmlab claims`` with the real machine: runs what is needed, finds it again, says what it rests on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from vmlab import claims
from vmlab.claims import model
from vmlab.cli.main import main


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def verdicts(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> tuple[dict[str, Any], str]:
    assert main(["claims", *arguments, "--json", "--jobs", "2"]) == status
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["schema_version"] == 1
    return {claim["id"]: claim for claim in found["claims"]}, err


def test_it_runs_the_claims_experiment_and_finds_it_again(capsys: pytest.CaptureFixture[str]) -> None:
    found, err = verdicts(capsys, "popf-silent", "exit-cost-falls")
    assert list(found) == ["popf-silent", "exit-cost-falls"]
    assert {claim["verdict"] for claim in found.values()} == {"holds"} and "3 cells to run, 0 found" in err
    again, err = verdicts(capsys, "popf-silent", "exit-cost-falls")
    assert again == found and err == ""


def test_cells_of_an_experiment_are_found_too(capsys: pytest.CaptureFixture[str]) -> None:
    Path("e.yaml").write_text(
        "name: e\nmatrix: {technique: trap-and-emulate, workload: pushf_popf, iterations: 100, sensitive: [silent, trap]}\n",
        encoding="utf-8")
    assert main(["experiment", "e.yaml"]) == 0
    capsys.readouterr()
    found, err = verdicts(capsys, "popf-silent")
    assert found["popf-silent"]["verdict"] == "holds" and err == ""


def test_an_altered_cost_flips_a_verdict_without_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    found, _ = verdicts(capsys, "exit-cost-falls")
    flip = found["exit-cost-falls"]["decided_by"]["westmere-2010"]
    assert flip["cost"] == "entry"
    changed, err = verdicts(capsys, "exit-cost-falls", "--cost", f"westmere-2010:entry={flip['flips_at'] * 0.99}")
    assert changed["exit-cost-falls"]["verdict"] == "fails" and err == ""
    assert main(["claims", "exit-cost-falls", "--cost", "westmere-2010=5"]) == 2
    assert main(["claims", "exit-cost-falls", "--cost", "westmere-2010:entri=5"]) == 2
    assert "nearest: 'entry'" in capsys.readouterr().err


def test_what_the_lab_cannot_run_is_undecided_with_status_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:
    block = {"technique": "native", "guest": "nano", "workload": "no_such_thing"}
    row = {"name": "n", "count": {"cell": "a", "events": ["entry"]}}
    claim = model.Claim("made-up", "s", "s", "counted", "s", "checks", {"checks": [row]}, "f", {"a": block})
    monkeypatch.setattr(claims, "load", lambda name: claim)
    found, err = verdicts(capsys, "made-up", status=1)
    assert found["made-up"]["verdict"] == "undecided" and "no_such_thing" in found["made-up"]["reason"]
    assert "claim not evaluated: made-up" in err


def test_words_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["claims", "cli-native-slow", "exit-cost-falls"]) == 0
    out = capsys.readouterr().out
    assert "HOLDS      exit-cost-falls  (cited, calibrated)" in out and "decided by entry = 402" in out
    assert "fails on k8-2005" in out and out.rstrip().endswith("2 claims: 2 holds, 0 fails, 0 undecided")
    assert max(map(len, out.splitlines())) <= 104
    assert main(["claims", "--brief", "exit-cost-falls"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split()[:2] == ["holds", "exit-cost-falls"]


def test_an_unknown_claim_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["claims", "popf-silnt"]) == 2
    assert "popf-silent" in capsys.readouterr().err


@pytest.mark.slow
def test_a_larger_size_gives_the_same_verdicts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every claim at its stated size and at four times that: a few minutes."""
    def sizes(factor: int) -> dict[str, str]:
        def load(name: str) -> model.Claim:
            claim = model.load(name)
            blocks = {
                key: block | ({"iterations": block["iterations"] * factor} if "iterations" in block else {})
                for key, block in claim.experiment.items()
            }
            return dataclasses.replace(claim, experiment=blocks)

        monkeypatch.setattr(claims, "load", load)
        assert main(["claims", "--json", "--jobs", "2"]) == 0, "every claim's experiment can run at this size"
        return {claim["id"]: claim["verdict"] for claim in json.loads(capsys.readouterr().out)["claims"]}

    assert sizes(4) == sizes(1)


@pytest.mark.slow
def test_at_most_five_claims_are_undecided_each_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    """And docs/claims.md has exactly those that do not hold."""
    assert main(["claims", "--json", "--jobs", "2"]) == 0
    verdicts = json.loads(capsys.readouterr().out)["claims"]
    undecided = [claim for claim in verdicts if claim["verdict"] == "undecided"]
    assert all(claim["reason"] for claim in undecided)
    assert len(undecided) <= 5, [claim["id"] for claim in undecided]
    page = Path(__file__).resolve().parent.parent.joinpath("docs/claims.md").read_text("utf-8")
    table = page.partition("### Those that do not hold here\n")[2].partition("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    assert {row[0].strip("`"): row[1] for row in rows} == {claim["id"]: claim["verdict"] for claim in verdicts if claim["verdict"] != "holds"}
