"""Windows: pages that the VMM watches, writable for simulated stores, each with a chart of what a store there concerns.

A window shows one of the guest's own frames, so a guest kernel that stores to it by itself harms nobody else. The shadow
tables are never shown: whoever can write them owns the machine, and this machine has no segment limits to hide them
behind. So a simulated store may go only where *nothing follows* from the bytes that it changes: an entry of the guest's
that no shadow entry was made from, bytes beside translated code. There the store is all there is to do. The chart says so,
byte by byte, read-only; everything else calls out.

One window is no memory: that of the local APIC's task priority (:mod:`vmlab.vmm.translation.priority`).

A window lasts as long as a TLB entry may: what changes translations (MOV to CR0, CR3 or CR4, INVLPG) has each window looked
at again, and one whose page leads elsewhere, may no longer be written, or is no longer watched, is closed.
"""

from __future__ import annotations

import struct

from capstone import x86_const as cs_x86

from vmlab.ledger import Counts
from vmlab.machine import paging
from vmlab.machine.devices import lapic
from vmlab.machine.memory import PAGE
from vmlab.machine.paging import PageFault
from vmlab.vmm.shadow import ShadowPager
from vmlab.vmm.translation.cache import Cache
from vmlab.vmm.translation.forms import fits
from vmlab.vmm.translation.layout import CHARTS, NO_WINDOW, WINDOW_COUNT, WINDOWS
from vmlab.vmm.translation.pages import CodePages
from vmlab.vmm.translation.priority import APIC_FRAME, Priority
from vmlab.vmm.translation.units import Site


def _sets_priority(site: Site, address: int) -> bool:
    """MOV of four bytes to the task priority register."""
    instruction = site.instruction
    return (instruction is not None and address & (PAGE - 1) == lapic.TPR and instruction.cs.id == cs_x86.X86_INS_MOV
            and instruction.cs.operands[0].size == 4)


class Window:
    """One window: ``number`` says where it lies in the hole."""

    def __init__(self, number: int, page: int, frame: int) -> None:
        self.number, self.page, self.frame = number, page, frame
        self.sites: list[Site] = []


