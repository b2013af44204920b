"""The port bus: which device answers at which port. Devices know nothing of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from vmlab.ledger import Counts
from vmlab.machine.memory import MemoryDevice


class PortDevice(Protocol):
    """A device at I/O ports. ``offset`` counts from the first port it was attached at; ``size`` is 1, 2 or 4 bytes."""

    def read(self, offset: int, size: int) -> int: ...

    def write(self, offset: int, size: int, value: int) -> None: ...

    def state(self) -> dict[str, Any]: ...

    def from_state(self, state: dict[str, Any]) -> None: ...


class PortBus:
    """Ports 0–0xFFFF. A port without a device reads all ones and swallows writes, as an ISA bus does; see also absent.py."""

    def __init__(self) -> None:
        self._at: dict[int, tuple[PortDevice, int]] = {}
        self.accesses = 0
        #: Accesses by port where no device is.
        self.unanswered: dict[int, int] = {}

    def attach(self, device: PortDevice, first: int, count: int, offset: int = 0) -> None:
        """Let ``device`` answer at ``count`` ports from ``first``, which is ``offset`` in its own registers."""
        for number in range(count):
            self._at[first + number] = (device, offset + number)

    def devices(self) -> list[PortDevice]:
        """Every attached device once, by its lowest port."""
        return list({id(device): device for _, (device, _) in sorted(self._at.items(), key=lambda item: item[0])}.values())

    def answers(self, port: int) -> bool:
        """Whether a device is attached at this port."""
        return port in self._at

    def read(self, port: int, size: int) -> int:
        found = self._at.get(port)
        if found is None:
            self.unanswered[port] = self.unanswered.get(port, 0) + 1
            return (1 << (8 * size)) - 1
        self.accesses += 1
        return found[0].read(found[1], size) & ((1 << (8 * size)) - 1)

    def write(self, port: int, size: int, value: int) -> None:
        found = self._at.get(port)
        if found is None:
            self.unanswered[port] = self.unanswered.get(port, 0) + 1
            return
        self.accesses += 1
        found[0].write(found[1], size, value & ((1 << (8 * size)) - 1))


class Notifying:
    """A device with a call after every write."""

    def __init__(self, device: PortDevice, changed: Callable[[], None]) -> None:
        self._device, self._changed = device, changed
        self.read, self.state, self.from_state = device.read, device.state, device.from_state

    def write(self, offset: int, size: int, value: int) -> None:
        self._device.write(offset, size, value)
        self._changed()


class Counted:
    """A device in memory, its accesses counted as a port's are."""

    def __init__(self, device: MemoryDevice, events: Counts) -> None:
        self._device, self._events = device, events

    def read(self, offset: int, size: int) -> int:
        self._events["io.device"] += 1
        return self._device.read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self._events["io.device"] += 1
        self._device.write(offset, size, value)
