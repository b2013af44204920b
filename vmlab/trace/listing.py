"""What executed, instruction by instruction, in little room: straight runs of code, and loops of them.

A kernel that copies a page table runs the same ten instructions a thousand times. So a long recording is a table of the distinct
instructions and a *path* through it: ``[a, n]`` is the entries a, a+1 … a+n-1 of the table, ``{"times": n, "of": path}`` a path that is gone
through n times over. :meth:`Listing.path` compresses, :func:`unfold` is its inverse.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from vmlab.trace.recorder import Step

Path = list[Any]
#: A loop of more straight runs than this is not looked for.
_LONGEST = 24

#: (first entry, how many) or (times, parts): compared and hashed while loops are looked for.
_Token = tuple[int, int] | tuple[int, tuple[Any, ...]]


class Listing:
    """The table of distinct instructions of one page: ``rows`` are [where, address, code]."""

    def __init__(self) -> None:
        self._number: dict[tuple[str, int, str], int] = {}

    @property
    def rows(self) -> list[list[str]]:
        """The table, in the order in which the instructions were first met."""
        return [[where, f"{address:#x}", code] for where, address, code in self._number]

    def path(self, steps: Sequence[Step]) -> Path:
        """These steps as a path through the table, which grows by what was not in it."""
        runs: list[_Token] = []
        first = length = 0
        for step in steps:
            entry = self._number.setdefault((step.where, step.address, step.code), len(self._number))
            if length and entry == first + length:
                length += 1
                continue
            if length:
                runs.append((first, length))
            first, length = entry, 1
        if length:
            runs.append((first, length))
        shorter = _loops(runs)
        while len(shorter) < len(runs):  # loops around loops
            runs, shorter = shorter, _loops(shorter)
        return [_plain(token) for token in shorter]


def _loops(tokens: list[_Token]) -> list[_Token]:
    """Neighbouring repetitions of a sequence of tokens as one token each; where several fit, the one that covers most, with its own loops inside."""
    made: list[_Token] = []
    i = 0
    while i < len(tokens):
        times, period = 1, 1
        for p in range(1, min(_LONGEST, (len(tokens) - i) // 2) + 1):
            if tokens[i] != tokens[i + p]:
                continue
            n = 1
            while tokens[i:i + p] == tokens[i + n * p:i + (n + 1) * p]:
                n += 1
            if n > 1 and n * p > times * period:
                times, period = n, p
        made.append((times, tuple(_loops(tokens[i:i + period]))) if times > 1 else tokens[i])
        i += times * period
    return made


def _plain(token: _Token) -> Any:
    first, second = token
    return {"times": first, "of": [_plain(part) for part in second]} if isinstance(second, tuple) else [first, second]


def unfold(path: Iterable[Any]) -> Iterator[int]:
    """Every instruction of a path, in order, as its number in the table."""
    for part in path:
        if isinstance(part, dict):
            for _ in range(part["times"]):
                yield from unfold(part["of"])
        else:
            yield from range(part[0], part[0] + part[1])
