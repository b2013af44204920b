"""Code that changes under its address: other spaces, other modes, other bytes; counts against counts made by hand, on every path."""

from __future__ import annotations

import struct

import pytest
from machinelab import CODE, PAGES, PATHS, SPARE, Bench
from test_machine_counts import finish, irets, kernel_counts

from vmlab.machine.state import RAX, RBX

pytestmark = pytest.mark.parametrize("path", PATHS)

WINDOW = 0x400000                       # a page that each test maps as it likes
FIRST, SECOND = 0x60000, 0x61000        # page frames


def spaces(bench: Bench, *windows: tuple[int, ...]) -> tuple[int, ...]:
    """CR3 of address spaces that map low memory one to one, and behind it the frames given, from WINDOW on."""
    ram = bench.machine.ram
    low = PAGES + 0x8000
    for page in range(1024):
        ram.write32(low + 4 * page, page << 12 | 3)
    roots = []
    for i, frames in enumerate(windows):
        root, table = PAGES + 0x2000 * i, PAGES + 0x2000 * i + 0x1000
        ram.write32(root, low | 3)
        ram.write32(root + 4, table | 3)
        for page, frame in enumerate(frames):
            ram.write32(table + 4 * page, frame | 3)
        roots.append(root)
    return tuple(roots)


def paging_on() -> str:
    """Five instructions."""
    return f"mov eax, {PAGES:#x}; mov cr3, eax; mov eax, cr0; or eax, 0x80000000; mov cr0, eax;"


@pytest.mark.parametrize("first", [b"\x40\xc3", b"\xec\xc3"], ids=["inc", "in"])
def test_two_spaces_with_other_code_at_the_same_address(path: str, first: bytes) -> None:
    # 5 + mov ecx; 5 × (mov, mov cr3, call, [inc or in], ret, mov, mov cr3, call, [cli], ret, dec, jnz); hlt: 6 + 60 + 1 = 67.
    bench = Bench(paging_on() + f"mov ecx, 5; l: mov ebx, {PAGES:#x}; mov cr3, ebx; call {WINDOW:#x}; mov ebx, {PAGES + 0x2000:#x}; mov cr3, ebx;"
                  f"call {WINDOW:#x}; dec ecx; jnz l; hlt", path=path)
    assert spaces(bench, (FIRST,), (SECOND,)) == (PAGES, PAGES + 0x2000)
    bench.machine.ram.write(FIRST, first)
    bench.machine.ram.write(SECOND, b"\xfa\xc3")
    port = first[0] == 0xEC
    expected = kernel_counts(67, machine__alu=2 + 1 + 5 * (2 + 1 + (not port)) + 1, machine__mov_to_cr=2 + 10, retired__mov_to_cr=12,
                             machine__mov_from_cr=1, retired__mov_from_cr=1, machine__branch=10 + 4, machine__indirect=10,
                             machine__cli=5, retired__cli=5, **({"machine__in": 5, "retired__in": 5, "io__device": 5} if port else {}))
    assert finish(bench) == expected
    records = list(bench.machine.counter._all_blocks())
    assert sum(block.pc == WINDOW for block in records) == 2, "one for each of the two, however often they change"


def test_a_space_that_is_changed_by_invlpg(path: str) -> None:
    # 5 + mov ecx; 4 × (call, byte, ret, xor [pte], invlpg, dec, jnz); hlt: 6 + 28 + 1 = 35. The byte: inc, cli, inc, cli.
    entry = PAGES + 0x1000
    bench = Bench(paging_on() + f"mov ecx, 4; l: call {WINDOW:#x}; xor dword ptr [{entry:#x}], 0x1000; invlpg [{WINDOW:#x}];"
                  "dec ecx; jnz l; hlt", path=path)
    spaces(bench, (FIRST,))
    bench.machine.ram.write(FIRST, b"\x40\xc3")
    bench.machine.ram.write(SECOND, b"\xfa\xc3")
    expected = kernel_counts(35, machine__alu=2 + 1 + 2 + 4 + 1, machine__mov_to_cr=2, retired__mov_to_cr=2, machine__mov_from_cr=1,
                             retired__mov_from_cr=1, machine__branch=4 + 3, machine__indirect=4, machine__store=4, machine__invlpg=4,
                             retired__invlpg=4, machine__cli=2, retired__cli=2)
    assert finish(bench) == expected


