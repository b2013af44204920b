"""The lab's words: ``vmlab explain TERM`` prints an entry, the page shows it where the word appears.

The texts are data (``glossary.yaml``). An event kind is explained by the longest entry of ``events`` that its name begins
with, so that a new kind of a known family has a text from its first day (a test looks at every kind).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from pathlib import Path
from types import MappingProxyType

from vmlab.costs.figures import read_yaml
from vmlab.errors import ConfigError
from vmlab.ledger import EVENTS

_FILE = Path(__file__).with_name("glossary.yaml")

#: Words too common to be marked in running text; they are found when asked for.
_PLAIN = frozenset({"in", "out", "if", "events", "cycle", "entry", "exit", "region", "warm", "cache", "direct", "walk", "directly", "chain",
                    "translated", "range", "price", "profile", "nested", "lazy", "sensitive", "native", "guest", "guests", "ring", "rings",
                    "privileged", "trapped", "injected", "injection", "digest", "holds", "fails", "cycles", "generation", "generations",
                    "counted", "priced", "cited", "measured", "assumed", "monitor", "monitors", "translation", "outcome", "operation",
                    "operations", "claim", "claims", "verdict", "verdicts", "devices", "event", "shadow", "batching", "nominal", "cli", "sti"})


@dataclass(frozen=True)
class Entry:
    """A word of the lab: its text (two sentences at most), other names, and where it is defined."""

    term: str
    text: str
    synonyms: tuple[str, ...] = ()
    source: str = ""

    @property
    def anchor(self) -> str:
        """An identifier for links within a page."""
        return "term-" + re.sub(r"[^a-z0-9]+", "-", self.term).strip("-")


@lru_cache(maxsize=1)
def entries() -> Mapping[str, Entry]:
    """Every entry by its term.

    :raises ConfigError: the file has an entry without text, or two entries of one name.
    """
    found: dict[str, Entry] = {}
    for term, data in read_yaml(_FILE)["terms"].items():
        if not isinstance(data, dict) or not str(data.get("text", "")).strip():
            raise ConfigError(f"{_FILE.name}: {term}: needs a text")
        synonyms = tuple(str(word).lower() for word in data.get("synonyms", ()))
        found[str(term)] = Entry(str(term), " ".join(str(data["text"]).split()), synonyms, str(data.get("source", "")))
    return MappingProxyType(found)


@lru_cache(maxsize=1)
def names() -> Mapping[str, Entry]:
    """Entries by every name they have, in lower case."""
    found: dict[str, Entry] = {}
    for entry in entries().values():
        for name in (entry.term, *entry.synonyms):
            if name in found:
                raise ConfigError(f"{_FILE.name}: {name!r} is both {found[name].term!r} and {entry.term!r}")
            found[name] = entry
    return MappingProxyType(found)


@lru_cache(maxsize=2)
def _families(section: str) -> list[tuple[str, str]]:
    rows = read_yaml(_FILE)[section]
    return sorted(((str(prefix), " ".join(str(text).split())) for prefix, text in rows.items()), key=lambda row: -len(row[0]))


def _of_family(section: str, name: str) -> str:
    for prefix, text in _families(section):
        if name.startswith(prefix):
            return text
    raise ConfigError(f"{_FILE.name}: {section}: no text for {name!r}")


def event_text(kind: str) -> str:
    """An event kind in one or two sentences.

    :raises ConfigError: no such kind, or the glossary has no text for its family.
    """
    known = EVENTS.get(kind)
    if known is None:
        raise ConfigError(f"no event kind {kind!r} in the ledger's table")
    return _of_family("events", kind).replace("{words}", known.words)


def cost_text(key: str) -> str:
    """What a cost key is the cost of, in one or two sentences.

    :raises ConfigError: the glossary has no text for its family.
    """
    return _of_family("costs", key)


def find(name: str, more: Iterable[str] = ()) -> Entry:
    """The entry for a term, a synonym or an event kind, however it is capitalised.

    :param more: other names that the caller knows, for the nearest one.
    :raises ConfigError: there is none; names the nearest.
    """
    wanted = " ".join(name.lower().split())
    for candidate in (wanted, wanted.replace("_", " "), wanted.replace("-", " "), wanted.replace("_", "-")):
        if candidate in names():
            return names()[candidate]
    if name in EVENTS:
        return Entry(name, event_text(name))
    near = difflib.get_close_matches(wanted, [*names(), *EVENTS, *more], 1)
    hint = f"; did you mean {near[0]!r}?" if near else "; `vmlab explain` alone lists the terms, `vmlab list events` the events"
    raise ConfigError(f"nothing is known of {name!r}{hint}")


@lru_cache(maxsize=1)
def _pattern() -> re.Pattern[str]:
    marked = sorted((name for name in names() if name not in _PLAIN), key=len, reverse=True)
    return re.compile(r"(?<![\w-])(" + "|".join(map(re.escape, marked)) + r")(?![\w-])", re.IGNORECASE)


def mark(text: str) -> str:
    """``text`` as HTML, escaped, with the first mention of each known word linked to its entry in the page's glossary."""
    parts, at, seen = [], 0, set()
    for match in _pattern().finditer(text):
        entry = names()[match[0].lower()]
        if entry.term in seen:
            continue
        seen.add(entry.term)
        parts += [escape(text[at:match.start()]), f'<a class="term" href="#{entry.anchor}">{escape(match[0])}</a>']
        at = match.end()
    return "".join([*parts, escape(text[at:])])


def link(name: str, shown: str | None = None) -> str:
    """One word as HTML linked to its entry, whatever :func:`mark` would do with it; plain where nothing is known of it."""
    entry = names().get(name.lower())
    words = escape(shown if shown is not None else name)
    return words if entry is None else f'<a class="term" href="#{entry.anchor}">{words}</a>'
