"""The board: at which ports, addresses and interrupt lines the devices are."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from vmlab.machine.devices import cmos, disk, ide, ioapic, keyboard, lapic, pci, testdev, vga
from vmlab.machine.devices.bus import Counted
from vmlab.machine.devices.debug_exit import DebugExit
from vmlab.machine.devices.pic import PicPair
from vmlab.machine.devices.pit import SystemControl

if TYPE_CHECKING:
    from vmlab.machine.pc import Machine

PIT_PORT, SYSTEM_PORT, SYSTEM_PORT_A, UART_PORT, DEBUG_EXIT_PORT = 0x40, 0x61, 0x92, 0x3F8, 0xF4
PIT_IRQ, KEYBOARD_IRQ, UART_IRQ, CLOCK_IRQ, DISK_IRQ, MOUSE_IRQ, IDE_IRQ = 0, 1, 4, 8, 11, 12, 14
#: Where the timer's interrupt comes to the I/O APIC: its input 0 is the 8259 pair's.
TIMER_INPUT = 2


class Controllers(Protocol):
    """Whoever has both: the machine, or a VMM's virtual platform."""

    pic: PicPair
    ioapic: ioapic.IoApic


def line(board: Controllers, irq: int) -> Callable[[bool], None]:
    """The wire from a device to both interrupt controllers; called with its level."""
    def set_level(level: bool) -> None:
        board.pic.set_line(irq, level)
        board.ioapic.set_line(TIMER_INPUT if irq == PIT_IRQ else irq, level)

    return set_level


def populate(machine: Machine) -> None:
    """Put every device of ``machine`` at its place."""
    memory, ports = machine.ram, machine.ports
    for device, first, size in ((machine.ioapic, ioapic.BASE, ioapic.SIZE), (machine.lapic, lapic.BASE, lapic.SIZE),
                                (machine.test_device.memory, testdev.MEMORY, testdev.MEMORY_SIZE)):
        memory.attach(Counted(device, machine.events), first, size, machine.fail)
    memory.seal()
    machine.lapic.on_eoi = machine.ioapic.end_of_interrupt
    machine.lapic.on_nmi = machine.interrupts.raise_nmi
    machine.pic.attach(ports)
    ports.attach(machine.pit, PIT_PORT, 4)
    ports.attach(SystemControl(machine.timeline, machine.pit.channels[2]), SYSTEM_PORT, 1)
    ports.attach(machine.keyboard, keyboard.DATA_PORT, 1)
    ports.attach(machine.keyboard, keyboard.DATA_PORT + keyboard.COMMAND_OFFSET, 1, keyboard.COMMAND_OFFSET)
    ports.attach(machine.clock, cmos.FIRST_PORT, cmos.PORT_COUNT)
    ports.attach(keyboard.SystemPort(machine.reset), SYSTEM_PORT_A, 1)
    ports.attach(machine.test_device, testdev.DATA_PORT, testdev.DATA_COUNT)
    ports.attach(DebugExit(machine.guest_exit), DEBUG_EXIT_PORT, 1)
    ports.attach(machine.ide, ide.COMMAND_PORT, ide.COMMAND_COUNT)
    ports.attach(ide.IdeControl(machine.ide), ide.CONTROL_PORT, 1)
    ports.attach(machine.vga, vga.FIRST_PORT, vga.PORT_COUNT)
    ports.attach(machine.uart, UART_PORT, 8)
    if machine.disk is not None:
        ports.attach(machine.disk, disk.FIRST_PORT, disk.PORT_COUNT)
    ports.attach(pci.Pci(machine.reset), pci.FIRST_PORT, pci.PORT_COUNT)
    ports.attach(testdev.TestLines(machine.ioapic.set_line), testdev.LINES_PORT, testdev.LINES)