def test_one_frame_at_two_addresses_and_patched_through_the_other(path: str) -> None:
    # 5 + (call, inc, ret) × 2, mov [alias], (call, cli, ret) × 2, hlt: 5 + 6 + 1 + 6 + 1 = 19.
    call = f"call {WINDOW:#x}; call {WINDOW + 0x1000:#x};"
    bench = Bench(paging_on() + call + f"mov byte ptr [{WINDOW + 0x1000:#x}], 0xfa;" + call + "hlt", path=path)
    spaces(bench, (FIRST, FIRST))
    bench.machine.ram.write(FIRST, b"\x40\xc3")
    expected = kernel_counts(19, machine__alu=2 + 2, machine__mov_to_cr=2, retired__mov_to_cr=2, machine__mov_from_cr=1,
                             retired__mov_from_cr=1, machine__branch=4, machine__indirect=4, machine__store=1, machine__cli=2, retired__cli=2)
    assert finish(bench) == expected


def test_a_block_over_two_pages_whose_second_one_changes(path: str) -> None:
    # 5 + mov ecx; 2 × (call, mov eax over the edge, [cli or inc], ret, mov, mov cr3, dec, jnz); hlt: 6 + 16 + 1 = 23.
    at = WINDOW + 0xFFE
    bench = Bench(paging_on() + f"mov ecx, 2; l: call {at:#x}; mov ebx, {PAGES + 0x2000:#x}; mov cr3, ebx; dec ecx; jnz l; hlt", path=path)
    spaces(bench, (FIRST, FIRST + 0x2000), (FIRST, SECOND + 0x2000))
    bench.machine.ram.write(FIRST + 0xFFE, b"\xb8\x01")
    bench.machine.ram.write(FIRST + 0x2000, b"\x00\x00\x00\xfa\xc3")
    bench.machine.ram.write(SECOND + 0x2000, b"\x02\x00\x00\x40\xc3")
    expected = kernel_counts(23, machine__alu=2 + 1 + 2 * (1 + 1 + 1) + 1 + 1, machine__mov_to_cr=4, retired__mov_to_cr=4,
                             machine__mov_from_cr=1, retired__mov_from_cr=1, machine__branch=2 + 1, machine__indirect=2,
                             machine__cli=1, retired__cli=1)
    assert finish(bench) == expected
    assert bench.cpu.gpr(RAX) == 0x201 + 1


def test_the_same_bytes_as_16_and_as_32_bit_code(path: str) -> None:
    """The handler of INT 0x30 goes on with what EBX and the stack say: 32, 16, 32, 16 bits."""
    # inc; mov eax, imm32; int: 3 | inc; mov ax, imm16; nop; nop; int: 5.
    f = CODE + 0x1000
    bench = Bench(f"mov ebx, 4; jmp {f:#x}; done: hlt",
                  {0x30: f"add esp, 12; dec ebx; jz done; test bl, 1; jz even; push {SPARE:#x}; push 0; retf; even: jmp {f:#x}; done: hlt"},
                  spare=(0xFFFF | (f & 0xFFFFFF) << 16 | 0x9B << 40), path=path)
    bench.machine.ram.write(f, b"\x40\xb8\x00\x00\x90\x90\xcd\x30")
    # 32 bits: EBX 4 and 2, 16 bits: 3 and 1. mov, jmp; 2 × 3 + 2 × 5; handler: EBX → 3: add, dec, jz, test, jz, push, push, retf: 8 (twice);
    # → 2: add, dec, jz, test, jz (taken), jmp: 6; → 0: add, dec, jz (taken), hlt: 4. 2 + 16 + 22 + 4 = 44.
    expected = kernel_counts(44, machine__alu=1 + 2 * 2 + 2 * 4 + 2 * (2 + 1 + 1 + 1) + (2 + 1 + 1) + 2, machine__branch=1 + 2 + 1,
                             machine__ret_far=2, retired__ret_far=2, machine__store=4, machine__int=4, retired__int=4, interrupt__software=4)
    assert finish(bench) == expected
    assert bench.cpu.gpr(RBX) == 0


def test_what_does_not_decode_at_the_end_of_a_block(path: str) -> None:
    # inc; an opcode that does not exist; the handler steps over it: add dword ptr [esp], 2; iret; hlt. 1 + 2 + 1 = 4.
    bench = Bench(b"\x40\x0f\xff\xf4", {6: "add dword ptr [esp], 2; iretd"}, path=path)
    assert finish(bench) == kernel_counts(4, machine__alu=1, machine__store=1, **irets(same=1), fault__delivered__6=1)


