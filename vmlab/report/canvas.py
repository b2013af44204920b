"""A sheet for one chart: the finding as its title, a legend, room for axes, a caption on how to read it.

Only matplotlib's object interface is used, with the Agg and SVG writers: pyplot would take a second to import and
keep global state. Everything is laid out in inches from the text's length, so that nothing overlaps.
"""

from __future__ import annotations

import contextlib
import io
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from vmlab.report.style import FAINT, INK, RULE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

#: Width in inches: half a slide; the smallest text is then still readable.
WIDTH = 7.6
DPI = 150

RC: dict[str, Any] = {
    "font.family": "DejaVu Sans", "font.size": 10.5, "axes.titlesize": 11, "axes.labelsize": 10.5,
    "axes.edgecolor": FAINT, "axes.labelcolor": INK, "text.color": INK, "xtick.color": FAINT, "ytick.color": FAINT,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.spines.top": False, "axes.spines.right": False,
    # A workload may be called anything; a dollar sign is no formula.
    "text.parse_math": False,
    "axes.grid": False, "grid.color": RULE, "grid.linewidth": 0.7, "axes.axisbelow": True,
    # Byte-stable SVG: a constant salt for its ids; the date is removed when it is saved.
    "svg.hashsalt": "vmlab", "svg.fonttype": "path",
}


class Sheet:
    """A figure with ``rows`` of axes below a title and a legend, above a caption."""

    def __init__(
        self, title: str, caption: str, heights: Sequence[float], columns: int = 1, *,
        left: float = 0.75, right: float = 0.2, side: float = 0.25, gap: float = 0.5, legend_rows: int = 0, foot: float = 0.3,
    ) -> None:
        """:param heights: of each row of axes; ``left``, ``right``, ``side``, ``gap`` the room around and between them
        and ``foot`` that for tick labels below the last, all in inches."""
        from matplotlib.figure import Figure

        title_lines, caption_lines = (
            textwrap.wrap(text, width, break_on_hyphens=False) for text, width in ((title, 66), (caption, 106))
        )
        head = 0.16 + 0.26 * len(title_lines)
        top = head + (0.215 * legend_rows + 0.12 if legend_rows else 0.0) + 0.36
        bottom = foot + 0.14 + 0.178 * len(caption_lines) + 0.1
        height = top + sum(heights) + gap * (len(heights) - 1) + bottom
        self.figure: Figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
        self._legend_top = 1 - head / height
        self.figure.text(0.15 / WIDTH, 1 - 0.13 / height, "\n".join(title_lines), va="top", fontsize=13, fontweight="bold",
                         linespacing=1.25)
        self.figure.text(0.15 / WIDTH, 0.1 / height, "\n".join(caption_lines), va="bottom", fontsize=9, color=FAINT,
                         linespacing=1.3)
        width = (WIDTH - left - right - side * (columns - 1)) / columns
        self.axes: list[list[Axes]] = []
        y = height - top
        for row in heights:
            y -= row
            self.axes.append([
                self.figure.add_axes(((left + i * (width + side)) / WIDTH, y / height, width / WIDTH, row / height))
                for i in range(columns)
            ])
            y -= gap

    def legend(self, handles: Sequence[Line2D | Patch], columns: int = 3) -> None:
        """A legend without frame below the title."""
        self.figure.legend(
            handles=list(handles), loc="upper left", bbox_to_anchor=(0.05 / WIDTH, self._legend_top), ncol=columns,
            frameon=False, fontsize=10, handletextpad=0.5, columnspacing=1.4, borderaxespad=0.2, labelspacing=0.35,
        )


def render(figure: Figure) -> dict[str, bytes]:
    """The figure as ``png`` and ``svg``, the same bytes for the same figure."""
    made = {}
    metadata: Any
    for form, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        stream = io.BytesIO()
        figure.savefig(stream, format=form, dpi=DPI, metadata=metadata)
        made[form] = stream.getvalue()
    return made


@contextlib.contextmanager
def our_settings() -> Iterator[None]:
    """matplotlib as it came, plus :data:`RC`: a user's own matplotlibrc must not change our files."""
    import matplotlib

    as_it_came = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
    settings: Any = {**as_it_came, **RC}
    with matplotlib.rc_context(settings):
        yield
