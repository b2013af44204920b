"""Validation: the protocol's rules hold of the data, predictions follow from events, and the committed documents are the generated ones."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from vmlab import costs
from vmlab.costs import Quantity
from vmlab.costs.paths import PATHS_FILE
from vmlab.costs.profile import PROFILES
from vmlab.errors import ConfigError
from vmlab.experiment.gather import Gatherer
from vmlab.experiment.lab import Lab
from vmlab.validation import document, table
from vmlab.validation.table import Prediction, Row, predict, published, statistics

DOCS = Path(__file__).resolve().parent.parent / "docs"
ROWS = published().rows


def committed() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DOCS / "validation.json").read_text(encoding="utf-8"))
    return found


def test_there_are_enough_rows_and_fewer_parameters_than_rows_that_set_them() -> None:
    assert len(ROWS) >= 40 and len({row.id for row in ROWS}) == len(ROWS)
    assert len(published().parameters) < sum(row.calibrated for row in ROWS)
    for keys in published().parameters:
        for key in keys:
            assert costs.load("prescott-2005").figure(key) is not None


def test_the_rules_of_what_is_held_out() -> None:
    for row in ROWS:
        if row.technique == "native" or (row.native and row.published / row.native < 1.15) or row.per == "cost":
            assert row.not_held_out or row.calibrated, row.id
        if not row.not_held_out and not row.calibrated:
            assert row.native and row.native_cell, f"{row.id}: a held-out row needs a native figure for the null model"
    for technique in ("binary-translation", "hardware-assisted", "paravirtualization"):
        assert sum(row.technique == technique and not row.not_held_out and not row.calibrated for row in ROWS) >= 5


def test_path_lengths_that_rows_set_say_so() -> None:
    """The figures that the calibration names are those that the path table marks, or are cited from the same table."""
    shared = costs.path_table()
    for key in ("path.trap", "path.decode", "path.emulate", "path.callout"):
        assert shared.paths[key].calibrates
    assert "adams-agesen-2006" in shared.paths["path.translate"].sources


ROW = Row("r", "adams-agesen-2006", "w", "what", "hardware-assisted", "prescott-2005", "cycles", 5000, "iteration", native=100,
          cell={"technique": "hardware-assisted", "workload": "w", "iterations": 10},
          native_cell={"technique": "native", "workload": "w", "iterations": 10})


def cell(technique: str, iterations: int, once: dict[str, int], **counts: int) -> dict[str, Any]:
    """A run with ``counts`` an iteration and two additions of the loop, which the empty loop has too, and ``once`` in either loop."""
    events = {name.replace("__", "."): iterations * n for name, n in counts.items()}
    events["machine.alu"] = events.get("machine.alu", 0) + 2 * iterations
    empty = {"machine.alu": 2 * iterations} | once
    return {
        "technique": technique, "parameters": {"workload": "w", "iterations": iterations}, "status": "ok",
        "platform": "svm" if technique == "hardware-assisted" else "x86", "events": events, "work": {"iterations": iterations, "operations": 10},
        "phases": {"roi.warm": {"events": events}, "empty": {"events": empty}}, "fidelity": {},
    }


def cells(**once: int) -> list[dict[str, Any]]:
    """A row's cells in both sizes."""
    happened = {name.replace("__", "."): n for name, n in once.items()}
    return [*cell_pair(10, happened), *cell_pair(20, happened)]


def cell_pair(iterations: int, once: dict[str, int]) -> list[dict[str, Any]]:
    return [cell("native", iterations, {}, machine__alu=100), cell("hardware-assisted", iterations, once, entry=1, exit__cpuid=1)]


CELLS = cells()


def test_a_row_is_predicted_by_hand() -> None:
    p = predict(ROW, CELLS, {})
    profile = costs.load("prescott-2005")
    by_hand = 2333 + 1599 + 300 * Quantity(costs={"path.trap": 1}).value(profile) / 150
    assert p.value == pytest.approx(by_hand) and p.low is not None and p.high is not None and p.low < by_hand < p.high
    assert p.slowdown == pytest.approx(by_hand / 100) and p.published_slowdown == 50 and p.held_out


def test_what_happens_once_is_in_no_row() -> None:
    """A translator that translates the empty loop at its first round, say: subtracted in full it would make the operation cheaper than nothing."""
    once = cells(bt__translate__instruction=1000)
    assert predict(ROW, once, {}).value == predict(ROW, CELLS, {}).value
    small = [cell for cell in once if cell["parameters"]["iterations"] == 10]
    assert "a slope needs two" in predict(ROW, small, {}).reason
    assert ROW.blocks["cell"]["iterations"] == [10, 20] and ROW.blocks["native"]["iterations"] == [10, 20]


def test_a_slowdown_is_a_ratio_under_common_samples() -> None:
    row = Row(**{**ROW.__dict__, "unit": "times native", "published": 40.0, "native": 1.0})
    p = predict(row, CELLS, {})
    assert p.value == pytest.approx(predict(ROW, CELLS, {}).slowdown)


def test_what_cannot_be_predicted_says_why_and_is_not_held_out() -> None:
    p = predict(ROW, CELLS[:1] + CELLS[2:3], {})
    assert p.value is None and "no finished cell" in p.reason and not p.held_out
    assert predict(ROW, CELLS, {"cell": "no such memory scheme"}).reason == "no such memory scheme"
    bare = [c | {"phases": {"roi.warm": {"events": c["events"]}}} for c in CELLS]
    assert "no empty loop" in predict(ROW, bare, {}).reason


