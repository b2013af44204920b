"""Rows as published, their predictions, and how far apart they are.

A prediction is a price like any other: counts of a cell times the profile's costs, with the 5th and 95th percentile of the
sampled costs. Held-out rows are compared with a null model that knows only each technique's geometric mean slowdown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from vmlab import costs
from vmlab.claims import checks
from vmlab.claims.evidence import Cell, Evidence, Missing, describe, phase, steady
from vmlab.costs import Quantity
from vmlab.costs.figures import read_yaml
from vmlab.costs.sampling import percentiles
from vmlab.errors import ConfigError

FILE = Path(__file__).with_name("published.yaml")
_REQUIRED = ("id", "source", "where", "what", "technique", "profile", "unit", "published", "per")
#: Ways of taking a row's price that go by the iteration.
PER_ITERATION = ("iteration", "added")
_OPTIONAL = ("native", "cell", "native_cell", "key", "calibrated", "not_held_out", "shape", "note")


@dataclass(frozen=True)
class Row:
    """One published figure. ``unit`` is cycles or times native; see ``published.yaml`` for the fields."""

    id: str
    source: str
    where: str
    what: str
    technique: str
    profile: str
    unit: str
    published: float
    per: Any
    native: float | None = None
    cell: Mapping[str, Any] | None = None
    native_cell: Mapping[str, Any] | None = None
    key: str = ""
    calibrated: bool = False
    not_held_out: str = ""
    shape: bool = False
    note: str = ""

    @property
    def blocks(self) -> dict[str, dict[str, Any]]:
        """The cells that it needs, as blocks of an experiment. Where an iteration is priced, each at its size and at twice that."""
        blocks = {name: dict(block) for name, block in (("cell", self.cell), ("native", self.native_cell)) if block}
        if self.per in PER_ITERATION:
            for block in blocks.values():
                block["iterations"] = [block["iterations"], 2 * block["iterations"]]
        return blocks


@dataclass(frozen=True)
class Published:
    """The data file: rows, and the parameters that calibrated rows set (each a list of cost keys that one row fixes)."""

    rows: list[Row]
    parameters: list[list[str]]


@cache
def published() -> Published:
    """The rows of ``published.yaml``.

    :raises ConfigError: a row lacks a field, has an unknown one, or names no reference or profile.
    """
    data = read_yaml(FILE)
    rows = []
    for raw in data["rows"]:
        unknown = sorted(set(raw) - {*_REQUIRED, *_OPTIONAL})
        absent = [name for name in _REQUIRED if name not in raw]
        if unknown or absent:
            raise ConfigError(f"{FILE.name}: {raw.get('id')}: {'unknown field ' + unknown[0] if unknown else 'lacks ' + absent[0]}")
        if raw["source"] not in costs.bibliography():
            raise ConfigError(f"{FILE.name}: {raw['id']}: source {raw['source']!r} is not in the bibliography")
        costs.load(raw["profile"])
        rows.append(Row(**raw))
    return Published(rows, data["calibration"]["parameters"])


@dataclass
class Prediction:
    """What the lab says of a row: value with range in the row's unit, and the slowdown where a native figure allows one."""

    row: Row
    value: float | None = None
    low: float | None = None
    high: float | None = None
    slowdown: float | None = None
    reason: str = ""
    events: dict[str, float] = field(default_factory=dict)
    """An iteration's events, for recomputing the value by hand."""

    @property
    def published_slowdown(self) -> float | None:
        """The published figure over the published native one."""
        return self.row.published / self.row.native if self.row.native else None

    @property
    def held_out(self) -> bool:
        """Whether the row tests the model."""
        return not self.row.not_held_out and not self.row.calibrated and self.value is not None

    @property
    def ratio(self) -> float | None:
        """Predicted over published."""
        return self.value / self.row.published if self.value else None

    def as_dict(self) -> dict[str, Any]:
        """As docs/validation.json holds it."""
        row = self.row
        return {
            "id": row.id, "source": row.source, "where": row.where, "what": row.what, "technique": row.technique, "profile": row.profile,
            "unit": row.unit, "published": row.published, "published_native": row.native,
            "predicted": _short(self.value), "low": _short(self.low), "high": _short(self.high), "ratio": _short(self.ratio),
            "calibrated": row.calibrated, "held_out": self.held_out, "not_held_out": row.not_held_out, "shape_only": row.shape,
            "note": row.note, "not_predicted": self.reason, "events": {kind: _short(n) for kind, n in self.events.items()},
        }


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def predict(row: Row, cells: Sequence[Cell], absent: Mapping[str, str]) -> Prediction:
    """The row's prediction from cells of its experiment.

    :param absent: block -> why the lab cannot run it.
    """
    profile = costs.load(row.profile)
    evidence = Evidence(cells, (row.profile,), {row.profile: profile}, blocks=row.blocks, absent=absent)
    try:
        whole, native = _quantities(row, evidence)
        value = evidence.value(whole, row.profile)
        samples = whole.samples(profile)
        slowdown = None
        if native is not None:
            base = evidence.value(native, row.profile)
            if base <= 0 or value <= 0:
                raise Missing("the difference with the empty loop is not positive")
            slowdown = value / base
            if row.unit == "times native":
                samples = [a / b for a, b in zip(samples, native.samples(profile), strict=True)]
                value = slowdown
    except Missing as missing:
        return Prediction(row, reason=str(missing))
    low, high = percentiles(samples)
    return Prediction(row, value, min(low, value), max(high, value), slowdown, events=dict(whole.events))


