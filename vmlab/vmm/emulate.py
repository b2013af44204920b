"""System instructions carried out on the virtual CPU, as the SDM's Vol. 2 describes each.

:meth:`Emulator.emulate` executes one instruction that trapped (or was called out) and moves RIP past
it. What the bare machine would have refused raises :class:`~vmlab.machine.delivery.Fault`, and the VMM
reflects that to the guest.
"""

from __future__ import annotations

from collections.abc import Callable

from vmlab.ledger import SYSTEM_INSTRUCTIONS, Counts
from vmlab.machine.cpu import DF, SYSENTER_CS, Segment
from vmlab.machine.decode import Instruction
from vmlab.machine.delivery import Fault
from vmlab.machine.msr import TSC_AUX
from vmlab.machine.paging import PageFault
from vmlab.machine.pc import Machine, cpuid, port_operands
from vmlab.machine.state import CS, DS, ES, FS, GS, RAX, RBX, RCX, RDI, RDX, RSI, RSP, SS
from vmlab.machine.syscalls import syscall, sysenter
from vmlab.vmm.descriptors import DescriptorEmulator
from vmlab.vmm.platform import VirtualPlatform
from vmlab.vmm.registers import RegisterEmulator
from vmlab.vmm.transfers import GP, TransferEmulator
from vmlab.vmm.vcpu import VirtualCpu

CPUID_OSXSAVE, CR4_OSXSAVE = 1 << 27, 1 << 18
CPUID_SMEP, CPUID_SMAP = 1 << 7, 1 << 20            # leaf 7, EBX
PF = 14
_EMULATED = {op: f"emulate.{op}" for op in (*SYSTEM_INSTRUCTIONS, "other")}
#: Segment-override prefixes.
_OVERRIDES = {0x26: ES, 0x2E: CS, 0x36: SS, 0x3E: DS, 0x64: FS, 0x65: GS}


class Emulator(TransferEmulator):
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
        self.machine.counter.pass_one()

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
        """The physical CPU's own answer, less what the guest cannot have. OSXSAVE mirrors CR4 (SDM Vol. 2, CPUID), here the virtual one."""
        vcpu = self.vcpu
        leaf, subleaf = vcpu.gpr(RAX) & 0xFFFFFFFF, vcpu.gpr(RCX) & 0xFFFFFFFF
        a, b, c, d = cpuid(leaf, subleaf)
        if leaf == 7 and not subleaf and not self.registers.guards_user_pages:
            b &= ~(CPUID_SMEP | CPUID_SMAP)
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
