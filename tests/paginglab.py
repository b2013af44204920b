"""Small kernels with page tables of their own, for tests of memory virtualization.

Low memory is mapped one to one by 4 KiB pages for everybody; the kernel finds its tables at addresses known here, edits
them by plain stores, and logs every page fault that it sees.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from machinelab import CODE, CODE0, DEBUG_EXIT, GDT, PAGES, STACK0, TASK, Bench, asm, gate64, kernel

from vmlab.guests import GuestImage
from vmlab.machine.paging import PS, RW, US, P
from vmlab.machine.pc import Machine
from vmlab.strategies.base import Strategy
from vmlab.strategies.hardware import HardwareAssisted
from vmlab.strategies.native import Native
from vmlab.strategies.translation import BinaryTranslation
from vmlab.strategies.trap_and_emulate import TrapAndEmulate

ALL = P | RW | US
LOG = 0x8000                         # a counter, then (error code, CR2, EIP) for each page fault
KERNEL_STACK = STACK0 - 0x400        # where handlers of raw kernels put their stack
LONG_START = CODE + 0x800            # 64-bit code of raw kernels
_GDT64, _IDT64, _TSS64 = 0x1800, 0x6000, 0x3800
END = "xor eax, eax;" + DEBUG_EXIT

#: Every way to run a paging 32-bit guest faithfully, by name.
SCHEMES: dict[str, tuple[type[Strategy], dict[str, str]]] = {
    f"{kind.name}/{memory}": (kind, {"memory": memory, **({"sensitive": "trap"} if kind is TrapAndEmulate else {})})
    for kind, memories in ((TrapAndEmulate, ("tracing", "lazy")), (BinaryTranslation, ("tracing", "lazy")),
                           (HardwareAssisted, ("tracing", "lazy", "nested")))
    for memory in memories
}


@dataclass(frozen=True)
class Layout:
    """Where the tables of a mode lie and how its entries look."""

    mode: str
    size: int
    tables: Mapping[int, bytes]
    window: int                      # gpa of the table that maps the window
    directory: int                   # gpa of the directory entry that leads to it
    load: str                        # assembly that turns paging on
    low: int                         # gpa of the table that maps the memory from 0

    @property
    def base(self) -> int:
        """gva of the window: what the second table maps."""
        return 0x400000 if self.mode == "32" else 0x200000

    def slot(self, page: int) -> int:
        """Address of the entry of the window's ``page``-th page."""
        return self.window + self.size * page


def _entries(size: int, values: list[int]) -> bytes:
    return struct.pack(f"<{len(values)}{'Q' if size == 8 else 'I'}", *values)


def layout(mode: str, *, wp: bool = True) -> Layout:
    """Tables at :data:`PAGES` for "32", "pae" or "64": one for low memory and one for a window that tests map as they like."""
    cr0 = 0x80010011 if wp else 0x80000011
    on = f"mov eax, {PAGES:#x}; mov cr3, eax; mov eax, {cr0:#x}; mov cr0, eax;"
    at = [PAGES + 0x1000 * i for i in range(5)]
    if mode == "32":
        tables = {at[0]: _entries(4, [at[1] | ALL, at[2] | ALL] + [0] * 1022), at[1]: _entries(4, [i << 12 | ALL for i in range(1024)]),
                  at[2]: bytes(0x1000)}
        return Layout(mode, 4, tables, at[2], at[0] + 4, f"mov eax, 0x10; mov cr4, eax; {on}", at[1])
    low = _entries(8, [i << 12 | ALL for i in range(512)])
    if mode == "64":
        tables = {at[0]: _entries(8, [at[1] | ALL]), at[1]: _entries(8, [at[2] | ALL]), at[2]: _entries(8, [at[3] | ALL, at[4] | ALL]),
                  at[3]: low, at[4]: bytes(0x1000)}
        long_mode = "mov ecx, 0xc0000080; mov eax, 0x900; xor edx, edx; wrmsr;"
        return Layout(mode, 8, tables, at[4], at[2] + 8, f"mov eax, 0x20; mov cr4, eax; {long_mode} {on} lgdt [{_GDT64 + 0x100:#x}];"
                      f".byte 0xea; .long {LONG_START:#x}; .word {CODE0:#x};", at[3])
    tables = {at[0]: _entries(8, [at[1] | P, 0, 0, 0]), at[1]: _entries(8, [at[2] | ALL, at[3] | ALL] + [0] * 510), at[2]: low, at[3]: bytes(0x1000)}
    nxe = "mov ecx, 0xc0000080; mov eax, 0x800; xor edx, edx; wrmsr;"
    return Layout(mode, 8, tables, at[3], at[1] + 8, f"mov eax, 0x20; mov cr4, eax; {nxe} {on}", at[2])


