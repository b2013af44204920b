"""A run without a machine: events as each mechanism would count them, priced by the real costs.

The counts are round and per named instruction, so that a test can say what must follow from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vmlab import costs

PROFILES = ["prescott-2005", "penryn-2008", "haswell-2013", "k8-2005"]
OPERATIONS = 100_000

#: By workload: the instructions that one operation consists of.
NAMED = {"cli_sti": ("cli", "sti"), "pushf_popf": ("pushf", "popf"), "rdtsc": ("rdtsc",), "compute": ()}

VARIANTS: list[tuple[str, dict[str, str]]] = [
    ("native", {}),
    ("trap-and-emulate", {"sensitive": "silent"}),
    ("trap-and-emulate", {"sensitive": "trap"}),
    ("binary-translation", {"emulation": "in-cache"}),
    ("binary-translation", {"emulation": "callout"}),
    ("paravirtualization", {}),
    ("hardware-assisted", {}),
]

#: What a technique does for one named instruction instead of executing it, as event kinds and how many of each.
Way = dict[str, int]
TRAP: Way = {"trap.gp": 1, "vmm.decode": 1}
CALLOUT_SAVE: Way = {"machine.store": 2, "machine.load": 2}


def instead(technique: str, told: Mapping[str, str], op: str) -> Way:
    """The events of one instruction ``op`` under a technique."""
    if technique == "trap-and-emulate":
        silent = op in ("pushf", "popf") and told["sensitive"] == "silent"
        return {f"machine.{op}": 1} if silent else TRAP | {f"emulate.{op}": 1}
    if technique == "binary-translation":
        if told["emulation"] == "callout":
            return CALLOUT_SAVE | {f"bt.callout.{op}": 1, f"emulate.{op}": 1}
        extra = {"machine.rdtsc": 1} if op == "rdtsc" else {}
        return {"machine.store": 2, "machine.alu": 2} | extra
    if technique == "paravirtualization" and op in ("cli", "sti", "pushf", "popf"):
        return {"machine.store": 1, "machine.load": 1}
    if technique == "hardware-assisted" and op == "rdtsc":
        return {"exit.rdtsc": 1, "entry": 1, "vmcb.read": 4, "vmcb.write": 3, "emulate.rdtsc": 1}
    return {f"machine.{op}": 1}


def cell(
    technique: str, told: Mapping[str, str], workload: str, density: int, ways: Mapping[str, Way] | None = None,
) -> dict[str, Any]:
    """An unpriced record. ``ways`` replaces what happens for an instruction (a doctored strategy)."""
    others = 2_000_000 if not NAMED[workload] else OPERATIONS * 1000 // density
    events = {"machine.alu": int(others * 0.62), "machine.load": int(others * 0.18), "machine.branch": others // 5}
    executed = 0
    for op in NAMED[workload]:
        times = OPERATIONS // len(NAMED[workload])
        way = (ways or {}).get(op) or instead(technique, told, op)
        executed += times * (f"emulate.{op}" not in way)
        for kind, count in way.items():
            events[kind] = events.get(kind, 0) + count * times
    events["machine.rdtsc"] = events.get("machine.rdtsc", 0)
    if technique == "binary-translation":
        events |= {"bt.translate.instruction": 300, "bt.chain": 12}
    events = {kind: count for kind, count in events.items() if count}
    guest = others + (OPERATIONS if NAMED[workload] else 0)
    emulated = sum(count for kind, count in events.items() if kind.startswith("emulate."))
    translated = guest - emulated if technique == "binary-translation" and workload != "compute" else 0
    parameters: dict[str, Any] = {"guest": "nano", "workload": workload, "iterations": OPERATIONS, "density": density, **told}
    wrong = workload == "pushf_popf" and told.get("sensitive") == "silent"
    words = ",".join(f"{key}={parameters[key]}" for key in sorted(parameters))
    return {
        "id": f"{technique}/{words}", "technique": technique, "parameters": parameters, "status": "ok", "error": None,
        "platform": "svm" if technique == "hardware-assisted" else "x86",
        "work": {"operations": OPERATIONS if NAMED[workload] else 0, "iterations": OPERATIONS},
        "instructions": {"guest": {"user": 0, "kernel": guest}, "machine": guest}, "events": events, "phases": {},
        "fidelity": {
            "outcome": f"{workload}-{density}" + ("-wrong" if wrong else ""), "state": None, "matches_native": not wrong,
            "first_difference": {"in": "console", "line": 3, "native": "if 0", "here": "if 1"} if wrong else None,
        },
        "efficiency": {
            "retired": (guest - emulated - translated) / guest, "translated": translated / guest, "emulated": emulated / guest,
        },
        "console": "", "machine_path": "portable", "host_seconds": 0.5,
    }


def price(
    cells: list[dict[str, Any]], profiles: list[str] | None = None, book: Mapping[str, costs.Profile] | None = None,
) -> None:
    """Fill in cycles and slowdown as the runner does."""
    natives = {
        (c["parameters"]["workload"], c["parameters"]["density"]): c["events"] for c in cells if c["technique"] == "native"
    }
    for record in cells:
        record["cycles"], record["slowdown"] = {}, {}
        base = natives.get((record["parameters"]["workload"], record["parameters"]["density"]))
        for name in profiles or PROFILES:
            profile = (book or {}).get(name) or costs.load(name)
            priced = costs.price(record["events"], profile, record["platform"])
            record["cycles"][name] = priced.as_dict()
            if isinstance(priced, costs.Price) and base:
                ratio = costs.slowdown(record["events"], base, profile, record["platform"])
                record["slowdown"][name] = ratio.as_dict()


def cells(
    workloads: tuple[str, ...] = tuple(NAMED), densities: tuple[int, ...] = (10, 50, 250, 1000),
    book: Mapping[str, costs.Profile] | None = None,
) -> list[dict[str, Any]]:
    """A run of the shape of ``cli_heavy``: density is varied for the first workload only."""
    made = [
        cell(technique, told, workload, density)
        for workload in workloads
        for density in (densities if workload == "cli_sti" else (1000,))
        for technique, told in VARIANTS
    ]
    price(made, book=book)
    return made


def results(**arguments: Any) -> dict[str, Any]:
    """A whole results.json with verdicts."""
    from vmlab import claims

    made = cells(**arguments)
    ids = ["cli-native-slow", "cli-bt-beats-native", "trap-vs-callout-vs-incache", "direct-execution", "popf-silent",
           "fidelity-all", "exit-cost-falls"]
    return {
        "schema_version": 1, "experiment": "made_up", "title": "What does switching interrupts off cost?", "cells": made,
        "claims": claims.evaluate(ids, made, PROFILES),
    }
