"""The port by which a guest ends its run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class DebugExit:
    """Port 0xF4: a 32-bit write ends the run with the value as exit code (as QEMU's isa-debug-exit does)."""

    def __init__(self, on_exit: Callable[[int], None]) -> None:
        self._on_exit = on_exit

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self._on_exit(value)

    def state(self) -> dict[str, Any]:
        return {}

    def from_state(self, state: dict[str, Any]) -> None:
        """Nothing is kept."""
