"""System instructions of 64-bit code, where they differ from 32-bit code: operand sizes, stacks, frames, descriptors.

In other code :class:`LongEmulator` is a :class:`~vmlab.vmm.emulate_real.RealModeEmulator`.
"""

from __future__ import annotations

from vmlab.ledger import Counts
from vmlab.machine.cpu import AC, IF, IOPL, NT, RF, TF, VM, Segment
from vmlab.machine.decode import Instruction
from vmlab.machine.delivery import Fault, read_descriptor
from vmlab.machine.msr import CSTAR, EFER_SCE, FS_BASE, GS_BASE, KERNEL_GS_BASE, LSTAR, STAR, SYSENTER_EIP, SYSENTER_ESP
from vmlab.machine.pc import Machine
from vmlab.machine.state import CS, GS, R11, RAX, RCX, RDX, RSP, SS
from vmlab.vmm.descriptors import DescriptorEmulator
from vmlab.vmm.emulate_real import RealModeEmulator
from vmlab.vmm.long_mode import LongModeCpu, canonical
from vmlab.vmm.operands import CONTROL, SEGMENTS, effective_address, operand_size, read_operand, write_operand
from vmlab.vmm.platform import VirtualPlatform
from vmlab.vmm.transfers import GP

_WORD = 0xFFFFFFFFFFFFFFFF
_ID = 1 << 21
_REX_W = 8
_CODE64, _CODE32, _DATA = 0x00AFFB00, 0x00CFFB00, 0x00CFF300
_ADDRESSES = frozenset({LSTAR, CSTAR, SYSENTER_ESP, SYSENTER_EIP, FS_BASE, GS_BASE, KERNEL_GS_BASE})
_RETURNED = 0xCD5 | TF | AC | _ID | IF | IOPL | VM | RF | NT     # what SYSRET takes from R11


def stack_size(instruction: Instruction) -> int:
    """Bytes that a push or pop of 64-bit code moves: 8, or 2 with the operand-size prefix."""
    return 2 if operand_size(instruction) == 2 else 8


def far_size(instruction: Instruction) -> int:
    """Operand size of IRET, far CALL, JMP and RET: 4, 8 with REX.W, or 2 with the operand-size prefix."""
    return 8 if instruction.cs.rex & _REX_W else operand_size(instruction)


