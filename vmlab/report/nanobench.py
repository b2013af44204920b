"""Nanobenchmarks: what one operation costs, by (loop - empty loop) / iterations, beside the figures that were published.

The published figures are data (``nanobench.yaml``). Where one of them set a cost that our figure is made of, the row
is *calibrated*: it agrees with itself, and is marked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from vmlab import costs
from vmlab.costs import NoFigure, Quantity
from vmlab.costs.figures import read_yaml
from vmlab.costs.sampling import percentiles
from vmlab.errors import ConfigError
from vmlab.report.view import Cell, View

DATA = Path(__file__).with_name("nanobench.yaml")
#: The guest of rows that name none.
GUEST = "minios"


@dataclass(frozen=True)
class Figure:
    """One operation under one of a paper's systems: our cycles with their range, the published ones, calibrated or not.

    ``ours`` is None where the run has no such cell or the CPU could not have run it, ``published`` where the paper has none.
    """

    guest: str
    workload: str
    words: str
    system: str
    technique: str
    ours: float | None
    low: float | None
    high: float | None
    published: float | None
    calibrated: bool
    note: str
    quantity: Quantity | None = None
    """Events of one operation; None where the run has no such cell."""
    platform: str = ""
    """What a CPU must provide to run the cell."""

    @property
    def row(self) -> tuple[str, str]:
        """Which row of the table this is in: guest and workload."""
        return self.guest, self.workload

    @property
    def ratio(self) -> float | None:
        """Ours over the published figure."""
        return self.ours / self.published if self.ours is not None and self.published else None


@dataclass(frozen=True)
class Table:
    """One paper's table, with our figures in it."""

    title: str
    cpu: str
    profile: str
    systems: tuple[str, ...]
    figures: tuple[Figure, ...]


@cache
def papers() -> list[Mapping[str, Any]]:
    """The published tables. :raises ConfigError: the file is broken."""
    found: list[Mapping[str, Any]] = read_yaml(DATA)["papers"]
    return found


def operation(cell: Cell, per: int = 1) -> Quantity | None:
    """Events of one operation: the warm part of the region less the empty loop, by iterations. None where there is no empty loop.

    :param per: operations in an iteration.
    """
    phases, iterations = cell.get("phases") or {}, int((cell.get("work") or {}).get("iterations") or 0)
    if "empty" not in phases or not iterations:
        return None
    loop, empty = (Quantity({k: float(n) for k, n in phases[name]["events"].items()}) for name in ("roi.warm", "empty"))
    return (loop - empty) * (1 / (iterations * per))


def tables(results: Mapping[str, Any]) -> list[Table]:
    """The papers' tables that this run has figures for, rows without any left out."""
    named = {row["workload"] for paper in papers() for row in paper["rows"]}
    cells = [cell for cell in View(results).cells if cell["parameters"].get("workload") in named]
    made = []
    for paper in papers():
        figures = [figure for row in paper["rows"] for figure in _row(paper, row, cells)]
        ran = {figure.row for figure in figures if figure.ours is not None}
        if ran:
            made.append(Table(paper["title"], paper["cpu"], paper["profile"], tuple(paper["cells"]),
                              tuple(figure for figure in figures if figure.row in ran)))
    return made


def _row(paper: Mapping[str, Any], row: Mapping[str, Any], cells: list[Cell]) -> list[Figure]:
    profile = costs.load(paper["profile"])
    work = {"guest": row.get("guest", GUEST), "workload": row["workload"]}
    made = []
    for system, wanted in paper["cells"].items():
        published = row[system] * paper["cycles"] if system in row else None
        ours: tuple[float | None, float | None, float | None] = (None, None, None)
        calibrated = False
        cell = next((c for c in cells if _is(c, work | wanted)), None)
        quantity = operation(cell, int(row.get("per", 1))) if cell else None
        if cell is not None and quantity is not None and costs.supports(profile, str(cell["platform"])):
            try:
                value, (low, high) = quantity.value(profile), percentiles(quantity.samples(profile))
            except NoFigure:
                pass  # this CPU has no figure for something in it: the place in the table stays empty
            else:
                ours = value, min(low, value), max(high, value)
                calibrated = any(_set_by(figure, paper, row, system) for figure in quantity.figures(profile).values())
        made.append(Figure(
            work["guest"], work["workload"], row["words"], system, wanted["technique"], *ours, published, calibrated, row.get("note", ""),
            quantity, str(cell["platform"]) if cell is not None else ""))
    return made


def _set_by(cost: costs.Figure, paper: Mapping[str, Any], row: Mapping[str, Any], system: str) -> bool:
    """Whether this cost was read from this row of the paper, in this system's column where it names one."""
    where = cost.where.lower()
    return paper["source"] in cost.sources and str(row["where"]).lower() in where and (system == "native" or "native" not in where)


def _is(cell: Cell, wanted: Mapping[str, Any]) -> bool:
    return all({"technique": cell["technique"], **cell["parameters"]}.get(key, value) == value for key, value in wanted.items())


def worth_drawing(results: Mapping[str, Any]) -> bool:
    """Whether the run has so many of the papers' operations that it is about them."""
    return len({figure.row for table in tables(results) for figure in table.figures}) > 2


