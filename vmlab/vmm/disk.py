"""The physical disk in a VMM's hands: a driver with a queue, and the device that a guest sees in its place.

The guest's addresses are not the machine's: every buffer is checked and translated before the physical device, which
would move data to any address it is told, hears of it. Register map: docs/machine.md.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from vmlab.ledger import Counts
from vmlab.machine.devices import disk as d
from vmlab.machine.pc import Machine
from vmlab.vmm.host import PhysicalBus


@dataclass(frozen=True)
class Request:
    """One transfer: ``address`` is host-physical; ``done`` gets the device's error number, 0 for none."""

    command: int
    sector: int
    count: int
    address: int
    done: Callable[[int], None]


class DiskDriver:
    """Gives the physical disk one request after another."""

    def __init__(self, machine: Machine, bus: PhysicalBus, counts: Counts) -> None:
        self._machine, self._bus, self._counts = machine, bus, counts
        self._queue: deque[Request] = deque()
        self._running: Request | None = None

    @property
    def sectors(self) -> int | None:
        """The disk's size, or None where there is none."""
        return None if self._machine.disk is None else self._machine.disk.sectors

    @property
    def busy(self) -> bool:
        """Whether a request is under way or waits."""
        return self._running is not None or bool(self._queue)

    def submit(self, request: Request) -> None:
        """Carry out a request when all before it are done."""
        self._queue.append(request)
        if self._running is None:
            self._start()

    def _start(self) -> None:
        if not self._queue:
            return
        request = self._running = self._queue.popleft()
        self._counts["vmm.disk"] += 1
        self._bus.own(*((d.FIRST_PORT + offset, 4, value) for offset, value in (
            (d.AT_SECTOR, request.sector), (d.AT_COUNT, request.count), (d.AT_ADDRESS, request.address & 0xFFFFFFFF),
            (d.AT_ADDRESS_HIGH, request.address >> 32), (d.AT_COMMAND, request.command))))

    def interrupt(self) -> None:
        """The physical disk's interrupt."""
        request = self._running
        status = self._bus.own((d.FIRST_PORT + d.AT_COMMAND, 4, None), (d.FIRST_PORT + d.AT_ACKNOWLEDGE, 4, 0))[0]
        if request is None or not status & d.DONE:
            return
        self._running = None
        request.done(status >> d.ERROR_SHIFT & 0xFF if status & d.ERROR else 0)
        if self._running is None:
            self._start()


class GuestBuffers:
    """The guest's memory as its disk sees it: guest-physical, whole, and in one piece of machine memory."""

    def __init__(self, size: int, foreign: Callable[[int], None]) -> None:
        self._size, self._foreign = size, foreign

    def contains(self, address: int, size: int) -> bool:
        if address + size <= self._size:
            return True
        self._foreign(address)
        return False

    def read(self, address: int, size: int) -> bytes:
        raise AssertionError("the physical disk moves the data")

    def write(self, address: int, data: bytes) -> None:
        raise AssertionError("the physical disk moves the data")


class VirtualDisk(d.Registers):
    """The registers that a guest programs; each request becomes one of the physical disk's.

    :param memory_size: bytes of guest-physical memory from 0.
    :param foreign: told of a buffer beyond that memory; the request is refused.
    :param translate: hpa of a guest-physical buffer, and how to give it back; None refuses it as a bad address.
    :param later: calls back after so many nanoseconds, for a request that is refused, as the physical disk takes its time
        for one; by default at once.
    """

    def __init__(self, driver: DiskDriver, line: Callable[[bool], None], memory_size: int, foreign: Callable[[int], None],
                 translate: Callable[[int, int, bool], tuple[int, Callable[[], None]] | None],
                 later: Callable[[int, Callable[[], None]], None] = lambda delay, callback: callback()) -> None:
        super().__init__(line, driver.sectors or 0)
        self._driver, self._translate, self._later = driver, translate, later
        self._memory = GuestBuffers(memory_size, foreign)

    def command(self, command: int) -> None:
        error = self.refusal(command, self._memory)
        buffer = (0, _nothing)
        if not error and command != d.FLUSH:
            found = self._translate(self.address, self.count * d.SECTOR, command == d.READ)
            if found is None:
                error = d.BAD_ADDRESS
            else:
                buffer = found
        if error:
            self._later(d.REQUEST_NS, lambda: self.complete(error))
            return
        address, release = buffer

        def done(failed: int) -> None:
            release()
            self.complete(failed)

        self._driver.submit(Request(command, self.sector, self.count, address, done))


def _nothing() -> None:
    """A request without a buffer gives nothing back."""
