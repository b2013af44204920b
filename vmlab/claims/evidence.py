"""What a claim may look at: cells of a run, the cost profiles, a probe; and how it says "not enough".

Predicates never reach for files or for the machine: everything comes through :class:`Evidence`, so a
test can hand them a doctored run or an altered cost and watch the verdict flip.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from vmlab import costs as pricing
from vmlab.costs import Figure, NoFigure, Profile, Quantity, Ratio, Unsupported
from vmlab.errors import VmlabError
from vmlab.parameters import nearest

Cell = Mapping[str, Any]
Verdict = Literal["holds", "fails", "undecided"]

#: Parameters that say how much the guest does, not what: a claim's cells may be larger or smaller than it asks for.
SIZES = ("iterations", "density", "budget")
#: Parameters of a kernel from a file that tell no two cells of a claim apart.
_NOT_SAID = ("append", "initrd", "protocol", "ram", "script")


class Missing(VmlabError):
    """The evidence that a claim needs is not there; the message names it. The verdict is ``undecided``."""


@dataclass(frozen=True)
class Margins:
    """What a verdict on one profile hangs on: it holds where at least ``enough`` (None: all) of them are 0 or more.

    ``certainty`` is the share of the cost samples that must agree, else the verdict is undecided.
    """

    of: tuple[Quantity, ...]
    enough: int | None = None
    certainty: float = 0.0


@dataclass(frozen=True)
class Finding:
    """A predicate's answer: the verdict, per profile where prices matter, the figures, and why in words."""

    verdict: Verdict
    reason: str
    by_profile: dict[str, Verdict] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    margins: dict[str, Margins] = field(default_factory=dict)
    """By profile, where a comparison of prices decides: for the confidence and the cost that decides."""


@dataclass(frozen=True)
class Evidence:
    """The material of one evaluation."""

    cells: Sequence[Cell]
    profiles: tuple[str, ...]
    costs: Mapping[str, Profile]
    probe: Mapping[str, Any] | None = None
    blocks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The claim's own experiment: name -> technique, workload and parameters of one of its cells."""
    absent: Mapping[str, str] = field(default_factory=dict)
    """Name of a block -> why the lab cannot run it."""

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

    def cell(self, name: str) -> Cell:
        """The cell that the claim's experiment calls ``name``: of several sizes its own, else the largest. Raises as :meth:`sizes` does."""
        found = self.sizes(name)
        own = {key: value for key, value in self.blocks[name].items() if key in SIZES}
        return next((cell for cell in reversed(found) if _is_of(cell, own)), found[-1])

    def sizes(self, name: str) -> list[Cell]:
        """All sizes of the cell that the claim's experiment calls ``name``, the largest last.

        :raises Missing: the experiment has no such block, it cannot run here, or no finished cell is of it.
        """
        if name not in self.blocks:
            raise Missing(f"the claim's experiment has no cell {name!r}{nearest(name, self.blocks)}")
        if name in self.absent:
            raise Missing(self.absent[name])
        wanted = {key: value for key, value in self.blocks[name].items() if key not in SIZES}
        found = [cell for cell in self.find() if _is_of(cell, wanted)]
        if found:
            return found
        broken = [cell for cell in self.cells if _is_of(cell, wanted)]
        words = ", ".join(f"{key}: {value}" for key, value in wanted.items() if key not in _NOT_SAID)
        raise Missing(f"{words}: {broken[-1].get('error')}" if broken else f"no finished cell of {words}")

    def profile(self, name: str) -> Profile:
        """A cost profile that a claim names itself, whether or not the run was priced on it."""
        return self.costs.get(name) or pricing.load(name)

    def figure(self, profile: str, key: str) -> Figure:
        """A single cost of a profile.

        :raises Missing: the profile has no such cost (a CPU without hardware assistance has no exit).
        """
        figure = self.profile(profile).figure(key)
        if figure is None:
            raise Missing(f"profile {profile} has no cost {key}")
        return figure

    def value(self, quantity: Quantity, profile: str) -> float:
        """Nominal cycles.

        :raises Missing: the profile has no figure for something in it.
        """
        try:
            return quantity.value(self.profile(profile))
        except NoFigure as lacking:
            raise Missing(f"profile {profile} has {lacking}") from lacking

    def runnable(self, cell: Cell, profile: str) -> None:
        """:raises Missing: that CPU could not have run the cell."""
        if not pricing.supports(self.profile(profile), cell["platform"]):
            raise Missing(f"{describe(cell)}: {profile} does not provide what {cell['platform']} needs")

    def cycles(self, cell: Cell, profile: str) -> float:
        """Nominal cycles of the cell's steady state on a profile.

        :raises Missing: that CPU could not have run it.
        """
        self.runnable(cell, profile)
        return self.value(Quantity(steady(cell)), profile)

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
        """The bare machine's run of the same work: every parameter that it has is the cell's too.

        :raises Missing: that cell is absent or did not finish.
        """
        for native in self.find("native", cell["parameters"].get("workload")):
            if all(cell["parameters"].get(key, value) == value for key, value in native["parameters"].items()):
                return native
        raise Missing(f"no finished native cell for the work of {describe(cell)}")


def _is_of(cell: Cell, wanted: Mapping[str, Any]) -> bool:
    """Whether a cell is of a block. A parameter that the cell's technique or workload does not have excludes nothing."""
    has = {"technique": cell["technique"], **cell["parameters"]}
    return all(has.get(key, value) == value for key, value in wanted.items())


def number(cell: Cell, parameter: str) -> float:
    """A numeric parameter of the cell, 0 where it has none."""
    value = cell["parameters"].get(parameter)
    return float(value) if isinstance(value, (int, float)) else 0.0


def describe(cell: Cell) -> str:
    """A cell in a few words, for reasons."""
    parameters = cell["parameters"]
    extra = [f"{name}: {parameters[name]}" for name in ("sensitive", "emulation", "memory") if name in parameters]
    return f"{cell['technique']} on {parameters.get('workload') or parameters.get('guest')}" + (f" ({', '.join(extra)})" if extra else "")


def steady(cell: Cell) -> Mapping[str, int]:
    """Events of the region's warm part, where everything has been translated; of the whole region where it has none."""
    return phase(cell, "roi.warm") or cell["events"]


def phase(cell: Cell, name: str) -> Mapping[str, int]:
    """Events of one phase; none where the run has no such phase."""
    events: Mapping[str, int] = (cell.get("phases") or {}).get(name, {}).get("events") or {}
    return events


def count(events: Mapping[str, int], kinds: Iterable[str]) -> int:
    """How many events of these kinds there are."""
    return sum(int(events.get(kind, 0)) for kind in kinds)
