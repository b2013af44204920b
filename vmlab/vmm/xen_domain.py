"""Building a paravirtual domain: its memory, its static page tables, and the hypervisor's own tables.

Machine memory (hpa): the hypervisor below 16 MiB, the guest's frames above, so that machine frame numbers differ
from the guest's own. The guest's linear space (gva) is its pseudo-physical memory one to one (VIRT_BASE 0),
mapped by PAE tables that lie in its own frames, read-only to it; its changes to them go through
:meth:`Domain.update_mapping`, which checks them. The hypervisor's hole at the top is supervisor and read-only:
ring 1 is supervisor to paging, and CR0.WP = 1 makes read-only hold for it (SDM Vol. 3A §4.6).
Start of day follows xen/include/public/xen.h, "Start-of-day memory layout".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vmlab.errors import GuestImageError, UnsupportedByStrategy
from vmlab.guests import GuestImage, PvNotes
from vmlab.machine.cpu import IF, Cpu, Segment, unpack_descriptor
from vmlab.machine.memory import PAGE, Ram
from vmlab.machine.paging import CR4_PAE, RW, US, P
from vmlab.machine.state import CS, DS, ES, FS, GS, RSI, RSP, SS
from vmlab.vmm.xen import (
    EINVAL,
    FLAT_RING1_CS,
    FLAT_RING1_DS,
    FLAT_RING3_CS,
    FLAT_RING3_DS,
    HYPERVISOR_START,
    M2P_START,
    SharedInfo,
    Trap,
    hypercall_page,
    start_info,
)

GUEST_FRAMES = 16 << 20             # hpa of the guest's first frame

# The hypervisor's pages (hpa), and where the hole shows them (linear).
_M2P_L1, _PRIVATE_L1, _M2P, _GDT, _IDT, _TSS, _SHARED_INFO = 0x3000, 0x4000, 0x10000, 0x20000, 0x30000, 0x31000, 0x32000
_PRIVATE = 0xFC400000
_GDT_AT, _IDT_AT, _TSS_AT = _PRIVATE, _PRIVATE + 0x10000, _PRIVATE + 0x11000
_TSS_SELECTOR = 0xE040
_TSS_SIZE = 104
_CR0 = 0x80010011                   # PG, WP, ET, PE
_FRAME_BITS = 0xFFFFFF000

#: The last byte that a guest's flat segments reach: everything below the hole.
_LIMIT = (HYPERVISOR_START >> 12) - 1


def _flat(access: int) -> bytes:
    """A flat 32-bit descriptor with 4 KiB granularity up to the hole; ``access`` is byte 5."""
    return struct.pack("<HHBBBB", _LIMIT & 0xFFFF, 0, 0, access, 0xC0 | _LIMIT >> 16, 0)


@dataclass(frozen=True)
class StartOfDay:
    """Where a domain begins: entry, stack and start_info (gva)."""

    entry: int
    stack: int
    start_info: int


class Domain:
    """The memory of one paravirtual guest, and the hypervisor's descriptor tables beside it."""

    def __init__(self, ram: Ram, memory: int) -> None:
        self.ram, self.memory = ram, memory
        self.pages = memory // PAGE
        self.shared = SharedInfo(ram, _SHARED_INFO)
        self._tables: range = range(0)  # pseudo-physical frames that hold page tables
        self._first_l1 = 0

    # ---- building
    def build(self, image: GuestImage, command_line: str) -> StartOfDay:
        """Place the image and what start of day needs; returns where to begin."""
        notes = self._notes(image)
        for segment in image.segments:
            self.write(segment.address, segment.data + bytes(segment.memory_size - len(segment.data)))
        at = (image.end + PAGE - 1) // PAGE * PAGE
        mfn_list, at = at, at + (4 * self.pages + PAGE - 1) // PAGE * PAGE
        info, at = at, at + PAGE
        table_count = 3 + (self.pages + 511) // 512
        tables, at = at, at + table_count * PAGE
        stack, at = at + PAGE, at + PAGE
        if at + (512 << 10) > self.memory:
            raise UnsupportedByStrategy(f"guest {image.name!r} does not fit into {self.memory >> 20} MiB as a paravirtual domain")
        self.write(mfn_list, struct.pack(f"<{self.pages}I", *(self.mfn(pfn) for pfn in range(self.pages))))
        self.write(info, start_info(pages=self.pages, shared_info=self.shared.frame, pt_base=tables, pt_frames=table_count,
                                    mfn_list=mfn_list, command_line=command_line))
        if notes.hypercall_page is not None:
            self.write(notes.hypercall_page, hypercall_page())
        self._build_hole()
        self._build_tables(tables, table_count)
        self._build_descriptors()
        return StartOfDay(notes.entry, stack, info)

    def _notes(self, image: GuestImage) -> PvNotes:
        notes = image.pv
        if notes is None:
            raise UnsupportedByStrategy(f"guest {image.name!r} has no paravirtual entry (no Xen ELF notes)")
        if notes.pae_mode not in ("yes", "bimodal", "yes,bimodal") or notes.virt_base or notes.paddr_offset:
            raise UnsupportedByStrategy(f"guest {image.name!r} is not a PAE kernel mapped at its physical addresses")
        for name, address in (("entry", notes.entry), ("hypercall page", notes.hypercall_page)):
            if address is not None and not 0 < address <= image.end - (PAGE if name == "hypercall page" else 1):
                raise GuestImageError(f"guest image {image.name!r}: {name} in its notes, {address:#x}, lies outside it")
        if any(feature.startswith("!") for feature in notes.features.split("|")):
            raise UnsupportedByStrategy(f"guest {image.name!r} requires {notes.features!r}, and no such feature is offered")
        return notes

    def _build_hole(self) -> None:
        """The machine-to-physical table and the private pages, each under one page table of the hypervisor's."""
        frames = self.ram.size // PAGE
        table = [0xFFFFFFFF] * frames
        for pfn in range(self.pages):
            table[self.mfn(pfn)] = pfn
        self.ram.write(_M2P, struct.pack(f"<{frames}I", *table))
        for first, l1, count in ((_M2P, _M2P_L1, (4 * frames + PAGE - 1) // PAGE), (_GDT, _PRIVATE_L1, 18)):
            self.ram.write(l1, bytes(PAGE))
            for page in range(count):
                self.ram.write64(l1 + 8 * page, (first + page * PAGE) | P)

    def _build_tables(self, base: int, count: int) -> None:
        """L3, L2 of the first and of the last GiB, then L1 pages; the tables themselves are mapped read-only."""
        self._tables = range(base // PAGE, base // PAGE + count)
        l3, low, high, self._first_l1 = base, base + PAGE, base + 2 * PAGE, base + 3 * PAGE
        self.write(base, bytes(count * PAGE))
        for slot, l2 in ((0, low), (3, high)):
            self._put(l3, slot, self.machine(l2) | P)
        for index in range(count - 3):
            self._put(low, index, self.machine(self._first_l1 + index * PAGE) | US | RW | P)
        for linear, l1 in ((M2P_START, _M2P_L1), (_PRIVATE, _PRIVATE_L1)):
            self._put(high, linear >> 21 & 511, l1 | P)
        for pfn in range(self.pages):
            self._put(self._first_l1, pfn, self.mfn(pfn) << 12 | US | P | (0 if pfn in self._tables else RW))
        self.l3 = self.machine(l3)

    def _put(self, table: int, index: int, entry: int) -> None:
        self.ram.write64(self.machine(table) + 8 * index, entry)

    def _build_descriptors(self) -> None:
        """GDT with the flat segments of rings 1 and 3, an IDT with no gates of the guest's yet, a TSS."""
        self.ram.write(_GDT, bytes(0x10000))
        for selector, access in ((FLAT_RING1_CS, 0xBB), (FLAT_RING1_DS, 0xB3), (FLAT_RING3_CS, 0xFB), (FLAT_RING3_DS, 0xF3)):
            self.ram.write(_GDT + (selector & ~7), _flat(access))
        self.ram.write(_IDT, bytes(PAGE))
        self.ram.write(_TSS, bytes(_TSS_SIZE - 2) + struct.pack("<H", _TSS_SIZE))  # no I/O bitmap: IN and OUT are refused

    # ---- the physical CPU
    def start(self, cpu: Cpu, begin: StartOfDay) -> None:
        """The physical CPU in ring 1 at the domain's entry, on its tables and the hypervisor's descriptors."""
        cpu.enter_protected(begin.entry, Segment(0x08, 0, 0xFFFFFFFF, 0xCF9B00), Segment(0x10, 0, 0xFFFFFFFF, 0xCF9300))
        cpu.load()
        cpu.set_cr(4, CR4_PAE)
        cpu.set_cr(3, self.l3)
        cpu.set_cr(0, _CR0)
        cpu.set_table("gdt", Segment(0, _GDT_AT, 0xFFFF, 0))
        cpu.set_table("idt", Segment(0, _IDT_AT, 256 * 8 - 1, 0))
        cpu.set_table("tr", Segment(_TSS_SELECTOR, _TSS_AT, _TSS_SIZE - 1, 0x8900))
        cpu.set_segment(CS, self.descriptor(FLAT_RING1_CS))
        for number in (SS, DS, ES):
            cpu.set_segment(number, self.descriptor(FLAT_RING1_DS))
        for number in (FS, GS):
            cpu.set_segment(number, Segment(0, 0, 0, 0))
        cpu.set_cpl(1)
        cpu.eflags = IF | 2         # the physical flag stays on: the machine's interrupts are the hypervisor's
        cpu.set_gpr(RSI, begin.start_info)
        cpu.set_gpr(RSP, begin.stack)
        cpu.rip = begin.entry
        cpu.store()

    def descriptor(self, selector: int) -> Segment:
        """What loading this selector of the hypervisor's GDT gives."""
        return unpack_descriptor(self.ram.read(_GDT + (selector & 0xFFF8), 8), selector)

    def set_kernel_stack(self, ss: int, esp: int) -> None:
        """Where the CPU goes on its way from ring 3 to ring 1 (TSS: ESP1, SS1)."""
        self.ram.write(_TSS + 12, struct.pack("<II", esp, ss))

    def set_direct_gate(self, vector: int, trap: Trap | None) -> None:
        """Let INT ``vector`` go from ring 3 to the guest's handler with no hypervisor between, or stop that."""
        gate = bytes(8)
        if trap is not None:
            gate = struct.pack("<HHBBH", trap.address & 0xFFFF, trap.cs, 0, 0x8F | trap.level << 5, trap.address >> 16)
        self.ram.write(_IDT + 8 * vector, gate)

    # ---- frames
    def mfn(self, pfn: int) -> int:
        """The machine frame behind the guest's frame."""
        return (GUEST_FRAMES >> 12) + pfn

    def machine(self, gpa: int) -> int:
        """hpa of a pseudo-physical address."""
        return GUEST_FRAMES + gpa

    def write(self, gpa: int, data: bytes) -> None:
        """Store into the guest's memory while building it."""
        if gpa + len(data) > self.memory:
            raise GuestImageError(f"the guest image reaches to {gpa + len(data):#x}, beyond its {self.memory >> 20} MiB")
        self.ram.write(self.machine(gpa), data)

    def update_mapping(self, address: int, entry: int) -> int:
        """update_va_mapping: one L1 entry, after checking that it gives the guest nothing that is not its own.

        Returns 0 or a negative error number. The caller flushes the TLB.
        """
        if address >= self.memory:
            return EINVAL
        if entry & P:
            frame = entry & _FRAME_BITS
            pfn = (frame >> 12) - self.mfn(0)
            own = 0 <= pfn < self.pages
            if entry & ~(_FRAME_BITS | 0xFFF) or not (own or frame == self.shared.frame):
                return EINVAL
            if own and entry & RW and pfn in self._tables:
                return EINVAL
            entry |= US
        self._put(self._first_l1, address >> 12, entry)
        return 0
