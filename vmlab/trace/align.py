"""Several traces in step: what each technique did for the same instruction of the guest.

The bare machine's instructions are the ruler. A lane's steps are matched to them by the address of the guest instruction that
they stand for; what a lane does beyond (a paravirtual kernel's replaced code, an interrupt that comes elsewhere)
is shown with the instruction before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vmlab.trace.recorder import Step
from vmlab.trace.words import kind_of

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
            i = _resume(wanted, here, i, j)
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


def _resume(wanted: Sequence[int], here: Sequence[int], i: int, j: int) -> int:
    """Where the lane is on the ruler after an instruction that does not follow: ahead, if it skipped some; else where it was.

    It skipped if that is nearer than the lane's own way back to the ruler's next instruction.
    """
    coming = _distinct(here, j, _SURE)
    skipped = next((k - i - 1 for k in range(i + 2, min(len(wanted), i + 2 + _REACH)) if list(wanted[k:k + len(coming)]) == coming), None)
    if skipped is None:
        return i
    next_ones = list(wanted[i + 1:i + 1 + _SURE])
    extra = next((k - j for k in range(j + 1, min(len(here), j + 1 + _REACH))
                  if here[k] == next_ones[0] and _distinct(here, k, len(next_ones)) == next_ones), None)
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
    """The ruler cut into at most about ``most`` groups: instructions at which something happens stand alone, the rest runs together."""
    count = len(ruler)
    if count <= most:
        return [Group(i, i + 1) for i in range(count)]
    alone = [False] * count
    for steps, at in lanes:
        for step, i in zip(steps, at, strict=True):
            after = step.after or step.before
            if kind_of(step) != "instruction" or after.cpl != step.before.cpl or after.virtual_if != step.before.virtual_if:
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
