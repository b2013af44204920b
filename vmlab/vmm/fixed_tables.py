"""Tables of a pager's that no table of the guest's stands behind: the hole's, and the direct map for an unpaged guest."""

from __future__ import annotations

from collections.abc import Callable

from vmlab.machine.memory import PAGE, Ram
from vmlab.machine.paging import PS, RW, A, P
from vmlab.machine.paging import D as DIRTY
from vmlab.vmm.guest_tables import GuestMemory
from vmlab.vmm.shadow_page import ALL, FRAME, LAST, TABLE, ShadowPage, View
from vmlab.vmm.space import LARGE, StaticSpace


class HoleTables:
    """The way to the VMM's own pages, wherever the guest has no table on it. Without ``space`` there are no such pages."""

    def __init__(self, ram: Ram, space: StaticSpace | None, allocate: Callable[[], int]) -> None:
        self._ram, self._space, self._allocate = ram, space, allocate
        self._directory = 0         # a page directory with nothing but the hole, for roots whose last GiB the guest does not use
        self._long: dict[View, tuple[int, int]] = {}    # in long mode: tables of levels 3 and 2 with nothing but the hole
        if space is not None:
            self._directory = allocate()
            self.copy(self._directory)

    def copy(self, directory: int, view: View = View.ONE) -> None:
        """Put the hole's entries into a page directory of its GiB, if there is a hole."""
        if self._space is not None:
            for index, entry in self._space.directory_entries(user=view is View.KERNEL):
                self._ram.write64(directory + 8 * index, entry)

    def put(self, page: ShadowPage, slot: int, *, long_mode: bool) -> None:
        """The guest has no table in this slot: where it is on the way to the hole, there is one of the VMM's."""
        if page.hole and page.level > 2:
            if slot == LAST:
                self._ram.write64(page.frame + 8 * slot, self._long_tables(page.view)[4 - page.level] | P | ALL | A)
        elif self._directory and page.level == 3 and slot == 3 and not long_mode:
            self._ram.write64(page.frame + 8 * slot, self._directory | P)

    def _long_tables(self, view: View) -> tuple[int, int]:
        """In long mode the last entries of levels 4 and 3 lead to the hole."""
        found = self._long.get(view)
        if found is None:
            found = self._long[view] = self._allocate(), self._allocate()
            self._ram.write64(found[0] + 8 * LAST, found[1] | P | ALL | A)
            self.copy(found[1], view)
        return found


class DirectMap:
    """Linear = guest-physical: 2 MiB pages to the guest's frames, and beyond its RAM to ``nowhere``, where nothing answers."""

    def __init__(self, memory: GuestMemory, nowhere: int, is_device: Callable[[int], bool], holes: HoleTables, allocate: Callable[[], int]) -> None:
        self._ram, self._allocate = memory.ram, allocate
        self.root = ShadowPage((0, 3, 0, ALL, True, False, View.ONE, 0), allocate())
        for slot in range(4):
            directory = allocate()
            entries = []
            for index in range(512):
                gpa = slot << 30 | index * LARGE
                if is_device(gpa):      # and with it what else is in these 2 MiB: the VMM answers
                    entries.append(0)
                    continue
                entries.append((memory.base + gpa if memory.inside(gpa) else nowhere) | PS | ALL | P | A | DIRTY)
            TABLE.pack_into(memory.ram.bytes, directory, *entries)
            if slot == 3:
                holes.copy(directory)
            memory.ram.write64(self.root.frame + 8 * slot, directory | P)

    def set_writable(self, gfn: int, writable: bool) -> None:
        """The right of the entry of one guest frame, whose large page is split when that is first needed."""
        ram = self._ram
        at = (ram.read64(self.root.frame + 8 * (gfn >> 18)) & FRAME) + 8 * (gfn >> 9 & 511)
        entry = ram.read64(at)
        if entry & PS:
            table, rest = self._allocate(), entry & ~PS
            TABLE.pack_into(ram.bytes, table, *(rest + PAGE * i for i in range(512)))
            entry = table | ALL | P | A
            ram.write64(at, entry)
        at = (entry & FRAME) + 8 * (gfn & 511)
        old = ram.read64(at)
        ram.write64(at, old | RW if writable else old & ~RW)
