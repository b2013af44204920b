"""The guest's memory and its own page tables, as a VMM sees them.

:class:`GuestMemory` is guest-physical memory: RAM from gpa 0, nothing above it. :class:`GuestMmu` holds the paging
registers that the guest wrote and walks the guest's tables with them: the machine's walker
(:mod:`vmlab.machine.paging`) over guest-physical memory, which sets the guest's accessed and dirty bits as the CPU
would have. Neither knows anything of shadow tables; who must hear of a store asks for it (:attr:`GuestMemory.on_write`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vmlab.ledger import Counts
from vmlab.machine import paging
from vmlab.machine.delivery import Fault
from vmlab.machine.memory import PAGE, Ram
from vmlab.machine.paging import CR0_PG, CR0_WP, CR4_FLUSHING, CR4_PAE, EFER_LMA, EFER_LME, PageFault, Tables, Walk

CR0_PE, CR0_NW, CR0_CD = 1, 1 << 29, 1 << 30
#: CR0 bits that exist; the others read as written zero (SDM Vol. 3A §2.5). ET is always 1.
CR0_BITS, CR0_ET = 0xE005003F, 0x10
_KEPT_WALKS = 1024


@functools.lru_cache(maxsize=64)
def _accesses(size: int) -> tuple[tuple[int, int], ...]:
    """The accesses to a device that one of ``size`` bytes makes: eight, four, two or one at a time (a far pointer: its offset, then its selector).

    Each: how far on, and how many bytes.
    """
    found, offset = [], 0
    while offset < size:
        n = min(8, 1 << (size - offset).bit_length() - 1)
        found.append((offset, n))
        offset += n
    return tuple(found)


class GuestMemory:
    """``size`` bytes of guest RAM at hpa ``base``. Addresses are guest-physical (gpa).

    Above RAM are registers of devices; where there are none reads give all ones and writes vanish, as on the bare
    machine's bus.
    """

    def __init__(self, ram: Ram, base: int, size: int) -> None:
        self.ram, self.base, self.size = ram, base, size
        #: Told of every store by the VMM or a device on the guest's behalf: (gpa, bytes).
        self.on_write: Callable[[int, int], None] = lambda gpa, size: None
        #: Accesses beyond RAM: (gpa, bytes) and (gpa, bytes, value).
        self.read_device: Callable[[int, int], int] = lambda gpa, size: (1 << (8 * size)) - 1
        self.write_device: Callable[[int, int, int], None] = lambda gpa, size, value: None
        #: Told once of each frame beyond RAM that the guest made somebody reach for, and how: (gpa, verb).
        self.on_foreign: Callable[[int, str], None] = lambda gpa, verb: None
        #: Frames that were told of already, and how.
        self.told: set[tuple[int, str]] = set()

    def foreign(self, gpa: int, verb: str) -> None:
        """Somebody was made to reach beyond RAM at ``gpa``; ``verb`` completes "the guest …"."""
        if (gpa >> 12, verb) not in self.told:
            self.told.add((gpa >> 12, verb))
            self.on_foreign(gpa, verb)

    def inside(self, gpa: int) -> bool:
        """Whether RAM answers at ``gpa``."""
        return gpa < self.size

    def read(self, gpa: int, size: int) -> bytes:
        inside = max(0, min(size, self.size - gpa))
        if not inside:
            return b"".join([self.read_device(gpa + offset, n).to_bytes(n, "little") for offset, n in _accesses(size)])
        return self.ram.read(self.base + gpa, inside) + b"\xff" * (size - inside)

    def holds(self, gpa: int, data: bytes) -> bool:
        """Whether these bytes are at ``gpa``, in RAM."""
        at = self.base + gpa
        return gpa + len(data) <= self.size and self.ram.bytes[at:at + len(data)] == data

    def write(self, gpa: int, data: bytes) -> None:
        """Store for the guest; what lies beyond RAM is a device's, or dropped."""
        inside = data[:max(0, self.size - gpa)]
        if inside:
            self.ram.write(self.base + gpa, inside)
            self.on_write(gpa, len(inside))
        else:
            for offset, n in _accesses(len(data)):
                self.write_device(gpa + offset, n, int.from_bytes(data[offset:offset + n], "little"))

    # ---- what the walker needs; its accessed and dirty bits are no news to anybody
    def read32(self, gpa: int) -> int:
        if gpa + 4 <= self.size:
            return self.ram.read32(self.base + gpa)
        self.foreign(gpa, "put page tables at")
        return 0xFFFFFFFF

    def read64(self, gpa: int) -> int:
        if gpa + 8 <= self.size:
            return self.ram.read64(self.base + gpa)
        self.foreign(gpa, "put page tables at")
        return 0xFFFFFFFFFFFFFFFF

    def write32(self, gpa: int, value: int) -> None:
        if gpa + 4 <= self.size:
            self.ram.write32(self.base + gpa, value)

    def write64(self, gpa: int, value: int) -> None:
        if gpa + 8 <= self.size:
            self.ram.write64(self.base + gpa, value)


