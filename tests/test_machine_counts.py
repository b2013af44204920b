"""Counts of the machine against counts made by hand, whole dictionaries at a time, on every counting path.

Each program's hand count stands in its comment. The rules: an instruction counts once, when it retires; one that
faults does not; one under REP counts once, on completion, and its elements as ``machine.string``; a jump is a
``branch`` when taken, else ``alu``; the class of an instruction with a memory operand is ``store`` if it writes
it, else ``load``.
"""

from __future__ import annotations

import pytest
from machinelab import CODE, CODE3, DATA, DATA3, PAGES, PATHS, STACK3, USER, USER_CODE, USER_DATA, Bench, asm

from vmlab.errors import GuestBudget
from vmlab.machine.pc import StopReason
from vmlab.machine.state import RAX, RBP, RCX, RDI

pytestmark = pytest.mark.parametrize("path", PATHS)


def counted(bench: Bench) -> dict[str, int]:
    """All events, and the guest's instructions by privilege under "user" and "kernel"; zero counts left out."""
    counts = bench.counts()
    assert counts.machine == counts.user + counts.kernel, "on the bare machine the guest is all there is"
    return {k: n for k, n in {**counts.events, "user": counts.user, "kernel": counts.kernel}.items() if n}


def kernel_counts(n: int, **more: int) -> dict[str, int]:
    """``n`` kernel instructions, and HLT, the last of each program here, once."""
    return {"kernel": n, "retired.kernel": n, "machine.hlt": 1, "retired.hlt": 1, "idle": 1,
            **{k.replace("__", "."): v for k, v in more.items()}}


def irets(same: int = 0, outer: int = 0) -> dict[str, int]:
    """IRETs by where they went; a ring changes at those in ``outer``."""
    found = {"machine.iret": same + outer, "retired.iret": same + outer, "iret.same": same, "iret.outer": outer}
    return {k: n for k, n in found.items() if n}


def finish(bench: Bench) -> dict[str, int]:
    assert bench.run().reason is StopReason.HALTED
    return counted(bench)


def test_jumps_taken_and_not(path: str) -> None:
    # mov; 3 × (dec, jnz), 2 jnz taken; hlt: 8. alu = mov + 3 dec + 1 jnz not taken.
    assert finish(Bench("mov ecx, 3; l: dec ecx; jnz l; hlt", path=path)) == kernel_counts(8, machine__alu=5, machine__branch=2)


def test_loop_and_jecxz(path: str) -> None:
    # mov; 4 loops (3 taken); jecxz taken (ECX is 0), over inc; hlt: 7. alu = mov + last loop.
    bench = Bench("mov ecx, 4; l: loop l; jecxz out; inc eax; out: hlt", path=path)
    assert finish(bench) == kernel_counts(7, machine__alu=2, machine__branch=4)


def test_a_jump_to_the_next_instruction_is_not_told_from_one_not_taken(path: str) -> None:
    # jmp $+2 counts as a branch (it is unconditional); jz $+2 counts as alu, taken or not: a listed limit of counting by blocks.
    bench = Bench("jmp a; a: xor eax, eax; jz b; b: hlt", path=path)
    assert finish(bench) == kernel_counts(4, machine__alu=2, machine__branch=1)


def test_calls_returns_and_indirect_jumps(path: str) -> None:
    # call (branch), ret (indirect), mov (alu), jmp eax (indirect), hlt: 5.
    bench = Bench(f"call f; mov eax, {CODE + 0x20:#x}; jmp eax; f: ret", path=path)
    bench.machine.ram.write(CODE + 0x20, b"\xf4")
    assert finish(bench) == kernel_counts(5, machine__alu=1, machine__branch=1, machine__indirect=2)


def test_classes_of_memory_instructions(path: str) -> None:
    # push, mov [m], eax, add [m], 1: store. pop, mov eax, [m], add eax, [m]: load. lea: alu. mul, div: muldiv. hlt.
    text = (f"push eax; mov [{DATA:#x}], eax; add dword ptr [{DATA:#x}], 1; pop eax; mov eax, [{DATA:#x}]; add eax, [{DATA:#x}];"
            "lea ebx, [eax + 4]; mul ebx; mov ebx, 3; div ebx; hlt")
    assert finish(Bench(text, path=path)) == kernel_counts(11, machine__store=3, machine__load=3, machine__alu=2, machine__muldiv=2)


