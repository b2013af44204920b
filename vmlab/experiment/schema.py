"""What an experiment file may say, checked key by key. ``docs/experiments.md`` is its manual.

:func:`load` returns an :class:`Experiment` whose cells are already expanded; every error is a
:class:`ConfigError` that names file, line, key and the nearest valid choice.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmlab.errors import ConfigError, GuestImageError
from vmlab.experiment.lab import Lab
from vmlab.experiment.matrix import DEFAULT_GUEST, GUEST_KEYS, Assignment, Axis, Block, Cell, Expander, override
from vmlab.experiment.yamlfile import Document, Where
from vmlab.parameters import Value, nearest

VERDICTS = ("holds", "fails", "undecided")
NAME = re.compile(r"[a-z0-9_-]{1,64}")
TOP_KEYS = (
    "name", "title", "question", "description", "parameters", "matrix", "profiles", "claims", "charts", "expect", "quick",
)
BLOCK_KEYS = ("parameters", "zip", "exclude", "technique")
QUICK_KEYS = ("divide", "set")

#: ``--set`` as parsed: key and the values it is to have.
Override = tuple[str, list[Value]]


@dataclass
class Experiment:
    """A checked experiment: what to run, what to price it on, what to ask of it."""

    name: str
    title: str
    question: str
    description: str
    cells: list[Cell]
    profiles: list[str]
    claims: list[str]
    charts: list[str]
    expect: dict[str, str] = field(default_factory=dict)

    def resolved(self) -> dict[str, Any]:
        """The same experiment, every default and option written out, in the schema of the file.

        Saved beside the results: running it again gives the same cells.
        """
        return {
            "name": self.name, "title": self.title, "question": self.question, "description": self.description,
            "profiles": list(self.profiles), "claims": list(self.claims), "charts": list(self.charts),
            "expect": dict(self.expect),
            "matrix": [{"technique": c.technique, **c.parameters} for c in self.cells],
        }

    def hash(self) -> str:
        """SHA-256 of the resolved configuration: what makes two runs runs of the same experiment."""
        return hashlib.sha256(json.dumps(self.resolved(), sort_keys=True).encode()).hexdigest()


def parse_set(text: str) -> Override:
    """``--set key=value`` or ``key=value,value``; a value is a whole number or a word."""
    key, equals, values = text.partition("=")
    if not equals or not key.strip() or not all(v.strip() for v in values.split(",")):
        raise ConfigError(f"--set {text}: write key=value, or key=value,value to sweep")
    return key.strip(), [word_or_number(v.strip()) for v in values.split(",")]


def word_or_number(text: str) -> Value:
    """A command-line value: ``12`` and ``50_000`` are numbers, all else is a word."""
    return int(text) if re.fullmatch(r"-?\d[\d_]{0,17}", text) else text


def load(document: Document, lab: Lab, sets: Sequence[Override] = (), quick: bool = False) -> Experiment:
    """Check ``document`` and expand its matrix.

    :param sets: values from the command line that replace the file's.
    :param quick: apply the file's ``quick`` section: the same verdicts from a smaller run.
    """
    return _Reader(document, lab).experiment(sets, quick)


class _Reader:
    def __init__(self, document: Document, lab: Lab) -> None:
        self.document, self.lab = document, lab
        self.techniques = lab.techniques()
        self.by_technique = lab.loadable()
        self.declared = {name for parameters in self.by_technique.values() for name in parameters} | lab.guest_parameters()

    # --- small helpers, each refusing with a place -------------------------------------------------

    def refuse(self, where: Where, message: str) -> ConfigError:
        return self.document.error(where, message)

    def mapping(self, value: Any, where: Where, known: Iterable[str] | None = None) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.refuse(where, f"a mapping (key: value) is needed, not {_kind(value)}")
        if known is not None:
            known = list(known)
            for key in value:
                if key not in known:
                    raise self.refuse((*where, key), f"unknown key{nearest(key, known)}")
        return value

    def text(self, key: str) -> str:
        value = self.document.data.get(key, "")
        if not isinstance(value, str):
            raise self.refuse((key,), f"text is needed, not {_kind(value)}")
        return value.strip()

    def words(self, key: str, known: Sequence[str], what: str) -> list[str]:
        value = self.document.data.get(key, [])
        if not isinstance(value, list):
            raise self.refuse((key,), f"a list of {what}s is needed, not {_kind(value)}")
        for i, word in enumerate(value):
            if word not in known:
                raise self.refuse((key, i), f"{word!r} is not a {what}{nearest(str(word), known)}")
            if word in value[:i]:
                raise self.refuse((key, i), f"{word!r} is there twice")
        return value

    # --- the sections ------------------------------------------------------------------------------

    def experiment(self, sets: Sequence[Override], quick: bool) -> Experiment:
        data = self.mapping(self.document.data, (), TOP_KEYS)
        name = data.get("name")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise self.refuse(("name",), f"a name of a-z 0-9 _ - is needed (it names a folder), not {name!r}")
        profiles = self.words("profiles", self.lab.known_profiles(), "profile")
        claims = self.words("claims", self.lab.claims(), "claim")
        charts = self.words("charts", self.lab.charts(), "chart")
        blocks = self.blocks(data)
        divide, reduced = self.quick(data.get("quick", {}))
        overrides = [*(reduced if quick else []), *sets]
        for key, values in overrides:
            self.known_key(key, values)
            blocks = [override(block, key, values) for block in blocks]
        expander = Expander(self.lab, self.document)
        cells = expander.cells(blocks, divide if quick else {})
        if not cells:
            raise self.refuse(("matrix",), "the matrix is empty: nothing is left to run")
        if expander.unused_exclusions and not overrides:
            raise self.refuse(expander.unused_exclusions[0], "this exclusion matches no combination of its block")
        return Experiment(
            name, self.text("title") or name, self.text("question"), self.text("description"),
            cells, profiles, claims, charts, self.expect(data.get("expect", {}), claims),
        )

    def expect(self, value: Any, claims: Sequence[str]) -> dict[str, str]:
        for key, verdict in self.mapping(value, ("expect",)).items():
            if key not in claims:
                raise self.refuse(("expect", key), f"{key!r} is not among this experiment's claims{nearest(key, claims)}")
            if verdict not in VERDICTS:
                raise self.refuse(("expect", key), f"{verdict!r} is no verdict{nearest(str(verdict), VERDICTS)}")
        return dict(value)

    def quick(self, value: Any) -> tuple[dict[str, int], list[Override]]:
        section = self.mapping(value, ("quick",), QUICK_KEYS)
        divide = self.mapping(section.get("divide", {}), ("quick", "divide"))
        for key, number in divide.items():
            self.known_key(key, [], ("quick", "divide", key))
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise self.refuse(("quick", "divide", key), f"a whole number from 1 is needed, not {number!r}")
        sets = []
        for key, values in self.mapping(section.get("set", {}), ("quick", "set")).items():
            sets.append((key, self.values(key, values, ("quick", "set", key))))
        return divide, sets

    def blocks(self, data: dict[str, Any]) -> list[Block]:
        if "matrix" not in data:
            raise self.refuse((), "the matrix is missing: nothing to run")
        matrix = data["matrix"]
        single = isinstance(matrix, dict)
        shared = self.axes(self.mapping(data.get("parameters", {}), ("parameters",)), ("parameters",))
        sections = [(matrix, ("matrix",))] if single else [
            (section, ("matrix", i)) for i, section in enumerate(matrix if isinstance(matrix, list) else [])
        ]
        if not sections:
            raise self.refuse(("matrix",), "the matrix is empty: give at least one block")
        return [self.block(section, where, shared) for section, where in sections]

    def block(self, value: Any, where: Where, shared: list[Axis]) -> Block:
        section = self.mapping(value, where)
        fixed = self.mapping(section.get("parameters", {}), (*where, "parameters"))
        swept = {k: v for k, v in section.items() if k not in ("parameters", "zip", "exclude")}
        axes = self.axes(fixed, (*where, "parameters")) + self.axes(swept, where)
        zips = section.get("zip", [])
        for i, pairs in enumerate(zips if isinstance(zips, list) else [zips]):
            at: Where = (*where, "zip", i) if isinstance(zips, list) else (*where, "zip")
            axes.append(self.zipped(pairs, at))
        seen: dict[str, Where] = {}
        for axis in axes:
            for key in axis.keys:
                if key in seen:
                    raise self.refuse(axis.where, f"{key!r} is given twice in this block")
                seen[key] = axis.where
        # What the block says itself stands in place of what the experiment's parameters say.
        inherited = [axis for axis in shared if axis.keys[0] not in seen]
        block = Block(inherited + axes, self.exclusions(section.get("exclude", []), (*where, "exclude")), where)
        self.somebody_has(block, seen)
        return block

    def somebody_has(self, block: Block, own: Mapping[str, Where]) -> None:
        """Refuse a parameter of the block that none of the block's techniques and workloads declares."""
        def named(what: str) -> set[str]:
            return {str(row[what]) for axis in block.axes for row in axis.rows if what in row}

        techniques, workloads = named("technique"), named("workload")
        known = {key for technique in techniques for key in self.by_technique.get(technique, ())}
        takes = {name: set(p) for guest in named("guest") or {DEFAULT_GUEST} for name, p in self.lab.workloads(guest).items()}
        if not workloads or workloads - set(takes):
            known |= self.lab.guest_parameters()  # which of them is wrong is found with the cells
        known |= {key for name in workloads & set(takes) for key in takes[name]}
        for key, where in own.items():
            if techniques and key not in known and key not in ("technique", *GUEST_KEYS):
                names = ", ".join(sorted(techniques) + sorted(workloads))
                raise self.refuse(where, f"no technique or workload of this block has the parameter {key!r} ({names})")

    def axes(self, section: Mapping[str, Any], where: Where) -> list[Axis]:
        axes = []
        for key, value in section.items():
            at = (*where, key)
            axes.append(Axis([{key: v} for v in self.values(key, value, at)], at))
        return axes

    def zipped(self, value: Any, where: Where) -> Axis:
        section = self.mapping(value, where)
        columns = {key: self.values(key, v, (*where, key)) for key, v in section.items()}
        lengths = {key: len(column) for key, column in columns.items()}
        if len(columns) < 2 or len(set(lengths.values())) != 1:
            shown = ", ".join(f"{k}: {n}" for k, n in lengths.items())
            raise self.refuse(where, f"zip needs two or more lists of the same length (got {shown or 'none'})")
        keys = list(columns)
        rows: list[Assignment] = [dict(zip(keys, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return Axis(rows, where)

    def exclusions(self, value: Any, where: Where) -> list[tuple[dict[str, list[Value]], Where]]:
        if not isinstance(value, list):
            raise self.refuse(where, f"a list of mappings is needed, not {_kind(value)}")
        rules = []
        for i, rule in enumerate(value):
            at: Where = (*where, i)
            rules.append(({k: self.values(k, v, (*at, k)) for k, v in self.mapping(rule, at).items()}, at))
        return rules

    # --- keys and values ---------------------------------------------------------------------------

    def values(self, key: str, value: Any, where: Where) -> list[Value]:
        """The list of values that ``key`` takes; a single value is a list of one."""
        items = value if isinstance(value, list) else [value]
        self.known_key(key, [], where)
        if not items:
            raise self.refuse(where, "the list is empty: give at least one value")
        for i, item in enumerate(items):
            at = (*where, i) if isinstance(value, list) else where
            if not isinstance(item, str | int | bool):
                raise self.refuse(at, f"a word or a whole number is needed, not {_kind(item)}")
            self.known_key(key, [item], at)
        return items

    def known_key(self, key: str, values: Sequence[Value], where: Where | None = None) -> None:
        """Refuse a key that nobody knows, or a name that stands for nothing.

        Whether a parameter's value is allowed is known only with its technique, in the expansion.
        """
        def refuse(message: str) -> ConfigError:
            return ConfigError(f"--set {key}: {message}") if where is None else self.refuse(where, message)

        known = {"technique", *GUEST_KEYS, *self.declared}
        if key not in known:
            raise refuse(f"unknown key{nearest(key, {*known, *BLOCK_KEYS})}")
        for value in values:
            if key == "technique" and value not in self.techniques:
                raise refuse(f"{value!r} is not a technique{nearest(str(value), self.techniques)}")
            if key == "guest" and value not in self.lab.guests() and not str(value).startswith("$"):    # a host's own: found when it runs
                try:
                    self.lab.image(str(value))
                except (ConfigError, GuestImageError) as error:
                    raise refuse(f"{error}") from error


def _kind(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", type(None): "nothing", bool: "yes/no", str: "text"}
    return names.get(type(value), repr(value))


def find(name: str) -> Path:
    """The experiment file called ``name``: a path, or the bare name of one that comes with vmlab."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        if not path.is_file():
            raise ConfigError(f"{name}: no such file; 'vmlab list experiments' names those that come with vmlab")
        return path
    shipped = builtin()
    if name in shipped:
        return shipped[name]
    raise ConfigError(f"{name!r} is neither a file nor an experiment that comes with vmlab{nearest(name, shipped)}")


def builtin() -> dict[str, Path]:
    """The experiments that come with vmlab: ``configs/`` of a checkout, ``vmlab/configs`` when installed."""
    package = Path(__file__).resolve().parent.parent
    checkout = package.parent / "configs"
    folder = checkout if (package.parent / "pyproject.toml").is_file() and checkout.is_dir() else package / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
