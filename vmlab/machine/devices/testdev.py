"""The test device that the guests of kvm-unit-tests expect (QEMU calls it pc-testdev): what a test of a VMM needs and no PC has.

Its interface, as those guests use it:

| where | what |
|---|---|
| ports 0xE0–0xE3 | a register that keeps what is written, read in any size |
| port 0xE4 | a write with a guest-physical address: that page's mapping goes and comes back, so that a VMM must map it anew |
| ports 0x2000–0x2017 | a write sets the level of I/O APIC input 0–23 |
| physical 0xFF000000, 64 KiB | memory of the device: reads give what was written |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

DATA_PORT, DATA_COUNT = 0xE0, 5
LINES_PORT, LINES = 0x2000, 24
MEMORY, MEMORY_SIZE = 0xFF000000, 0x10000
_FLUSH = 4


class TestDevice:
    """The ports at 0xE0, and the memory as :attr:`memory`; ``flush(gpa)`` is told of a write to 0xE4."""

    __test__ = False        # no test, whatever its name says

    def __init__(self, flush: Callable[[int], None]) -> None:
        self._flush = flush
        self.value = 0
        self.memory = TestMemory()

    def read(self, offset: int, size: int) -> int:
        return (self.value >> 8 * offset if offset != _FLUSH else -1) & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == _FLUSH:
            self._flush(value)
        else:
            mask = (1 << 8 * size) - 1
            self.value = self.value & ~(mask << 8 * offset) | (value & mask) << 8 * offset
            self.value &= 0xFFFFFFFF

    def state(self) -> dict[str, Any]:
        return {"value": self.value, "memory": bytes(self.memory.bytes)}

    def from_state(self, state: dict[str, Any]) -> None:
        self.value, self.memory.bytes = state["value"], bytearray(state["memory"])


class TestMemory:
    """The device's memory."""

    __test__ = False

    def __init__(self) -> None:
        self.bytes = bytearray(MEMORY_SIZE)

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self.bytes[offset:offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        end = min(offset + size, MEMORY_SIZE)
        self.bytes[offset:end] = (value & (1 << 8 * size) - 1).to_bytes(8, "little")[:end - offset]


class TestLines:
    """Ports 0x2000–0x2017: interrupt lines by hand."""

    __test__ = False

    def __init__(self, line: Callable[[int, bool], None]) -> None:
        self._line = line

    def read(self, offset: int, size: int) -> int:
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        self._line(offset, bool(value))

    def state(self) -> dict[str, Any]:
        return {}

    def from_state(self, state: dict[str, Any]) -> None:
        """The levels are kept where the lines end."""
