"""A trace as Chrome's and Perfetto's JSON (Trace Event Format): a row per place where code runs, VMM work as slices of its own.

Load it in https://ui.perfetto.dev or chrome://tracing. A microsecond there is a cycle here.
"""

from __future__ import annotations

from typing import Any

from vmlab.trace.recorder import Step, Trace
from vmlab.trace.words import did, kind_of

_ROWS = {"guest": 1, "cache": 2, "monitor": 3}
_VMM_ROW = 4


def chrome(trace: Trace, cycles: list[float]) -> dict[str, Any]:
    """The document. Every step is a complete event ("X") as long as its price; what a VMM did shows below it."""
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 1, "tid": tid, "name": "thread_name", "args": {"name": name}}
        for name, tid in (("guest code", 1), ("translation cache", 2), ("the monitor's machine code", 3), ("traps, exits, the monitor", 4))
    ]
    events.insert(0, {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": trace.technique}})
    at = 0.0
    for step, length in zip(trace.steps, cycles, strict=True):
        events.append({"ph": "X", "pid": 1, "tid": _ROWS[step.where], "ts": at, "dur": length, "name": step.code, "cat": kind_of(step),
                       "args": _arguments(step)})
        if kind_of(step) != "instruction":
            events.append({"ph": "X", "pid": 1, "tid": _VMM_ROW, "ts": at, "dur": length, "name": kind_of(step), "cat": kind_of(step),
                           "args": {"did": did(step)}})
        events.append({"ph": "C", "pid": 1, "ts": at, "name": "interrupt flags",
                       "args": {"real": int(step.before.real_if), "virtual": int(step.before.virtual_if)}})
        at += length
    return {"traceEvents": events, "displayTimeUnit": "ns", "otherData": {"technique": trace.technique, "unit": "one microsecond is one cycle"}}


def _arguments(step: Step) -> dict[str, Any]:
    return {"number": step.number, "address": f"{step.address:#x}", "symbol": step.symbol, "guest_code": step.guest_code, "cpl": step.before.cpl,
            "events": dict(step.events)}
