"""Shadow page tables: what the physical MMU walks in place of the guest's own tables.

A shadow page stands for one of the guest's tables at one level, or for a piece of a large page that is split into
4 KiB pages (*direct*). Its entries give what the guest's entries give, translated to host-physical frames, and never
more: an entry is present only once the guest's has its accessed bit, writable only once it has its dirty bit, so that
the VMM sets both at the moment at which the CPU would have. Rights are gathered in the leaf; upper entries give all.
Shadow tables are PAE for 32-bit guests, whatever their own format, and four-level for 64-bit ones.

Three ways to keep them in step with the guest's:

* ``tracing``: shadow pages are cached for all address spaces, and the guest's tables that they stand for are mapped
  read-only everywhere. A store to one is a *trace fault*: the VMM carries it out and corrects the derived entries.
  A table that is written while no current address space uses it is given up (its frame was recycled).
* ``lazy``: the shadow is a big TLB. A guest must flush after it takes rights away; CR3 loads drop everything but global pages
  (CR4.PGE), INVLPG one page. The guest's tables stay writable.
* ``none``: filled on first use and never corrected: the shadow goes stale.

A 64-bit guest of a deprivileging VMM has its kernel at CPL 3, beside its users, and so each address space has two shadows: what the
kernel sees (:attr:`View.KERNEL`: every page a user's) and what users see (:attr:`View.USER`: their own pages alone).

An unpaged guest runs on a direct map. This room knows nothing of who runs the guest (SDM Vol. 3A §4; Adams & Agesen,
ASPLOS 2006, §2.4).
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

from vmlab.errors import UnsupportedByStrategy
from vmlab.ledger import Counts
from vmlab.machine.fast_faults import HiddenFaults
from vmlab.machine.paging import CR4_PAE, CR4_PGE, NX, G, P, PageFault, Walk
from vmlab.machine.paging import D as DIRTY
from vmlab.vmm.guest_tables import GuestMmu
from vmlab.vmm.shadow_page import ALL, CLEAN, FRAME, GLOBAL, TABLE, ShadowPage, View
from vmlab.vmm.shadow_saved import pages_from, pages_of
from vmlab.vmm.shadow_tables import RESERVE
from vmlab.vmm.space import LARGE, StaticSpace
from vmlab.vmm.tracing import Tracing

_MAX_ROOTS = 64                     # address spaces cached at most


class Outcome(enum.Enum):
    """What a page fault was that the guest's own tables allow."""

    HIDDEN = "the shadow was filled: let the guest try again"
    TRACE = "a store to one of the guest's page tables: carry it out"
    DEVICE = "a device's registers, not memory: carry the access out"
    GUARDED = "a store to a frame that the VMM guards: carry it out"


