"""Delivery through the IDT: frames, error codes, stacks, double and triple faults, the STI shadow; 32 and 64 bits."""

from __future__ import annotations

import struct

import pytest
from machinelab import (
    CODE,
    CODE0,
    CODE64,
    DATA0,
    DEBUG_EXIT,
    IDT,
    IDT64,
    IST1,
    LONG,
    PATHS,
    RSP0,
    SPARE,
    STACK0,
    STACK3,
    TASK,
    TSS,
    USER,
    USER_CODE,
    USER_DATA,
    Bench,
    asm,
    gate,
    gate64,
    long_bench,
)

from vmlab.errors import TripleFault
from vmlab.machine.cpu import IF, NT, RF, TF, Segment
from vmlab.machine.pc import Machine, StopReason
from vmlab.machine.state import CS, RAX, RBX, RCX, RDX, RSP, SS

pytestmark = pytest.mark.parametrize("path", PATHS)

UD2 = ".byte 0x0f, 0x0b"
#: Real descriptors' high doublewords (SDM Vol. 3A figure 5-1), base 0, limit 4 GiB.
NOT_PRESENT_CODE, DATA_ONLY, CONFORMING = 0x00CF1B00_0000FFFF, 0x00CF9300_0000FFFF, 0x00CF9F00_0000FFFF


def halt(bench: Bench) -> None:
    assert bench.run().reason is StopReason.HALTED
    bench.cpu.load()


# ---- frames
def test_a_frame_without_ring_change(path: str) -> None:
    bench = Bench(f"stc; {UD2}", {6: "hlt"}, path=path)
    halt(bench)
    assert bench.stack(3) == [CODE + 1, CODE0, 0x3]
    assert bench.cpu.gpr(RSP) == STACK0 - 12


def test_a_frame_with_ring_change_comes_from_the_tss(path: str) -> None:
    bench = Bench("hlt", {6: "hlt"}, user=f"stc; {UD2}", path=path)
    bench.user_mode()
    halt(bench)
    assert bench.stack(5) == [USER + 1, USER_CODE, 0x3, STACK3, USER_DATA]
    assert (bench.cpu.gpr(RSP), bench.cpu.selector(SS), bench.cpu.selector(CS), bench.cpu.cpl) == (STACK0 - 20, DATA0, CODE0, 0)


def test_an_interrupt_gate_clears_if_and_a_trap_gate_does_not(path: str) -> None:
    for kind, left in ((0xE, 0), (0xF, IF)):
        bench = Bench("sti; nop; int 0x30", {0x30: "pushfd; pop eax; hlt"}, path=path)
        bench.gate(0x30, gate(bench.handler(0x30), kind=kind))
        halt(bench)
        assert bench.cpu.gpr(RAX) & IF == left
        assert bench.stack(3)[2] & IF


def test_nt_and_tf_are_clear_in_the_handler_and_kept_in_the_frame(path: str) -> None:
    bench = Bench("push 0x4002; popfd; int 0x30", {0x30: "pushfd; pop eax; hlt"}, path=path)
    halt(bench)
    assert bench.cpu.gpr(RAX) & (NT | TF) == 0
    assert bench.stack(3)[2] & NT


def test_a_16_bit_gate_pushes_words(path: str) -> None:
    bench = Bench("int 0x30", path=path)
    bench.gate(0x30, gate(0x4000, kind=0x6))
    bench.machine.ram.write(0x4000, b"\xf4")
    halt(bench)
    assert bench.cpu.gpr(RSP) == STACK0 - 6
    assert struct.unpack("<3H", bench.machine.ram.read(STACK0 - 6, 6)) == ((CODE + 2) & 0xFFFF, CODE0, 2)


def test_a_conforming_handler_keeps_the_ring_and_the_stack(path: str) -> None:
    bench = Bench("hlt", {}, user="int 0x30", path=path, spare=CONFORMING)
    bench.gate(0x30, gate(USER + 0x80, dpl=3, selector=SPARE))
    bench.gate(13, gate(USER + 0xC0))
    bench.machine.ram.write(USER + 0x80, b"\xf4")   # HLT at CPL 3: #GP, which goes to ring 0
    bench.machine.ram.write(USER + 0xC0, b"\xf4")
    bench.user_mode()
    halt(bench)
    code, at, selector, _, sp, _ = bench.stack(6)
    assert (code, at, selector, sp) == (0, USER + 0x80, SPARE | 3, STACK3 - 12)


