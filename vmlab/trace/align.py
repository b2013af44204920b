"""Several traces in step: what each technique did for the same instruction of the guest.

The bare machine's instructions are the ruler. A lane's steps are matched to them by the address of the guest instruction that
they stand for; what a lane does beyond (a paravirtual kernel's replaced code, an interrupt that comes elsewhere)
is shown with the instruction before it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vmlab.trace.recorder import Step
from vmlab.trace.words import eventful

#: How far ahead a lost lane looks for the ruler's next instruction.
_REACH = 3000
#: Instructions that must agree before a lost lane counts as found.
_SURE = 3


@dataclass(frozen=True)
class Group:
    """Neighbouring instructions of the ruler that are shown as one: ``start <= i < end``."""

    start: int
    end: int


def places(ruler: Sequence[Step], lane: Sequence[Step]) -> list[int]:
    """For each step of ``lane`` the number of the ruler's instruction that it belongs to; never descending."""
    wanted = [step.address for step in ruler]
    here = _addresses(lane)
    ruled, own = _occurrences(wanted), _occurrences(here)
    found: list[int] = []
    i = -1                      # the ruler's instruction that the lane is at
    previous: int | None = None
    for j, address in enumerate(here):
        follows = i + 1 < len(wanted) and wanted[i + 1] == address
        if address == previous and not (follows and lane[j - 1].instructions):
            pass                      # still the same guest instruction, or what is left to do after it
        elif follows:
            i += 1
        else:
            i = _resume(wanted, ruled, here, own, i, j)
        previous = address
        found.append(max(i, 0))
    return found


def _addresses(lane: Sequence[Step]) -> list[int]:
    """The guest instruction of every step; the monitor's own code belongs to the instruction before it."""
    made: list[int] = []
    last = 0
    for step in lane:
        last = step.guest if step.guest is not None else last
        made.append(last)
    return made


def _occurrences(addresses: Sequence[int]) -> dict[int, list[int]]:
    """Where each address stands, ascending."""
    found: dict[int, list[int]] = {}
    for k, address in enumerate(addresses):
        found.setdefault(address, []).append(k)
    return found


def _between(of: Sequence[int], start: int, end: int) -> Sequence[int]:
    """The members of an ascending list from ``start`` up to ``end``, without it."""
    return of[bisect_left(of, start):bisect_left(of, end)]


def _resume(wanted: Sequence[int], ruled: Mapping[int, list[int]], here: Sequence[int], own: Mapping[int, list[int]], i: int, j: int) -> int:
    """Where the lane is on the ruler after an instruction that does not follow: ahead, if it skipped some; else where it was.

    It skipped if that is nearer than the lane's own way back to the ruler's next instruction. ``ruled`` and ``own`` are the
    occurrences of addresses on the ruler and in the lane.
    """
    coming = _distinct(here, j, _SURE)
    ahead = _between(ruled.get(coming[0], ()), i + 2, i + 2 + _REACH)
    skipped = next((k - i - 1 for k in ahead if list(wanted[k:k + len(coming)]) == coming), None)
    if skipped is None:
        return i
    next_ones = list(wanted[i + 1:i + 1 + _SURE])
    back = _between(own.get(next_ones[0], ()), j + 1, j + 1 + _REACH)
    extra = next((k - j for k in back if _distinct(here, k, len(next_ones)) == next_ones), None)
    return i if extra is not None and extra <= skipped else i + 1 + skipped


def _distinct(here: Sequence[int], j: int, count: int) -> list[int]:
    """The next ``count`` guest instructions of a lane from its step ``j`` on, several steps of one instruction taken once."""
    made = [here[j]]
    for k in range(j + 1, len(here)):
        if len(made) == count:
            break
        if here[k] != here[k - 1]:
            made.append(here[k])
    return made


def groups(ruler: Sequence[Step], lanes: Sequence[tuple[Sequence[Step], Sequence[int]]], most: int) -> list[Group]:
    """The ruler cut into groups: each instruction alone where there are at most ``most``; of more those at which something happens.

    Something happens where a lane's step is :func:`~vmlab.trace.words.eventful` or changes privilege or the guest's own interrupt
    flag. The instructions between two such run together, however many they are.
    """
    count = len(ruler)
    if count <= most:
        return [Group(i, i + 1) for i in range(count)]
    alone = [False] * count
    for steps, at in lanes:
        for step, i in zip(steps, at, strict=True):
            after = step.after or step.before
            if eventful(step) or after.cpl != step.before.cpl or after.virtual_if != step.before.virtual_if:
                alone[i] = True
    made: list[Group] = []
    start = 0
    for i in range(count + 1):
        if i == count or alone[i]:
            if start < i:
                made.append(Group(start, i))
            if i < count:
                made.append(Group(i, i + 1))
            start = i + 1
    return made