def test_errors_and_the_null_model_by_hand() -> None:
    rows = [Row(**{**ROW.__dict__, "id": str(i), "published": published_}) for i, published_ in enumerate((1000.0, 4000.0))]
    found = statistics([Prediction(rows[0], value=2000.0, slowdown=20.0), Prediction(rows[1], value=4000.0, slowdown=40.0)])
    assert found["held_out"]["worst"] == pytest.approx(math.log10(2), rel=1e-3) and found["held_out"]["worst_row"] == "0"
    assert found["held_out"]["median"] == pytest.approx(math.log10(2) / 2, rel=1e-3)
    # The null model says 20 times for both: the geometric mean of 10 and 40.
    assert found["null_model"]["slowdowns"] == {"hardware-assisted": 20} and found["null_model"]["median"] == pytest.approx(math.log10(2), rel=1e-3)
    assert found["beats_null_model"] == {"median": True, "worst": False}


def test_the_committed_document_has_every_row_and_its_figures_follow_from_its_events() -> None:
    rows = {row["id"]: row for row in committed()["rows"]}
    assert list(rows) == [row.id for row in ROWS]
    page = (DOCS / "validation.md").read_text(encoding="utf-8")
    for row in ROWS:
        assert f"`{row.id}`" in page
        found = rows[row.id]
        assert (found["published"], found["calibrated"], found["not_held_out"]) == (row.published, row.calibrated, row.not_held_out)
        assert (found["predicted"] is None) == bool(found["not_predicted"])
        if found["predicted"] is not None:
            assert found["ratio"] == pytest.approx(found["predicted"] / row.published, rel=2e-3)


def test_the_row_worked_by_hand_is_right_to_the_figures_that_it_shows() -> None:
    """The page's example, done as a reader does it: figures from the profile's file, events from the JSON, and a multiplication."""
    page = (DOCS / "validation.md").read_text(encoding="utf-8").partition("## One row by hand\n")[2].partition("\n## ")[0]
    name = re.match(r"`([\w-]+)`", page)
    assert name
    row, = [row for row in committed()["rows"] if row["id"] == name[1]]
    assert row["held_out"] and row["unit"] == "cycles"
    figures = yaml.safe_load((PROFILES / f"{row['profile']}.yaml").read_text("utf-8"))["costs"]
    table = yaml.safe_load(PATHS_FILE.read_text("utf-8"))
    instruction = sum(share * figures[f"class.{kind}"]["value"] for kind, share in table["mix"].items())
    total, shown = 0.0, set()
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")][1:]
    for kind, often, sum_, each, cycles in lines[:-1]:
        by_hand = 0.0
        for part in sum_.split(" + "):
            found = re.fullmatch(r"(?:([\d.]+) × )?`([\w.]+)` ([\d,.]+)( instructions)?", part)
            assert found, part
            factor, key, value, length = float(found[1] or 1), found[2], float(found[3].replace(",", "")), found[4]
            family, _, rest = key.partition(".")
            assert value == (table["paths"][rest] if family == "path" else figures[key])["value"]
            by_hand += factor * value * (instruction if length else 1)
        assert float(each.replace(",", "")) == pytest.approx(by_hand, rel=5e-3)
        assert float(often) == pytest.approx(row["events"][kind], abs=6e-3)
        assert float(cycles.replace(",", "")) == pytest.approx(row["events"][kind] * by_hand, rel=5e-3, abs=0.5)
        total += row["events"][kind] * by_hand
        shown.add(kind)
    left_out = {kind: n for kind, n in row["events"].items() if kind not in shown}
    small = Quantity(left_out).value(costs.load(row["profile"]))
    assert abs(small) < 0.5 * max(1, len(left_out))
    said = float(lines[-1][-1].split("| ")[-1].replace(",", ""))
    assert said == pytest.approx(total + small, rel=1e-3) and said == pytest.approx(row["predicted"], rel=1e-3)
    assert f"Published: {row['published']:,} cycles." in page


def test_every_miss_by_more_than_a_factor_of_two_is_explained() -> None:
    missed = [row for row in committed()["rows"] if row["held_out"] and table.log_ratio(row["predicted"], row["published"]) > math.log10(2)]
    assert missed and [row["id"] for row in missed if not row["note"]] == []


def test_the_null_model_is_beaten() -> None:
    found = committed()["statistics"]
    assert found["beats_null_model"] == {"median": True, "worst": True}
    assert found["held_out"]["rows"] >= 15 and all(found["by_technique"][name]["rows"] >= 5 for name in (
        "binary-translation", "hardware-assisted", "paravirtualization"))
    held = {row["id"] for row in committed()["rows"] if row["held_out"]}
    assert {"aa-forkwait-bt-prescott", "aa-forkwait-vt-prescott", "aa-forkwait-bt-merom", "aa-forkwait-vt-merom"} <= held


@pytest.mark.slow
def test_the_committed_documents_are_the_generated_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs every row's cells: `python -m vmlab.validation` brings the documents up to date."""
    monkeypatch.chdir(tmp_path)
    predictions = document.gather(Gatherer(Lab(), "validation"), 2, document.silent)
    assert committed() == json.loads(document.as_json(predictions))
    assert (DOCS / "validation.md").read_text(encoding="utf-8") == document.as_markdown(predictions)


def test_a_broken_row_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = table.FILE.read_text(encoding="utf-8")
    for bad, says in ((text.replace("source: barham-2003", "source: nobody-1999", 1), "nobody-1999"),
                      (text.replace("    unit: cycles\n", "", 1), "lacks unit"), (text.replace("unit:", "unti:", 1), "unti")):
        (tmp_path / "published.yaml").write_text(bad, encoding="utf-8")
        monkeypatch.setattr(table, "FILE", tmp_path / "published.yaml")
        with pytest.raises(ConfigError, match=says):
            published.__wrapped__()
