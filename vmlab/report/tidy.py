"""A chart's figures as a tidy table: one row a point, for a spreadsheet or a program of the reader's own."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from typing import Any

from vmlab.report.exits import exit_rows
from vmlab.report.findings import name
from vmlab.report.view import Cell, View, cycles, operations, ratio

Row = dict[str, Any]


def table(view: View, chart: str) -> list[Row]:
    """The rows of a chart; of one that has no table of its own every slowdown of the run."""
    return _TABLES.get(chart, slowdowns)(view)


def as_csv(rows: list[Row]) -> bytes:
    """The rows with a head, UTF-8, lines ending in LF."""
    stream = io.StringIO()
    if rows:
        writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return stream.getvalue().encode("utf-8")


def slowdowns(view: View) -> list[Row]:
    """Slowdown of every finished cell but the native ones on every generation."""
    return [
        _head(view, cell) | {"cpu": g.name, "year": g.year, "slowdown": found.value, "low": found.low, "high": found.high}
        for cell in view.cells if cell["technique"] != "native" for g in view.generations for found in [ratio(cell, g.name)] if found
    ]


def causes(view: View) -> list[Row]:
    """Cycles per operation by cause of every finished cell on every generation."""
    return [
        _head(view, cell) | {"cpu": g.name, "year": g.year, "cause": cause, "cycles": spent, "per_operation": spent / max(operations(cell), 1)}
        for cell in view.cells for g in view.generations for price in [cycles(cell, g.name)] if price
        for cause, spent in price["breakdown"].items()
    ]


def exits(view: View) -> list[Row]:
    """Times that the guest was left, by reason, at each workload's densest."""
    return [
        {"workload": workload, "technique": row.technique, "reason": row.kind, "times": row.count, "share": row.share, "cpu": g.name,
         "cycles_each": row.each, "share_of_cycles": row.of_cycles}
        for workload in view.workloads for g in view.generations for row in exit_rows(view, workload, g.name)
    ]


def _head(view: View, cell: Cell) -> Row:
    parameters = cell["parameters"]
    return {"workload": view.work(cell), "technique": cell["technique"], "variant": name(view.variant(cell)),
            **{key: value for key, value in parameters.items() if key not in ("workload", "guest")}}


_TABLES: dict[str, Callable[[View], list[Row]]] = {"causes": causes, "exits": exits}
