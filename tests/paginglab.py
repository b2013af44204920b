"""Small kernels with page tables of their own, for tests of memory virtualization.

Low memory is mapped one to one by 4 KiB pages for everybody; the kernel finds its tables at addresses known here, edits
them by plain stores, and logs every page fault that it sees.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from machinelab import CODE, DEBUG_EXIT, PAGES, asm, kernel

from vmlab.guests import GuestImage
from vmlab.machine.paging import PS, RW, US, P
from vmlab.machine.pc import Machine
from vmlab.strategies.base import Strategy
from vmlab.strategies.hardware import HardwareAssisted
from vmlab.strategies.native import Native
from vmlab.strategies.trap_and_emulate import TrapAndEmulate

ALL = P | RW | US
LOG = 0x8000                         # a counter, then (error code, CR2, EIP) for each page fault
WINDOW = 0x200000                    # gva of the pages that tests map as they like: a table of its own
END = "xor eax, eax;" + DEBUG_EXIT

#: Every way to run a paging 32-bit guest faithfully, by name.
SCHEMES: dict[str, tuple[type[Strategy], dict[str, str]]] = {
    f"{kind.name}/{memory}": (kind, {"memory": memory, **({"sensitive": "trap"} if kind is TrapAndEmulate else {})})
    for kind, memories in ((TrapAndEmulate, ("tracing", "lazy")), (HardwareAssisted, ("tracing", "lazy", "nested")))
    for memory in memories
}


@dataclass(frozen=True)
class Layout:
    """Where the tables of a mode lie and how its entries look."""

    mode: str
    size: int
    tables: Mapping[int, bytes]
    window: int                      # gpa of the table that maps WINDOW
    directory: int                   # gpa of the directory entry that leads to it
    load: str                        # assembly that turns paging on

    def slot(self, page: int) -> int:
        """Address of the entry of WINDOW's ``page``-th page."""
        return self.window + self.size * page


def _entries(size: int, values: list[int]) -> bytes:
    return struct.pack(f"<{len(values)}{'Q' if size == 8 else 'I'}", *values)


def layout(mode: str, *, wp: bool = True) -> Layout:
    """Tables at :data:`PAGES` for "32" or "pae"; everything below WINDOW and WINDOW's own 2 MiB have tables of their own."""
    cr0 = 0x80010011 if wp else 0x80000011
    on = f"mov eax, {PAGES:#x}; mov cr3, eax; mov eax, {cr0:#x}; mov cr0, eax;"
    at = [PAGES + 0x1000 * i for i in range(5)]
    if mode == "32":
        low = _entries(4, [i << 12 | ALL for i in range(512)] + [0] * 512)
        tables = {at[0]: _entries(4, [at[1] | ALL] + [0] * 1023), at[1]: low}
        return Layout(mode, 4, tables, at[1] + 4 * 512, at[0], f"mov eax, 0x10; mov cr4, eax; {on}")
    low = _entries(8, [i << 12 | ALL for i in range(512)])
    tables = {at[0]: _entries(8, [at[1] | P, 0, 0, 0]), at[1]: _entries(8, [at[2] | ALL, at[3] | ALL] + [0] * 510), at[2]: low, at[3]: bytes(0x1000)}
    nxe = "mov ecx, 0xc0000080; mov eax, 0x800; xor edx, edx; wrmsr;"
    return Layout(mode, 8, tables, at[3], at[1] + 8, f"mov eax, 0x20; mov cr4, eax; {nxe} {on}")


#: #PF handler: log error code, CR2 and EIP, then go on at ESI.
LOGGING = (
    f"push eax; push ebx; mov ebx, [{LOG:#x}]; inc dword ptr [{LOG:#x}]; shl ebx, 4; mov eax, [esp + 8]; mov [ebx + {LOG + 16:#x}], eax;"
    f"mov eax, cr2; mov [ebx + {LOG + 20:#x}], eax; mov eax, [esp + 12]; mov [ebx + {LOG + 24:#x}], eax; pop ebx; pop eax;"
    "add esp, 4; mov [esp], esi; iretd")


def paging_kernel(where: Layout, source: str, *, handlers: Mapping[int, str | tuple[str, int]] | None = None, user: str = "",
                  data: Mapping[int, bytes] | None = None) -> GuestImage:
    """A kernel that turns paging on and runs ``source``; it ends by itself."""
    return kernel(where.load + source, {14: LOGGING, **(handlers or {})}, user=user, data={LOG: bytes(0x400), **where.tables, **(data or {})})


def boot(kind: type[Strategy], image: GuestImage, parameters: Mapping[str, str] | None = None, path: str = "portable") -> Strategy:
    strategy = kind(Machine(64 << 20, path), parameters)
    strategy.load(image, "")
    return strategy


def bare(image: GuestImage) -> Strategy:
    return boot(Native, image)


def faults(strategy: Strategy) -> list[tuple[int, int, int]]:
    """(error code, CR2, EIP) of every page fault that the guest saw."""
    count = int.from_bytes(strategy.read_guest(LOG, 4), "little")
    return [struct.unpack("<III", strategy.read_guest(LOG + 16 + 16 * i, 12)) for i in range(count)]


def length(where: Layout, source: str) -> int:
    """Where code behind ``source`` begins."""
    return CODE + len(asm(where.load + source, CODE))


__all__ = ["ALL", "END", "LOG", "LOGGING", "PS", "SCHEMES", "WINDOW", "Layout", "bare", "boot", "faults", "layout", "length", "paging_kernel"]
