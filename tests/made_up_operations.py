"""A run of small operations without a machine: loop and empty loop in round counts, beside which published figures stand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vmlab import costs

PROFILES = ("prescott-2005", "northwood-2002")


def finished(
    technique: str, workload: str, loop: dict[str, int], empty: dict[str, int] | None, iterations: int = 100,
    profiles: Sequence[str] = PROFILES, **parameters: Any,
) -> dict[str, Any]:
    """A finished cell whose warm part and empty loop had these events."""
    phases = {"roi.warm": {"events": loop}} | ({"empty": {"events": empty}} if empty is not None else {})
    platform = "svm" if technique == "hardware-assisted" else "x86"
    made = {"guest": "minios", "workload": workload, "iterations": iterations, **parameters}
    cycles = {name: costs.price(loop, costs.load(name), platform).as_dict() for name in profiles}
    return {
        "id": f"{technique}/{workload},{parameters}", "technique": technique, "parameters": made, "status": "ok", "error": None,
        "platform": platform, "work": {"operations": iterations, "iterations": iterations, "pt_writes": 2 * iterations, "faults": iterations // 2,
                                       "system_calls": 3 * iterations, "cr3_loads": 0},
        "instructions": {"guest": {"user": 1000, "kernel": 4000}, "machine": 5000}, "events": loop, "phases": phases,
        "cycles": cycles, "slowdown": {}, "fidelity": {"outcome": "a", "matches_native": True},
        "efficiency": {"retired": 1.0, "translated": 0.0, "emulated": 0.0}, "console": "", "safety": {"refused": []},
    }


def results(profiles: Sequence[str] = PROFILES) -> dict[str, Any]:
    """A whole results.json."""
    def cell(*of: Any, **parameters: Any) -> dict[str, Any]:
        return finished(*of, profiles=profiles, **parameters)

    ptemod = {"machine.store": 100, "machine.alu": 300}
    empty = {"machine.alu": 300}
    fault = {"machine.load": 100, "machine.alu": 300, "fault.delivered.14": 100, "machine.iret": 100}
    traced = {"machine.store": 100, "machine.alu": 300, "exit.page_fault": 100, "entry": 100, "shadow.fault.hidden": 300}
    return {"schema_version": 1, "experiment": "made", "claims": [], "cells": [
        cell("native", "ptemod", ptemod, empty),
        cell("hardware-assisted", "ptemod", traced, empty, memory="tracing"),
        cell("native", "pgfault", fault, empty),
        cell("native", "callret", {"machine.alu": 300, "machine.branch": 100, "machine.indirect": 100}, empty),
        cell("native", "ctxsw", {"machine.alu": 800}, empty),
        cell("paravirtualization", "ctxsw", {"machine.alu": 800, "trap.int": 200, "hypercall.mmuext_op": 200}, empty, memory="direct"),
        cell("native", "build", {"machine.alu": 800}, None),
    ]}