# ---- error codes of faults on the way
def other_fault(bench: Bench, vector: int, source_ring_3: bool = False) -> tuple[int, int]:
    """Let the handler of ``vector`` show (error code, return address)."""
    bench.gate(vector, gate(0x8000))
    bench.machine.ram.write(0x8000, b"\xf4")
    if source_ring_3:
        bench.user_mode()
    halt(bench)
    code, at = bench.stack(2)
    return code, at


@pytest.mark.parametrize(("instruction", "ext"), [("int 0x30", 0), (UD2, 1)])
def test_ext_tells_an_earlier_exception_from_int_n(path: str, instruction: str, ext: int) -> None:
    """SDM Vol. 3A §6.13: EXT is clear for INT n and set for a hardware exception."""
    vector = 0x30 if instruction.startswith("int") else 6
    bench = Bench(f"nop; {instruction}", path=path)
    bench.gate(vector, gate(0x7000, present=False))
    assert other_fault(bench, 11) == (vector * 8 + 2 + ext, CODE + 1)


def test_ext_is_set_for_a_device_interrupt(path: str) -> None:
    bench = Bench("sti; nop; nop; hlt", path=path)
    master = bench.machine.pic.master
    master.base, master.imr = 0x20, 0
    bench.gate(0x24, gate(0x7000, present=False))
    bench.machine.pic.set_line(4, True)
    code, _ = other_fault(bench, 11)
    assert code == 0x24 * 8 + 3


@pytest.mark.parametrize(("descriptor", "vector", "code"), [
    (0, 13, SPARE), (DATA_ONLY, 13, SPARE), (NOT_PRESENT_CODE, 11, SPARE), (0x00CFFB00_0000FFFF, 13, SPARE),
])
def test_a_gate_to_a_wrong_code_segment(path: str, descriptor: int, vector: int, code: int) -> None:
    """Empty, data, not present, less privileged than CPL 0: the selector is the error code."""
    bench = Bench("int 0x30", path=path, spare=descriptor)
    bench.gate(0x30, gate(0x7000, selector=SPARE))
    assert other_fault(bench, vector) == (code, CODE)


def test_a_gate_with_a_null_selector_or_beyond_the_gdt(path: str) -> None:
    for selector, code in ((0, 0), (0x1230, 0x1230)):
        bench = Bench("int 0x30", path=path)
        bench.gate(0x30, gate(0x7000, selector=selector))
        assert other_fault(bench, 13) == (code, CODE)


def test_a_vector_beyond_the_idt(path: str) -> None:
    bench = Bench("int 0x30", path=path)
    bench.cpu.set_table("idt", Segment(0, IDT, 0x30 * 8 - 1, 0))
    bench.cpu.store()
    assert other_fault(bench, 13) == (0x30 * 8 + 2, CODE)


def test_a_gate_of_no_kind(path: str) -> None:
    bench = Bench("int 0x30", path=path)
    bench.gate(0x30, gate(0x7000, kind=0x2))
    assert other_fault(bench, 13) == (0x30 * 8 + 2, CODE)


@pytest.mark.parametrize(("dpl", "vector"), [(3, 0x30), (2, 13), (0, 13)])
def test_int_n_needs_the_gates_dpl(path: str, dpl: int, vector: int) -> None:
    bench = Bench("hlt", user="int 0x30", path=path)
    bench.gate(0x30, gate(0x8000, dpl=dpl))
    bench.machine.ram.write(0x8000, b"\xf4")
    if vector == 13:
        assert other_fault(bench, 13, True) == (0x30 * 8 + 2, USER)
    else:
        bench.user_mode()
        halt(bench)
        assert bench.stack(1) == [USER + 2]


def test_an_exception_does_not_care_about_the_gates_dpl(path: str) -> None:
    bench = Bench("hlt", {6: ("hlt", 0)}, user=UD2, path=path)
    bench.user_mode()
    halt(bench)
    assert bench.stack(2) == [USER, USER_CODE]


@pytest.mark.parametrize(("stack_selector", "vector", "code"), [
    (0, 10, 0), (0x1230, 10, 0x1230), (CODE0, 10, CODE0), (USER_DATA, 10, USER_DATA & 0xFFFC)])
def test_a_wrong_stack_in_the_tss_is_an_invalid_tss_fault(path: str, stack_selector: int, vector: int, code: int) -> None:
    """INT 0x30 from ring 3 finds a bad SS0; #TS again needs SS0: a fault while delivering #TS is a double, then a triple fault."""
    bench = Bench("hlt", {8: "hlt", 10: "hlt"}, user="int 0x30", path=path)
    bench.gate(0x30, gate(0x8000, dpl=3))
    bench.machine.ram.write32(TSS + 8, stack_selector)
    bench.user_mode()
    with pytest.raises(TripleFault, match=f"exception {vector} while delivering a double fault"):
        bench.run()


