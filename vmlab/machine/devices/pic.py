"""The interrupt controllers: a pair of 8259A (Intel 8259A data sheet)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vmlab.machine.devices.bus import Notifying, PortBus


class Pic:
    """One 8259A (Intel 8259A data sheet); two make the PC's pair, see :class:`PicPair`.

    Inputs are edge triggered, but for those that ``levels`` (ELCR; Intel 82371SB §2.5.3) makes level triggered. Input 0 has the
    highest priority, always: of the OCWs, rotation, the special mask and poll are ignored; so are ICW3 (the cascade is wired) and
    of ICW4 all but automatic EOI.
    """

    def __init__(self) -> None:
        self.base = self.levels = 0
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

    @property
    def requests(self) -> int:
        """IRR: edges latched, and levels as they are."""
        return self.irr | self.lines & self.levels

    def pending(self) -> int | None:
        """The input that would interrupt now: unmasked, requested, above all in service."""
        ready = (self.irr | self.lines & self.levels) & ~self.imr
        if not ready:
            return None
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
        return self.isr if self._read_isr else self.requests

    def write(self, offset: int, size: int, value: int) -> None:
        value &= 0xFF
        if offset == 0 and value & 0x10:  # ICW1
            # Edge detection starts anew, the mask is cleared, status reads give IRR; without ICW4 its functions are off ("ICW1 and ICW2").
            self._expect, self.imr, self.isr, self.irr, self._read_isr = 2, 0, 0, 0, False
            self._needs_icw4 = bool(value & 1)
            self._auto_eoi &= self._needs_icw4
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
    _FIELDS = ("base", "levels", "irr", "isr", "imr", "lines", "_expect", "_read_isr", "_auto_eoi", "_needs_icw4")

    def state(self) -> dict[str, Any]:
        return {name.lstrip("_"): getattr(self, name) for name in self._FIELDS}

    def from_state(self, state: dict[str, Any]) -> None:
        for name in self._FIELDS:
            setattr(self, name, state[name.lstrip("_")])


class EdgeLevel:
    """ELCR of one 8259A, at 0x4D0 or 0x4D1: which inputs are level triggered. Inputs in ``always_edge`` stay as they are."""

    def __init__(self, pic: Pic, always_edge: int) -> None:
        self._pic, self._writable = pic, 0xFF & ~always_edge

    def read(self, offset: int, size: int) -> int:
        return self._pic.levels

    def write(self, offset: int, size: int, value: int) -> None:
        self._pic.levels = value & self._writable

    def state(self) -> dict[str, Any]:
        return {}

    def from_state(self, state: dict[str, Any]) -> None:
        """It is the controller's."""


class PicPair:
    """Master at 0x20, slave at 0xA0 behind the master's input 2; ``changed`` is called after every change."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self.master, self.slave = Pic(), Pic()
        #: The INTR line to the CPU.
        self.pending = False
        self._changed = changed

    def attach(self, bus: PortBus) -> None:
        bus.attach(Notifying(self.master, self._update), 0x20, 2)
        bus.attach(Notifying(self.slave, self._update), 0xA0, 2)
        # The timer, the keyboard, the slave; the clock, the coprocessor.
        bus.attach(Notifying(EdgeLevel(self.master, 0b0000_0111), self._update), 0x4D0, 1)
        bus.attach(Notifying(EdgeLevel(self.slave, 0b0010_0001), self._update), 0x4D1, 1)

    def set_line(self, irq: int, level: bool) -> None:
        (self.master if irq < 8 else self.slave).set_line(irq & 7, level)
        self._update()

    def _update(self) -> None:
        self.master.set_line(2, self.slave.pending() is not None)
        self.pending = self.master.pending() is not None
        self._changed()

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
        self.pending = self.master.pending() is not None
        self._changed()