@pytest.mark.parametrize("elements", [0, 1, 7])
@pytest.mark.parametrize("instruction", ["rep movsb", "rep stosd"])
def test_rep_counts_once_and_its_elements_apart(path: str, instruction: str, elements: int) -> None:
    # mov, mov, mov, rep (alu, once, even with ECX = 0), hlt: 5; elements as often as ECX says.
    bench = Bench(f"mov ecx, {elements}; mov esi, {DATA:#x}; mov edi, {DATA + 0x100:#x}; {instruction}; hlt", path=path)
    expected = kernel_counts(5, machine__alu=4)
    if elements:
        expected["machine.string"] = elements
    assert finish(bench) == expected
    assert bench.cpu.gpr(RCX) == 0
    assert bench.cpu.gpr(RDI) == DATA + 0x100 + elements * (4 if "d" in instruction[-1] else 1)


def test_a_string_instruction_without_rep_moves_one_element(path: str) -> None:
    # 2 mov, movsd, lodsb, hlt: 5.
    bench = Bench(f"mov esi, {DATA:#x}; mov edi, {DATA:#x}; .byte 0xa5; lodsb; hlt", path=path)
    assert finish(bench) == kernel_counts(5, machine__alu=4, machine__string=2)


@pytest.mark.parametrize(("where", "elements"), [(0, 1), (3, 4), (9, 10), (None, 10)])
def test_repne_scasb_ends_where_it_finds(path: str, where: int | None, elements: int) -> None:
    # 3 mov, repne scasb, hlt: 5. It looks at the bytes up to and with the one found, or at all 10.
    bench = Bench(f"mov al, 0x55; mov ecx, 10; mov edi, {DATA:#x}; repne scasb; hlt", path=path)
    if where is not None:
        bench.machine.ram.write(DATA + where, b"\x55")
    assert finish(bench) == kernel_counts(5, machine__alu=4, machine__string=elements)
    assert bench.cpu.gpr(RCX) == 10 - elements


def test_two_reps_in_a_row_are_two_instructions(path: str) -> None:
    # 2 mov, rep stosb (3), mov, rep stosb (2), hlt: 6.
    bench = Bench(f"mov edi, {DATA:#x}; mov ecx, 3; rep stosb; mov ecx, 2; rep stosb; hlt", path=path)
    assert finish(bench) == kernel_counts(6, machine__alu=5, machine__string=5)


def test_rep_in_a_loop_starts_anew_each_time(path: str) -> None:
    # mov edx; 3 × (mov, mov, rep stosb of 1, dec, jnz) with 2 taken; hlt: 17. alu = 1 + 3·4 + 1 jnz not taken.
    bench = Bench(f"mov edx, 3; l: mov edi, {DATA:#x}; mov ecx, 1; rep stosb; dec edx; jnz l; hlt", path=path)
    assert finish(bench) == kernel_counts(17, machine__alu=14, machine__branch=2, machine__string=3)


def test_rep_that_jumps_back_to_itself(path: str) -> None:
    # The block that ends in REP is left for itself: mov; 2 × (inc ecx, rep stosb, dec, jnz), 1 taken... EDX = 2; hlt: 2 + 8 + 1.
    bench = Bench(f"mov edx, 2; mov edi, {DATA:#x}; l: inc ecx; rep stosb; dec edx; jnz l; hlt", path=path)
    assert finish(bench) == kernel_counts(11, machine__alu=9, machine__branch=1, machine__string=2)


# ---- faults
def test_a_faulting_instruction_does_not_count(path: str) -> None:
    # mov, [ud2], handler: add (a store, skips it), iret; inc, hlt: 5.
    bench = Bench("mov eax, 1; .byte 0x0f, 0x0b; inc eax; hlt", {6: "add dword ptr [esp], 2; iretd"}, path=path)
    assert finish(bench) == kernel_counts(5, machine__alu=2, machine__store=1, **irets(same=1), fault__delivered__6=1)


