"""What addresses the CPU really uses, told to the TLB model: data by Unicorn's memory hooks, code by blocks.

Unicorn's memory hooks give *physical* addresses. RIP and the registers are exact there, so the linear address is computed
again from the instruction: its memory operands, and the stack, string and table accesses that are not written
out. A candidate counts only if it agrees with the physical address in the low 12 bits and if the page tables lead from its
page to that physical page. What no candidate explains is counted (``tlb.unattributed``), never guessed.
See docs/adr/ on the TLB model for the limits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from capstone import x86_const as cs_x86
from unicorn import unicorn_const as uc_const

from vmlab.machine import paging
from vmlab.machine.decode import Instruction
from vmlab.machine.engine import CODE_CALLBACK, MEMORY_CALLBACK
from vmlab.machine.memory import PAGE
from vmlab.machine.operands import effective_address
from vmlab.machine.paging import CR0_PG, CR4_PAE, EFER_LMA, EFER_NXE, NestedFault, PageFault, Tables, Walk
from vmlab.machine.state import CS, DS, ES, HF_CS64, RBP, RBX, RDI, RSI, RSP, SS
from vmlab.machine.tlb import DATA, INSTRUCTION, Tlb, TlbConfig, WalkSteps

if TYPE_CHECKING:
    from vmlab.machine.pc import Machine

_CR4_PGE, _GLOBAL = 1 << 7, 1 << 8
_REACH = 64            # an operand's bytes may be accessed in pieces: SSE, FXSAVE's parts
_HOST, _GUEST = 0, 1   # spaces of a tagged TLB


class Accesses:
    """Feeds ``tlb`` with everything that the CPU of ``machine`` translates, host and guest."""

    def __init__(self, machine: Machine, config: TlbConfig) -> None:
        self.tlb = Tlb(config, machine.events)
        self._machine, self._cpu = machine, machine.cpu
        self._pages: dict[tuple[int, int], int] = {}    # (space, page) → physical page, as the tables had it since the last flush
        self._last: dict[str, tuple[int, int] | None] = {INSTRUCTION: None, DATA: None}
        self._guest_root = 0
        #: A VMM changed tables that the guest's tag stands for: the next VMRUN flushes it (TLB_CONTROL).
        self.guest_changed = False
        machine.engine.hook(uc_const.UC_HOOK_MEM_READ | uc_const.UC_HOOK_MEM_WRITE, MEMORY_CALLBACK, self._on_memory)
        machine.engine.hook(uc_const.UC_HOOK_BLOCK, CODE_CALLBACK, self._on_block)
        machine.engine.on_flush = self.flushed

    @property
    def _space(self) -> int:
        return _GUEST if self.tlb.config.tagged and self._machine.in_guest else _HOST

    # ---- flushes
    def flushed(self) -> None:
        """The machine or a VMM's privileged code flushed what the current space has."""
        self._flush(self._space, keep_global=False)

    def _flush(self, space: int | None, *, keep_global: bool) -> None:
        self._pages.clear()
        self._last = {INSTRUCTION: None, DATA: None}
        self.tlb.flush(space, keep_global=keep_global)

    def world_switch(self, root: int | None = None) -> None:
        """VMRUN, with the guest's page-table root, or #VMEXIT. Without tags it flushes; with tags, VMRUN does when the root changed."""
        self._pages.clear()
        self._last = {INSTRUCTION: None, DATA: None}
        if not self.tlb.config.tagged:
            self.tlb.flush()
        elif root is not None and (root != self._guest_root or self.guest_changed):
            self._guest_root, self.guest_changed = root, False
            self.tlb.flush(_GUEST)

    def about_to_flush(self, instruction: Instruction) -> None:
        """The CPU is about to run MOV to CR0, CR3, CR4 or INVLPG, and nothing stops it."""
        cpu = self._cpu
        if instruction.op == "invlpg":
            linear = effective_address(self._cpu, instruction, instruction.cs.operands[0])
            self._pages.pop((self._space, linear // PAGE), None)
            self._last = {INSTRUCTION: None, DATA: None}
            self.tlb.flush_page(self._space, linear)
        else:
            to_cr3 = instruction.cs.operands[0].reg == cs_x86.X86_REG_CR3
            self._flush(self._space, keep_global=to_cr3 and bool(cpu.cr(4) & _CR4_PGE))

    # ---- code
    def _on_block(self, _uc: int, pc: int, size: int, _data: int) -> None:
        try:
            self._cpu.load()
            if self._cpu.cr(0) & CR0_PG:
                self._touch(INSTRUCTION, pc)
                if (pc ^ pc + size - 1) // PAGE:
                    self._touch(INSTRUCTION, pc + size - 1)
        except BaseException as failure:  # noqa: BLE001 - nothing may cross Unicorn's frames
            self._machine.fail(failure)

    def _touch(self, side: str, linear: int) -> None:
        page = (self._space, linear // PAGE)
        if self._last[side] != page:
            self._last[side] = page
            self.tlb.access(side, page[0], linear, lambda: self._steps(linear))

    # ---- data
    def _on_memory(self, _uc: int, _kind: int, physical: int, size: int, _value: int, _data: int) -> bool:
        try:
            self._cpu.load()
            if self._cpu.cr(0) & CR0_PG:
                linear = self._linear(physical)
                if linear is None:
                    self._machine.events["tlb.unattributed"] += 1
                else:
                    self._touch(DATA, linear)
                    if (linear % PAGE) + size > PAGE:
                        self._touch(DATA, linear + size - 1)
        except BaseException as failure:  # noqa: BLE001
            self._machine.fail(failure)
        return True

    def _linear(self, physical: int) -> int | None:
        """The linear address that this access was made by."""
        instruction = self._running()
        space, frame = self._space, physical // PAGE
        for first, last in self._candidates(instruction):
            for page in range(first // PAGE, last // PAGE + 1):
                linear = page * PAGE | physical % PAGE
                if first <= linear <= last and self._frame(space, page) == frame:
                    return linear
        return None

    def _running(self) -> Instruction | None:
        """The instruction at RIP, as its block was decoded."""
        block = self._machine.counter.current
        if block is None:
            return None
        index = block.offsets.get(self._cpu.rip + self._cpu.segment(CS).base - block.pc)
        return block.instructions[index] if index is not None and index < len(block.instructions) else None

    def _candidates(self, instruction: Instruction | None) -> Iterator[tuple[int, int]]:
        """Ranges of linear addresses (first, last) that the instruction may access, the likely ones first."""
        cpu = self._cpu
        if instruction is not None:
            for operand in instruction.cs.operands:
                if operand.type == cs_x86.X86_OP_MEM:
                    at = effective_address(self._cpu, instruction, operand)
                    yield at, at + max(_REACH, operand.size) - 1
        long_code = bool(cpu.hflags & HF_CS64)
        mask = 0xFFFFFFFFFFFFFFFF if long_code else 0xFFFFFFFF
        stack = (cpu.gpr(RSP) + (0 if long_code else cpu.segment(SS).base)) & mask
        yield max(stack - _REACH, 0), stack + _REACH          # PUSH, POP, CALL, RET, PUSHA, IRET
        if instruction is not None and instruction.cs.id == cs_x86.X86_INS_XLATB:
            at = (cpu.gpr(RBX) + (0 if long_code else cpu.segment(DS).base)) & mask
            yield at, at + 0xFF
        if instruction is None or instruction.string:
            for register, segment in ((RSI, DS), (RDI, ES)):
                at = (cpu.gpr(register) + (0 if long_code else cpu.segment(segment).base)) & mask
                yield at, at + 8
        frame = (cpu.gpr(RBP) + (0 if long_code else cpu.segment(SS).base)) & mask
        yield max(frame - _REACH, 0), frame + _REACH          # LEAVE, ENTER
        for table in ("gdt", "ldt", "tr", "idt"):             # loads of segment registers, far transfers
            found = cpu.table(table)
            if found.limit:
                yield found.base, found.base + found.limit

    # ---- the page tables, looked at without leaving a mark
    def _frame(self, space: int, page: int) -> int | None:
        """The physical page behind a linear page; None where there is none."""
        found = self._pages.get((space, page))
        if found is None:
            walk = self._walk(page * PAGE)
            if walk is None:
                return None
            gpa = walk.frame | page * PAGE & ((1 << walk.shift) - 1)
            nested = self._nested_tables()
            if nested is not None:
                inner = self._nested_walk(nested, gpa)
                if inner is None:
                    return None
                gpa = inner.frame | gpa & ((1 << inner.shift) - 1)
            found = self._pages[space, page] = gpa // PAGE
        return found

    def _nested_tables(self) -> Tables | None:
        root = self._cpu.nested_root
        if not root or not self._machine.in_guest:
            return None
        return Tables(CR0_PG, root, CR4_PAE, EFER_LMA | EFER_NXE)

    def _nested_walk(self, tables: Tables, gpa: int) -> Walk | None:
        try:
            return paging.walk(self._machine.ram, tables, gpa, 0, mark=False)
        except PageFault:
            return None

    def _walk(self, linear: int) -> Walk | None:
        nested = self._nested_tables()
        memory = self._machine.ram if nested is None else paging.NestedMemory(self._machine.ram, nested.cr3)
        try:
            return paging.walk(memory, self._cpu.tables, linear, 0, mark=False)
        except (PageFault, NestedFault):
            return None

    def _steps(self, linear: int) -> WalkSteps | None:
        """The walk of ``linear`` as the model counts it. An entry is named by its size of reach and what it maps."""
        walk = self._walk(linear)
        if walk is None:
            return None
        narrow = walk.steps[0].size == 4
        entries = tuple((_name(step.level, linear, narrow), step.at) for step in walk.steps)
        nested = self._nested_tables()

        def levels(gpa: int) -> tuple[tuple[int, int], ...]:
            inner = self._nested_walk(nested, gpa) if nested is not None else None
            return () if inner is None else tuple(_name(step.level, gpa, False) for step in inner.steps)

        is_global = bool(walk.steps[-1].entry & _GLOBAL and self._cpu.cr(4) & _CR4_PGE)
        gpa = walk.frame | linear & ((1 << walk.shift) - 1)
        return WalkSteps(entries, walk.shift, gpa, is_global, levels if nested is not None else None)


def _name(level: int, address: int, narrow: bool) -> tuple[int, int]:
    """(level, what the entry covers): one for each entry of a tree of tables."""
    shift = 12 + (10 if narrow else 9) * (level - 1)
    return level, address >> shift
