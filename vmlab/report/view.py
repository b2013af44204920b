"""A run as the report reads it: which cells tell the story, and how things are called in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vmlab.errors import ConfigError
from vmlab.report.style import order

Cell = Mapping[str, Any]

#: Parameters that mean something only where another has this value.
_ONLY_WITH = {"nested_page": ("memory", "nested")}
#: Parameters that say what the guest does, beside those of the native cells; the others say how the technique does it.
WORK_KEYS = ("guest", "workload", "iterations", "density", "budget")


@dataclass(frozen=True)
class Ratio:
    """A slowdown against native: nominal value, 5th and 95th percentile."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Generation:
    """A cost profile as an axis shows it."""

    name: str
    words: str
    vendor: str
    year: int
    priced_here: bool = True
    """Whether this lab has the profile."""


class View:
    """The finished cells of a run, indexed as the charts need them."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        self.results = results
        self.all: list[Cell] = list(results.get("cells") or [])
        self.cells = [cell for cell in self.all if cell.get("status") == "ok"]
        self._spread = _spread(self.cells)
        self._first = {str(cell["technique"]): cell["parameters"] for cell in reversed(self.cells)}
        self._guest = next((cell["parameters"].get("guest") for cell in self.cells), None)
        self.generations = sorted(
            (_generation(name) for name in {name for cell in self.cells for name in cell.get("cycles") or {}}),
            key=lambda g: (g.year, g.vendor != "Intel", g.name),
        )

    @property
    def intel(self) -> list[Generation]:
        """Successive generations of the vendor with most profiles: a line may join them."""
        vendors = [g.vendor for g in self.generations]
        main = max(dict.fromkeys(vendors), key=vendors.count, default="")
        return [g for g in self.generations if g.vendor == main]

    @property
    def known(self) -> list[Generation]:
        """The generations whose cost profile is here, so that the run can be priced anew."""
        return [g for g in self.generations if g.priced_here]

    def work(self, cell: Cell) -> str:
        """What the cell's guest did: its workload; on another guest than the run's first, with that guest's name. A kernel from a file: its name."""
        workload, guest = cell["parameters"].get("workload"), cell["parameters"].get("guest")
        if workload is None:
            return str(guest).replace("\\", "/").rsplit("/", 1)[-1]
        return str(workload) if guest == self._guest else f"{workload} on {guest}"

    @property
    def workloads(self) -> list[str]:
        """Workloads (:meth:`work`) in the order of the cells, the headline first."""
        seen = list(dict.fromkeys(map(self.work, self.cells)))
        return sorted(seen, key=lambda name: -len(self.densities(name)))

    @property
    def headline(self) -> str:
        """The workload that the run varies most, which the titles speak of. Empty for an empty run."""
        return next(iter(self.workloads), "")

    def densities(self, workload: str) -> list[float]:
        """The densities of that workload, ascending."""
        return sorted({
            float(cell["parameters"]["density"]) for cell in self.cells
            if self.work(cell) == workload and "density" in cell["parameters"]
        })

    def what(self, workload: str) -> str:
        """The workload with the density at which it is shown."""
        densities = self.densities(workload)
        return f"{workload}, density {densities[-1]:g}" if densities and densities[-1] else workload

    def variant(self, cell: Cell) -> tuple[str, str]:
        """Technique, and what tells this cell from the technique's others on the same work ("" if nothing does).

        Where more than two parameters vary, only those are named that differ from the technique's first cell, which is the "reference".
        """
        technique, parameters = str(cell["technique"]), cell["parameters"]
        keys = [key for key in self._spread.get(technique, {}) if key in parameters and _applies(key, parameters)]
        if len(self._spread.get(technique, {})) > 2:
            keys = [key for key in keys if parameters[key] != self._first[technique].get(key)]
            return technique, ", ".join(self._told(technique, key, parameters[key]) for key in keys) or "reference"
        return technique, ", ".join(self._told(technique, key, parameters[key]) for key in keys)

    def _told(self, technique: str, key: str, value: Any) -> str:
        """A parameter's value; with the parameter's name where the value alone says nothing, or another parameter may have it too."""
        text, spread = str(value), self._spread[technique]
        alone = text.replace("-", "").isalpha() and text not in ("on", "off", "True", "False")
        return text if alone and sum(text in values for values in spread.values()) == 1 else f"{key} {text}"

    def variants(self, workload: str) -> list[tuple[str, str]]:
        """The variants that ran this workload, in the order in which they are always shown.

        Variants of a technique whose events are the same there (the parameter has no effect on this work) are one.
        """
        found: dict[tuple[str, str], list[Cell]] = {}
        for cell in self.cells:
            if self.work(cell) == workload:
                found.setdefault(self.variant(cell), []).append(cell)
        ledgers: dict[str, list[Any]] = {}
        for (technique, _), cells in found.items():
            ledgers.setdefault(technique, []).append([cell.get("events") for cell in cells])
        same = {technique for technique, seen in ledgers.items() if all(one == seen[0] for one in seen)}
        # The order within a technique is that of the run.
        return sorted(dict.fromkeys((t, "" if t in same else told) for t, told in found), key=lambda v: order(v[0]))

    def rows(self, workloads: list[str]) -> list[tuple[str, str]]:
        """The variants of several workloads together, without native; told apart where any workload tells them apart."""
        every = [variant for workload in workloads for variant in self.variants(workload) if variant[0] != "native"]
        told = {technique for technique, words in every if words}
        return sorted(dict.fromkeys(v for v in every if v[1] or v[0] not in told), key=lambda v: order(v[0]))

    def column(self, workload: str, variant: tuple[str, str]) -> list[Cell]:
        """The cells of one variant on one workload, by ascending density."""
        of = [c for c in self.cells if self.work(c) == workload and c["technique"] == variant[0]]
        found = [cell for cell in of if self.variant(cell) == variant]
        if of and not found and not variant[1]:  # variants that are one: any of them will do
            found = [cell for cell in of if self.variant(cell) == self.variant(of[0])]
        return sorted(found, key=lambda cell: float(cell["parameters"].get("density") or 0))

    def densest(self, workload: str, variant: tuple[str, str]) -> Cell:
        """The cell where the workload's own instruction weighs most."""
        return self.column(workload, variant)[-1]