def test_a_fault_with_an_error_code(path: str) -> None:
    # mov, [mov ds: #GP 0x1230], handler: mov, pop, add, iret; hlt: 6. MOV to DS never retires.
    handler = f"mov eax, [esp]; mov [{DATA:#x}], eax; add esp, 4; add dword ptr [esp], 2; iretd"
    bench = Bench("mov eax, 0x1234; mov ds, eax; hlt", {13: handler}, path=path)
    expected = kernel_counts(7, machine__alu=2, machine__load=1, machine__store=2, **irets(same=1), fault__delivered__13=1)
    assert finish(bench) == expected
    assert bench.read32(DATA) == 0x1234


def test_a_divide_fault_that_is_repaired_runs_again(path: str) -> None:
    # xor, mov, mov, [div], handler: mov ecx, iret; div, hlt: 7.
    bench = Bench("xor edx, edx; mov eax, 6; xor ecx, ecx; div ecx; hlt", {0: "mov ecx, 2; iretd"}, path=path)
    expected = kernel_counts(7, machine__alu=4, machine__muldiv=1, **irets(same=1), fault__delivered__0=1)
    assert finish(bench) == expected
    assert bench.cpu.gpr(RAX) == 3


def test_a_fault_in_the_middle_of_a_block_in_a_loop(path: str) -> None:
    # mov esi, 3; 3 × (inc, [ud2], handler add + iret, inc, dec, jnz), 2 taken; hlt: 1 + 3·6 + 1 = 20.
    bench = Bench("mov esi, 3; l: inc eax; .byte 0x0f, 0x0b; inc ebx; dec esi; jnz l; hlt",
                  {6: "add dword ptr [esp], 2; iretd"}, path=path)
    assert finish(bench) == kernel_counts(20, machine__alu=11, machine__branch=2, machine__store=3, **irets(same=3), fault__delivered__6=3)


# ---- software interrupts
def test_int_n_counts_as_an_instruction(path: str) -> None:
    # mov, int, handler: inc, iret; hlt: 5.
    bench = Bench("mov eax, 1; int 0x80; hlt", {0x80: "inc eax; iretd"}, path=path)
    assert finish(bench) == kernel_counts(5, machine__alu=2, machine__int=1, retired__int=1, **irets(same=1),
                                          interrupt__software=1)


def test_int3_and_into(path: str) -> None:
    # int3, iret; mov, add (sets OF), into, iret; xor (clears OF), into not taken; hlt: 9.
    bench = Bench("int3; mov eax, 0x7fffffff; add eax, 1; into; xor eax, eax; into; hlt", {3: "iretd", 4: "iretd"}, path=path)
    assert finish(bench) == kernel_counts(9, machine__alu=3, machine__int3=1, retired__int3=1, machine__into=2, retired__into=2,
                                          **irets(same=2), interrupt__software=2)


def test_int_n_through_a_closed_gate_is_a_general_protection_fault(path: str) -> None:
    # Ring 3: mov, [int 0x40: gate DPL 0 → #GP(0x40·8 + 2)]; kernel handler: mov, mov, hlt. 1 user, 3 kernel.
    bench = Bench("hlt", {0x40: "hlt", 13: f"mov eax, [esp]; mov [{DATA:#x}], eax; hlt"}, user="mov eax, 1; int 0x40", path=path)
    bench.user_mode()
    expected = kernel_counts(3, machine__alu=1, machine__load=1, machine__store=1, fault__delivered__13=1)
    assert finish(bench) == {**expected, "user": 1, "retired.user": 1}
    assert bench.read32(DATA) == 0x40 * 8 + 2
    assert bench.stack(2)[1] == USER + 5, "the fault points at INT, not past it"


def test_int_n_from_user_mode_and_back(path: str) -> None:
    # Kernel: 5 pushes, iret. User: mov, int; kernel handler inc, iret; user: inc, int 0x81; kernel hlt.
    # kernel: 5 + 1 + 2 + 1 = 9, user: 2 + 2 = 4.
    bench = Bench(f"push {USER_DATA}; push {STACK3:#x}; push 2; push {USER_CODE}; push {USER:#x}; iretd",
                  {0x80: ("inc eax; iretd", 3), 0x81: ("hlt", 3)}, user="mov eax, 5; int 0x80; inc eax; int 0x81", path=path)
    expected = kernel_counts(9, machine__store=5, machine__alu=3, **irets(outer=2), machine__int=2, retired__int=2,
                             interrupt__software=2)
    assert finish(bench) == {**expected, "user": 4, "retired.user": 4}
    assert bench.cpu.gpr(RAX) == 7


