"""Completes what was counted: cycles on each profile, slowdown and fidelity against the native cell.

A record as the worker gives it knows nothing of prices. Here it becomes a cell as ``results.json`` holds
it. Nothing is run, so stored cells can be completed again under other profiles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from vmlab.experiment.lab import Lab
from vmlab.experiment.matrix import BASELINE, Cell
from vmlab.experiment.worker import Record

#: Every key of a cell, in the order of the file, with what stands there when the run gave nothing.
SHAPE: Mapping[str, Any] = {
    "status": "failed", "error": None, "platform": None, "work": {}, "instructions": {}, "events": {}, "phases": {},
    "cycles": {}, "slowdown": {}, "fidelity": {}, "efficiency": {}, "safety": {}, "exit_code": None, "console": "",
    "machine_path": None, "host_seconds": 0.0,
}


def complete(cells: Sequence[Cell], records: Mapping[str, Record], profiles: Sequence[str], lab: Lab) -> list[dict[str, Any]]:
    """The cells of ``results.json``, in the order of the matrix.

    :param records: worker's record by cell id; a cell without one was not run and is left out.
    """
    return [complete_one(cell, records[cell.id], records.get(cell.baseline), profiles, lab) for cell in cells if cell.id in records]


def complete_one(cell: Cell, record: Record, native: Record | None, profiles: Sequence[str], lab: Lab) -> dict[str, Any]:
    """One cell of ``results.json``. ``native``: the record of its baseline, if there is one."""
    result: dict[str, Any] = {"id": cell.id, "technique": cell.technique, "parameters": dict(cell.parameters)}
    for key, default in SHAPE.items():
        value = record.get(key)
        result[key] = default if value is None else value
    if "warm_up" in record:     # only of a technique that learns its guest
        result["warm_up"] = record["warm_up"]
    result["cycles"], result["slowdown"] = {}, {}
    if result["status"] != "ok":
        result["fidelity"] = {**_digests(record), "matches_native": None, "first_difference": None}
        return result
    has_native = native is not None and native.get("status") == "ok"
    for profile in profiles:
        result["cycles"][profile] = lab.price(record["events"], profile, record["platform"])
        if native is not None and has_native:
            result["slowdown"][profile] = lab.slowdown(record["events"], native["events"], profile, record["platform"])
    result["fidelity"] = _digests(record)
    result["fidelity"] |= compare(record, native) if native is not None and has_native else NOT_COMPARED
    if cell.technique != BASELINE:
        workload = str(cell.parameters.get("workload", ""))
        result["fidelity"]["declared"] = lab.unfaithful(cell.technique, workload, cell.parameters)
    return result


NOT_COMPARED = {"matches_native": None, "state_matches_native": None, "first_difference": None}


def _digests(record: Record) -> dict[str, Any]:
    return {"outcome": None, "state": None, **record.get("fidelity", {})}


def compare(record: Record, native: Record) -> dict[str, Any]:
    """Fidelity against the native run: does the outcome match, does the state, and where do they first part.

    ``state_matches_native`` is None where either run has no state digest: it says nothing about those.
    """
    here, there = _digests(record), _digests(native)
    same = here["outcome"] is not None and here["outcome"] == there["outcome"]
    both = here["state"] is not None and there["state"] is not None
    return {
        "matches_native": same,
        "state_matches_native": here["state"] == there["state"] if both else None,
        "first_difference": None if same else here.get("first_difference") or _first_difference(record, native),
    }


def _first_difference(record: Record, native: Record) -> dict[str, Any]:
    """Where the consoles part, or else that the difference is in what the digest covers beside them."""
    ours, theirs = str(record.get("console", "")).splitlines(), str(native.get("console", "")).splitlines()
    for number, (here, there) in enumerate(zip_longest(ours, theirs), start=1):
        if here != there:
            return {"in": "console", "line": number, "native": there, "here": here}
    return {"in": "outcome", "native": _digests(native)["outcome"], "here": _digests(record)["outcome"]}
