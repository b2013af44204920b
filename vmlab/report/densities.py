"""What a load is made of: page-table writes, faults, system calls, CR3 loads and instructions an operation.

The guest counts its own work, so that the densities of a load can be compared with a published guest's; hidden faults are
the monitor's and differ by technique.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmlab.report.findings import name
from vmlab.report.view import Cell, View, operations

#: Counts of the guest's kernel (``work`` of a cell), and what they are called here.
COUNTED = {"pt_writes": "page-table writes", "faults": "true faults", "system_calls": "system calls", "cr3_loads": "CR3 loads"}
HIDDEN = ("shadow.fault.hidden", "shadow.fault.dirty", "nested.fault")


@dataclass(frozen=True)
class Density:
    """One workload natively: each count of :data:`COUNTED` and the instructions an operation; hidden faults by technique."""

    workload: str
    counted: dict[str, float]
    instructions: float
    hidden: dict[str, float]


def densities(view: View) -> list[Density]:
    """Of every workload whose guest counts its work."""
    made = []
    for workload in view.workloads:
        native = next((c for c in view.cells if c["technique"] == "native" and view.work(c) == workload), None)
        if native is None or not operations(native) or not all(key in native["work"] for key in COUNTED):
            continue
        guest, each = native["instructions"]["guest"], operations(native)
        made.append(Density(
            workload, {key: native["work"][key] / each for key in COUNTED}, (guest["user"] + guest["kernel"]) / each,
            {name(v): _hidden(view.densest(workload, v)) for v in view.variants(workload) if v[0] != "native"}))
    return made


def _hidden(cell: Cell) -> float:
    return sum(int(cell["events"].get(kind, 0)) for kind in HIDDEN) / max(operations(cell), 1)


def text(view: View) -> list[str]:
    """As lines for a terminal; none where no guest counts its work."""
    found = densities(view)
    if not found:
        return []
    rows = [["an operation natively", *COUNTED.values(), "instructions", "hidden faults of monitors that cause some"]]
    for one in found:
        hidden = ", ".join(f"{technique} {_number(rate)}" for technique, rate in one.hidden.items() if rate >= 0.005)
        rows.append([one.workload, *map(_number, one.counted.values()), _number(one.instructions), hidden])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(field.ljust(width) for field, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
