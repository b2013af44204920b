"""Adaptive translation: a copied access that keeps faulting on watched memory is replaced (Adams & Agesen, ASPLOS 2006, §4).

Innocent until proven guilty: every ordinary access is copied first. One that the VMM had to carry out often enough is
guilty. Its unit stays where it is; in the access's place comes a *forwarding jump* to a new unit, in which the access is
simulated (:mod:`vmlab.vmm.translation.simulate`) or called out. That is one patch, however many units lead here. What is
left behind the jump is dead. The new unit is made when the jump is first taken, as every continuation is.

The way back is the same: an access that called out again and again for memory that nobody watches is innocent once more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from capstone import x86_const as cs_x86

from vmlab.machine.decode import Instruction
from vmlab.vmm.translation.forms import LEAVE_JUMP, jump
from vmlab.vmm.translation.units import Kind, Piece, Site, State, Unit

if TYPE_CHECKING:
    from vmlab.vmm.translation.translator import Translator
    from vmlab.vmm.translation.windows import Windows

#: Callouts in a row that had nothing to do with watched memory, after which a guilty access is copied again.
INNOCENT_AFTER = 64
#: ``jmp rel32``
_JUMP = 5


def accessed(instruction: Instruction) -> Any:
    """The explicit memory operand of an access that may be adapted; None where there is none."""
    if instruction.string or instruction.op is not None or instruction.kind in ("branch", "jcc", "indirect"):
        return None
    return next((operand for operand in instruction.cs.operands if operand.type == cs_x86.X86_OP_MEM), None)


class Adaptation:
    """Who is suspected, who is guilty, and who may be innocent after all."""

    def __init__(self, translator: Translator, windows: Windows) -> None:
        self._translator, self._windows = translator, windows
        self._faults: dict[int, int] = {}      # by kernel instruction: faults on memory that the VMM watches
        self._vain: dict[int, int] = {}        # by guilty instruction: callouts in a row for memory that nobody watches

    def fault(self, at: int, instruction: Instruction) -> None:
        """The kernel instruction at ``at`` faulted on memory that the VMM watches."""
        options = self._translator.options
        if options.adaptation == "off" or accessed(instruction) is None:
            return
        self._faults[at] = self._faults.get(at, 0) + 1
        if self._faults[at] >= options.guilty_after:
            del self._faults[at]
            convict(self._translator, at)

    def callout(self, site: Site, at: int, address: int) -> None:
        """A guilty access called out, and was carried out at linear ``address``."""
        if self._windows.watched(address):
            self._vain.pop(at, None)
            if site.binding:
                self._windows.offer(site, address)
            return
        self._vain[at] = self._vain.get(at, 0) + 1
        if self._vain[at] == INNOCENT_AFTER:
            del self._vain[at]
            acquit(self._translator, at)


def convict(translator: Translator, guest: int) -> None:
    """This instruction is guilty: from now on it is translated in its other form."""
    translator.guilty.add(guest)
    translator.counts["bt.adapt"] += 1
    _replace(translator, guest, "adapted")


def acquit(translator: Translator, guest: int) -> None:
    """This instruction is innocent again: copied."""
    translator.guilty.discard(guest)
    translator.counts["bt.adapt.back"] += 1
    _replace(translator, guest, "adapted back")


def _replace(translator: Translator, guest: int, why: str) -> None:
    for unit in list(translator.units.values()):
        piece = next((piece for piece in unit.pieces if piece.guest == guest), None)
        if piece is None:
            continue
        site = _forward(translator, unit, piece)
        if site is None:
            del translator.units[unit.guest]
            translator.drop(unit)
            translator.on_drop(unit)
        translator.listener(why, unit, site)


def _own_end(unit: Unit) -> int:
    """Where the unit's code ends: the next unit may have taken the place of its last stub."""
    return min([site.stub for site in unit.sites if site.form == "inline" and site.target and site.target.start == site.stub], default=unit.end)


def _forward(translator: Translator, unit: Unit, piece: Piece) -> Site | None:
    """Put the jump; None where it has no room, where nothing comes before it, or an STI does whose shadow must hold."""
    at, end = piece.start, _own_end(unit)
    if piece is unit.pieces[0] or at + _JUMP > end or translator.cache.full or translator.states[at].shadow:
        return None
    for site in unit.sites[piece.first_site:]:
        translator.detach(site)
    del unit.sites[piece.first_site:]
    for address in [address for address in unit.addresses if at < address < end]:
        translator.states.pop(address, None)
        translator.tags.pop(address, None)
        unit.addresses.remove(address)
    translator.tags.pop(at, None)
    unit.pieces[unit.pieces.index(piece):] = [Piece(piece.guest, piece.instruction, Kind.FORWARD, at, at + _JUMP, piece.first_site)]
    unit.end = at + _JUMP
    site = translator.new_site("chain", piece.guest, unit, None, "forward")
    site.patch, site.stub = at + 1, translator.cache.stub_space()
    translator.cache.put(site.stub, translator.forms.leave(site.stub, site.number))
    for address in (site.stub, site.stub + LEAVE_JUMP):
        translator.states[address] = State(piece.guest)
        unit.addresses.append(address)
    translator.cache.patch(at, jump(at, site.stub))
    return site