# ---- double and triple faults
def test_two_contributory_faults_are_a_double_fault(path: str) -> None:
    """#DE, whose gate is not present (#NP): both contribute (SDM Vol. 3A table 6-5). The error code is 0."""
    bench = Bench("xor ecx, ecx; nop; div ecx", {8: "hlt", 11: "hlt"}, path=path)
    bench.gate(0, gate(0x7000, present=False))
    halt(bench)
    assert bench.stack(2) == [0, CODE + 3]
    assert bench.counts().events["fault.delivered.8"] == 1


def test_a_benign_fault_and_a_contributory_one_are_handled_in_turn(path: str) -> None:
    bench = Bench(f"nop; {UD2}", {8: "hlt", 11: "hlt"}, path=path)
    bench.gate(6, gate(0x7000, present=False))
    halt(bench)
    assert bench.stack(2) == [6 * 8 + 3, CODE + 1]
    assert bench.counts().events["fault.delivered.11"] == 1


def test_a_missing_double_fault_handler_is_a_triple_fault(path: str) -> None:
    bench = Bench("xor ecx, ecx; div ecx", path=path)
    with pytest.raises(TripleFault, match=r"triple fault at 0x10002: exception 13 while delivering a double fault"):
        bench.run()


def test_without_an_idt_the_first_fault_is_the_last(path: str) -> None:
    bench = Bench(UD2, path=path)
    bench.cpu.set_table("idt", Segment(0, 0, 0, 0))
    bench.cpu.store()
    with pytest.raises(TripleFault, match="limit 0x0"):
        bench.run()


def test_many_faults_in_a_row_stay_single_faults(path: str) -> None:
    """Unicorn's own bookkeeping would make the second #GP a double fault."""
    bench = Bench("mov ecx, 5; l: mov eax, 0x1234; mov ds, eax; dec ecx; jnz l; hlt", {13: "add esp, 4; add dword ptr [esp], 2; iretd"}, path=path)
    halt(bench)
    events = bench.counts().events
    assert events["fault.delivered.13"] == 5
    assert "fault.delivered.8" not in events


# ---- interrupts and their shadow
def interruptible(source: str, path: str, handler: str = "inc edi; mov al, 0x20; out 0x20, al; iretd") -> Bench:
    """A bench whose UART line is up before the first instruction."""
    bench = Bench(source, {0x24: handler}, path=path)
    master = bench.machine.pic.master
    master.base, master.imr = 0x20, 0
    bench.machine.pic.set_line(4, True)
    return bench


def test_sti_cli_lets_no_interrupt_in(path: str) -> None:
    bench = interruptible("mov ecx, 50; l: sti; cli; dec ecx; jnz l; hlt", path)
    halt(bench)
    assert "interrupt.delivered" not in bench.counts().events


def test_a_masked_interrupt_waits_through_blocks_and_strings(path: str) -> None:
    """It comes when IF is on, as always; where C can see IF, Python is not asked at each block until then."""
    bench = interruptible("mov ecx, 500; l: dec ecx; jnz l; mov edi, 0x5000; mov ecx, 300; cld; rep stosb; sti; nop; jmp n; n: cli; hlt", path,
                          "mov ebx, ecx; mov al, 0x20; out 0x20, al; iretd")
    interrupts, asked = bench.machine.interrupts, list[int]()
    attend = interrupts.attend

    def counted(pc: int, size: int) -> bool:
        asked.append(pc)
        return attend(pc, size)

    interrupts.attend = counted  # type: ignore[method-assign]
    halt(bench)
    assert bench.counts().events["interrupt.delivered"] == 1
    assert bench.counts().events["machine.string"] == 300
    assert len(asked) < 10 if bench.machine.native_events is not None else len(asked) > 800


def test_sti_hlt_is_woken_and_goes_on_behind_hlt(path: str) -> None:
    bench = interruptible("sti; hlt; inc ebx; cli; hlt", path, "mov ecx, [esp]; inc edi; mov al, 0x20; out 0x20, al; iretd")
    halt(bench)
    assert (bench.cpu.gpr(RCX), bench.cpu.gpr(RBX)) == (CODE + 2, 1)
    assert bench.counts().events["interrupt.delivered"] == 1


def test_sti_nop_lets_it_in_at_the_next_block(path: str) -> None:
    bench = interruptible("sti; nop; jmp n; n: cli; hlt", path)
    halt(bench)
    assert bench.counts().events["interrupt.delivered"] == 1


