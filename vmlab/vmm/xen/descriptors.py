"""The physical descriptor tables under a paravirtual guest: GDT, IDT, TSS, and what of them is the guest's.

The GDT has 16 pages of linear space. The first 14 show the guest's own descriptor frames once it has named them
(set_gdt); the last two are the hypervisor's, with the flat segments that every guest finds there
(xen/include/public/arch-x86/xen.h: FIRST_RESERVED_GDT_PAGE; xen-x86_32.h: FLAT_RING1_CS …). A descriptor of the
guest's is checked before the CPU can see it: no ring 0, no gates, nothing that reaches the hole.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from types import MappingProxyType

from vmlab.machine.cpu import Segment, unpack_descriptor
from vmlab.machine.memory import PAGE, Ram
from vmlab.machine.paging import P
from vmlab.vmm import xen
from vmlab.vmm.xen import FLAT_RING1_CS, FLAT_RING1_DS, FLAT_RING3_CS, FLAT_RING3_DS, HYPERVISOR_START
from vmlab.vmm.xen.abi import Trap
from vmlab.vmm.xen.frames import FrameTable, Kind, Refused

# The hypervisor's pages (hpa), and where its hole shows them (linear).
GDT, IDT, TSS = 0x20000, 0x30000, 0x31000
PRIVATE = 0xFC400000
PRIVATE_PAGES = 18
GDT_AT, IDT_AT, TSS_AT = 0, 0x10000, 0x11000        # from where the hypervisor's private pages are shown
TSS_SELECTOR = 0xE040
TSS_SIZE = 104

_S, _CODE, _EXPAND_DOWN, _PRESENT, _GRANULAR = 1 << 12, 1 << 11, 1 << 10, 1 << 15, 1 << 23  # in a descriptor's high word

#: The last page that a guest's flat segments reach: everything below the hole.
_LIMIT = (HYPERVISOR_START >> 12) - 1


def _flat(access: int) -> bytes:
    """A flat 32-bit descriptor with 4 KiB granularity up to the hole; ``access`` is byte 5."""
    return struct.pack("<HHBBBB", _LIMIT & 0xFFFF, 0, 0, access, 0xC0 | _LIMIT >> 16, 0)


def _unlimited(access: int, flags: int) -> bytes:
    """A flat descriptor without a limit; ``flags`` is the high half of byte 6: G, D, L, AVL."""
    return struct.pack("<HHBBBB", 0xFFFF, 0, 0, access, flags << 4 | 0xF, 0)


def checked(low: int, high: int) -> tuple[int, int]:
    """The descriptor as the CPU may see it: never ring 0. Raises :class:`Refused` for what a guest may not have."""
    if not high & _PRESENT:
        return low, high
    if not high & _S:
        raise Refused(f"system descriptor {high:08x}:{low:08x}")
    if high >> 13 & 3 == 0:
        high |= 1 << 13
    if not high & _CODE and high & _EXPAND_DOWN:
        raise Refused(f"expand-down descriptor {high:08x}:{low:08x}")
    base = low >> 16 | (high & 0xFF) << 16 | high & 0xFF000000
    limit = low & 0xFFFF | high & 0xF0000
    end = base + (limit << 12 | 0xFFF if high & _GRANULAR else limit)
    if end >= HYPERVISOR_START:
        room = HYPERVISOR_START - 1 - base
        if base or not high & _GRANULAR or room < 0:
            raise Refused(f"descriptor {high:08x}:{low:08x} reaches the hypervisor's memory")
        low, high = low & ~0xFFFF | _LIMIT & 0xFFFF, high & ~0xF0000 | _LIMIT & 0xF0000
    return low, high


def checked_wide(low: int, high: int) -> tuple[int, int]:
    """The same for a 64-bit guest: ring 3 and nothing else, and no limits, for paging alone protects the hypervisor."""
    if not high & _PRESENT:
        return low, high
    if not high & _S:
        raise Refused(f"system descriptor {high:08x}:{low:08x}")
    return low, high | 3 << 13


class DescriptorTables:
    """GDT, IDT and TSS in machine memory. ``private_l1``: hpa of the page table that shows them at :data:`PRIVATE`."""

    #: The flat segments: selector and descriptor.
    flat: Mapping[int, bytes] = MappingProxyType({selector: _flat(access) for selector, access in (
        (FLAT_RING1_CS, 0xBB), (FLAT_RING1_DS, 0xB3), (FLAT_RING3_CS, 0xFB), (FLAT_RING3_DS, 0xF3))})
    #: A descriptor of the guest's as the CPU may see it.
    checked: Callable[[int, int], tuple[int, int]] = staticmethod(checked)

    def __init__(self, ram: Ram, frames: FrameTable, private_l1: int) -> None:
        self._ram, self._frames, self._l1 = ram, frames, private_l1
        self._guests: list[int] = []        # the frames of the guest's part, in order
        self._loaded: dict[int, Segment] = {}

    def build(self) -> None:
        """GDT with the flat segments of rings 1 and 3, an IDT with no gates of the guest's yet, a TSS."""
        ram = self._ram
        ram.write(GDT, bytes(0x10000))
        for selector, descriptor in self.flat.items():
            ram.write(GDT + (selector & ~7), descriptor)
        ram.write(IDT, bytes(PAGE))
        ram.write(TSS, bytes(TSS_SIZE - 2) + struct.pack("<H", TSS_SIZE))  # no I/O bitmap: IN and OUT are refused
        ram.write(self._l1, bytes(PAGE))
        for page in range(PRIVATE_PAGES):
            ram.write64(self._l1 + 8 * page, (GDT + page * PAGE) | P)

    def descriptor(self, selector: int) -> Segment:
        """What loading this selector of the hypervisor's part of the GDT gives: always the same."""
        found = self._loaded.get(selector)
        if found is None:
            found = self._loaded[selector] = unpack_descriptor(self._ram.read(GDT + (selector & 0xFFF8), 8), selector)
        return found

    def set_kernel_stack(self, ss: int, esp: int) -> None:
        """Where the CPU goes on its way from ring 3 to ring 1 (TSS: ESP1, SS1)."""
        self._ram.write(TSS + 12, struct.pack("<II", esp, ss))

    def set_direct_gate(self, vector: int, trap: Trap | None) -> None:
        """Let INT ``vector`` go from ring 3 to the guest's handler with no hypervisor between, or stop that."""
        gate = bytes(8)
        if trap is not None:
            gate = struct.pack("<HHBBH", trap.address & 0xFFFF, trap.cs, 0, 0x8F | trap.level << 5, trap.address >> 16)
        self._ram.write(IDT + 8 * vector, gate)

    # ---- the guest's own descriptors
    def set_gdt(self, frames: list[int], entries: int) -> None:
        """Show these frames as the first pages of the GDT. They stay descriptor tables, which the guest cannot write.

        Raises :class:`Refused`, with the old table in place. The caller flushes the TLB.
        """
        if entries > xen.FIRST_RESERVED_GDT_ENTRY or len(frames) != (entries + 511) // 512:
            raise Refused(f"a descriptor table of {entries} entries in {len(frames)} frames")
        taken: list[int] = []
        try:
            for mfn in frames:
                fresh = not self._frames.owns(mfn) or self._frames.kind(mfn) is not Kind.DESCRIPTORS
                self._frames.get(mfn, Kind.DESCRIPTORS)
                taken.append(mfn)
                if fresh:
                    self._check(mfn)
        except Refused:
            for mfn in taken:
                self._frames.put(mfn)
            raise
        for mfn in self._guests:
            self._frames.put(mfn)
        self._guests = list(frames)
        for page in range(xen.FIRST_RESERVED_GDT_PAGE):
            shown = frames[page] << 12 if page < len(frames) else GDT + page * PAGE
            self._ram.write64(self._l1 + 8 * page, shown | P)

    def _check(self, mfn: int) -> None:
        words = list(struct.iter_unpack("<II", self._ram.read(mfn << 12, PAGE)))
        self._ram.write(mfn << 12, b"".join(struct.pack("<II", *self.checked(low, high)) for low, high in words))

    def update(self, address: int, low: int, high: int) -> None:
        """update_descriptor: one entry at machine ``address``, in a descriptor table or any page that is no page table."""
        mfn = address >> 12
        if address & 7 or not self._frames.owns(mfn):
            raise Refused(f"{address:#x} is not the address of a descriptor of the guest's")
        if self._frames.kind(mfn) not in (Kind.DESCRIPTORS, Kind.WRITABLE, Kind.NONE):
            raise Refused(f"frame {mfn:#x} is a {self._frames.kind(mfn).value}")
        self._ram.write(address, struct.pack("<II", *self.checked(low, high)))


class WideDescriptorTables(DescriptorTables):
    """The same for a 64-bit guest (xen-x86_64.h: FLAT_RING3_CS32 …). No gate leads past the hypervisor."""

    flat: Mapping[int, bytes] = MappingProxyType({
        xen.FLAT_RING3_CS32: _unlimited(0xFB, 0xC), xen.FLAT_RING3_SS64: _unlimited(0xF3, 0xC), xen.FLAT_RING3_CS64: _unlimited(0xFB, 0xA)})
    checked = staticmethod(checked_wide)

    def set_kernel_stack(self, ss: int, rsp: int) -> None:
        """Nothing to do: every entry comes to the hypervisor first, which builds the guest's frames."""

    def set_direct_gate(self, vector: int, trap: Trap | None) -> None:
        """No gate goes from ring 3 to ring 3 with another stack and other page tables."""
        assert trap is None