def test_user_and_kernel_runs_of_the_same_code_are_told_apart(path: str) -> None:
    # The user calls a routine that the kernel called before. Kernel: call, inc, ret, 5 push, iret, [int] hlt = 10; user: call, inc, ret, int = 4.
    bench = Bench(f"call f; push {USER_DATA}; push {STACK3:#x}; push 2; push {USER_CODE}; push {USER:#x}; iretd; .align 64; f: inc eax; ret",
                  {0x81: ("hlt", 3)}, user=f"call {CODE + 64:#x}; int 0x81", path=path)
    bench.machine.ram.write(CODE + 64, asm("inc eax; ret"))
    expected = kernel_counts(10, machine__store=5, machine__alu=2, machine__branch=2, machine__indirect=2, **irets(outer=1),
                             machine__int=1, retired__int=1, interrupt__software=1)
    assert finish(bench) == {**expected, "user": 4, "retired.user": 4}


def test_a_far_return_changes_the_ring_that_is_counted(path: str) -> None:
    # Kernel: 4 pushes, retf; user: inc, int; kernel: hlt.
    bench = Bench(f"push {USER_DATA}; push {STACK3:#x}; push {USER_CODE}; push {USER:#x}; retf",
                  {0x81: ("hlt", 3)}, user="inc eax; int 0x81", path=path)
    expected = kernel_counts(6, machine__store=4, machine__alu=1, machine__ret_far=1, retired__ret_far=1, machine__int=1,
                             retired__int=1, interrupt__software=1)
    assert finish(bench) == {**expected, "user": 2, "retired.user": 2}


def test_a_privileged_instruction_in_user_mode_faults_and_does_not_count(path: str) -> None:
    # User: mov, [cli]; kernel: hlt.
    bench = Bench("hlt", {13: "hlt"}, user="mov eax, 1; cli", path=path)
    bench.user_mode()
    assert finish(bench) == {**kernel_counts(1, machine__alu=1, fault__delivered__13=1), "user": 1, "retired.user": 1}


# ---- device interrupts
UNMASKED = "mov al, 0x11; out 0x20, al; mov al, 0x20; out 0x21, al; mov al, 4; out 0x21, al; mov al, 1; out 0x21, al; mov al, 0; out 0x21, al;"
END_OF_INTERRUPT = "mov al, 0x20; out 0x20, al;"


def test_hlt_woken_by_an_interrupt(path: str) -> None:
    # 10 of UNMASKED; sti, hlt; handler: mov, out, iret; cli, hlt: 17. OUT to the PIC is a device access.
    bench = Bench(UNMASKED + "sti; hlt; cli; hlt", {0x24: END_OF_INTERRUPT + "iretd"}, path=path)
    woken = Bench.handler(0x24)
    bench.machine.watch(CODE + 20, lambda _: bench.machine.pic.set_line(4, True))  # at STI: initialization forgets edges
    bench.machine.watch(woken, lambda _: bench.machine.pic.set_line(4, False))
    expected = kernel_counts(17, machine__alu=6, machine__out=6, retired__out=6, io__device=6, machine__sti=1, retired__sti=1,
                             machine__cli=1, retired__cli=1, **irets(same=1), interrupt__delivered=1)
    expected |= {"machine.hlt": 2, "retired.hlt": 2, "idle": 2}
    assert finish(bench) == expected


def test_rep_interrupted_by_a_device_still_counts_once(path: str) -> None:
    # 10 of UNMASKED; 2 mov, sti, rep stosb; handler mov, out, iret; cli, hlt: 19; 20 elements though it was broken off in between.
    bench = Bench(UNMASKED + f"mov edi, {DATA:#x}; mov ecx, 20; sti; nop; rep stosb; cli; hlt", {0x24: END_OF_INTERRUPT + "iretd"}, path=path)
    machine = bench.machine
    seen: list[int] = []

    def on_store(*_: object) -> None:
        bench.cpu.load()
        if not seen:
            machine.pic.set_line(4, True)
        seen.append(1)
        if len(seen) == 5:
            machine.pic.set_line(4, True)

    from unicorn import UC_HOOK_MEM_WRITE
    machine.engine.uc.hook_add(UC_HOOK_MEM_WRITE, on_store, begin=DATA + 7, end=DATA + 7)
    left: list[int] = []

    def handler(_: int) -> None:
        bench.cpu.load()
        left.append(bench.cpu.gpr(RCX))
        machine.pic.set_line(4, False)

    machine.watch(Bench.handler(0x24), handler)
    expected = kernel_counts(20, machine__alu=10, machine__out=6, retired__out=6, io__device=6, machine__sti=1, retired__sti=1,
                             machine__cli=1, retired__cli=1, **irets(same=1), interrupt__delivered=1, machine__string=20)
    assert finish(bench) == expected
    assert left and 0 < left[0] < 20, "the interrupt came in the middle"
    assert machine.time == 20


