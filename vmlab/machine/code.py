"""Straight lines of code as Unicorn translated them, and what each run of one counts.

:class:`Code` is what follows from the bytes alone. A worker runs the same guest in many cells and a guest runs the same
bytes at many places, so it is shared by all of them; a :class:`Block` is code at an address, with what was counted there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

from vmlab.ledger import CLASSES, Snapshot
from vmlab.machine.decode import RING_CHANGERS, Instruction, decode_block


@dataclass(frozen=True)
class Tag:
    """What a machine instruction in a translation cache stands for.

    ``guest`` is the guest instruction that is complete when this machine instruction has retired, if any;
    ``how`` is "ident" for an identical copy and "incache" for anything else. ``marks`` are events of the
    translator's that this machine instruction stands for ("unit": a translation unit was entered).
    """

    guest: Instruction | None = None
    how: str = ""
    marks: tuple[str, ...] = ()


Tags = list[Tag | None]
#: Machine instructions, guest instructions, and events by kind.
Counted = tuple[int, int, tuple[tuple[str, int], ...]]


def _weight(tags: Tags) -> int:
    """Guest instructions that these machine instructions complete."""
    return sum(tag is not None and tag.guest is not None for tag in tags)


def _is_system(instruction: Instruction) -> bool:
    return instruction.op is not None or instruction.search or instruction.undefined or instruction.random


class Code:
    """The bytes of a block, decoded. Where they end in what does not decode, the last instructions are those before."""

    __slots__ = ("_wholes", "bits", "instructions", "iret", "offsets", "raw", "rep", "ring", "system")

    def __init__(self, raw: bytes, bits: int, instructions: list[Instruction]) -> None:
        self.raw, self.bits, self.instructions = raw, bits, instructions
        self.offsets: dict[int, int] = {}
        at = 0
        for i, instruction in enumerate(instructions):
            self.offsets[at] = i
            at += instruction.size
        self.offsets[len(raw)] = len(instructions)
        last = instructions[-1] if instructions else None
        self.rep = bool(last and last.rep)
        self.ring = bool(last and last.op in RING_CHANGERS)
        self.iret = bool(last and last.op == "iret")
        #: Those that somebody may have to step in at: (offset, instruction).
        self.system = [(offset, instructions[i]) for offset, i in self.offsets.items()
                       if i < len(instructions) and _is_system(instructions[i])]
        self._wholes: list[Counted | None] = [None, None]

    def whole(self, user: int) -> Counted:
        """What one run counts where no translator's tags say otherwise."""
        found = self._wholes[user]
        if found is None:
            last = len(self.instructions) - 1
            found = self._wholes[user] = _together(plain(instruction, user, self.rep and i == last)
                                                  for i, instruction in enumerate(self.instructions))
        return found


@functools.lru_cache(maxsize=1 << 16)
def code_of(raw: bytes, bits: int) -> Code:
    """These bytes as code of ``bits`` (16, 32, 64)."""
    return Code(raw, bits, decode_block(raw, bits))


class Block:
    """A straight line of code as Unicorn translated it, and how often it ran.

    ``tags``: what a translator says of its code; None: it is the guest's own. The three counts are
    lists indexed by ``user``: 0 for CPL 0–2, 1 for CPL 3 (but see :attr:`Counter.user_from`).
    """

    __slots__ = ("_whole", "again", "code", "cuts", "end", "instructions", "iret", "key", "offsets", "pc", "rep", "ring", "runs", "size", "slot",
                 "tags", "taken", "weight")

    def __init__(self, pc: int, code: Code, tags: Tags | None) -> None:
        size = len(code.raw)
        self.key, self.pc, self.size, self.end = pc << 16 | size, pc, size, pc + size
        self.code, self.instructions, self.offsets, self.tags = code, code.instructions, code.offsets, tags
        self.rep, self.ring, self.iret = code.rep, code.ring, code.iret
        self.weight = len(code.instructions) if tags is None else _weight(tags)
        self.runs, self.taken, self.again = [0, 0], [0, 0], [0, 0]
        self.slot = -1
        #: How often the CPU left before instruction ``index``, as ``user``: by (index, user).
        self.cuts: dict[tuple[int, int], int] = {}
        self._whole: Counted | None = None

    def one(self, index: int, user: int) -> Counted:
        """What instruction ``index`` counts each time that it retires: machine instructions, guest instructions, events."""
        instruction = self.instructions[index]
        elements_apart = self.rep and index == len(self.instructions) - 1
        if self.tags is None:
            return plain(instruction, user, elements_apart)
        kinds, guests = _machine_kinds(instruction.op, instruction.kind, instruction.string and not elements_apart), 0
        if (tag := self.tags[index]) is not None:
            if tag.guest is not None:
                guests = 1
                kinds.append(f"translated.{tag.how}")
                if tag.how == "ident" and instruction.op:
                    kinds.append("translated.sensitive")
            kinds += [f"translated.{mark}" for mark in tag.marks]
        return 1, guests, tuple((kind, kinds.count(kind)) for kind in dict.fromkeys(kinds))

    def whole(self, user: int) -> Counted:
        """The same of all instructions together."""
        if self.tags is None:
            return self.code.whole(user)
        if self._whole is None:     # tagged code counts the same in every ring
            self._whole = _together(self.one(index, user) for index in range(len(self.instructions)))
        return self._whole

    def leads_to(self, address: int) -> bool:
        """Whether control can go from this block's end to ``address``, which lies inside the block."""
        last = self.instructions[-1]
        at = self.end - last.size
        if last.kind in ("branch", "jcc"):
            return (at + int(last.cs.operands[0].imm) - address) & 0xFFFFFFFF == 0
        return last.kind == "indirect" or last.op in RING_CHANGERS or (last.rep and address == at)

    def guest_weight_from(self, index: int) -> int:
        """Guest instructions at or after position ``index``."""
        if self.tags is None:
            return len(self.instructions) - index
        return _weight(self.tags[index:])


