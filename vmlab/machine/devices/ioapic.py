"""The I/O APIC at physical 0xFEC00000: Intel 82093AA data sheet (section numbers below), 24 inputs.

It turns levels of its inputs into messages to the local APIC. A level-triggered input that is still up when its interrupt ends
(an EOI with its vector) interrupts again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

BASE, SIZE = 0xFEC00000, 0x1000
INPUTS = 24
_SELECT, _WINDOW = 0x00, 0x10                   # §3.1
_ID, _VERSION, _ARBITRATION, _TABLE = 0, 1, 2, 0x10
_VERSION_VALUE = (INPUTS - 1) << 16 | 0x11
# Redirection table entries (§3.2.4).
_VECTOR, _DELIVERY, _LOGICAL, _REMOTE, _LEVEL, _MASKED = 0xFF, 7 << 8, 1 << 11, 1 << 14, 1 << 15, 1 << 16
_WRITABLE = 0xFF00_0000_0001_AFFF       # all but delivery status and remote IRR; polarity is kept, inputs here are active high


class IoApic:
    """``send(vector, delivery mode, destination, logical, level)`` carries a message to the CPUs; True where one took it."""

    def __init__(self, send: Callable[[int, int, int, bool, bool], bool]) -> None:
        self._send = send
        self.id = self.select = self.lines = self.edges = 0
        self.entries = [_MASKED] * INPUTS

    def set_line(self, number: int, level: bool) -> None:
        """The level of input ``number``."""
        bit = 1 << number
        rising = level and not self.lines & bit
        self.lines = self.lines | bit if level else self.lines & ~bit
        if rising and not self.entries[number] & _LEVEL:
            self.edges |= bit
        self._deliver(number)

    def _deliver(self, number: int) -> None:
        entry, bit = self.entries[number], 1 << number
        if entry & _MASKED:
            self.edges &= ~bit          # an edge at a masked input is not kept (§3.2.4, interrupt mask)
            return
        level = bool(entry & _LEVEL)
        if not self.lines & bit or entry & _REMOTE if level else not self.edges & bit:
            return
        self.edges &= ~bit
        taken = self._send(entry & _VECTOR, (entry & _DELIVERY) >> 8, entry >> 56, bool(entry & _LOGICAL), level)
        if level and taken:
            self.entries[number] |= _REMOTE

    def end_of_interrupt(self, vector: int) -> None:
        """An EOI message from the local APIC."""
        for number, entry in enumerate(self.entries):
            if entry & _LEVEL and entry & _REMOTE and entry & _VECTOR == vector:
                self.entries[number] &= ~_REMOTE
                self._deliver(number)

    def read(self, offset: int, size: int) -> int:
        if offset == _SELECT:
            return self.select
        if offset != _WINDOW:
            return 0
        register = self.select
        if _TABLE <= register < _TABLE + 2 * INPUTS:
            return self.entries[(register - _TABLE) // 2] >> 32 * (register & 1) & 0xFFFFFFFF
        return {_ID: self.id << 24, _VERSION: _VERSION_VALUE, _ARBITRATION: self.id << 24}.get(register, 0)

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == _SELECT:
            self.select = value & 0xFF
        elif offset == _WINDOW and self.select == _ID:
            self.id = value >> 24 & 0xF
        elif offset == _WINDOW and _TABLE <= self.select < _TABLE + 2 * INPUTS:
            number, high = divmod(self.select - _TABLE, 2)
            old = self.entries[number]
            new = old & 0xFFFFFFFF | value << 32 if high else old & ~0xFFFFFFFF | value
            new = old & ~_WRITABLE | new & _WRITABLE
            self.entries[number] = new if new & _LEVEL else new & ~_REMOTE
            self._deliver(number)

    _FIELDS = ("id", "select", "lines", "edges")

    def state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._FIELDS} | {"entries": list(self.entries)}

    def from_state(self, state: dict[str, Any]) -> None:
        for name in self._FIELDS:
            setattr(self, name, state[name])
        self.entries = list(state["entries"])
