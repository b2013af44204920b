"""Rows of ``run.py`` that count what must not be: ledgers that differ between the paths, commands that import what they do not need.

Their ratio is a number of cases, and its limit is none. The tests say more: ``pytest -m slow tests/test_conformance.py
tests/test_paths_random.py``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rows import Row, Skipped, row

from vmlab import guests, strategies
from vmlab.experiment.cell import run_cell
from vmlab.machine import fast

ROOT = Path(__file__).resolve().parent.parent
_ITERATIONS = {"compute": 3, "interrupt": 12, "mixed": 12}
_HEAVY = ("unicorn", "numpy", "matplotlib")
_LIGHT = (["--help"], ["--version"], ["list"], ["explain", "hidden fault"], ["validate", "cli_heavy"], ["experiment", "cli_heavy", "--dry-run"])


def _record(technique: str, workload: str, path: str) -> dict[str, object]:
    """The cell's record without what speaks of the host."""
    os.environ["VMLAB_MACHINE"] = path
    cell = run_cell(technique, {"guest": "nano", "workload": workload, "iterations": _ITERATIONS.get(workload, 100), "density": 100})
    return {key: value for key, value in cell.items() if key not in ("machine_path", "host_seconds")}


def _differing(cells: list[tuple[str, str]]) -> int:
    usual = os.environ.get("VMLAB_MACHINE")
    try:
        return sum(_record(*cell, "fast") != _record(*cell, "portable") for cell in cells)
    finally:
        os.environ.pop("VMLAB_MACHINE")
        if usual is not None:
            os.environ["VMLAB_MACHINE"] = usual


def _heavy(arguments: list[str]) -> bool:
    """Whether this command imports one of the heavy modules."""
    code = f"import sys\nfrom vmlab.cli.main import main\nmain({arguments!r})\nsys.exit(3 if set({_HEAVY!r}) & set(sys.modules) else 0)"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    if done.returncode not in (0, 3):
        raise SystemExit(f"vmlab {' '.join(arguments)}: exit status {done.returncode}")
    return done.returncode == 3


def checks(_rounds: int, _scale: float, wanted: Callable[[str], bool]) -> Iterator[Row | Skipped]:
    """Counted once: they are the same in every round."""
    name = "cells whose ledger differs on the portable path"
    if wanted(name):
        cells = [(technique, workload) for technique in strategies.BUILT_IN for workload in guests.workloads("nano")]
        if reason := fast.why_not():
            yield Skipped(name, f"there is no fast path here: {reason}")
        else:
            yield row(name, [float(_differing(cells))], 0, "lower", f"of {len(cells)}: every workload of nano under every technique")
    name = f"commands without a guest that import {', '.join(_HEAVY[:-1])} or {_HEAVY[-1]}"
    if wanted(name):
        yield row(name, [float(sum(map(_heavy, _LIGHT)))], 0, "lower", f"of {len(_LIGHT)}")
