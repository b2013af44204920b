"""``vmlab exits``: why the CPU left the guest in a run: VM exits, traps, hypercalls and callouts by reason."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vmlab.cli.output import print_json, table

EXAMPLE = """\
examples:
  vmlab exits results/switch_heavy/2031-01-31T120000Z-0123abcd
  vmlab exits results/switch_heavy/2031-01-31T120000Z-0123abcd --workload ctxsw --profile haswell-2013
  vmlab exits results/switch_heavy/2031-01-31T120000Z-0123abcd --perf      the layout of 'perf kvm stat report'
  vmlab exits results/cli_heavy/2031-01-31T120000Z-0123abcd --set density=10

Every variant of a technique in the run is shown (memory schemes, batch sizes …); of several densities the highest, unless --set chooses.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.epilog = EXAMPLE
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's directory, or its results.json")
    parser.add_argument("--workload", metavar="NAME", help="only this workload (default: all of the run)")
    parser.add_argument("--set", dest="sets", metavar="KEY=VALUE", action="append", default=[],
                        help="only cells with this value of a parameter, as density=10 or batch=1; may be repeated")
    parser.add_argument("--profile", metavar="NAME", help="price on this profile (default: the run's first)")
    parser.add_argument("--perf", action="store_true", help="as 'perf kvm stat report' prints it, a table a technique")
    parser.add_argument("--json", action="store_true", help="one JSON document: workload, technique, reason, count, shares, cycles each")


def _chosen(results: Mapping[str, Any], sets: list[str]) -> Mapping[str, Any]:
    """The results with those cells alone that have these values. :raises ConfigError: no cell has such a parameter, or such a value."""
    from vmlab.errors import ConfigError
    from vmlab.parameters import nearest

    cells = list(results.get("cells") or [])
    for text in sets:
        key, _, value = text.partition("=")
        known = {name for cell in cells for name in cell["parameters"]}
        if key not in known:
            raise ConfigError(f"--set {text}: no cell of the run has a parameter {key!r}{nearest(key, known)}")
        seen = dict.fromkeys(str(cell["parameters"][key]) for cell in cells if key in cell["parameters"])
        cells = [cell for cell in cells if str(cell["parameters"].get(key)) == value]
        if not cells:
            raise ConfigError(f"--set {text}: the run has {key} = {', '.join(seen)}")
    return {**results, "cells": cells}


def run(arguments: argparse.Namespace) -> int:
    """Print a table for each workload."""
    from vmlab.errors import ConfigError
    from vmlab.experiment.store import read_results
    from vmlab.parameters import nearest
    from vmlab.report.exits import cell_rows, perf_table
    from vmlab.report.findings import name
    from vmlab.report.view import View

    view = View(_chosen(read_results(arguments.run), arguments.sets))
    profiles = [generation.name for generation in view.generations]
    profile = arguments.profile or next(iter(profiles), "")
    if profiles and profile not in profiles:
        raise ConfigError(f"--profile: the run has no price on {profile!r}{nearest(profile, profiles)}")
    if arguments.workload is not None and arguments.workload not in view.workloads:
        raise ConfigError(f"--workload: the run has no finished cell of {arguments.workload!r}{nearest(arguments.workload, view.workloads)}")
    chosen = [(workload, variant, view.densest(workload, variant))
              for workload in view.workloads if arguments.workload in (None, workload)
              for variant in view.variants(workload) if variant[0] != "native"]
    if arguments.json:
        print_json({"schema_version": 1, "profile": profile, "exits": [
            {"workload": workload, **vars(row)} for workload, variant, cell in chosen for row in cell_rows(cell, profile, name(variant))]})
        return 0
    if arguments.perf:
        print("\n\n".join(perf_table(cell, profile, name(variant)) for _, variant, cell in chosen))
        return 0
    for workload in dict.fromkeys(workload for workload, _, _ in chosen):
        if len(densities := view.densities(workload)) > 1:
            print(f"{view.what(workload)}; also in this run: {', '.join(f'{d:g}' for d in densities[:-1])} (--set density=…)")
    rows: list[list[Any]] = []
    for workload, variant, cell in chosen:
        found = cell_rows(cell, profile, name(variant))
        rows += [[workload, row.technique, row.words, row.count, f"{100 * row.share:.1f} %", row.each,
                  "" if row.of_cycles is None else f"{100 * row.of_cycles:.1f} %"] for row in found]
        if not found:
            rows.append([workload, name(variant), "never leaves the guest", 0, "", None, ""])
    print(table(["workload", "technique", "reason", "times", "of its exits", f"cycles each on {profile}", "of its cycles"], rows))
    return 0