def _quantities(row: Row, evidence: Evidence) -> tuple[Quantity, Quantity | None]:
    """The row's quantity and, where it names a native cell, the native one."""
    if row.per == "event":
        return Quantity({row.key: 1.0}), None
    if row.per == "cost":
        return Quantity(costs={row.key: 1.0}), None
    cell = evidence.cell("cell")
    evidence.runnable(cell, row.profile)
    native = evidence.cell("native") if row.native_cell else None
    if isinstance(row.per, Mapping):
        # An operation's price needs the native run of the same work, which the expansion brought along.
        whole = checks.per_operation(evidence, cell, row.per["instructions"])
        own = Quantity(costs={f"insn.{op}": 1.0 for op in row.per["instructions"]})
        return whole, own if native is not None else None
    if row.per not in PER_ITERATION:
        raise ConfigError(f"{row.id}: per: {row.per!r} is none of {', '.join(PER_ITERATION)}, event, cost, {{instructions: […]}}")
    whole = _iteration(evidence, "cell")
    if row.per == "added":
        if native is None:
            raise ConfigError(f"{row.id}: per: added needs a native_cell")
        return whole - _iteration(evidence, "native"), None
    return whole, _iteration(evidence, "native") if native is not None else None


def _iteration(evidence: Evidence, name: str) -> Quantity:
    """What one more iteration costs: the operation less the empty loop, in the larger of two runs less the same in the smaller.

    So what happens once (translating either loop, adapting, filling tables) is in neither: published loops run long enough for it not to show.
    """
    several = evidence.sizes(name)
    if len(several) < 2:
        raise Missing(f"{describe(several[-1])} has one finished size, and a slope needs two")
    small, large = several[0], several[-1]
    more = int(large["work"]["iterations"]) - int(small["work"]["iterations"])
    return (_less_empty(large) - _less_empty(small)) * (1 / more)


def _less_empty(cell: Cell) -> Quantity:
    if not phase(cell, "empty"):
        raise Missing(f"{cell['parameters'].get('workload')} ran no empty loop to subtract")
    return Quantity(steady(cell)) - Quantity(phase(cell, "empty"))


def log_ratio(predicted: float, actual: float) -> float:
    """|log10| of a ratio: 0.3 is a factor of two either way."""
    return abs(math.log10(predicted / actual))


def statistics(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Counts, errors of the held-out rows, and the null model's, over all and by technique."""
    rows = [p.row for p in predictions]
    held = [p for p in predictions if p.held_out and p.slowdown and p.published_slowdown]
    found: dict[str, Any] = {
        "rows": len(rows), "predicted": sum(p.value is not None for p in predictions),
        "calibrated_rows": sum(row.calibrated for row in rows), "free_parameters": len(published().parameters),
        "held_out": _errors(held), "by_technique": {},
    }
    for technique in sorted({p.row.technique for p in held}):
        found["by_technique"][technique] = _errors([p for p in held if p.row.technique == technique])
    nothing = {technique: _geometric([p for p in held if p.row.technique == technique]) for technique in found["by_technique"]}
    null = [log_ratio(nothing[p.row.technique], float(p.published_slowdown or 1)) for p in held]
    found["null_model"] = {
        "slowdowns": {name: _short(value) for name, value in nothing.items()},
        "median": _short(median(null)) if null else None, "worst": _short(max(null)) if null else None,
    }
    found["beats_null_model"] = {
        measure: bool(held) and found["held_out"][measure] < found["null_model"][measure] for measure in ("median", "worst")}
    return found


def _errors(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Median and worst |log10| of predicted over published, and which row is worst."""
    if not predictions:
        return {"rows": 0, "median": None, "worst": None, "worst_row": None, "within_factor_two": 0}
    errors = {p.row.id: log_ratio(p.value or 1, p.row.published) for p in predictions}
    worst = max(errors, key=lambda name: errors[name])
    return {
        "rows": len(errors), "median": _short(median(errors.values())), "worst": _short(errors[worst]), "worst_row": worst,
        "within_factor_two": sum(error <= math.log10(2) for error in errors.values()),
    }


def _geometric(predictions: Sequence[Prediction]) -> float:
    return math.exp(sum(math.log(float(p.published_slowdown or 1)) for p in predictions) / len(predictions))
