"""The local APIC: by its registers with a clock of the test's, in memory and through CR8 with real code."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machinelab import DATA, DEBUG_EXIT, PATHS, Bench, Clock, long_bench

from vmlab.machine.devices import lapic as a
from vmlab.machine.pc import StopReason
from vmlab.machine.state import RAX, RBX, RDX

MASKED, PERIODIC = 1 << 16, 1 << 17


class Pair:
    """The 8259 pair as the APIC sees it."""

    def __init__(self) -> None:
        self.pending = False

    def acknowledge(self) -> int:
        self.pending = False
        return 0x77


class Box:
    def __init__(self) -> None:
        self.clock, self.pair = Clock(), Pair()
        self.apic = a.Lapic(self.clock.timeline, self.pair, lambda: None)

    def read(self, offset: int) -> int:
        return self.apic.read(offset, 4)

    def write(self, offset: int, value: int) -> None:
        self.apic.write(offset, 4, value)


def test_it_starts_in_virtual_wire_mode() -> None:
    box = Box()
    assert (box.read(a.SVR), box.read(a.LVT_LINT0), box.read(a.LVT_TIMER), box.read(a.VERSION)) == (0x1FF, 0x700, MASKED, 0x30014)
    assert not box.apic.pending
    box.pair.pending = True
    assert box.apic.pending
    assert box.apic.acknowledge() == 0x77
    assert box.read(a.ISR + 0x30) == 0, "an external interrupt is not in service here"


@pytest.mark.parametrize(("offset", "value"), [(a.LVT_LINT0, 0x700 | MASKED), (a.LVT_LINT0, 0x400), (a.SVR, 0xFF)])
def test_the_pair_can_be_shut_out(offset: int, value: int) -> None:
    box = Box()
    box.pair.pending = True
    box.write(offset, value)
    assert not box.apic.pending


def test_turned_off_by_its_msr_it_is_a_wire() -> None:
    box = Box()
    box.write(a.LVT_LINT0, MASKED)
    box.write(a.TPR, 0xF0)
    box.apic.set_on(False)
    box.pair.pending = True
    assert box.apic.pending
    box.apic.set_on(True)
    assert (box.read(a.LVT_LINT0), box.read(a.TPR)) == (0x700, 0)


@pytest.mark.parametrize(("divide", "by"), [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)])
def test_one_shot(divide: int, by: int) -> None:
    box = Box()
    box.clock.to(1000)
    box.write(a.LVT_TIMER, 0x40)
    box.write(a.DIVIDE, divide)
    box.write(a.INITIAL_COUNT, 100)
    box.clock.to(1000 + 40 * by)
    assert box.read(a.CURRENT_COUNT) == 60
    box.clock.to(1000 + 100 * by - 1)
    assert not box.apic.pending
    box.clock.to(1000 + 100 * by)
    assert (box.apic.pending, box.read(a.CURRENT_COUNT)) == (True, 0)
    assert box.apic.acknowledge() == 0x40
    box.write(a.EOI, 0)
    box.clock.to(100_000)
    assert not box.apic.pending
    assert box.clock.timeline.next_due is None


def test_periodic() -> None:
    box = Box()
    box.write(a.DIVIDE, 0xB)
    box.write(a.LVT_TIMER, 0x40 | PERIODIC)
    box.write(a.INITIAL_COUNT, 100)
    fired = []
    for time in range(0, 460, 10):
        box.clock.to(time)
        if box.apic.pending:
            fired.append(time)
            box.apic.acknowledge()
            box.write(a.EOI, 0)
    assert fired == [100, 200, 300, 400]
    assert box.read(a.CURRENT_COUNT) == 50
    box.write(a.INITIAL_COUNT, 0)
    box.clock.to(10_000)
    assert not box.apic.pending


def test_a_masked_timer_counts_and_is_silent() -> None:
    box = Box()
    box.write(a.DIVIDE, 0xB)
    box.write(a.LVT_TIMER, 0x40 | PERIODIC | MASKED)
    box.write(a.INITIAL_COUNT, 100)
    assert box.clock.timeline.next_due is None
    box.clock.to(130)
    assert box.read(a.CURRENT_COUNT) == 70
    box.write(a.LVT_TIMER, 0x40 | PERIODIC)
    box.clock.to(200)
    assert box.apic.pending


def test_changing_the_divisor_goes_on_from_the_count() -> None:
    box = Box()
    box.write(a.DIVIDE, 0xB)
    box.write(a.LVT_TIMER, 0x40)
    box.write(a.INITIAL_COUNT, 100)
    box.clock.to(60)
    box.write(a.DIVIDE, 0)
    assert box.read(a.CURRENT_COUNT) == 40
    box.clock.to(139)
    assert not box.apic.pending
    box.clock.to(140)
    assert box.apic.pending


def test_priorities() -> None:
    """TPR holds back its class and those below; what is in service too; EOI ends the highest."""
    box = Box()
    for vector in (0x31, 0x52, 0x58):
        box.apic.accept(vector)
    assert box.read(a.IRR + 0x10) == 1 << 0x11
    assert box.read(a.IRR + 0x20) == 1 << 0x12 | 1 << 0x18
    box.write(a.TPR, 0x50)
    assert not box.apic.pending
    box.write(a.TPR, 0x4F)
    assert box.apic.acknowledge() == 0x58
    assert (box.read(a.PPR), box.read(a.ISR + 0x20)) == (0x50, 1 << 0x18)
    assert not box.apic.pending, "0x52 is of the same class"
    box.write(a.EOI, 0)
    assert box.apic.acknowledge() == 0x52
    box.write(a.TPR, 0)
    box.apic.accept(0x61)
    assert box.apic.acknowledge() == 0x61, "nested"
    box.write(a.EOI, 0)
    box.write(a.EOI, 0)
    assert box.apic.acknowledge() == 0x31


def test_a_request_that_went_away_is_spurious() -> None:
    box = Box()
    box.write(a.SVR, 0x1EF)
    assert box.apic.acknowledge() == 0xEF
    assert box.read(a.ISR + 0x70) == 0


@pytest.mark.parametrize(("high", "low", "arrives"), [
    (0, 0x00040041, True), (0, 0x00080041, True), (0, 0x000C0041, False), (0, 0x00000041, True), (5, 0x00000041, False),
    (0xFF, 0x00000041, True), (2, 0x00000841, True), (4, 0x00000841, False), (0, 0x00040441, False)])
def test_interprocessor_interrupts_reach_the_only_cpu_or_nobody(high: int, low: int, arrives: bool) -> None:
    box = Box()
    box.write(a.LDR, 0x03000000)
    box.write(a.ICR_HIGH, high << 24)
    box.write(a.ICR_LOW, low)
    assert box.apic.pending is arrives
    assert box.read(a.ICR_LOW) == low


def test_errors_are_latched_by_a_write() -> None:
    box = Box()
    box.write(a.LVT_ERROR, 0x99)
    box.write(a.ICR_LOW, 0x0004000F)
    box.read(0x3F0)
    assert box.read(a.ESR) == 0
    box.write(a.ESR, 0)
    assert box.read(a.ESR) == 0xA0
    assert box.apic.acknowledge() == 0x99
    box.apic.accept(3)
    box.write(a.ESR, 0)
    assert box.read(a.ESR) == 0x40
    box.write(a.ESR, 0)
    assert box.read(a.ESR) == 0


def test_disabled_by_software_its_entries_stay_masked() -> None:
    box = Box()
    box.write(a.SVR, 0xFF)
    box.write(a.LVT_TIMER, 0x40)
    assert box.read(a.LVT_TIMER) == 0x40 | MASKED
    box.apic.accept(0x50)
    assert not box.apic.pending


@given(st.lists(st.tuples(st.sampled_from(["read", "write", "time"]), st.integers(0, 0x3FF).map(lambda n: n << 2), st.integers(0, 0xFFFFFFFF))))
def test_any_access_is_defined_and_state_goes_round(steps: list[tuple[str, int, int]]) -> None:
    box = Box()
    for what, offset, value in steps:
        if what == "time":
            box.clock.to(box.clock.now + value % 100_000)
        elif what == "read":
            assert 0 <= box.read(offset) <= 0xFFFFFFFF
        else:
            box.write(offset, value)
    other = a.Lapic(box.clock.timeline, box.pair, lambda: None)
    other.from_state(box.apic.state())
    assert other.state() == box.apic.state()
    assert (other.pending, other.current_count()) == (box.apic.pending, box.apic.current_count())


# ---- in the machine
TIMER = (f"mov dword ptr [{a.BASE + a.DIVIDE:#x}], 0xb; mov dword ptr [{a.BASE + a.LVT_TIMER:#x}], {{lvt:#x}};"
         f"mov dword ptr [{a.BASE + a.INITIAL_COUNT:#x}], {{count}};")
TICK = f"inc dword ptr [{DATA}]; mov dword ptr [{a.BASE + a.EOI:#x}], 0; iretd"


@pytest.mark.parametrize("path", PATHS)
def test_the_timer_interrupts_code(path: str) -> None:
    bench = Bench(TIMER.format(lvt=0x40 | PERIODIC, count=500) + f"sti; busy: cmp dword ptr [{DATA}], 7; jb busy; mov eax, 5;" + DEBUG_EXIT,
                  {0x40: TICK}, path=path)
    assert bench.run().exit_code == 5
    events = bench.counts().events
    assert (events["interrupt.delivered"], events["io.device"]) == (7, 3 + 7 + 1)
    assert bench.machine.time - 7 * 500 in range(20)


@pytest.mark.parametrize("path", PATHS)
def test_a_one_shot_wakes_from_halt_once(path: str) -> None:
    bench = Bench(TIMER.format(lvt=0x40, count=5000) + "sti; hlt; hlt", {0x40: TICK}, path=path)
    assert bench.run().reason is StopReason.HALTED
    assert bench.read32(DATA) == 1
    assert bench.counts().events["idle"] == 2
    assert bench.machine.time in range(5003, 5020)


@pytest.mark.parametrize("path", PATHS)
def test_the_task_priority_holds_the_timer_back(path: str) -> None:
    source = (f"mov dword ptr [{a.BASE + a.TPR:#x}], 0x40;" + TIMER.format(lvt=0x40, count=10) + "sti; mov ecx, 50; again: dec ecx; jnz again;"
              f"mov eax, [{DATA}]; mov dword ptr [{a.BASE + a.TPR:#x}], 0x3f; nop; jmp next; next: mov edx, [{DATA}]; cli; hlt")
    bench = Bench(source, {0x40: TICK}, path=path)
    bench.run()
    bench.cpu.load()
    assert (bench.cpu.gpr(RAX), bench.cpu.gpr(RDX)) == (0, 1)


@pytest.mark.parametrize("path", PATHS)
def test_the_apic_is_reached_through_page_tables_in_long_mode(path: str) -> None:
    bench = long_bench(f"mov eax, {a.BASE:#x}; mov ebx, [rax + {a.VERSION}]; mov dword ptr [rax + {a.TPR}], 0x73; mov rdx, cr8; hlt", path, {})
    bench.run()
    bench.cpu.load()
    assert (bench.cpu.gpr(RBX), bench.cpu.gpr(RDX)) == (0x30014, 7)
    assert bench.counts().events["io.device"] == 2


@pytest.mark.parametrize("path", PATHS)
def test_cr8_is_the_task_priority(path: str) -> None:
    source = "mov r9d, 9; mov cr8, r9; xor r9, r9; mov r9, cr8; mov eax, r9d; mov ebx, 16; mov rsp, 0x9000; mov cr8, rbx"
    bench = long_bench(source, path, {13: ("hlt", 0, 0)})
    bench.run()
    bench.cpu.load()
    assert (bench.cpu.gpr(RAX), bench.machine.lapic.tpr) == (9, 0x90)
    assert (bench.counts().events["machine.mov_to_cr"], bench.counts().events["machine.mov_from_cr"]) == (3 + 1, 1)


@pytest.mark.parametrize("path", PATHS)
def test_lowering_cr8_lets_an_interrupt_in(path: str) -> None:
    source = (f"mov eax, 15; mov cr8, rax; mov rsp, 0x9000; mov ebx, {a.BASE:#x}; mov dword ptr [rbx + {a.ICR_LOW}], 0x40041; sti; nop;"
              "mov ecx, 5; xor eax, eax; mov cr8, rax; mov ecx, 6; hlt")
    bench = long_bench(source, path, {0x41: ("mov edx, ecx; hlt", 0, 0)})
    bench.run()
    bench.cpu.load()
    assert bench.cpu.gpr(RDX) == 5


@pytest.mark.parametrize("path", PATHS)
def test_the_msr_turns_it_off(path: str) -> None:
    source = f"mov dword ptr [{a.BASE + a.LVT_LINT0:#x}], {MASKED}; mov ecx, 0x1b; rdmsr; mov ebx, eax; and eax, 0xfffff7ff; wrmsr; rdmsr; hlt"
    bench = Bench(source, path=path)
    bench.run()
    bench.cpu.load()
    assert (bench.cpu.gpr(RBX), bench.cpu.gpr(RAX)) == (0xFEE00900, 0xFEE00100)
    assert not bench.machine.lapic.on