class GuestMmu:
    """The guest's paging registers and what its tables say. Register writes follow SDM Vol. 2, MOV—Move to/from Control Registers."""

    def __init__(self, memory: GuestMemory, counts: Counts) -> None:
        self.memory, self._counts = memory, counts
        self.cr0, self.cr3, self.cr4, self.efer = CR0_PE | CR0_ET, 0, 0, 0
        self._pdptes: tuple[int, ...] | None = None
        self._tables: Tables | None = None
        #: Walks made lately with these registers, by page and access: where their entries are, and what they were.
        self._walks: dict[int, tuple[memoryview, tuple[tuple[int, int], ...], Walk]] = {}
        ram = memoryview(memory.ram.bytes)
        self._entries: dict[int, memoryview] = {4: ram.cast("I"), 8: ram.cast("Q")}

    def state(self) -> dict[str, Any]:
        """The registers, and which frames beyond RAM were told of."""
        return {"registers": (self.cr0, self.cr3, self.cr4, self.efer), "pdptes": self._pdptes, "foreign": sorted(self.memory.told)}

    def from_state(self, state: dict[str, Any]) -> None:
        self.cr0, self.cr3, self.cr4, self.efer = state["registers"]
        self._pdptes, self._tables = state["pdptes"], None
        self._walks.clear()
        self.memory.told = {(frame, verb) for frame, verb in state["foreign"]}

    def enter_real_mode(self) -> None:
        """CR0 as it is at reset, for a guest that starts there."""
        self.cr0 = CR0_ET

    @property
    def paging(self) -> bool:
        return bool(self.cr0 & CR0_PG)

    @property
    def tables(self) -> Tables:
        """The registers as a walk needs them."""
        if self._tables is None:
            self._tables = Tables(self.cr0, self.cr3, self.cr4, self.efer, self._pdptes)
        return self._tables

    # ---- registers
    def write_cr0(self, value: int) -> None:
        """CR0, and what follows: long mode becomes active, PDPTEs are loaded. Raises #GP for impossible combinations."""
        value = value & CR0_BITS | CR0_ET
        if (value & CR0_PG and not value & CR0_PE) or (value & CR0_NW and not value & CR0_CD):
            raise Fault(13, 0)
        efer = self.efer
        if value & CR0_PG and not self.cr0 & CR0_PG and efer & EFER_LME:
            if not self.cr4 & CR4_PAE:
                raise Fault(13, 0)
            efer |= EFER_LMA
        elif not value & CR0_PG:
            efer &= ~EFER_LMA
        self._set(value, self.cr3, self.cr4, efer, load=bool((value ^ self.cr0) & (CR0_PG | CR0_CD | CR0_NW)))

    def write_cr3(self, value: int) -> None:
        self._set(self.cr0, value if self.efer & EFER_LMA else value & 0xFFFFFFFF, self.cr4, self.efer, load=True)

    def write_cr4(self, value: int) -> None:
        if self.efer & EFER_LMA and not value & CR4_PAE:
            raise Fault(13, 0)
        self._set(self.cr0, self.cr3, value, self.efer, load=bool((value ^ self.cr4) & CR4_FLUSHING))

    def write_efer(self, value: int) -> None:
        """EFER; LMA is the CPU's to set. Raises #GP when LME changes under paging (APM Vol. 2 §14.6.1)."""
        if self.paging and (value ^ self.efer) & EFER_LME:
            raise Fault(13, 0)
        self._set(self.cr0, self.cr3, self.cr4, value & ~EFER_LMA | self.efer & EFER_LMA, load=False)

    def _set(self, cr0: int, cr3: int, cr4: int, efer: int, *, load: bool) -> None:
        pae = bool(cr0 & CR0_PG and cr4 & CR4_PAE and not efer & EFER_LMA)
        pdptes = self._pdptes if pae else None
        if pae and (load or pdptes is None):
            pdptes = paging.load_pdptes(self.memory, cr3)
            if pdptes is None:
                raise Fault(13, 0)
        self.cr0, self.cr3, self.cr4, self.efer, self._pdptes, self._tables = cr0, cr3, cr4, efer, pdptes, None
        self._walks.clear()

    def assume(self, cr0: int, cr3: int, cr4: int, efer: int) -> None:
        """The registers as the CPU holds them, where the guest writes them without the VMM (nested paging)."""
        if self._pdptes is None and (self.cr0, self.cr3, self.cr4, self.efer) == (cr0, cr3, cr4, efer):
            return
        self.cr0, self.cr3, self.cr4, self.efer, self._pdptes, self._tables = cr0, cr3, cr4, efer, None, None
        self._walks.clear()

    @property
    def pdptes(self) -> tuple[int, ...]:
        """The four PDPTE registers of PAE paging."""
        assert self._pdptes is not None
        return self._pdptes

    @property
    def write_protect(self) -> bool:
        return bool(self.cr0 & CR0_WP)

    # ---- translation
    def check(self, address: int, *, write: bool, user: bool, fetch: bool = False) -> Walk:
        """The guest's own walk for this access, its A and D bits set; raises the guest's :class:`PageFault`. Paging must be on."""
        self._counts["vmm.guest_walk"] += 1
        key = address & ~0xFFF | write << 2 | user << 1 | fetch
        known = self._walks.get(key)
        if known is not None:
            view, entries, found = known
            for index, entry in entries:
                if view[index] != entry:
                    break
            else:
                return found
        found = paging.check(self.memory, self.tables, address, write=write, user=user, fetch=fetch)
        self._keep(key, found)
        return found

    def _keep(self, key: int, found: Walk) -> None:
        """As long as the entries of a walk stay as it left them, another ends like it. PAE's first level is none of them: it must be in registers."""
        memory, steps = self.memory, found.steps
        if all(step.at + step.size <= memory.size for step in steps) and (self._pdptes is not None or self.tables.format != "pae"):
            if len(self._walks) >= _KEPT_WALKS:
                self._walks.clear()
            size = steps[0].size
            self._walks[key] = self._entries[size], tuple(((memory.base + step.at) // size, step.entry) for step in steps), found

    def translate(self, address: int, *, write: bool = False, user: bool = False, fetch: bool = False) -> int:
        """gva to gpa; raises :class:`PageFault`."""
        if not self.paging:
            return address & 0xFFFFFFFF
        found = self.check(address, write=write, user=user, fetch=fetch)
        return found.frame | address & ((1 << found.shift) - 1)

    def peek(self, address: int) -> int:
        """gva to gpa for reading, leaving no accessed bit behind; raises :class:`PageFault`."""
        if not self.paging:
            return address & 0xFFFFFFFF
        found = paging.walk(self.memory, self.tables, address, 0, mark=False)
        return found.frame | address & ((1 << found.shift) - 1)

    def reaches(self, address: int) -> bool:
        """Whether the guest's tables have a page directory entry for ``address``; leaves no trace in them."""
        try:
            paging.walk(self.memory, self.tables, address, 0, mark=False)
        except PageFault as fault:
            return fault.level == 1
        return True

    def read_linear(self, address: int, size: int, *, user: bool = False) -> bytes:
        """Bytes at a linear address of the guest; raises :class:`PageFault`."""
        if not self.paging and address + size <= 1 << 32:
            return self.memory.read(address, size)
        if self._in_one_page(address, size):
            return self.memory.read(self.translate(address, user=user), size)
        return b"".join(self.memory.read(gpa, n) for gpa, n in self._pieces(address, size, write=False, user=user))

    def write_linear(self, address: int, data: bytes, *, user: bool = False) -> None:
        """Store at a linear address of the guest, all of it or nothing; raises :class:`PageFault`."""
        if self._in_one_page(address, len(data)):
            self.memory.write(self.translate(address, write=True, user=user), data)
            return
        done = 0
        for gpa, n in self._pieces(address, len(data), write=True, user=user):
            self.memory.write(gpa, data[done:done + n])
            done += n

    def _in_one_page(self, address: int, size: int) -> bool:
        return 0 < size <= PAGE - address % PAGE and bool(not address >> 32 or self.efer & EFER_LMA)

    def _pieces(self, address: int, size: int, *, write: bool, user: bool) -> list[tuple[int, int]]:
        limit = 0xFFFFFFFFFFFFFFFF if self.efer & EFER_LMA else 0xFFFFFFFF
        pieces = []
        while size > 0:
            address &= limit
            n = min(size, PAGE - address % PAGE)
            pieces.append((self.translate(address, write=write, user=user), n))
            address, size = address + n, size - n
        return pieces
