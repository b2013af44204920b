"""Model-specific registers: which exist, and what may be written to them.

Unicorn reads any unknown MSR as 0 and lets anything be written. The machine checks first: a register that is not in
:data:`MSRS` raises #GP, as does a value that the register refuses (APM Vol. 2 appendix A, SDM Vol. 4). What passes is
then Unicorn's to do, but for those registers that it does not keep.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmlab.machine.cpu import SYSENTER_CS
from vmlab.machine.delivery import GENERAL_PROTECTION, Fault
from vmlab.machine.devices import lapic
from vmlab.machine.paging import CR0_PG, EFER_NXE

if TYPE_CHECKING:
    from vmlab.machine.pc import Machine

TSC, APIC_BASE, SYSENTER_ESP, SYSENTER_EIP, PAT = 0x10, 0x1B, 0x175, 0x176, 0x277
EFER, STAR, LSTAR, CSTAR, SFMASK = 0xC0000080, 0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084
FS_BASE, GS_BASE, KERNEL_GS_BASE, TSC_AUX, VM_HSAVE_PA = 0xC0000100, 0xC0000101, 0xC0000102, 0xC0000103, 0xC0010117

#: The model-specific registers of this machine.
MSRS = {
    TSC: "time stamp counter: virtual nanoseconds", APIC_BASE: "local APIC: base (fixed), BSP, enable",
    SYSENTER_CS: "SYSENTER: code selector", SYSENTER_ESP: "SYSENTER: stack pointer", SYSENTER_EIP: "SYSENTER: entry point",
    PAT: "page attribute table (kept, no effect)",
    EFER: "extended features: SCE, LME, LMA, NXE, SVME, LMSLE, FFXSR", STAR: "SYSCALL: selectors, 32-bit entry point",
    LSTAR: "SYSCALL: entry point of 64-bit code", CSTAR: "SYSCALL: entry point of compatibility code", SFMASK: "SYSCALL: flags to clear",
    FS_BASE: "FS base", GS_BASE: "GS base", KERNEL_GS_BASE: "what SWAPGS swaps with", TSC_AUX: "what RDTSCP gives in ECX",
    VM_HSAVE_PA: "AMD-V: host save area",
}

_ALL = (1 << 64) - 1
#: Registers that are kept and have no effect on this machine: (what, value as firmware leaves it, bits that may be written; others raise #GP).
#: Performance counters count nothing; with one kind of memory there is nothing for the MTRRs to tell apart; there are no machine checks.
KEPT: dict[int, tuple[str, int, int]] = {
    0x8B: ("microcode patch level", 0, 0),
    0xFE: ("MTRR capabilities: 8 variable, fixed, write-combining", 0x508, 0),
    **{0x200 + 2 * i: ("MTRR: variable base", 0, 0xFFFF_FFFF_F0FF) for i in range(8)},
    **{0x201 + 2 * i: ("MTRR: variable mask", 0, 0xFFFF_FFFF_F800) for i in range(8)},
    **dict.fromkeys((592, 600, 601, *range(616, 624)), ("MTRR: fixed range, write-back", 434041037028460038, _ALL)),
    0x2FF: ("MTRR: enable, default write-back", 0xC06, 0xCFF),
    0x179: ("machine check: no banks", 0, 0),
    0x17A: ("machine check: global status", 0, 7),
    0x1D9: ("debug control", 0, 0),
    **{0xC0010000 + i: ("performance event select", 0, (1 << 42) - 1) for i in range(4)},
    **{0xC0010004 + i: ("performance counter", 0, (1 << 48) - 1) for i in range(4)},
    0xC0010010: ("system configuration", 0, 0xFFFFFFFF),
    0xC0010015: ("hardware configuration", 0, 0xFFFFFFFF),
    0xC0010114: ("AMD-V: control", 0, 0x1F),
    0xC0011020: ("load-store configuration", 0, _ALL),
    0xC0011029: ("decode configuration", 0, _ALL),
}
EFER_SCE, EFER_LME, EFER_LMA, EFER_SVME = 1 << 0, 1 << 8, 1 << 10, 1 << 12
_EFER_BITS = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE | EFER_SVME | 1 << 13 | 1 << 14
_ADDRESSES = frozenset({LSTAR, CSTAR, SYSENTER_ESP, SYSENTER_EIP, FS_BASE, GS_BASE, KERNEL_GS_BASE})
_BSP, _ON = 1 << 8, 1 << 11


def _refuse() -> None:
    raise Fault(GENERAL_PROTECTION, 0)


def check_kept(number: int, value: int) -> None:
    """Raise #GP where a register of :data:`KEPT` refuses ``value``."""
    if value & ~KEPT[number][2]:
        _refuse()


class Msrs:
    """RDMSR and WRMSR as far as Unicorn does not do them. The window is loaded."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.kept = {number: reset for number, (_, reset, _) in KEPT.items()}
        self.tsc_aux = 0

    def read(self, number: int, address: int) -> int | None:
        """The value of a register that the machine keeps, read by the RDMSR at ``address``; None: Unicorn keeps it.

        Raises #GP for an unknown one.
        """
        if number in self.kept:
            return self.kept[number]
        if number not in MSRS:
            _refuse()
        if number == TSC:
            return self._machine.read_tsc(address)
        if number == TSC_AUX:
            return self.tsc_aux
        if number == APIC_BASE:
            return lapic.BASE | _BSP | (_ON if self._machine.lapic.on else 0)
        return None

    def write(self, number: int, value: int, address: int) -> bool:
        """By the WRMSR at ``address``: whether the machine did it; False: Unicorn is to. Raises #GP for an unknown register or a refused value."""
        machine = self._machine
        if number in self.kept:
            check_kept(number, value)
            self.kept[number] = value
            return True
        if number not in MSRS:
            _refuse()
        if number in _ADDRESSES and (value + (1 << 47)) & 0xFFFFFFFFFFFFFFFF >= 1 << 48:
            _refuse()  # not canonical
        if number == EFER:
            changed = value ^ machine.cpu.efer
            if value & ~_EFER_BITS or (changed & EFER_LME and machine.cpu.cr(0) & CR0_PG):
                _refuse()
        elif number == PAT:
            if any(value >> 8 * i & 0xFF in (2, 3) or value >> 8 * i & 0xF8 for i in range(8)):
                _refuse()
        elif number == VM_HSAVE_PA:
            if value & 0xFFF or value >> 52:
                _refuse()
        elif number == TSC:
            machine.set_tsc(value, address)
            return True
        elif number == TSC_AUX:
            if value >> 32:
                _refuse()
            self.tsc_aux = value
            return True
        elif number == APIC_BASE:
            if value & ~_ON != lapic.BASE | _BSP:
                _refuse()  # the APIC does not move on this machine
            machine.lapic.set_on(bool(value & _ON))
            return True
        return False
