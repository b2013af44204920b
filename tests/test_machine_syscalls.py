"""SYSENTER, SYSCALL and their ways back; model-specific registers; in 32 and 64 bits, bare and in guest mode."""

from __future__ import annotations

import pytest
from machinelab import CODE, CODE0, DATA0, DEBUG_EXIT, LONG, PATHS, STACK0, STACK3, USER, USER_CODE, USER_DATA, Bench, asm, long_bench

from vmlab.machine.cpu import CF, IF, RF, ZF, Segment
from vmlab.machine.msr import MSRS
from vmlab.machine.pc import Stop, StopReason
from vmlab.machine.state import CS, R11, RAX, RBX, RCX, RDX, RSP, SS

pytestmark = pytest.mark.parametrize("path", PATHS)

ENTRY = 0x60000
SYSRETQ = ".byte 0x48, 0x0f, 0x07"
KEPT = (0x175, 0x176, *range(0xC0000081, 0xC0000085))


def wrmsr(number: int, value: int) -> str:
    return f"mov ecx, {number:#x}; mov eax, {value & 0xFFFFFFFF:#x}; mov edx, {value >> 32:#x}; wrmsr;"


def place(bench: Bench, at: int, source: str, bits: int = 32) -> Bench:
    bench.machine.ram.write(at, asm(source, at, bits))
    return bench


def halt(bench: Bench) -> Bench:
    assert bench.run().reason is StopReason.HALTED
    bench.cpu.load()
    return bench


