"""A page-table walker in Python: the same walk that the CPU does, for the machine's and a VMM's own accesses.

Covers 32-bit (4 KB, 4 MB pages), PAE and four-level tables (SDM Vol. 3A §4.3–4.5) with the rights
P, R/W, U/S, NX, CR0.WP, and accessed/dirty bits.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmlab.machine.memory import Ram

CR0_PG, CR0_WP = 1 << 31, 1 << 16
CR4_PSE, CR4_PAE = 1 << 4, 1 << 5
EFER_LMA, EFER_NXE = 1 << 10, 1 << 11
P, RW, US, A, D, PS, NX = 1, 2, 4, 1 << 5, 1 << 6, 1 << 7, 1 << 63
_FRAME = 0x000FFFFFFFFFF000


class PageFault(Exception):
    """The walk failed: ``error_code`` as #PF pushes it (SDM Vol. 3A §4.7), ``address`` for CR2."""

    def __init__(self, address: int, error_code: int) -> None:
        super().__init__(f"page fault at {address:#x}, error code {error_code:#x}")
        self.address, self.error_code = address, error_code


@dataclass(frozen=True)
class Tables:
    """The registers that say how virtual addresses are translated."""

    cr0: int
    cr3: int
    cr4: int
    efer: int

    def levels(self) -> list[tuple[int, int, int]]:
        """(shift, index bits, entry size) from the root down."""
        if self.efer & EFER_LMA:
            return [(39, 9, 8), (30, 9, 8), (21, 9, 8), (12, 9, 8)]
        if self.cr4 & CR4_PAE:
            return [(30, 2, 8), (21, 9, 8), (12, 9, 8)]
        return [(22, 10, 4), (12, 10, 4)]


def translate(ram: Ram, tables: Tables, address: int, *, write: bool = False, user: bool = False,
              fetch: bool = False, mark: bool = True) -> int:
    """The physical address of ``address``; raises :class:`PageFault`. ``mark`` sets accessed and dirty bits."""
    if not tables.cr0 & CR0_PG:
        return address & 0xFFFFFFFF
    code = (2 if write else 0) | (4 if user else 0) | (16 if fetch and tables.efer & EFER_NXE else 0)
    pae = bool(tables.cr4 & CR4_PAE)
    levels = tables.levels()
    table = tables.cr3 & (_FRAME if not pae or len(levels) == 4 else 0xFFFFFFE0)
    writable, user_ok, no_execute = True, True, False
    path: list[tuple[int, int, int]] = []
    for depth, (shift, bits, size) in enumerate(levels):
        at = table + ((address >> shift) & ((1 << bits) - 1)) * size
        entry = ram.read64(at) if size == 8 else ram.read32(at)
        if not entry & P:
            raise PageFault(address, code)
        pdpte = pae and len(levels) == 3 and depth == 0
        if not pdpte:  # PAE's first level carries no rights and no accessed bit
            writable &= bool(entry & RW)
            user_ok &= bool(entry & US)
            no_execute |= bool(entry & NX) and size == 8 and bool(tables.efer & EFER_NXE)
            path.append((at, size, entry))
        large = bool(entry & PS) and shift in (21, 22, 30) and not pdpte and (pae or bool(tables.cr4 & CR4_PSE))
        if large or shift == 12:
            break
        table = entry & _FRAME if size == 8 else entry & 0xFFFFF000
    denied = (user and not user_ok) or (fetch and no_execute) or (
        write and not writable and (user or bool(tables.cr0 & CR0_WP)))
    if denied:
        raise PageFault(address, code | 1)
    if mark:
        for i, (at, size, entry) in enumerate(path):
            new = entry | A | (D if write and i == len(path) - 1 else 0)
            if new != entry:
                (ram.write64 if size == 8 else ram.write32)(at, new)
    offset = (1 << shift) - 1
    frame = entry & _FRAME if size == 8 else entry & 0xFFFFF000
    return (frame & ~offset) | (address & offset)
