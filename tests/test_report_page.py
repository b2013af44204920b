"""report.html in a real browser: no complaint, no request, keyboard, live prices, hostile strings, size."""

from __future__ import annotations

import base64
import copy
import json
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import made_up_operations
import made_up_run
import pytest
import report_figures
from browser import Browser, Page, needs_chromium
from foreign import need_images_of

from vmlab import claims, costs, report

pytestmark = needs_chromium
READY = "document.documentElement?.dataset.ready === 'yes'"
#: Text that sticks out of its chart.
OUTSIDE = """[...document.querySelectorAll('.panel-box svg')].flatMap((svg) => {
    const box = svg.getBoundingClientRect(), out = (b) => b.left < box.left - 1 || b.right > box.right + 1;
    return [...svg.querySelectorAll('text')].filter((t) => out(t.getBoundingClientRect())).map((t) => t.textContent); })"""
CONFIG = {"title": "What does it cost?", "question": "Why?"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as made:
        yield made


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return made_up_run.results(densities=(10, 1000))


@pytest.fixture(scope="module")
def url(results: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    return report.write(tmp_path_factory.mktemp("page"), results, CONFIG)[-1].as_uri()


@pytest.mark.parametrize("width", [380, 900, 1600])
def test_it_is_whole_at_every_width(browser: Browser, url: str, width: int) -> None:
    page = browser.open(url, width=width, ready=READY)
    page.run("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    time.sleep(0.2)
    assert page.complaints() == []
    assert page.run("document.documentElement.scrollWidth") <= width, "nothing may stick out to the right"
    assert page.run("[...document.querySelectorAll('figure[data-chart]')].every((f) => f.querySelector('svg') && f.querySelector('table'))")
    assert page.run(OUTSIDE) == []


def test_its_first_figures_are_those_of_the_results(browser: Browser, url: str, results: dict[str, Any]) -> None:
    page = browser.open(url, ready=READY)
    table = page.run("[...document.querySelectorAll('[data-chart=slowdown] tbody tr')].map((row) => [...row.children].map((c) => c.textContent))")
    from vmlab.report.view import times

    shown = {(row[0], row[1]): row[2:] for row in table}
    cell = next(c for c in results["cells"] if c["technique"] == "hardware-assisted" and c["parameters"]["workload"] == "rdtsc")
    ratio = cell["slowdown"]["prescott-2005"]
    assert shown["rdtsc, density 1000", "hardware-assisted"] == [times(ratio[k]) for k in ("value", "low", "high")]
    assert len(table) > 15


def test_every_charts_figures_are_pythons_on_every_shipped_profile(browser: Browser, tmp_path: Path) -> None:
    cells = made_up_run.cells(workloads=("cli_sti", "rdtsc"), densities=(10, 1000))
    made_up_run.price(cells, costs.names())
    made = {"cells": cells, "claims": []}
    page = browser.open(report.write(tmp_path, made, CONFIG)[-1].as_uri(), ready=READY)
    assert {*report_figures.shown(page)} == {"slowdown", "causes", "density", "generations", "exits", "ablation"}
    assert report_figures.compare(page, made) > 100 * len(costs.names())
    assert page.complaints() == []


def test_operations_beside_published_figures_are_pythons_on_every_shipped_profile(browser: Browser, tmp_path: Path) -> None:
    made = made_up_operations.results(costs.names())
    file = report.write(tmp_path, made, CONFIG | {"charts": ["nanobenchmarks", "exits"]})[-1]
    page = browser.open(file.as_uri(), width=380, ready=READY)
    assert {*report_figures.shown(page)} == {"nanobenchmarks", "exits"}
    assert report_figures.compare(page, made) > 50 * len(costs.names())
    # The chart shows what its table says, and everything of it is inside.
    assert page.run("document.querySelectorAll('[data-chart=nanobenchmarks] svg[role=img]').length") == 2
    assert page.run("""[...document.querySelectorAll('.panel-box svg')].every((svg) => [...svg.querySelectorAll('text')].every((text) =>
        text.getBoundingClientRect().right <= svg.getBoundingClientRect().right + 1))""")
    # A moved cost moves our figures, the verdict of the title, and nothing that was published.
    moved = {"prescott-2005": {"exit.page_fault": 10_000.0}}
    before = page.run("document.querySelector('[data-chart=nanobenchmarks] .title').textContent")
    page = browser.open(file.as_uri() + "#cpu=prescott-2005&prescott-2005/exit.page_fault=10000", ready=READY)
    table = report_figures.shown(page)["nanobenchmarks"]
    assert sorted(table) == sorted(report_figures.operations_table(made, "prescott-2005", moved))
    assert sorted(table) != sorted(report_figures.operations_table(made, "prescott-2005"))
    after = page.run("document.querySelector('[data-chart=nanobenchmarks] .title').textContent")
    assert before.startswith("0 of 3 independent") and after.startswith("1 of 3 independent"), (before, after)
    assert page.complaints() == []


def test_exits_follow_the_workload_and_moved_costs(browser: Browser, url: str, results: dict[str, Any]) -> None:
    page = browser.open(url + "#work=rdtsc&prescott-2005/exit.default=5000", ready=READY)
    row = next(row for row in report_figures.shown(page)["exits"] if row[0] == "hardware-assisted")
    moved = costs.load("prescott-2005").with_values({"exit.default": 5000})
    each = sum(float(costs.unit_cost(kind, moved)) for kind in ("exit.rdtsc", "entry"))  # type: ignore[arg-type]
    assert 5000 < each < 10_000
    cell = next(c for c in results["cells"] if c["technique"] == "hardware-assisted" and c["parameters"]["workload"] == "rdtsc")
    price = costs.price(cell["events"], costs.load("prescott-2005"), "svm", override={"exit.default": 5000})
    assert isinstance(price, costs.Price)
    assert row[1:] == ["VM exits: rdtsc", "100,000", "100.0 %", "1.0", report_figures.whole(each), f"{100 * each * 100_000 / price.total:.1f} %"]
    assert page.run("document.querySelector('[data-chart=exits] .title').textContent").startswith("rdtsc: ")


def test_a_moved_cost_moves_charts_and_verdicts_as_in_python(browser: Browser, url: str, results: dict[str, Any]) -> None:
    page = browser.open(url + "#prescott-2005/insn.cli=2&prescott-2005/insn.sti=2", ready=READY)
    assert "2 costs moved" in page.run("document.getElementById('moved').textContent")
    from vmlab.report.view import times

    dense = [c for c in results["cells"] if c["parameters"]["workload"] == "cli_sti" and c["parameters"]["density"] == 1000]
    native = next(c for c in dense if c["technique"] == "native")
    cell = next(c for c in dense if c["parameters"].get("emulation") == "in-cache")
    ours = costs.slowdown(cell["events"], native["events"], costs.load("prescott-2005"), "x86", override={"insn.cli": 2, "insn.sti": 2})
    assert isinstance(ours, costs.Ratio)
    row = page.run("""[...document.querySelectorAll('[data-chart=slowdown] tbody tr')].map((row) => [...row.children].map((c) => c.textContent))
        .find((row) => row[0].startsWith('cli_sti') && row[1].includes('in-cache'))""")
    assert row[2:] == [times(ours.value), times(ours.low), times(ours.high)]
    book = {"prescott-2005": costs.load("prescott-2005").with_values({"insn.cli": 2, "insn.sti": 2})}
    ids = [claim["id"] for claim in results["claims"]]
    wanted = {c["id"]: c["verdict"] for c in claims.evaluate(ids, results["cells"], made_up_run.PROFILES, costbook=book)}
    said = page.run("[...document.querySelectorAll('tr[data-claim]')].map((row) => row.querySelector('.said').textContent.slice(2))")
    assert dict(zip(ids, said, strict=True)) == wanted
    assert wanted["cli-native-slow"] == "fails", "the case must be one that flips"
    page.run("document.getElementById('reset').click()")
    assert page.run("location.hash") == "" and "published" in page.run("document.getElementById('moved').textContent")
    said = page.run("[...document.querySelectorAll('tr[data-claim]')].map((row) => row.querySelector('.said').textContent.slice(2))")
    assert said == [claim["verdict"] for claim in results["claims"]]
    assert page.complaints() == []


def test_sliders_work_by_keyboard_and_the_link_carries_the_setting(browser: Browser, url: str) -> None:
    page = browser.open(url, ready=READY)
    page.run("document.querySelector('#controls details').open = true; document.querySelector('#cost-insn-cli').focus()")
    before = page.run("document.querySelector('[data-chart=slowdown] .title').textContent")
    page.press("ArrowLeft", 120)
    page.wait("location.hash.includes('insn.cli')")
    slider = "document.querySelector('#cost-insn-cli')"
    assert "beyond the published range" in page.run(f"{slider}.getAttribute('aria-valuetext')")
    assert page.run("document.querySelector('[data-chart=slowdown] .title').textContent") != before
    page.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")
    link = page.run("document.getElementById('permalink').href")
    value = page.run(f"{slider}.getAttribute('aria-valuetext')")
    again = browser.open(link, ready=READY)
    assert again.run(f"{slider}.getAttribute('aria-valuetext')") == value
    # Everything that can be used is reached by Tab, in the order of the page.
    again.run("document.body.focus()")
    seen = []
    for _ in range(14):
        again.press("Tab")
        seen.append(again.run("document.activeElement.id || document.activeElement.textContent.slice(0, 20)"))
    assert seen[0] == "To the finding" and seen.index("cpu") < seen.index("work") < seen.index("reset") < seen.index("permalink")


def test_in_print_charts_are_drawn_for_the_sheet_and_folds_open(browser: Browser, url: str) -> None:
    page = browser.open(url, width=1600, ready=READY)
    closed = page.run("document.querySelectorAll('details.print:not([open])').length")
    assert closed >= 3
    page.run("window.dispatchEvent(new Event('beforeprint'))")
    page.resize(720, 1000)  # a sheet's width; before printing the page measures itself on the screen
    page.call("Emulation.setEmulatedMedia", media="print")
    assert page.run("document.querySelectorAll('details.print:not([open])').length") == 0
    shrunk = page.run("[...document.querySelectorAll('.panel-box svg')].map((s) => s.getBoundingClientRect().width / s.getAttribute('width'))")
    assert len(shrunk) > 8 and min(shrunk) > 0.93, "type of 13 pixels stays near 13"
    assert page.run("[...document.querySelectorAll('#controls .fields, .skip, figure details')].every((e) => getComputedStyle(e).display === 'none')")
    pdf = base64.b64decode(page.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)["data"])
    assert pdf.startswith(b"%PDF") and page.complaints() == []
    page.run("window.dispatchEvent(new Event('afterprint'))")
    assert page.run("document.querySelectorAll('details.print:not([open])').length") == closed


def test_a_screen_reader_finds_names_roles_and_states(browser: Browser, url: str) -> None:
    page = browser.open(url, ready=READY)
    page.run("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    page.call("Accessibility.enable")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    found: dict[str, list[str]] = {}
    for node in nodes:
        if not node.get("ignored"):
            found.setdefault(node["role"]["value"], []).append(str(node.get("name", {}).get("value", "")))
    assert {"banner", "main", "heading", "table", "figure", "status"} <= {*found}
    for role in ("combobox", "slider", "spinbutton", "button", "link", "image", "region"):
        assert found[role] and all(found[role]), (role, found[role])
    assert all(": " in name for name in found["image"] if name), "a chart says its figures"
    assert page.run("document.documentElement.lang") == "en"
    levels = page.run("[...document.querySelectorAll('h1,h2,h3')].map((h) => Number(h.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1 and all(b <= a + 1 for a, b in pairwise(levels))


def test_the_cpu_changes_the_whole_page(browser: Browser, url: str) -> None:
    page = browser.open(url + "#cpu=haswell-2013", ready=READY)
    assert "Haswell" in page.run("document.querySelector('[data-chart=slowdown] .title').textContent")
    assert "Haswell" in page.run("document.querySelector('[data-chart=causes] .title').textContent")
    assert page.run("document.querySelectorAll('[data-chart=exits] tbody tr').length") >= 3


def test_a_word_is_explained_where_it_stands(browser: Browser, url: str) -> None:
    page = browser.open(url, ready=READY)
    page.run("document.querySelector('a.term[href=\"#term-trap-and-emulate\"]').focus()")
    assert "raises a fault" in page.run("document.querySelector('#tip').textContent")
    assert page.run("document.activeElement.getAttribute('aria-describedby')") == "tip"
    page.press("Escape")
    assert page.run("document.querySelector('#tip').hidden")
    page.run("document.activeElement.click()")
    page.wait("document.getElementById('glossary').open")


HOSTILE = "</script><script>window.owned = 1</script><img src=x onerror='window.owned = 1'>\" onmouseover=\"window.owned = 1"


def test_hostile_strings_run_nothing(browser: Browser, results: dict[str, Any], tmp_path: Path) -> None:
    made = copy.deepcopy(results)
    for cell in made["cells"]:
        cell["console"] = HOSTILE
        cell["id"] = HOSTILE + cell["id"]
        if cell["parameters"]["workload"] == "rdtsc":
            cell["parameters"]["workload"] = HOSTILE
        if cell["technique"] == "paravirtualization":
            cell["technique"] = HOSTILE
    made["claims"][0] |= dict.fromkeys(("statement", "reason", "verdict", "source", "kind"), HOSTILE)
    file = report.write(tmp_path, made, {"title": HOSTILE, "question": HOSTILE, "description": HOSTILE})[-1]
    page = browser.open(file.as_uri(), ready=READY)
    page.run("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    page.run("document.getElementById('cpu').value = 'haswell-2013'; document.getElementById('cpu').dispatchEvent(new Event('change'))")
    assert page.run("window.owned === undefined") and page.complaints() == []
    assert page.run("document.querySelectorAll('script').length") == 2
    assert page.run("document.querySelectorAll('main img:not([src^=\"data:\"])').length") == 0  # charts that are not drawn live are images


def test_nothing_else_may_run_in_it(browser: Browser, url: str, tmp_path: Path) -> None:
    """The content security policy holds even where markup did get in: the page with a foreign script put into it."""
    text = Path(url.removeprefix("file://")).read_text(encoding="utf-8")
    file = tmp_path / "tampered.html"
    file.write_text(text.replace("<main>", "<main><script>window.owned = 1</script><img src=x onerror='window.owned = 2'>"), encoding="utf-8")
    page = browser.open(file.as_uri(), ready=READY)
    assert page.run("window.owned === undefined")
    assert any("Content Security Policy" in said for said in page.complaints())


@pytest.mark.slow
def test_a_run_of_200_cells_is_small_and_quick(browser: Browser, tmp_path: Path) -> None:
    made = [made_up_run.cell(technique, told, workload, density) for workload in made_up_run.NAMED
            for density in (5, 10, 50, 100, 250, 500, 1000, 2000) for technique, told in made_up_run.VARIANTS]
    for cell in made:  # the warm part has its own counts, as in a real run
        cell["phases"] = {"roi.warm": {"events": dict(cell["events"])}}
    made_up_run.price(made, costs.names()[:6])
    results = {"cells": made, "claims": claims.evaluate(["cli-native-slow", "cli-bt-beats-native"], made, costs.names()[:6])}
    assert len(made) >= 200
    file = report.write(tmp_path, results, CONFIG)[-1]
    assert file.stat().st_size < 3_000_000
    started = time.monotonic()
    page = browser.open(file.as_uri(), ready=READY)
    assert time.monotonic() - started < 2
    assert page.complaints() == []
    json.dumps(page.run("performance.now()"))


def test_the_cost_that_decides_flips_the_verdict(browser: Browser, url: str) -> None:
    page = browser.open(url, ready=READY)
    flips = page.run("[...document.querySelectorAll('a.flip')].map((a) => a.closest('tr').dataset.claim)")
    assert len(flips) >= 2
    for number, claim in enumerate(flips):
        row = f"document.querySelector('tr[data-claim=\"{claim}\"] .verdict')"
        before = page.run(f"{row}.querySelector('.said').textContent")
        page.run(f"document.querySelectorAll('a.flip')[{number}].click()")
        page.wait("document.getElementById('moved').textContent.startsWith('1 cost')")
        assert page.run(f"{row}.querySelector('.said').textContent") != before
        assert page.run(f"{row}.querySelector('.was').textContent") == "was: " + before[2:]
        page.run("document.getElementById('reset').click()")
        assert page.run(f"{row}.querySelector('.said').textContent") == before


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(file.stem for file in (Path(__file__).parents[1] / "configs").glob("*.yaml")))
def test_every_shipped_experiments_report_is_whole(browser: Browser, tmp_path: Path, name: str) -> None:
    from vmlab.cli.main import main

    need_images_of(name)
    assert main(["experiment", name, "--quick", "--out", str(tmp_path / "run")]) in (0, 1)
    file = tmp_path / "run" / "report.html"
    assert file.stat().st_size < 3_000_000
    made = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    for width in (380, 900, 1600):
        page = browser.open(file.as_uri(), width=width, ready=READY)
        page.run("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
        time.sleep(0.2)
        assert page.complaints() == []
        assert page.run("document.documentElement.scrollWidth") <= width
        assert page.run(OUTSIDE) == [], width
    assert page.run("[...document.querySelectorAll('main figure')].every((figure) => figure.dataset.chart)"), "every chart follows its reader"
    assert report_figures.compare(page, made) > 50
    slider_by_keyboard(page)
    assert page.complaints() == []


def slider_by_keyboard(page: Page) -> None:
    """The dearest cost's slider moves it, the page says so, and Reset takes it back."""
    page.run("document.querySelector('#costs-list input[type=range]').focus()")
    page.press("ArrowRight", 5)
    page.wait("document.getElementById('moved').textContent.startsWith('1 cost moved')")
    page.run("document.getElementById('reset').focus()")
    page.press("Enter")
    page.wait("document.getElementById('moved').textContent.startsWith('All costs')")
