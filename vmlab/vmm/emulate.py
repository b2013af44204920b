"""System instructions carried out on the virtual CPU, as the SDM's Vol. 2 describes each.

:meth:`Emulator.emulate` executes one instruction that trapped (or was called out) and moves RIP past
it. What the bare machine would have refused raises :class:`~vmlab.machine.delivery.Fault`, and the VMM
reflects that to the guest.
"""

from __future__ import annotations

from collections.abc import Callable

from vmlab.ledger import SYSTEM_INSTRUCTIONS, Counts
from vmlab.machine import task
from vmlab.machine.cpu import DF, IF, IOPL, SYSENTER_CS, Segment
from vmlab.machine.decode import Instruction
from vmlab.machine.delivery import Fault, read_descriptor
from vmlab.machine.msr import TSC_AUX
from vmlab.machine.paging import PageFault
from vmlab.machine.pc import Machine, cpuid, port_operands
from vmlab.machine.state import CS, DS, ES, FS, GS, RAX, RBX, RCX, RDI, RDX, RSI, RSP, SS
from vmlab.machine.syscalls import syscall, sysenter
from vmlab.vmm.descriptors import DescriptorEmulator
from vmlab.vmm.operands import REGISTERS, SEGMENTS, effective_address, operand_size, read_operand, write_operand
from vmlab.vmm.platform import VirtualPlatform
from vmlab.vmm.registers import RegisterEmulator
from vmlab.vmm.vcpu import CHANGEABLE, VirtualCpu

CPUID_OSXSAVE, CR4_OSXSAVE = 1 << 27, 1 << 18
GP, PF = 13, 14
_EMULATED = {op: f"emulate.{op}" for op in (*SYSTEM_INSTRUCTIONS, "other")}
#: Segment-override prefixes.
_OVERRIDES = {0x26: ES, 0x2E: CS, 0x36: SS, 0x3E: DS, 0x64: FS, 0x65: GS}


