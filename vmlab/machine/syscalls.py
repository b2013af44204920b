"""SYSENTER and SYSCALL, which do nothing in Unicorn: AMD's rules, for the CPU is an AMD one (APM Vol. 3).

SYSENTER exists in legacy mode only; SYSCALL in every mode, when EFER.SCE is on. Their ways back, SYSEXIT
and SYSRET, are Unicorn's own.
"""

from __future__ import annotations

from typing import Protocol

from vmlab.machine.cpu import IF, RF, SYSENTER_CS, VM, Segment
from vmlab.machine.delivery import GENERAL_PROTECTION, DeliveringCpu, Fault
from vmlab.machine.msr import CSTAR, EFER_SCE, LSTAR, SFMASK, STAR, SYSENTER_EIP, SYSENTER_ESP
from vmlab.machine.state import CS, HF_CS64, R11, RCX, RSP, SS

UNDEFINED = 6
_CODE32, _CODE64, _DATA = 0x00CF9B00, 0x00AF9B00, 0x00CF9300
_ALL = 0xFFFFFFFF


class CallingCpu(DeliveringCpu, Protocol):
    """What a system call needs of a CPU: the physical one, or a VMM's virtual one."""

    @property
    def efer(self) -> int: ...

    @property
    def hflags(self) -> int: ...

    def msr(self, number: int) -> int: ...

    def clear_flags(self, flags: int) -> None: ...


def _enter(cpu: CallingCpu, cs: int, code: int) -> None:
    """Ring 0 with flat segments that no table is read for."""
    cpu.set_segment(CS, Segment(cs, 0, _ALL, code))
    cpu.set_segment(SS, Segment(cs + 8, 0, _ALL, _DATA))
    cpu.set_cpl(0)
    cpu.clear_shadow()


def sysenter(cpu: CallingCpu) -> None:
    """SYSENTER; raises #UD in long mode, #GP in real mode or where IA32_SYSENTER_CS is null."""
    if cpu.long_mode:
        raise Fault(UNDEFINED)
    selector = cpu.msr(SYSENTER_CS) & 0xFFFC
    if not cpu.cr(0) & 1 or not selector:
        raise Fault(GENERAL_PROTECTION, 0)
    _enter(cpu, selector, _CODE32)
    cpu.clear_flags(IF | VM | RF)
    cpu.set_gpr(RSP, cpu.msr(SYSENTER_ESP))
    cpu.rip = cpu.msr(SYSENTER_EIP) & _ALL


def syscall(cpu: CallingCpu, next_rip: int) -> None:
    """SYSCALL; raises #UD where EFER.SCE is off or in real mode."""
    if not cpu.efer & EFER_SCE or not cpu.cr(0) & 1:
        raise Fault(UNDEFINED)
    star = cpu.msr(STAR)
    selector = star >> 32 & 0xFFFC
    if not cpu.long_mode:
        cpu.set_gpr(RCX, next_rip)
        _enter(cpu, selector, _CODE32)
        cpu.clear_flags(IF | VM | RF)
        cpu.rip = star & _ALL
        return
    flags = cpu.eflags & ~RF
    cpu.set_gpr(RCX, next_rip, 8)
    cpu.set_gpr(R11, flags, 8)
    target = cpu.msr(LSTAR if cpu.hflags & HF_CS64 else CSTAR)
    _enter(cpu, selector, _CODE64)
    cpu.eflags = flags & ~(cpu.msr(SFMASK) & _ALL)
    cpu.rip = target
