"""The report: computed sentences, tables that any console can carry, charts that are told apart, a page that is safe."""

from __future__ import annotations

import base64
import copy
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import made_up_run
import pytest

from vmlab import report
from vmlab.errors import ExperimentError
from vmlab.report import findings
from vmlab.report.charts import CHARTS, drawable
from vmlab.report.style import CAUSES, LOOKS, lightness, look
from vmlab.report.view import View, times

HOSTILE = "<script>alert(1)</script>\"'&$x"

#: What the made-up run has data for; nanobenchmarks have a file of tests of their own.
DRAWN = [name for name in CHARTS if name != "nanobenchmarks"]


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return made_up_run.results()


@pytest.fixture(scope="module")
def written(results: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    report.write(directory, results, {"title": "A title", "question": "Why?"})
    return directory


def doctored(results: dict[str, Any], technique: str, factor: float) -> dict[str, Any]:
    """The run with all slowdowns of a technique multiplied."""
    made = copy.deepcopy(results)
    for cell in made["cells"]:
        if cell["technique"] == technique:
            for ratio in cell["slowdown"].values():
                ratio.update({key: value * factor for key, value in ratio.items()})
    return made


def test_every_chart_is_named_where_names_are_asked_for() -> None:
    assert report.chart_names() == list(CHARTS)


# --- looks -------------------------------------------------------------------------------------------------


def test_techniques_are_five_different_greys_and_markers() -> None:
    for a, b in combinations(LOOKS.values(), 2):
        assert abs(lightness(a.colour) - lightness(b.colour)) >= 12
        assert a.marker != b.marker
    assert all(lightness(one.colour) <= 80 for one in LOOKS.values()), "must show on white"


def test_lightness_is_that_of_the_standard() -> None:
    assert lightness("#000000") == 0
    assert lightness("#ffffff") == pytest.approx(100, abs=0.1)
    assert lightness("#777777") == pytest.approx(50, abs=0.5)


def test_a_technique_from_elsewhere_has_a_look_under_its_own_name() -> None:
    assert look("my-own").short == "my-own"


def test_every_cause_of_the_costs_has_a_colour() -> None:
    from vmlab import costs

    assert list(CAUSES) == list(costs.CAUSES)


# --- sentences ---------------------------------------------------------------------------------------------


def test_the_summary_is_three_sentences_with_the_runs_numbers(results: dict[str, Any]) -> None:
    sentences = report.summary(results)
    assert len(sentences) == 3 and all(sentence.endswith(".") for sentence in sentences)
    dearest = next(
        c for c in results["cells"] if c["technique"] == "trap-and-emulate" and c["parameters"]["density"] == 1000
    )
    assert times(dearest["slowdown"]["prescott-2005"]["value"]) in sentences[0]
    assert "7 claims" in sentences[2]


def test_the_summary_follows_the_numbers(results: dict[str, Any]) -> None:
    before, after = report.summary(results), report.summary(doctored(results, "paravirtualization", 5000))
    assert "trap-and-emulate 30×" in before[0]
    assert "paravirtualization 3" in after[0] and before[0] != after[0]


FAILED = {"id": "x", "technique": "native", "parameters": {}, "status": "failed", "error": "boom"}


@pytest.mark.parametrize("cells", [[], [FAILED]])
def test_a_run_without_finished_cells_has_three_sentences_too(cells: list[dict[str, Any]], tmp_path: Path) -> None:
    empty = {"schema_version": 1, "experiment": "e", "cells": cells, "claims": []}
    assert len(report.summary(empty)) == 3
    assert report.terminal_table(empty)
    assert [path.name for path in report.write(tmp_path, empty, {})] == ["report.html"]


def test_a_native_run_alone_draws_nothing_and_does_not_break(results: dict[str, Any]) -> None:
    alone = results | {"cells": [cell for cell in results["cells"] if cell["technique"] == "native"]}
    assert drawable(View(alone)) == []
    assert len(report.summary(alone)) == 3
    unpriced = alone | {"cells": [{k: v for k, v in cell.items() if k != "cycles"} for cell in alone["cells"]]}
    assert report.terminal_table(unpriced) == "native alone: there is nothing to compare it with"


def test_a_technique_that_stops_beating_native_is_the_title(results: dict[str, Any]) -> None:
    title = findings.generations_title(View(results))
    assert "binary translation (in-cache) beats native on Prescott 2005" in title
    assert "Penryn 2008" in title


def test_crossings_are_those_that_the_ranges_allow(results: dict[str, Any]) -> None:
    found = findings.crossings(View(results), "cli_sti")
    assert [(c.first, c.second, c.before.name) for c in found] == [
        (("binary-translation", "in-cache"), ("native", ""), "prescott-2005"),
    ]
    assert 0 < found[0].position < 1 and found[0].value == pytest.approx(1)


def test_a_faster_technique_makes_another_crossing(results: dict[str, Any]) -> None:
    made = copy.deepcopy(results)
    for cell in made["cells"]:
        if cell["technique"] == "trap-and-emulate":
            cell["slowdown"]["haswell-2013"] = {"value": 0.01, "low": 0.009, "high": 0.011}
    assert any(c.second[0] == "trap-and-emulate" for c in findings.crossings(View(made), "cli_sti"))


def test_variants_that_do_the_same_are_one(results: dict[str, Any]) -> None:
    view = View(results)
    assert ("trap-and-emulate", "") in view.variants("cli_sti")
    assert ("trap-and-emulate", "silent") in view.variants("pushf_popf")
    assert ("trap-and-emulate", "") not in view.rows(["cli_sti", "pushf_popf"])


# --- table -------------------------------------------------------------------------------------------------


def test_the_table_is_ascii_and_has_every_workload_and_technique(results: dict[str, Any]) -> None:
    text = report.terminal_table(results)
    assert text.isascii()
    for word in ("cli_sti", "pushf_popf", "rdtsc", "compute", "trap-and-emulate (silent)", "Haswell 2013", "30x (26-55)"):
        assert word in text


def test_the_table_shows_what_a_cpu_cannot_run_and_what_failed(results: dict[str, Any]) -> None:
    made = results | {"cells": [*results["cells"], {
        "id": "native/é", "technique": "native", "parameters": {}, "status": "failed", "error": "it broke",
    }]}
    lines = report.terminal_table(made).splitlines()
    hardware = next(line for line in lines if line.strip().startswith("hardware-assisted"))
    assert hardware.split().count("-") == 1, "K8 of 2005 has no hardware assistance"
    assert lines[-1] == "failed: native/?: it broke"


# --- files -------------------------------------------------------------------------------------------------


def test_all_charts_are_written_in_both_forms(written: Path) -> None:
    files = sorted(path.name for path in (written / "plots").iterdir())
    assert files == sorted(f"{name}.{form}" for name in DRAWN for form in ("png", "svg"))
    assert (written / "plots" / "causes.png").read_bytes().startswith(b"\x89PNG")


def test_only_the_charts_asked_for_are_written(results: dict[str, Any], tmp_path: Path) -> None:
    report.write(tmp_path, results, {"charts": ["density"]})
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["density.png", "density.svg"]


def test_the_first_chart_named_is_the_headline(results: dict[str, Any], tmp_path: Path) -> None:
    page = report.write(tmp_path, results, {"charts": ["causes", "slowdown"]})[-1].read_text(encoding="utf-8")
    assert page.index('id="chart-causes"') < page.index('id="claims"') < page.index('id="chart-slowdown"')


def test_charts_are_the_same_bytes_again(results: dict[str, Any], written: Path) -> None:
    _, forms = report.draw(results, ["causes"])["causes"]
    assert forms["svg"] == (written / "plots" / "causes.svg").read_bytes()
    assert forms["png"] == (written / "plots" / "causes.png").read_bytes()


def test_a_users_matplotlib_settings_do_not_reach_our_charts(results: dict[str, Any], written: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9, "axes.facecolor": "red"}):
        _, forms = report.draw(results, ["causes"])["causes"]
    assert forms["svg"] == (written / "plots" / "causes.svg").read_bytes()


