"""The paravirtual VMM: the same outcome as native, exact hypercall counts, and a guest that tries what it may not."""

from __future__ import annotations

import struct

import pytest
from pvlab import DATA, EAX, ENTRY, EXIT_WITH_EAX, INT82, STACK, call, guest, mov, run

from vmlab import guests
from vmlab.errors import GuestError, GuestFault, GuestRefused, UnsupportedByStrategy
from vmlab.guests import GuestImage
from vmlab.guests.nano.counts import expected
from vmlab.ledger import Snapshot
from vmlab.machine.memory import Ram
from vmlab.machine.pc import Machine
from vmlab.strategies.base import Strategy
from vmlab.strategies.native import Native
from vmlab.strategies.paravirtual import Paravirtualization
from vmlab.vmm import xen
from vmlab.vmm.xen.abi import NARROW, SharedInfo

ITERATIONS, DENSITY = 13, 100
PIC_PORTS = {0x20, 0x21, 0xA0, 0xA1}


class Run:
    """One guest run to its end, with the region of interest's counts."""

    def __init__(self, technique: type[Strategy], workload: str, path: str = "auto") -> None:
        image = guests.load("nano")
        self.machine = Machine(path=path)
        self.strategy = technique(self.machine)
        values = {"workload": workload, "iterations": ITERATIONS, "density": DENSITY}
        self.strategy.load(image, guests.command_line(values))
        marks: list[Snapshot] = []
        for symbol in ("vmlab_roi_begin", "vmlab_roi_end"):
            self.strategy.watch(image.symbol(symbol), lambda address: marks.append(self.strategy.snapshot(address)))
        self.stop = self.strategy.run(5_000_000)
        self.roi = marks[1].minus(marks[0])
        self.events = self.roi.events
        start, end = image.symbol("vmlab_outcome_start"), image.symbol("vmlab_outcome_end")
        self.outcome = self.strategy.read_guest(start, end - start)
        self.writes = [write for write in self.machine.device_log if write[0] not in PIC_PORTS]


WORKLOADS = sorted(guests.workloads("nano"))


@pytest.mark.parametrize("path", ["portable", "auto"])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_the_outcome_is_the_bare_machines(workload: str, path: str) -> None:
    native, pv = Run(Native, workload, path), Run(Paravirtualization, workload, path)
    assert pv.stop == native.stop
    assert pv.stop.exit_code == 0
    assert bytes(pv.machine.console) == bytes(native.machine.console)
    assert pv.outcome == native.outcome
    assert pv.writes == native.writes
    assert pv.strategy.refused == []


@pytest.mark.parametrize("workload", WORKLOADS)
def test_no_sensitive_instruction_runs_or_traps(workload: str) -> None:
    run = Run(Paravirtualization, workload)
    whole = run.strategy.snapshot().events
    assert "trap.gp" not in whole
    # PUSH and POP of segment registers and MOV to DS at boot are harmless in a kernel that knows its selectors.
    allowed = {"int", "rdtsc", "kernel", "user", "mov_to_seg", "mov_from_seg"}
    assert {kind.removeprefix("retired.") for kind in whole if kind.startswith("retired.")} <= allowed


@pytest.mark.parametrize("workload", WORKLOADS)
def test_hypercalls_are_as_many_as_the_instructions_they_replace(workload: str) -> None:
    counts = expected(workload, ITERATIONS, DENSITY)
    native = dict(counts.mnemonics)
    interrupts = {"interrupt": 2, "mixed": 2}.get(workload, 0) * ITERATIONS
    # The end of interrupt is the native kernel's alone: a paravirtual one has no interrupt controller.
    ports = native.get("in", 0) + native.get("out", 0) - interrupts
    events = Run(Paravirtualization, workload).events
    assert events.get("hypercall.port_io", 0) == ports
    assert events.get("hypercall.iret", 0) == native.get("iret", 0)
    assert events.get("hypercall.sched_op", 0) == native.get("hlt", 0)
    assert events.get("emulate.cpuid", 0) == events.get("trap.ud", 0) == native.get("cpuid", 0)
    assert events.get("event.upcall", 0) == interrupts
    assert events.get("retired.rdtsc", 0) == native.get("rdtsc", 0)
    hypercalls = sum(n for kind, n in events.items() if kind.startswith("hypercall."))
    assert events.get("trap.int", 0) == hypercalls == events.get("hypercall.xen_version", 0) + ports + native.get(
        "iret", 0) + native.get("hlt", 0)


def test_cli_and_sti_cost_no_transition_at_all() -> None:
    events = Run(Paravirtualization, "cli_sti").events
    assert not [kind for kind in events if kind.startswith(("trap.", "hypercall.", "emulate.", "interrupt."))]


