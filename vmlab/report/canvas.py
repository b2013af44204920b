"""A sheet for one chart: the finding as its title, a legend, room for axes, a caption on how to read it.

Only matplotlib's object interface is used, with the Agg and SVG writers: pyplot would take a second to import and
keep global state. Everything is laid out in inches from the text's length, so that nothing overlaps.
"""

from __future__ import annotations

import contextlib
import io
import textwrap
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vmlab.report.style import FAINT, INK, RULE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

DPI = 150


@dataclass(frozen=True)
class Layout:
    """For what a chart is drawn: its width in inches, its type against the report's (1.0: 10.5 points), and whether the document that
    it goes into says title and caption itself (``plain``).
    """

    width: float
    scale: float = 1.0
    plain: bool = False

    @property
    def logical(self) -> float:
        """The width in inches that the charts lay themselves out for; the finished sheet is scaled to :attr:`width`."""
        return self.width / self.scale


#: In the report: half a slide; the smallest text is then still readable.
REPORT = Layout(7.6)
#: Type of a style, against the report's: a column of a paper has 7 points, a slide 16.
STYLES = {"report": 1.0, "paper": 7 / 10.5, "slide": 16 / 10.5}
_LAYOUT: ContextVar[Layout] = ContextVar("layout", default=REPORT)

RC: dict[str, Any] = {
    "font.family": "DejaVu Sans", "font.size": 10.5, "axes.titlesize": 11, "axes.labelsize": 10.5,
    "axes.edgecolor": FAINT, "axes.labelcolor": INK, "text.color": INK, "xtick.color": FAINT, "ytick.color": FAINT,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.spines.top": False, "axes.spines.right": False,
    # A workload may be called anything; a dollar sign is no formula.
    "text.parse_math": False,
    "axes.grid": False, "grid.color": RULE, "grid.linewidth": 0.7, "axes.axisbelow": True,
    # Byte-stable SVG: a constant salt for its ids; the date is removed when it is saved.
    "svg.hashsalt": "vmlab", "svg.fonttype": "path",
    # TrueType in PDF: embedded and searchable, as journals ask for.
    "pdf.fonttype": 42,
}

#: Width in inches of a character of the report's type, on average.
_CHARACTER = 0.079


def fits(columns: int, each: float = 3.2) -> int:
    """How many columns of ``each`` inches the sheet has room for, at most ``columns``."""
    return max(1, min(columns, int(_LAYOUT.get().logical / each)))


def beside(names: Sequence[str]) -> tuple[list[str], float, int]:
    """Names that stand left of an axis: on lines of their own where they are long, the room that they need in inches, and the most lines of one."""
    most = int(min(0.45 * _LAYOUT.get().logical, 3.0) / _CHARACTER)
    wrapped = [textwrap.wrap(name, most, break_on_hyphens=False) or [""] for name in names]
    longest = max((len(line) for lines in wrapped for line in lines), default=0)
    return ["\n".join(lines) for lines in wrapped], _CHARACTER * longest + 0.22, max(map(len, wrapped), default=1)


