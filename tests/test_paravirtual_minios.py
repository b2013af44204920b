"""minios under the paravirtual VMM: native's outcome for every workload, and what each service costs in transitions."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
from pvlab import check_counts

from vmlab import guests
from vmlab.errors import GuestError
from vmlab.guests.minios.workloads import WORKLOADS
from vmlab.ledger import Snapshot
from vmlab.machine.pc import Machine
from vmlab.strategies.base import Strategy
from vmlab.strategies.native import Native
from vmlab.strategies.paravirtual import Paravirtualization

SMALL: Mapping[str, Mapping[str, int]] = {
    "fork": {"iterations": 4, "pages": 40}, "forkwait": {"iterations": 10}, "mmap": {"iterations": 5}, "pagefault": {"iterations": 40},
    "build": {"iterations": 4, "pages": 20}, "server": {"iterations": 30}, "chase": {"iterations": 200, "pages": 40}, "compute": {"iterations": 5},
    "mixed": {"iterations": 4}, "random": {"iterations": 30, "seeds": 3}, "ctxsw": {"iterations": 40}, "io": {"iterations": 6},
    "idle": {"iterations": 3},
}
DISK = bytes(range(256)) * 2 * 128


@dataclass
class Run:
    """One run to its end."""

    machine: Machine
    strategy: Strategy
    exit_code: int | None
    outcome: bytes
    marks: dict[str, Snapshot] = field(default_factory=dict)

    @property
    def roi(self) -> Snapshot:
        return self.marks["vmlab_roi_end"].minus(self.marks["vmlab_roi_begin"])

    @property
    def counts(self) -> dict[str, int]:
        """What the kernel counted of its own work."""
        image = guests.load("minios")
        return {name.removeprefix("vmlab_count_"): struct.unpack("<I", self.strategy.read_guest(at, 4))[0]
                for name, at in image.symbols.items() if name.startswith("vmlab_count_")}

    def seen(self) -> tuple[object, ...]:
        assert self.machine.disk is not None
        return self.exit_code, bytes(self.machine.console), self.outcome, self.machine.disk.content


def run(technique: type[Strategy], workload: str, path: str | None = None, chosen: Mapping[str, str] | None = None, **more: object) -> Run:
    image = guests.load("minios")
    machine = Machine(path=path, disk=DISK)
    strategy = technique(machine, dict(chosen or {}))
    found = Run(machine, strategy, None, b"")
    for symbol in ("vmlab_roi_begin", "vmlab_roi_end"):
        strategy.watch(image.symbol(symbol), lambda at, symbol=symbol: found.marks.setdefault(symbol, strategy.snapshot(at)))
    values = {"guest": "minios", "workload": workload, "iterations": 50, **SMALL.get(workload, {}), **more}
    strategy.load(image, guests.command_line(values))
    found.exit_code = strategy.run(100_000_000).exit_code
    start, end = image.symbol("vmlab_outcome_start"), image.symbol("vmlab_outcome_end")
    found.outcome = strategy.read_guest(start, end - start)
    return found


def paravirtual(workload: str, path: str | None = None, chosen: Mapping[str, str] | None = None, **more: object) -> Run:
    return run(Paravirtualization, workload, path, {"memory": "direct", **(chosen or {})}, **more)


@pytest.mark.parametrize(("workload", "path"), [
    *((workload, "auto") for workload in sorted(set(WORKLOADS) - {"bad"})),
    *((workload, "portable") for workload in ("forkwait", "io", "mixed", "protfault")),
])
def test_the_outcome_is_the_bare_machines(workload: str, path: str) -> None:
    native, pv = run(Native, workload, path), paravirtual(workload, path)
    assert pv.exit_code == 0
    assert pv.seen() == native.seen()
    assert isinstance(pv.strategy, Paravirtualization)
    assert pv.strategy.refused == []
    events = pv.strategy.snapshot().events
    assert "trap.gp" not in events
    check_counts(pv.strategy)


@pytest.mark.parametrize("disk", ["ring", "port"])
@pytest.mark.parametrize("workload", ["io", "mixed", "build"])
def test_both_ways_to_the_disk_end_alike(workload: str, disk: str) -> None:
    assert paravirtual(workload, disk=disk).seen() == run(Native, workload).seen()


@pytest.mark.parametrize("batch", [1, 7, 512])
@pytest.mark.parametrize("workload", ["fork", "mmap", "random", "build"])
def test_batching_changes_no_outcome(workload: str, batch: int) -> None:
    assert paravirtual(workload, batch=batch).seen() == run(Native, workload).seen()


@pytest.mark.parametrize("phase", [0, 1000, 333_333])
def test_moving_the_timers_phase_changes_no_outcome(phase: int) -> None:
    first = run(Native, "server", timer=100_000)
    moved = paravirtual("server", timer=100_000, phase=phase)
    assert moved.seen() == first.seen()
    assert moved.strategy.counts["hypercall.set_timer_op"] > 3


# --- what a service costs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("workload", ["null_call", "syscall"])
def test_a_system_call_does_not_enter_the_hypervisor_on_its_way_in_nor_out(workload: str) -> None:
    roi = paravirtual(workload, iterations=200).roi
    assert roi.events["interrupt.software"] == 201
    assert roi.events["retired.iret"] == 201
    assert [kind for kind in roi.events if kind.startswith(("trap.", "hypercall.", "vmm.", "reflect."))] == []


def test_a_page_fault_is_one_entry_for_the_fault_and_one_for_the_mapping() -> None:
    """First touches: #PF into the hypervisor, which goes on in the guest's handler; one mmu_update; and IRET by the guest itself."""
    run_ = paravirtual("pagefault", iterations=300)
    events = run_.roi.events
    assert events["trap.pf"] == events["reflect.14"] == run_.counts["faults"]
    assert events["hypercall.mmu_update"] >= 300
    assert events["trap.int"] == sum(n for kind, n in events.items() if kind.startswith("hypercall.")) - _inside_multicalls(events)
    assert "hypercall.iret" not in events