#: #PF handler: log error code, CR2 and EIP, then go on at ESI.
LOGGING = (
    f"push eax; push ebx; mov ebx, [{LOG:#x}]; inc dword ptr [{LOG:#x}]; shl ebx, 4; mov eax, [esp + 8]; mov [ebx + {LOG + 16:#x}], eax;"
    f"mov eax, cr2; mov [ebx + {LOG + 20:#x}], eax; mov eax, [esp + 12]; mov [ebx + {LOG + 24:#x}], eax; pop ebx; pop eax;"
    "add esp, 4; mov [esp], esi; iretd")


def paging_kernel(where: Layout, source: str, *, handlers: Mapping[int, str | tuple[str, int]] | None = None, user: str = "",
                  data: Mapping[int, bytes] | None = None) -> GuestImage:
    """A kernel that turns paging on and runs ``source``; it ends by itself."""
    return kernel(where.load + source, {14: LOGGING, **(handlers or {})}, user=user, data={LOG: bytes(0x400), **where.tables, **(data or {})})


# ---- raw kernels: no handler returns; each goes on at EBP with a fresh stack
def _on(where: Layout) -> str:
    """Assembly that runs before a raw kernel's own code."""
    if where.mode != "64":
        return where.load + "mov eax, 0x23; mov ds, eax; mov es, eax;"
    return where.load


_LONG_ENTRY = ("mov eax, 0x23; mov ds, eax; mov es, eax; mov eax, 0x10; mov ss, eax;"
               f"mov eax, {_GDT64 + 0x110:#x}; lidt [rax]; mov eax, {TASK:#x}; ltr ax; mov esp, {KERNEL_STACK:#x};")


def raw_origin(where: Layout) -> int:
    """Where a raw kernel's own code begins."""
    return LONG_START + len(asm(_LONG_ENTRY, LONG_START, 64)) if where.mode == "64" else CODE + len(asm(_on(where), CODE))


def raw_kernel(where: Layout, code: bytes, data: Mapping[int, bytes]) -> GuestImage:
    """A kernel of machine code. Page faults are logged; every exception and INT 0x30 goes on at EBP, in ring 0."""
    wide = where.mode == "64"
    r, word = ("r", 8) if wide else ("e", 4)
    resume = f"mov esp, {KERNEL_STACK:#x}; jmp {r}bp"
    log = (f"push {r}ax; push {r}bx; mov ebx, {LOG:#x}; mov eax, [{r}bx]; inc dword ptr [{r}bx]; shl eax, 4; add ebx, eax;"
           f"mov eax, [{r}sp + {2 * word}]; mov [{r}bx + 16], eax; mov {r}ax, cr2; mov [{r}bx + 20], eax;"
           f"mov eax, [{r}sp + {3 * word}]; mov [{r}bx + 24], eax; pop {r}bx; pop {r}ax; {resume}")
    texts = {0x30: resume, **dict.fromkeys((0, 6, 8, 10, 11, 12, 13), resume), 14: log}
    pieces = {LOG: bytes(0x400), **where.tables, **data}
    if not wide:
        handlers: dict[int, str | tuple[str, int]] = {vector: (text, 3) if vector == 0x30 else text for vector, text in texts.items()}
        return kernel(asm(_on(where), CODE) + code, handlers, data=pieces)
    table = bytearray(0x1000)
    for vector, text in texts.items():
        at = Bench.handler(vector)
        pieces[at] = asm(text, at, 64)
        table[16 * vector:16 * vector + 16] = gate64(at, dpl=3 if vector == 0x30 else 0, selector=CODE0)
    code64, data64 = 0x00AF9B000000FFFF, 0x00CF93000000FFFF
    tss = 0x67 | (_TSS64 & 0xFFFFFF) << 16 | 0x89 << 40
    pieces |= {
        _IDT64: bytes(table), _TSS64: bytes(4) + struct.pack("<Q", STACK0) + bytes(0x66 - 12) + struct.pack("<H", 0x68),
        _GDT64: struct.pack("<7Q", 0, code64, data64, code64 | 3 << 45, data64 | 3 << 45, tss, 0),
        _GDT64 + 0x100: struct.pack("<HI", 7 * 8 - 1, _GDT64), _GDT64 + 0x110: struct.pack("<HQ", 0xFFF, _IDT64),
        LONG_START: asm(_LONG_ENTRY, LONG_START, 64) + code,
    }
    assert GDT + 0x100 < _GDT64
    return kernel(where.load, data=pieces)


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


__all__ = ["ALL", "END", "LOG", "LOGGING", "PS", "SCHEMES", "Layout", "bare", "boot", "faults", "layout", "length", "paging_kernel"]
