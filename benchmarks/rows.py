"""What a benchmark's row is, and how rows are printed."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A ratio measured within one run: its median and spread over several rounds, and its limit, if it has one."""

    name: str
    ratio: float
    limit: float | None
    better: str                 # "lower" or "higher"
    spread: tuple[float, float]
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the limit is met; None where there is none."""
        if self.limit is None:
            return None
        return self.ratio <= self.limit if self.better == "lower" else self.ratio >= self.limit

    def as_dict(self) -> dict[str, object]:
        """For programs."""
        return {"name": self.name, "ratio": round(self.ratio, 4), "limit": self.limit, "better": self.better,
                "spread": [round(value, 4) for value in self.spread]}

    def text(self) -> str:
        """For a terminal."""
        limit = "" if self.limit is None else f"{'<=' if self.better == 'lower' else '>='} {self.limit:g}"
        verdict = {True: "met", False: "MISSED", None: ""}[self.met]
        spread = f"{self.spread[0]:.3g} to {self.spread[1]:.3g}"
        return f"{self.name:54} {self.ratio:9.3f}  {limit:8} {verdict:7} {spread:20} {self.note}".rstrip()


@dataclass(frozen=True)
class Skipped:
    """A row that cannot be measured on this host, and why."""

    name: str
    reason: str

    def text(self) -> str:
        """For a terminal."""
        return f"{self.name:54} skipped: {self.reason}"


def row(name: str, ratios: Sequence[float], limit: float | None, better: str, note: str = "") -> Row:
    """The row of several rounds."""
    return Row(name, statistics.median(ratios), limit, better, (min(ratios), max(ratios)), note)


def table(rows: Iterable[Row]) -> str:
    """For docs/performance.md."""
    lines = ["| what | median | spread | limit | met | beside it |", "|---|---|---|---|---|---|"]
    for one in rows:
        limit = "" if one.limit is None else f"{'≤' if one.better == 'lower' else '≥'} {one.limit:g}"
        met = {True: "yes", False: "**no**", None: ""}[one.met]
        lines.append(f"| {one.name} | {one.ratio:.2f} | {one.spread[0]:.2f}–{one.spread[1]:.2f} | {limit} | {met} | {one.note} |")
    return "\n".join(lines)
