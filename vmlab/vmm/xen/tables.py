"""What a paravirtual guest's page tables are like at its width: which entries are its own, what they may say, what they name.

32 bits: PAE, 512 entries of 8 bytes but for the four of the L3 (SDM Vol. 3A §4.4). The L2 that L3 slot 3 names holds the
hypervisor's hole: its last entries are the hypervisor's, so no two address spaces may share one.
64 bits: four levels (§4.5). Slots 256 to 271 of the L4 are the hypervisor's (arch-x86/xen-x86_64.h: HYPERVISOR_VIRT_START).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from vmlab.machine.paging import RW, A, D, P
from vmlab.machine.paging import US as USER
from vmlab.vmm.xen import HYPERVISOR_START, WIDE_HYPERVISOR_END, WIDE_HYPERVISOR_START

FRAME = 0xFFFFFF000                 # of an entry: machine addresses have 36 bits here
_SOFTWARE = 0xE00                   # three bits that are software's


class Kind(enum.Enum):
    """What a frame serves as."""

    NONE = "no table and not writable"
    L1 = "L1 page table"
    L2 = "L2 page table"
    L2_HOLE = "L2 page table with the hypervisor's hole"
    L3 = "L3 page table"
    L4 = "L4 page table"
    WRITABLE = "writable page"
    DESCRIPTORS = "descriptor table"


TABLES = frozenset((Kind.L1, Kind.L2, Kind.L2_HOLE, Kind.L3, Kind.L4))

#: (slot, entry) of the hypervisor's own part of a linear space.
HoleEntries = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Format:
    """The tables of one width.

    ``shifts``: of the address, from the root down. ``flags``: what an entry may say beside its frame. ``first_hole``,
    ``end_hole``: the hypervisor's slots of the table that ``holds_hole``. ``slots``: how many of a table the CPU looks at.
    ``added``: flags that every entry of the guest's has in force.
    """

    shifts: tuple[int, ...]
    levels: Mapping[int, Kind]
    flags: Mapping[Kind, int]
    holds_hole: Kind
    first_hole: int
    end_hole: int
    slots: Mapping[Kind, int]
    added: int = 0

    @property
    def root(self) -> Kind:
        """What CR3 names."""
        return self.levels[len(self.shifts)]

    def guests(self, kind: Kind, slot: int) -> bool:
        """Whether this slot of such a table is the guest's own."""
        return kind is not self.holds_hole or not self.first_hole <= slot < self.end_hole

    def looked_at(self, kind: Kind) -> int:
        """How many entries a table has."""
        return self.slots.get(kind, 512)

    def named(self, kind: Kind, slot: int) -> Kind:
        """What the frame serves as that this slot of a table above L1 names."""
        if kind is Kind.L3 and self.holds_hole is Kind.L2_HOLE:
            return Kind.L2_HOLE if slot == HOLE_SLOT else Kind.L2
        return {Kind.L4: Kind.L3, Kind.L3: Kind.L2}.get(kind, Kind.L1)

    def required(self, kind: Kind) -> int | None:
        """The slot that must have an entry, if there is one: an address space without the hypervisor's hole is none."""
        return HOLE_SLOT if kind is Kind.L3 and self.holds_hole is Kind.L2_HOLE else None

    def is_register(self, kind: Kind) -> bool:
        """Whether the CPU keeps such entries from CR3 load to CR3 load (the four of PAE's L3; SDM Vol. 3A §4.4.1)."""
        return kind is Kind.L3 and self.root is Kind.L3


HOLE_SLOT = 3                       # of a PAE L3
_L1, _UPPER = P | RW | USER | A | D | _SOFTWARE, P | RW | USER | A | _SOFTWARE
#: Every other bit of a PDPTE is reserved (SDM Vol. 3A table 4-8).
PAE = Format((30, 21, 12), {1: Kind.L1, 2: Kind.L2, 3: Kind.L3},
             {Kind.L1: _L1, Kind.L2: _UPPER, Kind.L2_HOLE: _UPPER, Kind.L3: P | _SOFTWARE},
             Kind.L2_HOLE, HYPERVISOR_START >> 21 & 511, 512, {Kind.L3: HOLE_SLOT + 1})
#: A kernel in ring 3 is a user to the CPU, so everything that it maps is a user's; its own users get another root.
FOUR_LEVEL = Format((39, 30, 21, 12), {1: Kind.L1, 2: Kind.L2, 3: Kind.L3, 4: Kind.L4},
                    {Kind.L1: _L1, Kind.L2: _UPPER | D, Kind.L3: _UPPER | D, Kind.L4: _UPPER | D},
                    Kind.L4, WIDE_HYPERVISOR_START >> 39 & 511, WIDE_HYPERVISOR_END >> 39 & 511, {}, added=USER)
