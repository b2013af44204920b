"""``vmlab list``: what there is to name in an experiment or on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vmlab.cli.output import print_json, table
from vmlab.errors import ConfigError

if TYPE_CHECKING:
    from vmlab.experiment.lab import Lab

Rows = tuple[list[str], list[list[Any]]]

EXAMPLE = """\
examples:
  vmlab list                 everything but the events
  vmlab list techniques      techniques with their parameters
  vmlab list profiles --verbose   every figure of every profile, with its source
  vmlab list events --json   every kind of event that is counted, for a program
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.epilog = EXAMPLE
    parser.add_argument("what", nargs="?", choices=list(KINDS), metavar="WHAT", help=", ".join(KINDS))
    parser.add_argument("--verbose", action="store_true", help="of profiles: every figure, with range, provenance and source")
    parser.add_argument("--json", action="store_true", help="one JSON document: kind -> list of objects")


def run(arguments: argparse.Namespace) -> int:
    """Print one kind of thing, or all of them."""
    from vmlab.experiment.lab import Lab

    lab = Lab()
    if arguments.verbose and arguments.what != "profiles":
        raise ConfigError("--verbose: only 'vmlab list profiles' has more to say")
    chosen = [arguments.what] if arguments.what else [kind for kind in KINDS if kind != "events"]
    found = {kind: KINDS[kind](lab) for kind in chosen}
    if arguments.verbose:
        found["figures"] = _figures(lab)
    if arguments.json:
        print_json({"schema_version": 1} | {
            kind: [dict(zip(head, row, strict=True)) for row in rows] for kind, (head, rows) in found.items()
        })
        return 0
    for number, (kind, (head, rows)) in enumerate(found.items()):
        if len(found) > 1:
            print(f"{'' if number == 0 else chr(10)}{kind.upper()}")
        print(table(head, [[str(field) if name == "year" else field for name, field in zip(head, row, strict=True)] for row in rows]))
    return 0


def _techniques(lab: Lab) -> Rows:
    rows = []
    for name in lab.techniques():
        try:
            declared, summary = lab.parameters(name), lab.summary_of(name)
        except ConfigError as error:
            rows.append([name, str(error), ""])
            continue
        parameters = "; ".join(
            f"{key}: {'|'.join(p.choices) if p.choices else 'number'} (default {p.default})" for key, p in declared.items()
        )
        rows.append([name, summary, parameters])
    return ["name", "summary", "parameters"], rows


def _guests(lab: Lab) -> Rows:
    return ["name", "workloads"], [[name, len(lab.workloads(name))] for name in lab.guests()]


def _workloads(lab: Lab) -> Rows:
    rows: list[list[Any]] = []
    for guest in lab.guests():
        for name, parameters in lab.workloads(guest).items():
            defaults = ", ".join(f"{key} (default {p.default})" for key, p in parameters.items())
            rows.append([guest, name, lab.workload_summary(guest, name), defaults])
    return ["guest", "name", "summary", "parameters"], rows


def _profiles(lab: Lab) -> Rows:
    return ["name", "cpu", "year", "provides", "cited", "assumed", "measured"], [lab.profile_row(name) for name in lab.profiles()]


def _figures(lab: Lab) -> Rows:
    head = ["profile", "cost", "value", "low", "high", "unit", "provenance", "source", "where", "note"]
    return head, [row for name in lab.profiles() for row in lab.figure_rows(name)]


def _claims(lab: Lab) -> Rows:
    return ["id", "kind", "statement"], [lab.claim_row(name) for name in lab.claims()]


def _charts(lab: Lab) -> Rows:
    return ["name"], [[name] for name in lab.charts()]


def _experiments(lab: Lab) -> Rows:
    from vmlab.experiment import schema, yamlfile

    rows: list[list[Any]] = []
    for name, path in schema.builtin().items():
        data = yamlfile.read(path, path.name).data
        rows.append([name, data.get("title", "") if isinstance(data, dict) else ""])
    return ["name", "title"], rows


def _events(lab: Lab) -> Rows:
    from vmlab.ledger import EVENTS

    return ["name", "unit", "provenance", "words"], [
        [kind.name, kind.unit, kind.provenance, kind.words] for kind in EVENTS.values()
    ]


KINDS: dict[str, Callable[[Lab], Rows]] = {
    "experiments": _experiments, "techniques": _techniques, "guests": _guests, "workloads": _workloads,
    "profiles": _profiles, "claims": _claims, "charts": _charts, "events": _events,
}
