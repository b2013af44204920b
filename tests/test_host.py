"""Type 2: what a hosted VMM asks of its host is a world switch that the CPU runs, and changes nothing for the guest."""

from __future__ import annotations

import struct

import pytest
from test_paravirtual_minios import run as run_minios

from vmlab import guests
from vmlab.ledger import Counts
from vmlab.machine.board import UART_IRQ
from vmlab.machine.cpu import IF, Segment
from vmlab.machine.pc import Machine, StopReason
from vmlab.machine.state import RAX, RSP
from vmlab.strategies.base import Strategy
from vmlab.strategies.hardware import HardwareAssisted
from vmlab.strategies.native import Native
from vmlab.strategies.paravirtual import Paravirtualization
from vmlab.strategies.translation import BinaryTranslation
from vmlab.strategies.trap_and_emulate import TrapAndEmulate
from vmlab.vmm.host import HostedBus, PhysicalBus
from vmlab.vmm.platform import program_physical_pic

TECHNIQUES: dict[str, tuple[type[Strategy], dict[str, str]]] = {
    "trap-and-emulate": (TrapAndEmulate, {"sensitive": "trap"}), "binary-translation": (BinaryTranslation, {}),
    "paravirtualization": (Paravirtualization, {}), "hardware-assisted": (HardwareAssisted, {}),
}
#: What one switch to the host and back retires, for one port access: counted by hand in host.py.
ONCE = {"mov_to_cr": 6, "mov_from_cr": 3, "lgdt": 2, "lidt": 2, "ltr": 2, "sgdt": 1, "sidt": 1, "str": 1, "load_far": 2, "pushf": 1, "popf": 1}


def run(technique: str, workload: str, hypervisor: str, path: str = "auto") -> tuple[Strategy, Machine]:
    kind, chosen = TECHNIQUES[technique]
    machine = Machine(path=path)
    strategy = kind(machine, {**chosen, "hypervisor": hypervisor})
    strategy.load(guests.load("nano"), guests.command_line({"workload": workload, "iterations": 10}))
    assert strategy.run(5_000_000).exit_code == 0
    return strategy, machine


