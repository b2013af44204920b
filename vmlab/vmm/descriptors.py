"""Instructions about descriptors, carried out on the virtual CPU: the registers of the descriptor tables, and LAR, LSL, VERR, VERW.

What the bare machine would have refused raises :class:`~vmlab.machine.delivery.Fault` (SDM Vol. 2 describes each instruction).
"""

from __future__ import annotations

from collections.abc import Callable

from vmlab.errors import UnsupportedByStrategy
from vmlab.ledger import Counts
from vmlab.machine.cpu import ZF, Segment
from vmlab.machine.decode import Instruction
from vmlab.machine.delivery import Fault, read_descriptor
from vmlab.vmm.operands import effective_address, operand_size, read_operand, write_operand
from vmlab.vmm.vcpu import VirtualCpu

GP = 13


class DescriptorEmulator:
    """LGDT, LIDT, LLDT, LTR, their storing counterparts, and the instructions that look at a descriptor.

    :param privileged: raises the guest's #GP(0) unless its CPL is 0.
    """

    def __init__(self, vcpu: VirtualCpu, counts: Counts, privileged: Callable[[], None]) -> None:
        self.vcpu, self.counts, self._privileged = vcpu, counts, privileged
        self.by_op: dict[str, Callable[[Instruction], None]] = {
            "lgdt": self._lgdt, "lidt": self._lidt, "lldt": self._lldt, "ltr": self._ltr,
            "sgdt": self._sgdt, "sidt": self._sidt, "sldt": self._sldt, "str": self._str,
            "lar": self._lar, "lsl": self._lsl, "verr": self._verr, "verw": self._verw,
        }

    # ---- descriptor tables
    def _table_operand(self, instruction: Instruction) -> tuple[int, int]:
        address = effective_address(self.vcpu, instruction, instruction.cs.operands[0])
        raw = self.vcpu.read_linear(address, 6, user=self.vcpu.cpl == 3)
        limit, base = int.from_bytes(raw[:2], "little"), int.from_bytes(raw[2:], "little")
        return base & (0xFFFFFF if operand_size(instruction) == 2 else 0xFFFFFFFF), limit

    def _lgdt(self, instruction: Instruction) -> None:
        self._privileged()
        base, limit = self._table_operand(instruction)
        self.counts["vmm.shadow_descriptor"] += self.vcpu.load_gdt(base, limit)

    def _lidt(self, instruction: Instruction) -> None:
        self._privileged()
        base, limit = self._table_operand(instruction)
        self.vcpu.idt = Segment(0, base, limit, 0)

    def _store_table(self, instruction: Instruction, table: Segment) -> None:
        address = effective_address(self.vcpu, instruction, instruction.cs.operands[0])
        self.vcpu.write_linear(address, table.limit.to_bytes(2, "little") + table.base.to_bytes(4, "little"), user=self.vcpu.cpl == 3)

    def _sgdt(self, instruction: Instruction) -> None:
        self._store_table(instruction, self.vcpu.gdt)

    def _sidt(self, instruction: Instruction) -> None:
        self._store_table(instruction, self.vcpu.idt)

    def _sldt(self, instruction: Instruction) -> None:
        write_operand(self.vcpu, instruction, instruction.cs.operands[0], self.vcpu.ldt.selector, 2)

    def _str(self, instruction: Instruction) -> None:
        write_operand(self.vcpu, instruction, instruction.cs.operands[0], self.vcpu.tr.selector, 2)

    def _lldt(self, instruction: Instruction) -> None:
        self._privileged()
        selector = read_operand(self.vcpu, instruction, instruction.cs.operands[0], 2)
        if selector & 4:
            raise Fault(GP, selector & 0xFFFC)
        if selector & 0xFFFC:
            table = read_descriptor(self.vcpu, selector)
            if (table.flags >> 8) & 0x1F != 2:
                raise Fault(GP, selector & 0xFFFC)
            if not table.flags & (1 << 15):
                raise Fault(11, selector & 0xFFFC)
            raise UnsupportedByStrategy("a local descriptor table is not shadowed by this VMM; the guest loaded one with LLDT")
        self.vcpu.ldt = Segment(selector, 0, 0, 0)

    def _ltr(self, instruction: Instruction) -> None:
        self._privileged()
        selector = read_operand(self.vcpu, instruction, instruction.cs.operands[0], 2)
        if not selector & 0xFFFC or selector & 4:
            raise Fault(GP, selector & 0xFFFC)
        task = read_descriptor(self.vcpu, selector)
        if (task.flags >> 8) & 0x1F not in (0x1, 0x9):
            raise Fault(GP, selector & 0xFFFC)
        if not task.flags & (1 << 15):
            raise Fault(11, selector & 0xFFFC)
        self.vcpu.tr = Segment(selector, task.base, task.limit, task.flags | 0x200)
        busy = self.vcpu.gdt.base + (selector & 0xFFF8) + 4
        self.vcpu.write_linear(busy, (task.flags | 0x200).to_bytes(4, "little"))

    # ---- looking at descriptors
    def _look(self, instruction: Instruction) -> tuple[int, Segment | None]:
        source = instruction.cs.operands[-1]
        selector = read_operand(self.vcpu, instruction, source, 2) & 0xFFFF
        found = self.vcpu.guest_descriptor(selector)
        if found is not None:
            conforming = found.flags & 0x1C00 == 0x1C00
            if not conforming and (found.dpl < self.vcpu.cpl or found.dpl < selector & 3):
                found = None
        return selector, found

    def _zero_flag(self, on: bool) -> None:
        flags = self.vcpu.eflags
        self.vcpu.eflags = flags | ZF if on else flags & ~ZF

    def _lar(self, instruction: Instruction) -> None:
        _, found = self._look(instruction)
        ok = found is not None and (bool(found.flags & (1 << 12)) or (found.flags >> 8) & 0xF in (1, 2, 3, 4, 5, 9, 0xB, 0xC))
        if ok and found is not None:
            write_operand(self.vcpu, instruction, instruction.cs.operands[0], found.flags & 0x00F0FF00)
        self._zero_flag(ok)

    def _lsl(self, instruction: Instruction) -> None:
        _, found = self._look(instruction)
        ok = found is not None and (bool(found.flags & (1 << 12)) or (found.flags >> 8) & 0xF in (1, 2, 3, 9, 0xB))
        if ok and found is not None:
            write_operand(self.vcpu, instruction, instruction.cs.operands[0], found.limit)
        self._zero_flag(ok)

    def _verr(self, instruction: Instruction) -> None:
        _, found = self._look(instruction)
        self._zero_flag(found is not None and bool(found.flags & (1 << 12)) and (not found.flags & (1 << 11) or bool(found.flags & (1 << 9))))

    def _verw(self, instruction: Instruction) -> None:
        _, found = self._look(instruction)
        self._zero_flag(found is not None and bool(found.flags & (1 << 12)) and not found.flags & (1 << 11) and bool(found.flags & (1 << 9)))
