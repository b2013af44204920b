"""What the tables under a report's charts must say, from results.json by Python: for comparison with an open page."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from browser import Page

from vmlab import costs
from vmlab.costs.sampling import percentiles
from vmlab.report import ablation, nanobench
from vmlab.report.exits import cell_rows
from vmlab.report.findings import name
from vmlab.report.view import View, cycles, operations, ratio, times

Table = list[list[str]]
Override = Mapping[str, float]


def fixed(value: float, places: int) -> str:
    """As JavaScript's ``toFixed``: a tie goes up, where Python's goes to the even digit."""
    return str(Decimal(value).quantize(Decimal(1).scaleb(-places), ROUND_HALF_UP))


def precise(value: float) -> str:
    """As JavaScript's ``toPrecision(2)``, for values that it writes without an exponent."""
    exact = Decimal(value)
    rounded = exact.quantize(Decimal(1).scaleb(exact.adjusted() - 1), ROUND_HALF_UP)
    return f"{rounded.quantize(Decimal(1).scaleb(rounded.adjusted() - 1)):f}"


def whole(value: float) -> str:
    return f"{int(value + 0.5):,}"


def few(value: float) -> str:
    return whole(value) if value >= 10 else precise(value)


def shown(page: Page) -> dict[str, Table]:
    """The tables in the page, by chart."""
    found: dict[str, Table] = page.run("""Object.fromEntries([...document.querySelectorAll('figure[data-chart]')].map((figure) => [
        figure.dataset.chart, [...figure.querySelectorAll('.table tbody tr')].map((row) => [...row.children].map((field) => field.textContent))]))""")
    return found


def choose(page: Page, profile: str) -> None:
    page.run(f"(() => {{ const cpu = document.getElementById('cpu'); cpu.value = {profile!r}; cpu.dispatchEvent(new Event('change')); }})()")


def expected(results: Mapping[str, Any], profile: str) -> dict[str, Table]:
    """Every chart's table on one profile, at the published costs and the headline workload."""
    view = View(results)
    made = {"slowdown": _slowdown(view, profile), "causes": _causes(view, profile), "exits": _exits(view, profile), "generations": _generations(view)}
    if len(view.densities(view.headline)) > 1:
        made["density"] = _density(view, profile)
    if ablation.shown(view):
        made["ablation"] = _ablation(view, profile)
    if nanobench.worth_drawing(results):
        made["nanobenchmarks"] = operations_table(results, profile)
    return made


def _slowdown(view: View, profile: str) -> Table:
    rows = []
    for workload in view.workloads[:8]:
        for variant in view.variants(workload):
            if variant[0] != "native":
                found = ratio(view.densest(workload, variant), profile)
                rows.append([view.what(workload), name(variant), *([times(v) for v in (found.value, found.low, found.high)] if found else ["–"] * 3)])
    return rows


def _causes(view: View, profile: str) -> Table:
    priced = []
    for variant in view.variants(view.headline):
        cell = view.densest(view.headline, variant)
        price = cycles(cell, profile)
        if price:
            per = operations(cell) or 1
            parts = [(cause, price["breakdown"][cause] / per) for cause in costs.CAUSES if price["breakdown"].get(cause)]
            priced.append((price["total"] / per, name(variant), parts))
    return [[label, cause, few(spent), f"{int(100 * spent / total + 0.5)} %"]
            for total, label, parts in sorted(priced, key=lambda row: row[0]) for cause, spent in parts]


def _density(view: View, profile: str) -> Table:
    rows = []
    for variant in view.variants(view.headline):
        for cell in view.column(view.headline, variant) if variant[0] != "native" else []:
            found = ratio(cell, profile)
            if found:
                rows.append([name(variant), f"{cell['parameters']['density']:g}", *(times(v) for v in (found.value, found.low, found.high))])
    return rows


def _generations(view: View) -> Table:
    rows = []
    for workload in view.workloads[:4]:
        for variant in view.variants(workload):
            if variant[0] != "native":
                found = [ratio(view.densest(workload, variant), g.name) for g in view.known]
                rows.append([view.what(workload), name(variant), *(times(one.value) if one else "–" for one in found)])
    return rows


def _exits(view: View, profile: str) -> Table:
    rows = []
    for variant in view.variants(view.headline):
        if variant[0] == "native":
            continue
        cell = view.densest(view.headline, variant)
        per = operations(cell)
        for row in cell_rows(cell, profile, name(variant)):
            rows.append([row.technique, row.words, f"{row.count:,}", fixed(100 * row.share, 1) + " %", few(row.count / per) if per else "–",
                         "–" if row.each is None else few(row.each), "–" if row.of_cycles is None else fixed(100 * row.of_cycles, 1) + " %"])
    return rows


def _ablation(view: View, profile: str) -> Table:
    rows = []
    for workload in ablation.shown(view):
        whole, parts = ablation.pieces(view, workload)
        for words, cell in parts.items():
            price, base = cycles(cell, profile), cycles(whole, profile) if whole else None
            rows.append([workload, words, times(price["total"] / base["total"]) if price and base else "–"])
    return rows


def operations_table(results: Mapping[str, Any], profile: str, override: Mapping[str, Override] | None = None) -> Table:
    """The nanobenchmarks on the papers' CPUs and on ``profile``; ``override``: costs held at values of the reader's, by profile."""
    moved = override or {}

    def priced(figure: nanobench.Figure, where: str) -> tuple[float, float, float] | None:
        loaded = costs.load(where).with_values(dict(moved.get(where, {})))
        if figure.quantity is None or not costs.supports(loaded, figure.platform):
            return None
        try:
            value, (low, high) = figure.quantity.value(loaded), percentiles(figure.quantity.samples(loaded))
        except costs.NoFigure:
            return None
        return value, min(low, value), max(high, value)

    def number(value: float | None) -> str:
        if value is None:
            return "–"
        return whole(value) if abs(value) >= 10 else fixed(value, 1)

    rows = []
    for table in nanobench.tables(results):
        for figure in table.figures:
            ours, here = priced(figure, table.profile), priced(figure, profile)
            value, low, high = ours or (None, None, None)
            against = "–" if not (value is not None and figure.published) else f"{Decimal(f'{value / figure.published:.2g}'):,f}×"
            words = figure.words + (f" ({figure.note})" if figure.note else "")
            rows.append([table.title, words, figure.system, number(value) + (" *" if ours and figure.calibrated else ""), number(low), number(high),
                         number(figure.published), against, number(here[0] if here else None)])
    return rows


def compare(page: Page, results: Mapping[str, Any]) -> int:
    """Every chart of the open page on every profile that it offers against Python's figures; how many fields were compared."""
    compared = 0
    profiles = page.run("[...document.getElementById('cpu').options].map((option) => option.value)")
    assert profiles == [g.name for g in View(results).known] and profiles
    for profile in profiles:
        choose(page, profile)
        wanted = expected(results, profile)
        for chart, table in shown(page).items():
            assert chart in wanted or (chart == "density" and table == []), chart
            # Of equal counts either may stand first, and the papers' rows stand by operation.
            ours, pythons = (sorted(rows) if chart in ("exits", "nanobenchmarks", "ablation") else rows for rows in (table, wanted.get(chart, [])))
            for line, pythons_line in zip(ours, pythons, strict=True):
                assert line == pythons_line, (chart, profile, line, pythons_line)
            compared += sum(map(len, table))
    return compared
