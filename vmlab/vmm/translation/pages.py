"""Guest code that the guest writes: frames with translated code are guarded by the VMM.

They are read-only in every shadow table, so a store to one faults through whatever mapping it comes; the VMM carries it
out, and units whose bytes it reached are cut off, the others stay. Stores that the VMM makes for the guest are heard of as
well. The guest's code lies in the guest's memory as ever, so code that reads itself sees its own bytes.

A unit is found by its linear address, so it also ends when the guest maps that address elsewhere: whenever the guest
changes address space, or flushes a page, the pages of translated code are looked up again.
"""

from __future__ import annotations

from collections.abc import Callable

from vmlab.ledger import Counts
from vmlab.machine.memory import PAGE
from vmlab.machine.paging import PageFault
from vmlab.vmm.guest_tables import GuestMmu
from vmlab.vmm.shadow import ShadowPager
from vmlab.vmm.translation.translator import Translator
from vmlab.vmm.translation.units import Unit


class CodePages:
    """Which guest frames and pages hold translated code."""

    def __init__(self, pager: ShadowPager, translator: Translator, counts: Counts) -> None:
        self._pager, self._translator, self._counts = pager, translator, counts
        self._mmu: GuestMmu = pager.mmu
        pager.track()
        self._by_frame: dict[int, dict[int, Unit]] = {}    # guest frame -> address in the cache -> unit
        self._frames: dict[int, int] = {}                  # linear page -> guest frame, while it has units
        self._by_page: dict[int, dict[int, Unit]] = {}
        #: Told of bytes that have just been translated: (frame, first byte, end).
        self.on_units: Callable[[int, int, int], None] = lambda frame, first, end: None
        translator.on_unit, translator.on_drop = self._made, self.dropped
        told = self._mmu.memory.on_write

        def on_write(gpa: int, size: int) -> None:
            told(gpa, size)
            self.wrote(gpa, size)

        self._mmu.memory.on_write = on_write

    @staticmethod
    def _pages(unit: Unit) -> list[int]:
        return sorted({unit.guest & ~(PAGE - 1), (unit.guest_end - 1) & ~(PAGE - 1)})

    def _made(self, unit: Unit) -> None:
        for page in self._pages(unit):
            gpa = self._mmu.translate(page, fetch=True)
            if not self._mmu.memory.inside(gpa):
                continue  # no RAM there: nothing can be written
            frame = gpa >> 12
            self._frames[page] = frame
            self._by_page.setdefault(page, {})[unit.start] = unit
            units = self._by_frame.setdefault(frame, {})
            units[unit.start] = unit
            self.on_units(frame, *self._bytes_in(unit, page))
            if frame not in self._pager.guarded:
                self._pager.guard(frame)

    @staticmethod
    def _bytes_in(unit: Unit, page: int) -> tuple[int, int]:
        """The bytes (first, end) of this page that the unit was made of."""
        return max(unit.guest, page) - page, min(unit.guest_end, page + PAGE) - page

    def code_in(self, frame: int) -> list[tuple[int, int]]:
        """The bytes (first, end) of this frame that were translated."""
        return [self._bytes_in(unit, page) for unit in self._by_frame.get(frame, {}).values()
                for page in self._pages(unit) if self._frames.get(page) == frame]

    def dropped(self, unit: Unit) -> None:
        """This unit is no more: its frame may be written if no other unit needs it."""
        for page in self._pages(unit):
            frame = self._frames.get(page)
            if frame is None:
                continue
            self._by_page[page].pop(unit.start, None)
            if not self._by_page[page]:
                del self._by_page[page], self._frames[page]
            units = self._by_frame.get(frame, {})
            units.pop(unit.start, None)
            if not units and frame in self._pager.guarded:
                self._by_frame.pop(frame, None)
                self._pager.unguard(frame)

    def wrote(self, gpa: int, size: int) -> None:
        """The VMM or a device stored into guest memory: cut off the units that were made of these bytes."""
        for frame in range(gpa >> 12, (gpa + size - 1 >> 12) + 1):
            for unit in [u for _, u in sorted(self._by_frame.get(frame, {}).items())]:
                if unit.alive and self._overlaps(unit, frame, gpa, gpa + size):
                    self._translator.invalidate(unit)

    def _overlaps(self, unit: Unit, frame: int, start: int, end: int) -> bool:
        for page in self._pages(unit):
            if self._frames.get(page) == frame:
                first, last = ((frame << 12) + byte for byte in self._bytes_in(unit, page))
                if start < last and first < end:
                    return True
        return False

    def look_again(self) -> None:
        """The guest's linear addresses may lead elsewhere now: cut off units whose code is no longer where it was."""
        regions = set()
        for page, frame in sorted(self._frames.items()):
            if page not in self._frames:
                continue  # went with another page's unit
            regions.add(page >> 21)
            try:
                now = self._mmu.peek(page)
            except PageFault:
                now = None
            if now is None or now >> 12 != frame:
                for unit in [u for _, u in sorted(self._by_page[page].items())]:
                    if unit.alive:
                        self._translator.invalidate(unit)
        # A VMM compares whole tables of the guest's: one walk for each region of 2 MiB.
        self._counts["vmm.guest_walk"] += len(regions)
