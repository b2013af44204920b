"""Exact counts of retired instructions, block by block.

Unicorn calls a hook at the start of every translated block. A block is decoded once; afterwards each
run costs one increment, and the whole instruction mix follows from how often each block ran. What the
increment got wrong is corrected when it shows:

* the CPU left a block before its end (fault, exit): :meth:`Counter.leave` takes the rest off again;
* a string instruction under REP runs as one block per iteration: only the first is an instruction,
  the others are *continuations*; the number of continuations is the number of elements moved;
* a conditional jump was taken when the next block does not start where this one ended.

:func:`block_hook` is the portable way to count; :mod:`vmlab.machine.fast` keeps the same numbers in C.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from vmlab.ledger import CLASSES, Snapshot
from vmlab.machine.decode import RING_CHANGERS, Instruction


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
_Counted = tuple[int, int, tuple[tuple[str, int], ...]]


def _weight(tags: Tags) -> int:
    """Guest instructions that these machine instructions complete."""
    return sum(tag is not None and tag.guest is not None for tag in tags)


class Block:
    """A straight line of code as Unicorn translated it, and how often it ran.

    The three counts are lists indexed by ``user``: 0 for CPL 0–2, 1 for CPL 3 (but see :attr:`Counter.user_from`).
    """

    __slots__ = ("_ones", "_wholes", "again", "end", "instructions", "iret", "key", "offsets", "pc", "rep", "ring", "runs", "size", "slot",
                 "tags", "taken", "weight")

    def __init__(self, key: int, pc: int, size: int, instructions: list[Instruction], tags: Tags | None) -> None:
        self.key, self.pc, self.size, self.end = key, pc, size, pc + size
        self.instructions, self.tags = instructions, tags
        self.offsets: dict[int, int] = {}
        at = 0
        for i, instruction in enumerate(instructions):
            self.offsets[at] = i
            at += instruction.size
        self.offsets[size] = len(instructions)
        last = instructions[-1] if instructions else None
        self.rep = bool(last and last.rep)
        self.ring = bool(last and last.op in RING_CHANGERS)
        self.iret = bool(last and last.op == "iret")
        self.weight = len(instructions) if tags is None else _weight(tags)
        self.runs, self.taken, self.again = [0, 0], [0, 0], [0, 0]
        self.slot = -1
        self._wholes: list[_Counted | None] = [None, None]
        self._ones: dict[tuple[int, int], _Counted] = {}

    def one(self, index: int, user: int) -> _Counted:
        """What instruction ``index`` counts each time that it retires: machine instructions, guest instructions, events."""
        found = self._ones.get((index, user))
        if found is None:
            found = self._ones[index, user] = _kinds(self, index, user)
        return found

    def whole(self, user: int) -> _Counted:
        """The same of all instructions together."""
        found = self._wholes[user]
        if found is None:
            if self.tags is None:
                found = _plain_block(tuple(self.instructions), user, self.rep)
            else:
                found = _together([_kinds(self, index, user) for index in range(len(self.instructions))])
            self._wholes[user] = found
        return found

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


class Counter:
    """Counts per block; see the module's text. ``time`` is virtual time: guest instructions so far."""

    def __init__(self, read_cpl: Callable[[], int]) -> None:
        self._read_cpl = read_cpl
        self.blocks: dict[int, Block] = {}
        self.user = self.cpl = 0
        #: The ring from which on instructions count as a user's. A monitor whose guest's kernel shares ring 3 with the
        #: guest's users sets it to 4 while the kernel runs: to a ring that there is not.
        self.user_from = 3
        self.time = 0
        self.limit = 1 << 62
        #: The next block start needs a look (an interrupt waits); what is outside Python reads it here.
        self.attention = False
        self.current: Block | None = None
        self._short: dict[tuple[int, int, int], int] = {}
        self._irets = [0, 0]
        self._retired: list[Block] = []

    def continues(self, block_end: int) -> bool:
        """Whether the next block, ending at ``block_end``, is another iteration of an unfinished REP."""
        return self.current is not None and self.current.rep and self.current.end == block_end

    # ---- corrections
    def leave(self, rip: int, *, retired: bool = False) -> Instruction | None:
        """The CPU left the current block at the instruction at ``rip``; returns that instruction.

        ``retired`` says that this instruction itself was completed (by the machine). Harmless when
        there is no current block, or when ``rip`` is its end (then None is returned).
        """
        block, self.current = self.current, None
        if block is None:
            return None
        index = block.offsets.get(rip - block.pc)
        if index is None or index >= len(block.instructions):
            self._completed(block, None)
            return None
        cut = index + 1 if retired else index
        if cut < len(block.instructions):
            key = (block.key, cut, self.user)
            self._short[key] = self._short.get(key, 0) + 1
            self.time -= block.guest_weight_from(cut)
        return block.instructions[index]

    def interrupted_string(self) -> None:
        """An interrupt arrived between two iterations of REP: the instruction has not retired yet.

        The iteration before it moved an element all the same. Undisturbed, there is one iteration more than
        elements (it finds ECX = 0), which is the one counted as the instruction.
        """
        block, self.current = self.current, None
        if block is not None:
            self._count_again(block)
            self.time -= block.guest_weight_from(len(block.instructions) - 1)

    def _count_again(self, block: Block) -> None:
        block.again[self.user] += 1

    def instruction_before(self, address: int) -> tuple[int, Instruction] | None:
        """Address and decoding of the current block's instruction that ends at ``address`` (the one that raised INT n)."""
        block = self.current
        if block is None or not block.instructions:
            return None
        after = block.offsets.get(address - block.pc)
        if not after:
            return None
        found = block.instructions[after - 1]
        return address - found.size, found

    def set_cpl(self, cpl: int) -> None:
        """The machine changed CPL by itself."""
        self.cpl, self.user = cpl, int(cpl >= self.user_from)

    # ---- IRET: which ring it went to shows in the CPL afterwards
    @property
    def irets(self) -> tuple[int, int]:
        """IRETs that retired: within a ring, and to another one."""
        return self._irets[0], self._irets[1]

    def _count_iret(self, outer: bool) -> None:
        self._irets[outer] += 1

    def drop(self, cpl: int | None = None) -> None:
        """The current block was completed, and no hook of a next block will tell. ``cpl``: where it ended; None: as now."""
        block, self.current = self.current, None
        if block is not None:
            self._completed(block, cpl)

    def _completed(self, block: Block, cpl: int | None) -> None:
        if block.ring:
            cpl = self._read_cpl() if cpl is None else cpl
            if block.iret:
                self._count_iret(cpl != self.cpl)
            self.set_cpl(cpl)

    # ---- records
    def add(self, block: Block) -> None:
        """Start counting ``block``; a record under the same key is closed and kept."""
        old = self.blocks.get(block.key)
        if old is not None:
            self.close(old)
        self.blocks[block.key] = block

    def close(self, block: Block) -> None:
        """Stop using ``block`` (its code changed); its counts stay."""
        if self.blocks.get(block.key) is block:
            del self.blocks[block.key]
        if self.current is block:
            self.current = None
        for (key, index, user), n in list(self._short.items()):
            if key == block.key:
                del self._short[key, index, user]
                # Keep the correction with the record that it belongs to.
                closed = (-1 - len(self._retired), index, user)
                self._short[closed] = n
        block.key = -1 - len(self._retired)
        self._retired.append(block)

    def snapshot(self, upto: int | None = None) -> Snapshot:
        """Everything retired so far; ``upto`` is the address about to execute when inside a block."""
        correction: dict[tuple[int, int, int], int] = dict(self._short)
        block = self.current
        if upto is not None and block is not None:
            index = block.offsets.get(upto - block.pc)
            if index is not None and index < len(block.instructions):
                key = (block.key, index, self.user)
                correction[key] = correction.get(key, 0) + 1
        counted = _sum(self._all_blocks(), correction)
        counted.events.update((kind, n) for kind, n in zip(("iret.same", "iret.outer"), self.irets, strict=True) if n)
        return counted

    def runs_by_code(self) -> dict[tuple[int, str, int], tuple[int, int]]:
        """By address, mnemonic and size: how often the instruction retired, and jumped (as the last of its block), in any ring."""
        found: dict[tuple[int, str, int], tuple[int, int]] = {}
        lost: dict[int, dict[int, int]] = {}
        for (block_key, index, _), n in self._short.items():
            cuts = lost.setdefault(block_key, {})
            cuts[index] = cuts.get(index, 0) + n
        for block in self._all_blocks():
            times, at, last = sum(block.runs), block.pc, len(block.instructions) - 1
            for i, instruction in enumerate(block.instructions):
                times -= lost.get(block.key, {}).get(i, 0)
                key = (at, instruction.cs.mnemonic, instruction.size)
                n, taken = found.get(key, (0, 0))
                repeats = sum(block.again) if i == last and block.rep else 0
                found[key] = (n + times - repeats, taken + (sum(block.taken) if i == last else 0))
                at += instruction.size
        return found

    def _all_blocks(self) -> Iterable[Block]:
        yield from self._retired
        yield from self.blocks.values()


