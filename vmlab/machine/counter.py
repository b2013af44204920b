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

from collections.abc import Callable, Collection, Iterable

from vmlab.ledger import Snapshot
from vmlab.machine.code import Block, total
from vmlab.machine.decode import Instruction

#: Who looks at block starts: always, or only while EFLAGS.IF is on, for what waits is an interrupt that it masks. Who cannot see IF looks always.
ALWAYS, WHEN_ENABLED = 1, 2


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
        #: The next block start needs a look (an interrupt waits); what is outside Python reads it here: 0, :data:`ALWAYS` or :data:`WHEN_ENABLED`.
        self.attention = 0
        self.current: Block | None = None
        self._irets = [0, 0]
        self._by_page: dict[int, dict[int, Block]] = {}
        #: Records that are not in use now.
        self._apart: dict[Block, None] = {}

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
            key = (cut, self.user)
            block.cuts[key] = block.cuts.get(key, 0) + 1
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

    def pass_one(self) -> None:
        """One guest instruction was executed by somebody else."""
        self.time += 1

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
        """Start counting ``block``, or go on counting it; a record under the same key is closed and kept."""
        old = self.blocks.get(block.key)
        if old is not None:
            self.close(old)
        self._apart.pop(block, None)
        self.blocks[block.key] = block
        for page in _pages(block.pc, block.end):
            self._by_page.setdefault(page, {})[block.key] = block

    def close(self, block: Block) -> None:
        """Stop using ``block`` (its code changed); its counts stay."""
        self._take_out(block)
        if self.current is block:
            self.current = None

    def suspend(self, block: Block) -> None:
        """Other code may lie in its place from the next block on: it is counted no more until it is added again."""
        self._take_out(block)

    def _take_out(self, block: Block) -> bool:
        if self.blocks.get(block.key) is not block:
            return False
        del self.blocks[block.key]
        for page in _pages(block.pc, block.end):
            del self._by_page[page][block.key]
        self._apart[block] = None
        return True

    def within(self, start: int, end: int) -> list[Block]:
        """Blocks in use that overlap ``start <= address < end``."""
        pages: Collection[int] = _pages(start, end)
        if len(pages) > len(self._by_page):
            pages = self._by_page
        found = {key: block for page in pages for key, block in self._by_page.get(page, {}).items() if block.pc < end and start < block.end}
        return list(found.values())

    def snapshot(self, upto: int | None = None) -> Snapshot:
        """Everything retired so far; ``upto`` is the address about to execute when inside a block."""
        block, within = self.current, None
        if upto is not None and block is not None:
            index = block.offsets.get(upto - block.pc)
            if index is not None and index < len(block.instructions):
                within = block, index, self.user
        counted = total(self._all_blocks(), within)
        counted.events.update((kind, n) for kind, n in zip(("iret.same", "iret.outer"), self.irets, strict=True) if n)
        return counted

    def runs_by_code(self) -> dict[tuple[int, str, int], tuple[int, int]]:
        """By address, mnemonic and size: how often the instruction retired, and jumped (as the last of its block), in any ring."""
        found: dict[tuple[int, str, int], tuple[int, int]] = {}
        for block in self._all_blocks():
            times, at, last = sum(block.runs), block.pc, len(block.instructions) - 1
            for i, instruction in enumerate(block.instructions):
                times -= block.cuts.get((i, 0), 0) + block.cuts.get((i, 1), 0)
                key = (at, instruction.cs.mnemonic, instruction.size)
                n, taken = found.get(key, (0, 0))
                repeats = sum(block.again) if i == last and block.rep else 0
                found[key] = (n + times - repeats, taken + (sum(block.taken) if i == last else 0))
                at += instruction.size
        return found

    def _all_blocks(self) -> Iterable[Block]:
        yield from self._apart
        yield from self.blocks.values()


def _pages(start: int, end: int) -> range:
    return range(start >> 12, (end - 1 >> 12) + 1)


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