def test_popf_and_iret_that_enable_have_no_shadow(path: str) -> None:
    for source in ("push 0x202; popfd; jmp n; n: mov edx, edi; cli; hlt", f"push 0x202; push {CODE0}; push {CODE + 0x20:#x}; iretd"):
        bench = interruptible(source, path)
        bench.machine.ram.write(CODE + 0x20, b"\x89\xfa\xfa\xf4")   # mov edx, edi; cli; hlt
        halt(bench)
        assert bench.cpu.gpr(RDX) == 1, "delivered before the instruction after it"


def test_hlt_with_interrupts_off_ends_the_run(path: str) -> None:
    bench = interruptible("hlt", path)
    assert bench.run().reason is StopReason.HALTED
    assert "interrupt.delivered" not in bench.counts().events


def test_a_level_that_stays_interrupts_once(path: str) -> None:
    bench = interruptible("sti; mov ecx, 100; l: dec ecx; jnz l; cli; hlt", path)
    halt(bench)
    assert bench.counts().events["interrupt.delivered"] == 1


# ---- ports in user mode: IOPL and the bitmap
@pytest.mark.parametrize(("bitmap", "limit", "allowed"), [
    (b"\x00", 0x68 + 0x80, True),        # the port's bit is clear
    (b"\x80", 0x68 + 0x80, False),       # ... and set
    (b"\x00", 0x68 + 0x7E, False),       # the bitmap ends before it
    (b"\x00", 0x68 + 0x7F, False),       # the CPU reads two bytes always (SDM Vol. 1 §19.5.2)
])
def test_the_io_bitmap_lets_single_ports_through(path: str, bitmap: bytes, limit: int, allowed: bool) -> None:
    bench = Bench("hlt", {13: "hlt", 0x80: ("hlt", 3)}, user="mov dx, 0x3ff; in al, dx; int 0x80", path=path)
    bench.machine.ram.write(TSS + 0x68, b"\xff" * 0x100)
    bench.machine.ram.write(TSS + 0x68 + 0x3FF // 8, bitmap)
    bench.cpu.set_table("tr", Segment(TASK, TSS, limit, 0x8900))
    bench.cpu.store()
    bench.user_mode()
    halt(bench)
    assert ("fault.delivered.13" not in bench.counts().events) is allowed


def test_iopl_3_lets_all_ports_through(path: str) -> None:
    bench = Bench("hlt", {13: "hlt", 0x80: ("hlt", 3)}, user="mov dx, 0x3ff; in al, dx; cli; int 0x80", path=path)
    bench.user_mode()
    bench.cpu.eflags = 0x3002
    bench.cpu.store()
    halt(bench)
    assert "fault.delivered.13" not in bench.counts().events


def test_rights_to_a_port_are_those_of_the_moment(path: str) -> None:
    # The same IN six times, IOPL 3 and 0 by turns: INT 0x81 changes the flags that it returns with.
    bench = Bench("hlt", {13: "add esp, 4; inc dword ptr [esp]; iretd", 0x80: ("hlt", 3), 0x81: ("xor dword ptr [esp + 8], 0x3000; iretd", 3)},
                  user="mov ecx, 6; mov edx, 0x3ff; again: in al, dx; int 0x81; dec ecx; jnz again; int 0x80", path=path)
    bench.user_mode()
    bench.cpu.eflags = 0x3002
    bench.cpu.store()
    halt(bench)
    counted = bench.counts()
    assert (counted.events["machine.in"], counted.events["fault.delivered.13"], counted.events["io.device"]) == (3, 3, 3)
    assert (counted.user, counted.kernel) == (2 + 3 + 6 * 3 + 1, 3 * 3 + 6 * 2 + 1)


@pytest.mark.parametrize(("source", "value"), [("in ax, dx", 0x5555FFFF), ("in eax, dx", 0xFFFFFFFF), ("in al, 0x99", 0x555555FF)])
def test_ports_of_16_bit_code_have_its_operand_size(path: str, source: str, value: int) -> None:
    code = asm(f"mov cx, 4; mov dx, 0x999; again: mov eax, 0x55555555; {source}; dec cx; jnz again; hlt", 0x7C00, 16)
    machine = Machine(4 << 20, path)
    machine.ram.write(0x7C00, code)
    machine.cpu.load()
    machine.cpu.rip = 0x7C00
    machine.cpu.store()
    assert machine.run(100).reason is StopReason.HALTED
    machine.cpu.load()
    assert machine.cpu.gpr(RAX) == value
    assert (machine.snapshot().events["machine.in"], machine.snapshot().kernel) == (4, 2 + 4 * 4 + 1)


# ---- real mode
def test_real_mode_delivers_through_the_vector_table(path: str) -> None:
    machine = Machine(4 << 20, path)
    machine.ram.write(0x7C00, b"\xcd\x30\xf4")                     # int 0x30; hlt
    machine.ram.write(4 * 0x30, struct.pack("<HH", 0x0100, 0x0080))  # 0080:0100
    machine.ram.write(0x900, b"\x40\xcf")                          # inc ax; iret
    cpu = machine.cpu
    cpu.load()
    cpu.rip = 0x7C00
    cpu.set_gpr(RSP, 0x7000)
    cpu.store()
    assert machine.run(100).reason is StopReason.HALTED
    cpu.load()
    assert (cpu.gpr(RAX) & 0xFFFF, cpu.rip, cpu.gpr(RSP) & 0xFFFF) == (1, 0x7C03, 0x7000)
    assert machine.snapshot().kernel == 4
    assert machine.ram.read(0x6FFA, 6) == struct.pack("<HHH", 0x7C02, 0, 2)


# ---- long mode
def stack64(bench: Bench, items: int) -> list[int]:
    bench.cpu.load()
    return [bench.machine.ram.read64(bench.cpu.gpr(RSP) + 8 * i) for i in range(items)]


def test_a_64_bit_frame_is_aligned_and_always_has_the_stack(path: str) -> None:
    bench = long_bench("mov rsp, 0x9008; mov r15, 0x1122334455667788; nop; ud2", path, {6: ("hlt", 0, 0)})
    halt(bench)
    frame = stack64(bench, 5)
    assert (frame[0], frame[1], frame[3]) == (LONG + 0x12, CODE64, 0x9008)
    assert bench.cpu.gpr(RSP) == 0x9000 - 40


def test_an_interrupt_stack_table_entry_switches_without_a_ring_change(path: str) -> None:
    bench = long_bench("mov rsp, 0x9000; mov eax, 0x1234; mov ds, eax", path, {13: ("hlt", 1, 0)})
    halt(bench)
    assert bench.cpu.gpr(RSP) == IST1 - 48
    assert stack64(bench, 3)[0] == 0x1234
    assert stack64(bench, 5)[4] == 0x9000
    assert bench.cpu.selector(SS) == DATA0, "SS becomes null only when the ring changes"


def test_iretq_returns_from_a_64_bit_handler(path: str) -> None:
    # 10 to get there, and the far jump; mov, int, handler inc, iretq, hlt.
    bench = long_bench("mov rsp, 0x9000; int 0x30; hlt", path, {0x30: ("inc rbx; iretq", 1, 0)})
    halt(bench)
    assert (bench.cpu.gpr(RBX), bench.cpu.gpr(RSP)) == (1, 0x9000)
    assert bench.counts().kernel == 11 + 5


def test_a_ring_change_in_64_bits_takes_rsp0_and_a_null_ss(path: str) -> None:
    user = LONG + 0x800
    bench = long_bench(f"push {USER_DATA}; push 0x9000; push 2; push 0x3b; push {user:#x}; iretq", path, {0x30: ("hlt", 0, 3)})
    ram = bench.machine.ram
    ram.write64(0x1000 + 0x38, 0x00AFFB00_0000FFFF)            # a 64-bit user code segment, behind the seven
    bench.cpu.set_table("gdt", Segment(0, 0x1000, 0x3F, 0))
    bench.cpu.store()
    ram.write(user, asm("int 0x30", user, 64))
    halt(bench)
    assert stack64(bench, 5) == [user + 2, 0x3B, 2, 0x9000, USER_DATA]
    assert (bench.cpu.gpr(RSP), bench.cpu.selector(SS), bench.cpu.cpl) == (RSP0 - 40, 0, 0)
    assert bench.counts().user == 1


def test_a_32_bit_handler_is_refused_in_long_mode(path: str) -> None:
    bench = long_bench("mov rsp, 0x9000; int 0x30", path, {13: ("hlt", 0, 0)})
    bench.machine.ram.write(IDT64 + 16 * 0x30, gate64(0x8000, selector=CODE0))
    halt(bench)
    assert stack64(bench, 1) == [CODE0]


def test_iret_sets_rf_for_one_instruction(path: str) -> None:
    """RF of the frame keeps a breakpoint from the next instruction alone; PUSHF behind it shows none (SDM Vol. 3A §17.3.1)."""
    bench = Bench(f"push 0x10002; push cs; mov eax, l; push eax; iretd; l: nop; pushfd; pop ebx; jmp m; m: pushfd; pop ecx; {DEBUG_EXIT}", path=path)
    bench.run()
    bench.cpu.load()
    assert not (bench.cpu.gpr(RBX) | bench.cpu.gpr(RCX) | bench.cpu.system_flags) & RF