@pytest.mark.parametrize(("workload", "path"), [("port_io", "auto"), ("interrupt", "portable"), ("mixed", "auto")])
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_the_guest_cannot_tell_where_its_vmm_stands(technique: str, workload: str, path: str) -> None:
    (one, bare), (two, hosted) = run(technique, workload, "type1", path), run(technique, workload, "type2", path)
    assert bytes(hosted.console) == bytes(bare.console)
    assert hosted.device_log == bare.device_log
    assert two.state_digest() == one.state_digest()
    first, second = one.snapshot(), two.snapshot()
    assert (second.user, second.kernel) == (first.user, first.kernel)
    assert hosted.time == bare.time
    switches = second.events["host.world_switch"]
    assert "host.world_switch" not in first.events
    for op, n in ONCE.items():
        grown = second.events.get(f"machine.{op}", 0) - first.events.get(f"machine.{op}", 0)
        # The very last access ends the run inside the host, on its way.
        assert n * (switches // 2 - 1) <= grown <= n * switches // 2, op


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("workload", ["cpuid", "cli_sti"])
def test_what_the_vmm_can_do_by_itself_needs_no_host(technique: str, workload: str) -> None:
    kind, chosen = TECHNIQUES[technique]
    strategy, image = kind(Machine(), {**chosen, "hypervisor": "type2"}), guests.load("nano")
    marks = []
    for symbol in ("vmlab_roi_begin", "vmlab_roi_end"):
        strategy.watch(image.symbol(symbol), lambda at: marks.append(strategy.snapshot(at)))
    strategy.load(image, guests.command_line({"workload": workload, "iterations": 20}))
    strategy.run(5_000_000)
    assert marks[0].events["host.world_switch"] > 0     # setting up the serial port
    assert "host.world_switch" not in marks[1].minus(marks[0]).events


def test_paths_agree() -> None:
    for technique in TECHNIQUES:
        ledgers = [run(technique, "interrupt", "type2", path)[0].snapshot().events for path in ("portable", "auto")]
        assert ledgers[0] == ledgers[1]


# --- the mechanism by itself ------------------------------------------------------------------------------


class Nobody:
    """A monitor that is never called."""

    def exception(self, vector: int, error_code: int | None, *, software: bool) -> None:
        raise AssertionError("the host has its own IDT")

    def interrupt(self) -> None:
        raise AssertionError("interrupts are off")


@pytest.fixture(params=["portable", "auto"])
def machine(request: pytest.FixtureRequest) -> Machine:
    machine = Machine(path=request.param)
    machine.cpu.enter_protected(0x1000, Segment(8, 0, 0xFFFFFFFF, 0xCF9B00), Segment(16, 0, 0xFFFFFFFF, 0xCF9300))
    machine.monitor = Nobody()
    return machine


def test_a_hosted_bus_answers_as_a_bare_one(machine: Machine) -> None:
    counts = Counts("vmm")
    bus, bare = HostedBus(machine, counts), PhysicalBus(Machine(path="portable"))
    machine.cpu.load()
    before = (machine.cpu.window.raw(), machine.time)
    for way in (bus, bare):
        way.port_write(0x3FF, 1, 0x5A)
        assert way.port_read(0x3FF, 1) == 0x5A
        assert way.port_read(0x1234, 4) == 0xFFFFFFFF
        assert way.port_read(0x1234, 2) == 0xFFFF
        assert way.own((0x3FF, 1, None), (0x3FF, 1, 7), (0x3FF, 1, None)) == [0x5A, 7, 7]
        way.port_write(0x3F8, 1, *b"several" * 100)
    assert bytes(machine.console) == b"several" * 100
    assert machine.device_log == [(0x3FF, 1, 0x5A), *((0x3F8, 1, c) for c in b"several" * 100)]    # not the VMM's own
    machine.cpu.load()
    assert (machine.cpu.window.raw(), machine.time) == before
    assert counts["host.world_switch"] == 2 * (5 + -(-700 // 341))
    assert machine.snapshot().kernel == machine.snapshot().user == 0


@pytest.mark.parametrize("irq", [UART_IRQ, 11])
def test_an_interrupt_is_handled_by_the_hosts_handler(machine: Machine, irq: int) -> None:
    bus = HostedBus(machine, Counts("vmm"))
    program_physical_pic(machine, (UART_IRQ, 11))
    machine.pic.set_line(irq, True)
    assert bus.acknowledge() == irq
    assert not machine.pic.pending
    assert machine.pic.master.isr == machine.pic.slave.isr == 0     # it said so: end of interrupt
    assert machine.events["interrupt.software"] == 1
    machine.pic.set_line(irq, False)
    machine.pic.set_line(irq, True)
    assert bus.acknowledge() == irq


def test_the_end_of_the_run_by_the_host_is_the_end_of_the_run(machine: Machine) -> None:
    bus = HostedBus(machine, Counts("vmm"))
    bus.port_write(0xF4, 4, 33)
    assert machine.ending is not None
    assert (machine.ending.reason, machine.ending.exit_code) == (StopReason.EXIT, 33)


def test_the_host_has_an_address_space_of_its_own(machine: Machine) -> None:
    """The monitor's stack is not mapped in the host's, nor the host's tables in the monitor's."""
    HostedBus(machine, Counts("vmm"))
    ram = machine.ram
    mapped = {}
    for name, root in (("host", 7), ("monitor", 10)):
        l1 = (2 << 20) + (root + 2) * 0x1000
        mapped[name] = {i for i in range(512) if ram.read64(l1 + 8 * i) & 1}
    base = 0xFFB00000 >> 12 & 511
    assert mapped["host"] - mapped["monitor"] == {base + 2, base + 4}
    assert mapped["monitor"] - mapped["host"] == {base + 5, base + 6}
    assert not ram.read64((2 << 20) + 9 * 0x1000 + 8 * base) & 2    # the code they share is not writable


@pytest.mark.parametrize("path", ["portable", "auto"])
def test_a_string_that_an_interrupt_breaks_off_is_counted_once(path: str) -> None:
    """The interrupt comes between two elements of REP STOSB; the monitor takes it, with or without a host, and goes back."""
    ledgers = []
    for hosted in (False, True):
        machine = Machine(path=path)
        bus = HostedBus(machine, Counts("vmm")) if hosted else PhysicalBus(machine)
        program_physical_pic(machine, (UART_IRQ,))
        machine.ram.write(0x1000, b"\xb9\x64\x00\x00\x00\xbf\x00\x80\x00\x00\xfb\x90\xf3\xaa\xfa\xf4")
        machine.cpu.enter_protected(0x1000, Segment(8, 0, 0xFFFFFFFF, 0xCF9B00), Segment(16, 0, 0xFFFFFFFF, 0xCF9300))

        class Acknowledging(Nobody):
            def __init__(self, machine: Machine, bus: PhysicalBus) -> None:
                self.machine, self.bus = machine, bus

            def interrupt(self) -> None:
                self.machine.pic.set_line(UART_IRQ, False)
                self.bus.acknowledge()

        machine.monitor = Acknowledging(machine, bus)
        machine.timeline.at(5, lambda machine=machine: machine.pic.set_line(UART_IRQ, True))
        machine.run(1000)
        events = machine.snapshot()
        ledgers.append((events.user, events.kernel, events.events["machine.string"], machine.time, machine.events["interrupt.delivered"]))
    assert ledgers[0] == ledgers[1]
    assert ledgers[0][1] == 7 and ledgers[0][4] == 1


def test_a_detour_inside_a_handler_goes_back_to_where_the_guest_was() -> None:
    """INT3 in a loop; each makes the monitor read a port by its host."""
    for path in ("portable", "auto"):
        machine = Machine(path=path)
        bus = HostedBus(machine, Counts("vmm"))
        machine.ram.write(0x1000, b"\xb9\x05\x00\x00\x00\xbc\x00\x80\x00\x00" + b"\xcc\x01\xc2\x49\x75\xfa\xf4")
        machine.cpu.enter_protected(0x1000, Segment(8, 0, 0xFFFFFFFF, 0xCF9B00), Segment(16, 0, 0xFFFFFFFF, 0xCF9300))

        class Reading(Nobody):
            def __init__(self, machine: Machine, bus: HostedBus) -> None:
                self.machine, self.bus = machine, bus

            def exception(self, vector: int, error_code: int | None, *, software: bool) -> None:
                self.machine.cpu.set_gpr(RAX, self.bus.port_read(0x3FD, 1))

        machine.monitor = Reading(machine, bus)
        assert machine.run(1000).reason is StopReason.HALTED
        machine.cpu.load()
        assert machine.cpu.gpr(2) == 5 * 0x60
        assert machine.cpu.gpr(RSP) == 0x8000
        assert not machine.cpu.system_flags & IF
        assert machine.time == 2 + 5 * 4 + 1
        assert struct.pack("<I", machine.cpu.cr(3)) == bytes(4)


@pytest.mark.parametrize("workload", ["io", "mixed"])
@pytest.mark.parametrize(("technique", "memory"), [
    ("trap-and-emulate", "tracing"), ("hardware-assisted", "nested"), ("hardware-assisted", "lazy"), ("paravirtualization", "direct")])
def test_an_operating_system_over_a_hosted_vmm_ends_as_on_the_bare_machine(technique: str, memory: str, workload: str) -> None:
    """Timer, disk and console all go by the host; what the guest does is the same."""
    kind, chosen = TECHNIQUES[technique]
    hosted = run_minios(kind, workload, chosen={**chosen, "memory": memory, "hypervisor": "type2"})
    assert hosted.seen() == run_minios(Native, workload).seen()
    # Each interrupt, and each request of the disk, is a switch there and back at the least.
    counts = hosted.strategy.counts
    assert counts["host.world_switch"] >= 2 * (counts["vmm.disk"] + counts["vmm.timer"])
    assert counts["vmm.disk"] > 0
