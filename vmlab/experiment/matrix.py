"""From blocks of swept values to cells: product, exclusions, defaults, collapse, baselines.

A *cell* is one run: a technique and its parameters. Parameters that a technique does not declare are
dropped for it, what it declares and nobody said gets its default, and cells that are then equal collapse
into one. A native cell that another needs for its slowdown and that nobody asked for is added at the end.
"""

from __future__ import annotations

import collections
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from vmlab.errors import ConfigError
from vmlab.experiment.clock import PARAMETERS as CLOCK_PARAMETERS
from vmlab.experiment.lab import Lab
from vmlab.experiment.yamlfile import Document, Where
from vmlab.guests.files import PARAMETERS as FILE_PARAMETERS
from vmlab.machine.tlb import PARAMETERS as MODEL_PARAMETERS
from vmlab.parameters import Parameter, Value, nearest
from vmlab.strategies.techniques import RAM

MAX_CELLS = 50_000
BASELINE = "native"

#: What a cell may say of the machine: how much RAM the guest has, what its clock counts, and what is modelled.
MACHINE_PARAMETERS = {"ram": RAM, **CLOCK_PARAMETERS, **MODEL_PARAMETERS}
#: Keys that every cell may have, whatever guest and technique declare: which guest runs what, for how long, on what machine;
#: for a guest from a file, what goes with it.
GUEST_KEYS = ("guest", "workload", "budget", *MACHINE_PARAMETERS, *FILE_PARAMETERS)
DEFAULT_GUEST = "nano"

Assignment = dict[str, Value]


@dataclass(frozen=True)
class Cell:
    """One run: ``id`` is readable and unique within an experiment.

    ``work`` is what the native run of the same work is given: the guest's parameters without the technique's,
    and what native declares itself.
    """

    technique: str
    parameters: Mapping[str, Value]
    work: Mapping[str, Value] = field(default_factory=dict)
    added: bool = False

    @functools.cached_property
    def id(self) -> str:
        """``<technique>/<k=v sorted, comma-joined>``."""
        return f"{self.technique}/{','.join(f'{k}={v}' for k, v in sorted(self.parameters.items()))}"

    @functools.cached_property
    def baseline(self) -> str:
        """The id of the native cell that this one is compared with."""
        return Cell(BASELINE, self.work).id


def labels(cells: Sequence[Cell]) -> dict[str, str]:
    """By id a name that says how a cell differs from the others: its technique, and the parameters that take several values."""
    values: dict[str, set[Value]] = {}
    for cell in cells:
        for key, value in cell.parameters.items():
            values.setdefault(key, set()).add(value)
    found = {cell.id: " ".join([cell.technique, *(f"{key}={value}" for key, value in cell.parameters.items() if len(values[key]) > 1)])
             for cell in cells}
    alike = {label for label, n in collections.Counter(found.values()).items() if n > 1}
    return {name: name if label in alike else label for name, label in found.items()}


@dataclass
class Axis:
    """What varies together: each row gives values to the same keys. ``where`` finds it in the file."""

    rows: list[Assignment]
    where: Where = ()

    @property
    def keys(self) -> list[str]:
        return list(self.rows[0]) if self.rows else []


@dataclass
class Block:
    """One block of the matrix: the product of its axes, less what is excluded."""

    axes: list[Axis]
    exclude: list[tuple[dict[str, list[Value]], Where]] = field(default_factory=list)
    where: Where = ()

    def where_of(self, key: str) -> Where:
        """Where ``key`` gets its value in the file."""
        return next((axis.where for axis in self.axes if key in axis.keys), self.where)


def override(block: Block, key: str, values: Sequence[Value]) -> Block:
    """``block`` with ``key`` swept over ``values`` only.

    Where the block sweeps the key already and every value is one of its own, the sweep is narrowed, so
    that what is paired with the key stays paired; otherwise the values replace it.
    """
    axes = []
    for axis in block.axes:
        if key not in axis.keys:
            axes.append(axis)
        elif {*values} <= {row[key] for row in axis.rows}:
            axes.append(Axis([row for row in axis.rows if row[key] in values], axis.where))
            values = ()
        else:
            rest = [{k: v for k, v in row.items() if k != key} for row in axis.rows]
            axes.append(Axis([row for i, row in enumerate(rest) if row not in rest[:i]], axis.where))
    if values:
        axes.append(Axis([{key: value} for value in values]))
    return Block(axes, block.exclude, block.where)


