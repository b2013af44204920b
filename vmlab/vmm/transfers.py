"""The stack, segment registers and transfers between segments, on the virtual CPU: what :class:`~vmlab.vmm.emulate.Emulator` stands on.

Descriptors are read from the guest's tables, and checked as the SDM's Vol. 2 says at each instruction.
"""

from __future__ import annotations

from vmlab.machine import task
from vmlab.machine.cpu import IF, IOPL, Segment
from vmlab.machine.decode import Instruction
from vmlab.machine.delivery import Fault, read_descriptor
from vmlab.machine.state import CS, DS, ES, FS, GS, RSP, SS
from vmlab.vmm.operands import REGISTERS, SEGMENTS, effective_address, operand_size, read_operand, write_operand
from vmlab.vmm.vcpu import CHANGEABLE, VirtualCpu

GP = 13


class TransferEmulator:
    """PUSHF to IRET, MOV to a segment register to far RET. ``_next`` is where the guest goes on."""

    vcpu: VirtualCpu
    _next: int

    # ---- the stack and the flags
    def push(self, value: int, size: int = 4) -> None:
        """PUSH on the guest's stack."""
        vcpu = self.vcpu
        wide = bool(vcpu.segment(SS).flags & (1 << 22))
        mask = 0xFFFFFFFF if wide else 0xFFFF
        top = (vcpu.gpr(RSP) - size) & mask
        vcpu.write_linear((vcpu.segment(SS).base + top) & 0xFFFFFFFF, (value & ((1 << (8 * size)) - 1)).to_bytes(size, "little"),
                          user=vcpu.cpl == 3)
        vcpu.set_gpr(RSP, top, 4 if wide else 2)

    def _peek(self, offset: int, size: int = 4) -> int:
        vcpu = self.vcpu
        mask = 0xFFFFFFFF if vcpu.segment(SS).flags & (1 << 22) else 0xFFFF
        address = vcpu.segment(SS).base + ((vcpu.gpr(RSP) + offset) & mask)
        return int.from_bytes(vcpu.read_linear(address & 0xFFFFFFFF, size, user=vcpu.cpl == 3), "little")

    def _drop(self, size: int) -> None:
        wide = bool(self.vcpu.segment(SS).flags & (1 << 22))
        self.vcpu.set_gpr(RSP, self.vcpu.gpr(RSP) + size, 4 if wide else 2)

    def _pushf(self, instruction: Instruction) -> None:
        self.push(self.vcpu.eflags & 0xFCFFFF, operand_size(instruction))

    def _popf(self, instruction: Instruction) -> None:
        size = operand_size(instruction)
        value = self._peek(0, size)
        self._drop(size)
        self._set_flags(value, size, self.vcpu.cpl)

    def _set_flags(self, value: int, size: int, cpl: int) -> None:
        """What POPF and IRET at privilege ``cpl`` let through (SDM Vol. 2, POPF, table 4-16)."""
        vcpu = self.vcpu
        changeable = CHANGEABLE
        if cpl == 0:
            changeable |= IOPL | IF
        elif cpl <= vcpu.iopl:
            changeable |= IF
        if size == 2:
            changeable &= 0xFFFF
        old = vcpu.eflags
        vcpu.eflags = (old & ~changeable) | (value & changeable)

    def _code_segment(self, selector: int) -> Segment:
        if not selector & 0xFFFC:
            raise Fault(GP, 0)
        code = read_descriptor(self.vcpu, selector)
        if not code.flags & (1 << 12) or not code.flags & (1 << 11):
            raise Fault(GP, selector & 0xFFFC)
        if not code.flags & (1 << 15):
            raise Fault(11, selector & 0xFFFC)
        return code

    def _stack_segment(self, selector: int, cpl: int) -> Segment:
        if not selector & 0xFFFC or selector & 3 != cpl:
            raise Fault(GP, selector & 0xFFFC)
        stack = read_descriptor(self.vcpu, selector)
        writable = stack.flags & (1 << 12) and not stack.flags & (1 << 11) and stack.flags & (1 << 9)
        if not writable or stack.dpl != cpl:
            raise Fault(GP, selector & 0xFFFC)
        if not stack.flags & (1 << 15):
            raise Fault(12, selector & 0xFFFC)
        return Segment(selector, stack.base, stack.limit, stack.flags | 0x100)

    # ---- segment registers
    def _mov_from_seg(self, instruction: Instruction) -> None:
        target, source = instruction.cs.operands
        write_operand(self.vcpu, instruction, target, self.vcpu.selector(SEGMENTS[source.reg]), 2)

    def _push_seg(self, instruction: Instruction) -> None:
        self.push(self.vcpu.selector(SEGMENTS[instruction.cs.operands[0].reg]), operand_size(instruction))

    def _mov_to_seg(self, instruction: Instruction) -> None:
        target, source = instruction.cs.operands
        self.load_segment(SEGMENTS[target.reg], read_operand(self.vcpu, instruction, source, 2) & 0xFFFF)

    def _pop_seg(self, instruction: Instruction) -> None:
        size = operand_size(instruction)
        self.load_segment(SEGMENTS[instruction.cs.operands[0].reg], self._peek(0, size) & 0xFFFF)
        self._drop(size)

    def _load_far(self, instruction: Instruction) -> None:
        target, source = instruction.cs.operands
        size = REGISTERS[target.reg][1]
        address = effective_address(self.vcpu, instruction, source)
        raw = self.vcpu.read_linear(address, size + 2, user=self.vcpu.cpl == 3)
        name = instruction.cs.mnemonic[1:]
        self.load_segment({"es": 0, "ss": SS, "ds": 3, "fs": 4, "gs": 5}[name], int.from_bytes(raw[size:], "little"))
        write_operand(self.vcpu, instruction, target, int.from_bytes(raw[:size], "little"))

    def load_segment(self, number: int, selector: int) -> None:
        """MOV to a segment register other than CS (SDM Vol. 2, MOV)."""
        vcpu = self.vcpu
        if number == SS:
            vcpu.set_segment(SS, self._stack_segment(selector, vcpu.cpl))
            return
        if number == CS:
            raise Fault(6)
        if not selector & 0xFFFC:
            vcpu.set_segment(number, Segment(selector, 0, 0, 0))
            return
        found = read_descriptor(vcpu, selector)
        readable = found.flags & (1 << 12) and (not found.flags & (1 << 11) or found.flags & (1 << 9))
        conforming = found.flags & 0x0C00 == 0x0C00
        if not readable or (not conforming and (found.dpl < selector & 3 or found.dpl < vcpu.cpl)):
            raise Fault(GP, selector & 0xFFFC)
        if not found.flags & (1 << 15):
            raise Fault(11, selector & 0xFFFC)
        vcpu.set_segment(number, Segment(selector, found.base, found.limit, found.flags | 0x100))

    # ---- IRET, and what it shares with far RET
    def _iret(self, instruction: Instruction) -> None:
        """IRET within the kernel, out to user mode, or back to another task (SDM Vol. 2, IRET)."""
        if self._switches_task(instruction, None):
            return
        vcpu = self.vcpu
        size = operand_size(instruction)
        cpl = vcpu.cpl
        rip, selector, flags = self._peek(0, size), self._peek(size, size) & 0xFFFF, self._peek(2 * size, size)
        code = self._return_segment(selector, cpl)
        if selector & 3 > cpl:
            new_sp, new_ss = self._peek(3 * size, size), self._peek(4 * size, size) & 0xFFFF
            stack = self._stack_segment(new_ss, selector & 3)
            self._set_flags(flags, size, cpl)
            vcpu.set_segment(CS, Segment(selector, code.base, code.limit, code.flags | 0x100))
            vcpu.set_segment(SS, stack)
            vcpu.set_cpl(selector & 3)
            vcpu.set_gpr(RSP, new_sp, 4)
            self._drop_inner_segments(selector & 3)
        else:
            self._drop(3 * size)
            self._set_flags(flags, size, cpl)
            vcpu.set_segment(CS, Segment(selector, code.base, code.limit, code.flags | 0x100))
        self._next = rip

    def _drop_inner_segments(self, cpl: int) -> None:
        """On the way to an outer ring, data segments that it could not have loaded become null (SDM Vol. 2, IRET and RET)."""
        vcpu = self.vcpu
        for number in (ES, DS, FS, GS):
            segment = vcpu.segment(number)
            conforming = segment.flags & 0x0C00 == 0x0C00
            # As the machine's CPU does: a null FS or GS stays as it is, for in long mode it may have a base.
            null = number in (FS, GS) and not segment.selector & 0xFFFC
            if not conforming and not null and segment.dpl < cpl:
                vcpu.set_segment(number, Segment(0, 0, 0, 0))

    def _return_segment(self, selector: int, cpl: int) -> Segment:
        """The code segment that IRET or RET at ``cpl`` goes to: not an inner ring's, and its DPL is the RPL (SDM Vol. 2, RET)."""
        if selector & 0xFFFC and selector & 3 < cpl:
            raise Fault(GP, selector & 0xFFFC)
        code = self._code_segment(selector)
        conforming = bool(code.flags & (1 << 10))
        if (conforming and code.dpl > selector & 3) or (not conforming and code.dpl != selector & 3):
            raise Fault(GP, selector & 0xFFFC)
        return code

    # ---- far transfers within a ring or to a task (call gates are not for this guest)
    def _far_target(self, instruction: Instruction) -> tuple[int, int]:
        operands = instruction.cs.operands
        if len(operands) == 2:
            return int(operands[1].imm) & 0xFFFFFFFF, int(operands[0].imm) & 0xFFFF
        size = operand_size(instruction)
        address = effective_address(self.vcpu, instruction, operands[0])
        raw = self.vcpu.read_linear(address, size + 2, user=self.vcpu.cpl == 3)
        return int.from_bytes(raw[:size], "little"), int.from_bytes(raw[size:], "little")

    def _switches_task(self, instruction: Instruction, selector: int | None) -> bool:
        """Whether the instruction leads to another task; the virtual CPU is in that one then."""
        found = task.wanted(self.vcpu, instruction, selector)
        if found is None:
            return False
        task.switch(self.vcpu, found[0], None, self._next, found[1])
        self._next = self.vcpu.rip
        return True

    def _transfer_segment(self, selector: int) -> Segment:
        """The code segment that a far JMP or CALL may go to: one of this ring (SDM Vol. 2, JMP)."""
        vcpu = self.vcpu
        code = self._code_segment(selector)
        conforming = bool(code.flags & (1 << 10))
        if (conforming and code.dpl > vcpu.cpl) or (not conforming and (selector & 3 > vcpu.cpl or code.dpl != vcpu.cpl)):
            raise Fault(GP, selector & 0xFFFC)
        return Segment((selector & 0xFFFC) | vcpu.cpl, code.base, code.limit, code.flags | 0x100)

    def _jmp_far(self, instruction: Instruction) -> None:
        rip, selector = self._far_target(instruction)
        if self._switches_task(instruction, selector):
            return
        self.vcpu.set_segment(CS, self._transfer_segment(selector))
        self._next = rip

    def _call_far(self, instruction: Instruction) -> None:
        rip, selector = self._far_target(instruction)
        if self._switches_task(instruction, selector):
            return
        size = operand_size(instruction)
        code = self._transfer_segment(selector)
        self.push(self.vcpu.selector(CS), size)
        self.push(self._next, size)
        self.vcpu.set_segment(CS, code)
        self._next = rip

    def _ret_far(self, instruction: Instruction) -> None:
        vcpu = self.vcpu
        size = operand_size(instruction)
        rip, selector = self._peek(0, size), self._peek(size, size) & 0xFFFF
        release = int(instruction.cs.operands[0].imm) if instruction.cs.operands else 0
        code = self._return_segment(selector, vcpu.cpl)
        if selector & 3 > vcpu.cpl:
            new_sp, new_ss = self._peek(2 * size + release, size), self._peek(3 * size + release, size) & 0xFFFF
            stack = self._stack_segment(new_ss, selector & 3)
            vcpu.set_segment(CS, Segment(selector, code.base, code.limit, code.flags | 0x100))
            vcpu.set_segment(SS, stack)
            vcpu.set_cpl(selector & 3)
            vcpu.set_gpr(RSP, new_sp + release, 4)
            self._drop_inner_segments(selector & 3)
        else:
            self._drop(2 * size + release)
            vcpu.set_segment(CS, Segment(selector, code.base, code.limit, code.flags | 0x100))
        self._next = rip
