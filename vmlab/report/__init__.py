"""The report of a run: charts, page, summary, terminal table; all computed from results.json.

Nothing here runs a guest, and matplotlib is imported only when a chart is drawn.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmlab.errors import ExperimentError

if TYPE_CHECKING:
    from vmlab.report.view import View

__all__ = ["Figure", "chart_names", "draw", "figure", "manifest_of", "summary", "terminal_table", "write"]


#: The charts that can be drawn, in the order of the report. The names alone cost a command no import of what draws them.
CHART_NAMES = ("slowdown", "causes", "density", "generations", "exits", "nanobenchmarks", "ablation")


def chart_names() -> list[str]:
    """The names of the charts that can be drawn."""
    return list(CHART_NAMES)


def summary(results: Mapping[str, Any]) -> list[str]:
    """Three plain sentences, computed from ``results``."""
    from vmlab.report import findings

    return findings.summary(results)


def terminal_table(results: Mapping[str, Any]) -> str:
    """The results' story as a table for a terminal."""
    from vmlab.report import table

    return table.terminal_table(results)


def draw(results: Mapping[str, Any], names: list[str] | None = None) -> dict[str, tuple[str, dict[str, bytes]]]:
    """Chart name -> (its title, its bytes as ``png`` and ``svg``).

    :param names: the charts wanted, in this order; None or empty for all. A chart that the run has no data for is left out.
    """
    from vmlab.report.charts import CHARTS, TITLES, drawable
    from vmlab.report.view import View

    view = View(results)
    possible = drawable(view)
    wanted = [name for name in names or possible if name in possible]
    if not wanted:
        return {}
    from vmlab.report.canvas import our_settings, render

    made = {}
    with our_settings():
        for name in wanted:
            made[name] = (TITLES[name](view), render(CHARTS[name](view)))
    return made


@dataclass(frozen=True)
class Figure:
    """One chart for a document: its finding, and its bytes."""

    title: str
    data: bytes


def figure(view: View, chart: str, form: str, width: float, style: str) -> Figure:
    """A chart at its final size.

    :param form: pdf, svg, png, or csv for the figures alone.
    :param width: in inches.
    :param style: a key of :data:`vmlab.report.canvas.STYLES`; with "paper", title and caption are left to the document.
    """
    from vmlab.report.canvas import STYLES, Layout, drawn_for, fit, our_settings, render
    from vmlab.report.charts import CHARTS, TITLES
    from vmlab.report.tidy import as_csv, table

    title = TITLES[chart](view)
    if form == "csv":
        return Figure(title, as_csv(table(view, chart)))
    layout = Layout(width, STYLES[style], plain=style == "paper")
    with our_settings(), drawn_for(layout):
        return Figure(title, render(fit(CHARTS[chart](view), layout), [form], dpi=300)[form])


def write(
    run_dir: Path, results: Mapping[str, Any], config: Mapping[str, Any], *, manifest: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write ``plots/<chart>.png|svg`` and ``report.html`` into a run's directory; the paths, the page last.

    :param manifest: how the run was made, where it is not in ``run_dir``.
    :raises ExperimentError: the directory cannot be written.
    """
    drawn = draw(results, list(config.get("charts") or []))
    written = [
        _write(run_dir / "plots" / f"{name}.{form}", data)
        for name, (_, forms) in drawn.items() for form, data in forms.items()
    ]
    from vmlab.report.page import Drawn, page

    charts = [Drawn(name, title, forms["svg"]) for name, (title, forms) in drawn.items()]
    text = page(results, config, charts, manifest_of(run_dir) if manifest is None else manifest)
    return [*written, _write(run_dir / "report.html", text.encode("utf-8"))]


def manifest_of(run_dir: Path) -> dict[str, Any]:
    """How a run was made; empty where its directory does not say."""
    file = run_dir / "manifest.json"
    manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return manifest


def _write(path: Path, data: bytes) -> Path:
    """Write the whole file or leave what was there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        raise ExperimentError(f"{path} cannot be written: {error.strerror or error}; the run's results are kept") from error
    return path