def test_nothing_in_a_chart_leaves_the_sheet_or_covers_the_title(results: dict[str, Any]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from vmlab.report.canvas import our_settings

    view = View(results)
    with our_settings():
        for name in DRAWN:
            figure = CHARTS[name](view)
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            renderer = canvas.get_renderer()
            sheet = figure.bbox
            title, caption = (text.get_window_extent(renderer) for text in figure.texts)
            panels = [axes.get_tightbbox(renderer) for axes in figure.axes]
            legends = [legend.get_window_extent(renderer) for legend in figure.legends]
            boxes = [*panels, *legends]
            for box in (title, caption, *boxes):
                assert box.x0 >= 0 and box.x1 <= sheet.x1 and box.y0 >= 0 and box.y1 <= sheet.y1, f"{name}: {box}"
            for box in boxes:
                assert not box.overlaps(title) and not box.overlaps(caption), name
            assert not any(one.overlaps(other) for one, other in combinations(panels, 2)), f"{name}: panels"
            assert not any(legend.overlaps(panel) for legend in legends for panel in panels), name


def test_ratio_axes_are_logarithmic_and_stacks_are_not(results: dict[str, Any]) -> None:
    from vmlab.report.canvas import our_settings

    view = View(results)
    with our_settings():
        assert {axes.get_xscale() for axes in CHARTS["slowdown"](view).axes} == {"log"}
        assert {axes.get_yscale() for axes in CHARTS["generations"](view).axes} == {"log"}
        assert {axes.get_xscale() for axes in CHARTS["causes"](view).axes} == {"linear"}


def test_the_page_stands_alone_and_says_what_to_doubt(written: Path) -> None:
    html = (written / "report.html").read_text(encoding="utf-8")
    assert "A title" in html and "Why?" in html and "no cache model" in html and "clock stops" in html
    assert html.count("data:image/svg+xml;base64,") == len(DRAWN)
    assert not re.findall(r"(?:src|href)=[\"'](?!data:|#)", html), "must load nothing"
    first = re.search(r"base64,([^\"]+)", html)
    assert first and base64.b64decode(first[1]).startswith(b"<?xml")


def test_hostile_words_are_escaped_everywhere(results: dict[str, Any], tmp_path: Path) -> None:
    made = copy.deepcopy(results)
    made["claims"][0] |= dict.fromkeys(("statement", "reason", "verdict", "source", "kind"), HOSTILE)
    made["claims"][0]["by_profile"] = {HOSTILE: HOSTILE}
    made["cells"] = [cell for cell in made["cells"] if cell["parameters"]["workload"] == "cli_sti"]
    for cell in made["cells"]:
        cell["id"] = HOSTILE
        cell["parameters"]["workload"] = HOSTILE
        cell["technique"] = HOSTILE if cell["technique"] == "paravirtualization" else cell["technique"]
        for priced in ("cycles", "slowdown"):
            cell[priced] = {(HOSTILE if name == "penryn-2008" else name): value for name, value in cell[priced].items()}
    made["cells"].append({"id": HOSTILE, "technique": HOSTILE, "parameters": {}, "status": HOSTILE, "error": HOSTILE})
    (tmp_path / "manifest.json").write_text('{"x": "<script>alert(2)</script>"}', encoding="utf-8")
    report.write(tmp_path, made, {"title": HOSTILE, "question": HOSTILE, "description": HOSTILE})
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert html.count("<script") == 2, "only the page's own"
    assert "&lt;script&gt;" in html
    assert len(re.findall(r"<img [^<>]*>", html)) == len(drawable(View(made)))


def test_a_place_that_cannot_be_written_is_one_sentence(results: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ExperimentError, match="cannot be written"):
        report.write(tmp_path / "file" / "run", {**results, "cells": []}, {})


@pytest.mark.parametrize(("value", "said"), [(0.074, "0.07×"), (1.0, "1.00×"), (4.16, "4.2×"), (38.4, "38×"), (1239.0, "1,240×")])
def test_ratios_are_said_with_the_figures_that_mean_something(value: float, said: str) -> None:
    assert times(value) == said


def test_a_parameter_without_effect_names_no_variant() -> None:
    """The size of pages in nested tables says nothing of shadow paging: the two differ in ``memory`` alone."""
    cells = [{"technique": "hardware-assisted", "status": "ok", "parameters": {"workload": "w", "memory": memory, "nested_page": page},
              "events": {"exit.io": n}} for n, (memory, page) in enumerate((("lazy", "4k"), ("nested", "2m")))]
    assert View({"cells": cells}).variants("w") == [("hardware-assisted", "lazy"), ("hardware-assisted", "nested")]
    cells.append({**cells[1], "parameters": {**cells[1]["parameters"], "nested_page": "4k"}, "events": {"exit.io": 9}})
    assert [told for _, told in View({"cells": cells}).variants("w")] == ["lazy", "nested, nested_page 2m", "nested, nested_page 4k"]
