"""What an operation costs and why: nanobenchmarks beside published figures, exits by reason, densities of loads."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import made_up_operations
import pytest
from made_up_operations import finished as cell

from vmlab import costs, report
from vmlab.cli.main import main
from vmlab.report import densities, exits_chart, nanobench
from vmlab.report.charts import CHARTS, drawable
from vmlab.report.view import View


@pytest.fixture
def results() -> dict[str, Any]:
    return made_up_operations.results()


def find(results: dict[str, Any], workload: str, system: str) -> nanobench.Figure:
    return next(f for t in nanobench.tables(results) for f in t.figures if (f.workload, f.system) == (workload, system))


def test_an_operation_is_the_loop_less_the_empty_loop_by_iterations(results: dict[str, Any]) -> None:
    prescott = costs.load("prescott-2005")
    store = costs.unit_cost("machine.store", prescott)
    assert find(results, "ptemod", "native").ours == pytest.approx(store)
    round_trip = sum(float(costs.unit_cost(kind, prescott)) for kind in ("machine.store", "exit.page_fault", "entry"))  # type: ignore[arg-type]
    hidden = costs.unit_cost("shadow.fault.hidden", prescott)
    assert isinstance(hidden, float)
    assert find(results, "ptemod", "VT-x").ours == pytest.approx(round_trip + 3 * hidden)
    # Two switches an iteration.
    northwood = costs.load("northwood-2002")
    alu = costs.unit_cost("machine.alu", northwood)
    assert isinstance(alu, float)
    assert find(results, "ctxsw", "native").ours == pytest.approx(5 * alu / 2)
    assert nanobench.operation(results["cells"][-1]) is None


def test_published_figures_stand_in_cycles_with_their_ratio(results: dict[str, Any]) -> None:
    assert find(results, "ptemod", "VT-x").published == 12733
    switch = find(results, "ctxsw", "Xen")
    assert switch.published == pytest.approx(1.97 * 2400)
    assert switch.ours is not None and switch.ratio == pytest.approx(switch.ours / (1.97 * 2400))
    missing = find(results, "ptemod", "translated")
    assert missing.ours is None and missing.ratio is None and missing.published == 391


def test_rows_whose_figure_set_a_cost_are_marked(results: dict[str, Any]) -> None:
    """Prescott's store was read from the native column of ptemod; the exit's cost was not read from the paper's figure 4."""
    assert find(results, "ptemod", "native").calibrated
    assert not find(results, "ptemod", "VT-x").calibrated
    assert not find(results, "ctxsw", "Xen").calibrated
    lines = nanobench.text(results).splitlines()
    row = next(line for line in lines if line.startswith("entry stored again"))
    assert "1.0*" in row and "(1.0)" in row and "(12,733)" in row and "- (391)" in row
    assert all(line.isascii() for line in lines)


def test_every_published_row_is_a_workload_of_minios_and_its_source_is_known() -> None:
    from vmlab import guests

    for paper in nanobench.papers():
        assert paper["source"] in costs.bibliography()
        assert paper["profile"] in costs.names()
        for row in paper["rows"]:
            assert row["workload"] in guests.workloads(row.get("guest", nanobench.GUEST))
        for figures in (_published(paper, row) for row in paper["rows"]):
            assert figures and figures <= {*paper["cells"]}
    # Adams and Agesen's SYSCALL and CR8 are of 64-bit guests, each figure once.
    wide = [_published(nanobench.papers()[0], row) for row in nanobench.papers()[0]["rows"] if row.get("guest") == "minios64"]
    assert wide == [{"native", "translated", "VT-x"}] * 2


def _published(paper: Any, row: Any) -> set[str]:
    assert {*row} <= {"workload", "guest", "words", "where", "per", "note", *paper["cells"]}
    return {*row} & {*paper["cells"]}


