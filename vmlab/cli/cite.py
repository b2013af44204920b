"""``vmlab cite``: the documents behind a run's prices, as BibTeX."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vmlab.cli.output import print_json

EXAMPLE = """\
examples:
  vmlab cite results/cli_heavy/2031-01-31T120000Z-0123abcd        every source of a cost that the run's prices used
  vmlab cite results/cli_heavy/2031-01-31T120000Z-0123abcd --profile prescott-2005 > costs.bib
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.epilog = EXAMPLE
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's directory, or its results.json")
    parser.add_argument("--profile", dest="profiles", metavar="NAME", action="append",
                        help="only what the prices on this profile used; may be repeated")
    parser.add_argument("--json", action="store_true", help="print key, fields and the cost keys that each document gave")


def run(arguments: argparse.Namespace) -> int:
    """Print the entries, ordered by key."""
    from vmlab import costs
    from vmlab.experiment.store import read_results

    results = read_results(arguments.run)
    used = sources(results["cells"], arguments.profiles)
    if arguments.json:
        print_json({"schema_version": 1, "references": [
            {"key": key, "type": costs.bibliography()[key].type, "fields": dict(costs.bibliography()[key].fields), "costs": found}
            for key, found in used.items()
        ]})
        return 0
    for key in used:
        print(costs.bibtex(key))
    return 0


def sources(cells: list[dict[str, Any]], chosen: list[str] | None) -> dict[str, dict[str, list[str]]]:
    """Reference -> profile -> the costs from it that priced one of the cells.

    :raises ConfigError: a profile that the run was not priced on.
    """
    from vmlab import costs
    from vmlab.errors import ConfigError
    from vmlab.parameters import nearest

    kinds: dict[str, set[str]] = {}
    for cell in cells:
        for profile, price in cell["cycles"].items():
            kinds.setdefault(profile, set()).update(cell["events"] if "total" in price else ())
    for profile in chosen or ():
        if profile not in kinds:
            raise ConfigError(f"--profile: the run has no price on {profile!r}{nearest(profile, kinds)}")
    used: dict[str, dict[str, list[str]]] = {}
    for profile in chosen or sorted(kinds):
        for key, figure in costs.costs_used(dict.fromkeys(sorted(kinds[profile]), 1), costs.load(profile)).items():
            for source in figure.sources:
                used.setdefault(source, {}).setdefault(profile, []).append(key)
    return dict(sorted(used.items()))