class Sheet:
    """A figure with ``rows`` of axes below a title and a legend, above a caption."""

    def __init__(
        self, title: str, caption: str, heights: Sequence[float], columns: int = 1, *,
        left: float = 0.75, right: float = 0.2, side: float = 0.25, gap: float = 0.5, legend_rows: int = 0, foot: float = 0.3,
    ) -> None:
        """:param heights: of each row of axes; ``left``, ``right``, ``side``, ``gap`` the room around and between them
        and ``foot`` that for tick labels below the last, all in inches."""
        from matplotlib.figure import Figure

        layout = _LAYOUT.get()
        full = self.width = layout.logical
        left = min(left, 0.48 * full)
        title_lines, caption_lines = (
            [] if layout.plain else textwrap.wrap(text, max(20, int(width * full / REPORT.width)), break_on_hyphens=False)
            for text, width in ((title, 66), (caption, 106))
        )
        head = 0.16 + 0.26 * len(title_lines)
        top = head + (0.245 * legend_rows + 0.1 if legend_rows else 0.0) + 0.36
        bottom = foot + 0.14 + 0.178 * len(caption_lines) + 0.1
        height = top + sum(heights) + gap * (len(heights) - 1) + bottom
        self.figure: Figure = Figure(figsize=(full, height), dpi=DPI, facecolor="white")
        self._legend_top = 1 - head / height
        self.figure.text(0.15 / full, 1 - 0.13 / height, "\n".join(title_lines), va="top", fontsize=13, fontweight="bold",
                         linespacing=1.25)
        self.figure.text(0.15 / full, 0.1 / height, "\n".join(caption_lines), va="bottom", fontsize=9, color=FAINT,
                         linespacing=1.3)
        width = (full - left - right - side * (columns - 1)) / columns
        self.axes: list[list[Axes]] = []
        y = height - top
        for row in heights:
            y -= row
            self.axes.append([
                self.figure.add_axes(((left + i * (width + side)) / full, y / height, width / full, row / height))
                for i in range(columns)
            ])
            y -= gap

    def legend(self, handles: Sequence[Line2D | Patch], columns: int = 3) -> None:
        """A legend without frame below the title."""
        self.figure.legend(
            handles=list(handles), loc="upper left", bbox_to_anchor=(0.05 / self.width, self._legend_top), ncol=columns,
            frameon=False, fontsize=10, handletextpad=0.5, columnspacing=1.4, borderaxespad=0.2, labelspacing=0.35,
        )


#: What is left out of each form, so that the same figure is the same bytes.
_METADATA: dict[str, Any] = {
    "png": {"Software": None}, "svg": {"Date": None, "Creator": None}, "pdf": {"CreationDate": None, "Creator": None, "Producer": None}}
FORMS = tuple(_METADATA)


def render(figure: Figure, forms: Sequence[str] = ("png", "svg"), dpi: int = DPI) -> dict[str, bytes]:
    """The figure in each of these :data:`FORMS`, the same bytes for the same figure."""
    made = {}
    for form in forms:
        stream = io.BytesIO()
        figure.savefig(stream, format=form, dpi=dpi, metadata=_METADATA[form])
        made[form] = stream.getvalue()
    return made


@contextlib.contextmanager
def drawn_for(layout: Layout) -> Iterator[None]:
    """Charts drawn inside lay themselves out for this width and type; :func:`fit` then gives the sheet its size."""
    token = _LAYOUT.set(layout)
    try:
        yield
    finally:
        _LAYOUT.reset(token)


def fit(figure: Figure, layout: Layout) -> Figure:
    """The sheet at its final size: everything that is measured in points, and the sheet itself, by the layout's scale."""
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.collections import LineCollection
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.text import Annotation, Text

    factor = layout.scale
    if factor == 1:
        return figure
    for artist in figure.findobj():
        if isinstance(artist, Text):
            artist.set_fontsize(float(artist.get_fontsize()) * factor)
            if isinstance(artist, Annotation) and artist.anncoords == "offset points":
                x, y = artist.xyann
                artist.xyann = (x * factor, y * factor)
        elif isinstance(artist, Line2D):
            artist.set_linewidth(artist.get_linewidth() * factor)
            artist.set_markersize(artist.get_markersize() * factor)
            artist.set_markeredgewidth(artist.get_markeredgewidth() * factor)
        elif isinstance(artist, LineCollection):
            artist.set_linewidth([float(width) * factor for width in np.atleast_1d(artist.get_linewidth())])
        elif isinstance(artist, Patch):
            artist.set_linewidth(artist.get_linewidth() * factor)
    for axes in figure.axes:
        if isinstance(axes, Axes):
            axes.tick_params(axis="both", which="major", pad=3.5 * factor, width=0.8 * factor, labelsize=RC["font.size"] * factor)
            axes.tick_params(axis="x", which="major", length=3.5 * factor)
            axes.xaxis.labelpad *= factor
            axes.yaxis.labelpad *= factor
    width, height = figure.get_size_inches()
    figure.set_size_inches(width * factor, height * factor)
    return figure


@contextlib.contextmanager
def our_settings() -> Iterator[None]:
    """matplotlib as it came, plus :data:`RC`: a user's own matplotlibrc must not change our files."""
    import matplotlib

    as_it_came = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
    settings: Any = {**as_it_came, **RC}
    with matplotlib.rc_context(settings):
        yield
