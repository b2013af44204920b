"""A run from file to report: what is on disk, what is kept after a mishap, and what resume takes up."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_lab import FakeLab

from vmlab.errors import ConfigError, ExperimentError, GuestImageError
from vmlab.experiment import schema, store, yamlfile
from vmlab.experiment.matrix import Cell
from vmlab.experiment.runner import Options, Outcome, Run

TEXT = """\
name: small
title: A small experiment
matrix:
  - {technique: [native, trap-and-emulate], workload: [cli_sti, popf], sensitive: [silent, trap], iterations: 5}
profiles: [old-cpu, new-cpu]
claims: [sky-is-blue]
expect: {sky-is-blue: holds}
"""


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield


def start(text: str = TEXT, lab: FakeLab | None = None, **options: Any) -> Run:
    lab = lab or FakeLab()
    experiment = schema.load(yamlfile.parse(text, "f.yaml"), lab)
    return Run(experiment, lab, Options(**options))


def finish(text: str = TEXT, lab: FakeLab | None = None, **options: Any) -> Outcome:
    return start(text, lab, **options).execute(lambda *_: None)


def manifest(directory: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    return value


def test_the_directory_holds_what_is_promised() -> None:
    outcome = finish()
    directory = outcome.directory
    assert directory.parent == Path("results/small")
    stamp, _, hash8 = directory.name.rpartition("-")
    assert ":" not in stamp and stamp.endswith("Z") and len(hash8) == 8
    assert {path.name for path in directory.iterdir()} == {
        "manifest.json", "config.yaml", "cells", "results.json", "results.csv", "report.html"}
    results = json.loads((directory / "results.json").read_text(encoding="utf-8"))
    assert list(results) == ["schema_version", "experiment", "cells", "claims"]
    assert results["schema_version"] == 1 and len(results["cells"]) == 6
    assert outcome.report == directory / "report.html"
    assert outcome.failed == [] and outcome.unexpected == []
    assert not list(directory.rglob("*.tmp"))


def test_a_cell_has_every_promised_key_and_its_file_says_the_same() -> None:
    outcome = finish()
    files = manifest(outcome.directory)["files"]
    for cell in outcome.results["cells"]:
        assert {"id", "technique", "parameters", "status", "error", "work", "instructions", "events", "phases", "cycles",
                "slowdown", "fidelity", "efficiency", "host_seconds"} <= set(cell)
        assert cell["cycles"]["old-cpu"]["breakdown"] == {"all": cell["cycles"]["old-cpu"]["total"]}
        assert cell["slowdown"]["old-cpu"]["value"] == (1.0 if cell["technique"] == "native" else 1.5)
        assert json.loads((outcome.directory / "cells" / f"{files[cell['id']]}.json").read_text(encoding="utf-8")) == cell


def test_fidelity_is_told_against_native_with_the_first_difference() -> None:
    cells = {cell["id"]: cell for cell in finish().results["cells"]}
    broken = cells["trap-and-emulate/density=10,guest=nano,iterations=5,sensitive=silent,workload=popf"]["fidelity"]
    assert broken["matches_native"] is False
    assert broken["first_difference"] == {"in": "console", "line": 2, "native": "if=1", "here": "if=0"}
    assert broken["declared"] == "POPF drops IF"
    right = cells["trap-and-emulate/density=10,guest=nano,iterations=5,sensitive=trap,workload=popf"]["fidelity"]
    assert right["matches_native"] is True and right["first_difference"] is None and right["declared"] is None


def test_the_manifest_names_versions_and_no_place() -> None:
    outcome = finish()
    text = (outcome.directory / "manifest.json").read_text(encoding="utf-8")
    value = json.loads(text)
    assert value["state"] == "finished" and value["cells"] == {"total": 6, "ok": 6}
    assert set(value["versions"]) == {"vmlab", "code", "unicorn", "capstone"}
    assert value["seeds"] == {"pricing": 1} and value["images"] == {"nano": "0" * 64}
    assert value["machine_path"] == ["portable"]
    assert str(Path.home()) not in text and os.getcwd() not in text
    assert str(Path.cwd()) not in (outcome.directory / "results.json").read_text(encoding="utf-8")


def test_the_saved_configuration_runs_the_same_cells() -> None:
    outcome = finish()
    saved = yamlfile.read(outcome.directory / "config.yaml")
    again = schema.load(saved, FakeLab())
    assert [cell.id for cell in again.cells] == [cell["id"] for cell in outcome.results["cells"]]
    assert again.hash() == manifest(outcome.directory)["config_hash"]
    assert yaml.safe_load((outcome.directory / "config.yaml").read_text(encoding="utf-8"))["expect"] == {"sky-is-blue": "holds"}


def test_two_runs_agree_in_all_but_the_time() -> None:
    first, second = (finish(jobs=jobs).results["cells"] for jobs in (1, 3))
    for cell in [*first, *second]:
        del cell["host_seconds"]
    assert first == second


def test_the_csv_is_tidy() -> None:
    outcome = finish()
    with (outcome.directory / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    traps = [row for row in rows if row["quantity"] == "events" and row["name"] == "trap.gp"]
    assert len(traps) == 4 and {row["value"] for row in traps} == {"10"}
    slow = [row for row in rows if row["quantity"] == "slowdown" and row["technique"] == "native"]
    assert {(row["profile"], row["value"], row["low"], row["high"]) for row in slow} == {
        ("old-cpu", "1.0", "0.5", "2.0"), ("new-cpu", "1.0", "0.5", "2.0")}


BAD = """\
name: bad
matrix:
  - {technique: [trap-and-emulate], workload: [cli_sti, abort, triple, unsupported], iterations: 5}