def ratio(cell: Cell, profile: str) -> Ratio | None:
    """The cell's slowdown on a profile; None where it was not priced. Native is 1 by definition."""
    found = (cell.get("slowdown") or {}).get(profile)
    if found and "value" in found:
        return Ratio(float(found["value"]), float(found["low"]), float(found["high"]))
    return Ratio(1.0, 1.0, 1.0) if cell["technique"] == "native" and cycles(cell, profile) else None


def cycles(cell: Cell, profile: str) -> Mapping[str, Any] | None:
    """The cell's price on a profile; None where it was refused."""
    found: Mapping[str, Any] | None = (cell.get("cycles") or {}).get(profile)
    return found if found and "total" in found else None


def operations(cell: Cell) -> int:
    """Operations that the guest counted; 0 where it counted none."""
    return int((cell.get("work") or {}).get("operations") or 0)


def times(value: float) -> str:
    """A ratio for people: two figures that mean something, as ``0.31×``, ``4.2×``, ``38×``, ``1,240×``."""
    if value >= 100:
        return f"{float(f'{value:.3g}'):,.0f}×"
    if value >= 9.95:
        return f"{value:.0f}×"
    return f"{value:.2f}×" if value < 1.95 else f"{value:.1f}×"


def _applies(key: str, parameters: Mapping[str, Any]) -> bool:
    """Whether a parameter means anything beside the others."""
    of, value = _ONLY_WITH.get(key, ("", None))
    return not of or parameters.get(of) == value


def _spread(cells: list[Cell]) -> dict[str, dict[str, set[str]]]:
    """By technique, the parameters that tell its cells of one work apart, with the values that they take, by name.

    Those that are not about the work, and take several values in this run; and those of the guest (``batch``, ``disk``) that take several
    for one workload.
    """
    natives = {key for cell in cells if cell["technique"] == "native" for key in cell["parameters"]}
    values: dict[str, dict[str, set[str]]] = {}
    within: dict[tuple[Any, ...], set[str]] = {}
    several: set[tuple[str, str]] = set()
    for cell in cells:
        technique, parameters = str(cell["technique"]), cell["parameters"]
        for key, value in parameters.items():
            if key in WORK_KEYS or not _applies(key, parameters):
                continue
            values.setdefault(technique, {}).setdefault(key, set()).add(str(value))
            place = (technique, key, *(str(parameters.get(of)) for of in ("guest", "workload", "density"))) if key in natives else (technique, key)
            seen = within.setdefault(place, set())
            seen.add(str(value))
            if len(seen) > 1:
                several.add((technique, key))
    return {technique: {key: of[key] for key in sorted(of) if (technique, key) in several} for technique, of in values.items()}


def _generation(name: str) -> Generation:
    from vmlab import costs

    try:
        profile = costs.load(name)
    except ConfigError:
        # A run from elsewhere may name a profile that is not here: its name has to do.
        stem, _, year = name.rpartition("-")
        return Generation(name, name, stem or name, int(year) if year.isdigit() else 0, priced_here=False)
    return Generation(name, profile.words, profile.vendor, profile.year)