class Expander:
    """Makes cells of blocks, asking the lab what each technique and workload knows."""

    def __init__(self, lab: Lab, document: Document) -> None:
        self.lab, self.document = lab, document
        self.unused_exclusions: list[Where] = []

    def cells(self, blocks: Iterable[Block], divide: Mapping[str, int]) -> list[Cell]:
        """All cells in the order of the file, baselines that are missing at the end."""
        found: dict[str, Cell] = {}
        for block in blocks:
            for assignment in self._assignments(block):
                for key, divisor in divide.items():
                    number = assignment.get(key)
                    if isinstance(number, int):
                        assignment[key] = max(1, number // divisor)
                cell = self._cell(assignment, block)
                found.setdefault(cell.id, cell)
        for cell in list(found.values()):
            if cell.baseline not in found:
                found[cell.baseline] = Cell(BASELINE, cell.work, cell.work, added=True)
        return list(found.values())

    def _assignments(self, block: Block) -> Iterator[Assignment]:
        size = math.prod(len(axis.rows) for axis in block.axes)
        if size > MAX_CELLS:
            raise self.document.error(block.where, f"{size} combinations; at most {MAX_CELLS} are allowed")
        used = [False] * len(block.exclude)
        for rows in itertools.product(*(axis.rows for axis in block.axes)):
            assignment: Assignment = {}
            for row in rows:
                assignment.update(row)
            hits = [all(assignment.get(k) in v for k, v in rule.items()) for rule, _ in block.exclude]
            used = [u or h for u, h in zip(used, hits, strict=True)]
            if not any(hits):
                yield assignment
        self.unused_exclusions += [where for (_, where), u in zip(block.exclude, used, strict=True) if not u]

    def _cell(self, assignment: Assignment, block: Block) -> Cell:
        def refuse(key: str, message: str) -> ConfigError:
            return self.document.error(block.where_of(key), message)

        if "technique" not in assignment:
            raise self.document.error(block.where, f"no technique is named{nearest('', self.lab.techniques())}")
        technique = str(assignment["technique"])
        guest = str(assignment.get("guest", DEFAULT_GUEST))
        workloads = self.lab.workloads(guest)
        work: Assignment = {"guest": guest}
        declared: dict[str, Parameter] = {}
        if workloads:  # a kernel from a file has none: it does what it does
            if "workload" not in assignment:
                raise self.document.error(block.where, f"no workload is named{nearest('', workloads)}")
            workload = str(assignment["workload"])
            if workload not in workloads:
                raise refuse("workload", f"{workload!r} is not a workload of {guest}{nearest(workload, workloads)}")
            work["workload"] = workload
            declared |= workloads[workload]
        if "budget" in assignment:
            declared["budget"] = BUDGET
        declared |= {key: parameter for key, parameter in MACHINE_PARAMETERS.items() if key in assignment}
        if self.lab.from_file(guest):
            declared |= {key: parameter for key, parameter in FILE_PARAMETERS.items() if key in assignment}

        def values(of: Mapping[str, Parameter], under: str) -> Assignment:
            found: Assignment = {}
            for key, parameter in of.items():
                try:
                    found[key] = parameter.check(key, assignment.get(key, parameter.default))
                except ConfigError as error:
                    raise refuse(key, f"{error} (under {under})") from error
            return found

        work |= values(declared, technique)
        parameters = work | values(self.lab.parameters(technique), technique)
        work |= values(self.lab.parameters(BASELINE), BASELINE)
        return Cell(technique, dict(sorted(parameters.items())), dict(sorted(work.items())))


BUDGET = Parameter("most guest instructions that a cell may take before it is stopped", 2**31 - 1, minimum=1, maximum=1 << 62)
