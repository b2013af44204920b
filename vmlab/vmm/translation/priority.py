"""CR8, the task priority of 64-bit mode, in the cache (SDM Vol. 3A §10.8.6).

A write goes to a word of the VMM's page; the local APIC's model hears of it when the VMM next runs, and it runs at once if an
interrupt waits that a lower priority may let through. A value above 15 calls out, and is the guest's #GP.
"""

from __future__ import annotations

from vmlab.machine.counter import Tag
from vmlab.machine.decode import Instruction
from vmlab.machine.devices.lapic import Lapic
from vmlab.machine.state import RCX
from vmlab.vmm.operands import REGISTERS
from vmlab.vmm.space import StaticSpace
from vmlab.vmm.translation.emitter import Emitter
from vmlab.vmm.translation.layout import BELOW_16, NEW_PRIORITY, PRIORITY, PRIORITY_WAITS, PRIORITY_WRITTEN


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
        self._ram, self._lapic = space.ram, lapic
        self._value, self._written, self._waits = (space.hole_frame(at) for at in (PRIORITY, PRIORITY_WRITTEN, PRIORITY_WAITS))

    def take(self) -> None:
        """Before the VMM looks at interrupts. The guest's ring can write the page: no more than four bits of it are believed."""
        if self._ram.read32(self._written):
            self._ram.write32(self._written, 0)
            self._lapic.set_tpr((self._ram.read32(self._value) & 15) << 4)

    def show(self) -> None:
        """After the VMM ran."""
        self._ram.write64(self._value, self._lapic.tpr >> 4)
        self._ram.write32(self._waits, int(bool(self._lapic.irr)))
