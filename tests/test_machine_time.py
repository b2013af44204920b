"""Virtual time: due events at block boundaries, HLT skips, the budget counts instructions only."""

from __future__ import annotations

import pytest
from machinelab import DATA, DEBUG_EXIT, PATHS, Bench

from vmlab.errors import GuestBudget
from vmlab.machine.pc import StopReason
from vmlab.machine.timeline import Timeline

# A loop of blocks of two instructions: 1 + 2·ECX, and 3 at the end.
LOOP = "mov ecx, 100; again: dec ecx; jnz again; xor eax, eax;" + DEBUG_EXIT
PIC = "".join(f"mov al, {value}; out {port}, al;" for port, value in (
    (0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xEF)))  # base 0x20, input 4 open


def test_timeline_order() -> None:
    now, seen = 0, list[str]()
    timeline = Timeline(lambda: now, lambda: None)
    timeline.at(5, lambda: seen.append("b"))
    timeline.at(3, lambda: seen.append("a"))
    timeline.at(5, lambda: seen.append("c"))
    dropped = timeline.at(4, lambda: seen.append("never"))
    timeline.at(9, lambda: seen.append("later"))
    timeline.cancel(dropped)
    timeline.cancel(None)
    assert timeline.next_due == 3
    now = 5
    timeline.run_due()
    assert seen == ["a", "b", "c"]
    assert timeline.next_due == 9


def test_what_is_made_due_now_runs_now() -> None:
    seen = list[int]()
    timeline = Timeline(lambda: 10, lambda: None)
    timeline.at(10, lambda: timeline.at(7, lambda: seen.append(1)) and None)
    timeline.run_due()
    assert seen == [1]
    assert timeline.next_due is None


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("due", "happens"), [(0, 0), (1, 3), (3, 3), (4, 5), (5, 5), (50, 51), (201, 201)])
def test_due_at_the_first_block_boundary_not_before(path: str, due: int, happens: int) -> None:
    """Block ends: 3 (mov, dec, jnz), then every 2 up to 201."""
    bench, seen = Bench(LOOP, path=path), list[int]()
    bench.machine.timeline.at(due, lambda: seen.append(bench.machine.time))
    assert bench.run().reason is StopReason.EXIT
    assert seen == [happens]
    assert bench.counts().kernel == 1 + 200 + 3


@pytest.mark.parametrize("path", PATHS)
def test_halt_skips_to_the_interrupt(path: str) -> None:
    handlers = {0x24: f"inc dword ptr [{DATA}]; rdtsc; mov [{DATA + 4}], eax; iretd"}
    bench = Bench(PIC + "sti; hlt; rdtsc; mov ebx, eax; mov eax, 7;" + DEBUG_EXIT, handlers, path=path)
    machine = bench.machine
    machine.timeline.at(1000, lambda: machine.pic.set_line(4, True))
    assert bench.run().exit_code == 7
    assert bench.read32(DATA) == 1
    assert bench.read32(DATA + 4) == 1000 + 1  # INC is complete when RDTSC reads
    assert bench.counts().events["idle"] == 1
    # 10 + STI + HLT, the handler's 4, RDTSC, 2 MOV, 2 of the exit.
    assert bench.counts().kernel == 12 + 4 + 3 + 2
    assert machine.time == 1000 + 4 + 3 + 2


@pytest.mark.parametrize("path", PATHS)
def test_halt_with_nothing_to_come(path: str) -> None:
    bench = Bench(PIC + "sti; hlt", path=path)
    bench.machine.timeline.at(500, lambda: None)  # wakes nobody
    assert bench.run().reason is StopReason.HALTED
    assert bench.machine.time == 500


def test_halt_with_interrupts_off_waits_for_nothing() -> None:
    bench = Bench("cli; hlt")
    bench.machine.timeline.at(500, lambda: None)
    assert bench.run().reason is StopReason.HALTED
    assert bench.machine.time == 2


def test_a_vain_periodic_source_does_not_halt_the_lab() -> None:
    bench = Bench("sti; hlt")
    timeline = bench.machine.timeline

    def tick() -> None:
        timeline.at(timeline.now + 1, tick)

    tick()
    assert bench.run().reason is StopReason.HALTED


@pytest.mark.parametrize("path", PATHS)
def test_the_budget_is_instructions(path: str) -> None:
    handlers = {0x24: "mov al, 0x20; out 0x20, al; iretd"}
    bench = Bench(PIC + "sti; hlt; again: jmp again", handlers, path=path)
    machine = bench.machine
    machine.timeline.at(1_000_000, lambda: machine.pic.set_line(4, True))
    with pytest.raises(GuestBudget, match="budget of 500"):
        bench.run(500)
    assert bench.counts().kernel == 500
    assert machine.time == 1_000_000 + 500 - 12


@pytest.mark.parametrize("path", PATHS)
def test_an_event_may_interrupt_a_string(path: str) -> None:
    """REP is broken off between two iterations, and goes on after the handler."""
    handlers = {0x24: f"mov [{DATA}], ecx; mov al, 0x20; out 0x20, al; iretd"}
    source = PIC + f"xor eax, eax; mov edi, {DATA + 16}; mov ecx, 100; sti; nop; rep stosb; mov eax, ecx;" + DEBUG_EXIT
    bench = Bench(source, handlers, path=path)
    machine = bench.machine
    machine.timeline.at(15, lambda: machine.pic.set_line(4, True))
    assert bench.run().exit_code == 0
    assert bench.counts().events["machine.string"] == 100
    assert bench.counts().events["interrupt.delivered"] == 1


