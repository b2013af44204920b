"""A claim as data, and the reading of its file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from vmlab.costs.figures import read_yaml
from vmlab.errors import ConfigError
from vmlab.parameters import nearest

DATA = Path(__file__).with_name("data")

#: What a verdict rests on: counts alone; counts and costs; published figures.
KINDS = ("counted", "priced", "cited")

_TEXTS = ("statement", "source", "kind", "scope", "predicate", "falsifier")


@dataclass(frozen=True)
class Claim:
    """One checkable sentence.

    ``statement`` is in our own words; ``source`` is where it was said; ``scope`` is what it speaks of (and
    what not); ``falsifier`` is the change that flips the verdict, and a test makes that change.
    """

    id: str
    statement: str
    source: str
    kind: Literal["counted", "priced", "cited"]
    scope: str
    predicate: str
    arguments: Mapping[str, Any]
    falsifier: str
    experiment: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The cells that test it, at the reduced size that ``vmlab claims`` runs: name -> technique, workload, parameters.
    A value may be a list, as in a block of an experiment file; such a block's cells are found by the predicate itself."""


@cache
def names() -> list[str]:
    """The ids of all claims, sorted."""
    return sorted(path.stem for path in DATA.glob("*.yaml"))


def load(name: str) -> Claim:
    """The claim of that id.

    :raises ConfigError: there is none (says the nearest), or its file is broken.
    """
    if name not in names():
        raise ConfigError(f"no claim {name!r}{nearest(name, names())}")
    return _read(DATA / f"{name}.yaml")


@cache
def _read(file: Path) -> Claim:
    data = read_yaml(file)
    if extra := sorted(set(data) - {"id", *_TEXTS, "arguments", "experiment"}):
        raise ConfigError(f"{file.name}: unknown key {extra[0]!r}; the keys are id, {', '.join(_TEXTS)}, arguments, experiment")
    if data.get("id") != file.stem:
        raise ConfigError(f"{file.name}: id: is {data.get('id')!r}, but the file is called {file.stem!r}")
    for key in _TEXTS:
        if not isinstance(data.get(key), str) or not data[key].strip():
            raise ConfigError(f"{file.name}: {key}: must be text, not {data.get(key)!r}")
    if data["kind"] not in KINDS:
        raise ConfigError(f"{file.name}: kind: must be one of {', '.join(KINDS)}, not {data['kind']!r}")
    arguments = data.get("arguments", {})
    if not isinstance(arguments, dict):
        raise ConfigError(f"{file.name}: arguments: must be a mapping, not {arguments!r}")
    blocks = data.get("experiment", {})
    if not isinstance(blocks, dict) or not all(isinstance(block, dict) and "technique" in block for block in blocks.values()):
        raise ConfigError(f"{file.name}: experiment: must give each cell by name as a mapping with its technique")
    words = {key: " ".join(data[key].split()) for key in _TEXTS}
    return Claim(id=file.stem, arguments=arguments, experiment=blocks, **words)  # type: ignore[arg-type]  # kind was checked above