def block_hook(counter: Counter, attend: Callable[[int, int], bool],
               fail: Callable[[BaseException], None]) -> Callable[[int, int, int, int], None]:
    """What Unicorn calls at every block on the portable path: (engine, linear address, size, nothing).

    One long function over local names, since it runs for every block; ``native/blocks.c`` does the same.

    :param attend: the rare cases; True when the block is known now and may run.
    :param fail: takes what was raised: nothing may cross Unicorn's frames.
    """
    blocks = counter.blocks
    known = blocks.get

    def on_block(_uc: int, pc: int, size: int, _data: int) -> None:
        try:
            block = known(pc << 16 | size)
            if block is None or counter.attention or counter.time + block.weight > counter.limit:
                if not attend(pc, size):
                    return
                block = blocks[pc << 16 | size]
            weight = block.weight
            previous = counter.current
            if previous is not None:
                if previous.ring:
                    counter._completed(previous, None)
                if previous.end != pc:
                    if previous.rep and previous.end == block.end:
                        block.again[counter.user] += 1  # another iteration of the same instruction
                        weight = 0
                    else:
                        previous.taken[counter.user] += 1
            block.runs[counter.user] += 1
            counter.time += weight
            counter.current = block
        except BaseException as failure:  # noqa: BLE001 - handed on
            fail(failure)

    return on_block