def test_a_row_of_64_bits_takes_the_cells_of_its_own_guest(results: dict[str, Any]) -> None:
    """One workload of two guests: a store of 32 bits must not stand for CR8, nor the two be one bar of a chart."""
    store, write, empty = {"machine.store": 100, "machine.alu": 300}, {"retired.mov_to_cr": 100, "machine.alu": 300}, {"machine.alu": 300}
    results["cells"] += [cell("native", "cr8", store, empty)]
    assert not [f for t in nanobench.tables(results) for f in t.figures if f.workload == "cr8"]
    results["cells"] += [cell("native", "cr8", write, empty, guest="minios64")]
    found = find(results, "cr8", "native")
    assert found.guest == "minios64" and found.published == 150
    assert {"cr8", "cr8 on minios64"} <= {*View(results).workloads}
    assert [c["parameters"]["guest"] for c in View(results).column("cr8 on minios64", ("native", ""))] == ["minios64"]


def test_a_run_without_nanobenchmarks_has_neither_table_nor_chart(results: dict[str, Any]) -> None:
    results["cells"] = [results["cells"][-1]]
    assert nanobench.tables(results) == [] and nanobench.text(results) == ""
    assert "nanobenchmarks" not in drawable(View(results))


def test_both_charts_keep_within_their_sheet(results: dict[str, Any]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from vmlab.report.canvas import our_settings

    view = View(results)
    assert {"exits", "nanobenchmarks"} <= {*drawable(view)}
    with our_settings():
        for name in ("exits", "nanobenchmarks"):
            figure = CHARTS[name](view)
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            renderer = canvas.get_renderer()
            boxes = [axes.get_tightbbox(renderer) for axes in figure.axes] + [legend.get_window_extent(renderer) for legend in figure.legends]
            title, caption = (words.get_window_extent(renderer) for words in figure.texts)
            for box in [title, caption, *boxes]:
                assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1, (name, box)
            assert not any(a.overlaps(b) for a, b in combinations([title, caption, *boxes], 2)), name


def test_exits_are_told_by_reason_and_operation(results: dict[str, Any]) -> None:
    view = View(results)
    results["cells"][0]["parameters"]["density"] = 1
    assert view.headline
    per = exits_chart.per_operation(view)
    found = {variant[0]: rates for variant, rates in per.items()}
    assert found in ({"hardware-assisted": {"exit.page_fault": 1.0}}, {"paravirtualization": {"hypercall.mmuext_op": 2.0}})
    assert "leaves the guest" in exits_chart.exits_title(view)


def test_densities_are_the_guests_own_counts_an_operation(results: dict[str, Any]) -> None:
    found = {density.workload: density for density in densities.densities(View(results))}
    assert found["ptemod"].counted == {"pt_writes": 2.0, "faults": 0.5, "system_calls": 3.0, "cr3_loads": 0.0}
    assert found["ptemod"].instructions == 50
    assert found["ptemod"].hidden == {"hardware-assisted": 3.0}
    assert any("page-table writes" in line for line in report.terminal_table(results).splitlines())


def test_a_kernel_from_a_file_is_called_by_its_name_and_its_exits_are_those_of_the_whole_run() -> None:
    def cell(technique: str, events: dict[str, int]) -> dict[str, Any]:
        return {"id": technique, "technique": technique, "parameters": {"guest": "$VMLAB_GUEST_LINUX/vmlinuz"}, "status": "ok", "work": None,
                "events": events, "instructions": {}, "cycles": {}}

    view = View({"cells": [cell("native", {}), cell("hardware-assisted", {"exit.io": 30, "exit.page_fault": 90})]})
    assert view.headline == "vmlinuz"
    assert exits_chart.per_operation(view) == {("hardware-assisted", ""): {"exit.page_fault": 90, "exit.io": 30}}
    assert exits_chart.exits_title(view) == "vmlinuz: hardware-assisted leaves the guest 120 times, 75 % of them for VM exits: page fault"
    assert exits_chart.draw_exits(view)


def test_the_verb_prints_exits_three_ways(results: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps(results), encoding="utf-8")
    assert main(["exits", str(file), "--workload", "ptemod"]) == 0
    out = capsys.readouterr().out
    assert "VM exits: page fault" in out and "100.0 %" in out and "ctxsw" not in out
    assert main(["exits", str(file), "--perf", "--profile", "prescott-2005"]) == 0
    out = capsys.readouterr().out
    assert "VM-EXIT" in out and "EXIT.PAGE_FAULT" in out and "Total Samples:100" in out
    assert main(["exits", str(file), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["exits"]
    assert {row["kind"]: row["count"] for row in rows} == {"exit.page_fault": 100, "hypercall.mmuext_op": 200}
    assert main(["exits", str(file), "--workload", "ptemd"]) == 2
    assert main(["exits", str(file), "--profile", "haswell-2013"]) == 2
    assert main(["exits", str(tmp_path / "absent")]) == 2


def batched(batch: int, calls: int) -> list[dict[str, Any]]:
    """The same stores under paravirtualization, so many in a hypercall, and natively, where it makes no difference."""
    events = {"machine.alu": 800, "trap.int": calls, "hypercall.mmu_update": calls}
    return [cell("native", "ptemod", {"machine.alu": 800}, None, batch=batch), cell("paravirtualization", "ptemod", events, None, batch=batch)]


def test_variants_by_a_parameter_of_the_guest_are_all_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A guest's parameter that varies within one workload tells cells apart, as the technique's own do."""
    cells = [*batched(1, 100), *batched(16, 7), cell("native", "pgfault", {"machine.alu": 10}, None, batch=32),
             cell("paravirtualization", "pgfault", {"machine.alu": 10}, None, batch=32)]
    view = View({"cells": cells})
    assert view.variants("ptemod") == [("native", ""), ("paravirtualization", "batch 1"), ("paravirtualization", "batch 16")]
    assert view.variants("pgfault") == [("native", ""), ("paravirtualization", "")]
    assert view.rows(["ptemod", "pgfault"]) == [("paravirtualization", "batch 1"), ("paravirtualization", "batch 16")]
    assert [c["parameters"]["batch"] for c in view.column("ptemod", ("paravirtualization", "batch 16"))] == [16]
    assert view.column("pgfault", ("paravirtualization", "batch 1")) == [], "a cell that was not run is not another one"
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"schema_version": 1, "cells": cells}), encoding="utf-8")
    assert main(["exits", str(file), "--workload", "ptemod"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [" 100 " in line for line in lines if "batch 1)" in line] == [True] and [" 7 " in line for line in lines if "batch 16)" in line] == [True]
    assert main(["exits", str(file), "--set", "batch=16", "--json"]) == 0
    assert [(row["count"], row["technique"]) for row in json.loads(capsys.readouterr().out)["exits"]] == [(7, "paravirtualization")]
    assert main(["exits", str(file), "--set", "batch=2"]) == 2
    assert "batch = 1, 16, 32" in capsys.readouterr().err
    assert main(["exits", str(file), "--set", "btch=1"]) == 2
    assert "'batch'" in capsys.readouterr().err


def test_more_than_two_parameters_are_told_against_the_first_cell() -> None:
    usual = {"chaining": "on", "lookup": "in-cache", "unit": 12}
    cells = [cell("native", "ptemod", {"machine.alu": 8}, None)]
    for number, other in enumerate(({}, {"chaining": "off"}, {"unit": 1}, {"chaining": "off", "lookup": "callout"})):
        cells.append(cell("binary-translation", "ptemod", {"machine.alu": 10 + number}, None, **usual | other))
    told = [variant[1] for variant in View({"cells": cells}).variants("ptemod")[1:]]
    assert told == ["reference", "chaining off", "unit 1", "chaining off, callout"]


def test_exits_say_which_density_they_are_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [cell(technique, "ptemod", {"machine.alu": 8, "trap.gp": d}, None, density=d)
             for d in (10, 500) for technique in ("native", "trap-and-emulate")]
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"schema_version": 1, "cells": cells}), encoding="utf-8")
    assert main(["exits", str(file)]) == 0
    assert capsys.readouterr().out.startswith("ptemod, density 500; also in this run: 10 (--set density=")
    assert main(["exits", str(file), "--set", "density=10"]) == 0
    out = capsys.readouterr().out
    assert "also in this run" not in out and " 10 " in out and " 500 " not in out
