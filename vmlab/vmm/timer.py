"""The machine's interval timer in a VMM's hands: one interrupt at a time, when the next of its own events is due."""

from __future__ import annotations

from vmlab.ledger import Counts
from vmlab.machine.board import PIT_PORT
from vmlab.machine.devices.pit import HZ, NANOSECONDS
from vmlab.machine.pc import Machine
from vmlab.vmm.host import PhysicalBus

#: Channel 0, both bytes of the count, mode 0: one interrupt (Intel 8254 data sheet, "Control Word Format").
_ONE_SHOT = 0x30
_LONGEST = 0xFFFF


class PhysicalTimer:
    """Channel 0 of the machine's 8254 as a one-shot timer of the VMM's."""

    def __init__(self, machine: Machine, bus: PhysicalBus, counts: Counts) -> None:
        self._machine, self._bus, self._counts = machine, bus, counts
        #: When it will interrupt; None: nothing is armed.
        self.due: int | None = None

    def arm(self, due: int | None) -> None:
        """Interrupt at ``due`` (virtual ns) or at most two clocks of 838 ns after it, never before; None: not at all.

        What is further away than the 8254 can count, 55 ms, comes early: ask again then.
        """
        if due == self.due:
            return
        self.due = due
        self._counts["vmm.timer"] += 1
        stop = (PIT_PORT + 3, 1, _ONE_SHOT)         # stops what was counted
        if due is None:
            self._bus.own(stop)
            return
        ticks = -(-max(due - self._machine.time, 0) * HZ // NANOSECONDS)
        count = min(max(ticks, 1), _LONGEST)        # OUT goes high count + 1 clocks after the count was written
        self._bus.own(stop, (PIT_PORT, 1, count & 0xFF), (PIT_PORT, 1, count >> 8))

    def fired(self) -> None:
        """Its interrupt came: nothing is armed now."""
        self.due = None