class ShadowPager(Tracing):
    """The shadow tables of one guest; see the module's text.

    :param scheme: "static" (unpaged guests only), "tracing", "lazy" or "none".
    :param space: the VMM's own pages in the guest's linear space, or None where it needs none (hardware assistance).
    """

    def __init__(self, mmu: GuestMmu, counts: Counts, *, scheme: str, space: StaticSpace | None,
                 is_device: Callable[[int], bool] = lambda gpa: False) -> None:
        super().__init__(mmu, counts, scheme=scheme, space=space, is_device=is_device)
        #: Whose shadow the CPU is to run on.
        self.view = View.ONE
        memory_told = self._memory.on_write

        def told(gpa: int, size: int) -> None:
            memory_told(gpa, size)
            self.wrote(gpa, size)

        if self.tracing:
            self._memory.on_write = told

    # ---- to be saved
    def state(self) -> dict[str, Any]:
        """See :mod:`vmlab.vmm.shadow_saved`. What C has learned is left out: it learns it again."""
        pages = list({id(page): page for page in (self._direct.root, *self._pages.values(), *self._roots.values())}.values())
        number = {id(page): at for at, page in enumerate(pages)}
        return {
            "pages": pages_of(pages), "cached": [number[id(page)] for page in self._pages.values()],
            "roots": [(cr3, view.name, number[id(page)]) for (cr3, view), page in self._roots.items()], "root": number[id(self._root)],
            "free": list(self._free), "guarded": sorted(self.guarded), "foreign": sorted(self._foreign),
            "leaves": [(gfn, sorted(at)) for gfn, at in self._leaves.items()], "view": self.view.name, "mode": self._mode, "stale": self.stale,
            "local": [number[id(page)] for page in self._local if self._pages.get(page.key) is page],
        }

    def from_state(self, state: dict[str, Any]) -> None:
        self._void()
        pages = pages_from(state["pages"])
        self._direct.root, self._root = pages[0], pages[state["root"]]
        self._pages = {pages[at].key: pages[at] for at in state["cached"]}
        self._by_gfn = {}
        for page in self._pages.values() if self.tracing else ():
            if not page.direct:
                self._by_gfn.setdefault(page.gfn, []).append(page)
        self._local = {pages[at]: None for at in state["local"]}
        self._roots = {(cr3, View[view]): pages[at] for cr3, view, at in state["roots"]}
        self._free, self.guarded, self._foreign = list(state["free"]), set(state["guarded"]), set(state["foreign"])
        self._leaves = {gfn: set(at) for gfn, at in state["leaves"]}
        self.view, self._mode, self.stale = View[state["view"]], state["mode"], state["stale"]

    # ---- the guest's registers changed
    def reload(self, flush: bool) -> None:
        """CR0, CR3, CR4 or EFER was written: choose the root. ``flush``: the TLB is void, and with it a lazy shadow."""
        self._void()
        mode = self._current_mode()
        if mode[0] and self.scheme == "static":
            raise UnsupportedByStrategy("memory=static carries unpaged guests only; this guest turned paging on")
        if mode != self._mode or (flush and self.scheme == "lazy" and not mode[2] & CR4_PGE):
            self._mode = mode
            self.drop_all()
        else:
            if flush and self.scheme == "lazy":
                self._drop_local()
            self._choose_root()
        self.stale = True
        if self._space is not None and mode[0]:
            for index in (self._space.base, self._space.base + LARGE):
                self._keep_hole_free(index)

    def _keep_hole_free(self, address: int) -> None:
        """Refuse a guest whose own tables reach into the hole: the VMM's pages stand there.

        Not where they lead to an empty bus, as xv6's do, which maps the last 32 MiB for its devices: nothing is there but what a guest
        without such a mapping would see too.
        """
        if self._space is None or not self.mmu.reaches(address) or self._leads_nowhere(address):
            return
        raise UnsupportedByStrategy(f"the guest's page tables map {address:#x}, where this VMM keeps its own pages "
                                    f"({self._space.base:#x} and above); a guest of a deprivileging VMM must leave that range free")

    def _leads_nowhere(self, address: int) -> bool:
        """Whether the guest maps ``address`` to where neither RAM nor a device is."""
        try:
            gpa = self.mmu.peek(address)
        except PageFault:
            return False
        return not self.mmu.memory.inside(gpa) and not self.is_device(gpa)

    def drop_all(self) -> None:
        """Forget every shadow page; what the guest uses comes back by hidden faults."""
        self._void()
        self._counts["shadow.page.dropped"] += len(self._pages)
        self._free.extend(page.frame for page in reversed(self._pages.values()))
        self._free.extend(root.frame for root in self._roots.values() if root.level == 3)
        self._pages.clear()
        self._by_gfn.clear()
        self._leaves.clear()
        self._local.clear()
        self._roots.clear()
        self._root = self._direct.root
        self._choose_root()
        self.stale = True

    def _drop_local(self) -> None:
        """MOV to CR3 voids all translations but the global ones (SDM Vol. 3A §4.10.2.4, §4.10.4.1), whatever tables led to those."""
        self._void()
        local = list(self._local)
        self._local.clear()
        for page in local:
            if self._pages.get(page.key) is not page:
                continue
            entries = TABLE.unpack_from(self._ram.bytes, page.frame) if page.has_global else ()
            if any(entry & GLOBAL for entry in entries):
                for index, entry in enumerate(entries):
                    if entry and not entry & GLOBAL:
                        self._set_leaf(page, index, 0)
            else:
                self._discard(page)
        for key, root in list(self._roots.items()):
            if not root.children:
                self._forget_root(key)

    def _discard(self, page: ShadowPage) -> None:
        """Take a page out wherever it is linked, and tables above that have nothing else."""
        for at, parent in list(page.parents.items()):
            self._unlink(parent, (at - parent.frame) // 8)
            if not parent.children:
                self._discard(parent)

    def _choose_root(self) -> None:
        mmu = self.mmu
        if not mmu.paging:
            self._root = self._direct.root
            return
        kind = mmu.tables.format
        cr3 = mmu.cr3 & (0xFFFFFFE0 if kind == "pae" else FRAME)
        root = self._roots.pop((cr3, self.view), None)
        if root is None:
            if len(self._roots) >= (_MAX_ROOTS if self.view is View.ONE else 2 * _MAX_ROOTS):
                self._forget_root(next(iter(self._roots)))
            if len(self._free) < RESERVE:
                self._make_room(None)
            if kind == "64":
                root = self._page((cr3 >> 12, 4, 0, ALL, False, self._space is not None, self.view, 0))
            else:
                root = ShadowPage((0, 3, 0, ALL, False, False, View.ONE, 0), self._allocate())
                self._holes.put(root, 3, long_mode=self.long_mode)
        elif kind == "pae":
            for slot, child in list(root.children.items()):
                if not mmu.pdptes[slot] & P or mmu.pdptes[slot] >> 12 & 0xFFFFFFFFFF != child.gfn:
                    self._unlink(root, slot)
        self._roots[cr3, self.view] = root
        self._root = root

    def show(self, view: View) -> None:
        """From now on the CPU runs on this view of the address space."""
        if view is not self.view:
            self.view = view
            self._counts["shadow.view"] += 1
            self._choose_root()
            self.stale = True

    def invlpg(self, address: int) -> None:
        """INVLPG: under ``lazy`` the page's translation is dropped; a traced shadow is in step anyway."""
        if self.scheme != "lazy" or not self.mmu.paging:
            return
        for root in list(self._roots.values()):     # a global one goes too, and may be in every address space (SDM Vol. 3A §4.10.4.1)
            self._drop_translation(root, address)

    def _drop_translation(self, page: ShadowPage, address: int) -> None:
        while page.level > 1:
            index = self._index(page, address)
            child = page.children.get(index)
            if child is None:
                return
            if child.direct:  # a piece of a large page: all of it goes
                for other in ((index & ~1, index | 1) if self._mode[2] & CR4_PAE == 0 else (index,)):
                    if other in page.children and page.children[other].direct:
                        self._unlink(page, other)
                return
            page = child
        self._set_leaf(page, self._index(page, address), 0)

    # ---- faults
    def fault(self, address: int, *, write: bool, user: bool, fetch: bool) -> Outcome:
        """The CPU faulted on the shadow. Raises the guest's own :class:`~vmlab.machine.paging.PageFault` (a *true* fault)."""
        mmu = self.mmu
        if not mmu.paging:
            return Outcome.GUARDED if write and address >> 12 in self.guarded else Outcome.DEVICE
        walk = mmu.check(address, write=write, user=user, fetch=fetch)
        if self._space is not None and self._space.in_hole(address):
            self._keep_hole_free(address)
            return Outcome.DEVICE       # the empty bus: the VMM carries the access out
        gpa = walk.frame | address & ((1 << walk.shift) - 1)
        gfn = gpa >> 12
        if self.is_device(gpa):
            return Outcome.DEVICE
        traced = write and self.tracing and gfn in self._by_gfn
        if traced:
            self._counts["shadow.trace.write"] += 1
            if self._is_traced(gfn):
                return Outcome.TRACE
        if write and gfn in self.guarded:
            return Outcome.GUARDED
        if len(self._free) < RESERVE and not self._make_room(self._root):
            self.drop_all()
        self._linked = False
        page = self._descend(address, walk)
        index = self._index(page, address)
        old = self._ram.read64(page.frame + 8 * index)
        kernel_write = write and not user and not walk.writable     # CR0.WP = 0 lets the kernel
        entry = self._leaf(gpa, page.view, writable=walk.writable, user=walk.user, no_execute=walk.no_execute,
                           dirty=bool(walk.steps[-1].entry & DIRTY), kernel_write=kernel_write,
                           is_global=bool(walk.steps[-1].entry & G and self._mode[2] & CR4_PGE))
        if not traced:      # else it was the store that ended the tracing, and runs now
            dirty = bool(old & P and old & CLEAN and write)
            self._counts["shadow.fault.dirty" if dirty else "shadow.fault.hidden"] += 1
        if entry == old and not self._linked:
            raise AssertionError(f"the shadow entry of {address:#x} already is {entry:#x}, and the CPU faults on it")
        self._set_leaf(page, index, entry)
        if self._filled_by_c is not None:
            self._teach(self._filled_by_c, address, walk, page)
        return Outcome.HIDDEN

    def let_c_fill(self, faults: HiddenFaults) -> None:
        """From now on the usual hidden faults of a lazy shadow need not come here. Only before the guest runs."""
        if self.scheme == "lazy" and not self._tracks_leaves:
            self._filled_by_c = faults

    def _teach(self, faults: HiddenFaults, address: int, walk: Walk, page: ShadowPage) -> None:
        """The fault at ``address`` was handled: others in the same shadow page are alike, as long as the entries above are what they are."""
        *above, last = walk.steps
        if (walk.shift == 12 and above and len(above) <= 2 and not page.direct and not walk.no_execute and not self.long_mode
                and page.view is View.ONE and not self.guarded and all(self._memory.inside(step.at) for step in walk.steps)):
            first = last.at - last.size * (address >> 12 & 511)
            if self._mode[2] & CR4_PGE:
                self._local[page], page.has_global = None, True     # what C fills is not told
            faults.learn(address, [(step.at, step.entry) for step in above], last.size, first, page.frame, bool(self._mode[2] & CR4_PGE))

    def _descend(self, address: int, walk: Walk) -> ShadowPage:
        """The shadow page at level 1 for this walk, made and linked as far as it is missing."""
        page = self._root
        narrow = not self._mode[2] & CR4_PAE
        by_level = {step.level: step for step in walk.steps}
        access = ALL
        while page.level > 1:
            level = page.level - 1
            above = by_level.get(page.level)
            if above is not None:
                access &= above.entry | NX
                access |= above.entry & NX
            table = by_level.get(level)
            quadrant = 0
            if table is not None:
                gfn = table.at >> 12
                if narrow:
                    quadrant = address >> 30 if level == 2 else address >> 21 & 1
            else:
                span = (1 << (9 * level + 12)) - 1
                gfn = (walk.frame | address & ((1 << walk.shift) - 1)) & ~span
                gfn >>= 12
            hole = level > 1 and self._leads_to_hole(address, 9 * level + 12)
            base = address & -1 << 9 * level + 12 if self.scheme == "lazy" else 0
            page = self._link(page, self._index(page, address), (gfn, level, quadrant, access, table is None, hole, self._root.view, base))
        return page

    def _leads_to_hole(self, address: int, shift: int) -> bool:
        """Whether the table that maps ``1 << shift`` bytes at ``address`` is on the way to the hole."""
        return self._space is not None and ((address ^ self._space.base) & 0xFFFFFFFFFFFF) >> shift == 0
