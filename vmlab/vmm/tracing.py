"""What a shadow pager knows of the guest's tables, frame by frame: which stores are to be seen, and what follows from one.

A table that the current address space reaches is traced however often it is stored to; one that it does not reach is given up
at the first store, for its frame was recycled (docs/adr/0015-tracing.md).
"""

from __future__ import annotations

from vmlab.machine.paging import CR4_PAE, EFER_NXE, NX, PS, RW, US, A, P
from vmlab.machine.paging import D as DIRTY
from vmlab.vmm.shadow_page import ALL, FRAME, TABLE, ShadowPage
from vmlab.vmm.shadow_tables import ShadowTables


class Tracing(ShadowTables):
    """Shadow tables that follow the guest's stores."""

    def traces(self, gfn: int) -> bool:
        """Whether stores to this frame fault because it holds one of the guest's tables."""
        return gfn in self._by_gfn

    def derived(self, gfn: int) -> list[tuple[int, int]]:
        """The bytes (first, end) of the guest's table in this frame that shadow entries were made from."""
        found = []
        for page in self._by_gfn.get(gfn, ()):
            indices = list(page.children) if page.level > 1 else [
                index for index, entry in enumerate(TABLE.unpack_from(self._ram.bytes, page.frame)) if entry]
            found += [self._guest_bytes(page, index) for index in indices]
        return found

    def _is_traced(self, gfn: int) -> bool:
        """Whether the current address space uses a table in this frame; one that only others used is given up."""
        pages = self._by_gfn[gfn]
        if any(self._in_use(page) for page in pages):
            return True
        self._counts["shadow.untrace"] += 1
        for page in list(pages):
            self._give_up(page)
        return False

    def _in_use(self, page: ShadowPage) -> bool:
        return self._is_current(page) or any(self._in_use(parent) for parent in page.parents.values())

    def _give_up(self, page: ShadowPage) -> None:
        if page.key not in self._pages:
            return
        for at, parent in list(page.parents.items()):
            self._unlink(parent, (at - parent.frame) // 8)
        for key, root in list(self._roots.items()):
            if root is page:
                self._forget_root(key)

    def wrote(self, gpa: int, size: int) -> None:
        """The VMM or a device stored into guest memory: bring entries derived from it into step."""
        for gfn in range(gpa >> 12, (gpa + size - 1 >> 12) + 1):
            if gfn in self._by_gfn and self._is_traced(gfn):
                first, last = max(gpa, gfn << 12) & 0xFFF, min(gpa + size, gfn + 1 << 12) - 1 & 0xFFF
                for page in list(self._by_gfn.get(gfn, ())):
                    if page.key in self._pages:
                        self._refresh(page, first, last)

    def _refresh(self, page: ShadowPage, first: int, last: int) -> None:
        """Guest entries at these byte offsets of the table changed."""
        wide = bool(self._mode[2] & CR4_PAE)
        for guest_index in range(first // (8 if wide else 4), last // (8 if wide else 4) + 1):
            if wide:
                indices: tuple[int, ...] = (guest_index,)
                entry = self._memory.read64((page.gfn << 12) + 8 * guest_index)
            else:
                entry = self._memory.read32((page.gfn << 12) + 4 * guest_index)
                span = 512 if page.level == 1 else 256
                if guest_index // span != page.quadrant:
                    continue
                within = guest_index % span
                indices = (within,) if page.level == 1 else (2 * within, 2 * within + 1)
            for index in indices:
                if page.level == 1:
                    self._refresh_leaf(page, index, entry)
                elif index in page.children and not self._still(page, page.children[index], entry):
                    self._unlink(page, index)

    def _still(self, page: ShadowPage, child: ShadowPage, entry: int) -> bool:
        """Whether the lower table is what the guest's entry says now."""
        if child.direct or not entry & P or not entry & A or entry & PS:
            return False
        access = page.access & (entry | NX) | entry & NX
        return child.gfn == (entry & FRAME) >> 12 and child.access == access & (ALL | NX)

    def _refresh_leaf(self, page: ShadowPage, index: int, entry: int) -> None:
        old = self._ram.read64(page.frame + 8 * index)
        if not old:
            return
        frame = entry & FRAME
        usable = entry & P and entry & A and self._memory.inside(frame) and not self.is_device(frame) and self._mode[1]
        if entry & NX and not self._mode[3] & EFER_NXE:
            usable = False      # a reserved bit: the guest's fault
        new = 0
        if usable:
            access = page.access & (entry | NX) | entry & NX
            new = self._leaf(frame, page.view, writable=bool(access & RW), user=bool(access & US), no_execute=bool(access & NX),
                             dirty=bool(entry & DIRTY))
        self._set_leaf(page, index, new)
