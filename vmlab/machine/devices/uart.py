"""The serial port, a 16550A (PC16550D data sheet)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Uart:
    """A 16550A without its FIFOs' depth: characters leave at once (PC16550D data sheet, table II).

    Registers by offset: 0 RBR/THR (DLL), 1 IER (DLM), 2 IIR/FCR, 3 LCR, 4 MCR, 5 LSR, 6 MSR, 7 SCR.
    ``line`` is called with the level of the interrupt output whenever it may have changed.
    """

    _IER_RECEIVE, _IER_TRANSMIT = 1, 2
    _LSR_DATA_READY, _LSR_EMPTY = 1, 0x60  # THRE and TEMT: the transmitter never waits
    _LCR_DIVISOR = 0x80

    def __init__(self, line: Callable[[bool], None], transmit: Callable[[int], None]) -> None:
        self._line, self._transmit = line, transmit
        self._received = bytearray()
        self.ier = self.lcr = self.mcr = self.scratch = self.fcr = 0
        self.divisor = 12  # 9600 baud
        self.transmit_pending = False

    def receive(self, data: bytes) -> None:
        """Characters arrive at the serial input."""
        self._received += data
        self._update()

    def _cause(self) -> int:
        """The interrupt identification, highest priority first (data sheet table III)."""
        if self.ier & self._IER_RECEIVE and self._received:
            return 0x4
        if self.ier & self._IER_TRANSMIT and self.transmit_pending:
            return 0x2
        return 0x1

    def _update(self) -> None:
        self._line(self._cause() != 0x1)

    def read(self, offset: int, size: int) -> int:
        if offset == 0:
            if self.lcr & self._LCR_DIVISOR:
                return self.divisor & 0xFF
            value = self._received.pop(0) if self._received else 0
            self._update()
            return value
        if offset == 1:
            return self.divisor >> 8 if self.lcr & self._LCR_DIVISOR else self.ier
        if offset == 2:
            cause = self._cause()
            if cause == 0x2:  # reading IIR as its source clears the transmitter's interrupt
                self.transmit_pending = False
                self._update()
            return cause | (0xC0 if self.fcr & 1 else 0)
        if offset == 5:
            return self._LSR_EMPTY | (self._LSR_DATA_READY if self._received else 0)
        return {3: self.lcr, 4: self.mcr, 6: 0xB0, 7: self.scratch}[offset]

    def write(self, offset: int, size: int, value: int) -> None:
        value &= 0xFF
        if offset == 0:
            if self.lcr & self._LCR_DIVISOR:
                self.divisor = (self.divisor & 0xFF00) | value
                return
            self._transmit(value)
            self.transmit_pending = True
        elif offset == 1:
            if self.lcr & self._LCR_DIVISOR:
                self.divisor = (self.divisor & 0xFF) | value << 8
                return
            if value & self._IER_TRANSMIT and not self.ier & self._IER_TRANSMIT:
                self.transmit_pending = True  # enabling it while the register is empty raises it at once
            self.ier = value & 0xF
        elif offset == 2:
            self.fcr = value
            if value & 2:
                self._received.clear()
        elif offset == 3:
            self.lcr = value
        elif offset == 4:
            self.mcr = value & 0x1F
        elif offset == 7:
            self.scratch = value
        self._update()

    def state(self) -> dict[str, Any]:
        return {"received": bytes(self._received), "ier": self.ier, "lcr": self.lcr, "mcr": self.mcr, "scratch": self.scratch,
                "fcr": self.fcr, "divisor": self.divisor, "transmit_pending": self.transmit_pending}

    def from_state(self, state: dict[str, Any]) -> None:
        self._received = bytearray(state["received"])
        for name in ("ier", "lcr", "mcr", "scratch", "fcr", "divisor", "transmit_pending"):
            setattr(self, name, state[name])
