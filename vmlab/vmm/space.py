"""Machine memory as a VMM divides it, and the hole: the VMM's pages in the guest's linear space.

Host-physical: the VMM below 16 MiB, the guest's frames above. The hole lies at the top of the linear space. Its pages
are supervisor and read-only, so that CR0.WP = 1 stops even ring 1, which is supervisor to paging, from writing
them (SDM Vol. 3A §4.6). Every page directory that the CPU is given for the last GiB has the hole's two entries.

In long mode the hole is at the end of the 64-bit space, and the guest's kernel runs at CPL 3 (segments have no limits there,
and ring 1 is supervisor): pages that its translated code needs are user pages, and the directory entries let users in
while the kernel runs, and nobody else.
"""

from __future__ import annotations

from vmlab.machine.memory import PAGE, Ram
from vmlab.machine.paging import RW, US, P

GUEST_FRAMES = 16 << 20            # hpa of guest-physical 0
POOL = range(8 << 20, GUEST_FRAMES)  # hpa of the frames that shadow and nested tables are made of
HOLE_TABLES = 0x2000               # hpa of the hole's two page tables
HOLE = 0xFFC00000                  # linear; the last 4 MiB, which a guest must leave free
HOLE_SIZE = 4 << 20
HOLE_FRAMES = 4 << 20              # hpa of the hole's first page
LARGE = 2 << 20                    # what one entry of a PAE or four-level page directory maps


def hole_address(address: int, bits: int) -> int:
    """Where an address of the hole, given for 32-bit code, is in code of ``bits``: sign-extended in 64-bit mode."""
    return address | 0xFFFFFFFF << 32 if bits == 64 else address


class StaticSpace:
    """The hole: VMM pages that the CPU must reach while a deprivileged guest runs."""

    def __init__(self, ram: Ram) -> None:
        self.ram = ram
        #: Where the hole begins, as the CPU is now.
        self.base = HOLE
        ram.write(HOLE_TABLES, bytes(2 * PAGE))

    def set_bits(self, bits: int) -> None:
        """The CPU's linear space has 32 or 64 bits from now on."""
        self.base = hole_address(HOLE, bits)

    def show(self, linear: int, frame: int) -> None:
        """Show the page at hpa ``frame`` at ``linear`` (in the hole) too, writable, also to CPL 3 where the directory entries let it in."""
        self.ram.write64(HOLE_TABLES + 8 * ((linear & HOLE_SIZE - 1) // PAGE), frame | P | RW | US)

    def hide(self, linear: int) -> None:
        """Take the page at ``linear`` away from the CPU."""
        self.ram.write64(HOLE_TABLES + 8 * ((linear & HOLE_SIZE - 1) // PAGE), 0)

    def map_hole(self, linear: int, size: int, *, writable: bool = False, user: bool = False) -> int:
        """Show VMM pages to the CPU at ``linear`` (in the hole); returns their hpa.

        :param user: also to CPL 3, where the directory entries let it in (:meth:`directory_entries`).
        """
        offset = linear & HOLE_SIZE - 1
        for page in range(offset & ~(PAGE - 1), offset + size, PAGE):
            self.ram.write64(HOLE_TABLES + 8 * (page // PAGE), HOLE_FRAMES + page | P | (RW if writable else 0) | (US if user else 0))
        return HOLE_FRAMES + offset

    def directory_entries(self, *, user: bool = False) -> tuple[tuple[int, int], ...]:
        """(index, entry) in a page directory of the last GiB. ``user``: CPL 3 may reach what is shown to it."""
        return tuple((HOLE >> 21 & 511 | i, HOLE_TABLES + i * PAGE | RW | P | (US if user else 0)) for i in range(HOLE_SIZE // LARGE))

    def hole_frame(self, linear: int) -> int:
        """The hpa behind an address in the hole."""
        return HOLE_FRAMES + (linear & HOLE_SIZE - 1)

    def in_hole(self, linear: int) -> bool:
        return self.base <= linear < self.base + HOLE_SIZE
