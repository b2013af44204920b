"""Why the CPU left the guest: VM exits, traps, hypercalls and callouts by reason, as rows, and as ``perf kvm stat`` prints them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vmlab import costs
from vmlab.errors import ConfigError
from vmlab.ledger import EVENTS
from vmlab.report.findings import name
from vmlab.report.view import Cell, View, cycles

#: Kinds of events by which the CPU goes from the guest to the monitor.
LEAVING = ("exit.", "trap.", "hypercall.", "bt.callout.")


@dataclass(frozen=True)
class ExitRow:
    """One reason: how often, which share of the technique's exits, cycles each (None: not priced), share of all cycles."""

    technique: str
    kind: str
    words: str
    count: int
    share: float
    each: float | None
    of_cycles: float | None


def reasons(events: Mapping[str, int]) -> dict[str, int]:
    """Count by kind, most frequent first. The gate of a hypercall is not an exit of its own."""
    calls = sum(n for kind, n in events.items() if kind.startswith("hypercall."))
    found = {kind: n - (min(n, calls) if kind == gate(events) else 0) for kind, n in events.items() if kind.startswith(LEAVING)}
    return dict(sorted(((kind, n) for kind, n in found.items() if n > 0), key=lambda row: (-row[1], row[0])))


def gate(events: Mapping[str, int]) -> str:
    """How hypercalls enter: by INT n, in 64 bits by SYSCALL."""
    return "trap.syscall" if "trap.syscall" in events else "trap.int"


def exit_rows(view: View, workload: str, profile: str) -> list[ExitRow]:
    """The rows of every technique on one workload, at its densest."""
    return [row for variant in view.variants(workload) if variant[0] != "native"
            for row in cell_rows(view.densest(workload, variant), profile, name(variant))]


def cell_rows(cell: Cell, profile: str, technique: str) -> list[ExitRow]:
    """The rows of one cell. A VM exit's price includes the entry that follows it, a hypercall's the gate that it came through."""
    events = cell.get("events") or {}
    found = reasons(events)
    everything, priced = sum(found.values()), cycles(cell, profile)
    rows = []
    for kind, count in found.items():
        each = _round_trip(kind, profile, gate(events)) if priced else None
        share = each * count / float(priced["total"]) if priced and each is not None and priced["total"] else None
        rows.append(ExitRow(technique, kind, EVENTS[kind].words if kind in EVENTS else kind, count, count / everything, each, share))
    return rows


def _round_trip(kind: str, profile: str, gate: str) -> float | None:
    try:
        loaded = costs.load(profile)
    except ConfigError:
        return None
    back = "entry" if kind.startswith("exit.") else gate if kind.startswith("hypercall.") else None
    parts = [costs.unit_cost(part, loaded) for part in (kind, back) if part is not None]
    if any(isinstance(part, costs.Unsupported) for part in parts):
        return None
    return sum(float(part) for part in parts if not isinstance(part, costs.Unsupported))


def perf_table(cell: Mapping[str, Any], profile: str, technique: str) -> str:
    """One cell in the layout of ``perf kvm stat report``, times in cycles of one CPU generation. ASCII."""
    rows = cell_rows(cell, profile, technique)
    lines = [f"Analyze events for {cell.get('id')}, priced on {profile}:", "",
             f"{'VM-EXIT':>32} {'Samples':>12} {'Samples%':>9} {'Time%':>9} {'Avg time':>16}", ""]
    spent = sum(row.each * row.count for row in rows if row.each is not None)
    for row in rows:
        of_time = f"{100 * row.each * row.count / spent:.2f}%" if row.each is not None and spent else "-"
        average = f"{row.each:,.0f} cycles" if row.each is not None else "-"
        lines.append(f"{row.kind.upper():>32} {row.count:>12,} {100 * row.share:>8.2f}% {of_time:>9} {average:>16}")
    lines += ["", f"Total Samples:{sum(row.count for row in rows):,}, Total events handled time:{spent:,.0f} cycles."]
    return "\n".join(lines).encode("ascii", "replace").decode("ascii")
