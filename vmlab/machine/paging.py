"""A page-table walker in Python: the same walk that the CPU does, for the machine's and a VMM's own accesses.

Covers 32-bit (4 KB, 4 MB pages), PAE and four-level tables (SDM Vol. 3A §4.3–4.5) with the rights
P, R/W, U/S, NX, CR0.WP, reserved bits, and accessed/dirty bits. The tables may lie in any memory with the
surface of :class:`~vmlab.machine.memory.Ram`: machine memory, or a guest's as its VMM sees it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

CR0_PG, CR0_WP = 1 << 31, 1 << 16
CR4_PSE, CR4_PAE, CR4_PGE, CR4_SMEP, CR4_SMAP = 1 << 4, 1 << 5, 1 << 7, 1 << 20, 1 << 21
#: Bits of CR4 that this CPU has, by CPUID (TSD, DE, PSE, PAE, MCE, PGE, PCE, OSFXSR, OSXMMEXCPT, FSGSBASE, OSXSAVE, SMEP, SMAP); others are #GP.
CR4_BITS = 0x7FC | 1 << 16 | 1 << 18 | CR4_SMEP | CR4_SMAP
CR4_FLUSHING = CR4_PSE | CR4_PAE | CR4_PGE   # a change of these voids the TLB and loads the PDPTEs (SDM Vol. 3A §4.4.1, §4.10.4.1)
EFER_LME, EFER_LMA, EFER_NXE = 1 << 8, 1 << 10, 1 << 11
P, RW, US, A, D, PS, G, NX = 1, 2, 4, 1 << 5, 1 << 6, 1 << 7, 1 << 8, 1 << 63
_FRAME = 0x000FFFFFFFFFF000
_PAT_LARGE = 1 << 12
_PDPTE_RESERVED = 0xFFF00000000001E6    # SDM Vol. 3A table 4-8, with a physical address of 52 bits
_LEVELS = {
    "64": ((39, 9, 8), (30, 9, 8), (21, 9, 8), (12, 9, 8)), "pae": ((30, 2, 8), (21, 9, 8), (12, 9, 8)), "32": ((22, 10, 4), (12, 10, 4)),
}
# Bits of a #PF error code (SDM Vol. 3A figure 4-12).
PF_PRESENT, PF_WRITE, PF_USER, PF_RESERVED, PF_FETCH = 1, 2, 4, 8, 16


class TableMemory(Protocol):
    """Memory that page tables lie in."""

    def read32(self, address: int) -> int: ...

    def read64(self, address: int) -> int: ...

    def write32(self, address: int, value: int) -> None: ...

    def write64(self, address: int, value: int) -> None: ...


class PageFault(Exception):
    """The walk failed: ``error_code`` as #PF pushes it (SDM Vol. 3A §4.7), ``address`` for CR2.

    ``level``: of the entry that ended it (1 maps 4 KiB), 0 where the page was reached and its rights were too few.
    """

    def __init__(self, address: int, error_code: int, level: int = 0) -> None:
        super().__init__(f"page fault at {address:#x}, error code {error_code:#x}")
        self.address, self.error_code, self.level = address, error_code, level


@dataclass(frozen=True)
class Tables:
    """The registers that say how virtual addresses are translated.

    ``pdptes``: the four page-directory-pointer entries of PAE paging where they are registers, loaded with CR3
    (SDM Vol. 3A §4.4.1); None reads them from memory at each walk, as Unicorn's CPU does.
    """

    cr0: int
    cr3: int
    cr4: int
    efer: int
    pdptes: tuple[int, ...] | None = None

    @property
    def format(self) -> str:
        """"32", "pae" or "64"."""
        return "64" if self.efer & EFER_LMA else "pae" if self.cr4 & CR4_PAE else "32"


class Step(NamedTuple):
    """One entry that a walk went through: its level (1 maps 4 KiB), its address, size in bytes, and value."""

    level: int
    at: int
    size: int
    entry: int


class Walk(NamedTuple):
    """A walk that reached a page: the entries with rights from the root down, and what they give together."""

    steps: tuple[Step, ...]
    frame: int
    shift: int
    writable: bool
    user: bool
    no_execute: bool


def load_pdptes(memory: TableMemory, cr3: int) -> tuple[int, ...] | None:
    """The four PDPTEs that loading CR3 under PAE loads; None when one has a reserved bit set (#GP; SDM Vol. 3A §4.4.1)."""
    entries = tuple(memory.read64((cr3 & 0xFFFFFFE0) + 8 * i) for i in range(4))
    return None if any(entry & P and entry & _PDPTE_RESERVED for entry in entries) else entries


def walk(memory: TableMemory, tables: Tables, address: int, code: int, *, mark: bool = True) -> Walk:
    """From the root to the page of ``address``; raises :class:`PageFault` where an entry is absent or has reserved bits.

    :param code: error code bits that say what the access is.
    :param mark: set accessed bits of the tables passed, as the CPU does even when the walk fails further down.
    """
    kind = tables.format
    table = tables.cr3 & (0xFFFFFFE0 if kind == "pae" else 0xFFFFF000 if kind == "32" else _FRAME)
    writable, user_ok, no_execute = True, True, False
    reserved = 0 if tables.efer & EFER_NXE else NX
    steps: list[Step] = []
    levels = _LEVELS[kind]
    level = len(levels)
    for shift, bits, size in levels:
        index = (address >> shift) & ((1 << bits) - 1)
        at = table + index * size
        pdpte = kind == "pae" and level == 3
        if pdpte and tables.pdptes is not None:
            entry = tables.pdptes[index]
        else:
            entry = memory.read64(at) if size == 8 else memory.read32(at)
        if not entry & P:
            raise PageFault(address, code, level)
        large = level > 1 and bool(entry & PS) and not pdpte and (size == 8 or bool(tables.cr4 & CR4_PSE))
        if size == 8:
            wrong = reserved | (0xFFF0000000000000 if pdpte else 0) | (PS if level == 4 else 0)
            wrong |= ((1 << shift) - 1) & _FRAME & ~_PAT_LARGE if large and level < 4 else 0
            if kind == "pae" and not pdpte:
                wrong |= 0x7FF0000000000000
        else:
            wrong = 1 << 21 if large else 0
        if entry & wrong:
            raise PageFault(address, code | PF_PRESENT | PF_RESERVED, level)
        if not pdpte:  # PAE's first level carries no rights and no accessed bit
            writable &= bool(entry & RW)
            user_ok &= bool(entry & US)
            no_execute |= bool(entry & NX) and size == 8
            if mark and not large and level > 1 and not entry & A:
                entry |= A
                (memory.write64 if size == 8 else memory.write32)(at, entry)
            steps.append(Step(level, at, size, entry))
        if large or level == 1:
            break
        table = entry & _FRAME if size == 8 else entry & 0xFFFFF000
        level -= 1
    frame = entry & _FRAME if size == 8 else entry & 0xFFFFF000 | (entry & 0x1FE000) << 19 if large else entry & 0xFFFFF000  # PSE-36
    return Walk(tuple(steps), frame & ~((1 << shift) - 1), shift, writable, user_ok, no_execute)


def access_code(tables: Tables, *, write: bool, user: bool, fetch: bool) -> int:
    """The bits of an error code that say what was tried (SDM Vol. 3A §4.7); the fetch bit only where NX exists."""
    instruction = fetch and tables.efer & EFER_NXE and tables.cr4 & CR4_PAE
    return (PF_WRITE if write else 0) | (PF_USER if user else 0) | (PF_FETCH if instruction else 0)


def check(memory: TableMemory, tables: Tables, address: int, *, write: bool = False, user: bool = False, fetch: bool = False,
          mark: bool = True) -> Walk:
    """A walk that may be made with these rights (SDM Vol. 3A §4.6), accessed and dirty bits set; raises :class:`PageFault`.

    The last step holds the entry with the bits that it has then.
    """
    code = access_code(tables, write=write, user=user, fetch=fetch)
    found = walk(memory, tables, address, code, mark=mark)
    if (user and not found.user) or (fetch and found.no_execute) or (
            write and not found.writable and (user or bool(tables.cr0 & CR0_WP))):
        raise PageFault(address, code | PF_PRESENT)
    last = found.steps[-1]
    wanted = last.entry | A | (D if write else 0)
    if mark and wanted != last.entry:
        (memory.write64 if last.size == 8 else memory.write32)(last.at, wanted)
        return found._replace(steps=(*found.steps[:-1], last._replace(entry=wanted)))
    return found


class NestedFault(Exception):
    """Nested paging has no page for guest-physical ``gpa``: #VMEXIT(NPF), with this error code (APM Vol. 2 §15.25.6)."""

    def __init__(self, gpa: int, error_code: int) -> None:
        super().__init__(f"nested page fault at guest-physical {gpa:#x}")
        self.gpa, self.error_code = gpa, error_code


class NestedMemory:
    """Guest-physical memory as a CPU in guest mode reaches it: through the four-level nested tables of a 64-bit host.

    Every access counts as a user's (APM Vol. 2 §15.25.5). Raises :class:`NestedFault`.
    """

    def __init__(self, memory: TableMemory, root: int) -> None:
        self._memory = memory
        self._tables = Tables(CR0_PG | CR0_WP, root, CR4_PAE, EFER_LMA | EFER_NXE)

    def hpa(self, gpa: int, *, write: bool) -> int:
        """Where ``gpa`` lies in machine memory."""
        try:
            return translate(self._memory, self._tables, gpa, write=write, user=True, mark=False)
        except PageFault as fault:
            raise NestedFault(gpa, fault.error_code) from fault

    def read32(self, address: int) -> int:
        return self._memory.read32(self.hpa(address, write=False))

    def read64(self, address: int) -> int:
        return self._memory.read64(self.hpa(address, write=False))

    def write32(self, address: int, value: int) -> None:
        self._memory.write32(self.hpa(address, write=True), value)

    def write64(self, address: int, value: int) -> None:
        self._memory.write64(self.hpa(address, write=True), value)


def translate(memory: TableMemory, tables: Tables, address: int, *, write: bool = False, user: bool = False,
              fetch: bool = False, mark: bool = True) -> int:
    """The physical address of ``address``; raises :class:`PageFault`. ``mark`` sets accessed and dirty bits."""
    if not tables.cr0 & CR0_PG:
        return address & 0xFFFFFFFF
    found = check(memory, tables, address, write=write, user=user, fetch=fetch, mark=mark)
    return found.frame | (address & ((1 << found.shift) - 1))
