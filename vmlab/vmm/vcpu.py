"""The guest's virtual CPU under deprivileging: what the guest believes, kept beside what is true.

The guest's kernel runs at CPL 1 and its users at CPL 3. General registers, data segments and arithmetic
flags are the physical CPU's own; privileged state (IF and IOPL, control registers, descriptor tables,
task register) is virtual and lives here. The class has the same surface as
:class:`vmlab.machine.cpu.Cpu`, so that the machine's own delivery through an IDT serves to deliver into
the guest as well: its tables are then the guest's, its privilege levels virtual.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from dataclasses import dataclass

from vmlab.errors import GuestRefused
from vmlab.machine.cpu import AC, IF, IOPL, NT, RF, TF, VM, Cpu, Segment, unpack_descriptor
from vmlab.machine.memory import PAGE
from vmlab.machine.paging import PageFault
from vmlab.machine.state import CS, SS
from vmlab.vmm.guest_tables import GuestMmu
from vmlab.vmm.space import HOLE, StaticSpace

SHADOW_GDT = HOLE                   # linear; 64 KiB, the largest a GDT can be
KERNEL_RING = 1
_VIRTUAL_FLAGS = IF | IOPL
_PRESENT, _CODE_OR_DATA = 1 << 15, 1 << 12
_NO_TABLE = Segment(0, 0, 0, 0)
# Words that native/events.c shares (``virtual_cpu`` in machine.h): the address of the flags, the shadow, INTR, the address where a
# translator notes INTR, and that of its callout's number; then the flags themselves.
FLAGS_AT, _SHADOW_AT, _PENDING, NOTED_AT, SITE_AT, _OWN_FLAGS = range(6)
_NO_SHADOW = 0xFFFFFFFFFFFFFFFF


@dataclass
class Interpreted:
    """What is virtual while the VMM interprets the guest's code: RIP and the segments, as the guest knows them."""

    rip: int
    segments: dict[int, Segment]


def _no_registers(number: int, value: int) -> None:
    raise AssertionError(f"nobody emulates this CPU's CR{number}")


def compress(segment: Segment) -> Segment:
    """A descriptor as the deprivileged guest gets it: ring 0 becomes ring 1 (ring compression)."""
    if segment.dpl == 0:
        return Segment(segment.selector, segment.base, segment.limit, segment.flags | KERNEL_RING << 13)
    return segment


