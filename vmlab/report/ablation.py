"""The chart of a translator taken apart: how much longer the same guest takes without each mechanism, and how the translator warms up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vmlab.report.style import INK, RULE, look
from vmlab.report.view import Cell, View, cycles, times

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TECHNIQUE = "binary-translation"
#: What is missing, by switch and its position.
WITHOUT: Mapping[tuple[str, str], str] = {
    ("chaining", "off"): "no chaining", ("lookup", "callout"): "no look-up in the cache", ("emulation", "callout"): "no templates in the cache",
    ("adaptation", "off"): "no adaptation", ("adaptation", "callout"): "adapts to callouts only",
}
EVERYTHING_OFF = "all of these off"


def taken_apart(view: View, workload: str) -> dict[str, float]:
    """What is missing → time relative to the translator with everything on, on the oldest generation; the dearest first.

    Empty where the run has no cell with everything on and another one with something off.
    """
    profile = view.generations[0].name if view.generations else ""
    whole, parts = pieces(view, workload)
    price = cycles(whole, profile) if whole else None
    found: dict[str, float] = {}
    for words, cell in parts.items():
        without = cycles(cell, profile)
        if price and without:
            found[words] = float(without["total"]) / float(price["total"])
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def pieces(view: View, workload: str) -> tuple[Cell | None, dict[str, Cell]]:
    """The cell with everything on, and the others by what is missing."""
    from vmlab.strategies.techniques import BinaryTranslationTechnique

    defaults = {key: parameter.default for key, parameter in BinaryTranslationTechnique.parameters.items()}
    whole: Cell | None = None
    parts: dict[str, Cell] = {}
    for cell in view.cells:
        if cell["technique"] != TECHNIQUE or view.work(cell) != workload:
            continue
        chosen = cell["parameters"]
        off = [key for key, default in defaults.items() if key not in ("memory", "hypervisor") and chosen.get(key, default) != default]
        if not off:
            whole = cell
        elif len(off) == 1:
            value = str(chosen[off[0]])
            parts[WITHOUT.get((off[0], value), "units of one instruction" if (off[0], value) == ("unit", "1") else f"{off[0]}: {value}")] = cell
        else:
            parts[EVERYTHING_OFF] = cell
    return whole, parts


def shown(view: View) -> list[str]:
    """The workloads that the chart has something to say about."""
    return [workload for workload in view.workloads if taken_apart(view, workload)][:4]


def ablation_title(view: View) -> str:
    """What the dearest loss costs on the first workload, and what all cost together."""
    workload = shown(view)[0]
    found = taken_apart(view, workload)
    single = [(words, value) for words, value in found.items() if words != EVERYTHING_OFF]
    together = f"; with all of it off, {times(found[EVERYTHING_OFF])}" if EVERYTHING_OFF in found else ""
    return f"{workload}: " + " and ".join(f"{words} takes {times(value)} as long" for words, value in single[:2]) + together


def draw_ablation(view: View) -> Any:
    """A panel of dots for each workload; below them, the translator's warm-up where the run recorded it."""
    from vmlab.report.canvas import Sheet, fits

    workloads = shown(view)
    found = {workload: taken_apart(view, workload) for workload in workloads}
    rows = list(dict.fromkeys(words for parts in found.values() for words in parts))
    rows.sort(key=lambda words: (words != EVERYTHING_OFF, -max(parts.get(words, 0.0) for parts in found.values())))
    columns = fits(min(len(workloads), 2))
    lines = -(-len(workloads) // columns)
    curves = {workload: curve for workload in workloads for curve in [_warm_up(view, workload)] if len(curve) > 1}
    caption = (f"Time relative to the same translator with everything on, nominal costs of {view.generations[0].words}. Users' code runs directly in "
               "every cell: that has no switch, for translated users would have the kernel's rights."
               + (" Below: units translated (solid) and exits chained (dashed) by then, from the guest's first instruction on." if curves else ""))
    heights = [0.31 * len(rows) + 0.25] * lines + ([1.5] if curves else [])
    sheet = Sheet(ablation_title(view), caption, heights, columns, left=2.1, gap=0.78, side=0.7, foot=0.55)
    limits = (0.8, max(2.0, 1.3 * max(max(parts.values()) for parts in found.values())))
    panels = [axes for line in sheet.axes[:lines] for axes in line]
    for i, axes in enumerate(panels):
        if i >= len(workloads):
            axes.remove()
        else:
            _dots(axes, workloads[i], found[workloads[i]], rows, limits, labelled=i % columns == 0)
    for i, axes in enumerate(sheet.axes[lines] if curves else []):
        if i >= len(curves):
            axes.remove()
        else:
            workload = list(curves)[i]
            _curve(axes, workload, curves[workload], labelled=i == 0)
    return sheet.figure


def _warm_up(view: View, workload: str) -> list[Mapping[str, int]]:
    whole, _ = pieces(view, workload)
    return list((whole or {}).get("warm_up") or [])


def _dots(axes: Axes, workload: str, parts: Mapping[str, float], rows: list[str], limits: tuple[float, float], *, labelled: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    axes.set_xlim(*limits)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if limits[1] < 100 else (1.0,)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: "all on" if value == 1 else f"{value:g}×"))
    axes.grid(axis="x")
    axes.axvline(1.0, color=INK, linewidth=1.3, zorder=1)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), rows if labelled else [""] * len(rows))
    axes.tick_params(axis="y", length=0)
    axes.set_title(workload, loc="left", fontsize=11)
    style = look(TECHNIQUE)
    for y, words in enumerate(rows):
        axes.axhline(y, color=RULE, linewidth=0.6, zorder=0)
        value = parts.get(words)
        if value is not None:
            axes.plot([value], [y], color=style.colour, marker=style.marker, markersize=7)
            right = value < limits[1] / 5
            axes.annotate(times(value), (value, y), xytext=(7 if right else -7, 0), va="center", textcoords="offset points", fontsize=9.5,
                          ha="left" if right else "right", bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85})


def _curve(axes: Axes, workload: str, rows: list[Mapping[str, int]], *, labelled: bool) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    style = look(TECHNIQUE)
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value < 1e6 else f"{value / 1e6:g} M"))
    at = [row["instructions"] for row in rows]
    for key, line in (("translated", "-"), ("chained", "--")):
        axes.plot(at, [row[key] for row in rows], color=style.colour, linestyle=line, linewidth=1.6)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")
    axes.set_title(f"{workload}: warm-up", loc="left", fontsize=11)
    axes.set_xlabel("guest instructions")
    if labelled:
        axes.set_ylabel("units, exits")
