"""The documents that figures are cited from: ``bibliography.yaml``, and its BibTeX form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from vmlab.costs.figures import read_yaml
from vmlab.errors import ConfigError

_FILE = Path(__file__).with_name("bibliography.yaml")

#: What BibTeX wants of each type of entry.
_REQUIRED = {
    "article": ("author", "title", "journal", "year"),
    "inproceedings": ("author", "title", "booktitle", "year"),
    "book": ("author", "title", "publisher", "year"),
    "misc": ("author", "title", "year"),
}


@dataclass(frozen=True)
class Reference:
    """One document: BibTeX type and fields."""

    key: str
    type: str
    fields: Mapping[str, str]

    def words(self) -> str:
        """The reference as one line for people."""
        f = self.fields
        venue = f.get("journal") or f.get("booktitle") or f.get("publisher") or f.get("howpublished") or ""
        return ". ".join(part for part in (f["author"].replace(" and ", ", "), f["title"], venue, f["year"]) if part)


@lru_cache(maxsize=1)
def bibliography() -> Mapping[str, Reference]:
    """Every reference by key.

    :raises ConfigError: an entry lacks what its type needs.
    """
    entries: dict[str, Reference] = {}
    for key, data in read_yaml(_FILE).items():
        kind = data.get("type") if isinstance(data, dict) else None
        if kind not in _REQUIRED:
            raise ConfigError(f"{_FILE.name}: {key}: type must be one of {', '.join(_REQUIRED)}, not {kind!r}")
        fields = {name: str(value) for name, value in data.items() if name != "type"}
        for name in _REQUIRED[kind]:
            if not fields.get(name):
                raise ConfigError(f"{_FILE.name}: {key}: a {kind} needs {name!r}")
        entries[key] = Reference(key, kind, MappingProxyType(fields))
    return MappingProxyType(entries)


def bibtex(key: str) -> str:
    """The BibTeX entry of a reference.

    :raises ConfigError: no such key.
    """
    entry = bibliography().get(key)
    if entry is None:
        raise ConfigError(f"no reference {key!r} in the bibliography; see `vmlab.costs.bibliography()`")
    lines = "".join(f"  {name} = {{{value}}},\n" for name, value in entry.fields.items())
    return f"@{entry.type}{{{key},\n{lines}}}\n"
