"""The probe on one page: what is silently different, with the difference, above what traps.

Every cell says in words what its colour says, and the colours differ in lightness too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vmlab.probe.words import groups, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Fill and text colour of a cell.
_COLOURS = {"traps": ("#0A3070", "#FFFFFF"), "ring": ("#B3420D", "#FFFFFF"), "monitor": ("#F0B323", "#1A1A1A"),
            "same": ("#C3C9D0", "#1A1A1A"), "runs": ("#FFFFFF", "#5A5A5A")}
# Inches.
_ROW, _HEAD, _CELL, _LABEL = 0.205, 0.5, 0.66, 1.62
_SIZE = 8.5


def draw(result: Mapping[str, Any]) -> dict[str, bytes]:
    """The page as ``png`` and ``svg``."""
    from vmlab.report.canvas import REPORT, Sheet, our_settings, render

    found = groups(result["rows"])
    height = sum(_HEAD + _ROW * (_half(members) if _narrow(members) else len(members)) for _, members in found)
    with our_settings():
        sheet = Sheet(_title(result), _CAPTION, [height], left=0.15, right=0.15, foot=0.0)
        axes = sheet.axes[0][0]
        axes.set_axis_off()
        axes.set_xlim(0, REPORT.width - 0.3)
        axes.set_ylim(height, 0)
        y = 0.0
        for title, members in found:
            axes.text(0, y + 0.13, f"{title} ({len(members)})", fontsize=10.5, fontweight="bold", va="center")
            y += _HEAD
            if _narrow(members):
                half = _half(members)
                for x, part in ((0.0, members[:half]), ((REPORT.width - 0.3) / 2 + 0.05, members[half:])):
                    if part:
                        _rows(axes, x, y, part)
                y += _ROW * half
            else:
                _rows(axes, 0.0, y, members)
                y += _ROW * len(members)
        return render(sheet.figure)


_CAPTION = (
    "One row: one instruction really run in the three rings of the emulated CPU, in 32-bit mode, IOPL 0 unless said otherwise. "
    "Right of the cells: the effect at CPL 3 (the outermost that differs) and what CPL 0 gives instead. A monitor can emulate only "
    "what traps (blue). Cases in brackets are further cases of the same instruction."
)


def _title(result: Mapping[str, Any]) -> str:
    counts = result["counts"]["instructions"]
    hypothetical = "On the hypothetical CPU that lets them trap, " if result["sensitive"] == "trap" else ""
    said = f"{counts['silently different']} of {sum(counts.values())} instructions are silently different outside ring 0"
    return f"{hypothetical}{said}; {counts['traps']} trap"


def _narrow(members: Sequence[Mapping[str, Any]]) -> bool:
    """Rows without a difference stand in two columns."""
    return not any(row["difference"] for row in members)


def _half(members: Sequence[Mapping[str, Any]]) -> int:
    return (len(members) + 1) // 2


def _rows(axes: Axes, x: float, y: float, members: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.patches import Rectangle

    for i in range(3):
        axes.text(x + _LABEL + _CELL * (i + 0.5), y - 0.1, f"CPL {(0, 1, 3)[i]}", fontsize=_SIZE, ha="center", va="center")
    for number, row in enumerate(members):
        top = y + _ROW * number
        axes.text(x, top + _ROW / 2, row["instruction"], fontsize=_SIZE, va="center")
        for i, ring in enumerate((0, 1, 3)):
            said = row[f"cpl{ring}"]
            fill, ink = _COLOURS[_kind(said, row["shows"])]
            axes.add_patch(Rectangle((x + _LABEL + _CELL * i, top + 0.01), _CELL - 0.03, _ROW - 0.03, facecolor=fill,
                                     edgecolor="#8A8A8A", linewidth=0.5))
            axes.text(x + _LABEL + _CELL * (i + 0.5) - 0.015, top + _ROW / 2, said, fontsize=_SIZE - 0.5, color=ink, ha="center", va="center")
        axes.text(x + _LABEL + 3 * _CELL + 0.08, top + _ROW / 2, shortened(row["difference"], 52), fontsize=_SIZE, va="center")


def _kind(said: str, shows: str) -> str:
    if said == "differs":
        return shows
    return said if said in _COLOURS else "traps"
