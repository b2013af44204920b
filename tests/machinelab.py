"""Small machines and small guests for tests: assemble a few instructions, put them on a bare PC, run, look.

:class:`Bench` is the bare machine with a GDT, an IDT and a TSS already loaded: for tests of the machine.
:func:`kernel` makes a :class:`~vmlab.guests.GuestImage` that loads such tables by itself: for tests of VMMs, in
which nothing may be patched in from outside.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Mapping

import keystone

from vmlab.guests import GuestImage
from vmlab.guests.image import Segment as ImageSegment
from vmlab.ledger import Snapshot
from vmlab.machine import fast
from vmlab.machine.cpu import Segment
from vmlab.machine.devices.pit import time_of
from vmlab.machine.pc import Machine, Stop
from vmlab.machine.state import CS, DS, ES, FS, GS, RSP, SS
from vmlab.machine.timeline import Timeline
from vmlab.machine.tlb import TlbConfig

#: Every way to count that this host has: the tests run on each.
PATHS = ("portable",) if fast.why_not() else ("portable", "fast")

# Selectors.
CODE0, DATA0, CODE3, DATA3, TASK, SPARE = 0x08, 0x10, 0x18, 0x20, 0x28, 0x30
USER_CODE, USER_DATA = CODE3 | 3, DATA3 | 3
# Physical (and guest-physical) addresses.
GDT, IDT, TSS, STACK0, STACK3, DATA, CODE, HANDLERS, USER = 0x1000, 0x2000, 0x3000, 0x9000, 0xA000, 0x5000, 0x10000, 0x20000, 0x30000
PAGES = 0x40000                      # page tables, where a test wants them
DEBUG_EXIT = "mov dx, 0xf4; out dx, eax;"

_FLAT_CODE, _FLAT_DATA = 0x00CF9B000000FFFF, 0x00CF93000000FFFF
_DPL3 = 3 << 45


@functools.cache
def _keystone(bits: int) -> keystone.Ks:
    mode = {16: keystone.KS_MODE_16, 32: keystone.KS_MODE_32, 64: keystone.KS_MODE_64}[bits]
    return keystone.Ks(keystone.KS_ARCH_X86, mode)


@functools.cache
def asm(source: str, origin: int = 0, bits: int = 32) -> bytes:
    """Machine code of ``source`` (Intel syntax, instructions separated by ``;`` or newlines) at ``origin``."""
    code, _ = _keystone(bits).asm(source, origin)
    assert code, source
    return bytes(code)


def task_descriptor(base: int, limit: int = 0x67) -> int:
    """An available 32-bit TSS (SDM Vol. 3A figure 7-3)."""
    return limit | (base & 0xFFFFFF) << 16 | 0x89 << 40 | (base >> 24) << 56


def gate(address: int, *, dpl: int = 0, kind: int = 0xE, present: bool = True, selector: int = CODE0) -> bytes:
    """A 32-bit gate (SDM Vol. 3A figure 6-2): ``kind`` 0xE interrupt, 0xF trap."""
    return struct.pack("<HHBBH", address & 0xFFFF, selector, 0, kind | dpl << 5 | present << 7, address >> 16)


def descriptors(spare: int = 0) -> bytes:
    """The GDT: null, ring 0 code and data, ring 3 code and data, TSS, one to play with. Accessed bits are set."""
    return struct.pack("<7Q", 0, _FLAT_CODE, _FLAT_DATA, _FLAT_CODE | _DPL3, _FLAT_DATA | _DPL3, task_descriptor(TSS), spare)


class Bench:
    """The bare machine in 32-bit protected mode at CPL 0, interrupts off, about to run ``source``.

    :param handlers: by vector: assembly of the handler, or (assembly, DPL of its gate). A handler ends by itself.
    :param user: assembly placed at :data:`USER`, for ring 3.
    """

    def __init__(self, source: str | bytes, handlers: Mapping[int, str | tuple[str, int]] | None = None, *,
                 user: str = "", path: str = "portable", spare: int = 0, disk: bytes | None = None,
                 tlb: TlbConfig | None = None) -> None:
        self.machine = machine = Machine(4 << 20, path, disk=disk, tlb=tlb)
        ram = machine.ram
        ram.write(GDT, descriptors(spare))
        ram.write(TSS + 4, struct.pack("<II", STACK0, DATA0))
        ram.write(TSS + 0x66, struct.pack("<H", 0x68))   # no I/O bitmap
        ram.write(CODE, source if isinstance(source, bytes) else asm(source, CODE))
        if user:
            ram.write(USER, asm(user, USER))
        for vector, handler in (handlers or {}).items():
            text, dpl = handler if isinstance(handler, tuple) else (handler, 0)
            self.gate(vector, gate(self.handler(vector), dpl=dpl))
            ram.write(self.handler(vector), asm(text, self.handler(vector)))
        cpu = self.cpu = machine.cpu
        cpu.enter_protected(CODE, Segment(CODE0, 0, 0xFFFFFFFF, 0xCF9B00), Segment(DATA0, 0, 0xFFFFFFFF, 0xCF9300))
        cpu.load()
        cpu.set_table("gdt", Segment(0, GDT, 7 * 8 - 1, 0))
        cpu.set_table("idt", Segment(0, IDT, 0x7FF, 0))
        cpu.set_table("tr", Segment(TASK, TSS, 0x67, 0x8900))
        cpu.set_gpr(RSP, STACK0)
        cpu.store()

    @staticmethod
    def handler(vector: int) -> int:
        """Where the handler of ``vector`` lies."""
        return HANDLERS + 0x100 * vector

    def gate(self, vector: int, raw: bytes) -> None:
        self.machine.ram.write(IDT + 8 * vector, raw)

    def user_mode(self) -> None:
        """Begin at :data:`USER` in ring 3 instead, interrupts off."""
        cpu = self.cpu
        cpu.load()
        cpu.set_segment(CS, Segment(USER_CODE, 0, 0xFFFFFFFF, 0xCFFB00))
        for number in (SS, DS, ES, FS, GS):
            cpu.set_segment(number, Segment(USER_DATA, 0, 0xFFFFFFFF, 0xCFF300))
        cpu.set_cpl(3)
        cpu.set_gpr(RSP, STACK3)
        cpu.rip = USER
        cpu.store()

    def run(self, budget: int = 100_000) -> Stop:
        return self.machine.run(budget)

    def counts(self) -> Snapshot:
        return self.machine.snapshot()

    def read32(self, address: int) -> int:
        return self.machine.ram.read32(address)

    def stack(self, items: int) -> list[int]:
        """The top of the stack."""
        self.cpu.load()
        return [self.read32((self.cpu.gpr(RSP) + 4 * i) & 0xFFFFFFFF) for i in range(items)]


# ---- devices without a machine
class Clock:
    """A timeline whose time the test moves."""

    def __init__(self) -> None:
        self.now = 0
        self.timeline = Timeline(lambda: self.now, lambda: None)

    def to(self, time: int) -> None:
        while (due := self.timeline.next_due) is not None and due <= time:
            self.now = max(due, self.now)
            self.timeline.run_due()
        self.now = time

    def to_tick(self, tick: int) -> None:
        """To a clock pulse of the 8254."""
        self.to(time_of(tick))


class Bits:
    """An interrupt line that remembers when it rose."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.level, self.edges = clock, False, list[int]()

    def __call__(self, level: bool) -> None:
        if level and not self.level:
            self.edges.append(self.clock.now)
        self.level = level


