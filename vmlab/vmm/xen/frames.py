"""What each of the guest's frames is used for: the table that makes direct paging safe.

Under direct paging the guest's own page tables are the machine's. A frame is a page table of one level, or mapped
writable, or neither; never two of these at once, so the guest can write no table. Each use is counted, and a frame
changes its type only when nothing counts on the old one (Barham et al., SOSP 2003 §3.3.3; mm.c of Xen calls these
``PGT_l1_page_table`` … ``PGT_writable_page``). A frame is checked, entry by entry, when it becomes a table.
What tables look like at the guest's width is in :mod:`vmlab.vmm.xen.tables`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

from vmlab.ledger import Counts
from vmlab.machine.memory import PAGE, Ram
from vmlab.machine.paging import RW, P
from vmlab.vmm.xen.tables import FRAME, PAE, TABLES, Format, HoleEntries, Kind

__all__ = ["TABLES", "FrameTable", "Kind", "Refused"]


class Refused(Exception):
    """The guest asked for something that is not its own, or that would break the table's rules."""


class FrameTable:
    """Types and counts of the frames ``first`` … ``first + count - 1`` (mfn), which are all that the guest has.

    :param hole: the entries that every linear space gets from the hypervisor.
    :param flush: forget cached translations: called before a frame that was writable becomes something else.
    """

    def __init__(self, ram: Ram, first: int, count: int, hole: HoleEntries, flush: Callable[[], None], counts: Counts,
                 tables: Format = PAE) -> None:
        self.ram, self.first, self.count, self._tables = ram, first, count, tables
        self._hole, self._flush, self._counts = hole, flush, counts
        self._kind = [Kind.NONE] * count
        self._uses = [0] * count
        self._pinned: set[int] = set()
        self._lent: set[int] = set()            # frames of the hypervisor that the guest may map and write
        self._perhaps_cached: set[int] = set()  # no longer writable, but the TLB may not know

    # ---- looking
    def owns(self, mfn: int) -> bool:
        """Whether the frame is the guest's."""
        return 0 <= mfn - self.first < self.count

    def kind(self, mfn: int) -> Kind:
        """What the frame serves as now; NONE as soon as nothing counts on its type."""
        return self._kind[mfn - self.first]

    def uses(self, mfn: int) -> int:
        """How many entries, pins and registers count on the frame's type."""
        return self._uses[mfn - self.first]

    def pinned(self, mfn: int) -> bool:
        return mfn in self._pinned

    def lend(self, mfn: int) -> None:
        """Let the guest map this frame of the hypervisor's."""
        self._lent.add(mfn)

    def tlb_flushed(self) -> None:
        """No translation is cached any more."""
        self._perhaps_cached.clear()

    # ---- types
    def get(self, mfn: int, kind: Kind) -> None:
        """Count one more use of the frame as ``kind``; checks a table that becomes one. Raises :class:`Refused`."""
        if not self.owns(mfn):
            raise Refused(f"frame {mfn:#x} is not the guest's")
        index = mfn - self.first
        if self._uses[index]:
            if self._kind[index] is not kind:
                raise Refused(f"frame {mfn:#x} is a {self._kind[index].value} and cannot be a {kind.value}")
            if kind is Kind.L2_HOLE:
                raise Refused(f"frame {mfn:#x} holds the hypervisor's hole of another address space")
            self._uses[index] += 1
            return
        if mfn in self._perhaps_cached and kind is not Kind.WRITABLE:
            self._flush()
            self.tlb_flushed()
        self._kind[index], self._uses[index] = kind, 1
        if kind in TABLES:
            try:
                self._validate(mfn, kind)
            except Refused:
                self._kind[index], self._uses[index] = Kind.NONE, 0
                raise

    def put(self, mfn: int) -> None:
        """Count one use less; the last one gives back what a table's entries used."""
        index = mfn - self.first
        kind = self._kind[index]
        assert self._uses[index] > 0, f"frame {mfn:#x} is used by nobody"
        self._uses[index] -= 1
        if self._uses[index]:
            return
        if kind in TABLES:
            self._counts["mmu.validate"] += 1
            for _slot, entry in self._entries(mfn, kind):
                self._put_entry(kind, entry)
        elif kind is Kind.WRITABLE:
            self._perhaps_cached.add(mfn)
        self._kind[index] = Kind.NONE

    def pin(self, mfn: int, level: int) -> None:
        """Keep the frame a table of this level though no address space uses it. Raises :class:`Refused`."""
        if mfn in self._pinned:
            raise Refused(f"frame {mfn:#x} is pinned already")
        if level not in self._tables.levels:
            raise Refused(f"there is no level {level} of page tables")
        self.get(mfn, self._tables.levels[level])
        self._pinned.add(mfn)

    def unpin(self, mfn: int) -> None:
        """Undo :meth:`pin`. Raises :class:`Refused` for a frame that is not pinned."""
        if mfn not in self._pinned:
            raise Refused(f"frame {mfn:#x} is not pinned")
        self._pinned.remove(mfn)
        self.put(mfn)

    # ---- entries
    def update(self, address: int, entry: int) -> None:
        """Store ``entry`` at machine ``address`` if the frame there is the guest's and the entry is allowed there.

        A plain store where the frame is no table. Raises :class:`Refused`, with nothing changed.
        """
        mfn, slot = address >> 12, address % PAGE // 8
        if address & 7:
            raise Refused(f"{address:#x} is not the address of an entry")
        if not self.owns(mfn):
            raise Refused(f"frame {mfn:#x} is not the guest's")
        kind = self.kind(mfn)
        if kind is Kind.DESCRIPTORS:
            raise Refused(f"frame {mfn:#x} is a descriptor table")
        if kind not in TABLES:
            self.ram.write64(address, entry)
            return
        tables = self._tables
        if not tables.guests(kind, slot):
            raise Refused(f"entry {slot} of frame {mfn:#x} is the hypervisor's")
        if slot >= tables.looked_at(kind):
            self.ram.write64(address, entry)  # behind the four entries of a PAE L3 nobody looks
            return
        if tables.required(kind) == slot and not entry & P:
            raise Refused("an address space without the hypervisor's hole")
        entry = self._in_force(entry)
        old = self.ram.read64(address)
        if self._same_use(kind, old, entry):
            self._check_flags(kind, entry)
        else:
            self._get_entry(kind, slot, entry)
            self._put_entry(kind, old)
        self.ram.write64(address, entry)
        if tables.is_register(kind):
            self._flush()

    def _in_force(self, entry: int) -> int:
        """What is stored for this entry of the guest's."""
        return entry | self._tables.added if entry & P else entry

    @staticmethod
    def _same_use(kind: Kind, old: int, new: int) -> bool:
        """Both present, to the same frame with the same right to write: nothing to count."""
        mask = FRAME | P | (RW if kind is Kind.L1 else 0)
        return bool(old & P) and old & mask == new & mask

    def _entries(self, mfn: int, kind: Kind) -> Iterator[tuple[int, int]]:
        """(slot, entry) of each present entry that is the guest's."""
        raw = self.ram.bytes[mfn << 12:(mfn << 12) + 8 * self._tables.looked_at(kind)]
        guests = self._tables.guests
        return ((slot, entry) for slot, (entry,) in enumerate(struct.iter_unpack("<Q", raw)) if entry & P and guests(kind, slot))

    def _validate(self, mfn: int, kind: Kind) -> None:
        """Check every entry of a frame that becomes a table; on refusal what was counted is taken back."""
        self._counts["mmu.validate"] += 1
        tables, at = self._tables, mfn << 12
        required = tables.required(kind)
        if required is not None and not self.ram.read64(at + 8 * required) & P:
            raise Refused("an address space without the hypervisor's hole")
        done: list[int] = []
        try:
            for slot, entry in self._entries(mfn, kind):
                self._get_entry(kind, slot, entry)
                done.append(entry)
                if entry != self._in_force(entry):
                    self.ram.write64(at + 8 * slot, self._in_force(entry))
        except Refused:
            for entry in done:
                self._put_entry(kind, entry)
            raise
        if kind is tables.holds_hole:
            self.ram.write(at + 8 * tables.first_hole, bytes(8 * (tables.end_hole - tables.first_hole)))
            for slot, entry in self._hole:
                self.ram.write64(at + 8 * slot, entry)

    def _check_flags(self, kind: Kind, entry: int) -> None:
        if entry & P and entry & ~(FRAME | self._tables.flags[kind]):
            raise Refused(f"entry {entry:#x} of an {kind.value} sets bits that are not the guest's to set")

    def _get_entry(self, kind: Kind, slot: int, entry: int) -> None:
        """Count what a new entry of a table of this kind uses. Raises :class:`Refused`."""
        if not entry & P:
            return
        self._check_flags(kind, entry)
        mfn = (entry & FRAME) >> 12
        if kind is not Kind.L1:
            self.get(mfn, self._tables.named(kind, slot))
        elif mfn not in self._lent:
            if not self.owns(mfn):
                raise Refused(f"frame {mfn:#x} is not the guest's")
            if entry & RW:
                self.get(mfn, Kind.WRITABLE)

    def _put_entry(self, kind: Kind, entry: int) -> None:
        """What an entry that goes away used."""
        mfn = (entry & FRAME) >> 12
        if entry & P and (kind is not Kind.L1 or (entry & RW and mfn not in self._lent)):
            self.put(mfn)
