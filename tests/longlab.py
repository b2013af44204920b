"""Small 64-bit kernels for tests of VMMs: everything they need is loaded by themselves, in 32-bit code, as a real one does.

Low memory (2 MiB, 4 KiB pages) is mapped one to one at 0 and again at :data:`HIGH`, beyond the reach of a 32-bit displacement. All of it
is everybody's but for one page that is the kernel's alone. Accessed and dirty bits are set.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from machinelab import DATA, LONG, PAGES, STACK0, Bench, asm, gate64, kernel

from vmlab.guests import GuestImage
from vmlab.machine.paging import RW, US, A, D, P

CODE0, DATA0, USER32, USER_DATA, USER_CODE, TASK, CODE32 = 0x08, 0x10, 0x18, 0x20 | 3, 0x28 | 3, 0x30, 0x40
HIGH = 0xFFFF_8000_0000_0000
SECRET = 0x7000                      # the page of the kernel's alone
RESUME = DATA + 0x800                # where SYSCALL (and what a test likes) goes on: RIP, RSP; R10 holds DATA
_GDT, _IDT, _TSS, _POINTERS, _START, _IST = 0x1800, 0x6000, 0x3800, 0x1F00, 0x60000, 0xB000
SYSCALL_ENTRY = 0x2F000
GO_ON = f"mov rsp, [r10 + {RESUME + 8 - DATA}]; jmp qword ptr [r10 + {RESUME - DATA}]"
_FLAT, _LONG = 0x00CF93000000FFFF, 0x00AF9B000000FFFF


def tables() -> dict[int, bytes]:
    """Four levels at :data:`PAGES`; with the local APIC at its physical address, uncached."""
    at = [PAGES + 0x1000 * i for i in range(5)]
    rights = P | RW | US | A | D
    upper = [struct.pack("<512Q", *[at[i + 1] | rights if slot in slots else 0 for slot in range(512)])
             for i, slots in enumerate(((0, 256), (0,), (0,)))]
    low = [page << 12 | (rights & ~US if page << 12 == SECRET else rights) for page in range(512)]
    upper[1] = upper[1][:24] + struct.pack("<Q", at[4] | rights) + upper[1][32:]
    apic = [0xFEE0009F | A | D if slot == 0xFEE00000 >> 21 & 511 else 0 for slot in range(512)]
    return {**dict(zip(at, upper, strict=False)), at[4]: struct.pack("<512Q", *apic), at[3]: struct.pack("<512Q", *low)}


def long_kernel(source: str, handlers: Mapping[int, str], *, high: bool = False, data: Mapping[int, bytes] | None = None) -> GuestImage:
    """``source`` in 64-bit mode at :data:`~machinelab.LONG` (or its place in high memory), interrupts off, SYSCALL on.

    Handlers are interrupt gates, their code where ``source`` is; INT 0x30 is for users too, and vector 8 has a stack of its own (IST 1).
    """
    base = HIGH if high else 0
    boot = (f"mov eax, 0x10620; mov cr4, eax; mov ecx, 0xc0000080; mov eax, 0x901; xor edx, edx; wrmsr; mov eax, {PAGES:#x}; mov cr3, eax;"
            f"mov eax, 0x80010011; mov cr0, eax; lgdt [{_POINTERS:#x}]; .byte 0xea; .long {_START:#x}; .word {CODE0}")
    msrs = ((0xC0000081, (USER32 << 16 | CODE0) << 32), (0xC0000082, base + SYSCALL_ENTRY), (0xC0000084, 0x600))
    start = (f"mov eax, {DATA0}; mov ss, eax; mov eax, {USER_DATA}; mov ds, eax; mov es, eax; xor eax, eax; mov fs, eax; mov gs, eax;"
             + "".join(f"mov ecx, {number:#x}; mov eax, {value & 0xFFFFFFFF:#x}; mov edx, {value >> 32:#x}; wrmsr;" for number, value in msrs)
             + f"mov eax, {_POINTERS + 0x10:#x}; lidt [rax]; mov eax, {TASK}; ltr ax; mov esp, {STACK0:#x};"
             + "; ".join(f"xor r{n}, r{n}" for n in ("ax", "bx", "cx", "dx", "si", "di", "bp", *range(8, 16)))
             + f"; mov r10d, {DATA:#x}; movabs rax, {base + LONG:#x}; push rax; xor eax, eax; ret")
    table = bytearray(0x1000)
    pieces: dict[int, bytes] = {}
    for vector, text in handlers.items():
        at = Bench.handler(vector)
        pieces[at] = asm(text, base + at, 64)
        table[16 * vector:16 * vector + 16] = gate64(base + at, dpl=3 if vector == 0x30 else 0, ist=int(vector == 8), selector=CODE0)
    task = 0x67 | (_TSS & 0xFFFFFF) << 16 | 0x89 << 40
    pieces |= {
        **tables(), _IDT: bytes(table),
        _GDT: struct.pack("<9Q", 0, _LONG, _FLAT, 0x00CFFB000000FFFF, _FLAT | 3 << 45, _LONG | 3 << 45, task, 0, 0x00CF9B000000FFFF),
        _TSS: bytes(4) + struct.pack("<3Q", STACK0 - 0x100, 0, 0) + bytes(8) + struct.pack("<Q", _IST) + bytes(0x66 - 44) + struct.pack("<H", 0x68),
        _POINTERS: struct.pack("<HI", 9 * 8 - 1, _GDT), _POINTERS + 0x10: struct.pack("<HQ", 0xFFF, _IDT),
        _START: asm(start, _START, 64), SYSCALL_ENTRY: asm(GO_ON, base + SYSCALL_ENTRY, 64),
    }
    pieces |= {LONG: asm(source, base + LONG, 64), **(data or {})}
    return kernel(boot, data=pieces)
