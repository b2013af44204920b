"""``vmlab plot``: one chart of a run for a paper or a slide, at its final size."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLE = """\
examples:
  vmlab plot results/cli_heavy/RUN --chart slowdown --format pdf --width 3.33in --style paper
  vmlab plot results/cli_heavy/RUN --chart generations --format svg --width 24cm --style slide
  vmlab plot results/cli_heavy/RUN --chart causes --format csv          the figures instead
  vmlab plot results/cli_heavy/RUN --list                               the charts that this run has the data for

With --style paper the finding and the caption are not drawn but printed, for the document's own caption. Fonts are embedded, and the
same run gives the same bytes.
"""
_UNITS = {"in": 1.0, "cm": 1 / 2.54, "mm": 1 / 25.4, "pt": 1 / 72.27}
_NARROWEST, _WIDEST = 1.5, 40.0


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.epilog = EXAMPLE
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's directory, or its results.json")
    parser.add_argument("--chart", metavar="NAME", help="which chart (default: the run's first)")
    parser.add_argument("--format", dest="form", default="pdf", help="pdf, svg, png or csv (default: pdf)")
    parser.add_argument("--width", default="3.33in", help="width of the figure: a number with in, cm, mm or pt (default: 3.33in)")
    parser.add_argument("--style", default="paper", help="paper (7 points), slide (16 points) or report (default: paper)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where it goes (default: CHART.FORMAT here)")
    parser.add_argument("--list", dest="listing", action="store_true", help="name the charts that the run has the data for")


def run(arguments: argparse.Namespace) -> int:
    """Draw and write. Exit status 2 for a chart, form, style or width that does not exist."""
    from vmlab.errors import ConfigError
    from vmlab.experiment.store import read_results
    from vmlab.parameters import nearest
    from vmlab.report import figure
    from vmlab.report.canvas import FORMS, STYLES
    from vmlab.report.charts import drawable
    from vmlab.report.view import View

    view = View(read_results(arguments.run))
    charts = drawable(view)
    if arguments.listing:
        print("\n".join(charts))
        return 0
    if not charts:
        raise ConfigError(f"{arguments.run}: this run has nothing to draw (no priced cell beside the native ones)")
    chart = arguments.chart or charts[0]
    for word, value, choices in (("--chart", chart, charts), ("--format", arguments.form, (*FORMS, "csv")), ("--style", arguments.style, STYLES)):
        if value not in choices:
            raise ConfigError(f"{word}: no {value!r} here{nearest(value, choices)}")
    made = figure(view, chart, arguments.form, inches(arguments.width), arguments.style)
    file = arguments.out or Path(f"{chart}.{arguments.form}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(made.data)
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror or error}") from error
    print(f"{file}\n{made.title}")
    return 0


def inches(text: str) -> float:
    """``3.33in``, ``8.5cm`` … in inches. :raises ConfigError: another form, or a width that no page has."""
    from vmlab.errors import ConfigError

    number, unit = text[:-2], text[-2:]
    try:
        found = float(number) * _UNITS[unit]
    except (ValueError, KeyError):
        raise ConfigError(f"--width {text}: give a number with in, cm, mm or pt, as 3.33in") from None
    if not _NARROWEST <= found <= _WIDEST:
        raise ConfigError(f"--width {text}: a figure is {_NARROWEST:g} to {_WIDEST:g} inches wide")
    return found
