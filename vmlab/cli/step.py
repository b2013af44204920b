"""``vmlab step``: one thing that a kernel does, under every technique beside each other, as a page to step through."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vmlab.cli.output import print_json, table
from vmlab.parameters import Value

EXAMPLE = """\
examples:
  vmlab step                              the scenarios
  vmlab step cli                          records the runs and writes step-cli.html
  vmlab step popf --out popf.html
  vmlab step --all docs/steps             every scenario, a page each

In the page: arrow keys left and right step, up and down choose the lane; a link carries lane, step and CPU generation
(#technique=binary-translation&step=7).
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.epilog = EXAMPLE
    parser.add_argument("scenario", nargs="?", help="what to show; nothing lists the scenarios")
    parser.add_argument("--out", metavar="FILE", help="where the page goes (default: step-SCENARIO.html here)")
    parser.add_argument("--all", metavar="DIR", help="write every scenario's page into this directory")
    parser.add_argument("--json", action="store_true", help="print the recorded lanes as JSON instead of writing a page")


def run(arguments: argparse.Namespace) -> int:
    """Record and write. Exit status 1 when the bare machine itself could not be recorded."""
    from vmlab.errors import ConfigError
    from vmlab.parameters import nearest
    from vmlab.trace.scenarios import SCENARIOS

    if arguments.scenario is None and arguments.all is None:
        print(table(["scenario", "what it shows"], [[s.name, s.title] for s in SCENARIOS.values()]))
        return 0
    if arguments.scenario is not None and arguments.scenario not in SCENARIOS:
        raise ConfigError(f"{arguments.scenario!r} is no scenario{nearest(arguments.scenario, SCENARIOS)}")
    names = list(SCENARIOS) if arguments.scenario is None else [arguments.scenario]
    for name in names:
        data = recorded(name)
        if arguments.json:
            print_json(data)
            continue
        file = Path(arguments.all) / f"{name}.html" if arguments.all else Path(arguments.out or f"step-{name}.html")
        write(file, data)
        absent = [f"{lane['technique']}{' (' + lane['label'] + ')' if lane['label'] else ''}: {lane['reason']}"
                  for lane in data["lanes"] if lane["reason"]]
        print(f"{file}: {len(data['groups'])} steps, {len(data['lanes']) - len(absent)} lanes")
        for reason in absent:
            print(f"  not shown: {reason}")
    return 0


def recorded(name: str) -> dict[str, Any]:
    """A scenario's lanes, recorded now and laid out in step."""
    from vmlab.trace.scenarios import SCENARIOS
    from vmlab.trace.stepper import layout, record_lanes

    scenario = SCENARIOS[name]
    return layout(scenario, record_lanes(scenario, checked))


def write(file: Path, data: dict[str, Any]) -> None:
    """The page, whole or not at all. :raises ConfigError: the place cannot be written."""
    from vmlab.errors import ConfigError
    from vmlab.report.steps import page

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(page(data), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror or error}") from error


def checked(technique: str, guest: str, workload: str | None, parameters: Mapping[str, Value]) -> Mapping[str, Value]:
    """The cell's whole parameters. :raises ConfigError: the lab has no such cell."""
    from vmlab.experiment import single
    from vmlab.experiment.lab import Lab

    return single.expand(technique, workload, guest, parameters, Lab())[0].parameters
