"""Resource control: a guest that disables interrupts and loops cannot keep the machine from its VMM.

Popek & Goldberg, CACM 17(7), 1974. The guest sets its own timer, says CLI and jumps to itself. Natively nothing
happens any more. Under a VMM the *physical* timer interrupts within a bound and reaches the VMM; what the guest asked for
waits for its STI.
"""

from __future__ import annotations

import itertools

import pytest
from machinelab import DATA, DEBUG_EXIT, PATHS, kernel
from test_virtual_devices import KINDS, PIC, TICK, boot, every_path, every_vmm, pit

from vmlab.errors import GuestBudget
from vmlab.machine.devices.pit import time_of
from vmlab.strategies.base import Strategy
from vmlab.strategies.native import Native

BUDGET = 120_000
#: Clocks of the guest's timer, and what comes on top: a block, and the two clocks that arming takes.
COUNT, LATE = 119, 3_000
FOR_EVER = PIC + pit(2, COUNT) + "cli; again: jmp again"
#: Interrupts off for much longer than the timer runs; then on: how many ticks were seen before STI, and after.
FOR_LONG = (PIC + pit(0, COUNT) + f"cli; mov ecx, 60000; again: dec ecx; jnz again; mov ebx, [{DATA}]; sti; nop; jmp on; on: mov eax, [{DATA}];"
            "shl ebx, 8; or eax, ebx;" + DEBUG_EXIT)


def started(technique: str, source: str, path: str) -> Strategy:
    kind, chosen = KINDS.get(technique, (Native, {}))
    return boot(kind, kernel(source, {0x20: TICK}), path, **chosen)


def spend(strategy: Strategy) -> None:
    with pytest.raises(GuestBudget):
        strategy.run(BUDGET)


@every_path
@every_vmm
def test_the_vmm_gets_the_machine_back_within_a_bound(technique: str, path: str) -> None:
    strategy = started(technique, FOR_EVER, path)
    taken = list[int]()
    machine = strategy.machine
    handler = machine.monitor
    assert handler is not None

    class Noting:
        """The VMM's own handlers, and when its interrupts came."""

        def interrupt(self) -> None:
            taken.append(machine.time)
            handler.interrupt()

        def exception(self, vector: int, error_code: int | None, *, software: bool) -> None:
            handler.exception(vector, error_code, software=software)

    machine.monitor = Noting()
    spend(strategy)
    period = time_of(COUNT)
    expected = BUDGET // period
    assert expected - 2 <= len(taken) <= expected
    assert all(period - LATE < later - sooner < period + LATE for sooner, later in itertools.pairwise(taken))
    events = strategy.snapshot().events
    assert events["interrupt.monitor"] == len(taken)
    assert events.get("interrupt.injected", 0) == 0
    assert strategy.read_guest(DATA, 4) == bytes(4), "the guest's handler never ran"


def test_natively_nothing_gets_through() -> None:
    strategy = started("native", FOR_EVER, "portable")
    spend(strategy)
    assert strategy.snapshot().events.get("interrupt.delivered", 0) == 0
    assert strategy.machine.intr.pending, "it waits"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("technique", ["native", *KINDS])
def test_the_guests_own_interrupt_waits_for_its_sti(technique: str, path: str) -> None:
    strategy = started(technique, FOR_LONG, path)
    assert strategy.run(1_000_000).exit_code == 0x001, "no tick before STI, one after it"
    if technique != "native":
        assert strategy.snapshot().events["interrupt.monitor"] == 1