class Trap:
    """A monitor that notes the first exception and ends the run there."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.seen = bench, list[tuple[int, int | None, int]]()
        bench.machine.monitor = self

    def exception(self, vector: int, error_code: int | None, *, software: bool) -> None:
        self.seen.append((vector, error_code, self.bench.cpu.rip))
        self.bench.machine.stop(Stop(StopReason.REQUESTED))

    def interrupt(self) -> None:
        raise AssertionError


SYSENTER_MSRS = wrmsr(0x174, CODE0) + wrmsr(0x175, STACK0 - 16) + wrmsr(0x176, ENTRY)


# ---- SYSENTER and SYSEXIT
def test_sysexit_and_sysenter_go_there_and_back(path: str) -> None:
    bench = Bench(SYSENTER_MSRS + f"mov ecx, {STACK3}; mov edx, {USER}; sti; sysexit", user="mov ebx, cs; mov esi, ss; mov edi, esp; sysenter",
                  path=path)
    place(bench, ENTRY, "hlt")
    halt(bench)
    cpu = bench.cpu
    assert (cpu.gpr(RBX), cpu.gpr(6), cpu.gpr(7)) == (USER_CODE, USER_DATA, STACK3)
    assert (cpu.selector(CS), cpu.selector(SS), cpu.cpl, cpu.gpr(RSP), cpu.rip) == (CODE0, DATA0, 0, STACK0 - 16, ENTRY + 1)
    assert not cpu.system_flags & IF
    counted = bench.counts()
    assert (counted.user, counted.kernel) == (4, 3 * 4 + 4 + 1)
    assert (counted.events["machine.sysenter"], counted.events["machine.sysexit"], counted.events["retired.sysenter"]) == (1, 1, 1)


def test_sysenter_loads_flat_segments_from_no_table(path: str) -> None:
    bench = Bench(wrmsr(0x174, 0xABC3) + wrmsr(0x175, 0x8000) + wrmsr(0x176, ENTRY) + "stc; sysenter", path=path)
    halt(place(bench, ENTRY, "mov eax, ds:[0x10000]; hlt"))
    cs, ss = bench.cpu.segment(CS), bench.cpu.segment(SS)
    assert (cs.selector, cs.base, cs.limit, cs.dpl) == (0xABC0, 0, 0xFFFFFFFF, 0)
    assert (ss.selector, ss.base, ss.limit, ss.dpl) == (0xABC8, 0, 0xFFFFFFFF, 0)
    assert bench.cpu.eflags & CF, "only VM, IF and RF change"


@pytest.mark.parametrize("selector", [0, 3])
def test_sysenter_without_a_selector_is_gp(path: str, selector: int) -> None:
    bench = Bench(wrmsr(0x174, selector) + "sysenter", {13: "hlt"}, path=path)
    halt(bench)
    assert bench.stack(2) == [0, CODE + len(asm(wrmsr(0x174, selector)))]
    assert bench.counts().events.get("machine.sysenter", 0) == 0


def test_sysenter_of_a_deprivileged_guest_reaches_the_monitor(path: str) -> None:
    bench = Bench("nop", user="nop; sysenter", path=path)
    bench.user_mode()
    trap = Trap(bench)
    bench.run()
    assert trap.seen == [(13, 0, USER + 1)]
    assert bench.counts().user == 1


def test_sysexit_above_ring_0_is_gp(path: str) -> None:
    bench = Bench("nop", {13: "hlt"}, user="sysexit", path=path)
    bench.user_mode()
    halt(bench)
    assert bench.stack(2) == [0, USER]


def test_sysenter_does_not_exist_in_long_mode(path: str) -> None:
    """APM Vol. 3: valid in legacy mode only."""
    halt(long_bench("mov rsp, 0x9000; sysenter", path, {6: ("hlt", 0, 0)}))


# ---- SYSCALL and SYSRET
def test_syscall_in_legacy_mode(path: str) -> None:
    star = (USER_CODE & ~3) << 48 | CODE0 << 32 | ENTRY
    bench = Bench(wrmsr(0xC0000080, 1) + wrmsr(0xC0000081, star) + f"mov ecx, {USER}; sysret", user="mov ebx, cs; syscall", path=path)
    halt(place(bench, ENTRY, "hlt"))
    cpu = bench.cpu
    assert (cpu.gpr(RBX), cpu.gpr(RCX), cpu.rip) == (USER_CODE, USER + len(asm("mov ebx, cs; syscall")), ENTRY + 1)
    assert (cpu.selector(CS), cpu.selector(SS), cpu.cpl) == (CODE0, DATA0, 0)
    assert (bench.counts().user, bench.counts().events["machine.syscall"]) == (2, 1)


def test_syscall_without_sce_is_ud(path: str) -> None:
    bench = Bench("nop", {6: "hlt"}, user="syscall", path=path)
    bench.user_mode()
    halt(bench)
    assert bench.stack(1) == [USER]


USER64, USER64_CS = LONG + 0x800, 0x43


def to_user64(path: str, user: str, entry: str, *, mask: int = 0, flags: int = 2) -> Bench:
    """64-bit: SYSCALL MSRs set, then SYSRETQ to ``user``; ``entry`` is the kernel's."""
    star = (USER64_CS - 16) << 48 | 0x30 << 32
    bench = long_bench(wrmsr(0xC0000080, 0x501) + wrmsr(0xC0000081, star) + wrmsr(0xC0000082, ENTRY) + wrmsr(0xC0000084, mask)
                       + f"mov rcx, {USER64}; mov r11, {flags}; " + SYSRETQ, path, {13: ("hlt", 0, 0), 6: ("hlt", 0, 0)})
    # GDT behind the seven: 0x38 user data, 0x40 64-bit user code, as SYSRET wants them.
    bench.machine.ram.write64(0x1000 + 0x38, 0x00CFF300_0000FFFF)
    bench.machine.ram.write64(0x1000 + 0x40, 0x00AFFB00_0000FFFF)
    bench.cpu.set_table("gdt", Segment(0, 0x1000, 0x47, 0))
    bench.cpu.store()
    place(bench, USER64, user, 64)
    return place(bench, ENTRY, entry, 64)


def test_syscall_in_long_mode(path: str) -> None:
    """RCX and R11 hold RIP and RFLAGS, SFMASK clears, RSP is the user's: the kernel switches."""
    user = "mov rsp, 0xa000; mov rbx, cs; xor eax, eax; stc; syscall"
    bench = halt(to_user64(path, user, "hlt", mask=IF | CF, flags=2 | IF))
    cpu = bench.cpu
    assert (cpu.gpr(RBX), cpu.gpr(RCX), cpu.gpr(RSP)) == (USER64_CS, USER64 + len(asm(user, USER64, 64)), 0xA000)
    assert cpu.gpr(R11) & (IF | CF | ZF | RF) == IF | CF | ZF
    assert cpu.eflags & (IF | CF | ZF) == ZF
    assert (cpu.selector(CS), cpu.selector(SS), cpu.cpl, cpu.rip) == (0x30, 0x38, 0, ENTRY + 1)
    assert bench.counts().user == 5


