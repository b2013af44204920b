"""The story of a run as plain text: slowdowns by workload, technique and generation. ASCII only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vmlab.report import densities, nanobench
from vmlab.report.findings import name, short
from vmlab.report.view import View, ratio, times

HEAD = "slowdown against native (1x), nominal cost; in brackets the 5th to 95th percentile of sampled costs"


def terminal_table(results: Mapping[str, Any]) -> str:
    """Slowdown of every technique, a block per workload at its densest, a column per CPU generation.

    ``-`` stands where a CPU could not have run it. Failed and unsupported cells are named below with their reason.
    """
    view = View(results)
    lines: list[str] = []
    if view.generations:
        rows = [["", *(short(generation) for generation in view.generations)]]
        for workload in view.workloads:
            dense = view.densities(workload)
            rows.append([workload + (f" (density {dense[-1]:g})" if dense and dense[-1] else "")])
            rows += [_row(view, workload, variant) for variant in view.variants(workload) if variant[0] != "native"]
        lines = [HEAD, "", *_aligned(rows)]
    if work := densities.text(view):
        lines += ["", *work]
    small = nanobench.text(results)
    if len(small.splitlines()) > 6:
        lines += ["", small, ""]
    for cell in view.all:
        if cell.get("status") != "ok":
            lines.append(f"{cell.get('status')}: {cell.get('id')}: {cell.get('error') or 'no reason given'}")
    text = "\n".join(lines) or ("native alone: there is nothing to compare it with" if view.all else "no cell was run")
    return text.replace("×", "x").encode("ascii", "replace").decode("ascii")


def _row(view: View, workload: str, variant: tuple[str, str]) -> list[str]:
    row = [f"  {name(variant)}"]
    for generation in view.generations:
        found = ratio(view.densest(workload, variant), generation.name)
        if not found:
            row.append("-")
        elif times(found.low) == times(found.high):
            row.append(times(found.value))
        else:
            row.append(f"{times(found.value)} ({times(found.low)[:-1]}-{times(found.high)[:-1]})")
    return row


def _aligned(rows: list[list[str]]) -> list[str]:
    """Columns to the left; a row of one field is a heading and takes no part in the widths."""
    columns = len(rows[0])
    widths = [max(len(row[i]) for row in rows if len(row) == columns) for i in range(columns)]
    return [
        row[0] if len(row) == 1 else "  ".join(field.ljust(width) for field, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
