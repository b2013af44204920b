"""The CPU's architectural state as named registers, over a window onto Unicorn's memory.

Inside a hook: :meth:`Cpu.load` first, :meth:`Cpu.store` last; with a live window both are free.
Descriptor caches and CPL are set together with the flags that QEMU derives from them.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from unicorn import x86_const as x86

from vmlab.machine import paging
from vmlab.machine.engine import Engine
from vmlab.machine.memory import PAGE, Ram
from vmlab.machine.state import (
    AT_CR,
    AT_EFER,
    AT_EFLAGS,
    AT_EIP,
    AT_GDT,
    AT_HFLAGS,
    AT_HFLAGS2,
    AT_IDT,
    AT_LDT,
    AT_SEGMENTS,
    AT_TR,
    CS,
    DS,
    ES,
    HF_ADDSEG,
    HF_CPL,
    HF_CS32,
    HF_CS64,
    HF_GUEST,
    HF_LMA,
    HF_PE,
    HF_SHADOW,
    HF_SS32,
    SS,
    Layout,
    Window,
)

CF, PF, AF, ZF, SF, TF, IF, DF, OF = 1, 4, 16, 64, 128, 1 << 8, 1 << 9, 1 << 10, 1 << 11
IOPL, NT, RF, VM, AC = 3 << 12, 1 << 14, 1 << 16, 1 << 17, 1 << 18
_SMEP = 1 << 20                     # CR4
ARITHMETIC = CF | PF | AF | ZF | SF | OF

SYSENTER_CS = 0x174
_CC_SRC, _CC_OP, _DF = 152, 168, 172   # lazily evaluated flags (QEMU target/i386/cpu.h)
_CC_OP_EFLAGS = 1                      # "the flags are in cc_src"
_BASE_OF_DS, _BASE_OF_ES, _BASE_OF_SS = ((AT_SEGMENTS + 24 * number) // 8 + 1 for number in (DS, ES, SS))
_TABLES = {"gdt": AT_GDT, "idt": AT_IDT, "ldt": AT_LDT, "tr": AT_TR}


class Segment(NamedTuple):
    """A descriptor cache: ``flags`` is the descriptor's high doubleword (SDM Vol. 3A figure 3-8)."""

    selector: int
    base: int
    limit: int
    flags: int

    @property
    def dpl(self) -> int:
        return (self.flags >> 13) & 3


def unpack_descriptor(raw: bytes, selector: int) -> Segment:
    """The cache that loading this 8-byte descriptor gives."""
    low, high = struct.unpack("<II", raw)
    base = (low >> 16) | ((high & 0xFF) << 16) | (high & 0xFF000000)
    limit = (low & 0xFFFF) | (high & 0xF0000)
    if high & 0x800000:
        limit = (limit << 12) | 0xFFF
    return Segment(selector, base, limit, high)


