"""The serial port, a 16550A (PC16550D data sheet, National Semiconductor; tables and sections named below are its own)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

DEPTH = 16                  # of either FIFO (section 8.0)


class Uart:
    """A 16550A. Registers by offset: 0 RBR/THR (DLL), 1 IER (DLM), 2 IIR/FCR, 3 LCR, 4 MCR, 5 LSR, 6 MSR, 7 SCR (table II).

    A character that the guest writes leaves at once. The other end of the line keeps what there is no room for here, as a host does
    that honours flow control: nothing is lost and there is no overrun. ``line`` is called with the level of the interrupt output
    whenever it may have changed; OUT2 does not gate it, for guests exist that leave it low.
    """

    _IER_RECEIVE, _IER_TRANSMIT, _IER_MODEM = 1, 2, 8
    _LSR_DATA_READY, _LSR_EMPTY = 1, 0x60       # THRE and TEMT: the transmitter never waits
    _LCR_DIVISOR = 0x80
    _MCR_LOOP = 0x10
    _FCR_ENABLE, _FCR_CLEAR_RECEIVER = 1, 2
    _TRIGGER = (1, 4, 8, 14)                    # of FCR bits 6–7
    _CONNECTED = 0xB0                           # DCD, DSR and CTS: somebody is at the other end

    def __init__(self, line: Callable[[bool], None], transmit: Callable[[int], None]) -> None:
        self._line, self._transmit = line, transmit
        self._received = bytearray()            # the receiver FIFO; without FIFOs, the one buffer register
        self._waiting = bytearray()             # at the other end of the line
        self.ier = self.lcr = self.mcr = self.scratch = self.fcr = 0
        self.divisor = 12  # 9600 baud
        self.transmit_pending = False
        self.modem = self._CONNECTED            # MSR, its low half the changes since it was read

    def receive(self, data: bytes) -> None:
        """Characters arrive at the serial input."""
        self._waiting += data
        self._fill()
        self._update()

    @property
    def idle(self) -> bool:
        """Whether the guest has read all that came."""
        return not self._received and not self._waiting

    def _fill(self) -> None:
        room = (DEPTH if self.fcr & self._FCR_ENABLE else 1) - len(self._received)
        if room > 0 and self._waiting and not self.mcr & self._MCR_LOOP:
            self._received += self._waiting[:room]
            del self._waiting[:room]

    def _cause(self) -> int:
        """The interrupt identification, highest priority first (table III). The line is idle whenever the FIFO is below its trigger
        level, so that the character time-out has always passed."""
        if self.ier & self._IER_RECEIVE and self._received:
            if self.fcr & self._FCR_ENABLE and len(self._received) < self._TRIGGER[self.fcr >> 6]:
                return 0xC
            return 0x4
        if self.ier & self._IER_TRANSMIT and self.transmit_pending:
            return 0x2
        if self.ier & self._IER_MODEM and self.modem & 0xF:
            return 0x0
        return 0x1

    def _update(self) -> None:
        self._line(self._cause() != 0x1)

    def _set_modem(self) -> None:
        """MSR from the line, or in loopback from MCR: DTR, RTS, OUT1, OUT2 come back as DSR, CTS, RI, DCD (section 8.7)."""
        mcr = self.mcr
        state = self._CONNECTED
        if mcr & self._MCR_LOOP:
            state = (mcr & 2) << 3 | (mcr & 1) << 5 | (mcr & 4) << 4 | (mcr & 8) << 4
        changed = (state ^ self.modem) >> 4
        if changed & 4 and state & 0x40:
            changed &= ~4       # RI is reported at its trailing edge only
        self.modem = state | self.modem & 0xF | changed

    def read(self, offset: int, size: int) -> int:
        if offset == 0:
            if self.lcr & self._LCR_DIVISOR:
                return self.divisor & 0xFF
            value = self._received.pop(0) if self._received else 0
            self._fill()
            self._update()
            return value
        if offset == 1:
            return self.divisor >> 8 if self.lcr & self._LCR_DIVISOR else self.ier
        if offset == 2:
            cause = self._cause()
            if cause == 0x2:  # reading IIR as its source clears the transmitter's interrupt
                self.transmit_pending = False
                self._update()
            return cause | (0xC0 if self.fcr & self._FCR_ENABLE else 0)
        if offset == 5:
            return self._LSR_EMPTY | (self._LSR_DATA_READY if self._received else 0)
        if offset == 6:
            value, self.modem = self.modem, self.modem & 0xF0
            self._update()
            return value
        return {3: self.lcr, 4: self.mcr, 7: self.scratch}[offset]

    def write(self, offset: int, size: int, value: int) -> None:
        value &= 0xFF
        if offset == 0:
            if self.lcr & self._LCR_DIVISOR:
                self.divisor = (self.divisor & 0xFF00) | value
                return
            if self.mcr & self._MCR_LOOP:
                if len(self._received) < DEPTH:
                    self._received.append(value)
            else:
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
            if (value ^ self.fcr) & self._FCR_ENABLE or value & self._FCR_CLEAR_RECEIVER:
                self._received.clear()
            self.fcr = value & 0xC9 if value & self._FCR_ENABLE else 0
            self._fill()
        elif offset == 3:
            self.lcr = value
        elif offset == 4:
            self.mcr = value & 0x1F
            self._set_modem()
            self._fill()
        elif offset == 7:
            self.scratch = value
        self._update()

    _FIELDS = ("ier", "lcr", "mcr", "scratch", "fcr", "divisor", "transmit_pending", "modem")

    def state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._FIELDS} | {"received": bytes(self._received), "waiting": bytes(self._waiting)}

    def from_state(self, state: dict[str, Any]) -> None:
        self._received, self._waiting = bytearray(state["received"]), bytearray(state["waiting"])
        for name in self._FIELDS:
            setattr(self, name, state[name])
        self._update()