def _inside_multicalls(events: Mapping[str, int]) -> int:
    """Hypercalls that came in by a multicall: all those of a kind beyond the transitions there were."""
    return sum(n for kind, n in events.items() if kind.startswith("hypercall.")) - events["trap.int"]


def test_a_context_switch_is_one_transition() -> None:
    """The new stack and the new root go in one multicall."""
    run_ = paravirtual("ctxsw", iterations=100)
    events, switches = run_.roi.events, run_.counts["cr3_loads"]
    assert abs(events["hypercall.multicall"] - switches) <= 2
    assert abs(events["trap.int"] - switches) <= 2
    assert events["hypercall.stack_switch"] == events["mmuext.new_baseptr"]


def test_batches_of_k_divide_the_updates_hypercalls_by_k() -> None:
    """1000 changes of an entry in a row, in force behind the loop: 1000 / K hypercalls, exactly."""
    for batch in (1, 2, 10, 100, 300):
        events = paravirtual("ptemod", iterations=1000, batch=batch).roi.events
        assert events["mmu.update"] == 1001         # one before the warm part begins
        assert events["hypercall.mmu_update"] == -(-1000 // batch) + 1
        assert events["mmuext.tlb_flush"] == 2      # behind each loop


def test_a_forks_updates_are_batched_where_they_need_not_be_in_force_at_once() -> None:
    """A series of n changes that end in one that must be in force is ceil(n / K) hypercalls."""
    sent = {batch: paravirtual("fork", iterations=8, pages=200, batch=batch).roi.events for batch in (1, 4, 16, 64, 512)}
    updates, series = sent[1]["hypercall.mmu_update"], sent[512]["hypercall.mmu_update"]
    assert sent[1]["mmu.update"] == updates + sent[1]["hypercall.update_va_mapping"]
    for batch, events in sent.items():
        assert abs(events["mmu.update"] - sent[1]["mmu.update"]) <= 1      # what waits in the queue at the region's ends
        assert updates / batch <= events["hypercall.mmu_update"] <= updates / batch + series
    assert sent[1]["trap.int"] > 3 * sent[64]["trap.int"]


@pytest.mark.parametrize(("disk", "calls"), [("ring", 1), ("port", 7)])
def test_a_sector_by_the_ring_is_one_hypercall_and_by_ports_seven(disk: str, calls: int) -> None:
    run_ = paravirtual("io", disk=disk, iterations=20, timer=0)
    events, requests = run_.roi.events, run_.counts["disk_requests"]
    found = events.get("hypercall.event_channel_op", 0) + events.get("hypercall.port_io", 0)
    assert abs(found - calls * requests) <= calls + 1
    assert events["vmm.disk"] == requests


def test_every_hypercall_is_one_transition_but_for_those_in_multicalls() -> None:
    events = paravirtual("mixed").strategy.snapshot().events
    entries = events["trap.int"]
    assert entries <= sum(n for kind, n in events.items() if kind.startswith("hypercall."))


@pytest.mark.parametrize("bad", ["stack-overflow", "no-idt", "recursive-fault", "stray-pointer"])
def test_a_kernel_that_breaks_itself_ends_with_a_reason(bad: str) -> None:
    try:
        ended = paravirtual("bad", bad=bad)
    except GuestError as error:
        assert "stack" in str(error)
    else:
        assert ended.exit_code == 2
        assert b"minios: exception" in ended.machine.console


# --- every service by hypercall: the microkernel's step -------------------------------------------------------

SERVICES = {"memory": "direct", "services": "hypercall"}


@pytest.mark.parametrize("workload", ["null_call", "forkwait", "ctxsw", "pagefault", "mixed", "io", "idle"])
def test_with_every_service_by_hypercall_the_outcome_is_the_same(workload: str) -> None:
    assert paravirtual(workload, chosen=SERVICES).seen() == run(Native, workload).seen()


@pytest.mark.parametrize("services", ["direct", "hypercall"])
@pytest.mark.parametrize("workload", ["mixed", "io", "random"])
def test_each_entry_into_the_hypervisor_is_a_crossing_for_one_service(workload: str, services: str) -> None:
    events = paravirtual(workload, chosen={"services": services}).strategy.snapshot().events
    entries = sum(n for kind, n in events.items() if kind.startswith("trap.")) + events["interrupt.delivered"]
    assert sum(n for kind, n in events.items() if kind.startswith("crossing.")) == entries


def test_a_system_call_by_hypercall_is_two_crossings_and_direct_none() -> None:
    roi = paravirtual("null_call", chosen=SERVICES, iterations=200).roi
    assert roi.events["crossing.system_call"] == roi.events["crossing.return"] == 201
    assert "retired.iret" not in roi.events


def test_a_sector_by_hypercall_counts_its_crossings() -> None:
    """Six registers written, one read, and one event in and out for each request."""
    ran = paravirtual("io", chosen=SERVICES, iterations=20, timer=0)
    requests = ran.counts["disk_requests"]
    assert ran.roi.events["crossing.device"] == pytest.approx(7 * requests, abs=8)
