"""``vmlab compare``: what changed between two runs of the same cells."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from vmlab.cli.output import print_json, table
from vmlab.errors import ConfigError

EXAMPLE = """\
examples:
  vmlab compare results/cli_heavy/OLD results/cli_heavy/NEW
  vmlab compare OLD NEW --metric 'exit.*' --metric slowdown
  vmlab compare OLD NEW --fail-over slowdown:5% --fail-over machine:0%     exit status 1 where one grew by more

A metric is cycles, slowdown, machine (instructions), host_seconds, an event kind, or a pattern of kinds. Cells are the same where technique and
all parameters are, sizes included. A limit also fails where a finished cell of OLD is missing from NEW or did not finish there.
"""
#: How many names of one kind are listed.
_LISTED = 5


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.epilog = EXAMPLE
    parser.add_argument("old", type=Path, metavar="OLD", help="a run's directory, or its results.json")
    parser.add_argument("new", type=Path, metavar="NEW", help="another run's")
    parser.add_argument("--metric", dest="metrics", metavar="METRIC", action="append", help="compare this (default: all but host_seconds)")
    parser.add_argument("--fail-over", dest="limits", metavar="METRIC:PERCENT%", action="append", default=[],
                        help="exit 1 where the metric grew by more than that in any cell; may be repeated")
    parser.add_argument("--top", type=int, default=20, metavar="N", help="show the N largest changes (default: 20)")
    parser.add_argument("--json", action="store_true", help="print every change as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Compare and print. Exit status 1 where a limit was passed, 2 where there is nothing to compare."""
    from vmlab.experiment import compare
    from vmlab.experiment.store import read_results

    limits = [compare.parse_limit(text) for text in arguments.limits]
    for metric in arguments.metrics or ():
        compare.known(metric)
    old, new = read_results(arguments.old), read_results(arguments.new)
    found = compare.changes(old, new, arguments.metrics or compare.USUAL)
    passed = compare.over(old, new, limits)
    structure = compare.structure(old, new)
    if not structure["common"]:
        raise ConfigError(f"compare: the runs have no cell in common, so nothing can be compared: {arguments.old} has for example "
                          f"{compare.example(old)}, {arguments.new} has {compare.example(new)}")
    lost = compare.lost(old, new) if limits else []
    if arguments.json:
        print_json({"schema_version": 1, **structure, "changes": [change.as_dict() for change in found],
                    "over": [change.as_dict() for change in passed], "not_compared": lost})
    else:
        print(screen(structure, found, arguments.top))
    for change in passed:
        print(f"vmlab: over the limit: {change.cell}: {change.metric}: {change.old:g} became {change.new:g} ({_percent(change.relative)})",
              file=sys.stderr)
    for name in lost:
        print(f"vmlab: no limit can be checked, since the new run did not finish it: {name}", file=sys.stderr)
    return 1 if passed or lost else 0


def screen(structure: dict[str, Any], found: list[Any], top: int) -> str:
    """The differences for people, the largest first."""
    lines = [*_some("only in the old run", structure["only_old"]), *_some("only in the new run", structure["only_new"])]
    lines += [f"status: {row['cell']}: {row['old']} became {row['new']}" for row in structure["status"]]
    lines += _some("another outcome", structure["outcome"])
    lines += [f"verdict: {row['claim']}: {row['old']} became {row['new']}" for row in structure["verdicts"]]
    if not found:
        return "\n".join([*lines, "Nothing that is compared changed."])
    ordered = sorted(found, key=lambda change: -abs(change.relative) if change.relative is not None else float("-inf"))
    rows = [[change.cell, change.metric, change.old, change.new, _percent(change.relative)] for change in ordered[:top]]
    lines += ["", table(["cell", "metric", "old", "new", "change"], rows)] if lines else [table(["cell", "metric", "old", "new", "change"], rows)]
    if len(found) > top:
        lines.append(f"… and {len(found) - top} smaller changes (--top shows more)")
    return "\n".join(lines)


def _some(words: str, names: list[str]) -> list[str]:
    """The first few names, and how many there are."""
    more = [f"{words}: … and {len(names) - _LISTED} more (--json names them)"] if len(names) > _LISTED else []
    return [*(f"{words}: {name}" for name in names[:_LISTED]), *more]


def _percent(relative: float | None) -> str:
    return "new" if relative is None else f"{100 * relative:+.3g} %"