def finding(found: list[Table]) -> str:
    """How far ours are from the published ones, in a sentence."""
    ratios = [f.ratio for t in found for f in t.figures if f.ratio is not None and not f.calibrated]
    if not ratios:
        return "What one operation costs; nothing published to set beside it"
    near = sum(0.5 <= ratio <= 2 for ratio in ratios)
    return f"{near} of {len(ratios)} independent figures are within a factor of two of what was published"


def text(results: Mapping[str, Any]) -> str:
    """The tables for a terminal, ASCII: per system our cycles, the published ones, the ratio; ``*`` marks calibrated ones."""
    lines: list[str] = []
    for table in tables(results):
        lines += [f"Nanobenchmarks, cycles an operation on {table.profile}, beside {table.title} ({table.cpu})",
                  "(loop - empty loop) / iterations; published in brackets, ratio ours/published; * a cost was set by this figure", ""]
        rows = [["operation", *table.systems]]
        by_row: dict[tuple[str, str], list[Figure]] = {}
        for figure in table.figures:
            by_row.setdefault(figure.row, []).append(figure)
        notes = []
        for figures in by_row.values():
            mark = ""
            if figures[0].note:
                notes.append(f"{figures[0].words}: {figures[0].note}")
                mark = " (note)"
            rows.append([f"{figures[0].words}{mark}", *map(_field, figures)])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines += ["  ".join(field.ljust(width) for field, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += [f"note: {note}" for note in notes] + [""]
    return "\n".join(lines).rstrip().encode("ascii", "replace").decode("ascii")


def _field(figure: Figure) -> str:
    published = f"({_number(figure.published)})" if figure.published is not None else ""
    if figure.ours is None:
        return f"- {published}".rstrip()
    ratio = f" {float(f'{figure.ratio:.2g}'):,g}x" if figure.ratio is not None else ""
    return f"{_number(figure.ours)}{'*' if figure.calibrated else ''} {published}{ratio}".rstrip()


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10 else f"{value:.1f}"


def draw_nanobenchmarks(view: View) -> Any:
    """Our figure and the published one of each operation, a panel per paper."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    from vmlab.report.canvas import Sheet, fits
    from vmlab.report.style import FAINT, RULE, look

    found = tables(view.results)
    if not found:
        raise ConfigError("the run has no nanobenchmarks to draw")
    caption = ("Cycles of one operation: the loop less the same loop around nothing, by iterations. Filled: ours, nominal costs, whiskers the 5th "
               "and 95th percentile of sampled costs. Hollow: published. A star marks figures that set one of the costs: they agree with themselves.")
    handles = _handles(found)
    heights = [0.3 * len({f.row for f in table.figures}) + 0.2 for table in found]
    sheet = Sheet(finding(found), caption, heights, left=1.75, right=0.3, gap=0.75, legend_rows=-(-len(handles) // fits(3, 2.4)))
    for (axes,), table in zip(sheet.axes, found, strict=True):
        rows = list(dict.fromkeys(figure.row for figure in table.figures))
        axes.set_xscale("log")
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks(range(len(rows)), [next(f.words for f in table.figures if f.row == row) for row in rows])
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        axes.xaxis.set_major_locator(LogLocator(numticks=5 * fits(2)))
        axes.xaxis.set_major_formatter(FuncFormatter(_tick))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(f"{table.title}; ours on {table.profile}, cycles", loc="left", fontsize=10)
        for figure in table.figures:
            style = look(figure.technique)
            y = rows.index(figure.row) + 0.22 * (table.systems.index(figure.system) - (len(table.systems) - 1) / 2)
            if figure.ours is not None and figure.ours > 0 and figure.low is not None and figure.high is not None:
                low = max(figure.low, figure.ours / 1000)  # a difference's low end may reach 0, which a log axis has not
                axes.errorbar([figure.ours], [y], xerr=[[figure.ours - low], [figure.high - figure.ours]], marker=style.marker,
                              color=style.colour, markersize=6, capsize=2, elinewidth=1.2, linestyle="none", zorder=3)
                if figure.calibrated:
                    axes.annotate("*", (figure.high, y), xytext=(3, -4), textcoords="offset points", fontsize=11, color=FAINT)
            if figure.published:
                axes.plot([figure.published], [y], marker=style.marker, markersize=8, markerfacecolor="none",
                          markeredgecolor=style.colour, markeredgewidth=1.3, linestyle="none", zorder=2)
        for y in range(len(rows)):
            axes.axhline(y + 0.5, color=RULE, linewidth=0.5, zorder=0)
    sheet.legend(handles, columns=fits(3, 2.4))
    return sheet.figure


def _tick(value: float, _: int) -> str:
    return f"{value / 1e6:g} M" if value >= 1e6 else f"{value:,.0f}" if value >= 1 else f"{value:g}"


def _handles(found: list[Table]) -> list[Any]:
    from matplotlib.lines import Line2D

    from vmlab.report.style import INK, look

    systems = {figure.technique: look(figure.technique) for table in found for figure in table.figures}
    made = [Line2D([], [], color=style.colour, marker=style.marker, markersize=6, linestyle="none", label=style.short or technique)
            for technique, style in systems.items()]
    return [*made, Line2D([], [], color=INK, marker="o", markerfacecolor="none", linestyle="none", markersize=8, label="published")]
