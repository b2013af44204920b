"""The experiments that come with vmlab: valid, described, with a headline chart; and (slow) their small size gives the expected verdicts."""

from __future__ import annotations

from pathlib import Path

import pytest
from foreign import need_images_of

from vmlab.cli.main import main
from vmlab.experiment import schema, yamlfile
from vmlab.experiment.lab import Lab
from vmlab.experiment.schema import Experiment

NAMES = list(schema.builtin())


def load(name: str, *, quick: bool = False) -> Experiment:
    return schema.load(yamlfile.read(schema.find(name)), Lab(), quick=quick)


def test_all_that_are_promised_are_there() -> None:
    assert {"cli_heavy", "syscall_heavy", "fork_heavy", "pagetable_heavy", "fault_heavy", "switch_heavy", "io_heavy", "tlb_heavy", "compute", "mixed",
            "nanobenchmarks"} <= {*NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_each_asks_a_question_and_expects_verdicts(name: str) -> None:
    full, quick = load(name), load(name, quick=True)
    assert full.name == name and full.title != name and full.question.endswith("?") and full.description
    assert full.charts and full.profiles and full.claims
    assert {*full.expect} == {*full.claims}
    assert {cell.technique for cell in full.cells} >= {"native", "hardware-assisted"}
    # Nothing but sizes differs in the small run; a kernel from a file has none, and one of its ways may be left out.
    kinds = [[(cell.technique, {k: v for k, v in cell.parameters.items() if k != "iterations"}) for cell in one.cells] for one in (full, quick)]
    if str(full.cells[0].parameters["guest"]).startswith("$"):
        assert [kind for kind in kinds[0] if kind in kinds[1]] == kinds[1]
        return
    assert kinds[0] == kinds[1]
    assert all(b.parameters.get("iterations", 0) <= a.parameters.get("iterations", 0) for a, b in zip(full.cells, quick.cells, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_small_size_gives_the_expected_verdicts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_images_of(name)
    monkeypatch.chdir(tmp_path)
    assert main(["experiment", name, "--quick", "--strict", "--jobs", "2", "--out", "out"]) == 0
    experiment = load(name)
    assert (tmp_path / "out" / "plots" / f"{experiment.charts[0]}.svg").is_file()
