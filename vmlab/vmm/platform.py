"""The guest's interrupt controller, and its way to the devices of the machine.

The 8259 pair that the guest programs is the VMM's, a model of the same part; the physical pair belongs
to the VMM, which forwards a physical interrupt as an edge on the same input of the guest's pair. Serial
port and debug exit are handed through: the VMM performs the guest's accesses on the physical bus, or has its host do so.
"""

from __future__ import annotations

from collections.abc import Iterable

from vmlab.machine.devices.bus import PortBus
from vmlab.machine.devices.pic import PicPair
from vmlab.machine.pc import UART_IRQ, Machine
from vmlab.vmm.host import PHYSICAL_BASE, PhysicalBus


def program_physical_pic(machine: Machine, irqs: Iterable[int]) -> None:
    """Initialize the physical pair as any operating system does (8259A data sheet, ICW1–ICW4), and let ``irqs`` through."""
    mask = 0xFFFF & ~(1 << 2)           # the slave's input
    for irq in irqs:
        mask &= ~(1 << irq)
    for port, value in ((0x20, 0x11), (0xA0, 0x11), (0x21, PHYSICAL_BASE), (0xA1, PHYSICAL_BASE + 8), (0x21, 4), (0xA1, 2),
                        (0x21, 1), (0xA1, 1), (0x21, mask & 0xFF), (0xA1, mask >> 8)):
        machine.ports.write(port, 1, value)


class VirtualPlatform:
    """Virtual interrupt controller plus pass-through ports. ``bus``: the VMM's way to the physical devices."""

    def __init__(self, machine: Machine, bus: PhysicalBus | None = None) -> None:
        self._machine = machine
        self._bus = bus or PhysicalBus(machine)
        self.pic = PicPair(lambda: None)
        self._own = PortBus()
        self.pic.attach(self._own)
        program_physical_pic(machine, (UART_IRQ,))

    @staticmethod
    def _is_own(port: int) -> bool:
        return port in (0x20, 0x21, 0xA0, 0xA1)

    def port_read(self, port: int, size: int) -> int:
        """The guest reads a port."""
        return self._own.read(port, size) if self._is_own(port) else self._bus.port_read(port, size)

    def port_write(self, port: int, size: int, value: int) -> None:
        """The guest writes a port. Writes to the virtual controller join the guest's ordered device log too."""
        if self._is_own(port):
            self._machine.device_log.append((port, size, value & ((1 << (8 * size)) - 1)))
            self._own.write(port, size, value)
        else:
            self._bus.port_write(port, size, value)

    def physical_interrupt(self) -> None:
        """Take the physical interrupt (INTA, EOI) and pass it on as an edge to the guest's controller."""
        irq = self._bus.acknowledge()
        self.pic.set_line(irq, False)
        self.pic.set_line(irq, True)

    @property
    def pending(self) -> bool:
        """INTR of the guest's virtual CPU."""
        return self.pic.pending

    def acknowledge(self) -> int:
        """INTA by the guest's virtual CPU: the vector."""
        return self.pic.acknowledge()
