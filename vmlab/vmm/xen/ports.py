"""Ports by hypercall: what IN and OUT become in a paravirtual kernel that keeps its drivers (the lab's own ``port_io``).

Interrupt controller and interval timer are the hypervisor's, and refused. The disk's registers are a device of the
hypervisor's own, since the guest's addresses are not the machine's. Serial port and debug exit are handed through.
"""

from __future__ import annotations

from collections.abc import Callable

from vmlab.ledger import Counts
from vmlab.machine.board import DISK_IRQ, PIT_PORT, SYSTEM_PORT
from vmlab.machine.devices.disk import FIRST_PORT, PORT_COUNT
from vmlab.vmm import xen
from vmlab.vmm.disk import DiskDriver, VirtualDisk
from vmlab.vmm.host import PhysicalBus
from vmlab.vmm.xen.domain import Domain
from vmlab.vmm.xen.events import EventChannels
from vmlab.vmm.xen.frames import Kind, Refused

_HYPERVISORS = frozenset((0x20, 0x21, 0xA0, 0xA1, *range(PIT_PORT, PIT_PORT + 4), SYSTEM_PORT))


class GuestPorts:
    """The ports that the guest may use. ``refuse`` records what it tried."""

    def __init__(self, bus: PhysicalBus, domain: Domain, driver: DiskDriver, events: EventChannels, counts: Counts,
                 refuse: Callable[[str], None]) -> None:
        self._bus, self._domain, self._events, self._counts, self._refuse = bus, domain, events, counts, refuse
        self._disk = None if driver.sectors is None else VirtualDisk(driver, self._line, domain.memory, self._foreign, self._buffer)

    def port_io(self, write: int, port: int, size: int, value: int, *_: int) -> int:
        """The lab's own: IN or OUT of 1, 2 or 4 bytes."""
        if size not in (1, 2, 4) or port > 0xFFFF or write > 1:
            return xen.EINVAL
        self._counts["vmm.device"] += 1
        if port in _HYPERVISORS:
            self._refuse(f"the guest asked for port {port:#x}, a device of the hypervisor's")
            return xen.EINVAL if write else (1 << 8 * size) - 1
        if FIRST_PORT <= port < FIRST_PORT + PORT_COUNT:
            return self._disk_register(write, port - FIRST_PORT, size, value)
        if write:
            self._bus.port_write(port, size, value)
            return 0
        return self._bus.port_read(port, size)

    def _disk_register(self, write: int, offset: int, size: int, value: int) -> int:
        if self._disk is None:
            return 0 if write else (1 << 8 * size) - 1
        if write:
            self._disk.write(offset, size, value)
            return 0
        return self._disk.read(offset, size) & ((1 << 8 * size) - 1)

    def _line(self, level: bool) -> None:
        if level:
            self._events.raise_irq(DISK_IRQ)

    def _foreign(self, address: int) -> None:
        self._refuse(f"the guest gave its disk guest-physical {address:#x}, beyond its memory")

    def _buffer(self, address: int, size: int, written: bool) -> tuple[int, Callable[[], None]] | None:
        """The machine address of a buffer; pages that the disk will write stay writable memory until it has."""
        frames, held = self._domain.frames, list[int]()

        def release() -> None:
            for mfn in held:
                frames.put(mfn)

        for pfn in range(address >> 12, (address + size - 1 >> 12) + 1) if written else ():
            try:
                frames.get(self._domain.mfn(pfn), Kind.WRITABLE)
            except Refused as refusal:
                release()
                self._refuse(f"the guest aimed its disk: {refusal}")
                return None
            held.append(self._domain.mfn(pfn))
        return self._domain.machine(address), release
