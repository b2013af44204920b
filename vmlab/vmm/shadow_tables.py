"""The pages of shadow table themselves: their frames, how they are linked, and which entry maps which guest frame.

Who makes an entry knows the guest's tables (:mod:`vmlab.vmm.shadow`, :mod:`vmlab.vmm.tracing`); here is what must hold of all entries
whoever makes them: pages are recycled, a frame that is traced or guarded is writable nowhere, and what the CPU may have cached is known
to be stale.
"""

from __future__ import annotations

from collections.abc import Callable

from vmlab.ledger import Counts
from vmlab.machine.fast_faults import HiddenFaults
from vmlab.machine.memory import PAGE
from vmlab.machine.paging import CR4_PAE, CR4_PGE, CR4_PSE, EFER_LMA, EFER_NXE, NX, RW, US, A, P
from vmlab.machine.paging import D as DIRTY
from vmlab.vmm.fixed_tables import DirectMap, HoleTables
from vmlab.vmm.guest_tables import GuestMmu
from vmlab.vmm.shadow_page import ALL, CLEAN, FRAME, GLOBAL, LAST, TABLE, Key, ShadowPage, View
from vmlab.vmm.space import LARGE, POOL, StaticSpace

RESERVE = 8                         # frames that one fault may need


class ShadowTables:
    """The shadow pages of one guest, and the reverse map from guest frames to the entries that map them.

    :param space: the VMM's own pages in the guest's linear space, or None where it needs none (hardware assistance).
    """

    def __init__(self, mmu: GuestMmu, counts: Counts, *, scheme: str, space: StaticSpace | None,
                 is_device: Callable[[int], bool] = lambda gpa: False) -> None:
        self.mmu, self.scheme = mmu, scheme
        self.tracing = scheme == "tracing"
        self._counts, self._space = counts, space
        self._memory, self._ram = mmu.memory, mmu.memory.ram
        self._nowhere = (self._ram.size + LARGE - 1) & ~(LARGE - 1)
        self._free = list(range(POOL.stop - PAGE, POOL.start - PAGE, -PAGE))
        #: Guest-physical addresses at which a device answers: accesses to them are carried out by the VMM.
        self.is_device = is_device
        #: Guest frames that are read-only everywhere for a reason of the VMM's own (code that it has translated).
        self.guarded: set[int] = set()
        self._tracks_leaves = self.tracing
        #: Frames of which somebody wants to know what shadow entries follow from, told as they are made: (frame, first byte, end).
        self.explained: set[int] = set()
        self.on_derived: Callable[[int, int, int], None] = lambda gfn, first, end: None
        #: What the guest reached for beyond its RAM, told once a frame.
        self.on_foreign: Callable[[int], None] = lambda gpa: None
        self._foreign: set[int] = set()
        self._pages: dict[Key, ShadowPage] = {}
        self._by_gfn: dict[int, list[ShadowPage]] = {}
        self._leaves: dict[int, set[int]] = {}          # guest frame -> addresses of shadow leaves that map it
        self._roots: dict[tuple[int, View], ShadowPage] = {}    # by CR3, least recently used first
        self._local: dict[ShadowPage, None] = {}        # under lazy: pages at level 1 with entries that a CR3 load voids
        self._holes = HoleTables(self._ram, space, self._allocate)
        self._direct = DirectMap(self._memory, self._nowhere, is_device, self._holes, self._allocate)
        self._root = self._direct.root
        self._mode = self._current_mode()
        self._linked = False            # a table was missing on the way of the fault under way
        #: Where C fills leaves (``lazy`` only); :meth:`let_c_fill`.
        self._filled_by_c: HiddenFaults | None = None
        #: Set when a translation that the CPU may have cached was taken away.
        self.stale = False

    @property
    def root(self) -> int:
        """hpa of the root, for the physical CR3."""
        return self._root.frame

    @property
    def long_mode(self) -> bool:
        """Whether the root is a four-level one."""
        return self._root.level == 4

    def _current_mode(self) -> tuple[bool, bool, int, int]:
        mmu = self.mmu
        bits = CR4_PAE | CR4_PSE | (CR4_PGE if self.scheme == "lazy" else 0)
        return mmu.paging, mmu.write_protect, mmu.cr4 & bits, mmu.efer & (EFER_NXE | EFER_LMA)

    # ---- pages
    def _allocate(self) -> int:
        frame = self._free.pop()
        self._ram.write(frame, bytes(PAGE))
        return frame

    def _page(self, key: Key) -> ShadowPage:
        """The shadow page of this key, made if it is not cached."""
        page = self._pages.get(key)
        if page is not None:
            return page
        page = self._pages[key] = ShadowPage(key, self._allocate())
        self._counts["shadow.page.made"] += 1
        if page.hole and page.level == 2:
            self._holes.copy(page.frame, page.view)
        elif page.hole:
            self._holes.put(page, LAST, long_mode=self.long_mode)
        if self.tracing and not page.direct:
            pages = self._by_gfn.setdefault(page.gfn, [])
            pages.append(page)
            if len(pages) == 1:
                self._write_protect(page.gfn)
        return page

    def _link(self, page: ShadowPage, index: int, key: Key) -> ShadowPage:
        child = page.children.get(index)
        if child is not None:
            if child.key == key:
                return child
            self._unlink(page, index)
        self._linked = True
        self._void()
        child = self._page(key)
        at = page.frame + 8 * index
        page.children[index] = child
        child.parents[at] = page
        self._ram.write64(at, child.frame | P if page.level == 3 and not self.long_mode else child.frame | P | ALL | A)
        self._counts["vmm.shadow_update"] += 1
        if page.gfn in self.explained and not page.direct:
            self.on_derived(page.gfn, *self._guest_bytes(page, index))
        if page is self._root and page.level == 3:
            self.stale = True   # PDPTEs are registers: CR3 must be loaded again
        return child

    def _unlink(self, page: ShadowPage, index: int) -> None:
        """Take a lower table out of ``page``; one that nothing refers to any more is freed."""
        self._void()
        child = page.children.pop(index)
        at = page.frame + 8 * index
        self._ram.write64(at, 0)
        self._holes.put(page, index, long_mode=self.long_mode)
        self._counts["vmm.shadow_update"] += 1
        self.stale = True
        del child.parents[at]
        if not child.parents:
            self._free_page(child)

    def _free_page(self, page: ShadowPage) -> None:
        self._void()
        if page.level == 1:
            if self._tracks_leaves:
                for index, entry in enumerate(TABLE.unpack_from(self._ram.bytes, page.frame)):
                    if entry:
                        self._note_leaf(page.frame + 8 * index, entry, 0)
        else:
            for index in list(page.children):
                self._unlink(page, index)
        self._free.append(page.frame)
        self.stale = True
        if self._pages.pop(page.key, None) is None:
            return      # a root of PAE form is in no table
        self._counts["shadow.page.dropped"] += 1
        if self.tracing and not page.direct:
            pages = self._by_gfn[page.gfn]
            pages.remove(page)
            if not pages:
                del self._by_gfn[page.gfn]

    def _forget_root(self, key: tuple[int, View]) -> None:
        root = self._roots.pop(key)
        if not root.parents:
            self._free_page(root)

    def _make_room(self, keep: ShadowPage | None) -> bool:
        """Recycle: address spaces not used for longest go first. False when that was not enough."""
        for key in [key for key, root in self._roots.items() if root is not keep]:
            self._forget_root(key)
            if len(self._free) >= RESERVE:
                return True
        return False

    # ---- entries
    def _guest_bytes(self, page: ShadowPage, index: int) -> tuple[int, int]:
        """The bytes of the guest's entry that this shadow entry stands for: 32-bit tables have 1024, halved or quartered here."""
        if self._mode[2] & CR4_PAE:
            return 8 * index, 8 * index + 8
        entry = page.quadrant * 512 + index if page.level == 1 else page.quadrant * 256 + index // 2
        return 4 * entry, 4 * entry + 4

    def _is_current(self, page: ShadowPage) -> bool:
        """Whether this is the root of the address space that the guest is in, in whichever view."""
        return page is self._root or (page.level == 4 and self.long_mode and page.gfn == self._root.gfn)

    @staticmethod
    def _index(page: ShadowPage, address: int) -> int:
        return address >> (9 * page.level + 3) & 511

    def _leaf(self, gpa: int, view: View, *, writable: bool, user: bool, no_execute: bool, dirty: bool, kernel_write: bool = False,
              is_global: bool = False) -> int:
        """A 4 KiB shadow entry; 0 for a page that is not in this view."""
        if view is View.USER and not user:
            return 0
        if self._memory.inside(gpa):
            entry = (self._memory.base + gpa) & FRAME | P | A | DIRTY
            traced = gpa >> 12 in self._by_gfn or gpa >> 12 in self.guarded
        else:
            entry, traced = self._nowhere | P | A | DIRTY, False
            if gpa >> 12 not in self._foreign:
                self._foreign.add(gpa >> 12)
                self.on_foreign(gpa & ~(PAGE - 1))
        if is_global:
            entry |= GLOBAL
        if kernel_write:
            # Writable for the kernel means not for users: their next access takes this back (Linux: kvm/mmu, "emulating cr0.wp").
            return entry | (0 if traced else RW) | (US if view is View.KERNEL else 0) | (NX if no_execute else 0)
        if writable and not traced:
            entry |= RW if dirty else CLEAN
        return entry | (US if user or view is View.KERNEL else 0) | (NX if no_execute else 0)

    def _set_leaf(self, page: ShadowPage, index: int, entry: int) -> None:
        at = page.frame + 8 * index
        old = self._ram.read64(at)
        if old == entry:
            return
        self._ram.write64(at, entry)
        self._counts["vmm.shadow_update"] += 1
        if entry and page.gfn in self.explained and not page.direct:
            self.on_derived(page.gfn, *self._guest_bytes(page, index))
        # Any change but more rights to the same frame must reach the CPU's TLB.
        if old & P and (not entry & P or (old ^ entry) & FRAME or old & ~entry & (RW | US) or entry & ~old & NX):
            self.stale = True
        if self._mode[2] & CR4_PGE and entry:
            if entry & GLOBAL:
                page.has_global = True
            else:
                self._local[page] = None
        if self._tracks_leaves:
            self._note_leaf(at, old, entry)

    def _note_leaf(self, at: int, old: int, entry: int) -> None:
        base, size = self._memory.base, self._memory.size
        if old & P and base <= old & FRAME < base + size:
            gfn = ((old & FRAME) - base) >> 12
            leaves = self._leaves[gfn]
            leaves.discard(at)
            if not leaves:
                del self._leaves[gfn]
        if entry & P and base <= entry & FRAME < base + size:
            self._leaves.setdefault(((entry & FRAME) - base) >> 12, set()).add(at)

    def _write_protect(self, gfn: int) -> None:
        """This frame holds a table now: take write access away wherever it is mapped."""
        for at in self._leaves.get(gfn, ()):
            entry = self._ram.read64(at)
            if entry & (RW | CLEAN):
                self._ram.write64(at, entry & ~(RW | CLEAN))
                self._counts["vmm.shadow_update"] += 1
                self.stale = True

    def _void(self) -> None:
        """More than a leaf is about to change."""
        if self._filled_by_c is not None:
            self._filled_by_c.void()

    # ---- frames guarded for the VMM
    def guard(self, gfn: int) -> None:
        """From now on a store to this frame is :attr:`Outcome.GUARDED`, through whatever mapping. Call :meth:`track` first."""
        self._void()
        self.guarded.add(gfn)
        self._write_protect(gfn)
        self._protect_direct(gfn, writable=False)

    def unguard(self, gfn: int) -> None:
        """The frame may be written again; shadow entries follow by hidden faults."""
        self._void()
        self.guarded.discard(gfn)
        self._protect_direct(gfn, writable=True)

    def track(self) -> None:
        """Note where each frame is mapped, as :meth:`guard` needs it. Only before the guest runs."""
        self._tracks_leaves, self._filled_by_c = True, None

    def _protect_direct(self, gfn: int, *, writable: bool) -> None:
        self._direct.set_writable(gfn, writable)
        self._counts["vmm.shadow_update"] += 1
        self.stale = True