def test_a_system_call_enters_the_kernel_without_the_vmm() -> None:
    events = Run(Paravirtualization, "compute").events
    assert events["interrupt.software"] == ITERATIONS
    assert events["trap.int"] == events["hypercall.iret"] == ITERATIONS  # the way back is a hypercall
    assert not [kind for kind in events if kind.startswith(("reflect.", "vmm.inject"))]


def test_the_guests_interrupt_flag_is_the_upcall_mask() -> None:
    run = Run(Paravirtualization, "cli_sti")
    assert not run.strategy.guest_state().eflags & 0x200  # nano ends with interrupts off
    assert run.machine.cpu.system_flags & 0x200           # the machine's own are on


# --- structures ----------------------------------------------------------------------------------------


def test_start_info_has_the_public_layout() -> None:
    info = NARROW.start_info(pages=4096, shared_info=0x32000, pt_base=0x170000, pt_frames=11, mfn_list=0x16C000, command_line="a=b")
    assert len(info) == 1112
    assert info.startswith(b"xen-")
    assert struct.unpack_from("<III", info, 32) == (4096, 0x32000, xen.SIF_PRIVILEGED)
    assert struct.unpack_from("<III", info, 60) == (0x170000, 11, 0x16C000)
    assert info[80:84] == b"a=b\0"
    with pytest.raises(ValueError, match="1023"):
        NARROW.start_info(pages=1, shared_info=0, pt_base=0, pt_frames=0, mfn_list=0, command_line="x" * 1024)


def test_the_hypercall_page_is_numbers_and_traps() -> None:
    page = NARROW.hypercall_page()
    assert page[29 * 32 :][:8] == b"\xb8" + struct.pack("<I", 29) + b"\xcd\x82\xc3"
    assert page[23 * 32 :][:8] == b"\x50\xb8" + struct.pack("<I", 23) + b"\xcd\x82"


@pytest.fixture
def ram() -> Ram:
    return Machine(path="portable").ram


def test_an_event_asks_for_an_upcall_once(ram: Ram) -> None:
    shared = SharedInfo(ram, 0x32000)
    assert shared.masked
    shared.raise_event(33)
    assert shared.pending
    assert ram.read32(0x32004) == 1 << 1  # the selector: the second word
    ram.bytes[0x32000] = 0
    shared.raise_event(33)                # still pending: no new edge
    assert not shared.pending


def test_a_masked_port_keeps_its_event_until_it_is_unmasked(ram: Ram) -> None:
    shared = SharedInfo(ram, 0x32000)
    ram.write32(0x32000 + 2048 + 128, 1 << 5)
    shared.raise_event(5)
    assert not shared.pending
    shared.unmask(5)
    assert shared.pending


# --- guests that try things: code at the entry, written by hand -------------------------------------------

def _ends(code: bytes, error: type[GuestError], match: str) -> Paravirtualization:
    strategy = guest(code, memory="static")
    with pytest.raises(error, match=match):
        strategy.run(100_000)
    return strategy


@pytest.mark.parametrize(("number", "arguments", "result"), [
    (44, (), xen.ENOSYS),                       # no such hypercall
    (1, (0, 0, 0, 0x7FF0), xen.ENOSYS),         # mmu_update: not with static tables
    (0, (0xF6000000,), xen.EFAULT),             # a trap table in the hypervisor's memory
    (14, (0x103000, 0x20003, 0, 2), xen.EINVAL),
    (3, (0x10, STACK), xen.EINVAL),             # a ring-0 stack selector
    (32, (9, 0x103000), xen.EINVAL),            # unmask a port that is not bound
    (55, (0, 0x21, 1, 0), 0xFF),                # the interrupt controller is not there
    (17, (0, 0), 3 << 16),
])
def test_what_hypercalls_answer(number: int, arguments: tuple[int, ...], result: int) -> None:
    stop, _ = run(call(number, *arguments) + EXIT_WITH_EAX, memory="static")
    assert stop.exit_code == result & 0xFFFFFFFF


def test_a_store_into_the_hypervisor_is_refused_and_recorded() -> None:
    strategy = _ends(b"\xa3" + struct.pack("<I", 0xFC400000), GuestFault, "exception 14")
    assert strategy.counts["safety.refused"] == 1
    assert "0xfc400000" in strategy.refused[0]


def test_a_store_into_its_own_page_tables_faults() -> None:
    strategy = guest(b"", memory="static")
    table = strategy.domain.root - strategy.domain.machine(0)
    strategy.machine.ram.write(strategy.domain.machine(ENTRY), b"\xa3" + struct.pack("<I", table))
    with pytest.raises(GuestFault, match=r"exception 14, error code 0x3"):
        strategy.run(100_000)


