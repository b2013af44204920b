"""The port bus and the small devices of this PC; each has ``read``, ``write``, ``state`` and ``from_state``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class PortDevice(Protocol):
    """A device at I/O ports. ``offset`` counts from the first port it was attached at; ``size`` is 1, 2 or 4 bytes."""

    def read(self, offset: int, size: int) -> int: ...

    def write(self, offset: int, size: int, value: int) -> None: ...

    def state(self) -> dict[str, Any]: ...

    def from_state(self, state: dict[str, Any]) -> None: ...


class PortBus:
    """Ports 0–0xFFFF. A port without a device reads all ones and swallows writes, as an ISA bus does."""

    def __init__(self) -> None:
        self._at: dict[int, tuple[PortDevice, int]] = {}
        self.accesses = 0

    def attach(self, device: PortDevice, first: int, count: int) -> None:
        """Let ``device`` answer at ``count`` ports from ``first``."""
        for offset in range(count):
            self._at[first + offset] = (device, offset)

    def read(self, port: int, size: int) -> int:
        found = self._at.get(port)
        if found is None:
            return (1 << (8 * size)) - 1
        self.accesses += 1
        return found[0].read(found[1], size) & ((1 << (8 * size)) - 1)

    def write(self, port: int, size: int, value: int) -> None:
        found = self._at.get(port)
        if found is not None:
            self.accesses += 1
            found[0].write(found[1], size, value & ((1 << (8 * size)) - 1))


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


class Pic:
    """One 8259A, edge triggered (Intel 8259A data sheet); two make the PC's pair, see :class:`PicPair`."""

    def __init__(self) -> None:
        self.base = 0
        self.irr = self.isr = 0
        self.imr = 0xFF
        self.lines = 0
        self._expect = 0  # which initialization word comes next, 0: none
        self._read_isr = False
        self._auto_eoi = False

    def set_line(self, irq: int, level: bool) -> None:
        bit = 1 << irq
        if level and not self.lines & bit:
            self.irr |= bit  # the rising edge is latched
        self.lines = self.lines | bit if level else self.lines & ~bit
        if not level:
            self.irr &= ~bit

    def pending(self) -> int | None:
        """The input that would interrupt now: unmasked, requested, above all in service."""
        ready = self.irr & ~self.imr
        for irq in range(8):
            if self.isr & (1 << irq):
                return None
            if ready & (1 << irq):
                return irq
        return None

    def acknowledge(self) -> int:
        """INTA: the vector of the highest request (7 when it went away: the spurious vector)."""
        irq = self.pending()
        if irq is None:
            return self.base + 7
        self.irr &= ~(1 << irq)
        if not self._auto_eoi:
            self.isr |= 1 << irq
        return self.base + irq

    def read(self, offset: int, size: int) -> int:
        if offset == 1:
            return self.imr
        return self.isr if self._read_isr else self.irr

    def write(self, offset: int, size: int, value: int) -> None:
        value &= 0xFF
        if offset == 0 and value & 0x10:  # ICW1
            self._expect, self.imr, self.isr, self.irr = 2, 0, 0, 0
            self._needs_icw4 = bool(value & 1)
        elif offset == 0 and value & 0x08:  # OCW3
            if value & 2:
                self._read_isr = bool(value & 1)
        elif offset == 0:  # OCW2: end of interrupt
            if value >> 5 == 0b011:
                self.isr &= ~(1 << (value & 7))
            elif value >> 5 == 0b001 and self.isr:
                self.isr &= self.isr - 1
        elif self._expect == 2:
            self.base, self._expect = value & 0xF8, 3
        elif self._expect == 3:
            self._expect = 4 if self._needs_icw4 else 0
        elif self._expect == 4:
            self._auto_eoi, self._expect = bool(value & 2), 0
        else:
            self.imr = value

    _needs_icw4 = False
    _FIELDS = ("base", "irr", "isr", "imr", "lines", "_expect", "_read_isr", "_auto_eoi", "_needs_icw4")

    def state(self) -> dict[str, Any]:
        return {name.lstrip("_"): getattr(self, name) for name in self._FIELDS}

    def from_state(self, state: dict[str, Any]) -> None:
        for name in self._FIELDS:
            setattr(self, name, state[name.lstrip("_")])


class PicPair:
    """Master at 0x20, slave at 0xA0 behind the master's input 2; ``changed`` is called after every change."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self.master, self.slave = Pic(), Pic()
        self._changed = changed

    def attach(self, bus: PortBus) -> None:
        bus.attach(_Notifying(self.master, self._update), 0x20, 2)
        bus.attach(_Notifying(self.slave, self._update), 0xA0, 2)

    def set_line(self, irq: int, level: bool) -> None:
        (self.master if irq < 8 else self.slave).set_line(irq & 7, level)
        self._update()

    def _update(self) -> None:
        self.master.set_line(2, self.slave.pending() is not None)
        self._changed()

    @property
    def pending(self) -> bool:
        """The INTR line to the CPU."""
        return self.master.pending() is not None

    def acknowledge(self) -> int:
        """The vector that the pair puts on the bus in the INTA cycle."""
        if self.master.pending() == 2:
            self.master.acknowledge()
            vector = self.slave.acknowledge()
        else:
            vector = self.master.acknowledge()
        self._update()
        return vector

    def state(self) -> dict[str, Any]:
        return {"master": self.master.state(), "slave": self.slave.state()}

    def from_state(self, state: dict[str, Any]) -> None:
        self.master.from_state(state["master"])
        self.slave.from_state(state["slave"])
        self._changed()


class _Notifying:
    """A device with a call after every write."""

    def __init__(self, device: PortDevice, changed: Callable[[], None]) -> None:
        self._device, self._changed = device, changed
        self.read, self.state, self.from_state = device.read, device.state, device.from_state

    def write(self, offset: int, size: int, value: int) -> None:
        self._device.write(offset, size, value)
        self._changed()