# ---- long mode
CODE64, TABLES64, IDT64, TSS64, LONG = SPARE, 0x40000, 0x48000, 0x4A000, 0x50000
IST1, RSP0 = 0xB000, 0xC000


def gate64(address: int, *, ist: int = 0, dpl: int = 0, selector: int = CODE64, present: bool = True) -> bytes:
    """SDM Vol. 3A figure 6-8."""
    return struct.pack("<HHBBHII", address & 0xFFFF, selector, ist, 0xE | dpl << 5 | present << 7, address >> 16 & 0xFFFF, address >> 32, 0)


def long_bench(source: str, path: str, handlers: dict[int, tuple[str, int, int]], *, tlb: TlbConfig | None = None) -> Bench:
    """``source`` in 64-bit mode at :data:`LONG`; handlers are (assembly, IST, DPL). 2 MiB pages map everything for everybody."""
    bench = Bench(f"mov eax, 0x20; mov cr4, eax; mov eax, {TABLES64:#x}; mov cr3, eax; mov ecx, 0xc0000080; rdmsr; or eax, 0x100; wrmsr;"
                  f"mov eax, 0x80000011; mov cr0, eax; .byte 0xea; .long {LONG:#x}; .word {CODE64}", path=path, spare=0x00AF9B00_0000FFFF, tlb=tlb)
    ram = bench.machine.ram
    ram.write64(TABLES64, TABLES64 + 0x1007)
    ram.write64(TABLES64 + 0x1000, TABLES64 + 0x2007)
    for i in range(2):
        ram.write64(TABLES64 + 0x2000 + 8 * i, i << 21 | 0x87)
    ram.write64(TABLES64 + 0x1018, TABLES64 + 0x3007)
    ram.write64(TABLES64 + 0x3000 + 8 * (0xFEE00000 >> 21 & 511), 0xFEE00000 | 0x9F)  # the local APIC, uncached
    ram.write64(TSS64 + 4, RSP0)
    ram.write64(TSS64 + 0x24, IST1)
    ram.write(LONG, asm(source, LONG, 64))
    for vector, (text, ist, dpl) in handlers.items():
        ram.write(IDT64 + 16 * vector, gate64(bench.handler(vector), ist=ist, dpl=dpl))
        ram.write(bench.handler(vector), asm(text, bench.handler(vector), 64))

    def tables(_: int) -> None:
        bench.cpu.load()
        bench.cpu.set_table("idt", Segment(0, IDT64, 0xFFF, 0))
        bench.cpu.set_table("tr", Segment(TASK, TSS64, 0x67, 0x8900))
        bench.cpu.store()

    bench.machine.watch(LONG, tables)
    return bench


