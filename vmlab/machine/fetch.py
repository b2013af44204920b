"""Where the code lies that the CPU is about to run.

A guest comes back to the same pages of code all the time, and each time a block has to be looked at, its address is translated
as the CPU would. A walk is a function of the control registers and of the entries that it read: it is remembered with them, and
holds as long as they read the same. So nothing has to be known of flushes, and nothing is older than the tables are.
"""

from __future__ import annotations

from vmlab.machine import paging
from vmlab.machine.cpu import Cpu
from vmlab.machine.memory import PAGE
from vmlab.machine.state import HF_GUEST

_KEPT = 1 << 16     # pages


class Fetch:
    """Translates the linear addresses of code; marks accessed bits as the CPU did when it fetched."""

    def __init__(self, cpu: Cpu) -> None:
        self._cpu, self._words = cpu, cpu.ram.words
        #: (page, CR0, CR3, CR4, EFER) → page frame's address; the words of memory that held the entries, and what they held.
        self._walks: dict[tuple[int, int, int, int, int], tuple[int, tuple[tuple[int, int], ...]]] = {}

    def pieces(self, address: int, size: int) -> list[tuple[int, int]]:
        """(hpa, bytes) of each page's part; raises :class:`~vmlab.machine.paging.PageFault`. The window is loaded."""
        cpu = self._cpu
        cr0 = cpu.cr(0)
        if not cr0 & paging.CR0_PG or (cpu.nested_root and cpu.hflags & HF_GUEST):
            return cpu.pieces(address, size, write=False, user=False)
        limit = 0xFFFFFFFFFFFFFFFF if cpu.long_mode else 0xFFFFFFFF
        registers = cr0, cpu.cr(3), cpu.cr(4), cpu.efer
        found = []
        while size > 0:
            address &= limit
            n = min(size, PAGE - address % PAGE)
            found.append((self._frame(address // PAGE, registers) + address % PAGE, n))
            address, size = address + n, size - n
        return found

    def _frame(self, page: int, registers: tuple[int, int, int, int]) -> int:
        words = self._words
        known = self._walks.get((page, *registers))
        if known is not None:
            for at, held in known[1]:
                if words[at] != held:
                    break
            else:
                return known[0]
        tables = paging.Tables(*registers)
        walk = paging.check(self._cpu.ram, tables, page * PAGE)
        frame = walk.frame | page * PAGE & ((1 << walk.shift) - 1)
        places = [step.at // 8 for step in walk.steps]
        if tables.format == "pae":          # whose first level is no step
            places.append((tables.cr3 & 0xFFFFFFE0) // 8 + (page >> 18 & 3))
        if max(places) < len(words):        # a table beyond RAM reads as all ones: not worth remembering
            if len(self._walks) >= _KEPT:
                self._walks.clear()
            self._walks[page, *registers] = frame, tuple((at, words[at]) for at in places)
        return frame
