"""A guest in real mode under every technique: the bare machine is the oracle for what it leaves, and for how many instructions it takes."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import pytest
from machinelab import PATHS, asm

from vmlab import strategies
from vmlab.errors import UnsupportedByStrategy
from vmlab.guests import files
from vmlab.machine.pc import Machine
from vmlab.parameters import Value
from vmlab.strategies.base import Strategy

TECHNIQUES: list[tuple[str, dict[str, Value]]] = [
    ("hardware-assisted", {"memory": "nested"}), ("hardware-assisted", {"memory": "lazy"}), ("trap-and-emulate", {"sensitive": "silent"}),
    ("trap-and-emulate", {"sensitive": "trap", "memory": "lazy"}), ("binary-translation", {}), ("binary-translation", {"memory": "lazy"})]
SECTOR, RESULTS, GDT = 0x7C00, 0x600, 0x7D80
CODE32, DATA32, CODE16, DATA16 = 8, 16, 24, 32
END = "mov dx, 0xf4; out dx, eax; hlt"
_GDT = struct.pack("<5QHI", 0, 0x00CF9A000000FFFF, 0x00CF92000000FFFF, 0x00009A000000FFFF, 0x000092000000FFFF, 39, GDT)
LOAD_GDT = f"lgdt [{GDT + 40}]"
#: Code by address, and of how many bits it is.
Parts = Mapping[int, tuple[str, int]]


def start(parts: Parts, technique: str, parameters: Mapping[str, Value], path: str = "portable") -> Strategy:
    """The guest: a boot sector whose parts lie where they are said to, and a GDT of flat 32-bit and of 16-bit segments."""
    code = bytearray(512)
    for at, (source, bits) in {**parts, GDT: ("", 0)}.items():
        piece = asm(source, at, bits) if source else _GDT
        where = slice(at - SECTOR, at - SECTOR + len(piece))
        assert not any(code[where]), hex(at)
        code[where] = piece
    guest = files.parse("disk.img", bytes(code[:510]) + b"\x55\xaa")
    strategy = strategies.load(technique)(Machine(path=path, drives=guest.drives), parameters)
    strategy.load(guest, "")
    return strategy


def outcome(strategy: Strategy) -> tuple[object, ...]:
    stop = strategy.run(200_000)
    found = strategy.snapshot()
    return stop.reason, stop.exit_code, bytes(strategy.machine.console), strategy.read_guest(RESULTS, 0x100).hex(), found.user + found.kernel


#: Stacks, segments, far transfers, INT n through the vector table, string instructions, flags, and what only protected mode has (#UD).
REAL: Parts = {
    SECTOR: (f"""
        xor ax, ax; mov ds, ax; mov ax, 0x50; mov es, ax; mov ax, 0x200; mov ss, ax; mov sp, 0x400
        mov word ptr [0x180], 0x7c90; mov word ptr [0x182], 0; mov word ptr [0x18], 0x7cc8; mov word ptr [0x1a], 0
        mov di, 0x180; mov cx, 8; mov al, 0x5a; cld; rep stosb
        mov si, 0x7c00; mov cx, 4; rep movsw
        push es; .byte 0x0f, 0xa1; pushf; pop word ptr [{RESULTS + 0x20}]
        stc; int 0x60; pushf; pop word ptr [{RESULTS + 0x22}]
        .byte 0x9a, 0xb0, 0x6c, 0, 1
        jmp 0x7ce0
        """, 16),
    0x7C90: (f"mov word ptr [{RESULTS + 0x40}], sp; clc; iret", 16),
    0x7CB0: (f"mov word ptr [{RESULTS + 0x44}], cs; inc word ptr [{RESULTS + 0x46}]; .byte 0xcb", 16),
    0x7CC8: (f"pop ax; add ax, 3; push ax; inc word ptr [{RESULTS + 0x48}]; iret", 16),
    0x7CE0: (f"""
        mov word ptr [{RESULTS + 0x24}], fs; mov word ptr [{RESULTS + 0x26}], sp; mov word ptr [{RESULTS + 0x28}], ss
        sidt [{RESULTS + 0x30}]; smsw word ptr [{RESULTS + 0x38}]
        lds bx, [{RESULTS + 0x20}]; mov ax, ds; xor cx, cx; mov ds, cx; mov word ptr [{RESULTS + 0x3a}], ax; mov word ptr [{RESULTS + 0x3c}], bx
        .byte 0x0f, 0x00, 0xd0
        mov eax, 0x77; {END}
        """, 16),
}
#: The timer's interrupt, waited for in HLT; vector 8 is the 8259's after a PC's firmware has set it up: the test does it by itself.
TICKS: Parts = {
    SECTOR: ("""
        cli; xor ax, ax; mov ds, ax; mov ss, ax; mov sp, 0x7c00; mov word ptr [0x80], 0x7ca0; mov word ptr [0x82], 0
        mov al, 0x11; out 0x20, al; mov al, 0x20; out 0x21, al; mov al, 4; out 0x21, al; mov al, 1; out 0x21, al; mov al, 0xfe; out 0x21, al
        mov al, 0x34; out 0x43, al; mov al, 0; out 0x40, al; mov al, 1; out 0x40, al
        xor bx, bx; again: sti; hlt; cmp bx, 3; jb again
        movzx eax, bx; """ + END, 16),
    0x7CA0: ("inc bx; mov al, 0x20; out 0x20, al; iret", 16),
}
#: Into protected mode, a character from there, back into real mode, another character, and into protected mode once more.
THERE_AND_BACK: Parts = {
    SECTOR: (f"""
        cli; xor ax, ax; mov ds, ax; mov ss, ax; mov sp, 0x7c00; {LOAD_GDT}
        mov eax, cr0; or al, 1; mov cr0, eax; .byte 0xea, 0x40, 0x7c, {CODE32}, 0""", 16),
    0x7C40: (f"""
        mov eax, {DATA32}; mov ds, eax; mov es, eax; mov ss, eax; mov fs, eax; mov gs, eax
        mov dx, 0x3f8; mov al, 0x50; out dx, al; push 0x11223344; pop dword ptr [{RESULTS}]; sgdt [{RESULTS + 8}]
        cmp dword ptr [{RESULTS + 16}], 1; je done; inc dword ptr [{RESULTS + 16}]; .byte 0xea; .long 0x7cb0; .word {CODE16}
        done: mov eax, 7; {END}""", 32),
    0x7CB0: (f"""
        mov ax, {DATA16}; mov ds, ax; mov es, ax; mov ss, ax; mov fs, ax; mov gs, ax
        mov eax, cr0; and al, 0xfe; mov cr0, eax; .byte 0xea, 0xe0, 0x7c, 0, 0""", 16),
    0x7CE0: (f"""
        xor ax, ax; mov ds, ax; mov es, ax; mov ss, ax; mov sp, 0x7c00
        mov dx, 0x3f8; mov al, 0x52; out dx, al; pushf; pop word ptr [{RESULTS + 0x20}]
        mov eax, cr0; or al, 1; mov cr0, eax; .byte 0xea, 0x40, 0x7c, {CODE32}, 0""", 16),
}


@pytest.mark.parametrize(("technique", "parameters"), TECHNIQUES)
@pytest.mark.parametrize("parts", [REAL, THERE_AND_BACK], ids=["real", "there-and-back"])
def test_as_on_the_bare_machine(parts: Parts, technique: str, parameters: dict[str, Value]) -> None:
    native = outcome(start(parts, "native", {}))
    assert native[1] == (0x77 if parts is REAL else 7)
    # SGDT in protected mode shows the VMM's table where it does not trap: a finding of the technique.
    told = parts is THERE_AND_BACK and parameters.get("sensitive") == "silent"
    assert (outcome(start(parts, technique, parameters)) != native) == told


def test_what_the_bare_machine_leaves() -> None:
    """The oracle's own answers, by hand: SDM Vol. 3A §20.1."""
    strategy = start(REAL, "native", {})
    strategy.run(10_000)

    def word(at: int) -> int:
        return int.from_bytes(strategy.read_guest(RESULTS + at, 2), "little")

    assert strategy.read_guest(RESULTS + 0x40, 2) == (0x400 - 6).to_bytes(2, "little")     # SP in the INT's handler
    assert (word(0x44), word(0x46)) == (0x100, 1)                                         # CS of the far procedure
    assert word(0x48) == 1                                                                # one #UD, of LLDT
    assert word(0x22) & 1 == 1                                                            # IRET brought the carry back
    assert (word(0x24), word(0x26), word(0x28)) == (0x50, 0x400, 0x200)
    assert strategy.read_guest(RESULTS + 0x80, 0x10) == b"Z" * 8 + asm(REAL[SECTOR][0], SECTOR, 16)[:8]
    assert word(0x30) == 0x3FF                                                            # the vector table's limit