def test_a_search_broken_off_by_a_page_fault_counts_its_elements_once(path: str) -> None:
    # As below with SCASB: 5 + 2 + 1 + 3 + 1 = 12 and MOV AL = 13; it looks at 6 bytes, the fourth of them on the page that comes late.
    directory, table = PAGES, PAGES + 0x1000
    bench = Bench(f"mov eax, {directory:#x}; mov cr3, eax; mov eax, cr0; or eax, 0x80000000; mov cr0, eax;"
                  f"mov edi, {DATA + 0xffd:#x}; mov ecx, 9; mov al, 0x55; repne scasb; hlt",
                  {14: f"mov dword ptr [{table + 4 * (DATA + 0x1000 >> 12):#x}], {DATA + 0x1003:#x}; add esp, 4; iretd"}, path=path)
    ram = bench.machine.ram
    ram.write32(directory, table | 3)
    for page in range(1024):
        ram.write32(table + 4 * page, 0 if page << 12 == DATA + 0x1000 else page << 12 | 3)
    ram.write(DATA + 0x1002, b"\x55")
    expected = kernel_counts(13, machine__alu=7, machine__string=6, machine__mov_to_cr=2, retired__mov_to_cr=2, machine__mov_from_cr=1,
                             retired__mov_from_cr=1, machine__store=1, **irets(same=1), fault__delivered__14=1)
    assert finish(bench) == expected
    assert bench.cpu.gpr(RCX) == 3


def test_rep_broken_off_by_a_page_fault_counts_once(path: str) -> None:
    # Paging on (mov, mov cr3, mov, or, mov cr0: 5), 2 mov, rep stosb of 6 over a page's edge; its second page is not there:
    # handler mov (maps it), add, iret; hlt. 5 + 2 + 1 + 3 + 1 = 12; 6 elements.
    directory, table = PAGES, PAGES + 0x1000
    bench = Bench(f"mov eax, {directory:#x}; mov cr3, eax; mov eax, cr0; or eax, 0x80000000; mov cr0, eax;"
                  f"mov edi, {DATA + 0xffd:#x}; mov ecx, 6; rep stosb; hlt",
                  {14: f"mov dword ptr [{table + 4 * (DATA + 0x1000 >> 12):#x}], {DATA + 0x1003:#x}; add esp, 4; iretd"}, path=path)
    ram = bench.machine.ram
    ram.write32(directory, table | 3)
    for page in range(1024):
        ram.write32(table + 4 * page, 0 if page << 12 == DATA + 0x1000 else page << 12 | 3)
    expected = kernel_counts(12, machine__alu=6, machine__string=6, machine__mov_to_cr=2, retired__mov_to_cr=2, machine__mov_from_cr=1,
                             retired__mov_from_cr=1, machine__store=1, **irets(same=1), fault__delivered__14=1)
    assert finish(bench) == expected


# ---- code that changes, code across pages
def test_self_modifying_code_is_counted_as_what_it_became(path: str) -> None:
    # 2 passes over one instruction, first INC EAX, then (patched to NOP): mov; 2 × (the byte, mov [m], dec, jnz), 1 taken; hlt: 10.
    text = f"mov ecx, 2; l: inc eax; mov byte ptr [{CODE + 5:#x}], 0x9d; push edx; dec ecx; jnz l; hlt"
    bench = Bench(text.replace("push edx", "pushfd"), path=path)
    # first pass: inc eax (0x40); then POPFD (0x9d) takes the flags that PUSHFD left.
    expected = kernel_counts(12, machine__alu=1 + 1 + 2 + 1, machine__store=2, machine__pushf=2, retired__pushf=2, machine__popf=1,
                             retired__popf=1, machine__branch=1)
    assert finish(bench) == expected


