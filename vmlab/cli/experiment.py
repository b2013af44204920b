"""``vmlab experiment``: run a matrix of cells, price, judge and chart it."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vmlab.cli.output import Progress, print_json, table
from vmlab.errors import ConfigError

if TYPE_CHECKING:
    from vmlab.experiment.executors import CellRunner
    from vmlab.experiment.lab import Lab
    from vmlab.experiment.runner import Outcome
    from vmlab.experiment.schema import Experiment

EXAMPLE = """\
examples:
  vmlab experiment cli_heavy
  vmlab experiment cli_heavy --quick --set technique=native,trap-and-emulate
  vmlab experiment configs/cli_heavy.yaml --dry-run
  vmlab experiment cli_heavy --out /tmp/run --resume

An interrupted run keeps its finished cells: the same command with --resume goes on from there.
Exit status: 0 done; 1 a cell failed or a claim could not be evaluated (with --strict: or a verdict
is not the expected one); 2 wrong usage or configuration; 3 internal error; 130 interrupted.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.epilog = EXAMPLE
    parser.add_argument("experiment", help="a YAML file, or the name of an experiment that comes with vmlab")
    parser.add_argument("--quick", action="store_true", help="a smaller run with the same verdicts")
    parser.add_argument("--set", dest="sets", metavar="KEY=VALUE", action="append", default=[],
                        help="give a parameter this value everywhere; KEY=A,B sweeps; may be repeated")
    parser.add_argument("--strategy", dest="strategies", metavar="FILE.py:CLASS", action="append", default=[],
                        help="a technique from a file; name it so with --set technique=... as well")
    parser.add_argument("--dry-run", action="store_true", help="show the cells and run nothing")
    parser.add_argument("--jobs", type=_jobs, default=os.cpu_count() or 1, metavar="N",
                        help="cells to run at a time (default: one for each CPU)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run's directory: absent or empty (default: below results/)")
    parser.add_argument("--resume", action="store_true",
                        help="go on with --out DIR, or with the newest unfinished run of the same configuration")
    parser.add_argument("--no-reuse", action="store_true", help="run every cell, also those that an earlier run below results/ has finished")
    parser.add_argument("--boots", choices=("auto", "always", "never"), default="auto",
                        help="let cells begin where a boot that they share ended: of guests from files, always where it can be done, or never; "
                             "the ledgers are the same")
    parser.add_argument("--executor", choices=("local", "dask"), default="local",
                        help="where cells run: in --jobs processes here, or on the workers of a Dask scheduler")
    parser.add_argument("--scheduler", metavar="ADDRESS", help="of Dask, as tcp://host:8786")
    parser.add_argument("--strict", action="store_true", help="exit 1 also when a verdict is not the expected one")
    parser.add_argument("--json", action="store_true", help="print results.json's content and nothing else on stdout")


