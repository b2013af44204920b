"""A lab without a machine: three techniques and a cell function that can also crash, hang and misbehave.

The runner, the workers and the command line are tested with it, so that what they promise is held even
where Unicorn is not installed. Workers import this module by name.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vmlab.errors import ConfigError, GuestImageError, TripleFault, UnsupportedByStrategy
from vmlab.experiment.lab import Lab
from vmlab.parameters import Parameter, nearest

TECHNIQUES: dict[str, dict[str, Parameter]] = {
    "native": {},
    "trap-and-emulate": {"sensitive": Parameter("what POPF does", "silent", ("silent", "trap"))},
    "binary-translation": {"emulation": Parameter("how", "in-cache", ("in-cache", "callout"))},
}
SIZE = {
    "iterations": Parameter("times", 1000, minimum=1),
    "density": Parameter("per 1000", 10, minimum=1, maximum=1000),
}
WORKLOADS: dict[str, dict[str, Parameter]] = dict.fromkeys(
    ("cli_sti", "popf", "abort", "raise", "hang", "triple", "unsupported", "exit"), SIZE)
WORKLOADS["compute"] = {"iterations": SIZE["iterations"]}


class FakeLab(Lab):
    """Answers every question from the tables above."""

    shares_boots = False
    cell_function = "fake_lab:run_cell"
    image_hash = "0" * 64
    code_hash = "fake"

    def __init__(self, extra: Sequence[str] = ()) -> None:
        super().__init__(extra)
        self.reports: list[Path] = []

    def techniques(self) -> list[str]:
        return list(TECHNIQUES)

    def parameters(self, technique: str) -> Mapping[str, Parameter]:
        if technique not in TECHNIQUES:
            raise ConfigError(f"no technique {technique!r}{nearest(technique, TECHNIQUES)}")
        return TECHNIQUES[technique]

    def summary_of(self, technique: str) -> str:
        return f"the {technique} technique"

    def unfaithful(self, technique: str, workload: str, parameters: Mapping[str, Any]) -> str | None:
        silent = workload == "popf" and parameters.get("sensitive") == "silent"
        return "POPF drops IF" if silent else None

    def guests(self) -> list[str]:
        return ["nano"]

    def workloads(self, guest: str) -> Mapping[str, Mapping[str, Parameter]]:
        return WORKLOADS

    def workload_summary(self, guest: str, workload: str) -> str:
        return f"the {workload} workload"

    def image(self, guest: str) -> str:
        if guest != "nano":
            raise GuestImageError(f"{guest}: no such image")
        return self.image_hash

    def file(self, path: str, what: str) -> str:
        raise GuestImageError(f"no {what} at {path!r}")

    def profiles(self) -> list[str]:
        return ["old-cpu", "new-cpu"]

    def known_profiles(self) -> list[str]:
        return self.profiles()

    def profile_row(self, name: str) -> list[Any]:
        return [name, "a CPU", 2005, "x86", 1, 0, 0]

    def price(self, events: Mapping[str, int], profile: str, platform: str) -> dict[str, Any]:
        if platform != "x86":
            return {"status": "unsupported", "reason": f"{profile} has no {platform}"}
        total = float(sum(events.values()))
        return {"total": total, "low": total / 2, "high": total * 2, "breakdown": {"all": total}}

    def slowdown(
        self, events: Mapping[str, int], native: Mapping[str, int], profile: str, platform: str,
    ) -> dict[str, Any]:
        ratio = sum(events.values()) / sum(native.values())
        return {"value": ratio, "low": ratio / 2, "high": ratio * 2}

    def seeds(self) -> dict[str, int]:
        return {"pricing": 1}

    def claims(self) -> list[str]:
        return ["sky-is-blue", "breaks"]

    def claim_row(self, name: str) -> list[Any]:
        return [name, "counted", f"{name}, they say"]

    def evaluate(self, ids: Sequence[str], cells: Sequence[dict[str, Any]], profiles: Sequence[str]) -> list[dict[str, Any]]:
        if "breaks" in ids:
            raise ZeroDivisionError("nothing to divide by")
        verdict = "holds" if all(cell["status"] == "ok" for cell in cells) else "undecided"
        return [{"id": i, "statement": i, "source": "eyes", "kind": "counted", "verdict": verdict, "by_profile": {},
                 "figures": {}, "calibrated": False} for i in ids]

    def charts(self) -> list[str]:
        return ["slowdown"]

    def write_report(self, directory: Path, results: dict[str, Any], config: dict[str, Any]) -> list[Path]:
        page = directory / "report.html"
        page.write_text("<p>report", encoding="utf-8")
        self.reports.append(page)
        return [page]

    def summary(self, results: dict[str, Any]) -> list[str]:
        return ["One.", "Two.", "Three."]

    def terminal_table(self, results: dict[str, Any]) -> str:
        return "TABLE"

    def code(self) -> str:
        return self.code_hash


def run_cell(technique: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """What a worker calls: counts that follow from the parameters, or a mishap named by the workload."""
    workload, iterations = parameters["workload"], parameters["iterations"]
    if technique != "native":
        if workload == "abort":
            os.abort()
        if workload == "exit":
            os._exit(7)
        if workload == "hang":
            time.sleep(3600)
        if workload == "raise":
            raise KeyError("a mistake")
        if workload == "triple":
            raise TripleFault("triple fault at 0x1000")
        if workload == "unsupported":
            raise UnsupportedByStrategy("this technique cannot do that")
    if workload == "environment":
        return {"status": "ok", "console": os.environ.get("VMLAB_MACHINE", "")}
    print("a library prints this to stdout; it must not be taken for an answer")
    traps = 0 if technique == "native" else 2 * iterations
    broken = workload == "popf" and parameters.get("sensitive") == "silent"
    return {
        "technique": technique, "parameters": parameters, "status": "ok", "error": None, "platform": "x86",
        "work": {"operations": 2 * iterations, "iterations": iterations},
        "instructions": {"guest": {"user": 0, "kernel": 4 * iterations}, "machine": 5 * iterations},
        "events": {"machine.alu": 4 * iterations} | ({"trap.gp": traps} if traps else {}),
        "phases": {}, "fidelity": {"outcome": "b" * 64 if broken else "a" * 64, "state": None},
        "efficiency": {"retired": 1.0, "translated": 0.0, "emulated": 0.0},
        "console": "boot\nif=0\n" if broken else "boot\nif=1\n", "machine_path": "portable", "host_seconds": 0.001,
        "pid": os.getpid(),
    }