def test_code_patched_far_from_where_it_runs(path: str) -> None:
    # mov ecx, 2; 2 × (call, f, ret, mov [f], dec, jnz); hlt. f: first CLI, then STI. 1 + 2·6 + 1 = 14.
    f = CODE + 0x1000
    bench = Bench(f"mov ecx, 2; l: call {f:#x}; mov byte ptr [{f:#x}], 0xfb; dec ecx; jnz l; hlt", path=path)
    bench.machine.ram.write(f, b"\xfa\xc3")
    expected = kernel_counts(14, machine__alu=1 + 2 + 1, machine__branch=2 + 1, machine__indirect=2, machine__store=2, machine__cli=1,
                             retired__cli=1, machine__sti=1, retired__sti=1)
    assert finish(bench) == expected


def test_a_port_instruction_patched_into_something_longer(path: str) -> None:
    # mov, mov edx, then f twice: first "in al, dx; ret", then "mov al, 5; ret" (patched in by MOV [f], imm32), and hlt.
    # 2 + (call, in, ret) + mov + (call, mov, ret) + hlt = 10.
    f = CODE + 0x1000
    patch = int.from_bytes(b"\xb0\x05\xc3\x90", "little")
    bench = Bench(f"mov eax, 0; mov edx, 0x3ff; call {f:#x}; mov dword ptr [{f:#x}], {patch:#x}; call {f:#x}; hlt", path=path)
    bench.machine.ram.write(f, b"\xec\xc3")
    assert finish(bench) == kernel_counts(10, machine__alu=3, machine__branch=2, machine__indirect=2, machine__store=1, machine__in=1,
                                          retired__in=1, io__device=1)
    assert bench.cpu.gpr(RAX) & 0xFF == 5


def test_a_block_and_an_instruction_across_pages(path: str) -> None:
    # jmp; nop, 5-byte mov across the edge, inc, hlt: 5.
    edge = CODE + 0x1000
    bench = Bench(f"jmp {edge - 3:#x}", path=path)
    bench.machine.ram.write(edge - 3, b"\x90\xb8\x01\x02\x03\x04\x40\xf4")
    assert finish(bench) == kernel_counts(5, machine__alu=3, machine__branch=1)
    assert bench.cpu.gpr(RAX) == 0x04030202


# ---- ports, time, padding, budget
def test_ports_and_time_stamps(path: str) -> None:
    # mov, mov, out, in, rdtsc, mov, rdtsc, hlt: 8; each time stamp is the number of instructions before it.
    bench = Bench("mov edx, 0x3ff; mov al, 7; out dx, al; in al, dx; rdtsc; mov ebx, eax; rdtsc; hlt", path=path)
    expected = kernel_counts(8, machine__alu=3, machine__out=1, retired__out=1, machine__in=1, retired__in=1, io__device=2,
                             machine__rdtsc=2, retired__rdtsc=2)
    assert finish(bench) == expected
    assert (bench.cpu.gpr(3), bench.cpu.gpr(RAX)) == (4, 6)


def test_time_stamps_in_a_loop_that_sets_the_counter(path: str) -> None:
    # mov ecx; 4 × (nop, rdtsc, mov, rdtsc, mov, dec, jnz); mov ecx, mov eax, xor, wrmsr; rdtsc; mov; hlt. Each stamp: instructions before it.
    at = "[ecx*8 + " + hex(DATA)
    bench = Bench(f"mov ecx, 4; l: nop; rdtsc; mov {at}], eax; rdtsc; mov {at} + 4], eax; dec ecx; jnz l;"
                  f"mov ecx, 0x10; mov eax, 0x1000; xor edx, edx; wrmsr; mov ebx, 2; m: rdtsc; mov ebp, eax; dec ebx; jnz m; hlt", path=path)
    finish(bench)
    stamps = [bench.read32(DATA + 8 * (4 - i) + 4 * j) for i in range(4) for j in range(2)]
    assert stamps == [1 + 7 * i + n for i in range(4) for n in (1, 3)]
    # WRMSR at 0x1000 counts itself, and so on: mov ebx, rdtsc, mov, dec, jnz before the second RDTSC.
    assert bench.cpu.gpr(RBP) == 0x1000 + 1 + 1 + 4