def _together(each: Iterable[Counted]) -> Counted:
    machine = guests = 0
    kinds: dict[str, int] = {}
    for one, of_guest, counted in each:
        machine, guests = machine + one, guests + of_guest
        for kind, n in counted:
            kinds[kind] = kinds.get(kind, 0) + n
    return machine, guests, tuple(kinds.items())


def plain(instruction: Instruction, user: int, elements_apart: bool) -> Counted:
    """What an instruction that no translator made counts; ``elements_apart``: the last of a block under REP, whose elements the machine counts."""
    return _plain(instruction.op, instruction.kind, instruction.string and not elements_apart, user)


@functools.cache
def _plain(op: str | None, kind: str, element: bool, user: int) -> Counted:
    kinds = [*_machine_kinds(op, kind, element), "retired.user" if user else "retired.kernel"]
    if op:
        kinds.append(f"retired.{op}")
    return 1, 1, tuple((kind, kinds.count(kind)) for kind in dict.fromkeys(kinds))


def _machine_kinds(op: str | None, kind: str, element: bool) -> list[str]:
    kinds = [f"machine.{op}" if op else "machine.alu" if kind == "jcc" else f"machine.{kind}"]
    if element:
        kinds.append("machine.string")
    return kinds


assert {"alu", "load", "store", "branch", "indirect", "muldiv", "string"} == set(CLASSES)


# ---- all of it
def total(blocks: Iterable[Block], within: tuple[Block, int, int] | None = None) -> Snapshot:
    """Everything that ``blocks`` counted; ``within``: the CPU is inside this block, about to run that instruction, for that user."""
    events: dict[str, int] = {}
    guest = [0, 0]
    machine = 0
    plainly: tuple[dict[Code, int], dict[Code, int]] = {}, {}

    def add(user: int, times: int, counted: Counted) -> None:
        nonlocal machine
        instructions, guests, kinds = counted
        machine += times * instructions
        guest[user] += times * guests
        for kind, n in kinds:
            events[kind] = events.get(kind, 0) + times * n

    for block in blocks:
        runs, last = block.runs, len(block.instructions) - 1
        cuts = block.cuts
        if within is not None and within[0] is block:
            cuts = {**cuts, within[1:]: cuts.get(within[1:], 0) + 1}
        for user in (0, 1):
            # What each run of the whole block counts; then the exceptions to it.
            if block.tags is None:
                whose = user
                if runs[user]:
                    plainly[user][block.code] = plainly[user].get(block.code, 0) + runs[user]
            else:
                whose = 0   # a translation is a kernel's, whatever ring the cache runs in
                if runs[user]:
                    add(whose, runs[user], block.whole(user))
            for (index, ring), n in cuts.items():
                if ring == user:
                    for i in range(index, last + 1):
                        add(whose, -n, block.one(i, user))
            if block.instructions:
                final = block.instructions[last]
                if block.taken[user] and final.kind == "jcc" and not final.op:
                    events["machine.branch"] = events.get("machine.branch", 0) + block.taken[user]
                    events["machine.alu"] = events.get("machine.alu", 0) - block.taken[user]
                if block.rep and block.again[user]:     # iterations of the last instruction: elements, not instructions
                    add(whose, -block.again[user], block.one(last, user))
                    if not final.search:                # the machine counts what these look at
                        events["machine.string"] = events.get("machine.string", 0) + block.again[user]
    for user in (0, 1):
        for code, times in plainly[user].items():
            add(user, times, code.whole(user))
    return Snapshot({kind: n for kind, n in sorted(events.items()) if n}, guest[1], guest[0], machine)