class VirtualCpu:
    """Virtual privileged state over a physical :class:`~vmlab.machine.cpu.Cpu`.

    ``true_selectors``: frames and stores show the guest its own selectors (possible only where every
    instruction that uses them traps); otherwise they show ring 1, and IRET runs on the hardware.
    """

    virtual_8086 = False        # it would run at ring 3 with IF and IOPL of the CPU's own

    def __init__(self, cpu: Cpu, space: StaticSpace, mmu: GuestMmu, *, true_selectors: bool) -> None:
        self.cpu, self.space, self.mmu, self.true_selectors = cpu, space, mmu, true_selectors
        memory = (ctypes.c_uint64 * 6)()
        #: See above; at this address in the process.
        self.words, self.words_at = memoryview(memory).cast("B").cast("Q"), ctypes.addressof(memory)
        self.words[FLAGS_AT], self.words[_SHADOW_AT] = self.words_at + 8 * _OWN_FLAGS, _NO_SHADOW
        self.cr2 = 0
        #: Model-specific registers by number, but for those that live elsewhere.
        self.msrs: dict[int, int] = {}
        self.gdt = self.idt = _NO_TABLE
        self.ldt = Segment(0, 0, 0, 0x8200)
        self.tr = Segment(0, 0, 0, 0x8900)
        self.hidden_loads = 0
        #: The guest is in a mode that the CPU cannot run it in, and the VMM carries out its every instruction (real_monitor.py).
        self.interpreted: Interpreted | None = None
        #: Writes a control register with all that follows; whoever emulates registers puts itself here.
        self.write_cr: Callable[[int, int], None] = _no_registers

    # ---- what C may change too
    @property
    def flags(self) -> int:
        """IF and IOPL as the guest set them."""
        return self.words[_OWN_FLAGS]

    @flags.setter
    def flags(self, value: int) -> None:
        self.words[_OWN_FLAGS] = value

    @property
    def shadow_at(self) -> int | None:
        """After STI: no interrupt while RIP is still here (the shadow of one instruction)."""
        at = self.words[_SHADOW_AT]
        return None if at == _NO_SHADOW else at

    @shadow_at.setter
    def shadow_at(self, value: int | None) -> None:
        self.words[_SHADOW_AT] = _NO_SHADOW if value is None else value

    def note_interrupt_line(self, level: bool) -> None:
        """INTR of the virtual CPU."""
        self.words[_PENDING] = level

    # ---- the surface that delivery needs; everything else is the physical CPU's
    @property
    def cpl(self) -> int:
        """The privilege that the guest believes it has."""
        physical = self.cpu.cpl
        return 0 if physical == KERNEL_RING else physical

    def set_cpl(self, cpl: int) -> None:
        self.cpu.set_cpl(KERNEL_RING if cpl == 0 else cpl)

    @property
    def long_mode(self) -> bool:
        """Whether the guest is in long mode: see :class:`~vmlab.vmm.long_mode.LongModeCpu`."""
        return False

    @property
    def bits(self) -> int:
        """Size of the guest's code: 16 or 32."""
        return 32 if self.segment(CS).flags & (1 << 22) else 16

    def clear_shadow(self) -> None:
        self.shadow_at = None

    @property
    def rip(self) -> int:
        return self.cpu.rip if self.interpreted is None else self.interpreted.rip

    @rip.setter
    def rip(self, value: int) -> None:
        if self.interpreted is None:
            self.cpu.rip = value
        else:
            self.interpreted.rip = value

    def advance(self, size: int) -> int:
        """RIP behind an instruction of ``size`` bytes."""
        return (self.rip + size) & 0xFFFFFFFF

    def gpr(self, number: int) -> int:
        return self.cpu.gpr(number)

    def set_gpr(self, number: int, value: int, size: int = 4) -> None:
        self.cpu.set_gpr(number, value, size)

    @property
    def eflags(self) -> int:
        """EFLAGS as the guest should see them: physical arithmetic, virtual IF and IOPL."""
        return (self.cpu.eflags & ~_VIRTUAL_FLAGS) | self.flags

    @eflags.setter
    def eflags(self, value: int) -> None:
        self.flags = value & _VIRTUAL_FLAGS
        # The physical IF stays on and IOPL stays 0: the machine's interrupts are the VMM's.
        self.cpu.eflags = (value & ~(_VIRTUAL_FLAGS | VM)) | IF

    @property
    def interrupts_enabled(self) -> bool:
        return bool(self.flags & IF)

    def set_interrupt_flag(self, on: bool) -> None:
        self.flags = self.flags | IF if on else self.flags & ~IF

    def clear_flags(self, flags: int) -> None:
        """Clear system flags; IF is the virtual one."""
        self.flags &= ~flags
        self.cpu.clear_flags(flags & ~_VIRTUAL_FLAGS)

    @property
    def efer(self) -> int:
        return self.mmu.efer

    @property
    def hflags(self) -> int:
        return self.cpu.hflags

    def msr(self, number: int) -> int:
        """An MSR of the system-call instructions."""
        return self.msrs[number]

    @property
    def iopl(self) -> int:
        return (self.flags & IOPL) >> 12

    def cr(self, number: int) -> int:
        return {0: self.mmu.cr0, 2: self.cr2, 3: self.mmu.cr3, 4: self.mmu.cr4}[number]

    def set_cr(self, number: int, value: int) -> None:
        """Write CR0 or CR3 as the guest's CPU does in a task switch; raises Fault as it would."""
        self.write_cr(number, value)

    def set_table(self, name: str, value: Segment) -> None:
        """Load the task register, the only one of these that an event can change."""
        assert name == "tr"
        self.tr = value

    def table(self, name: str) -> Segment:
        found: Segment = {"gdt": self.gdt, "idt": self.idt, "ldt": self.ldt, "tr": self.tr}[name]
        return found

    def forget_exception(self) -> None:
        """Bookkeeping of the physical CPU only."""

    # ---- selectors and segments
    def shown_selector(self, selector: int) -> int:
        """A physical selector as the guest may see it."""
        if self.true_selectors and selector & 3 == KERNEL_RING:
            return selector & 0xFFFC
        return selector

    def selector(self, number: int) -> int:
        if self.interpreted is not None:
            return self.interpreted.segments[number].selector
        physical = self.cpu.selector(number)
        return self.shown_selector(physical) if number in (CS, SS) else physical

    def task_selector(self, number: int) -> int:
        """What a task switch saves: the guest's own selector always, for it is the VMM that stores it, and loads it again as the guest's."""
        shown = self.selector(number)
        return shown & 0xFFFC if number in (CS, SS) and shown & 3 == KERNEL_RING else shown

    def segment(self, number: int) -> Segment:
        return self.cpu.segment(number) if self.interpreted is None else self.interpreted.segments[number]

    def set_segment(self, number: int, value: Segment) -> None:
        """Load a segment with the guest's descriptor: CS and SS of ring 0 become ring 1."""
        if self.interpreted is not None:
            self.interpreted.segments[number] = value
            return
        if number in (CS, SS) and value.selector & 3 == 0:
            value = Segment(value.selector | KERNEL_RING, value.base, value.limit, value.flags)
        self.cpu.set_segment(number, compress(value))

    def set_segment_base(self, number: int, base: int) -> None:
        """FS or GS base, written through its MSR."""
        old = self.segment(number)
        new = Segment(old.selector, base & 0xFFFFFFFF, old.limit, old.flags)
        if self.interpreted is None:
            self.cpu.set_segment(number, new)
        else:
            self.interpreted.segments[number] = new

    def physical_selector(self, selector: int) -> int:
        """The selector to load into CS or SS for what the guest calls ``selector``."""
        return selector | KERNEL_RING if selector & 3 == 0 and selector & 0xFFFC else selector

    # ---- guest memory by linear address, through the guest's own tables
    def fetch(self, address: int, size: int) -> bytes:
        """Guest code; raises the PageFault that fetching it at CPL 0 would, and GuestRefused in the VMM's own pages."""
        self._refuse_hole(address, size, "fetched from")
        limit = 0xFFFFFFFFFFFFFFFF if self.long_mode else 0xFFFFFFFF
        code = b""
        while len(code) < size:
            at = (address + len(code)) & limit
            n = min(size - len(code), PAGE - at % PAGE)
            code += self.mmu.memory.read(self.mmu.translate(at, fetch=True), n)
        return code

    def read_linear(self, address: int, size: int, *, user: bool = False) -> bytes:
        """Fetch for the guest; raises its own PageFault."""
        self._refuse_hole(address, size, "reached")
        return self.mmu.read_linear(address, size, user=user)

    def write_linear(self, address: int, data: bytes, *, user: bool = False) -> None:
        """Store for the guest; raises its own PageFault, and GuestRefused when it aims at the VMM's pages."""
        self._refuse_hole(address, len(data), "tried to store into")
        self.mmu.write_linear(address, data, user=user)

    def _refuse_hole(self, address: int, size: int, what: str) -> None:
        """An unpaged guest has no page there but the VMM's; a paged one has its own page fault."""
        if not self.mmu.paging and (self.space.in_hole(address) or self.space.in_hole((address + size - 1) & 0xFFFFFFFF)):
            raise GuestRefused(f"the guest at {self.rip:#x} {what} the VMM's memory at {address:#x}")

    # ---- descriptor tables
    def load_gdt(self, base: int, limit: int) -> int:
        """LGDT: note the guest's table and give the CPU a shadow of it; returns the number of shadow descriptors made."""
        self.gdt = Segment(0, base, limit & 0xFFFF, 0)
        size = (limit & 0xFFFF) + 1
        self.space.map_hole(SHADOW_GDT, 0x10000)
        frame = self.space.hole_frame(SHADOW_GDT)
        self.space.ram.write(frame, bytes(0x10000))
        made = 0
        for index in range(size // 8):
            with contextlib.suppress(PageFault):    # LGDT does not look; a segment load that needs the page will
                made += self.shadow_descriptor(index)
        self.cpu.set_table("gdt", Segment(0, self.space.base, (size // 8) * 8 - 1 if size >= 8 else 0, 0))
        self.cpu.engine.flush_tlb()
        return made

    def shadow_descriptor(self, index: int) -> bool:
        """Make the shadow of the guest's descriptor ``index``; True when that changed it."""
        raw = self.read_linear(self.gdt.base + 8 * index, 8)
        high = int.from_bytes(raw[4:], "little")
        if not high & _CODE_OR_DATA:
            high &= ~_PRESENT            # gates, task and local tables never reach the hardware
        elif not (high >> 13) & 3:
            high |= KERNEL_RING << 13
        at = self.space.hole_frame(SHADOW_GDT) + 8 * index
        new = raw[:4] + high.to_bytes(4, "little")
        old = self.space.ram.read(at, 8)
        accessed = (1 << 8) if high & _CODE_OR_DATA else 0
        if (int.from_bytes(old, "little") | accessed << 32) == (int.from_bytes(new, "little") | accessed << 32):
            return False
        self.space.ram.write(at, new)
        return True

    def mark_accessed(self, address: int) -> bool:
        """The CPU, loading a segment, could not note so in the shadow table at linear ``address``: note it there and in the guest's own.

        False where that is not what happened. Raises the guest's PageFault where its table cannot be written (SDM Vol. 3A §3.4.5.1).
        """
        index = (address - self.space.base) // 8
        if not 0 <= index < (self.gdt.limit + 1) // 8:
            return False
        at = self.space.hole_frame(SHADOW_GDT) + 8 * index + 5
        access = self.space.ram.read(at, 1)[0]
        if access & 1 or not access & _CODE_OR_DATA >> 8:
            return False
        mine = self.gdt.base + 8 * index + 5
        self.write_linear(mine, bytes((self.read_linear(mine, 1)[0] | 1,)))
        self.space.ram.write(at, bytes((access | 1,)))
        return True

    def guest_descriptor(self, selector: int) -> Segment | None:
        """What the guest's own table says of ``selector``; None outside its limit or for a null selector."""
        table = self.ldt if selector & 4 else self.gdt
        offset = selector & ~7
        if not selector & 0xFFFC or offset + 7 > table.limit:
            return None
        return unpack_descriptor(self.read_linear(table.base + offset, 8), selector)


#: EFLAGS bits that POPF and IRET may change at virtual CPL 0, besides IF and IOPL.
CHANGEABLE = 0xCD5 | TF | NT | AC | RF | 1 << 21  # and ID