def test_a_system_call_returns_with_sysretq(path: str) -> None:
    user = "mov rsp, 0xa000; mov esi, 3; again: syscall; dec esi; jnz again; cli"
    bench = halt(to_user64(path, user, "inc rbx; " + SYSRETQ))
    assert (bench.cpu.gpr(RBX), bench.cpu.gpr(6)) == (3, 0)
    assert (bench.counts().user, bench.counts().events["machine.syscall"], bench.counts().events["machine.sysret"]) == (2 + 9, 3, 4)


# ---- model-specific registers
def test_the_documented_registers_exist(path: str) -> None:
    bench = Bench("".join(f"mov ecx, {number:#x}; rdmsr;" for number in MSRS) + "hlt", path=path)
    halt(bench)
    assert bench.counts().kernel == 2 * len(MSRS) + 1


@pytest.mark.parametrize("access", ["rdmsr", "wrmsr"])
@pytest.mark.parametrize("number", [0, 0x11, 0x173, 0x177, 0xC0000079, 0xC0000105, 0xFFFFFFFF])
def test_an_unknown_register_is_gp(path: str, access: str, number: int) -> None:
    bench = Bench(f"mov ecx, {number:#x}; {access}", {13: "hlt"}, path=path)
    halt(bench)
    assert bench.stack(2) == [0, CODE + 5]


@pytest.mark.parametrize(("number", "value"), [
    (0xC0000080, 1 << 1), (0xC0000082, 1 << 47), (0xC0000101, 0x8000_0000_0000), (0x277, 0x02), (0x277, 0x08), (0xC0010117, 0x1001),
    (0x1B, 0xFEE01900), (0x1B, 0xFEE00D00)])
def test_a_value_that_a_register_refuses_is_gp(path: str, number: int, value: int) -> None:
    bench = Bench(wrmsr(number, value), {13: "hlt"}, path=path)
    halt(bench)
    assert bench.stack(1) == [0]


def test_long_mode_cannot_be_left_out_of_paging_by_efer(path: str) -> None:
    halt(long_bench("mov rsp, 0x9000; mov ecx, 0xc0000080; rdmsr; and eax, 0xfffffeff; wrmsr", path, {13: ("hlt", 0, 0)}))


def test_registers_of_system_calls_are_kept(path: str) -> None:
    source = "".join(wrmsr(n, 0x1234_5678_0000 + n % 16) + "rdmsr; add ebx, eax; add esi, edx;" for n in KEPT)
    bench = halt(Bench(source + "hlt", path=path))
    assert bench.cpu.gpr(RBX) == sum(0x5678_0000 + n % 16 for n in KEPT) & 0xFFFFFFFF
    assert bench.cpu.gpr(6) == 6 * 0x1234


def test_the_time_stamp_counter_is_time_and_can_be_set(path: str) -> None:
    bench = halt(Bench("mov ecx, 0x10; rdmsr; mov ebx, eax; xor edx, edx; mov eax, 1000; wrmsr; rdtsc; hlt", path=path))
    assert (bench.cpu.gpr(RBX), bench.cpu.gpr(RAX), bench.cpu.gpr(RDX)) == (1, 1001, 0)


def test_rdmsr_above_ring_0_is_gp(path: str) -> None:
    bench = Bench("nop", {13: "hlt"}, user="mov ecx, 0x10; rdmsr", path=path)
    bench.user_mode()
    halt(bench)
    assert bench.stack(2) == [0, USER + 5]


def test_the_debug_exit_is_reached_from_a_system_call(path: str) -> None:
    bench = Bench(SYSENTER_MSRS + f"mov ecx, {STACK3}; mov edx, {USER}; sysexit", user="mov eax, 77; sysenter", path=path)
    place(bench, ENTRY, DEBUG_EXIT)
    assert bench.run().exit_code == 77