class Windows:
    """All windows of one guest."""

    def __init__(self, pager: ShadowPager, cache: Cache, code: CodePages, priority: Priority, counts: Counts) -> None:
        self._pager, self._mmu, self._cache, self._code, self._counts = pager, pager.mmu, cache, code, counts
        self._space, self._priority = cache.space, priority
        self._by_page: dict[int, Window] = {}
        self._free = list(range(WINDOW_COUNT - 1, 0, -1))       # the first chart forbids everything
        self._space.ram.write(self._space.map_hole(CHARTS, WINDOW_COUNT * PAGE, user=True), b"\1" * PAGE)
        pager.on_derived = code.on_units = self._concerns

    def __bool__(self) -> bool:
        return bool(self._by_page)

    @property
    def _wide(self) -> bool:
        """Whether the code that stores through windows is of 64 bits."""
        return self._cache.forms.bits == 64

    @property
    def _reach(self) -> int:
        """A store is four bytes at most, or eight: it concerns the VMM from so many bytes before what does."""
        return self._cache.forms.word - 1

    def watched(self, address: int) -> bool:
        """Whether a store to this linear address of the guest, just made, went to what the VMM watches."""
        try:
            gpa = self._mmu.peek(address)
        except PageFault:
            return True     # the store took its own page's mapping away: it went to a page table
        return self._pager.is_device(gpa) or self._watches(gpa >> 12)

    def _watches(self, frame: int) -> bool:
        return frame == APIC_FRAME or frame in self._pager.guarded or self._pager.traces(frame)

    # ---- opening and closing
    def offer(self, site: Site, address: int) -> None:
        """``site`` called out for a store to ``address`` in a watched page: let its next one there stay in the cache, if it may."""
        page = address & ~(PAGE - 1)
        frame = self._writable(page)
        if frame is None or not self._watches(frame) or (self._wide and not fits(-page)):
            return
        if frame == APIC_FRAME and (self._wide or not _sets_priority(site, address)):
            return      # 64-bit code has CR8, and there is one way to the task priority at a time
        window = self._by_page.get(page)
        if window is None:
            window = self._open(page, frame)
        self._draw(window)
        if site not in window.sites:
            self.release(site)
            window.sites.append(site)
            self._counts["bt.window"] += 1
            self._aim(site, (page, CHARTS + window.number * PAGE, WINDOWS + window.number * PAGE))

    def release(self, site: Site) -> None:
        """``site`` is gone, or goes elsewhere."""
        for window in self._by_page.values():
            if site in window.sites:
                window.sites.remove(site)

    def look_again(self) -> None:
        """The guest's translations may have changed."""
        for page, window in list(self._by_page.items()):
            if self._writable(page) != window.frame or not self._watches(window.frame):
                self._close(window)

    def close_all(self) -> None:
        """What all windows rest on is gone."""
        for window in list(self._by_page.values()):
            self._close(window)

    def _open(self, page: int, frame: int) -> Window:
        if not self._free:
            self._close(next(iter(self._by_page.values())))     # the oldest
        window = self._by_page[page] = Window(self._free.pop(), page, frame)
        if frame == APIC_FRAME:
            self._priority.open(window.number)
        else:
            self._space.show(WINDOWS + window.number * PAGE, self._mmu.memory.base + (frame << 12))
            self._pager.explained.add(frame)
        self._pager.stale = True
        return window

    def _close(self, window: Window) -> None:
        del self._by_page[window.page]
        for site in window.sites:
            self._aim(site, NO_WINDOW)
        if window.frame == APIC_FRAME:
            self._priority.close()
        self._space.hide(WINDOWS + window.number * PAGE)
        self._pager.stale = True
        if all(other.frame != window.frame for other in self._by_page.values()):
            self._pager.explained.discard(window.frame)
        self._free.append(window.number)

    def _writable(self, page: int) -> int | None:
        """The guest frame behind this page, if the guest's kernel may store there and has; leaves no trace in its tables."""
        mmu = self._mmu
        if not mmu.paging:
            return self._shown(page)
        try:
            found = paging.walk(mmu.memory, mmu.tables, page, 0, mark=False)
        except PageFault:
            return None
        gpa = found.frame | page & ((1 << found.shift) - 1)
        return self._shown(gpa) if found.writable and found.steps[-1].entry & paging.D else None

    def _shown(self, gpa: int) -> int | None:
        """The frame, if a window can be opened on it."""
        return gpa >> 12 if self._mmu.memory.inside(gpa) or gpa >> 12 == APIC_FRAME else None

    def _aim(self, site: Site, where: tuple[int, int, int]) -> None:
        page, chart, frame = where
        for at, value in zip(site.binding, (-page & 0xFFFFFFFF, chart, frame), strict=True):
            self._cache.patch(at, struct.pack("<I", value))

    # ---- the chart
    def _draw(self, window: Window) -> None:
        if window.frame == APIC_FRAME:
            self._space.ram.write(self._space.hole_frame(CHARTS + window.number * PAGE), b"\1" * PAGE)
            return      # the guest's next run allows what may be
        chart = bytearray(PAGE - self._reach) + b"\1" * self._reach       # a store that runs into the next page
        for first, end in (*self._pager.derived(window.frame), *self._code.code_in(window.frame)):
            first = max(first - self._reach, 0)
            chart[first:end] = b"\1" * (end - first)
        self._space.ram.write(self._space.hole_frame(CHARTS + window.number * PAGE), bytes(chart[:PAGE]))

    def _concerns(self, frame: int, first: int, end: int) -> None:
        """From now on something follows from these bytes of a frame."""
        for window in self._by_page.values():
            if window.frame == frame:
                begin = max(first - self._reach, 0)
                self._space.ram.write(self._space.hole_frame(CHARTS + window.number * PAGE + begin), b"\1" * (end - begin))