def _sum(blocks: Iterable[Block], short: dict[tuple[int, int, int], int]) -> Snapshot:
    events: dict[str, int] = {}
    cut: dict[tuple[int, int], dict[int, int]] = {}         # (block's key, user) → how often left before which instruction
    for (key, index, user), n in short.items():
        cuts = cut.setdefault((key, user), {})
        cuts[index] = cuts.get(index, 0) + n
    guest = [0, 0]
    machine = 0

    def add(kind: str, n: int) -> None:
        if n:
            events[kind] = events.get(kind, 0) + n

    for block in blocks:
        for user in (0, 1):
            runs, cuts = block.runs[user], cut.get((block.key, user), {})
            if not runs and not cuts:
                continue
            # What each run of the whole block counts; then the exceptions to it.
            instructions, guests, kinds = block.whole(user)
            whose = user if block.tags is None else 0   # a translation is a kernel's, whatever ring the cache runs in
            machine += runs * instructions
            guest[whose] += runs * guests
            for kind, n in kinds:
                add(kind, runs * n)
            lost, last = 0, len(block.instructions) - 1
            for i in range(min(cuts), last + 1) if cuts else ():
                lost += cuts.get(i, 0)
                gone, guests, kinds = block.one(i, user)
                machine -= lost * gone
                guest[whose] -= lost * guests
                for kind, n in kinds:
                    add(kind, -lost * n)
            if block.instructions:
                taken, again = block.taken[user], block.again[user] if block.rep else 0
                if taken and block.instructions[last].kind == "jcc" and not block.instructions[last].op:
                    add("machine.branch", taken)
                    add("machine.alu", -taken)
                if again:   # iterations of the last instruction: elements, not instructions
                    gone, guests, kinds = block.one(last, user)
                    machine -= again * gone
                    guest[whose] -= again * guests
                    for kind, n in kinds:
                        add(kind, -again * n)
                    if not block.instructions[last].search:  # the machine counts what these look at
                        add("machine.string", again)
    return Snapshot({kind: n for kind, n in sorted(events.items()) if n}, guest[1], guest[0], machine)


def _together(each: Iterable[_Counted]) -> _Counted:
    machine = guests = 0
    kinds: dict[str, int] = {}
    for one, of_guest, counted in each:
        machine, guests = machine + one, guests + of_guest
        for kind, n in counted:
            kinds[kind] = kinds.get(kind, 0) + n
    return machine, guests, tuple(kinds.items())


@functools.lru_cache(maxsize=1 << 14)
def _plain_block(instructions: tuple[Instruction, ...], user: int, rep: bool) -> _Counted:
    """A worker runs the same guest in many cells, and decoded instructions are shared by their bytes."""
    last = len(instructions) - 1
    return _together(_plain(instruction, user, rep and index == last) for index, instruction in enumerate(instructions))


@functools.lru_cache(maxsize=1 << 16)
def _plain(instruction: Instruction, user: int, elements_apart: bool) -> _Counted:
    kinds = _machine_kinds(instruction, elements_apart)
    kinds.append("retired.user" if user else "retired.kernel")
    if instruction.op:
        kinds.append(f"retired.{instruction.op}")
    return 1, 1, tuple((kind, kinds.count(kind)) for kind in dict.fromkeys(kinds))


def _machine_kinds(instruction: Instruction, elements_apart: bool) -> list[str]:
    """``elements_apart``: the last instruction of a block under REP, whose elements the machine counts."""
    kinds = [f"machine.{instruction.op}" if instruction.op else "machine.alu" if instruction.kind == "jcc" else f"machine.{instruction.kind}"]
    if instruction.string and not elements_apart:
        kinds.append("machine.string")
    return kinds


def _kinds(block: Block, index: int, user: int) -> _Counted:
    """What one instruction counts when it retires: machine instructions, guest instructions, and events."""
    instruction, tags = block.instructions[index], block.tags
    elements_apart = block.rep and index == len(block.instructions) - 1
    if tags is None:
        return _plain(instruction, user, elements_apart)
    kinds, guests = _machine_kinds(instruction, elements_apart), 0
    if (tag := tags[index]) is not None:
        if tag.guest is not None:
            guests = 1
            kinds.append(f"translated.{tag.how}")
            if tag.how == "ident" and instruction.op:
                kinds.append("translated.sensitive")
        kinds += [f"translated.{mark}" for mark in tag.marks]
    return 1, guests, tuple((kind, kinds.count(kind)) for kind in dict.fromkeys(kinds))


assert {"alu", "load", "store", "branch", "indirect", "muldiv", "string"} == set(CLASSES)
