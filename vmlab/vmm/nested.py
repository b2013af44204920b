"""Nested page tables: guest-physical to machine memory, walked by the CPU itself (APM Vol. 2 §15.25).

The guest's own page tables are the guest's: it writes them, loads CR3 and takes its page faults with no exit. The VMM
fills a second set of tables, four-level as its own, one page for each part of guest memory that is touched
for the first time; after that it is not asked again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vmlab.ledger import Counts
from vmlab.machine.memory import PAGE
from vmlab.machine.paging import PS, RW, US, A, D, P
from vmlab.vmm.guest_tables import GuestMemory
from vmlab.vmm.space import LARGE, POOL

_FRAME = 0x000FFFFFFFFFF000
_ALL = P | RW | US | A | D          # the CPU's accesses count as a user's; this one keeps no A and D bits of its own here


class NestedPager:
    """The nested tables of one guest. ``page_size``: 4 KiB, or 2 MiB where the guest's RAM has whole pages of that size."""

    def __init__(self, memory: GuestMemory, counts: Counts, page_size: int,
                 is_device: Callable[[int], bool] = lambda gpa: False) -> None:
        self._memory, self._ram, self._counts, self._page_size = memory, memory.ram, counts, page_size
        self._nowhere = (self._ram.size + LARGE - 1) & ~(LARGE - 1)
        self._next = POOL.start
        #: Guest-physical addresses at which a device answers: never mapped, accesses are carried out by the VMM.
        self.is_device = is_device
        #: Told of a frame beyond the guest's RAM when it is first reached.
        self.on_foreign: Callable[[int], None] = lambda gpa: None
        self.root = self._table()

    def state(self) -> dict[str, Any]:
        """The tables are in machine memory; this is how far the pool is used."""
        return {"next": self._next}

    def from_state(self, state: dict[str, Any]) -> None:
        self._next = state["next"]

    def _table(self) -> int:
        frame = self._next
        assert frame in POOL, "nested tables of a guest of this size fit into the pool many times"
        self._next += PAGE
        self._ram.write(frame, bytes(PAGE))
        return frame

    def fault(self, gpa: int) -> bool:
        """Nothing maps ``gpa``: map it. False where a device answers."""
        if self.is_device(gpa):
            return False
        self._counts["nested.fault"] += 1
        table = self.root
        inside = self._memory.inside(gpa)
        large = inside and self._page_size == LARGE
        for shift in (39, 30) if large else (39, 30, 21):
            at = table + 8 * (gpa >> shift & 511)
            entry = self._ram.read64(at)
            if not entry:
                entry = self._table() | P | RW | US | A
                self._ram.write64(at, entry)
            table = entry & _FRAME
        if not inside:
            self.on_foreign(gpa & ~(PAGE - 1))
        if large:
            self._ram.write64(table + 8 * (gpa >> 21 & 511), (self._memory.base + gpa) & ~(LARGE - 1) | _ALL | PS)
        else:
            frame = (self._memory.base + gpa) & _FRAME if inside else self._nowhere
            self._ram.write64(table + 8 * (gpa >> 12 & 511), frame | _ALL)
        return True