def test_a_time_stamp_that_becomes_a_kernels_own(path: str) -> None:
    # User mode: 3 × (rdtsc, dec, jnz), int 0x30; the kernel sets CR4.TSD and goes back: #GP.
    bench = Bench("hlt", {0x30: ("mov eax, 4; mov cr4, eax; mov ecx, 3; mov dword ptr [esp], " + hex(USER) + "; iretd", 3), 13: "hlt"},
                  user=f"mov ecx, 3; l: rdtsc; dec ecx; jnz l; int 0x30; jmp {USER:#x}", path=path)
    bench.user_mode()
    counts = finish(bench)
    assert counts["machine.rdtsc"] == 3 and counts["fault.delivered.13"] == 1 and counts["user"] == 1 + 9 + 1 + 1


def test_prefixes_do_not_change_what_is_counted(path: str) -> None:
    # Padded CLI, STI, PUSHF, POPF (segment prefixes): 4, and hlt.
    bench = Bench(b"\x3e\x3e\x3e\xfa\x3e\xfb\x3e\x3e\x9c\x3e\x9d\xf4", path=path)
    expected = kernel_counts(5, machine__cli=1, retired__cli=1, machine__sti=1, retired__sti=1, machine__pushf=1, retired__pushf=1,
                             machine__popf=1, retired__popf=1)
    assert finish(bench) == expected


def test_string_output_is_counted_by_element(path: str) -> None:
    # mov, mov, mov, rep outsb of 3, hlt: 5; three device accesses.
    bench = Bench(f"mov ecx, 3; mov esi, {DATA:#x}; mov dx, 0x3f8; rep outsb; hlt", path=path)
    bench.machine.ram.write(DATA, b"abc")
    expected = kernel_counts(5, machine__alu=3, machine__outs=1, retired__outs=1, machine__string=3, io__device=3)
    assert finish(bench) == expected
    assert bench.machine.console == b"abc"


def test_a_budget_ends_a_loop_and_is_never_exceeded(path: str) -> None:
    bench = Bench("l: inc eax; jmp l", path=path)
    with pytest.raises(GuestBudget, match="budget of 1000 guest instructions"):
        bench.run(1000)
    assert counted(bench)["kernel"] == 1000
    assert bench.cpu.gpr(RAX) == 500


def test_a_snapshot_in_the_middle_of_a_block(path: str) -> None:
    # Watched: the third of four instructions in one block. Two have retired when it is about to run.
    bench = Bench("inc eax; inc eax; inc ebx; hlt", path=path)
    seen: list[int] = []
    bench.machine.watch(CODE + 2, lambda address: seen.append(bench.machine.snapshot(address).kernel))
    finish(bench)
    assert seen == [2]


assert (CODE3, DATA3) == (0x18, 0x20)


# ---- IRET, by where it goes
def frame(cs: int, eip: int, flags: int, ss: int = 0) -> str:
    outer = f"push {ss}; push {STACK3:#x};" if cs & 3 else ""
    return f"{outer} push {flags}; push {cs}; push {eip:#x}; iretd"


def test_an_iret_whose_target_faults_at_once_went_there(path: str) -> None:
    # 5 push, iret; [ud2]; handler: hlt.
    bench = Bench(frame(USER_CODE, USER, 2, USER_DATA), {6: "hlt"}, user=".byte 0x0f, 0x0b", path=path)
    assert finish(bench) == kernel_counts(7, machine__store=5, **irets(outer=1), fault__delivered__6=1)


def test_an_iret_that_lets_an_interrupt_in_is_counted_where_it_went(path: str) -> None:
    # push ×5, iret to ring 3 with IF on: the interrupt is taken before the user's first instruction; handler: hlt.
    bench = Bench(frame(USER_CODE, USER, 0x202, USER_DATA), {0x24: "hlt"}, user="nop; nop", path=path)
    master = bench.machine.pic.master
    master.base, master.imr = 0x20, 0
    bench.machine.pic.set_line(4, True)
    assert finish(bench) == kernel_counts(7, machine__store=5, **irets(outer=1), interrupt__delivered=1)


def test_an_iret_that_faults_is_none(path: str) -> None:
    # 3 push, [iret to a selector beyond the table]; handler: hlt.
    bench = Bench(frame(0x1230, USER, 2), {13: "hlt"}, path=path)
    assert finish(bench) == kernel_counts(4, machine__store=3, fault__delivered__13=1)
