"""The guest's interrupt controller, and its way to the devices of the machine.

The 8259 pair that the guest programs is the VMM's, a model of the same part; the physical pair belongs
to the VMM, which forwards a physical interrupt as an edge on the same input of the guest's pair. Serial
port and debug exit are handed through: the VMM performs the guest's accesses on the physical bus.
"""

from __future__ import annotations

from collections.abc import Iterable

from vmlab.machine.devices.bus import PortBus
from vmlab.machine.devices.pic import PicPair
from vmlab.machine.pc import UART_IRQ, Machine

#: Vectors at which the VMM has the physical controller interrupt; any free ones would do.
PHYSICAL_BASE = 0x20


def program_physical_pic(machine: Machine, irqs: Iterable[int]) -> None:
    """Initialize the physical pair as any operating system does (8259A data sheet, ICW1–ICW4), and let ``irqs`` through."""
    mask = 0xFFFF & ~(1 << 2)           # the slave's input
    for irq in irqs:
        mask &= ~(1 << irq)
    for port, value in ((0x20, 0x11), (0xA0, 0x11), (0x21, PHYSICAL_BASE), (0xA1, PHYSICAL_BASE + 8), (0x21, 4), (0xA1, 2),
                        (0x21, 1), (0xA1, 1), (0x21, mask & 0xFF), (0xA1, mask >> 8)):
        machine.ports.write(port, 1, value)


def acknowledge_physical(machine: Machine) -> int:
    """Take the physical interrupt: INTA and end of interrupt; returns its IRQ."""
    irq = machine.pic.acknowledge() - PHYSICAL_BASE
    if irq >= 8:
        machine.ports.write(0xA0, 1, 0x20)
    machine.ports.write(0x20, 1, 0x20)
    return irq


class VirtualPlatform:
    """Virtual interrupt controller plus pass-through ports."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.pic = PicPair(lambda: None)
        self._own = PortBus()
        self.pic.attach(self._own)
        program_physical_pic(machine, (UART_IRQ,))

    @staticmethod
    def _is_own(port: int) -> bool:
        return port in (0x20, 0x21, 0xA0, 0xA1)

    def port_read(self, port: int, size: int) -> int:
        """The guest reads a port."""
        return self._own.read(port, size) if self._is_own(port) else self._machine.port_read(port, size)

    def port_write(self, port: int, size: int, value: int) -> None:
        """The guest writes a port. Writes to the virtual controller join the guest's ordered device log too."""
        if self._is_own(port):
            self._machine.device_log.append((port, size, value & ((1 << (8 * size)) - 1)))
            self._own.write(port, size, value)
        else:
            self._machine.port_write(port, size, value)

    def physical_interrupt(self) -> None:
        """Take the physical interrupt (INTA, EOI) and pass it on as an edge to the guest's controller."""
        irq = acknowledge_physical(self._machine)
        self.pic.set_line(irq, False)
        self.pic.set_line(irq, True)

    @property
    def pending(self) -> bool:
        """INTR of the guest's virtual CPU."""
        return self.pic.pending

    def acknowledge(self) -> int:
        """INTA by the guest's virtual CPU: the vector."""
        return self.pic.acknowledge()
