"""Machine memory as a VMM divides it, and the static page tables that it owns.

Host-physical: the VMM below 16 MiB, the guest's frames above. The guest runs unpaged as it believes; in
truth CR0.PG is on and these tables map linear = guest-physical to its frames (ring 1 and 3, writable),
and a hole at the top of the linear space to VMM pages: supervisor and read-only, so that CR0.WP = 1
stops even ring 1, which is supervisor to paging, from writing them (SDM Vol. 3A §4.6).
"""

from __future__ import annotations

from vmlab.machine.memory import PAGE, Ram
from vmlab.machine.paging import PS, RW, US, P

GUEST_FRAMES = 16 << 20            # hpa of guest-physical 0
PAGE_DIRECTORY, HOLE_TABLE = 0x1000, 0x2000
HOLE = 0xFFC00000                  # linear; the last 4 MiB, which no guest of 16 MiB maps
HOLE_SIZE = 4 << 20
HOLE_FRAMES = 4 << 20              # hpa of the hole's first page
LARGE = 4 << 20


class StaticSpace:
    """The page directory that the physical CR3 points at. 4 MiB pages for the guest, 4 KiB pages in the hole."""

    def __init__(self, ram: Ram, guest_memory: int) -> None:
        self.ram, self.guest_memory = ram, guest_memory
        for slot in range(1024):
            ram.write32(PAGE_DIRECTORY + 4 * slot, 0)
            ram.write32(HOLE_TABLE + 4 * slot, 0)
        for base in range(0, guest_memory, LARGE):
            self._entry(base, (GUEST_FRAMES + base) | PS | US | RW | P)
        self._entry(HOLE, HOLE_TABLE | RW | P)

    def _entry(self, linear: int, value: int) -> None:
        self.ram.write32(PAGE_DIRECTORY + 4 * (linear >> 22), value)

    def map_hole(self, linear: int, size: int, *, writable: bool = False) -> int:
        """Show VMM pages to the CPU at ``linear`` (in the hole); returns their hpa."""
        for page in range(linear & ~(PAGE - 1), linear + size, PAGE):
            frame = HOLE_FRAMES + page - HOLE
            self.ram.write32(HOLE_TABLE + 4 * ((page - HOLE) // PAGE), frame | P | (RW if writable else 0))
        return HOLE_FRAMES + linear - HOLE

    def hole_frame(self, linear: int) -> int:
        """The hpa behind an address in the hole."""
        return HOLE_FRAMES + linear - HOLE

    def map_open_bus(self, linear: int) -> None:
        """The guest reached beyond its RAM: on the bare machine nothing answers there, so let nothing answer."""
        base = linear & ~(LARGE - 1)
        nowhere = base if base >= self.ram.size else base + ((self.ram.size + LARGE - 1) & ~(LARGE - 1))
        self._entry(base, nowhere | PS | US | RW | P)

    @staticmethod
    def in_hole(linear: int) -> bool:
        return HOLE <= linear < HOLE + HOLE_SIZE