class LongEmulator(RealModeEmulator):
    """Emulation for guests that may enter long mode."""

    vcpu: LongModeCpu

    def __init__(self, machine: Machine, vcpu: LongModeCpu, platform: VirtualPlatform, counts: Counts) -> None:
        super().__init__(machine, vcpu, platform, counts)
        self._legacy_mov_to_cr, self._legacy_mov_from_cr = self._by_op["mov_to_cr"], self._by_op["mov_from_cr"]
        self._legacy_wrmsr = self._by_op["wrmsr"]
        self._by_op |= {"swapgs": self._swapgs, "sysret": self._sysret, "mov_to_cr": self._mov_to_cr, "mov_from_cr": self._mov_from_cr,
                        "wrmsr": self._wrmsr, **LongDescriptors(vcpu, counts, self._privileged).by_op}
        self.registers.carries_long_mode = True

    @property
    def _long(self) -> bool:
        return self.vcpu.bits == 64

    # ---- the stack and the flags
    def push(self, value: int, size: int = 4) -> None:
        if not self._long:
            super().push(value, size)
            return
        vcpu = self.vcpu
        top = (vcpu.gpr(RSP) - size) & _WORD
        vcpu.write_linear(top, (value & ((1 << (8 * size)) - 1)).to_bytes(size, "little"), user=vcpu.cpl == 3)
        vcpu.set_gpr(RSP, top, 8)

    def _peek(self, offset: int, size: int = 4) -> int:
        if not self._long:
            return super()._peek(offset, size)
        vcpu = self.vcpu
        return int.from_bytes(vcpu.read_linear((vcpu.gpr(RSP) + offset) & _WORD, size, user=vcpu.cpl == 3), "little")

    def _drop(self, size: int) -> None:
        if not self._long:
            super()._drop(size)
            return
        self.vcpu.set_gpr(RSP, self.vcpu.gpr(RSP) + size, 8)

    def _pushf(self, instruction: Instruction) -> None:
        if not self._long:
            super()._pushf(instruction)
            return
        self.push(self.vcpu.eflags & 0xFCFFFF, stack_size(instruction))

    def _popf(self, instruction: Instruction) -> None:
        if not self._long:
            super()._popf(instruction)
            return
        size = stack_size(instruction)
        value = self._peek(0, size)
        self._drop(size)
        self._set_flags(value, size, self.vcpu.cpl)

    def _iret(self, instruction: Instruction) -> None:
        """IRET of 64-bit mode: the frame always has RSP and SS (SDM Vol. 2, IRET, IA-32e-MODE-RETURN)."""
        if not self._long:
            super()._iret(instruction)
            return
        vcpu, size, cpl = self.vcpu, far_size(instruction), self.vcpu.cpl
        if vcpu.eflags & NT:
            raise Fault(GP, 0)
        rip, selector, flags = self._peek(0, size), self._peek(size, size) & 0xFFFF, self._peek(2 * size, size)
        new_sp, new_ss = self._peek(3 * size, size), self._peek(4 * size, size) & 0xFFFF
        code = self._return_segment(selector, cpl)
        ring = selector & 3
        stack = self._long_stack(new_ss, ring, code)
        self._set_flags(flags, size, cpl)
        self._go_out(selector, code, stack, ring, cpl)
        vcpu.set_gpr(RSP, new_sp, 8 if code.flags & 1 << 21 else 4)
        self._next = rip

    def _long_stack(self, selector: int, ring: int, code: Segment) -> Segment:
        """SS of a far return; in 64-bit code above ring 3 it may be null."""
        if not selector & 0xFFFC and ring != 3 and code.flags & 1 << 21:
            return Segment(selector, 0, 0xFFFFFFFF, 0x00C09300 | ring << 13)
        return self._stack_segment(selector, ring)

    def _go_out(self, selector: int, code: Segment, stack: Segment, ring: int, cpl: int) -> None:
        vcpu = self.vcpu
        vcpu.set_segment(CS, Segment(selector, code.base, code.limit, code.flags | 0x100))
        vcpu.set_segment(SS, stack)
        vcpu.set_cpl(ring)
        if ring > cpl:
            self._drop_inner_segments(ring)

    # ---- segment registers
    def _push_seg(self, instruction: Instruction) -> None:
        if not self._long:
            super()._push_seg(instruction)
            return
        self.push(self.vcpu.selector(SEGMENTS[instruction.cs.operands[0].reg]), stack_size(instruction))

    def _pop_seg(self, instruction: Instruction) -> None:
        if not self._long:
            super()._pop_seg(instruction)
            return
        size = stack_size(instruction)
        self.load_segment(SEGMENTS[instruction.cs.operands[0].reg], self._peek(0, size) & 0xFFFF)
        self._drop(size)

    def load_segment(self, number: int, selector: int) -> None:
        if number == SS and self._long and not selector & 0xFFFC and self.vcpu.cpl != 3:
            self.vcpu.set_segment(SS, Segment(selector, 0, 0, 0))
            return
        super().load_segment(number, selector)

    # ---- far transfers
    def _far_target(self, instruction: Instruction) -> tuple[int, int]:
        if not self._long:
            return super()._far_target(instruction)
        size = far_size(instruction)
        address = effective_address(self.vcpu, instruction, instruction.cs.operands[0])
        raw = self.vcpu.read_linear(address, size + 2, user=self.vcpu.cpl == 3)
        return int.from_bytes(raw[:size], "little"), int.from_bytes(raw[size:], "little")

    def _call_far(self, instruction: Instruction) -> None:
        if not self._long:
            super()._call_far(instruction)
            return
        rip, selector = self._far_target(instruction)
        size = far_size(instruction)
        code = self._transfer_segment(selector)
        self.push(self.vcpu.selector(CS), size)
        self.push(self._next, size)
        self.vcpu.set_segment(CS, code)
        self._next = rip

    def _ret_far(self, instruction: Instruction) -> None:
        if not self._long:
            super()._ret_far(instruction)
            return
        vcpu, size, cpl = self.vcpu, far_size(instruction), self.vcpu.cpl
        rip, selector = self._peek(0, size), self._peek(size, size) & 0xFFFF
        release = int(instruction.cs.operands[0].imm) if instruction.cs.operands else 0
        code = self._return_segment(selector, cpl)
        ring = selector & 3
        if ring > cpl:
            new_sp, new_ss = self._peek(2 * size + release, size), self._peek(3 * size + release, size) & 0xFFFF
            self._go_out(selector, code, self._long_stack(new_ss, ring, code), ring, cpl)
            vcpu.set_gpr(RSP, new_sp + release, 8)
        else:
            self._drop(2 * size + release)
            vcpu.set_segment(CS, Segment(selector, code.base, code.limit, code.flags | 0x100))
        self._next = rip

    # ---- system calls
    def _sysret(self, instruction: Instruction) -> None:
        """SYSRET (APM Vol. 3): to 64-bit code with REX.W, else to 32-bit code; segments are flat, and no table is read."""
        vcpu = self.vcpu
        if not vcpu.efer & EFER_SCE:
            raise Fault(6)
        self._privileged()
        star = vcpu.msr(STAR) >> 48
        if not vcpu.long_mode:
            vcpu.set_interrupt_flag(True)
            code, next_rip = Segment(star | 3, 0, 0xFFFFFFFF, _CODE32), vcpu.gpr(RCX) & 0xFFFFFFFF
        else:
            wide = bool(instruction.cs.rex & _REX_W)
            vcpu.eflags = vcpu.eflags & ~_RETURNED | vcpu.gpr(R11) & _RETURNED
            code = Segment(star + 16 | 3, 0, 0xFFFFFFFF, _CODE64) if wide else Segment(star | 3, 0, 0xFFFFFFFF, _CODE32)
            next_rip = vcpu.gpr(RCX) if wide else vcpu.gpr(RCX) & 0xFFFFFFFF
        vcpu.set_segment(CS, code)
        vcpu.set_segment(SS, Segment(star + 8 | 3, 0, 0xFFFFFFFF, _DATA))
        vcpu.set_cpl(3)
        self._next = next_rip

    def _swapgs(self, _: Instruction) -> None:
        """SWAPGS exists in 64-bit mode only (SDM Vol. 2)."""
        if not self._long:
            raise Fault(6)
        self._privileged()
        vcpu = self.vcpu
        base = vcpu.segment(GS).base
        vcpu.set_segment_base(GS, vcpu.msrs[KERNEL_GS_BASE])
        vcpu.msrs[KERNEL_GS_BASE] = base

    # ---- registers
    def _mov_to_cr(self, instruction: Instruction) -> None:
        """CR8 is bits 4-7 of the local APIC's task priority (SDM Vol. 3A §10.8.6)."""
        target, source = instruction.cs.operands
        if CONTROL[target.reg] != 8:
            self._legacy_mov_to_cr(instruction)
            return
        self._privileged()
        value = read_operand(self.vcpu, instruction, source)
        if value > 15:
            raise Fault(GP, 0)
        self.counts["vmm.device"] += 1
        self.platform.lapic.set_tpr(value << 4)

    def _mov_from_cr(self, instruction: Instruction) -> None:
        target, source = instruction.cs.operands
        if CONTROL[source.reg] != 8:
            self._legacy_mov_from_cr(instruction)
            return
        self._privileged()
        self.counts["vmm.device"] += 1
        write_operand(self.vcpu, instruction, target, self.platform.lapic.tpr >> 4)

    def _wrmsr(self, instruction: Instruction) -> None:
        self._privileged()
        value = self.vcpu.gpr(RAX) & 0xFFFFFFFF | (self.vcpu.gpr(RDX) & 0xFFFFFFFF) << 32
        if self.vcpu.gpr(RCX) & 0xFFFFFFFF in _ADDRESSES and not canonical(value):
            raise Fault(GP, 0)
        self._legacy_wrmsr(instruction)


