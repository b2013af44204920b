"""The charts, each a function ``(View) -> Figure``.

Rules they all keep: a ratio is a dot with whiskers (5th to 95th percentile of the sampled costs) on a log axis with
a line at 1× "native"; stacks are linear and get a panel of their own where scales differ; the title is the finding,
computed from the run; the caption says how to read the chart.
"""

from __future__ import annotations

from collections.abc import Callable
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any, Literal

from vmlab.report import findings, nanobench
from vmlab.report.ablation import ablation_title, draw_ablation, shown
from vmlab.report.canvas import Sheet, beside, fits
from vmlab.report.exits_chart import draw_exits, exits_title, per_operation
from vmlab.report.findings import Variant, name, short
from vmlab.report.nanobench import draw_nanobenchmarks
from vmlab.report.style import CAUSES, FAINT, INK, OTHER_CAUSE, RULE, look
from vmlab.report.view import Generation, View, cycles, operations, ratio, times

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Stroke = Literal["-", "--", ":"]

WHISKERS = "Dots are nominal costs, whiskers the 5th and 95th percentile of 1000 sampled costs."
#: Bars whose totals differ by more than this share no panel: the shorter could not be read.
SCALE = 8.0


def slowdown(view: View) -> Figure:
    """Slowdown per technique: a panel per workload, oldest generation, densest cells."""
    workloads = view.workloads[:8]
    generation = view.generations[0]
    rows = view.rows(workloads)
    columns = fits(min(len(workloads), 2))
    lines = -(-len(workloads) // columns)
    caption = (f"Time relative to the bare machine on {generation.words}; left of the line is faster than native. {WHISKERS} "
               "Each panel is a workload at its densest; a missing dot means that the run was not made.")
    names, left, tall = beside([name(variant) for variant in rows])
    heights = [(0.14 + 0.17 * tall) * len(rows) + 0.25] * lines
    sheet = Sheet(findings.slowdown_title(view), caption, heights, columns, left=left, right=0.35, gap=0.72, side=0.5)
    limits = _limits([r for w in workloads for v in rows for r in [_at(view, w, v, generation)] if r])
    for i, axes in enumerate(axes for line in sheet.axes for axes in line):
        if i >= len(workloads):
            axes.remove()
            continue
        workload = workloads[i]
        _ratio_axis(axes, "x", limits)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks(range(len(rows)), names if i % columns == 0 else [""] * len(rows))
        axes.tick_params(axis="y", length=0)
        axes.set_title(view.what(workload), loc="left", fontsize=11)
        for y, variant in enumerate(rows):
            axes.axhline(y, color=RULE, linewidth=0.6, zorder=0)
            found = _at(view, workload, variant, generation)
            if found:
                value, low, high = found
                axes.errorbar([value], [y], xerr=[[value - low], [high - value]], **_dot(variant, view, workload))
                right = high < limits[1] / 6
                axes.annotate(times(value), (high if right else low, y), xytext=(7 if right else -7, 0), va="center",
                              textcoords="offset points", fontsize=9.5, ha="left" if right else "right",
                              bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85})
            elif view.column(workload, variant):
                axes.text(0.03, y, "not on this CPU", transform=axes.get_yaxis_transform(), va="center", fontsize=9, color=FAINT,
                          bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85})
    return sheet.figure