profiles: [old-cpu]
claims: [sky-is-blue, breaks]
"""


def test_failed_cells_and_broken_claims_leave_the_rest_whole() -> None:
    outcome = finish(BAD)
    cells = {c["parameters"]["workload"]: c for c in outcome.results["cells"] if c["technique"] == "trap-and-emulate"}
    assert {workload: cell["status"] for workload, cell in cells.items()} == {
        "cli_sti": "ok", "abort": "failed", "triple": "failed", "unsupported": "unsupported"}
    assert cells["abort"]["cycles"] == {} and cells["abort"]["fidelity"]["matches_native"] is None
    assert len(outcome.failed) == 2
    assert [claim["id"] for claim in outcome.not_evaluated] == ["breaks"]
    assert "ZeroDivisionError: nothing to divide by" in outcome.not_evaluated[0]["error"]
    assert manifest(outcome.directory)["state"] == "failed"


def test_out_must_be_absent_or_empty(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert finish(out=tmp_path / "empty").directory == tmp_path / "empty"
    with pytest.raises(ConfigError, match="is not empty"):
        start(out=tmp_path / "empty")


def test_a_place_below_a_file_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="cannot be used for results"):
            start(out=out)
    (tmp_path / "results").write_text("x", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be used for results"):
        start()


def test_a_damaged_image_is_found_before_anything_is_written(tmp_path: Path) -> None:
    class Damaged(FakeLab):
        def image(self, guest: str) -> str:
            raise GuestImageError("nano: truncated")

    with pytest.raises(GuestImageError):
        start(lab=Damaged())
    assert not (tmp_path / "results").exists()


def test_what_is_beside_a_guest_is_part_of_a_cells_identity_by_its_content() -> None:
    def content(initrd: str, drives: str, files: dict[str, str]) -> str:
        return store.content_hash(Cell("native", {"guest": "k", "initrd": initrd, "drives": drives, "append": ""}), "0" * 64, {}, files)

    assert store.files_beside(Cell("native", {"initrd": "i", "drives": "a,b"})) == {"i": "initrd", "a": "disk image", "b": "disk image"}
    assert store.files_beside(Cell("native", {"guest": "nano"})) == {}
    plain = content("i", "a,b", {"i": "1", "a": "2", "b": "3"})
    assert plain == content("j", "c,d", {"j": "1", "c": "2", "d": "3"})     # elsewhere, the same
    others = [content("i", "a,b", {"i": "9", "a": "2", "b": "3"}), content("i", "a,b", {"i": "1", "a": "3", "b": "2"}),
              content("", "a,b", {"a": "2", "b": "3"}), content("i", "", {"i": "1"})]
    assert len({plain, *others}) == 5


def test_an_interrupted_run_keeps_its_cells_and_resumes() -> None:
    run = start(jobs=1)
    done: list[str] = []

    def observe(name: str, status: str, seconds: float) -> None:
        done.append(name)
        if len(done) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.execute(observe)
    assert manifest(run.directory.path)["state"] == "interrupted"
    assert len(list((run.directory.path / "cells").iterdir())) == 3
    assert not (run.directory.path / "results.json").exists()

    again = start(resume=True)
    assert again.directory.path == run.directory.path
    assert again.reused == 3 and len(again.todo) == 3
    outcome = again.execute(lambda *_: None)
    assert outcome.failed == [] and len(outcome.results["cells"]) == 6
    assert manifest(outcome.directory)["state"] == "finished"
    # Nothing is unfinished any more: resuming starts afresh.
    assert start(resume=True).reused == 0


def test_resume_reuses_only_what_the_same_code_image_and_configuration_made(tmp_path: Path) -> None:
    out = tmp_path / "out"
    finish(out=out)
    assert start(out=out, resume=True).reused == 6
    newer, other = FakeLab(), FakeLab()
    newer.code_hash = "newer"
    other.image_hash = "1" * 64
    assert start(lab=newer, out=out, resume=True).reused == 0
    assert start(lab=other, out=out, resume=True).reused == 0
    with pytest.raises(ConfigError, match="holds no run of this configuration"):
        start(TEXT.replace("iterations: 5", "iterations: 6"), out=out, resume=True)
    with pytest.raises(ConfigError, match="holds no run of this configuration"):
        start(out=tmp_path, resume=True)


def test_resume_runs_failed_cells_again(tmp_path: Path) -> None:
    finish(BAD, out=tmp_path / "out")
    again = start(BAD, out=tmp_path / "out", resume=True)
    assert sorted(str(cell.parameters["workload"]) for cell in again.todo) == ["abort", "triple"]


def test_a_full_disk_in_the_middle_stops_the_run_and_keeps_what_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(jobs=1)
    real, written = os.replace, []

    def replace(source: Path, target: Path) -> None:
        written.append(target)
        if target.parent.name == "cells" and sum(path.parent.name == "cells" for path in written) > 2:
            raise OSError(28, "No space left on device")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(ExperimentError, match=r"cannot be written: No space left on device; finished cells are kept"):
            run.execute(lambda *_: None)
    assert not list(run.directory.path.rglob("*.tmp"))
    assert len(list((run.directory.path / "cells").iterdir())) == 2
    assert manifest(run.directory.path)["state"] == "stopped"
    assert start(resume=True).reused == 2


def test_a_full_disk_at_the_start_is_a_wrong_place_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def replace(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    run = start(out=tmp_path / "out")
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(ConfigError, match="No space left on device"):
        run.execute(lambda *_: None)
    assert not (tmp_path / "out").exists()


def test_a_write_is_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "file.json"
    store.write(target, "old")
    (tmp_path / "sub").write_text("a file", encoding="utf-8")
    with pytest.raises(ExperimentError, match="cannot be written"):
        store.write(tmp_path / "sub" / "file.json", "new")
    assert target.read_text(encoding="utf-8") == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.json", "sub"]


def test_a_report_that_fails_keeps_results_and_can_be_resumed() -> None:
    class Broken(FakeLab):
        def write_report(self, directory: Path, results: dict[str, Any], config: dict[str, Any]) -> list[Path]:
            assert manifest(directory)["state"] == "finished"
            raise RuntimeError("cannot draw")

    run = start(lab=Broken())
    with pytest.raises(RuntimeError):
        run.execute(lambda *_: None)
    assert manifest(run.directory.path)["state"] == "stopped"
    assert (run.directory.path / "results.json").exists()
    assert finish(resume=True).reused == 6


def test_a_verdict_other_than_expected_is_told() -> None:
    outcome = finish(TEXT.replace("sky-is-blue: holds", "sky-is-blue: fails"))
    assert outcome.unexpected == ["sky-is-blue: expected fails, found holds"]
