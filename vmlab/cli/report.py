"""``vmlab report``: a run's page and charts made anew from its results, without running anything."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLE = """\
examples:
  vmlab report results/cli_heavy/RUN                report.html and plots/ in the run's directory, made anew
  vmlab report results/cli_heavy/RUN --out DIR      the same elsewhere
  vmlab report results/cli_heavy/RUN --text         the summary and the table, on the terminal
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.epilog = EXAMPLE
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's directory, or its results.json")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write there instead of into the run's directory")
    parser.add_argument("--text", action="store_true", help="print the summary and the table instead of writing files")


def run(arguments: argparse.Namespace) -> int:
    """Write the report, or print it."""
    from vmlab import report
    from vmlab.experiment.store import read_results

    results = read_results(arguments.run)
    if arguments.text:
        print(report.terminal_table(results) + "\n\n" + "\n".join(report.summary(results)))
        return 0
    source = arguments.run if arguments.run.is_dir() else arguments.run.parent
    written = report.write(arguments.out or source, results, configuration(source), manifest=report.manifest_of(source))
    print(f"Open {written[-1]}")
    return 0


def configuration(directory: Path) -> dict[str, object]:
    """The run's configuration, for title, question and choice of charts; nothing where it has none."""
    from vmlab.costs.figures import read_yaml

    file = directory / "config.yaml"
    return dict(read_yaml(file)) if file.exists() else {}
