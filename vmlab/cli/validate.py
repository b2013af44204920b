"""``vmlab validate``: check experiment files without running anything."""

from __future__ import annotations

import argparse
import sys

from vmlab.cli.output import print_json
from vmlab.errors import ConfigError, GuestImageError

EXAMPLE = """\
example:
  vmlab validate configs/cli_heavy.yaml my_experiment.yaml

Exit status: 0 all are valid; 2 one is not.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.epilog = EXAMPLE
    parser.add_argument("experiments", nargs="+", metavar="EXPERIMENT", help="a YAML file, or the name of a built-in experiment")
    parser.add_argument("--json", action="store_true", help="one JSON document: file, valid, cells, error")


def run(arguments: argparse.Namespace) -> int:
    """Check each file; one line for each."""
    from vmlab.experiment import schema, yamlfile
    from vmlab.experiment.lab import Lab

    lab = Lab()
    found = []
    for name in arguments.experiments:
        result = {"experiment": name, "valid": True, "cells": 0, "error": None}
        try:
            path = schema.find(name)
            document = yamlfile.read(path, name if name == str(path) else path.name)
            plain = schema.load(document, lab)
            reduced = schema.load(document, lab, quick=True)
            for guest in {str(cell.parameters["guest"]) for cell in [*plain.cells, *reduced.cells]}:
                lab.image(guest)
            result["cells"] = len(plain.cells)
        except (ConfigError, GuestImageError) as error:
            result |= {"valid": False, "error": str(error)}
        found.append(result)
    if arguments.json:
        print_json({"schema_version": 1, "experiments": found})
    else:
        for result in found:
            if result["valid"]:
                print(f"{result['experiment']}: valid, {result['cells']} cells")
            else:
                print(f"vmlab: {result['error']}", file=sys.stderr)
    return 0 if all(result["valid"] for result in found) else 2
