"""What a claim may look at: cells of a run, the cost profiles, a probe; and how it says "not enough".

Predicates never reach for files or for the machine: everything comes through :class:`Evidence`, so a
test can hand them a doctored run or an altered cost and watch the verdict flip.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from vmlab import costs as pricing
from vmlab.costs import Figure, Profile, Ratio, Unsupported
from vmlab.errors import VmlabError

Cell = Mapping[str, Any]
Verdict = Literal["holds", "fails", "undecided"]

#: Parameters that say what the guest does. Two cells that agree in them ran the same work.
WORK_KEYS = ("guest", "workload", "iterations", "density")


class Missing(VmlabError):
    """The evidence that a claim needs is not there; the message names it. The verdict is ``undecided``."""


@dataclass(frozen=True)
class Finding:
    """A predicate's answer: the verdict, per profile where prices matter, the figures, and why in words."""

    verdict: Verdict
    reason: str
    by_profile: dict[str, Verdict] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Evidence:
    """The material of one evaluation."""

    cells: Sequence[Cell]
    profiles: tuple[str, ...]
    costs: Mapping[str, Profile]
    probe: Mapping[str, Any] | None = None

    def find(self, technique: str | None = None, workload: str | None = None, **parameters: object) -> list[Cell]:
        """Finished cells of this technique and workload whose parameters agree, densest last."""
        chosen = [
            cell for cell in self.cells
            if cell.get("status") == "ok"
            and technique in (None, cell["technique"])
            and workload in (None, cell["parameters"].get("workload"))
            and all(cell["parameters"].get(name) == value for name, value in parameters.items())
        ]
        return sorted(chosen, key=lambda cell: (number(cell, "density"), number(cell, "iterations")))

    def densest(self, technique: str, workload: str, **parameters: object) -> Cell:
        """The cell where the workload's own instruction weighs most.

        :raises Missing: there is no such finished cell.
        """
        found = self.find(technique, workload, **parameters)
        if not found:
            detail = "".join(f", {name}: {value}" for name, value in parameters.items())
            raise Missing(f"no finished cell of {technique} on {workload}{detail}")
        return found[-1]

    def profile(self, name: str) -> Profile:
        """A cost profile that a claim names itself, whether or not the run was priced on it."""
        return self.costs.get(name) or pricing.load(name)

    def figure(self, profile: str, key: str) -> Figure:
        """A single cost of a profile.

        :raises Missing: the profile has no such cost (a CPU without hardware assistance has no exit).
        """
        figure = self.costs[profile].figure(key)
        if figure is None:
            raise Missing(f"profile {profile} has no cost {key}")
        return figure

    def cycles(self, cell: Cell, profile: str) -> float:
        """Nominal cycles of the cell's steady state on a profile.

        :raises Missing: that CPU could not have run it.
        """
        priced = pricing.nominal(steady(cell), self.costs[profile], cell["platform"])
        if isinstance(priced, Unsupported):
            raise Missing(f"{describe(cell)}: {priced.reason}")
        return priced

    def ratio(self, cell: Cell, other: Cell, profile: str) -> Ratio:
        """One cell's steady state over another's, under common samples of the costs.

        :raises Missing: that CPU could not have run one of them.
        """
        found = pricing.slowdown(
            steady(cell), steady(other), self.costs[profile], cell["platform"], native_platform=other["platform"],
        )
        if isinstance(found, Unsupported):
            raise Missing(f"{describe(cell)}: {found.reason}")
        return found

    def native_of(self, cell: Cell) -> Cell:
        """The bare machine's run of the same work.

        :raises Missing: that cell is absent or did not finish.
        """
        wanted = {name: cell["parameters"].get(name) for name in WORK_KEYS}
        found = self.find("native", **wanted)
        if not found:
            raise Missing(f"no finished native cell for the work of {describe(cell)}")
        return found[0]


def number(cell: Cell, parameter: str) -> float:
    """A numeric parameter of the cell, 0 where it has none."""
    value = cell["parameters"].get(parameter)
    return float(value) if isinstance(value, (int, float)) else 0.0


def describe(cell: Cell) -> str:
    """A cell in a few words, for reasons."""
    parameters = cell["parameters"]
    extra = [f"{name}: {parameters[name]}" for name in ("sensitive", "emulation") if name in parameters]
    return f"{cell['technique']} on {parameters.get('workload')}" + (f" ({', '.join(extra)})" if extra else "")


def steady(cell: Cell) -> Mapping[str, int]:
    """Events of the region's warm part, where everything has been translated; of the whole region where it has none."""
    warm: Mapping[str, int] = (cell.get("phases") or {}).get("roi.warm", {}).get("events") or {}
    return warm or cell["events"]


def count(events: Mapping[str, int], kinds: Iterable[str]) -> int:
    """How many events of these kinds there are."""
    return sum(int(events.get(kind, 0)) for kind in kinds)