# ---- guests
KERNEL = 0x100000


def kernel(source: str | bytes, handlers: Mapping[int, str | tuple[str, int]] | None = None, *, user: str = "",
           idt_limit: int = 0x7FF, data: Mapping[int, bytes] | None = None) -> GuestImage:
    """A kernel that loads GDT, IDT, TSS and its segments, then runs ``source`` at :data:`CODE` with interrupts off."""
    prologue = f"lgdt [0xf00]; lidt [0xf10]; .byte 0xea; .long {KERNEL + 0x40:#x}; .word 8"
    rest = (f"mov eax, 0x10; mov ds, eax; mov es, eax; mov fs, eax; mov gs, eax; mov ss, eax; mov esp, {STACK0:#x};"
            f"mov eax, {TASK:#x}; ltr ax; xor eax, eax; xor ebx, ebx; push {CODE:#x}; ret")
    pieces: dict[int, bytes] = {
        0xF00: struct.pack("<HI", 7 * 8 - 1, GDT), 0xF10: struct.pack("<HI", idt_limit, IDT),
        GDT: descriptors(), TSS: struct.pack("<III", 0, STACK0, DATA0) + bytes(0x66 - 12) + struct.pack("<H", 0x68),
        KERNEL: asm(prologue, KERNEL), KERNEL + 0x40: asm(rest, KERNEL + 0x40),
        CODE: source if isinstance(source, bytes) else asm(source, CODE),
    }
    if user:
        pieces[USER] = asm(user, USER)
    table = bytearray(8 * 256)
    for vector, handler in (handlers or {}).items():
        text, dpl = handler if isinstance(handler, tuple) else (handler, 0)
        at = Bench.handler(vector)
        table[8 * vector:8 * vector + 8] = gate(at, dpl=dpl)
        pieces[at] = asm(text, at)
    pieces[IDT] = bytes(table)
    pieces.update(data or {})
    segments = tuple(ImageSegment(at, raw, len(raw)) for at, raw in sorted(pieces.items()))
    digest = hashlib.sha256(repr(segments).encode()).hexdigest()
    return GuestImage("test", segments, KERNEL, None, {}, digest)
