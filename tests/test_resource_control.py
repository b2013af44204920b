"""Resource control: a guest that disables interrupts and loops cannot keep the machine from its VMM.

Popek & Goldberg, CACM 17(7), 1974. The guest sets its own timer, says CLI and jumps to itself. Natively nothing
happens any more. Under a VMM the *physical* timer interrupts within a bound and reaches the VMM; what the guest asked for
waits for its STI. A paravirtual guest has no CLI that means anything: it masks events, and its timer is the VMM's.
"""

from __future__ import annotations

import itertools
import struct

import pvlab
import pytest
from machinelab import DATA, DEBUG_EXIT, PATHS, asm, kernel
from test_virtual_devices import KINDS, PIC, TICK, boot, every_path, every_vmm, pit

from vmlab.errors import GuestBudget
from vmlab.machine.devices.pit import time_of
from vmlab.strategies.base import Strategy
from vmlab.strategies.native import Native
from vmlab.vmm import xen

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
    taken = noted(strategy)
    spend(strategy)
    in_time(taken)
    events = strategy.snapshot().events
    assert events["interrupt.monitor"] == len(taken)
    assert events.get("interrupt.injected", 0) == 0
    assert strategy.read_guest(DATA, 4) == bytes(4), "the guest's handler never ran"


def noted(strategy: Strategy) -> list[int]:
    """When the VMM gets its interrupts, as they come."""
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
    return taken


def in_time(taken: list[int]) -> None:
    """As often as the guest's timer was to tick, and none late."""
    period = time_of(COUNT)
    expected = BUDGET // period
    assert expected - 2 <= len(taken) <= expected
    assert all(period - LATE < later - sooner < period + LATE for sooner, later in itertools.pairwise(taken))


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


def paravirtual(bits: int, rest: str, path: str) -> Strategy:
    """A guest with a periodic timer and an event for it, events masked as at its start, that then does ``rest``."""
    calls: list[tuple[int, ...]] = [(32, xen.EVTCHNOP_BIND_VIRQ, pvlab.DATA), (24, xen.VCPUOP_SET_PERIODIC_TIMER, 0, pvlab.DATA + 16)]
    exits = asm("mov eax, 7;" + pvlab.EXIT64, 0, 64) if bits == 64 else pvlab.mov(pvlab.EAX, 7) + pvlab.EXIT_WITH_EAX
    handler = 0x103000
    calls.append((4, handler, handler, 0) if bits == 64 else (4, xen.FLAT_RING1_CS, handler, xen.FLAT_RING1_CS, handler))
    code = b"".join(asm(pvlab.call64(*c), 0, 64) if bits == 64 else pvlab.call(*c) for c in calls)
    block = asm(pvlab.call64(29, xen.SCHEDOP_BLOCK, 0), 0, 64) if bits == 64 else pvlab.call(29, xen.SCHEDOP_BLOCK, 0)
    strategy = pvlab.guest(code + asm(rest, 0, bits) + block, struct.pack("<IIIxxxxQ", xen.VIRQ_TIMER, 0, 0, time_of(COUNT)), path=path, bits=bits)
    strategy.domain.write(handler, exits)
    return strategy


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bits", [32, 64])
def test_a_paravirtual_guest_that_masks_events_keeps_nobody_from_the_timer(bits: int, path: str) -> None:
    strategy = paravirtual(bits, "again: jmp again", path)
    taken = noted(strategy)
    spend(strategy)
    in_time(taken)
    events = strategy.snapshot().events
    assert events["interrupt.monitor"] == events["crossing.interrupt"] == len(taken)
    assert events.get("event.upcall", 0) == 0


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bits", [32, 64])
def test_its_event_waits_until_it_lets_events_in(bits: int, path: str) -> None:
    strategy = paravirtual(bits, "mov ecx, 60000; again: dec ecx; jnz again", path)
    assert strategy.run(1_000_000).exit_code == 7
    events = strategy.snapshot().events
    assert events["interrupt.monitor"] >= 1
    assert events["event.upcall"] == 1
    assert events.get("idle", 0) == 1, "it asked to wait, and did not have to"
