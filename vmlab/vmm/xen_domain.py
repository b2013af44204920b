"""Building a paravirtual domain: its memory, its first page tables, and where it starts.

Machine memory (hpa): the hypervisor below 16 MiB, the guest's frames above, so that machine frame numbers differ
from the guest's own. The guest's linear space (gva) is its pseudo-physical memory one to one (VIRT_BASE 0),
mapped by PAE tables that lie in its own frames, read-only to it; its changes to them go through the hypercalls of
:mod:`vmlab.vmm.xen_mmu`. The hypervisor's hole at the top is supervisor and read-only: ring 1 is supervisor to
paging, and CR0.WP = 1 makes read-only hold for it (SDM Vol. 3A §4.6).
Start of day follows xen/include/public/xen.h, "Start-of-day memory layout".
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from vmlab.errors import GuestImageError, UnsupportedByStrategy
from vmlab.guests import GuestImage, PvNotes
from vmlab.ledger import Counts
from vmlab.machine.cpu import IF, Cpu, Segment
from vmlab.machine.memory import PAGE, Ram
from vmlab.machine.paging import CR4_PAE, RW, US, P
from vmlab.machine.state import CS, DS, ES, FS, GS, RSI, RSP, SS
from vmlab.vmm.xen import FLAT_RING1_CS, FLAT_RING1_DS, M2P_START, SIF_PRIVILEGED, SharedInfo, hypercall_page, start_info
from vmlab.vmm.xen_descriptors import GDT_AT, IDT_AT, PRIVATE, TSS_AT, TSS_SELECTOR, TSS_SIZE, DescriptorTables
from vmlab.vmm.xen_frames import FrameTable, Kind

GUEST_FRAMES = 16 << 20             # hpa of the guest's first frame

# The hypervisor's pages (hpa).
_M2P_L1, _PRIVATE_L1, _M2P, _SHARED_INFO = 0x3000, 0x4000, 0x10000, 0x32000
_CR0 = 0x80010011                   # PG, WP, ET, PE


@dataclass(frozen=True)
class StartOfDay:
    """Where a domain begins: entry, stack and start_info (gva)."""

    entry: int
    stack: int
    start_info: int


class Domain:
    """The memory of one paravirtual guest. ``flush_tlb`` makes the physical CPU forget its translations."""

    def __init__(self, ram: Ram, memory: int, counts: Counts, flush_tlb: Callable[[], None]) -> None:
        self.ram, self.memory, self.flush_tlb = ram, memory, flush_tlb
        self.pages = memory // PAGE
        self.shared = SharedInfo(ram, _SHARED_INFO)
        hole = ((M2P_START >> 21 & 511, _M2P_L1 | P), (PRIVATE >> 21 & 511, _PRIVATE_L1 | P))
        self.frames = FrameTable(ram, self.mfn(0), self.pages, hole, flush_tlb, counts)
        self.frames.lend(self.shared.frame >> 12)
        self.tables = DescriptorTables(ram, self.frames, _PRIVATE_L1)
        self.l3 = 0                     # hpa of the L3 in CR3

    # ---- building
    def build(self, image: GuestImage, command_line: str, flags: int = SIF_PRIVILEGED) -> StartOfDay:
        """Place the image and what start of day needs; returns where to begin. ``flags``: SIF_* of start_info."""
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
                                    mfn_list=mfn_list, command_line=command_line, flags=flags))
        if notes.hypercall_page is not None:
            self.write(notes.hypercall_page, hypercall_page())
        self._build_m2p()
        self.tables.build()
        self._build_tables(tables, table_count)
        return StartOfDay(notes.entry, stack, info)

    def _notes(self, image: GuestImage) -> PvNotes:
        notes = image.pv
        if notes is None:
            raise UnsupportedByStrategy(
                f"guest {image.name!r} has no paravirtual entry (no Xen ELF notes). Only 32-bit kernels are run: with 64 bits there are no "
                "segment limits and no ring 1 apart from users, so that a kernel must share ring 3 with them, on page tables of its "
                "own, and each of its system calls passes through the hypervisor")
        if notes.pae_mode not in ("yes", "bimodal", "yes,bimodal") or notes.virt_base or notes.paddr_offset:
            raise UnsupportedByStrategy(f"guest {image.name!r} is not a PAE kernel mapped at its physical addresses")
        for name, address in (("entry", notes.entry), ("hypercall page", notes.hypercall_page)):
            if address is not None and not 0 < address <= image.end - (PAGE if name == "hypercall page" else 1):
                raise GuestImageError(f"guest image {image.name!r}: {name} in its notes, {address:#x}, lies outside it")
        if any(feature.startswith("!") for feature in notes.features.split("|")):
            raise UnsupportedByStrategy(f"guest {image.name!r} requires {notes.features!r}, and no such feature is offered")
        return notes

    def _build_m2p(self) -> None:
        """The machine-to-physical table, and the page table that shows it in the hole."""
        frames = self.ram.size // PAGE
        table = [0xFFFFFFFF] * frames
        for pfn in range(self.pages):
            table[self.mfn(pfn)] = pfn
        self.ram.write(_M2P, struct.pack(f"<{frames}I", *table))
        self.ram.write(_M2P_L1, bytes(PAGE))
        for page in range((4 * frames + PAGE - 1) // PAGE):
            self.ram.write64(_M2P_L1 + 8 * page, (_M2P + page * PAGE) | P)

    def set_m2p(self, mfn: int, pfn: int) -> None:
        """One entry of the machine-to-physical table, which the guest can read and the hypervisor does not use."""
        self.ram.write32(_M2P + 4 * mfn, pfn)

    def _build_tables(self, base: int, count: int) -> None:
        """L3, L2 of the first and of the last GiB, then L1 pages; the tables themselves are mapped read-only.

        Then the L3 is pinned and becomes the base, checked like any that the guest will make.
        """
        tables = range(base // PAGE, base // PAGE + count)
        l3, low, high, first_l1 = base, base + PAGE, base + 2 * PAGE, base + 3 * PAGE
        self.write(base, bytes(count * PAGE))
        for slot, l2 in ((0, low), (3, high)):
            self._put(l3, slot, self.machine(l2) | P)
        for index in range(count - 3):
            self._put(low, index, self.machine(first_l1 + index * PAGE) | US | RW | P)
        for pfn in range(self.pages):
            self._put(first_l1, pfn, self.mfn(pfn) << 12 | US | P | (0 if pfn in tables else RW))
        self.frames.pin(self.machine(l3) >> 12, 3)
        self.set_base(self.machine(l3) >> 12)

    def _put(self, table: int, index: int, entry: int) -> None:
        self.ram.write64(self.machine(table) + 8 * index, entry)

    def set_base(self, mfn: int) -> None:
        """Make this L3 the one that CR3 will name. Raises :class:`~vmlab.vmm.xen_frames.Refused`."""
        self.frames.get(mfn, Kind.L3)
        if self.l3:
            self.frames.put(self.l3 >> 12)
        self.l3 = mfn << 12

    # ---- the physical CPU
    def start(self, cpu: Cpu, begin: StartOfDay) -> None:
        """The physical CPU in ring 1 at the domain's entry, on its tables and the hypervisor's descriptors."""
        cpu.enter_protected(begin.entry, Segment(0x08, 0, 0xFFFFFFFF, 0xCF9B00), Segment(0x10, 0, 0xFFFFFFFF, 0xCF9300))
        cpu.load()
        cpu.set_cr(4, CR4_PAE)
        cpu.set_cr(3, self.l3)
        cpu.set_cr(0, _CR0)
        cpu.set_table("gdt", Segment(0, GDT_AT, 0xFFFF, 0))
        cpu.set_table("idt", Segment(0, IDT_AT, 256 * 8 - 1, 0))
        cpu.set_table("tr", Segment(TSS_SELECTOR, TSS_AT, TSS_SIZE - 1, 0x8900))
        cpu.set_segment(CS, self.tables.descriptor(FLAT_RING1_CS))
        for number in (SS, DS, ES):
            cpu.set_segment(number, self.tables.descriptor(FLAT_RING1_DS))
        for number in (FS, GS):
            cpu.set_segment(number, Segment(0, 0, 0, 0))
        cpu.set_cpl(1)
        cpu.eflags = IF | 2         # the physical flag stays on: the machine's interrupts are the hypervisor's
        cpu.set_gpr(RSI, begin.start_info)
        cpu.set_gpr(RSP, begin.stack)
        cpu.rip = begin.entry
        cpu.store()

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
