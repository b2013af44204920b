"""The chart of exits by reason: how often the CPU leaves the guest for the monitor, an operation, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmlab.ledger import EVENTS
from vmlab.report.exits import reasons
from vmlab.report.findings import Variant, name
from vmlab.report.style import FAINT, OTHER_CAUSE
from vmlab.report.view import View, operations

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Reasons with a colour of their own; the others of a run are one grey.
SHOWN = 8
#: Told apart in greyscale too, in the order of the reasons' weight in the run.
COLOURS = ("#0A3070", "#F0B323", "#2C9C80", "#B3420D", "#B79CE0", "#3A3E45", "#79B4E3", "#E79AB0")
#: Bars whose totals differ by more than this share no panel: the shorter could not be read.
_SCALE = 8.0


def per_operation(view: View) -> dict[Variant, dict[str, float]]:
    """Exits by reason, of each variant on the headline workload at its densest: an operation, or in all where the guest counts none.

    Those that never leave are left out.
    """
    found: dict[Variant, dict[str, float]] = {}
    for variant in view.variants(view.headline):
        if variant[0] == "native":
            continue
        cell = view.densest(view.headline, variant)
        count = operations(cell) if cell.get("work") else 1
        if count:
            found[variant] = {kind: n / count for kind, n in reasons(cell.get("events") or {}).items() if n / count >= 0.0005}
    return {variant: rates for variant, rates in found.items() if rates}


def exits_title(view: View) -> str:
    """Who leaves the guest most, how often, and mainly why."""
    found = per_operation(view)
    totals = {variant: sum(rates.values()) for variant, rates in found.items()}
    most = max(totals, key=lambda variant: totals[variant])
    reason, often = max(found[most].items(), key=lambda item: item[1])
    never = [name(v) for v in view.variants(view.headline) if v[0] != "native" and v not in found]
    quiet = f"; {never[0]} never" if len(never) == 1 else f"; {len(never)} others never" if never else ""
    return (f"{view.headline}: {name(most)} leaves the guest {_number(totals[most])} times{' an operation' if _counted(view) else ''}, "
            f"{100 * often / totals[most]:.0f} % of them for {_words(reason)}{quiet}")


def _counted(view: View) -> bool:
    """Whether the guest counts what it does: a kernel from a file does not."""
    return any(cell.get("work") for cell in view.cells if view.work(cell) == view.headline)


def draw_exits(view: View) -> Any:
    """Stacked bars on linear axes, a panel per scale."""
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    from vmlab.report.canvas import Sheet, beside, fits

    found = per_operation(view)
    weight: dict[str, float] = {}
    for rates in found.values():
        total = sum(rates.values())
        for kind, often in rates.items():
            if often >= 0.02 * total:  # what cannot be seen needs no colour
                weight[kind] = weight.get(kind, 0.0) + often / total
    colours = dict(zip(sorted(weight, key=lambda kind: (-weight[kind], kind))[:SHOWN], COLOURS, strict=False))
    groups = _by_scale({variant: sum(rates.values()) for variant, rates in found.items()})
    what = f"an operation of the {view.headline} workload" if _counted(view) else f"of {view.headline}"
    caption = (f"Exits {what} by reason: VM exits, traps, hypercalls and callouts, counted exactly. "
               "Panels have scales of their own; techniques that never leave the guest have no bar.")
    legend = [Patch(color=colour, label=_words(kind)) for kind, colour in colours.items()]
    if any(kind not in colours for rates in found.values() for kind in rates):
        legend.append(Patch(color=OTHER_CAUSE, label="other reasons"))
    names, left, tall = beside([name(variant) for variant in found])
    label = dict(zip(found, names, strict=True))
    sheet = Sheet(exits_title(view), caption, [(0.25 + 0.17 * tall) * len(group) + 0.1 for group in groups], left=left, right=0.25,
                  gap=0.45, legend_rows=-(-len(legend) // fits(2)))
    for (axes,), group in zip(sheet.axes, groups, strict=True):
        axes.set_yticks(range(len(group)), [label[variant] for variant in group])
        axes.set_ylim(len(group) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        axes.set_xlim(0, 1.2 * max(sum(found[variant].values()) for variant in group))  # room for the number behind the bar
        axes.xaxis.set_major_locator(MaxNLocator(nbins=3 * fits(2)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        for y, variant in enumerate(group):
            _bar(axes, y, found[variant], colours)
    sheet.legend(legend, columns=fits(2))
    return sheet.figure


def _bar(axes: Axes, y: int, rates: dict[str, float], colours: dict[str, str]) -> None:
    left = 0.0
    shown = [(kind, rates[kind]) for kind in colours if kind in rates]
    rest = sum(often for kind, often in rates.items() if kind not in colours)
    for kind, often in [*shown, ("", rest)]:
        axes.barh(y, often, left=left, height=0.66, color=colours.get(kind, OTHER_CAUSE), edgecolor="white", linewidth=0.6)
        left += often
    axes.annotate(_number(left), (left, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9.5, color=FAINT)


def _by_scale(totals: dict[Variant, float]) -> list[list[Variant]]:
    groups: list[list[Variant]] = []
    for variant in sorted(totals, key=lambda v: totals[v]):
        if groups and totals[variant] <= _SCALE * totals[groups[-1][0]]:
            groups[-1].append(variant)
        else:
            groups.append([variant])
    return groups


def _words(kind: str) -> str:
    return EVENTS[kind].words if kind in EVENTS else kind


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
