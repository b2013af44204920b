"""System instructions of real-address mode, where they differ from protected mode: segments without descriptors (SDM Vol. 3A §20.1).

In other modes :class:`RealModeEmulator` is an :class:`~vmlab.vmm.emulate.Emulator`. Virtual-8086 mode is not among them.
"""

from __future__ import annotations

from vmlab.machine.cpu import Segment
from vmlab.machine.decode import Instruction
from vmlab.machine.delivery import Fault
from vmlab.machine.state import CS, SS
from vmlab.vmm.emulate import Emulator
from vmlab.vmm.guest_tables import CR0_PE
from vmlab.vmm.operands import operand_size

_UD = 6
#: Not recognised in real-address mode (SDM Vol. 2, each one's "Real-Address Mode Exceptions").
_PROTECTED_ONLY = frozenset({"lldt", "ltr", "sldt", "str", "lar", "lsl", "verr", "verw", "sysenter", "sysexit", "syscall", "sysret"})


class RealModeEmulator(Emulator):
    """Emulation for guests that may be in real-address mode."""

    @property
    def _real(self) -> bool:
        return not self.vcpu.cr(0) & CR0_PE

    def emulate(self, instruction: Instruction) -> None:
        if instruction.op in _PROTECTED_ONLY and self._real:
            raise Fault(_UD)
        super().emulate(instruction)

    def _loaded(self, number: int, selector: int) -> Segment:
        """A load of a segment register: the base follows the selector, limit and attributes stay (SDM Vol. 3A §20.1.1, §9.9.2)."""
        old = self.vcpu.segment(number)
        return Segment(selector & 0xFFFF, (selector & 0xFFFF) << 4, old.limit, old.flags)

    def load_segment(self, number: int, selector: int) -> None:
        if not self._real or number == CS:
            super().load_segment(number, selector)
            return
        self.vcpu.set_segment(number, self._loaded(number, selector))
        if number == SS:
            self.vcpu.shadow_at = self._next        # no interrupt before SP is loaded too (SDM Vol. 2, MOV)

    def _transfer_segment(self, selector: int) -> Segment:
        return self._loaded(CS, selector) if self._real else super()._transfer_segment(selector)

    def _iret(self, instruction: Instruction) -> None:
        if not self._real:
            super()._iret(instruction)
            return
        size = operand_size(instruction)
        rip, selector, flags = self._peek(0, size), self._peek(size, size), self._peek(2 * size, size)
        self._drop(3 * size)
        self.vcpu.set_segment(CS, self._loaded(CS, selector))
        self._set_flags(flags, size, 0)
        self._next = rip

    def _ret_far(self, instruction: Instruction) -> None:
        if not self._real:
            super()._ret_far(instruction)
            return
        size = operand_size(instruction)
        rip, selector = self._peek(0, size), self._peek(size, size)
        self._drop(2 * size + (int(instruction.cs.operands[0].imm) if instruction.cs.operands else 0))
        self.vcpu.set_segment(CS, self._loaded(CS, selector))
        self._next = rip