@pytest.mark.parametrize("instruction", [b"\xfa", b"\xec", b"\xf4", b"\x0f\x22\xd8"])  # CLI; IN; HLT; MOV CR3
def test_an_unpatched_kernel_gets_a_protection_fault(instruction: bytes) -> None:
    _ends(instruction, GuestFault, "exception 13, error code 0x0")


@pytest.mark.parametrize(("cs", "match"), [(0xE018, "selector 0xe018"), (0xE021, "selector 0xe021"), (0x2B, "selector 0x2b")])
def test_iret_goes_to_no_ring_but_one_and_three(cs: int, match: str) -> None:
    frame = b"".join(b"\x68" + struct.pack("<I", word) for word in (0x202, cs, ENTRY))
    _ends(frame + b"\x50" + mov(EAX, 23) + INT82, GuestRefused, match)


def test_users_make_no_hypercalls() -> None:
    user = 0x103000
    frame = b"".join(b"\x68" + struct.pack("<I", word) for word in (xen.FLAT_RING3_DS, STACK, 0x202, xen.FLAT_RING3_CS, user))
    write = b"\x66\xc7\x05" + struct.pack("<I", user) + INT82  # mov word ptr [user], INT 0x82
    _ends(write + frame + b"\x50" + mov(EAX, 23) + INT82, GuestFault, "exception 13, error code 0x412")


@pytest.mark.parametrize(("trigger", "popped"), [(b"\xf7\xf1", 0), (b"\x0f\x0b", 0), (b"\xcd\x30", 2)])  # DIV; UD2; INT 0x30
def test_the_guests_own_exceptions_reach_its_handlers(trigger: bytes, popped: int) -> None:
    """The handler ends the run with the return address it finds on its stack: at the fault, or past INT n."""
    setup = b"\x31\xc9" + call(0, DATA) + b"\x31\xc9"
    handler = ENTRY + len(setup) + len(trigger)
    traps = b"".join(struct.pack("<BBHI", vector, 1, xen.FLAT_RING1_CS, handler) for vector in (0, 6, 0x30)) + bytes(8)
    stop, strategy = run(setup + trigger + b"\x58" + EXIT_WITH_EAX, traps)
    assert stop.exit_code == ENTRY + len(setup) + popped
    assert strategy.counts["vmm.inject"] == 1


def _pending_event() -> tuple[bytes, bytes]:
    """Code that binds the UART's interrupt and raises it while events are masked; its handler follows the code."""
    bind = call(32, xen.EVTCHNOP_BIND_PIRQ, DATA) + call(55, 1, 0x3F9, 1, 2)
    callbacks = len(call(4, 0, 0, 0, 0))
    handler = ENTRY + callbacks + len(bind) + len(call(29, xen.SCHEDOP_BLOCK, 0)) + 2
    return call(4, xen.FLAT_RING1_CS, handler, xen.FLAT_RING1_CS, handler) + bind, struct.pack("<III", 4, 0, 0)


def test_an_event_that_came_before_the_wait_is_not_lost() -> None:
    code, data = _pending_event()
    stop, strategy = run(code + call(29, xen.SCHEDOP_BLOCK, 0) + b"\xeb\xfe" + mov(EAX, 7) + EXIT_WITH_EAX, data)
    assert stop.exit_code == 7
    assert strategy.counts["event.upcall"] == 1
    assert strategy.domain.shared.masked  # during the upcall


def test_an_event_waits_while_the_guest_masks_it() -> None:
    code, data = _pending_event()
    with pytest.raises(GuestError, match="budget"):
        run(code + call(29, xen.SCHEDOP_YIELD, 0) + b"\xeb\xfe" + mov(EAX, 7) + EXIT_WITH_EAX, data)


def test_waiting_for_nothing_ends_the_run() -> None:
    stop, _ = run(call(29, xen.SCHEDOP_BLOCK, 0))
    assert stop.exit_code is None
    assert "halted" in stop.reason.value


def test_a_guest_that_loops_with_events_masked_does_not_keep_the_machine() -> None:
    strategy = guest(b"\xeb\xfe", memory="static")
    with pytest.raises(GuestError, match="budget"):
        strategy.run(10_000)
    assert strategy.domain.shared.masked


def test_a_guest_without_notes_is_unsupported() -> None:
    image = guests.load("nano")
    plain = GuestImage(image.name, image.segments, image.entry, None, image.symbols, image.sha256)
    with pytest.raises(UnsupportedByStrategy, match="no paravirtual entry"):
        Paravirtualization(Machine(path="portable")).load(plain, "")

