"""The path-length table: how many instructions a VMM executes for each thing it does.

The lab's handlers are Python, so their length cannot be measured; ``paths.yaml`` states it once for
all CPU generations, in instructions. A profile contributes cycles per class only: an instruction of
a handler costs the table's *mix* of the profile's class costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from vmlab.costs.bibliography import bibliography
from vmlab.costs.figures import Figure, figure, number, read_yaml
from vmlab.errors import ConfigError
from vmlab.ledger import CLASSES

PATHS_FILE = Path(__file__).with_name("paths.yaml")


@dataclass(frozen=True)
class PathTable:
    """Path lengths in instructions by key (``path.decode``, …), other shared figures, and the mix.

    ``mix`` gives the share of each instruction class in VMM code (sums to 1).
    ``shared`` are figures that belong to no CPU, such as a port's latency in nanoseconds.
    """

    paths: Mapping[str, Figure]
    shared: Mapping[str, Figure]
    mix: Mapping[str, float]


@lru_cache(maxsize=1)
def path_table() -> PathTable:
    """The table that ships with the lab.

    :raises ConfigError: the file is broken (says where).
    """
    return read_path_table(PATHS_FILE)


def read_path_table(file: Path) -> PathTable:
    """Read a path table from a file; ConfigError names file and key."""
    data = read_yaml(file)
    if extra := sorted(set(data) - {"mix", "mix_note", "paths", "shared"}):
        raise ConfigError(f"{file}: unknown key {extra[0]!r}; the keys are mix, mix_note, paths, shared")
    mix = data.get("mix")
    if not isinstance(mix, dict) or not set(mix) <= set(CLASSES):
        raise ConfigError(f"{file}: mix: must give shares of the classes {', '.join(CLASSES)}")
    shares = {name: number(mix, name, f"{file}: mix") for name in mix}
    if abs(sum(shares.values()) - 1) > 1e-9:
        raise ConfigError(f"{file}: mix: the shares must sum to 1, not {sum(shares.values()):g}")
    tables: list[Mapping[str, Figure]] = []
    for section, prefix in (("paths", "path."), ("shared", "shared.")):
        rows = data.get(section)
        if not isinstance(rows, dict) or not rows:
            raise ConfigError(f"{file}: {section}: must be a mapping of figures")
        tables.append(MappingProxyType({
            f"{prefix}{key}": figure(f"{prefix}{key}", row, file, bibliography()) for key, row in rows.items()
        }))
    return PathTable(tables[0], tables[1], MappingProxyType(shares))
