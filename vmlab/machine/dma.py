"""Physical memory as a device sees it: what it writes may be code that the CPU has decoded already."""

from __future__ import annotations

from collections.abc import Callable

from vmlab.machine.memory import PAGE, Ram


class Dma:
    """RAM for a device. ``wrote_code`` is called after a write to a frame of ``code_frames``."""

    def __init__(self, ram: Ram, code_frames: set[int], wrote_code: Callable[[], None]) -> None:
        self._ram, self._code_frames, self._wrote_code = ram, code_frames, wrote_code

    def contains(self, address: int, size: int) -> bool:
        """Whether RAM answers at all of these addresses."""
        return address + size <= self._ram.size

    def read(self, address: int, size: int) -> bytes:
        return self._ram.read(address, size)

    def write(self, address: int, data: bytes) -> None:
        self._ram.write(address, data)
        if not self._code_frames.isdisjoint(range(address // PAGE, (address + len(data) - 1) // PAGE + 1)):
            self._wrote_code()