class LongDescriptors(DescriptorEmulator):
    """Descriptor tables of 64-bit code: bases have 64 bits, a task's descriptor 16 bytes (SDM Vol. 3A §3.5.2, §7.2.3)."""

    vcpu: LongModeCpu

    def _table_operand(self, instruction: Instruction) -> tuple[int, int]:
        if self.vcpu.bits != 64:
            return super()._table_operand(instruction)
        address = effective_address(self.vcpu, instruction, instruction.cs.operands[0])
        raw = self.vcpu.read_linear(address, 10, user=self.vcpu.cpl == 3)
        return int.from_bytes(raw[2:], "little"), int.from_bytes(raw[:2], "little")

    def _store_table(self, instruction: Instruction, table: Segment) -> None:
        if self.vcpu.bits != 64:
            super()._store_table(instruction, table)
            return
        address = effective_address(self.vcpu, instruction, instruction.cs.operands[0])
        self.vcpu.write_linear(address, table.limit.to_bytes(2, "little") + table.base.to_bytes(8, "little"), user=self.vcpu.cpl == 3)

    def _ltr(self, instruction: Instruction) -> None:
        vcpu = self.vcpu
        if not vcpu.long_mode:
            super()._ltr(instruction)
            return
        self._privileged()
        selector = read_operand(vcpu, instruction, instruction.cs.operands[0], 2) & 0xFFFF
        if not selector & 0xFFFC or selector & 4:
            raise Fault(GP, selector & 0xFFFC)
        task = read_descriptor(vcpu, selector)
        if (selector | 7) + 8 > vcpu.gdt.limit or task.flags >> 8 & 0x1F != 9:
            raise Fault(GP, selector & 0xFFFC)
        if not task.flags & 1 << 15:
            raise Fault(11, selector & 0xFFFC)
        at = vcpu.gdt.base + (selector & 0xFFF8)
        upper = int.from_bytes(vcpu.read_linear(at + 8, 4), "little")
        vcpu.tr = Segment(selector, upper << 32 | task.base, task.limit, task.flags | 0x200)
        vcpu.write_linear(at + 4, (task.flags | 0x200).to_bytes(4, "little"))
