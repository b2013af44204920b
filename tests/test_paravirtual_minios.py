"""minios under the paravirtual VMM, in both widths: native's outcome for every workload, and what each service costs in transitions."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
from machinelab import PATHS
from pvlab import check_counts

from vmlab import guests
from vmlab.errors import GuestError
from vmlab.experiment.cell import run_cell
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
#: By guest: how its kernel's hypercalls enter the hypervisor.
GATES = {"minios": "trap.int", "minios64": "trap.syscall"}
every_width = pytest.mark.parametrize("guest", GATES)


@dataclass
class Run:
    """One run to its end."""

    machine: Machine
    strategy: Strategy
    exit_code: int | None
    outcome: bytes
    guest: str = "minios"
    marks: dict[str, Snapshot] = field(default_factory=dict)

    @property
    def roi(self) -> Snapshot:
        return self.marks["vmlab_roi_end"].minus(self.marks["vmlab_roi_begin"])

    @property
    def counts(self) -> dict[str, int]:
        """What the kernel counted of its own work."""
        image = guests.load(self.guest)
        return {name.removeprefix("vmlab_count_"): struct.unpack("<I", self.strategy.read_guest(at, 4))[0]
                for name, at in image.symbols.items() if name.startswith("vmlab_count_")}

    def seen(self) -> tuple[object, ...]:
        assert self.machine.disk is not None
        return self.exit_code, bytes(self.machine.console), self.outcome, self.machine.disk.content


def run(technique: type[Strategy], workload: str, path: str | None = None, chosen: Mapping[str, str] | None = None, guest: str = "minios",
        **more: object) -> Run:
    image = guests.load(guest)
    machine = Machine(path=path, disk=DISK)
    strategy = technique(machine, dict(chosen or {}))
    found = Run(machine, strategy, None, b"", guest)
    for symbol in ("vmlab_roi_begin", "vmlab_roi_end"):
        strategy.watch(image.symbol(symbol), lambda at, symbol=symbol: found.marks.setdefault(symbol, strategy.snapshot(at)))
    values = {"guest": guest, "workload": workload, "iterations": 50, **SMALL.get(workload, {}), **more}
    strategy.load(image, guests.command_line(values))
    found.exit_code = strategy.run(100_000_000).exit_code
    start, end = image.symbol("vmlab_outcome_start"), image.symbol("vmlab_outcome_end")
    found.outcome = strategy.read_guest(start, end - start)
    return found


def paravirtual(workload: str, path: str | None = None, chosen: Mapping[str, str] | None = None, guest: str = "minios", **more: object) -> Run:
    return run(Paravirtualization, workload, path, {"memory": "direct", **(chosen or {})}, guest, **more)


#: All workloads of the 64-bit kernel are in tests/test_guests_minios_everywhere.py.
_RUNS = [*(("minios", workload, "auto") for workload in sorted(set(WORKLOADS) - {"bad"})),
         *(("minios", workload, "portable") for workload in ("forkwait", "io", "mixed", "protfault")),
         *(("minios64", workload, "auto") for workload in ("build", "fork", "idle", "random", "server")),
         *(("minios64", workload, "portable") for workload in ("forkwait", "io", "protfault"))]


@pytest.mark.parametrize(("guest", "workload", "path"), _RUNS)
def test_the_outcome_is_the_bare_machines(guest: str, workload: str, path: str) -> None:
    native, pv = run(Native, workload, path, guest=guest), paravirtual(workload, path, guest=guest)
    assert pv.exit_code == 0
    assert pv.seen() == native.seen()
    assert isinstance(pv.strategy, Paravirtualization)
    assert pv.strategy.refused == []
    events = pv.strategy.snapshot().events
    assert "trap.gp" not in events
    check_counts(pv.strategy)
    if guest == "minios64":
        assert pv.roi.user == pytest.approx(native.roi.user, abs=2)     # its programs are the same; ticks come at other moments


@pytest.mark.parametrize(("workload", "hypervisor"), [("mixed", "type1"), ("syscall", "type1"), ("io", "type2")])
def test_64_bits_give_the_same_ledger_by_every_way_to_the_cpu(workload: str, hypervisor: str) -> None:
    ledgers = []
    for path in PATHS:
        ran = paravirtual(workload, path, {"hypervisor": hypervisor}, "minios64", iterations=3)
        ledgers.append((ran.strategy.snapshot(), ran.marks, ran.seen()))
    assert all(ledger == ledgers[0] for ledger in ledgers)
    assert ("host.world_switch" in ledgers[0][0].events) == (hypervisor == "type2")


@pytest.mark.parametrize("disk", ["ring", "port"])
@pytest.mark.parametrize("workload", ["io", "mixed", "build"])
@every_width
def test_both_ways_to_the_disk_end_alike(guest: str, workload: str, disk: str) -> None:
    assert paravirtual(workload, guest=guest, disk=disk).seen() == run(Native, workload, guest=guest).seen()


@pytest.mark.parametrize(("guest", "workload", "batch"), [
    *(("minios", workload, batch) for workload in ("fork", "mmap", "random", "build") for batch in (1, 7, 512)),
    *(("minios64", workload, batch) for workload in ("fork", "random") for batch in (1, 512))])
def test_batching_changes_no_outcome(guest: str, workload: str, batch: int) -> None:
    assert paravirtual(workload, guest=guest, batch=batch).seen() == run(Native, workload, guest=guest).seen()


@pytest.mark.parametrize("phase", [0, 1000, 333_333])
@every_width
def test_moving_the_timers_phase_changes_no_outcome(guest: str, phase: int) -> None:
    first = run(Native, "server", guest=guest, timer=100_000)
    moved = paravirtual("server", guest=guest, timer=100_000, phase=phase)
    assert moved.seen() == first.seen()
    assert moved.strategy.counts["hypercall.set_timer_op"] > 3


# --- what a service costs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("workload", ["null_call", "syscall"])
def test_a_system_call_does_not_enter_the_hypervisor_on_its_way_in_nor_out(workload: str) -> None:
    roi = paravirtual(workload, iterations=200).roi
    assert roi.events["interrupt.software"] == 201
    assert roi.events["retired.iret"] == 201
    assert [kind for kind in roi.events if kind.startswith(("trap.", "hypercall.", "vmm.", "reflect."))] == []


@pytest.mark.parametrize("workload", ["null_call", "syscall"])
def test_in_64_bits_a_system_call_is_two_crossings_with_a_load_of_cr3_each(workload: str) -> None:
    """By INT 0x80 and by SYSCALL: into the hypervisor and on in the kernel, and out by HYPERVISOR_iret."""
    roi = paravirtual(workload, guest="minios64", iterations=200).roi
    assert roi.events["crossing.system_call"] == roi.events["crossing.return"] == roi.events["hypercall.iret"] == 201
    assert roi.events["guest.side"] == 2 * 201
    assert roi.events["vmm.inject"] == 201
    by_int = 201 if workload == "null_call" else 0
    assert roi.events.get("trap.int", 0) == by_int
    assert roi.events["trap.syscall"] == 2 * 201 - by_int == roi.events["retired.syscall"]
    assert "reflect.14" not in roi.events and "hypercall.mmuext_op" not in roi.events


def test_in_64_bits_each_change_of_page_tables_empties_the_tlb() -> None:
    """By the TLB model, and every miss is a walk of four levels: a paravirtual guest has no large pages."""
    events = run_cell("paravirtualization", {"guest": "minios64", "workload": "syscall", "iterations": 20, "memory": "direct", "tlb": "on"})["events"]
    assert events["guest.side"] == 2 * 21
    assert events["tlb.flush.full"] == events["guest.side"]
    misses = events["tlb.miss.data"] + events["tlb.miss.instruction"]
    assert misses > 2 * events["guest.side"]
    assert events["walk.reference.guest"] == 4 * misses
    native = run_cell("native", {"guest": "minios64", "workload": "syscall", "iterations": 20, "tlb": "on"})["events"]
    assert "tlb.flush.full" not in native


def test_in_64_bits_the_task_priority_is_a_variable_of_the_kernels() -> None:
    """MOV to CR8 becomes one store: no transition."""
    ran = paravirtual("cr8", guest="minios64", iterations=500)
    native = run(Native, "cr8", guest="minios64", iterations=500)
    assert native.roi.events["retired.mov_to_cr"] == 501
    assert "retired.mov_to_cr" not in ran.roi.events
    assert ran.roi.events["trap.syscall"] < 10
    assert ran.roi.events["machine.store"] >= native.roi.events["machine.store"] + 501


def test_a_page_fault_is_one_entry_for_the_fault_and_one_for_the_mapping() -> None:
    """First touches: #PF into the hypervisor, which goes on in the guest's handler; one mmu_update; and back: by IRET of the guest
    itself, in 64 bits by one hypercall more."""
    for guest in GATES:
        run_ = paravirtual("pagefault", guest=guest, iterations=300)
        events = run_.roi.events
        assert events["trap.pf"] == events["reflect.14"] == run_.counts["faults"]
        assert events["hypercall.mmu_update"] >= 300
        assert events.get("hypercall.iret", 0) == (events["trap.pf"] if guest == "minios64" else 0)
        assert events.get("guest.side", 0) == 2 * events.get("hypercall.iret", 0)
        assert events[GATES[guest]] == sum(n for kind, n in events.items() if kind.startswith("hypercall.")) - _inside_multicalls(events, guest)


def _inside_multicalls(events: Mapping[str, int], guest: str) -> int:
    """Hypercalls that came in by a multicall: all those of a kind beyond the transitions there were."""
    return sum(n for kind, n in events.items() if kind.startswith("hypercall.")) - events[GATES[guest]]


@every_width
def test_a_context_switch_is_one_transition(guest: str) -> None:
    """The new stack and the new root, or roots, go in one multicall. The other process ends in the region, and asks once that its pages go."""
    run_ = paravirtual("ctxsw", guest=guest, iterations=100)
    events, switches = run_.roi.events, run_.counts["cr3_loads"]
    assert abs(events["hypercall.multicall"] - switches) <= 2
    assert abs(events[GATES[guest]] - events.get("crossing.return", 0) - switches - 1) <= 2
    assert events["hypercall.stack_switch"] == events["mmuext.new_baseptr"]
    assert events.get("mmuext.new_user_baseptr", 0) == (events["mmuext.new_baseptr"] if guest == "minios64" else 0)


@every_width
def test_batches_of_k_divide_the_updates_hypercalls_by_k(guest: str) -> None:
    """1000 changes of an entry in a row, in force behind the loop: 1000 / K hypercalls, exactly."""
    for batch in (1, 2, 10, 100, 300) if guest == "minios" else (2, 300):
        events = paravirtual("ptemod", guest=guest, iterations=1000, batch=batch).roi.events
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
@every_width
def test_a_sector_by_the_ring_is_one_hypercall_and_by_ports_seven(guest: str, disk: str, calls: int) -> None:
    run_ = paravirtual("io", guest=guest, disk=disk, iterations=20, timer=0)
    events, requests = run_.roi.events, run_.counts["disk_requests"]
    found = events.get("hypercall.event_channel_op", 0) + events.get("hypercall.port_io", 0)
    assert abs(found - calls * requests) <= calls + 1
    assert events["vmm.disk"] == requests


@every_width
def test_every_hypercall_is_one_transition_but_for_those_in_multicalls(guest: str) -> None:
    events = paravirtual("mixed", guest=guest).strategy.snapshot().events
    assert events[GATES[guest]] <= sum(n for kind, n in events.items() if kind.startswith("hypercall."))


@pytest.mark.parametrize("bad", ["stack-overflow", "no-idt", "recursive-fault", "stray-pointer"])
@every_width
def test_a_kernel_that_breaks_itself_ends_with_a_reason(guest: str, bad: str) -> None:
    try:
        ended = paravirtual("bad", guest=guest, bad=bad)
    except GuestError as error:
        assert "stack" in str(error)
    else:
        assert ended.exit_code == 2
        assert b"minios: exception" in ended.machine.console


# --- every service by hypercall: the microkernel's step -------------------------------------------------------

SERVICES = {"memory": "direct", "services": "hypercall"}


@pytest.mark.parametrize("workload", ["null_call", "forkwait", "ctxsw", "pagefault", "mixed", "io", "idle"])
@every_width
def test_with_every_service_by_hypercall_the_outcome_is_the_same(guest: str, workload: str) -> None:
    assert paravirtual(workload, chosen=SERVICES, guest=guest).seen() == run(Native, workload, guest=guest).seen()


@pytest.mark.parametrize("services", ["direct", "hypercall"])
@pytest.mark.parametrize("workload", ["mixed", "io", "random"])
@every_width
def test_each_entry_into_the_hypervisor_is_a_crossing_for_one_service(guest: str, workload: str, services: str) -> None:
    events = paravirtual(workload, chosen={"services": services}, guest=guest).strategy.snapshot().events
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