@pytest.mark.parametrize(("technique", "parameters"), TECHNIQUES)
@pytest.mark.parametrize("path", PATHS)
def test_interrupts_come_and_hlt_waits_for_them(path: str, technique: str, parameters: dict[str, Value]) -> None:
    found = outcome(start(TICKS, technique, parameters, path))
    assert found[1] == 3


@pytest.mark.parametrize("technique", ["trap-and-emulate", "binary-translation"])
def test_what_was_interpreted_is_counted_as_the_vmms(technique: str) -> None:
    strategy = start(REAL, technique, {})
    strategy.run(10_000)
    found = strategy.snapshot()
    assert found.events["emulated.kernel"] == found.kernel + found.user
    assert not found.events.get("retired.kernel")


@pytest.mark.parametrize("technique", ["trap-and-emulate", "binary-translation"])
def test_both_ways_into_the_machine_count_alike(technique: str) -> None:
    ledgers = []
    for path in PATHS:
        strategy = start(THERE_AND_BACK, technique, {}, path)
        strategy.run(10_000)
        ledgers.append(strategy.snapshot().events)
    assert all(ledger == ledgers[0] for ledger in ledgers)


@pytest.mark.parametrize("technique", ["trap-and-emulate", "binary-translation"])
def test_long_mode_straight_from_16_bit_code_is_refused_in_words(technique: str) -> None:
    """CR0.PE and PG at once, from real mode, with EFER.LME and CR4.PAE on."""
    parts = {SECTOR: ("""
        xor ax, ax; mov ds, ax; mov dword ptr [0x1000], 0x2003; mov dword ptr [0x2000], 0x83; mov eax, 0x1000; mov cr3, eax
        mov eax, 0x20; mov cr4, eax; mov ecx, 0xc0000080; mov eax, 0x100; xor edx, edx; wrmsr
        mov eax, 0x80000011; mov cr0, eax; hlt""", 16)}
    with pytest.raises(UnsupportedByStrategy, match="long mode from 16-bit code"):
        start(parts, technique, {}).run(10_000)