def causes(view: View) -> Figure:
    """Cycles per operation by cause: oldest and newest generation, a row of panels per scale."""
    workload = view.headline
    ends = list(dict.fromkeys((view.intel[0], view.intel[-1])))[:fits(2)]
    totals = {}
    for variant in view.variants(workload):
        cell = view.densest(workload, variant)
        price = cycles(cell, ends[0].name)
        if price:
            totals[variant] = float(price["total"]) / max(operations(cell), 1)
    groups = _by_scale(totals)
    used = [c for c in CAUSES if any(
        (cycles(view.densest(workload, v), g.name) or {}).get("breakdown", {}).get(c, 0) for v in totals for g in ends)]
    counted = operations(view.densest(workload, next(iter(totals)))) > 0
    unit = "operation (one execution of the named instruction)" if counted else "run"
    caption = (f"Cycles per {unit} of {view.what(workload)}, nominal costs. Stacks are linear and can be "
               "compared within a row of panels; each row has its own scale, because a bar would vanish on another's.")
    names, left, tall = beside([name(variant) for variant in totals])
    label = dict(zip(totals, names, strict=True))
    sheet = Sheet(findings.causes_title(view), caption, [(0.19 + 0.17 * tall) * len(group) + 0.15 for group in groups], len(ends), left=left,
                  legend_rows=-(-len(used) // fits(3, 2.4)), side=0.35, foot=0.5)
    from matplotlib.patches import Patch

    sheet.legend([Patch(facecolor=CAUSES[c], edgecolor="white", label=c) for c in used], fits(3, 2.4))
    for line, group in zip(sheet.axes, groups, strict=True):
        top = 0.0
        for axes, generation in zip(line, ends, strict=True):
            for y, variant in enumerate(group):
                top = max(top, _stack(axes, y, view, workload, variant, generation))
        for axes, generation in zip(line, ends, strict=True):
            axes.set_xlim(0, top * 1.22)
            axes.set_ylim(len(group) - 0.45, -0.55)
            axes.set_yticks(range(len(group)), [label[v] for v in group] if axes is line[0] else [""] * len(group))
            axes.tick_params(axis="y", length=0)
            axes.locator_params(axis="x", nbins=4)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 10 or value == 0 else f"{value:g}")
            if line is sheet.axes[0]:
                axes.set_title(short(generation), loc="left", fontsize=11)
            if line is sheet.axes[-1]:
                axes.set_xlabel("cycles per operation" if counted else "cycles")
    return sheet.figure


def density(view: View) -> Figure:
    """Slowdown against density: oldest and newest generation side by side."""
    from matplotlib.ticker import NullLocator

    workload = view.headline
    ends = list(dict.fromkeys((view.intel[0], view.intel[-1])))
    variants = [v for v in view.variants(workload) if v[0] != "native"]
    caption = (f"Density: executions of the named instruction of {workload} per 1000 other instructions of the guest. {WHISKERS} "
               "Below the line the technique is faster than the bare machine.")
    columns = fits(len(ends))
    sheet = Sheet(findings.density_title(view), caption, [3.1 if columns == len(ends) else 2.2] * (len(ends) // columns), columns, left=0.8,
                  legend_rows=-(-len(variants) // fits(2)), foot=0.5, gap=1.1)
    sheet.legend(_handles(view, [workload], variants), fits(2))
    panels = [axes for line in sheet.axes for axes in line]
    found = [r for v in variants for c in view.column(workload, v) for g in ends for r in [_ratio(c, g)] if r]
    limits, ticks = _limits(found), view.densities(workload)
    wide = len(ticks) > 1 and ticks[0] > 0 and ticks[-1] / ticks[0] >= 20
    for panel, (axes, generation) in enumerate(zip(panels, ends, strict=True)):
        _ratio_axis(axes, "y", limits, labelled=panel % columns == 0)
        if wide:
            axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(short(generation), loc="left")
        axes.set_xlabel("per 1000 other instructions")
        for i, variant in enumerate(variants):
            points = [(_beside(float(c["parameters"].get("density") or 0), i - (len(variants) - 1) / 2, ticks, wide), r)
                      for c in view.column(workload, variant) for r in [_ratio(c, generation)] if r]
            _line(axes, [x for x, _ in points], [r for _, r in points], variant, view, workload)
        if panel % columns == 0:
            axes.set_ylabel("slowdown")
    return sheet.figure


def generations(view: View) -> Figure:
    """Slowdown against CPU generation, a panel per workload, with the places where two techniques change places."""
    workloads = view.workloads[:4]
    shown = [*view.intel, *(g for g in view.generations if g not in view.intel)]
    variants = view.rows(workloads)
    lettered = list(zip(ascii_uppercase, [(w, c) for w in workloads for c in findings.crossings(view, w)], strict=False))
    key = " ".join(f"{letter}: {name(c.second)} overtakes {name(c.first)} by {short(c.after)}." for letter, (_, c) in lettered)
    apart = f"; {shown[-1].vendor} stands apart" if len(shown) > len(view.intel) else ""
    caption = f"Each workload at its densest. Lines join successive generations of one maker{apart}. {WHISKERS} " + (
        f"Rings mark crossings, interpolated, where the ranges are apart on one side at least. {key}" if lettered
        else "No two lines cross with their ranges apart.")
    columns = fits(min(len(workloads), 2))
    heights = [3.1 if len(workloads) == 1 else 2.2] * -(-len(workloads) // columns)
    sheet = Sheet(findings.generations_title(view), caption, heights, columns, left=0.8, gap=0.85,
                  legend_rows=-(-len(variants) // fits(2)), foot=0.42)
    sheet.legend(_handles(view, workloads, variants), fits(2))
    limits = _limits([r for w in workloads for v in variants for g in shown for r in [_at(view, w, v, g)] if r])
    for i, axes in enumerate(axes for line in sheet.axes for axes in line):
        if i >= len(workloads):
            axes.remove()
            continue
        _ratio_axis(axes, "y", limits, labelled=i % columns == 0)
        axes.set_title(view.what(workloads[i]), loc="left", fontsize=11)
        if i % columns == 0:
            axes.set_ylabel("slowdown")
        _generation_lines(axes, view, workloads[i], shown, [(letter, c) for letter, (w, c) in lettered if w == workloads[i]])
    return sheet.figure


def _generation_lines(
    axes: Axes, view: View, workload: str, shown: list[Generation], lettered: list[tuple[str, findings.Crossing]],
) -> None:
    line, variants = view.intel, [v for v in view.variants(workload) if v[0] != "native"]
    xs = {g.name: i + (0.0 if g in line else 0.2) for i, g in enumerate(shown)}
    axes.set_xticks(list(xs.values()), [short(g).replace(" ", "\n") for g in shown])
    axes.set_xlim(-0.4, max(xs.values()) + 0.4)
    # Side by side, or whiskers of equal value would hide one another.
    shifts = {variant: 0.07 * (i - (len(variants) - 1) / 2) for i, variant in enumerate(variants)}
    for variant in variants:
        for part in (line, *([g] for g in shown if g not in line)):
            points = [(xs[g.name] + shifts[variant], r) for g in part for r in [_at(view, workload, variant, g)] if r]
            _line(axes, [x for x, _ in points], [r for _, r in points], variant, view, workload)
    for letter, crossing in lettered:
        own = [shifts[v] for v in (crossing.first, crossing.second) if v in shifts]
        where = (xs[crossing.before.name] + crossing.position + sum(own) / max(len(own), 1), crossing.value)
        axes.plot(*where, marker="o", markersize=13, markerfacecolor="none", markeredgecolor=INK, markeredgewidth=1.2, zorder=6)
        axes.annotate(letter, where, xytext=(8, 8), textcoords="offset points", fontsize=10.5, fontweight="bold", zorder=7)
    if len(shown) > len(line):
        axes.axvline(len(line) - 0.4, color=RULE, linewidth=1)


#: Chart by file name, in the order of the report.
CHARTS: dict[str, Callable[[View], Any]] = {
    "slowdown": slowdown, "causes": causes, "density": density, "generations": generations,
    "exits": draw_exits, "nanobenchmarks": draw_nanobenchmarks, "ablation": draw_ablation,
}

#: Title by chart: the finding.
TITLES: dict[str, Callable[[View], str]] = {
    "slowdown": findings.slowdown_title, "causes": findings.causes_title, "density": findings.density_title,
    "generations": findings.generations_title,
    "exits": exits_title, "nanobenchmarks": lambda view: nanobench.finding(nanobench.tables(view.results)),
    "ablation": ablation_title,
}


def drawable(view: View) -> list[str]:
    """The charts that this run has the data for."""
    if not view.generations or not any(v[0] != "native" for v in view.variants(view.headline)):
        return []
    enough = {
        "slowdown": True,
        "causes": True,
        "density": len(view.densities(view.headline)) > 1,
        "generations": len(view.generations) > 1,
        "exits": bool(per_operation(view)),
        "nanobenchmarks": nanobench.worth_drawing(view.results),
        "ablation": bool(shown(view)),
    }
    return [chart for chart in CHARTS if enough[chart]]


def _ratio(cell: Any, generation: Generation) -> tuple[float, float, float] | None:
    found = ratio(cell, generation.name)
    return (found.value, found.low, found.high) if found else None


def _at(view: View, workload: str, variant: Variant, generation: Generation) -> tuple[float, float, float] | None:
    column = view.column(workload, variant)
    return _ratio(column[-1], generation) if column else None


def _beside(x: float, place: float, ticks: list[float], wide: bool) -> float:
    """``x`` moved a little, so that whiskers of several techniques at one density do not hide one another."""
    if wide:
        return float(x * (ticks[-1] / ticks[0]) ** (0.012 * place))
    return x + 0.012 * place * (ticks[-1] - ticks[0])


def _limits(ratios: list[tuple[float, float, float]]) -> tuple[float, float]:
    """Log-axis limits with some room, always with 1 inside."""
    low = min([0.8, *(low for _, low, _ in ratios)])
    high = max([1.25, *(high for _, _, high in ratios)])
    room = (high / low) ** 0.08
    return low / room, high * room


def _ratio_axis(axes: Axes, which: str, limits: tuple[float, float], labelled: bool = True) -> None:
    """A log axis of slowdowns with the line at 1× and ticks in words."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    (axes.set_xlim if which == "x" else axes.set_ylim)(*limits)
    narrow = limits[1] / limits[0] < 30
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: "" if not labelled else "native" if value == 1 else f"{value:g}×"))
    axes.grid(axis="x" if which == "x" else "y")
    (axes.axvline if which == "x" else axes.axhline)(1.0, color=INK, linewidth=1.3, zorder=1)


#: Fill (None: the technique's colour) and line of a technique's first, second and every further variant.
_VARIANTS: tuple[tuple[str | None, Stroke], ...] = ((None, "-"), ("white", "--"), ("#C8C8C8", ":"))


def _variant(variant: Variant, view: View, workloads: list[str]) -> tuple[str, Stroke]:
    """Fill and line: a technique's variants share colour and marker, and differ in these."""
    siblings = [v for v in view.rows(workloads) if v[0] == variant[0]]
    fill, line = _VARIANTS[min(siblings.index(variant) if variant in siblings else 0, len(_VARIANTS) - 1)]
    return fill or look(variant[0]).colour, line


def _dot(variant: Variant, view: View, workload: str) -> dict[str, Any]:
    style = look(variant[0])
    fill = _variant(variant, view, [workload])[0]
    return {"marker": style.marker, "color": style.colour, "markerfacecolor": fill, "markeredgecolor": style.colour,
            "markersize": 7, "markeredgewidth": 1.5, "capsize": 3, "elinewidth": 1.4, "linestyle": "none", "zorder": 3}


def _line(
    axes: Axes, xs: list[float], ratios: list[tuple[float, float, float]], variant: Variant, view: View, workload: str,
) -> None:
    if not xs:
        return
    values = [value for value, _, _ in ratios]
    errors = [[value - low for value, low, _ in ratios], [high - value for value, _, high in ratios]]
    style = _dot(variant, view, workload) | {"linestyle": _variant(variant, view, [workload])[1], "linewidth": 1.6}
    axes.errorbar(xs, values, yerr=errors, **style)


def _handles(view: View, workloads: list[str], variants: list[Variant]) -> list[Line2D]:
    from matplotlib.lines import Line2D

    made = []
    for variant in variants:
        style = look(variant[0])
        fill, line = _variant(variant, view, workloads)
        made.append(Line2D(
            [], [], color=style.colour, marker=style.marker, markersize=7, markeredgewidth=1.5, linewidth=1.6,
            label=name(variant), markerfacecolor=fill, linestyle=line,
        ))
    return made


def _by_scale(totals: dict[Variant, float]) -> list[list[Variant]]:
    """Variants by ascending total, cut where a bar would be too short beside the longest of its group."""
    groups: list[list[Variant]] = []
    for variant in sorted(totals, key=lambda v: totals[v]):
        if groups and totals[variant] <= SCALE * max(totals[groups[-1][0]], 1e-9):
            groups[-1].append(variant)
        else:
            groups.append([variant])
    return groups


def _stack(axes: Axes, y: int, view: View, workload: str, variant: Variant, generation: Generation) -> float:
    """One bar; returns its length, 0 where there is no price."""
    cell = view.densest(workload, variant)
    price = cycles(cell, generation.name)
    if not price:
        axes.annotate("not on this CPU", (0, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9, color=FAINT)
        return 0.0
    per, left = max(operations(cell), 1), 0.0
    breakdown = price["breakdown"]
    for cause in [*(c for c in CAUSES if c in breakdown), *(c for c in breakdown if c not in CAUSES)]:
        width = breakdown[cause] / per
        axes.barh(y, width, left=left, height=0.68, color=CAUSES.get(cause, OTHER_CAUSE), edgecolor="white", linewidth=0.6)
        left += width
    axes.annotate(f"{left:,.0f}" if left >= 10 else f"{left:.1f}", (left, y), xytext=(4, 0), textcoords="offset points",
                  va="center", fontsize=9.5)
    return left
