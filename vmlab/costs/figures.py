"""One figure: a value, its range, and where it comes from; and the reading of figures from YAML.

Whoever reads a broken file is told the file, the key and what to write instead (ConfigError).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from vmlab.errors import ConfigError

FigureProvenance = Literal["cited", "assumed", "measured"]
PROVENANCES: tuple[FigureProvenance, ...] = ("cited", "assumed", "measured")

#: An assumed figure must admit at least this factor of error either way (docs/cost-profiles.md).
ASSUMED_FACTOR = 2.0
#: Largest data file read, in bytes: a guard against a wrong file, not a tight fit.
MAX_BYTES = 1_000_000

_FIELDS = {"value", "low", "high", "provenance", "source", "where", "note", "calibrates", "machine", "command", "date"}


@dataclass(frozen=True)
class Figure:
    """A number with its range and provenance.

    ``low`` and ``high`` are the 5th and 95th percentile. ``sources`` are bibliography keys and
    ``where`` the table or section in them. ``calibrates`` lists the claims whose published figure
    set this value, so that those claims can say ``calibrated`` beside their verdict.
    """

    key: str
    value: float
    low: float
    high: float
    provenance: FigureProvenance
    sources: tuple[str, ...] = ()
    where: str = ""
    note: str = ""
    calibrates: tuple[str, ...] = ()
    measured_on: tuple[str, str, str] | None = None
    """Machine, command and date of a ``measured`` figure."""

    def fixed(self, value: float) -> Figure:
        """This figure held at ``value`` without a range: for asking "what if".

        :raises ConfigError: the value is not a positive finite number.
        """
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"cost {self.key!r} cannot be {value!r}: give a positive number")
        return replace(self, value=value, low=value, high=value, note=f"set to {value:g} by hand; was {self.value:g}")


def read_yaml(path: Path) -> Mapping[str, Any]:
    """The mapping in a YAML file.

    :raises ConfigError: unreadable, too large, not YAML, a key twice, or not a mapping.
    """
    import yaml

    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C parser is several times quicker

    class Loader(base):  # type: ignore[misc]
        """Safe, and strict about repeated keys, of which YAML would keep the last in silence."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[str] = set()
            for key_node, _ in node.value:
                if isinstance(key_node, yaml.ScalarNode) and key_node.value in seen:
                    raise yaml.YAMLError(f"key {key_node.value!r} is there twice{key_node.start_mark}")
                seen.add(str(key_node.value))
            return super().construct_mapping(node, deep)

    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_BYTES} bytes, so hardly a table of costs")
        data = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must be a mapping with keys, not {type(data).__name__}")
    return data


def number(data: Mapping[str, Any], name: str, where: str) -> float:
    """A positive finite number from ``data``, or ConfigError naming ``where`` and ``name``."""
    value = data.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{where}: {name!r} must be a positive number, not {value!r}")
    return float(value)


def text(data: Mapping[str, Any], name: str, where: str, required: bool = True) -> str:
    """A string from ``data``; ConfigError if it is of another type, or missing though required."""
    value = data.get(name, "")
    if not isinstance(value, str) or (required and not value.strip()):
        raise ConfigError(f"{where}: {name!r} must be text, not {data.get(name)!r}")
    return " ".join(value.split())


def texts(data: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    """One string or a list of strings, as a tuple."""
    value = data.get(name, [])
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) and item for item in items):
        raise ConfigError(f"{where}: {name!r} must be text or a list of text, not {value!r}")
    return tuple(items)


def figure(key: str, data: object, file: Path, known_sources: Mapping[str, object]) -> Figure:
    """Read and check one figure.

    :raises ConfigError: naming file and key: a field missing, unknown or of the wrong type; a range
        that does not hold the value; a citation without place or that does not resolve; an assumed
        figure without reason or with a range narrower than ×/÷ 2.
    """
    where = f"{file}: {key}"
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: must be a mapping with value, low, high and provenance, not {data!r}")
    if unknown := sorted(str(k) for k in set(data) - _FIELDS):
        raise ConfigError(f"{where}: unknown field {unknown[0]!r}; the fields are {', '.join(sorted(_FIELDS))}")
    value, low, high = (number(data, name, where) for name in ("value", "low", "high"))
    if not low <= value <= high:
        raise ConfigError(f"{where}: needs low <= value <= high, has {low:g}, {value:g}, {high:g}")
    provenance = text(data, "provenance", where)
    sources = texts(data, "source", where)
    if missing := [s for s in sources if s not in known_sources]:
        raise ConfigError(f"{where}: source {missing[0]!r} is not in the bibliography")
    place, note = text(data, "where", where, required=False), text(data, "note", where, required=False)
    measured_on = None
    kind: FigureProvenance
    if provenance == "cited":
        kind = "cited"
        if not sources or not place:
            raise ConfigError(f"{where}: a cited figure needs 'source' and 'where' (table, section, message)")
    elif provenance == "assumed":
        kind = "assumed"
        if not note:
            raise ConfigError(f"{where}: an assumed figure needs a 'note' with the reason")
        if low * ASSUMED_FACTOR > value * (1 + 1e-9) or high < value * ASSUMED_FACTOR * (1 - 1e-9):
            raise ConfigError(f"{where}: an assumed figure needs a range of at least ×/÷ {ASSUMED_FACTOR:g} "
                              f"(here {value / ASSUMED_FACTOR:g} to {value * ASSUMED_FACTOR:g} or wider)")
    elif provenance == "measured":
        kind = "measured"
        measured_on = (text(data, "machine", where), text(data, "command", where), str(data.get("date", "")))
        if not measured_on[2]:
            raise ConfigError(f"{where}: a measured figure needs 'machine', 'command' and 'date'")
    else:
        raise ConfigError(f"{where}: provenance must be cited, assumed or measured, not {provenance!r}")
    return Figure(key, value, low, high, kind, sources, place, note, texts(data, "calibrates", where), measured_on)
