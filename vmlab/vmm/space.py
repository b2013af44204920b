"""Machine memory as a VMM divides it, and the hole: the VMM's pages in the guest's linear space.

Host-physical: the VMM below 16 MiB, the guest's frames above. The hole lies at the top of the linear space. Its pages
are supervisor and read-only, so that CR0.WP = 1 stops even ring 1, which is supervisor to paging, from writing
them (SDM Vol. 3A §4.6). Every page directory that the CPU is given for the last GiB has the hole's two entries.
"""

from __future__ import annotations

from vmlab.machine.memory import PAGE, Ram
from vmlab.machine.paging import RW, P

GUEST_FRAMES = 16 << 20            # hpa of guest-physical 0
POOL = range(8 << 20, GUEST_FRAMES)  # hpa of the frames that shadow and nested tables are made of
HOLE_TABLES = 0x2000               # hpa of the hole's two page tables
HOLE = 0xFFC00000                  # linear; the last 4 MiB, which a guest must leave free
HOLE_SIZE = 4 << 20
HOLE_FRAMES = 4 << 20              # hpa of the hole's first page
LARGE = 2 << 20                    # what one entry of a PAE or four-level page directory maps


class StaticSpace:
    """The hole: VMM pages that the CPU must reach while a deprivileged guest runs."""

    def __init__(self, ram: Ram) -> None:
        self.ram = ram
        ram.write(HOLE_TABLES, bytes(2 * PAGE))

    def map_hole(self, linear: int, size: int, *, writable: bool = False) -> int:
        """Show VMM pages to the CPU at ``linear`` (in the hole); returns their hpa."""
        for page in range(linear & ~(PAGE - 1), linear + size, PAGE):
            frame = HOLE_FRAMES + page - HOLE
            self.ram.write64(HOLE_TABLES + 8 * ((page - HOLE) // PAGE), frame | P | (RW if writable else 0))
        return HOLE_FRAMES + linear - HOLE

    def directory_entries(self) -> tuple[tuple[int, int], ...]:
        """(index, entry) in a page directory of the last GiB."""
        return tuple((HOLE >> 21 & 511 | i, HOLE_TABLES + i * PAGE | RW | P) for i in range(HOLE_SIZE // LARGE))

    def hole_frame(self, linear: int) -> int:
        """The hpa behind an address in the hole."""
        return HOLE_FRAMES + linear - HOLE

    @staticmethod
    def in_hole(linear: int) -> bool:
        return HOLE <= linear < HOLE + HOLE_SIZE