class Cpu:
    """Registers of the physical CPU. Values are unsigned."""

    virtual_8086 = True

    def __init__(self, engine: Engine, ram: Ram, window: Window, layout: Layout) -> None:
        self.engine, self.ram, self.window, self.layout = engine, ram, window, layout
        self._u64, self._u32, self._i32 = window.u64, window.u32, window.i32
        #: hpa of the nested tables that guest-physical addresses go through while the CPU is in guest mode; 0: none.
        self.nested_root = 0
        self.load, self.store = window.load, window.store
        self._error_code = layout.error_code // 4
        self._is_int = layout.exception_is_int // 4
        self._old_exception = layout.old_exception // 4

    # ---- plain registers
    @property
    def gprs(self) -> memoryview:
        """The general registers by number, 64 bits each: for whoever reads several."""
        return self._u64

    def gpr(self, number: int) -> int:
        return self._u64[number]

    def set_gpr(self, number: int, value: int, size: int = 4) -> None:
        """Write a general register as an instruction of operand size ``size`` bytes would."""
        if size >= 4:
            self._u64[number] = value & (0xFFFFFFFF if size == 4 else 0xFFFFFFFFFFFFFFFF)
        else:
            mask = (1 << (8 * size)) - 1
            self._u64[number] = (self._u64[number] & ~mask) | (value & mask)

    @property
    def rip(self) -> int:
        return self._u64[AT_EIP // 8]

    @rip.setter
    def rip(self, value: int) -> None:
        self._u64[AT_EIP // 8] = value

    @property
    def cpl(self) -> int:
        return self._u32[AT_HFLAGS // 4] & HF_CPL

    @property
    def shadow(self) -> bool:
        """The STI or MOV SS shadow: no interrupt before the next instruction has ended."""
        return bool(self._u32[AT_HFLAGS // 4] & HF_SHADOW)

    @property
    def hflags(self) -> int:
        return self._u32[AT_HFLAGS // 4]

    @hflags.setter
    def hflags(self, value: int) -> None:
        self._u32[AT_HFLAGS // 4] = value

    @property
    def hflags2(self) -> int:
        """AMD-V's global interrupt flag and what belongs to guest mode."""
        return self._u32[AT_HFLAGS2 // 4]

    @hflags2.setter
    def hflags2(self, value: int) -> None:
        self._u32[AT_HFLAGS2 // 4] = value

    @property
    def long_mode(self) -> bool:
        return bool(self.hflags & HF_LMA)

    @property
    def system_flags(self) -> int:
        """EFLAGS without the arithmetic flags and DF, which are evaluated lazily: cheap."""
        return self._u64[AT_EFLAGS // 8]

    @property
    def eflags(self) -> int:
        """The whole of EFLAGS."""
        # Unicorn leaves a copy of the arithmetic flags here before a hooked instruction; later it is stale.
        system = self._u64[AT_EFLAGS // 8] & ~(ARITHMETIC | DF)
        if self._u32[_CC_OP // 4] == _CC_OP_EFLAGS:
            return system | (self._u64[_CC_SRC // 8] & ARITHMETIC) | (self._i32[_DF // 4] & DF)
        return system | (self.engine.read_register(x86.UC_X86_REG_EFLAGS) & (ARITHMETIC | DF))

    @eflags.setter
    def eflags(self, value: int) -> None:
        self._u64[_CC_SRC // 8] = value & ARITHMETIC
        self._u32[_CC_OP // 4] = _CC_OP_EFLAGS
        self._i32[_DF // 4] = -1 if value & DF else 1
        self._u64[AT_EFLAGS // 8] = (value & ~(ARITHMETIC | DF)) | 2

    def set_interrupt_flag(self, on: bool) -> None:
        flags = self._u64[AT_EFLAGS // 8]
        self._u64[AT_EFLAGS // 8] = flags | IF if on else flags & ~IF

    def clear_flags(self, flags: int) -> None:
        """Clear system flags of EFLAGS; the arithmetic ones stay as lazy as they are."""
        self._u64[AT_EFLAGS // 8] &= ~flags

    def msr(self, number: int) -> int:
        """An MSR of the system-call instructions."""
        at = self.layout.msrs[number]
        return self._u32[at // 4] if number == SYSENTER_CS else self._u64[at // 8]

    def set_msr(self, number: int, value: int) -> None:
        """Write one of the 64-bit MSRs of SYSCALL (STAR, LSTAR, CSTAR, SFMASK)."""
        self._u64[self.layout.msrs[number] // 8] = value

    def cr(self, number: int) -> int:
        return self._u64[AT_CR // 8 + number]

    @property
    def efer(self) -> int:
        return self._u64[AT_EFER // 8]

    def set_cr(self, number: int, value: int) -> None:
        """Write CR0, CR3 or CR4 with all that follows from it (mode bits, TLB). Not for CR2: see ``cr2``."""
        register = {0: x86.UC_X86_REG_CR0, 3: x86.UC_X86_REG_CR3, 4: x86.UC_X86_REG_CR4}[number]
        self.store()
        self.engine.write_register(register, value)
        self.engine.on_flush()
        self.load()

    def set_crs(self, cr0: int, cr3: int, cr4: int, *, told: bool = True) -> None:
        """CR4, CR3 and CR0 in one go, as a world switch loads them. ``told``: the TLB model hears of it as a flush."""
        self.store()
        for register, value in ((x86.UC_X86_REG_CR4, cr4), (x86.UC_X86_REG_CR3, cr3), (x86.UC_X86_REG_CR0, cr0)):
            self.engine.write_register(register, value)
        if told:
            self.engine.on_flush()
        self.load()

    def debug_register(self, number: int) -> int:
        return self._u64[self.layout.debug_registers // 8 + number]

    def set_debug_register(self, number: int, value: int) -> None:
        """The register alone: no breakpoint follows from it (the machine has none)."""
        self._u64[self.layout.debug_registers // 8 + number] = value

    def set_efer(self, value: int) -> None:
        """Write EFER (and keep LMA in step); the CPU must not be running translated code of another mode."""
        self._u64[AT_EFER // 8] = value
        self.hflags = (self.hflags & ~HF_LMA) | (HF_LMA if value & paging.EFER_LMA else 0)

    @property
    def cr2(self) -> int:
        return self._u64[AT_CR // 8 + 2]

    @cr2.setter
    def cr2(self, value: int) -> None:
        self._u64[AT_CR // 8 + 2] = value

    # ---- the exception being taken
    @property
    def error_code(self) -> int:
        return self._u32[self._error_code]

    @property
    def is_software_interrupt(self) -> bool:
        return bool(self._u32[self._is_int])

    def forget_exception(self) -> None:
        """Undo QEMU's double-fault bookkeeping: the machine does its own (Unicorn never clears it)."""
        self._i32[self._old_exception] = -1
        self._u32[self._is_int] = 0

    # ---- segments and tables
    def segment(self, number: int) -> Segment:
        at = AT_SEGMENTS + 24 * number
        u32 = self._u32
        return Segment(u32[at // 4], self._u64[at // 8 + 1], u32[at // 4 + 4], u32[at // 4 + 5])

    def selector(self, number: int) -> int:
        return self._u32[(AT_SEGMENTS + 24 * number) // 4]

    def task_selector(self, number: int) -> int:
        """What a task switch saves of a segment register."""
        return self.selector(number)

    def table(self, name: str) -> Segment:
        """"gdt", "idt", "ldt" or "tr" (selector, base, limit, flags)."""
        at = _TABLES[name]
        u32 = self._u32
        return Segment(u32[at // 4], self._u64[at // 8 + 1], u32[at // 4 + 4], u32[at // 4 + 5])

    def set_table(self, name: str, value: Segment) -> None:
        self._put(_TABLES[name], value)

    def _put(self, at: int, s: Segment) -> None:
        u32 = self._u32
        u32[at // 4], self._u64[at // 8 + 1], u32[at // 4 + 4], u32[at // 4 + 5] = s.selector, s.base, s.limit, s.flags

    def set_segment(self, number: int, value: Segment) -> None:
        """Fill a descriptor cache and the mode bits that follow from it (QEMU cpu_x86_load_seg_cache)."""
        self._put(AT_SEGMENTS + 24 * number, value)
        hflags = self.hflags
        if number == CS:
            code64 = bool(hflags & HF_LMA) and bool(value.flags & (1 << 21))
            hflags &= ~(HF_CS32 | HF_CS64)
            hflags |= (HF_CS64 | HF_CS32) if code64 else (HF_CS32 if value.flags & (1 << 22) else 0)
        elif number == SS:
            hflags = (hflags & ~(HF_SS32 | HF_CPL)) | (HF_SS32 if value.flags & (1 << 22) else 0)
            hflags |= value.dpl if hflags & HF_PE else 0
        hflags &= ~HF_ADDSEG
        if not hflags & HF_CS64:
            protected32 = hflags & HF_PE and hflags & HF_CS32 and not self.system_flags & VM
            bases = self._u64[_BASE_OF_DS] | self._u64[_BASE_OF_ES] | self._u64[_BASE_OF_SS]
            hflags |= 0 if protected32 and not bases else HF_ADDSEG
        else:
            hflags |= HF_SS32
        self.hflags = hflags

    def reset(self) -> None:
        """Power-on state, but for RIP: real mode, flat tables at 0 (SDM Vol. 3A table 9-1). Unicorn starts in long mode."""
        self.load()
        self.set_efer(0)
        self.hflags &= ~(HF_CS64 | HF_CPL)
        self.eflags = 2
        for name in ("gdt", "idt"):
            self.set_table(name, Segment(0, 0, 0xFFFF if name == "gdt" else 0x3FF, 0))
        self.set_table("tr", Segment(0, 0, 0, 0x8900))
        self.set_table("ldt", Segment(0, 0, 0, 0x8200))
        self.set_cr(4, 0)
        self.set_cr(0, 0x10)
        for number in range(6):
            self.set_segment(number, Segment(0, 0, 0xFFFF, 0x9B00 if number == CS else 0x9300))
        self.store()

    def enter_protected(self, rip: int, code: Segment, data: Segment) -> None:
        """32-bit protected mode without paging, at ``rip``: the state a Multiboot loader leaves, flags clear."""
        self.load()
        self.set_cr(0, 0x11)
        for number in range(6):
            self.set_segment(number, code if number == CS else data)
        self.eflags = 2
        self.rip = rip
        self.store()

    def clear_shadow(self) -> None:
        """End the interrupt shadow."""
        self.hflags &= ~HF_SHADOW

    def set_cpl(self, cpl: int) -> None:
        self.hflags = (self.hflags & ~HF_CPL) | cpl

    # ---- memory through the CPU's own translation, with supervisor rights
    @property
    def tables(self) -> paging.Tables:
        return paging.Tables(self.cr(0), self.cr(3), self.cr(4), self.efer)

    def read_linear(self, address: int, size: int, *, user: bool = False) -> bytes:
        """Bytes at a linear address; raises :class:`~vmlab.machine.paging.PageFault`."""
        return b"".join(self.ram.read(pa, n) for pa, n in self.pieces(address, size, write=False, user=user))

    def write_linear(self, address: int, data: bytes, *, user: bool = False) -> None:
        """Store at a linear address, all of it or nothing; raises :class:`~vmlab.machine.paging.PageFault`."""
        done = 0
        for pa, n in self.pieces(address, len(data), write=True, user=user):
            self.ram.write(pa, data[done:done + n])
            done += n

    def can_fetch(self, address: int) -> bool:
        """Whether the CPU as it stands could run code at a linear address; leaves no trace in the tables."""
        tables = self.tables
        if not tables.cr0 & paging.CR0_PG:
            return True
        nested = paging.NestedMemory(self.ram, self.nested_root) if self.nested_root and self.hflags & HF_GUEST else None
        try:
            found = paging.walk(nested or self.ram, tables, address, 0, mark=False)
            if nested is not None:
                nested.hpa(found.frame | address & ((1 << found.shift) - 1), write=False)
        except (paging.PageFault, paging.NestedFault):
            return False
        return not found.no_execute and (found.user if self.cpl == 3 else not (found.user and tables.cr4 & _SMEP))

    def pieces(self, address: int, size: int, *, write: bool, user: bool) -> list[tuple[int, int]]:
        nested = paging.NestedMemory(self.ram, self.nested_root) if self.nested_root and self.hflags & HF_GUEST else None
        if nested is None and not self.cr(0) & paging.CR0_PG and not address >> 32 and 0 < size <= PAGE - address % PAGE:
            return [(address, size)]
        limit = 0xFFFFFFFFFFFFFFFF if self.long_mode else 0xFFFFFFFF
        tables, pieces = self.tables, []
        while size > 0:
            address &= limit
            n = min(size, PAGE - address % PAGE)
            at = paging.translate(nested or self.ram, tables, address, write=write, user=user)
            pieces.append((nested.hpa(at, write=write) if nested else at, n))
            address, size = address + n, size - n
        return pieces