def test_fifteen_bytes_are_an_instruction_and_sixteen_are_a_fault(path: str) -> None:
    # 14 prefixes and NOP; 15 prefixes and NOP: #GP, whose handler ends it.
    bench = Bench(b"\x66" * 14 + b"\x90" + b"\x66" * 15 + b"\x90", {13: "hlt"}, path=path)
    assert finish(bench) == kernel_counts(2, machine__alu=1, fault__delivered__13=1)


def test_code_overwritten_in_place_by_its_host(path: str) -> None:
    bench = Bench("nop; inc eax; hlt", path=path)
    assert finish(bench) == kernel_counts(3, machine__alu=2)
    bench.machine.ram.write(CODE, struct.pack("<3B", 0xFA, 0x90, 0xF4))
    bench.machine.forget_code(CODE, CODE + 3)
    bench.cpu.load()
    bench.cpu.rip = CODE
    bench.cpu.store()
    assert finish(bench) == {**kernel_counts(6, machine__alu=3, machine__cli=1, retired__cli=1), "machine.hlt": 2, "retired.hlt": 2, "idle": 2}


def test_a_port_instruction_in_one_space_only_inside_another_block(path: str) -> None:
    """The two blocks have different keys, so that only the hook of IN tells that they are in each other's way."""
    # 5 + mov ecx; 4 × (mov, mov cr3, call, nop, in, ret, mov, mov cr3, call, cli, ret, dec, jnz); hlt: 6 + 52 + 1 = 59.
    bench = Bench(paging_on() + f"mov ecx, 4; l: mov ebx, {PAGES:#x}; mov cr3, ebx; call {WINDOW:#x}; mov ebx, {PAGES + 0x2000:#x}; mov cr3, ebx;"
                  f"call {WINDOW + 1:#x}; dec ecx; jnz l; hlt", path=path)
    spaces(bench, (FIRST,), (SECOND,))
    bench.machine.ram.write(FIRST, b"\x90\xec\xc3")
    bench.machine.ram.write(SECOND, b"\x90\xfa\xc3")
    expected = kernel_counts(59, machine__alu=2 + 1 + 4 * 4 + 1, machine__mov_to_cr=2 + 8, retired__mov_to_cr=10, machine__mov_from_cr=1,
                             retired__mov_from_cr=1, machine__branch=8 + 3, machine__indirect=8, machine__cli=4, retired__cli=4,
                             machine__in=4, retired__in=4, io__device=4)
    assert finish(bench) == expected


def test_the_same_code_in_two_frames_until_one_is_written(path: str) -> None:
    # 5; call, inc, ret; mov, mov cr3, call, inc, ret; mov [m]; call, cli, ret; mov, mov cr3, call, inc, ret; mov, mov cr3, call, cli, ret; hlt: 28.
    call, first, second = f"call {WINDOW:#x};", f"mov ebx, {PAGES:#x}; mov cr3, ebx;", f"mov ebx, {PAGES + 0x2000:#x}; mov cr3, ebx;"
    bench = Bench(paging_on() + call + second + call + f"mov byte ptr [{WINDOW:#x}], 0xfa;" + call + first + call + second + call + "hlt", path=path)
    spaces(bench, (FIRST,), (SECOND,))
    for frame in (FIRST, SECOND):
        bench.machine.ram.write(frame, b"\x40\xc3")
    expected = kernel_counts(28, machine__alu=2 + 1 + 2 + 2 + 1, machine__mov_to_cr=2 + 3, retired__mov_to_cr=5, machine__mov_from_cr=1,
                             retired__mov_from_cr=1, machine__branch=5, machine__indirect=5, machine__store=1, machine__cli=2, retired__cli=2)
    assert finish(bench) == expected


def test_code_overwritten_in_place_is_no_matter_of_address_spaces(path: str) -> None:
    # mov ecx; 4 × (call, byte, ret, xor [f], dec, jnz); hlt: 26. The byte: inc (0x40), cli (0xFA) and again.
    f = CODE + 0x1000
    bench = Bench(f"mov ecx, 4; l: call {f:#x}; xor byte ptr [{f:#x}], 0xba; dec ecx; jnz l; hlt", path=path)
    bench.machine.ram.write(f, b"\x40\xc3")
    expected = kernel_counts(26, machine__alu=1 + 2 + 4 + 1, machine__branch=4 + 3, machine__indirect=4, machine__store=4,
                             machine__cli=2, retired__cli=2)
    assert finish(bench) == expected
    assert not bench.machine.blocks._ambiguous
