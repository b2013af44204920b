"""How many instructions a workload of ``nano`` runs in its region of interest, by hand.

This restates the recipes of recipes.S as arithmetic. It is checked against what a machine counts, so neither
can drift. "Named" are the instances that a density is about (CLI and STI are two); "other" is every further
instruction from the first arrival at ``vmlab_roi_begin`` to the arrival at ``vmlab_roi_end``.

    named  = N/4 * named_4 + N%4 * named_1
    other  = N/4 * other_4 + N%4 * other_1 + 13 + 2 for each of the two loops that is entered
    other_k = max(floor(1000 * named_k / density), fixed_k + 2)

``fixed_k`` are the instructions that a pass needs besides the named ones (loading a register, calling the
interrupt test), and 2 is the loop's own DEC and JNZ. The loop of four is entered twice if it runs more than once
(cold, then warm). Where an interrupt or INT 0x80 is named, the handler's instructions are "other".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One pass of a workload's loop: named instances, of those not instructions, fixed others, the mnemonics."""

    named: int
    fixed: int
    mnemonics: Mapping[str, int]
    gaps: bool = True


@dataclass(frozen=True)
class Expected:
    """Exact counts of the region of interest, natively.

    ``named`` and ``other`` are what a density relates; ``instructions`` all that the guest retires (an interrupt
    is named without being an instruction); ``mnemonics`` how often each system instruction runs.
    """

    named: int
    other: int
    instructions: int
    mnemonics: Mapping[str, int]


# Instructions of the pieces in workloads.S, "other" all of them.
RAISE_AND_WAIT = 50
ENTER_USER = 9
USER_COMPUTE = 60_001
USER_MIXED = 62
_RAISE = {"cli": 1, "out": 6, "in": 2, "sti": 1, "hlt": 1, "iret": 2}


def _sum(*parts: Mapping[str, int]) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in parts:
        for name, count in part.items():
            total[name] = total.get(name, 0) + count
    return total


def _times(count: int, part: Mapping[str, int]) -> dict[str, int]:
    return {name: n * count for name, n in part.items() if n * count}


_MIXED = Shape(
    named=12, fixed=1 + 3 + 1 + 1 + 1 + 1 + 2 + RAISE_AND_WAIT + 2 + ENTER_USER + USER_MIXED,
    mnemonics=_sum({"cli": 2, "sti": 1, "pushf": 2, "popf": 1, "out": 1, "in": 1, "cpuid": 1, "rdtsc": 1,
                    "int": 1, "iret": 1}, _RAISE),
)
_COMPUTE = Shape(named=1, fixed=2 + ENTER_USER + USER_COMPUTE, mnemonics={"int": 1, "iret": 1}, gaps=False)


def _four(shape: Shape) -> Shape:
    return Shape(4 * shape.named, 4 * shape.fixed, _times(4, shape.mnemonics), shape.gaps)


_INTERRUPT = Shape(2, RAISE_AND_WAIT, _RAISE)

#: By workload: the pass that holds four iterations, the pass that holds one.
SHAPES: Mapping[str, tuple[Shape, Shape]] = {
    "cli_sti": (Shape(8, 0, {"cli": 4, "sti": 4}), Shape(2, 0, {"cli": 1, "sti": 1})),
    "pushf_popf": (
        Shape(10, 4 + 6, {"pushf": 6, "popf": 4, "cli": 4}),
        Shape(4, 1 + 6, {"pushf": 3, "popf": 1, "cli": 1}),
    ),
    "port_io": (Shape(8, 4 * 2 + 2 * 2, {"out": 4, "in": 4}), Shape(2, 2, {"out": 1, "in": 1})),
    "cpuid": (Shape(4, 4, {"cpuid": 4}), Shape(1, 1, {"cpuid": 1})),
    "rdtsc": (Shape(4, 5, {"rdtsc": 4}), Shape(1, 5, {"rdtsc": 1})),
    "interrupt": (_four(_INTERRUPT), _INTERRUPT),
    "compute": (_four(_COMPUTE), _COMPUTE),
    "mixed": (_four(_MIXED), _MIXED),
}

#: Named instances that are no instructions of their own, an iteration.
INTERRUPTS = {"interrupt": 2, "mixed": 2}


def expected(workload: str, iterations: int, density: int) -> Expected:
    """What the region of interest of ``workload`` holds on bare hardware."""
    fours, singles = divmod(iterations, 4)
    named, other = 0, 13
    mnemonics: dict[str, int] = {}
    for passes, entries, shape in ((fours, min(fours, 2), SHAPES[workload][0]),
                                   (singles, min(singles, 1), SHAPES[workload][1])):
        if not passes:
            continue
        filled = 1000 * shape.named // density if shape.gaps else 0
        named += passes * shape.named
        other += passes * max(filled, shape.fixed + 2) + 2 * entries
        mnemonics = _sum(mnemonics, _times(passes, shape.mnemonics))
    return Expected(named, other, named + other - iterations * INTERRUPTS.get(workload, 0), mnemonics)
