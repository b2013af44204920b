"""Where things lie in the probe's machine, and what its descriptor tables hold.

Two owners of the machine are made up. The *kernel*'s tables are what a guest believes it has loaded; a *monitor*
that holds the machine instead has tables of its own, elsewhere and of another size, in which the segments that a
guest may load end before the monitor begins (as VMware's and Xen's did), and runs with interrupts enabled.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

RAM = 1 << 18

# Memory map. Linear and physical addresses are the same throughout.
STACKS = {0: 0x5F00, 1: 0x6F00}          # where the TSS points for entries from outside
STACK, STACK_AREA = 0x8800, (0x5000, 0x9000)
DATA, DATA_SIZE = 0x9000, 64
CODE, TARGET = 0x10000, 0x11000
PAGE_TABLES = 0x20000
HANDLER_STEP = 4
FILL = 0xA5                               # what stack and data hold where a case says nothing

# Selectors, the same in both owners' tables.
CODE_CONFORMING, DATA_0, CODE_0, CODE_3, DATA_3, DATA_1 = 0x08, 0x10, 0x18, 0x20, 0x28, 0x30
TASK, OTHER_TASK, LOCAL, OTHER_LOCAL, CODE_CONFORMING_2, CALL_GATE = 0x38, 0x40, 0x48, 0x50, 0x58, 0x60
DATA_LIMITED, STACK_0, STACK_1, STACK_3 = 0x68, 0x70, 0x78, 0x80
CODE64_CONFORMING, CODE64_0 = 0x88, 0x90

STACK_SEGMENT = {0: DATA_0, 1: DATA_1 | 1, 3: DATA_3 | 3}
OWN_STACK = {0: STACK_0, 1: STACK_1 | 1, 3: STACK_3 | 3}

#: Gates that software may use from every ring: those of INT3, INTO and INT 80h.
OPEN_GATES = frozenset({3, 4, 0x80})


@dataclass(frozen=True)
class Owner:
    """Whose tables the CPU has loaded: addresses, and the register values that the guest did not choose."""

    gdt: int
    gdt_limit: int
    idt: int
    idt_limit: int
    task: int
    task_base: int
    local: int
    handlers: int
    cr0: int
    flags: int
    pages: int
    """Limit of the segments that end early, in 4 KiB pages less one."""


KERNEL = Owner(0x1000, 0x97, 0x2000, 0x7FF, TASK, 0x3000, LOCAL, 0x4000, 0x11, 0x002, 0xFFFFF)
#: Interrupts on; CR0.MP, TS, NE and WP set: the monitor switches the FPU lazily and write-protects its pages.
MONITOR = Owner(0x1400, 0xA7, 0x2800, 0x7F7, OTHER_TASK, 0x3200, OTHER_LOCAL, 0x4800, 0x1003B, 0x202, 0xFBFFF)

# High doublewords of descriptors (SDM Vol. 3A figure 3-8), accessed bit set, flat.
CODE_FLAGS = {CODE_CONFORMING: 0xCF9F00, CODE_CONFORMING_2: 0xCF9F00, CODE_0: 0xCF9B00, CODE_3: 0xCFFB00}
CODE64_FLAGS = {CODE64_CONFORMING: 0xAF9F00, CODE64_0: 0xAF9B00}
DATA_FLAGS = {DATA_0: 0xCF9300, DATA_1: 0xCFB300, DATA_3: 0xCFF300}
_LIMITED = {DATA_LIMITED: 0xC0F300, STACK_0: 0xC09300, STACK_1: 0xC0B300, STACK_3: 0xC0F300}
TASK_FLAGS, LOCAL_FLAGS = 0x8900, 0x8200


def _descriptor(base: int, limit: int, flags: int) -> int:
    return (limit & 0xFFFF) | (base & 0xFFFFFF) << 16 | (flags | (limit & 0xF0000)) << 32 | (base >> 24) << 56


def tables(owner: Owner, long_mode: bool) -> dict[int, bytes]:
    """Address -> bytes of the owner's GDT, IDT, TSS and exception handlers (each of which loops on itself)."""
    entries = dict.fromkeys(range(0, 0x98, 8), 0)
    for selector, flags in (CODE_FLAGS | CODE64_FLAGS | DATA_FLAGS).items():
        entries[selector] = _descriptor(0, 0xFFFFF, flags)
    for selector, flags in _LIMITED.items():
        entries[selector] = _descriptor(0, owner.pages, flags)
    for selector, base in ((TASK, KERNEL.task_base), (OTHER_TASK, MONITOR.task_base)):
        entries[selector] = _descriptor(base, 0x67, TASK_FLAGS)
    for selector, base in ((LOCAL, 0x3400), (OTHER_LOCAL, 0x3500)):
        entries[selector] = _descriptor(base, 0x3F, LOCAL_FLAGS)
    entries[CALL_GATE] = TARGET & 0xFFFF | CODE_0 << 16 | 0xEC00 << 32 | (TARGET >> 16) << 48
    made = {owner.gdt: b"".join(struct.pack("<Q", entries[at]) for at in sorted(entries))}
    made[owner.idt] = b"".join(_gate(owner, vector, long_mode) for vector in range(128 if long_mode else 256))
    made[owner.task_base] = _task(long_mode)
    made[owner.handlers] = b"\xeb\xfe\x90\x90" * 256
    return made


def _gate(owner: Owner, vector: int, long_mode: bool) -> bytes:
    at, dpl = owner.handlers + HANDLER_STEP * vector, 3 if vector in OPEN_GATES else 0
    gate = struct.pack("<HHBBH", at & 0xFFFF, CODE64_0 if long_mode else CODE_0, 0, 0x8E | dpl << 5, at >> 16)
    return gate + bytes(8) if long_mode else gate


def _task(long_mode: bool) -> bytes:
    """A TSS with stacks for rings 0 and 1, and no I/O permission bitmap."""
    if long_mode:
        return struct.pack("<IQQ", 0, STACKS[0], STACKS[1]).ljust(0x66, b"\0") + b"\x68\0"
    stacks = struct.pack("<IIIII", 0, STACKS[0], DATA_0, STACKS[1], DATA_1 | 1)
    return stacks.ljust(0x66, b"\0") + b"\x68\0"


def page_tables() -> dict[int, bytes]:
    """Four-level tables that map the first 2 MiB onto themselves, for every ring (IA-32e mode cannot do without)."""
    at = PAGE_TABLES
    return {at: struct.pack("<Q", at + 0x1000 | 7), at + 0x1000: struct.pack("<Q", at + 0x2000 | 7), at + 0x2000: struct.pack("<Q", 0x87)}