def _jobs(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if not 1 <= number <= 256:
        raise argparse.ArgumentTypeError(f"a whole number from 1 to 256 is needed, not {text!r}")
    return number


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; see :data:`EXAMPLE` for the exit status."""
    from vmlab.experiment import schema, yamlfile
    from vmlab.experiment.lab import Lab

    lab = Lab(arguments.strategies)
    path = schema.find(arguments.experiment)
    sets = [schema.parse_set(text) for text in arguments.sets]
    experiment = schema.load(yamlfile.read(path, _shown(path)), lab, sets, arguments.quick)
    if arguments.dry_run:
        return _dry_run(experiment, arguments.json)
    return execute(experiment, lab, arguments)


def _shown(path: Path) -> str:
    """A path as messages show it: relative where that is shorter."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _dry_run(experiment: Experiment, as_json: bool) -> int:
    if as_json:
        print_json({"schema_version": 1, "experiment": experiment.name, "config_hash": experiment.hash(),
                    "cells": [{"id": c.id, "technique": c.technique, "parameters": dict(c.parameters), "added": c.added}
                              for c in experiment.cells]})
        return 0
    rows = [
        [c.technique, c.parameters.get("workload"), " ".join(f"{k}={v}" for k, v in c.parameters.items() if k != "workload"),
         "added as a baseline" if c.added else ""]
        for c in experiment.cells
    ]
    print(table(["technique", "workload", "parameters", ""], rows))
    print(f"\n{len(experiment.cells)} cells, priced on {len(experiment.profiles)} profiles, "
          f"{len(experiment.claims)} claims. Nothing was run.")
    return 0


def execute(experiment: Experiment, lab: Lab, arguments: argparse.Namespace) -> int:
    """Run a checked experiment with the options of the command line, and print how it ended."""
    from vmlab.experiment.matrix import labels
    from vmlab.experiment.runner import Options, Run

    if arguments.strict and not experiment.expect:
        raise ConfigError(f"--strict: {experiment.name} expects no verdicts (it has no 'expect' section)")
    options = Options(arguments.jobs, arguments.out, resume=arguments.resume, quick=arguments.quick, reuse=not arguments.no_reuse,
                      boots=arguments.boots, executor=_executor(arguments))
    run_ = Run(experiment, lab, options)
    where = _shown(run_.directory.path)
    todo = len(run_.todo)
    found = run_.reused + len(run_.taken)
    kept = f", {found} kept from before" if found else ""
    print(f"{experiment.title}: {todo} cells to run{kept}, in {where}", file=sys.stderr)
    progress, called = Progress(todo), labels(experiment.cells)
    try:
        outcome = run_.execute(lambda cell, status, seconds: progress.finished(called[cell], status, seconds))
    except KeyboardInterrupt:
        progress.close()
        print(f"vmlab: interrupted; {len(run_.done)} of {len(experiment.cells)} cells are kept in {where}; "
              "go on with the same command and --resume", file=sys.stderr)
        return 130
    finally:
        progress.close()
    if arguments.json:
        print_json(outcome.results)
    else:
        _print(outcome, lab)
    _complain(outcome)
    broken = bool(outcome.failed or outcome.not_evaluated)
    return 1 if broken or (arguments.strict and outcome.unexpected) else 0


def _executor(arguments: argparse.Namespace) -> Callable[[str, str], CellRunner] | None:
    """What the options say of where cells run; None: here."""
    if (arguments.executor == "dask") != (arguments.scheduler is not None):
        raise ConfigError("--executor dask and --scheduler ADDRESS go together")
    if arguments.executor == "local":
        return None
    from vmlab.experiment.executors import dask

    return functools.partial(dask, arguments.scheduler)


def _print(outcome: Outcome, lab: Lab) -> None:
    print(lab.terminal_table(outcome.shown))
    print()
    for sentence in lab.summary(outcome.shown):
        print(sentence)
    claims = outcome.results["claims"]
    if claims:
        print()
        print(table(["claim", "verdict", "kind", "by profile"], [
            [c["id"], c["verdict"], c["kind"] + (", calibrated" if c["calibrated"] else ""), _by_profile(c["by_profile"])]
            for c in claims
        ]))
    print(f"\nOpen {_shown(outcome.report or outcome.directory)}")


def _by_profile(verdicts: dict[str, str]) -> str:
    return ", ".join(f"{profile} {verdict}" for profile, verdict in verdicts.items())


def _complain(outcome: Outcome) -> None:
    """What went wrong, on stderr: each cell's and each claim's one sentence."""
    lines: Sequence[str] = [
        *(f"cell failed: {cell['id']}: {cell['error']}" for cell in outcome.failed),
        *(f"claim not evaluated: {claim['id']}: {claim['error']}" for claim in outcome.not_evaluated),
        *(f"verdict not as expected: {sentence}" for sentence in outcome.unexpected),
    ]
    for line in lines:
        print(f"vmlab: {line}", file=sys.stderr)
