"""The local APIC's task priority in the cache (SDM Vol. 3A §10.8.3.1): as CR8 in 64-bit mode, as a store to TPR in 32-bit code.

A write to CR8 goes to a word of the VMM's page; the local APIC's model hears of it when the VMM next runs, and it runs at once if an
interrupt waits that a lower priority may let through. A value above 15 calls out, and is the guest's #GP.

An adapted store to TPR goes through a window (:mod:`vmlab.vmm.translation.windows`) to a page of the VMM's, as long as no interrupt
waits in the APIC: then there is none to hold back, and the store is nothing but a store. While one waits, the chart forbids it, and
it calls out.
"""

from __future__ import annotations

from vmlab.machine.code import Tag
from vmlab.machine.decode import Instruction
from vmlab.machine.devices.lapic import BASE, TPR, Lapic
from vmlab.machine.memory import PAGE
from vmlab.machine.state import RCX
from vmlab.vmm.operands import REGISTERS
from vmlab.vmm.space import StaticSpace
from vmlab.vmm.translation.emitter import Emitter
from vmlab.vmm.translation.layout import BELOW_16, CHARTS, NEW_PRIORITY, PRIORITY, PRIORITY_WAITS, PRIORITY_WRITTEN, WINDOWS

#: The guest frame that the window is said to show.
APIC_FRAME = BASE >> 12


def mov_to_cr8(em: Emitter, at: int, ins: Instruction) -> bool:
    """The register's upper seven bytes must be 0, and its lowest below 16."""
    forms, site = em.forms, em.site("system", at, ins)
    em.emit(forms.store(NEW_PRIORITY, REGISTERS[ins.cs.operands[1].reg][0]))
    em.save(RCX)
    for overlapping in (1, 4):
        em.emit(forms.load_low(RCX, NEW_PRIORITY + overlapping))
        em.callout_if_not(b"\xe3", site)
    em.emit(forms.load_byte(NEW_PRIORITY))
    em.emit(forms.load_by_byte(BELOW_16))
    em.callout_if_not(b"\xe3", site)
    em.emit(forms.load_byte(NEW_PRIORITY))
    em.emit(forms.store_cl(PRIORITY))
    em.emit(forms.store_byte(PRIORITY_WRITTEN, 1), Tag(ins, "incache"))
    em.commit((at + ins.size) & forms.mask)
    em.emit(forms.load_low(RCX, PRIORITY_WAITS))
    em.callout_if_not(b"\xe3", em.site("interrupt", em.state.rip))
    em.restore(RCX)
    return False


def mov_from_cr8(em: Emitter, at: int, ins: Instruction) -> bool:
    """A load."""
    em.emit(em.forms.load(REGISTERS[ins.cs.operands[0].reg][0], PRIORITY), Tag(ins, "incache"))
    return False


class Priority:
    """The VMM's side: what translated code wrote goes to the local APIC, what it may read comes from there."""

    def __init__(self, space: StaticSpace, lapic: Lapic) -> None:
        self._space, self._ram, self._lapic = space, space.ram, lapic
        self._window: int | None = None     # hpa of TPR in the window's page, while there is one
        self._chart = 0
        self._value, self._written, self._waits = (space.hole_frame(at) for at in (PRIORITY, PRIORITY_WRITTEN, PRIORITY_WAITS))

    def open(self, number: int) -> None:
        """Window ``number`` is the APIC's: it shows the page of the VMM's that lies behind it."""
        at = WINDOWS + number * PAGE
        self._space.show(at, self._space.hole_frame(at))
        self._window = self._space.hole_frame(at) + TPR
        self._chart = self._space.hole_frame(CHARTS + number * PAGE) + TPR
        self.show()

    def close(self) -> None:
        """The window is another's."""
        self.take()
        self._window = None

    def take(self) -> None:
        """Before the VMM looks at interrupts. The guest's ring can write the page: no more than four bits of it are believed."""
        if self._ram.read32(self._written):
            self._ram.write32(self._written, 0)
            self._lapic.set_tpr((self._ram.read32(self._value) & 15) << 4)
        if self._window is not None:
            self._lapic.set_tpr(self._ram.read32(self._window) & 0xFF)

    def show(self) -> None:
        """After the VMM ran."""
        self._ram.write64(self._value, self._lapic.tpr >> 4)
        self._ram.write32(self._waits, int(bool(self._lapic.irr)))
        if self._window is not None:
            self._ram.write32(self._window, self._lapic.tpr)
            self._ram.write(self._chart, bytes((bool(self._lapic.irr),)))