class Emulator:
    """Emulation of every system instruction that a 32-bit guest kernel of one CPU may use."""

    def __init__(self, machine: Machine, vcpu: VirtualCpu, platform: VirtualPlatform, counts: Counts) -> None:
        self.machine, self.vcpu, self.platform, self.counts = machine, vcpu, platform, counts
        #: HLT with nothing pending: the VMM decides what waiting means.
        self.on_halt: Callable[[], None] = lambda: None
        self.registers = RegisterEmulator(machine, vcpu, platform.lapic, self._privileged)
        self._by_op: dict[str, Callable[[Instruction], None]] = {
            "cli": self._cli, "sti": self._sti, "hlt": self._hlt, "in": self._in, "out": self._out, "ins": self._ins, "outs": self._outs,
            "pushf": self._pushf, "popf": self._popf, "iret": self._iret, "cpuid": self._cpuid, "rdtsc": self._rdtsc, "rdtscp": self._rdtsc,
            "invd": self._nothing, "wbinvd": self._nothing, "sysenter": self._sysenter, "sysexit": self._sysexit, "syscall": self._syscall,
            "mov_from_seg": self._mov_from_seg, "push_seg": self._push_seg, "mov_to_seg": self._mov_to_seg, "pop_seg": self._pop_seg,
            "jmp_far": self._jmp_far, "call_far": self._call_far, "ret_far": self._ret_far, "load_far": self._load_far,
            **self.registers.by_op,
            **DescriptorEmulator(vcpu, counts, self._privileged).by_op,
        }

    def knows(self, op: str | None) -> bool:
        """Whether :meth:`emulate` can carry this instruction out."""
        return op in self._by_op

    def emulate(self, instruction: Instruction) -> None:
        """Carry out the instruction at the virtual CPU's RIP and move RIP on; raises Fault, RIP unmoved."""
        op = instruction.op
        assert op is not None
        vcpu = self.vcpu
        at, user, stack = vcpu.rip, vcpu.cpl == 3, vcpu.gpr(RSP)
        self._next = vcpu.advance(instruction.size)
        try:
            self._by_op[op](instruction)
        except (Fault, PageFault) as fault:
            if vcpu.rip == at:          # else it is a new task's fault
                vcpu.set_gpr(RSP, stack, 8)
            raise fault if isinstance(fault, Fault) else Fault(PF, fault.error_code, fault.address) from fault
        vcpu.rip = self._next
        self.count(op, user)
        if vcpu.shadow_at == at and op != "sti":
            vcpu.shadow_at = None

    def count(self, op: str, user: bool) -> None:
        """One guest instruction was completed by the VMM."""
        counts = self.counts
        counts[_EMULATED.get(op) or f"emulate.{op}"] += 1
        counts["vmm.emulate"] += 1
        counts["emulated.user" if user else "emulated.kernel"] += 1
        self.machine.counter.time += 1

    # ---- rights
    def _privileged(self) -> None:
        if self.vcpu.cpl != 0:
            raise Fault(GP, 0)

    def _io_right(self, port: int | None, size: int) -> None:
        """CPL against IOPL, then the guest's own I/O bitmap (SDM Vol. 1 §19.5)."""
        vcpu = self.vcpu
        if vcpu.cpl <= vcpu.iopl:
            return
        if port is not None and vcpu.tr.limit >= 0x67:
            base = int.from_bytes(vcpu.read_linear(vcpu.tr.base + 0x66, 2), "little")
            if base + port // 8 + 1 <= vcpu.tr.limit:
                bits = int.from_bytes(vcpu.read_linear(vcpu.tr.base + base + port // 8, 2), "little")
                if not (bits >> (port % 8)) & ((1 << size) - 1):
                    return
        raise Fault(GP, 0)

    # ---- interrupt flag
    def _cli(self, _: Instruction) -> None:
        self._io_right(None, 1)
        self.vcpu.set_interrupt_flag(False)

    def _sti(self, instruction: Instruction) -> None:
        self._io_right(None, 1)
        if not self.vcpu.interrupts_enabled:
            self.vcpu.shadow_at = self._next
        self.vcpu.set_interrupt_flag(True)

    def _hlt(self, _: Instruction) -> None:
        self._privileged()
        self.on_halt()

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

    # ---- ports
    def _in(self, instruction: Instruction) -> None:
        port, size = port_operands(instruction, self.vcpu.cpu)
        self._io_right(port, size)
        self.counts["vmm.device"] += 1
        self.vcpu.set_gpr(RAX, self.platform.port_read(port, size), size)

    def _out(self, instruction: Instruction) -> None:
        port, size = port_operands(instruction, self.vcpu.cpu)
        self._io_right(port, size)
        self.counts["vmm.device"] += 1
        self.platform.port_write(port, size, self.vcpu.gpr(RAX))

    def _ins(self, instruction: Instruction) -> None:
        self._string_io(instruction, RDI)

    def _outs(self, instruction: Instruction) -> None:
        self._string_io(instruction, RSI)

    def _string_base(self, instruction: Instruction, pointer: int) -> int:
        """INS stores through ES, OUTS reads through DS or what a prefix says; in 64-bit code only FS and GS have a base."""
        segment = ES if pointer == RDI else _OVERRIDES.get(instruction.cs.prefix[1], DS)
        return 0 if self.vcpu.bits == 64 and segment not in (FS, GS) else int(self.vcpu.segment(segment).base)

    def _string_io(self, instruction: Instruction, pointer: int) -> None:
        """INS and OUTS, with REP to the end: one element at a time through memory and bus."""
        vcpu = self.vcpu
        port, size = port_operands(instruction, vcpu.cpu)
        self._io_right(port, size)
        width = instruction.cs.addr_size
        mask = (1 << (8 * width)) - 1
        left = vcpu.gpr(RCX) & mask if instruction.rep else 1
        step = -size if vcpu.eflags & DF else size
        limit = 0xFFFFFFFFFFFFFFFF if vcpu.bits == 64 else 0xFFFFFFFF
        base = self._string_base(instruction, pointer)
        while left:
            address = (base + (vcpu.gpr(pointer) & mask)) & limit
            vcpu.mmu.translate(address, write=pointer == RDI, user=vcpu.cpl == 3)   # a fault must come before the device is touched
            self.counts["vmm.device"] += 1
            if pointer == RDI:
                value = self.platform.port_read(port, size)
                vcpu.write_linear(address, value.to_bytes(size, "little"), user=vcpu.cpl == 3)
            else:
                self.platform.port_write(port, size, int.from_bytes(vcpu.read_linear(address, size, user=vcpu.cpl == 3), "little"))
            vcpu.set_gpr(pointer, vcpu.gpr(pointer) + step, width)
            self.counts["emulate.string"] += 1
            left -= 1
            if instruction.rep:
                vcpu.set_gpr(RCX, left, width)

    # ---- identification and time
    def _cpuid(self, _: Instruction) -> None:
        """The physical CPU's own answer: nothing is masked. OSXSAVE mirrors CR4 (SDM Vol. 2, CPUID), here the virtual one."""
        vcpu = self.vcpu
        leaf = vcpu.gpr(RAX) & 0xFFFFFFFF
        a, b, c, d = cpuid(leaf, vcpu.gpr(RCX) & 0xFFFFFFFF)
        if leaf == 1:
            c = c & ~CPUID_OSXSAVE | (CPUID_OSXSAVE if vcpu.cr(4) & CR4_OSXSAVE else 0)
        vcpu.set_gpr(RAX, a)
        vcpu.set_gpr(RBX, b)
        vcpu.set_gpr(RCX, c)
        vcpu.set_gpr(RDX, d)

    def _rdtsc(self, instruction: Instruction) -> None:
        if self.vcpu.cr(4) & 4 and self.vcpu.cpl != 0:
            raise Fault(GP, 0)
        tsc = self.registers.read_tsc()
        self.vcpu.set_gpr(RAX, tsc)
        self.vcpu.set_gpr(RDX, tsc >> 32)
        if instruction.op == "rdtscp":
            self.vcpu.set_gpr(RCX, self.registers.msrs[TSC_AUX])

    def _nothing(self, _: Instruction) -> None:
        """INVD, WBINVD: the machine has no caches."""
        self._privileged()

    # ---- system calls, where the CPU may not enter the guest's kernel by itself
    def _sysenter(self, _: Instruction) -> None:
        sysenter(self.vcpu)
        self._next = self.vcpu.rip

    def _syscall(self, _: Instruction) -> None:
        syscall(self.vcpu, self._next)
        self._next = self.vcpu.rip

    def _sysexit(self, _: Instruction) -> None:
        """SYSEXIT in legacy mode (APM Vol. 3): flat user segments, ESP from ECX, EIP from EDX."""
        vcpu = self.vcpu
        selector = vcpu.msr(SYSENTER_CS) & 0xFFFC
        if not selector:
            raise Fault(GP, 0)
        self._privileged()
        self._next, stack = vcpu.gpr(RDX) & 0xFFFFFFFF, vcpu.gpr(RCX)
        vcpu.set_segment(CS, Segment(selector + 16 | 3, 0, 0xFFFFFFFF, 0x00CFFB00))
        vcpu.set_segment(SS, Segment(selector + 24 | 3, 0, 0xFFFFFFFF, 0x00CFF300))
        vcpu.set_cpl(3)
        vcpu.set_gpr(RSP, stack)

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
