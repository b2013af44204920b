"""Control, debug and model-specific registers of a virtual CPU, and the instructions that read and write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vmlab.errors import UnsupportedByStrategy
from vmlab.machine.cpu import SYSENTER_CS
from vmlab.machine.decode import Instruction
from vmlab.machine.delivery import Fault
from vmlab.machine.devices import lapic
from vmlab.machine.msr import (
    APIC_BASE,
    CSTAR,
    EFER,
    EFER_SCE,
    FS_BASE,
    GS_BASE,
    KEPT,
    KERNEL_GS_BASE,
    LSTAR,
    PAT,
    SFMASK,
    STAR,
    SYSENTER_EIP,
    SYSENTER_ESP,
    TSC,
    TSC_AUX,
    check_kept,
)
from vmlab.machine.paging import CR4_BITS, CR4_FLUSHING, CR4_SMAP, CR4_SMEP, EFER_LMA, EFER_LME, EFER_NXE
from vmlab.machine.pc import Machine
from vmlab.machine.state import FS, GS, RAX, RCX, RDX
from vmlab.vmm.operands import CONTROL, DEBUG, effective_address, read_operand, write_operand
from vmlab.vmm.vcpu import VirtualCpu

GP, UD = 13, 6
_EFER_BITS = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE
_PAT_AT_RESET = 0x0007040600070406
_BSP, _APIC_ON = 1 << 8, 1 << 11
_WORD = 0xFFFFFFFFFFFFFFFF
#: Registers that a VMM under hardware assistance may leave to its guest: nothing of the VMM's depends on them.
HARMLESS_MSRS = (SYSENTER_CS, SYSENTER_ESP, SYSENTER_EIP, PAT, STAR, LSTAR, CSTAR, SFMASK, FS_BASE, GS_BASE, KERNEL_GS_BASE, TSC_AUX)


class RegisterEmulator:
    """The guest's registers as it wrote them, and what follows from a write.

    :param apic: the guest's local APIC.
    :param privileged: raises #GP above virtual CPL 0.
    """

    def __init__(self, machine: Machine, vcpu: VirtualCpu, apic: lapic.Lapic, privileged: Callable[[], None]) -> None:
        self.apic = apic
        self._machine, self._vcpu, self._privileged = machine, vcpu, privileged
        vcpu.write_cr = self.write_cr       # a task switch loads CR0 and CR3 too
        #: Whether this VMM can run 64-bit code of its guest's.
        self.carries_long_mode = False
        #: Whether the CPU keeps the guest's kernel out of its users' pages: SMEP and SMAP. A kernel above ring 0 has neither.
        self.guards_user_pages = True
        #: A control register or EFER was written: page tables may have to follow. True when the TLB is void as well.
        self.on_paging: Callable[[bool], None] = lambda flush: None
        self.on_invlpg: Callable[[int], None] = lambda address: None
        #: The guest set its time stamp counter: the new difference to the machine's.
        self.on_tsc: Callable[[int], None] = lambda offset: None
        self.tsc_offset = 0
        self.debug = [0] * 8
        self.msrs = vcpu.msrs
        self.msrs.update(dict.fromkeys(HARMLESS_MSRS, 0) | {PAT: _PAT_AT_RESET} | {number: reset for number, (_, reset, _) in KEPT.items()})
        self.by_op: dict[str, Callable[[Instruction], None]] = {
            "mov_to_cr": self._mov_to_cr, "mov_from_cr": self._mov_from_cr, "mov_to_dr": self._mov_to_dr, "mov_from_dr": self._mov_from_dr,
            "smsw": self._smsw, "lmsw": self._lmsw, "clts": self._clts, "invlpg": self._invlpg, "rdmsr": self._rdmsr, "wrmsr": self._wrmsr,
        }

    def read_tsc(self) -> int:
        """The guest's time stamp counter."""
        return (self._machine.read_tsc() + self.tsc_offset) & _WORD

    def state(self) -> dict[str, Any]:
        """What is in neither the virtual CPU nor its MMU."""
        return {"tsc_offset": self.tsc_offset, "debug": list(self.debug)}

    def from_state(self, state: dict[str, Any]) -> None:
        self.tsc_offset, self.debug[:] = state["tsc_offset"], state["debug"]

    # ---- control registers
    def _mov_to_cr(self, instruction: Instruction) -> None:
        self._privileged()
        target, source = instruction.cs.operands
        self.write_cr(CONTROL[target.reg], read_operand(self._vcpu, instruction, source))

    def write_cr(self, number: int, value: int) -> None:
        """A guest's write to CR0, CR2, CR3 or CR4; raises Fault as the CPU would."""
        mmu = self._vcpu.mmu
        if number == 2:
            self._vcpu.cr2 = value
            return
        write = {0: mmu.write_cr0, 3: mmu.write_cr3, 4: mmu.write_cr4}.get(number)
        if write is None:
            raise Fault(UD)
        if number == 4 and value & ~(CR4_BITS if self.guards_user_pages else CR4_BITS & ~(CR4_SMEP | CR4_SMAP)):
            raise Fault(GP, 0)
        flush = number == 3 or (number == 4 and bool((value ^ mmu.cr4) & CR4_FLUSHING))
        write(value)
        self.on_paging(flush)

    def _mov_from_cr(self, instruction: Instruction) -> None:
        self._privileged()
        target, source = instruction.cs.operands
        number = CONTROL[source.reg]
        if number not in (0, 2, 3, 4):
            raise Fault(UD)
        write_operand(self._vcpu, instruction, target, self._vcpu.cr(number))

    def _lmsw(self, instruction: Instruction) -> None:
        self._privileged()
        value = read_operand(self._vcpu, instruction, instruction.cs.operands[0], 2)
        self.write_cr(0, (self._vcpu.cr(0) & ~0xE) | (value & 0xE) | (value & 1))

    def _smsw(self, instruction: Instruction) -> None:
        write_operand(self._vcpu, instruction, instruction.cs.operands[0], self._vcpu.cr(0), 2)

    def _clts(self, _: Instruction) -> None:
        self._privileged()
        self.write_cr(0, self._vcpu.cr(0) & ~8)

    def _invlpg(self, instruction: Instruction) -> None:
        self._privileged()
        self.on_invlpg(effective_address(self._vcpu, instruction, instruction.cs.operands[0]))

    # ---- debug registers: kept, without breakpoints
    def _mov_to_dr(self, instruction: Instruction) -> None:
        self._privileged()
        target, source = instruction.cs.operands
        self.debug[DEBUG[target.reg]] = read_operand(self._vcpu, instruction, source)

    def _mov_from_dr(self, instruction: Instruction) -> None:
        self._privileged()
        target, source = instruction.cs.operands
        write_operand(self._vcpu, instruction, target, self.debug[DEBUG[source.reg]])

    # ---- model-specific registers
    def _rdmsr(self, _: Instruction) -> None:
        self._privileged()
        number = self._vcpu.gpr(RCX) & 0xFFFFFFFF
        if number == EFER:
            value = self._vcpu.mmu.efer
        elif number == TSC:
            value = self.read_tsc()
        elif number == APIC_BASE:
            value = lapic.BASE | _BSP | (_APIC_ON if self.apic.on else 0)
        elif number in (FS_BASE, GS_BASE):
            value = self._vcpu.segment(FS if number == FS_BASE else GS).base
        elif number in self.msrs:
            value = self.msrs[number]
        else:
            raise Fault(GP, 0)
        self._vcpu.set_gpr(RAX, value)
        self._vcpu.set_gpr(RDX, value >> 32)

    def _wrmsr(self, _: Instruction) -> None:
        self._privileged()
        vcpu = self._vcpu
        number = vcpu.gpr(RCX) & 0xFFFFFFFF
        value = (vcpu.gpr(RAX) & 0xFFFFFFFF) | (vcpu.gpr(RDX) & 0xFFFFFFFF) << 32
        if number == EFER:
            self.write_efer(value)
        elif number == TSC:
            self.tsc_offset = (value - self._machine.read_tsc()) & _WORD
            self.on_tsc(self.tsc_offset)
        elif number == APIC_BASE:
            if value & ~_APIC_ON != lapic.BASE | _BSP:
                raise Fault(GP, 0)      # it does not move on this machine
            self.apic.set_on(bool(value & _APIC_ON))
        elif number in (FS_BASE, GS_BASE):
            vcpu.set_segment_base(FS if number == FS_BASE else GS, value)
        elif number in self.msrs:
            if number in KEPT:
                check_kept(number, value)
            self.msrs[number] = value
        else:
            raise Fault(GP, 0)

    def write_efer(self, value: int) -> None:
        """The extended feature enable register (APM Vol. 2 §3.1.7): SCE, LME, NXE exist for the guest."""
        if value & ~_EFER_BITS:
            raise Fault(GP, 0)
        if value & EFER_LME and not self.carries_long_mode:
            raise UnsupportedByStrategy(
                "the guest turns long mode on (EFER.LME), and this VMM cannot carry a 64-bit kernel: in 64-bit mode "
                "segments have no limits, and ring 1, where it would run the kernel, is supervisor to paging as the VMM is, "
                "so nothing protects the VMM from it (vmm/long_monitor.py does it at ring 3)")
        self._vcpu.mmu.write_efer(value)
        self.on_paging(False)
