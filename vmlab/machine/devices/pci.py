"""PCI configuration mechanism #1 on an empty bus: PCI Local Bus Specification 2.1 §3.7.4.1; reset control at 0xCF9 (Intel 82371SB §2.5.9).

Nobody answers a configuration read: it is terminated by master abort and gives all ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

FIRST_PORT, PORT_COUNT = 0xCF8, 8
_ADDRESS, _RESET_CONTROL, _DATA = 0, 1, 4
_ENABLE, _WRITABLE = 1 << 31, 0x80FFFFFC
_HARD, _NOW = 2, 4


class Pci:
    """Ports 0xCF8–0xCFF. ``reset`` is the machine's reset."""

    def __init__(self, reset: Callable[[], None]) -> None:
        self._reset = reset
        self.address = self.control = 0

    def read(self, offset: int, size: int) -> int:
        if offset == _ADDRESS and size == 4:
            return self.address
        if offset == _RESET_CONTROL and size == 1:
            return self.control
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == _ADDRESS and size == 4:
            self.address = value & _WRITABLE
        elif offset == _RESET_CONTROL and size == 1:
            begins = value & _NOW and not self.control & _NOW
            self.control = value & (_HARD | _NOW)
            if begins:
                self._reset()

    def state(self) -> dict[str, Any]:
        return {"address": self.address, "control": self.control}

    def from_state(self, state: dict[str, Any]) -> None:
        self.address, self.control = state["address"], state["control"]
