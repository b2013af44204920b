"""``vmlab doctor``: can this machine run the lab?

What touches Unicorn runs in child processes (the same workers that run experiments), so that a crash inside
it becomes one sentence here and the other checks go on.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmlab.cli.output import print_json, table

if TYPE_CHECKING:
    from vmlab.experiment.lab import Lab

EXAMPLE = """\
example:
  vmlab doctor            a line for each check; exit status 1 when one fails
  vmlab doctor --json
"""

#: What each technique runs: small, and it uses what the technique is for.
WORKLOAD: dict[str, str | int] = {"workload": "cli_sti", "iterations": 20, "density": 100}
LIBRARIES = ("unicorn", "capstone", "yaml", "matplotlib", "elftools")


@dataclass
class Check:
    """One line of the examination. ``status`` is ``ok``, ``note`` (works, but not at its best) or ``failed``."""

    name: str
    status: str
    detail: str


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.epilog = EXAMPLE
    parser.add_argument("--json", action="store_true", help="one JSON document: the list of checks")


def run(arguments: argparse.Namespace) -> int:
    """Run every check."""
    from vmlab.experiment.lab import Lab

    checks = list(examine(Lab()))
    if arguments.json:
        print_json({"schema_version": 1, "checks": [vars(check) for check in checks]})
    else:
        print(table(["check", "status", "detail"], [[c.name, c.status, c.detail] for c in checks]))
        failed = sum(check.status == "failed" for check in checks)
        print(f"\n{failed} of {len(checks)} checks failed." if failed else "\nThis machine can run the lab.")
    return 1 if any(check.status == "failed" for check in checks) else 0


def examine(lab: Lab) -> Iterator[Check]:
    """The checks in order, each made when it is asked for."""
    yield _python()
    yield from _libraries(lab)
    techniques = lab.techniques()
    yield Check("techniques", "ok", ", ".join(techniques)) if techniques else Check(
        "techniques", "failed", "none is registered: install vmlab (pip install .) instead of running it from its folder")
    if "native" not in techniques:
        return
    for path in ("portable", "fast"):
        yield _machine(lab, path)
    for technique in techniques:
        yield _technique(lab, technique)
    yield _results()


def _python() -> Check:
    """The interpreter's version and the host, in words."""
    good = sys.version_info >= (3, 11)
    detail = f"{platform.python_implementation()} {platform.python_version()} on {platform.system()} {platform.machine()}"
    return Check("python", "ok" if good else "failed", detail + ("" if good else "; 3.11 or newer is needed"))


def _libraries(lab: Lab) -> Iterator[Check]:
    """Are the libraries there? They are found, not imported."""
    versions = lab.versions()
    for name in LIBRARIES:
        found = importlib.util.find_spec(name) is not None
        detail = versions.get(name, "present") if found else "not installed: pip install vmlab"
        yield Check(name, "ok" if found else "failed", detail)


def _cell(lab: Lab, technique: str, environment: dict[str, str] | None = None) -> tuple[str, str]:
    """Run one small cell in a child; its status and a sentence."""
    from vmlab.errors import VmlabError
    from vmlab.experiment.single import expand
    from vmlab.experiment.workers import Pool

    size: dict[str, str | int | bool] = {key: WORKLOAD[key] for key in ("iterations", "density")}
    try:
        cell = expand(technique, str(WORKLOAD["workload"]), "nano", size, lab)[0]
        with Pool(lab.cell_function, 1, environment, seconds=60) as pool:
            _, record = next(iter(pool.run([cell])))
    except VmlabError as error:
        return "failed", str(error)
    if record["status"] != "ok":
        return "failed", str(record["error"])
    guest = record["instructions"]["guest"]
    count = guest["user"] + guest["kernel"]
    return "ok", f"{count:,} guest instructions counted, machine path {record['machine_path']}, {record['host_seconds']:.2f} s"


def _machine(lab: Lab, path: str) -> Check:
    """The physical machine alone, by one of its two ways in."""
    status, detail = _cell(lab, "native", {"VMLAB_MACHINE": path})
    if status == "failed" and path == "fast":
        return Check(f"machine ({path})", "note", f"not available here, the portable path is used: {detail}")
    return Check(f"machine ({path})", status, detail)


def _technique(lab: Lab, technique: str) -> Check:
    """One technique on whatever way in the settings choose."""
    return Check(technique, *_cell(lab, technique))


def _results() -> Check:
    """Can results be written to the current directory?"""
    if os.access(".", os.W_OK):
        return Check("results", "ok", "the current directory can be written to")
    return Check("results", "note", "the current directory cannot be written to: use --out DIR")
