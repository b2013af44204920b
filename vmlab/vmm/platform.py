"""The devices that a guest sees under a full-virtualization VMM, and the machine's devices that stand behind them.

Interrupt controllers, timers and the local APIC that the guest programs are the VMM's, models of the same parts. Their
timers run on a timeline of the VMM's own, which is real as far as the machine is concerned: for the next due event the VMM
programs the *physical* interval timer, takes its interrupt, and then runs what is due. The physical disk moves the
data of the guest's; its addresses are checked and translated. Serial port, keyboard, IDE disks, display registers and debug
exit are handed through: the VMM performs the guest's accesses on the physical bus, or has its host do so, and forwards an interrupt as an edge on the
guest's controller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from vmlab.errors import UnsupportedByStrategy
from vmlab.ledger import Counts
from vmlab.machine import saved
from vmlab.machine.board import CLOCK_IRQ, DISK_IRQ, IDE_IRQ, KEYBOARD_IRQ, PIT_IRQ, PIT_PORT, SYSTEM_PORT, UART_IRQ, line
from vmlab.machine.devices import cmos, ioapic, lapic, testdev
from vmlab.machine.devices.bus import PortBus
from vmlab.machine.devices.disk import FIRST_PORT, PORT_COUNT
from vmlab.machine.devices.pic import PicPair
from vmlab.machine.devices.pit import Pit, SystemControl
from vmlab.machine.memory import PAGE, MemoryDevice
from vmlab.machine.pc import Machine
from vmlab.machine.timeline import Timeline
from vmlab.vmm.disk import DiskDriver, VirtualDisk
from vmlab.vmm.guest_tables import GuestMemory
from vmlab.vmm.host import PHYSICAL_BASE, PhysicalBus
from vmlab.vmm.timer import PhysicalTimer

#: A VMM that halts through so many physical interrupts, none of which is for its guest, waits for ever.
_VAIN_INTERRUPTS = 100_000


def program_physical_pic(machine: Machine, irqs: Iterable[int]) -> None:
    """Initialize the physical pair as any operating system does (8259A data sheet, ICW1–ICW4), and let ``irqs`` through."""
    mask = 0xFFFF & ~(1 << 2)           # the slave's input
    for irq in irqs:
        mask &= ~(1 << irq)
    for port, value in ((0x20, 0x11), (0xA0, 0x11), (0x21, PHYSICAL_BASE), (0xA1, PHYSICAL_BASE + 8), (0x21, 4), (0xA1, 2),
                        (0x21, 1), (0xA1, 1), (0x21, mask & 0xFF), (0xA1, mask >> 8)):
        machine.ports.write(port, 1, value)


class VirtualPlatform:
    """What the guest finds at ports and in memory, and what interrupts it.

    :param bus: the VMM's way to the physical devices.
    :param memory: the guest's frames, for its disk.
    """

    def __init__(self, machine: Machine, bus: PhysicalBus, counts: Counts, memory: GuestMemory) -> None:
        self._machine, self._bus, self._counts, self._memory = machine, bus, counts, memory
        self._timer = PhysicalTimer(machine, bus, counts)
        self._driver = DiskDriver(machine, bus, counts)
        #: The guest asks, by its test device, that a page of its memory be mapped anew.
        self.on_flush: Callable[[int], None] = lambda gpa: None
        self.timeline = Timeline(lambda: machine.time, self._arm)           # the VMM's own events
        #: Told of the level of INTR after every change.
        self.on_interrupt_line: Callable[[bool], None] = _ignore
        #: INTR of the guest's virtual CPU: its level.
        self.pending = False
        self.pic = PicPair(self._changed)                                   # two 8259A
        self.lapic = lapic.Lapic(self.timeline, self.pic, self._changed)    # local APIC
        self.ioapic = ioapic.IoApic(self.lapic.message)                     # I/O APIC
        self.pit = Pit(self.timeline, line(self, PIT_IRQ))                  # 8254
        self.clock = cmos.Cmos(self.timeline, line(self, CLOCK_IRQ), memory.size)  # real-time clock
        self.test_device = testdev.TestDevice(lambda gpa: self.on_flush(gpa))      # what kvm-unit-tests expects
        self.disk = None if self._driver.sectors is None else VirtualDisk(  # DMA block device
            self._driver, line(self, DISK_IRQ), memory.size, lambda gpa: memory.foreign(gpa, "gave its disk"), self._buffer, self._later)
        self._own = PortBus()
        self.pic.attach(self._own)
        self._own.attach(self.pit, PIT_PORT, 4)
        self._own.attach(SystemControl(self.timeline, self.pit.channels[2]), SYSTEM_PORT, 1)
        self._own.attach(self.clock, cmos.FIRST_PORT, cmos.PORT_COUNT)
        self._own.attach(self.test_device, testdev.DATA_PORT, testdev.DATA_COUNT)
        self._own.attach(testdev.TestLines(self.ioapic.set_line), testdev.LINES_PORT, testdev.LINES)
        self.lapic.on_eoi = self.ioapic.end_of_interrupt
        self.lapic.on_nmi = lambda: self.on_nmi()
        #: A non-maskable interrupt for the guest. A VMM that cannot inject one says so.
        self.on_nmi: Callable[[], None] = _no_nmi
        #: Around accesses to registers in memory, for a VMM that keeps a part of the local APIC elsewhere.
        self.before_access: Callable[[], None] = _nothing
        self.after_store: Callable[[], None] = _nothing
        #: Devices in guest-physical memory: first address, bytes, device.
        self._in_memory: tuple[tuple[int, int, MemoryDevice], ...] = (
            (lapic.BASE, lapic.SIZE, self.lapic), (ioapic.BASE, ioapic.SIZE, self.ioapic),
            (testdev.MEMORY, testdev.MEMORY_SIZE, self.test_device.memory))
        if self.disk is not None:
            self._own.attach(self.disk, FIRST_PORT, PORT_COUNT)
        memory.read_device, memory.write_device = self._memory_read, self._memory_write
        program_physical_pic(machine, (PIT_IRQ, UART_IRQ, DISK_IRQ, KEYBOARD_IRQ, IDE_IRQ))

    # ---- to be saved
    def _devices(self) -> list[Any]:
        """The VMM's own devices; interrupt controllers last, since the others pull at their lines."""
        disk = [] if self.disk is None else [self.disk]
        return [self.pit, self.clock, self.test_device, *disk, *(d for d in self._own.devices() if isinstance(d, SystemControl)),
                self.ioapic, self.lapic, self.pic]

    def state(self) -> dict[str, Any]:
        """Raises UnsupportedByStrategy while the disk moves data: whom it tells is no plain value."""
        if self._driver.busy:
            raise UnsupportedByStrategy("the guest's disk is at work; it cannot be saved now")
        return {"devices": [device.state() for device in self._devices()], "timer": self._timer.due, "level": self.pending,
                "due": saved.due(self.timeline, saved.owners(self._devices())), "unanswered": dict(self._own.unanswered)}

    def from_state(self, state: dict[str, Any]) -> None:
        """The machine's own devices are as they were: nothing is asked of them."""
        self._timer.due = 0     # sooner than anything: the physical timer is armed already
        for device, of_device in zip(self._devices(), state["devices"], strict=True):
            device.from_state(of_device)
        saved.arrange(self.timeline, saved.owners(self._devices()), state["due"])
        self._own.unanswered = dict(state["unanswered"])
        self._timer.due, self.pending = state["timer"], state["level"]

    # ---- the guest's accesses
    def port_read(self, port: int, size: int) -> int:
        """The guest reads a port."""
        return self._own.read(port, size) if self._own.answers(port) else self._bus.port_read(port, size)

    def port_write(self, port: int, size: int, value: int) -> None:
        """The guest writes a port. Writes to the VMM's own devices join the guest's ordered device log too."""
        if self._own.answers(port):
            self._machine.device_log.append((port, size, value & ((1 << (8 * size)) - 1)))
            self._own.write(port, size, value)
        else:
            self._bus.port_write(port, size, value)

    @staticmethod
    def is_device(gpa: int) -> bool:
        """Whether a device's registers are in the page of ``gpa``: it must not be mapped."""
        return gpa >= ioapic.BASE and (lapic.BASE <= gpa < lapic.BASE + lapic.SIZE or gpa < ioapic.BASE + ioapic.SIZE
                                       or testdev.MEMORY <= gpa < testdev.MEMORY + testdev.MEMORY_SIZE)

    def _memory_read(self, gpa: int, size: int) -> int:
        for first, extent, device in self._in_memory:
            if first <= gpa < first + extent:
                self._counts["vmm.device"] += 1
                self.before_access()
                return device.read(gpa - first, size)
        return (1 << (8 * size)) - 1

    def _memory_write(self, gpa: int, size: int, value: int) -> None:
        for first, extent, device in self._in_memory:
            if first <= gpa < first + extent:
                self._counts["vmm.device"] += 1
                self.before_access()
                device.write(gpa - first, size, value)
                self.after_store()

    def _later(self, delay: int, callback: Callable[[], None]) -> None:
        self.timeline.at(self.timeline.now + delay, callback)

    def _buffer(self, gpa: int, size: int, written: bool) -> tuple[int, Callable[[], None]]:
        """The machine address of a disk buffer, all of which is the guest's RAM; what the disk stores there is told afterwards."""
        def stored() -> None:
            for page in range(gpa // PAGE, (gpa + size - 1) // PAGE + 1):
                first, end = max(gpa, page * PAGE), min(gpa + size, (page + 1) * PAGE)
                self._memory.on_write(first, end - first)

        return self._memory.base + gpa, stored if written else _nothing

    # ---- the machine's interrupts
    def _arm(self) -> None:
        """The VMM's next event needs a physical interrupt. One that comes too early, for what was taken back, does no harm."""
        due = self.timeline.next_due
        if due is not None and (self._timer.due is None or due < self._timer.due):
            self._timer.arm(due)

    def physical_interrupt(self) -> None:
        """Take the physical interrupt: the VMM's own timer or disk, or one to pass on to the guest's controller."""
        irq = self._bus.acknowledge()
        if irq == PIT_IRQ:
            self._timer.fired()
            self.timeline.run_due()
        elif irq == DISK_IRQ:
            self._driver.interrupt()
        else:
            forward = line(self, irq)
            forward(False)
            forward(True)

    def wait(self) -> bool:
        """The VMM halts the physical CPU until something is pending for its guest; False when nothing will be.

        Its interrupts go to the devices alone, for no guest runs that they could be injected into.
        """
        machine = self._machine
        handler, machine.monitor = machine.monitor, _Halted(self)
        try:
            for _ in range(_VAIN_INTERRUPTS):
                if self.pending:
                    return True
                if machine.ending is not None or not machine.wait():
                    return False
                machine.interrupts.take()
            return False
        finally:
            machine.monitor = handler

    # ---- INTR of the guest's virtual CPU
    def _changed(self) -> None:
        self.pending = self.lapic.pending
        self.on_interrupt_line(self.pending)

    def acknowledge(self) -> int:
        """INTA by the guest's virtual CPU: the vector."""
        return self.lapic.acknowledge()


class _Halted:
    """The VMM's interrupt handler while the VMM itself waits."""

    def __init__(self, platform: VirtualPlatform) -> None:
        self._platform = platform

    def interrupt(self) -> None:
        self._platform.physical_interrupt()

    def exception(self, vector: int, error_code: int | None, *, software: bool) -> None:
        raise AssertionError(f"exception {vector} while the VMM waits")


def _ignore(_level: bool) -> None:
    """Nobody asked."""


def _no_nmi() -> None:
    raise UnsupportedByStrategy("the guest sends itself an NMI, which a deprivileging VMM does not inject here (use hardware-assisted)")


def _nothing() -> None:
    """Nobody has anything to do here."""
