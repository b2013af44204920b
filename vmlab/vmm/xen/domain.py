"""Building a paravirtual domain: its memory, its first page tables, and where it starts.

Machine memory (hpa): the hypervisor below 16 MiB, the guest's frames above, so that machine frame numbers differ
from the guest's own. The guest's linear space (gva) is its pseudo-physical memory one to one (VIRT_BASE 0),
mapped by tables that lie in its own frames, read-only to it; its changes to them go through the hypercalls of
:mod:`vmlab.vmm.xen.mmu`. The hypervisor's hole at the top of 32 bits is supervisor and read-only: ring 1 is supervisor to
paging, and CR0.WP = 1 makes read-only hold for it (SDM Vol. 3A §4.6). In 64 bits (:mod:`vmlab.vmm.xen.domain64`) the
guest's kernel is in ring 3, and supervisor pages are out of its reach altogether.
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
from vmlab.vmm.xen import FLAT_RING1_CS, FLAT_RING1_DS, M2P_START, MAX_GUEST_CMDLINE, SIF_PRIVILEGED
from vmlab.vmm.xen.abi import NARROW, Abi, SharedInfo
from vmlab.vmm.xen.descriptors import GDT_AT, IDT_AT, PRIVATE, TSS_AT, TSS_SELECTOR, TSS_SIZE, DescriptorTables
from vmlab.vmm.xen.frames import FrameTable, Refused
from vmlab.vmm.xen.tables import PAE, Format, HoleEntries

GUEST_FRAMES = 16 << 20             # hpa of the guest's first frame

# The hypervisor's pages (hpa).
M2P_L1, PRIVATE_L1, _SHARED_INFO, _M2P = 0x3000, 0x4000, 0x32000, 4 << 20
_M2P_ROOM = 2 << 20                 # what one page table shows
CR0 = 0x80010011                    # PG, WP, ET, PE


@dataclass(frozen=True)
class StartOfDay:
    """Where a domain begins: entry, stack and start_info (gva)."""

    entry: int
    stack: int
    start_info: int


class Domain:
    """The memory of one paravirtual guest of 32 bits. ``flush_tlb`` makes the physical CPU forget its translations."""

    abi: Abi = NARROW
    format: Format = PAE
    tables_of: type[DescriptorTables] = DescriptorTables
    private = PRIVATE                   # where the linear space shows the hypervisor's own pages
    m2p_rights = 0
    hole: HoleEntries = ((M2P_START >> 21 & 511, M2P_L1 | P), (PRIVATE >> 21 & 511, PRIVATE_L1 | P))

    def __init__(self, ram: Ram, memory: int, counts: Counts, flush_tlb: Callable[[], None]) -> None:
        self.ram, self.memory, self.flush_tlb = ram, memory, flush_tlb
        self.pages = memory // PAGE
        self.shared = SharedInfo(ram, _SHARED_INFO, self.abi)
        self.frames = FrameTable(ram, self.mfn(0), self.pages, self.hole, flush_tlb, counts, self.format)
        self.frames.lend(self.shared.frame >> 12)
        self.tables = self.tables_of(ram, self.frames, PRIVATE_L1)
        self.root = 0                   # hpa of the table in CR3 while the guest's kernel runs

    # ---- building
    def build(self, image: GuestImage, command_line: str, flags: int = SIF_PRIVILEGED) -> StartOfDay:
        """Place the image and what start of day needs; returns where to begin. ``flags``: SIF_* of start_info."""
        notes = self._notes(image)
        for segment in image.segments:
            self.write(segment.address, segment.data + bytes(segment.memory_size - len(segment.data)))
        at = (image.end + PAGE - 1) // PAGE * PAGE
        mfn_list, at = at, at + (self.abi.word * self.pages + PAGE - 1) // PAGE * PAGE
        info, at = at, at + PAGE
        table_count = 3 + (self.pages + 511) // 512     # PAE: L3, and L2 of the first and last GiB; four levels: L4, L3, L2
        tables, at = at, at + table_count * PAGE
        stack, at = at + PAGE, at + PAGE
        if at + (512 << 10) > self.memory:
            raise UnsupportedByStrategy(f"guest {image.name!r} does not fit into {self.memory >> 20} MiB as a paravirtual domain")
        self.write(mfn_list, struct.pack(self.abi.words(self.pages), *(self.mfn(pfn) for pfn in range(self.pages))))
        self._told_at = info + self.abi.command_line_at
        self.write(info, self.abi.start_info(pages=self.pages, shared_info=self.shared.frame, pt_base=tables, pt_frames=table_count,
                                    mfn_list=mfn_list, command_line=command_line, flags=flags))
        if notes.hypercall_page is not None:
            self.write(notes.hypercall_page, self.abi.hypercall_page())
        self.ram.write(_M2P, self._m2p(image.name))
        self._show_m2p()
        self.tables.build()
        self._build_tables(tables, table_count)
        return StartOfDay(notes.entry, stack, info)

    def tell(self, command_line: str) -> None:
        """Put another command line into start_info."""
        self.write(self._told_at, command_line.encode("ascii").ljust(MAX_GUEST_CMDLINE, b"\0"))

    def _notes(self, image: GuestImage) -> PvNotes:
        notes = image.pv
        if notes is None:
            raise UnsupportedByStrategy(
                f"guest {image.name!r} has no paravirtual entry (no Xen ELF notes): its kernel was not written for a hypervisor")
        if (notes.bits == 32 and notes.pae_mode not in ("yes", "bimodal", "yes,bimodal")) or notes.virt_base or notes.paddr_offset:
            raise UnsupportedByStrategy(f"guest {image.name!r} is not a kernel with PAE or 64 bits, mapped at its physical addresses")
        for name, address in (("entry", notes.entry), ("hypercall page", notes.hypercall_page)):
            if address is not None and not 0 < address <= image.end - (PAGE if name == "hypercall page" else 1):
                raise GuestImageError(f"guest image {image.name!r}: {name} in its notes, {address:#x}, lies outside it")
        if any(feature.startswith("!") for feature in notes.features.split("|")):
            raise UnsupportedByStrategy(f"guest {image.name!r} requires {notes.features!r}, and no such feature is offered")
        return notes

    def _m2p(self, guest: str) -> bytes:
        """The machine-to-physical table."""
        frames = self.ram.size // PAGE
        if self.abi.word * frames > _M2P_ROOM:
            raise UnsupportedByStrategy(
                f"guest {guest!r} with {self.memory >> 20} MiB: the machine-to-physical table has room for {_M2P_ROOM // self.abi.word >> 8} MiB "
                "of machine memory")
        table = [self.abi.mask] * frames
        for pfn in range(self.pages):
            table[self.mfn(pfn)] = pfn
        return struct.pack(self.abi.words(frames), *table)

    def _show_m2p(self) -> None:
        """The page table that shows it in the hole; all of the guest may read it."""
        self.ram.write(M2P_L1, bytes(PAGE))
        for page in range((self.abi.word * (self.ram.size // PAGE) + PAGE - 1) // PAGE):
            self.ram.write64(M2P_L1 + 8 * page, (_M2P + page * PAGE) | P | self.m2p_rights)

    def set_m2p(self, mfn: int, pfn: int) -> None:
        """One entry of the machine-to-physical table, which the guest can read and the hypervisor does not use."""
        self.ram.write(_M2P + self.abi.word * mfn, (pfn & self.abi.mask).to_bytes(self.abi.word, "little"))

    def _build_tables(self, base: int, count: int) -> None:
        """The upper tables, then L1 pages; the tables themselves are mapped read-only.

        Then the root is pinned and becomes the base, checked like any that the guest will make.
        """
        tables, first_l1 = range(base // PAGE, base // PAGE + count), base + 3 * PAGE
        self.write(base, bytes(count * PAGE))
        l2 = self._upper_tables(base)
        for index in range(count - 3):
            self._put(l2, index, self.machine(first_l1 + index * PAGE) | US | RW | P)
        for pfn in range(self.pages):
            self._put(first_l1, pfn, self.mfn(pfn) << 12 | US | P | (0 if pfn in tables else RW))
        self.frames.pin(self.machine(base) >> 12, len(self.format.shifts))
        self.set_base(self.machine(base) >> 12)

    def _upper_tables(self, base: int) -> int:
        """L3, L2 of the first and of the last GiB; returns the first L2."""
        for slot, l2 in ((0, base + PAGE), (3, base + 2 * PAGE)):
            self._put(base, slot, self.machine(l2) | P)
        return base + PAGE

    def _put(self, table: int, index: int, entry: int) -> None:
        self.ram.write64(self.machine(table) + 8 * index, entry)

    def set_base(self, mfn: int) -> None:
        """Make this the root that CR3 will name. Raises :class:`~vmlab.vmm.xen.frames.Refused`."""
        self.frames.get(mfn, self.format.root)
        if self.root:
            self.frames.put(self.root >> 12)
        self.root = mfn << 12

    def set_user_base(self, mfn: int) -> None:
        """Only a 64-bit kernel has a root apart for its users. Raises :class:`~vmlab.vmm.xen.frames.Refused`."""
        raise Refused("there is one root for kernel and users")

    # ---- the physical CPU
    def start(self, cpu: Cpu, begin: StartOfDay) -> None:
        """The physical CPU in ring 1 at the domain's entry, on its tables and the hypervisor's descriptors."""
        cpu.enter_protected(begin.entry, Segment(0x08, 0, 0xFFFFFFFF, 0xCF9B00), Segment(0x10, 0, 0xFFFFFFFF, 0xCF9300))
        cpu.load()
        cpu.set_cr(4, CR4_PAE)
        cpu.set_cr(3, self.root)
        cpu.set_cr(0, CR0)
        self._load_tables(cpu, 8)
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

    def _load_tables(self, cpu: Cpu, gate: int) -> None:
        """GDT, IDT of gates of ``gate`` bytes, and TSS, where the hole shows them."""
        cpu.set_table("gdt", Segment(0, self.private + GDT_AT, 0xFFFF, 0))
        cpu.set_table("idt", Segment(0, self.private + IDT_AT, 256 * gate - 1, 0))
        cpu.set_table("tr", Segment(TSS_SELECTOR, self.private + TSS_AT, TSS_SIZE - 1, 0x8900))

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
