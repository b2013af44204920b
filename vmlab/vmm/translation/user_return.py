"""IRET to user mode in the cache: a real one, once everything that the CPU does not check for the guest was checked.

The kernel runs at CPL 1, so its IRET to CPL 3 works on the hardware; what it cannot know is the virtual IF, and that
the descriptors it loads from the VMM's shadow are still what the guest's own table says. The template compares both selectors
and both descriptors, read where the guest has them, with what the VMM saw when it last carried such an IRET out; the flags
image with what POPF may set; and asks whether an interrupt waits. Anything else calls out, and the VMM learns.

The virtual IF changes one instruction before the IRET (:attr:`~vmlab.vmm.translation.units.State.early_flags`): a fault in between
takes it back, an interrupt waits for the user's first instruction.
"""

from __future__ import annotations

import struct

from vmlab.machine.code import Tag
from vmlab.machine.decode import Instruction
from vmlab.machine.state import CS, RCX, SS
from vmlab.vmm.translation.cache import Cache
from vmlab.vmm.translation.emitter import Emitter
from vmlab.vmm.translation.layout import NEW_FLAGS, OLD_FLAGS, PENDING, VIRTUAL_FLAGS
from vmlab.vmm.translation.units import Site
from vmlab.vmm.vcpu import VirtualCpu

#: No selector: until the VMM has learned one.
_UNKNOWN = 0x10000
#: Operands bound later: both selectors; then of CS and SS both halves of the descriptor, each with its address.
_OPERANDS = 10


def iret_to_user(em: Emitter, ins: Instruction, site: Site) -> None:
    """The rest of IRET's template; ECX is saved. ``site``: its callout."""
    forms = em.forms
    binding: list[int] = []

    def compare() -> None:
        """Go on where ECX is the value bound here."""
        binding.append(em.emit(forms.subtract(_UNKNOWN)) + 2)
        em.callout_if_not(b"\xe3", site)

    for place in (1, 4):
        em.emit(forms.stack_half(place * forms.word))
        compare()
    for _ in range(4):
        binding.append(em.emit(forms.load_low(RCX, 0)) + 3)
        compare()
    em.emit(forms.load_low(RCX, PENDING))
    em.callout_if_not(b"\xe3", site)
    em.emit(forms.load_low(RCX, VIRTUAL_FLAGS))
    em.emit(forms.store(OLD_FLAGS, RCX))
    em.emit(forms.load_low(RCX, NEW_FLAGS))
    em.emit(forms.store_cl(VIRTUAL_FLAGS + 1))
    em.flags_changed_early()
    em.restore(RCX)
    em.emit(b"\xcf", Tag(ins, "incache"), "direct")
    assert len(binding) == _OPERANDS
    site.binding = tuple(binding)


class UserReturns:
    """Where IRETs go to user mode, and what they may expect there."""

    def __init__(self, vcpu: VirtualCpu, cache: Cache) -> None:
        self._vcpu, self._cache = vcpu, cache
        self._known: dict[Site, tuple[int, ...]] = {}

    def learn(self, site: Site) -> None:
        """The VMM has just carried the IRET of ``site`` out, to user mode."""
        vcpu = self._vcpu
        found = []
        for number in (CS, SS):
            selector = vcpu.selector(number)
            if selector & 4 or selector & 3 != 3:
                return      # of the LDT, which has no shadow
            at = vcpu.gdt.base + (selector & ~7)
            vcpu.shadow_descriptor(selector >> 3)
            low, high = struct.unpack("<II", vcpu.read_linear(at, 8))
            found.append((selector, at, low, at + 4, high))
        (cs, *code), (ss, *stack) = found
        self._aim(site, (-cs, -ss, *self._negated(code), *self._negated(stack)))

    @staticmethod
    def _negated(words: list[int]) -> tuple[int, ...]:
        low_at, low, high_at, high = words
        return low_at, -low, high_at, -high

    def forget(self, site: Site) -> None:
        """``site`` is gone."""
        self._known.pop(site, None)

    def forget_all(self) -> None:
        """The guest has another GDT: nothing is known."""
        for site in list(self._known):
            self._aim(site, (-_UNKNOWN,) * _OPERANDS)
        self._known.clear()

    def _aim(self, site: Site, values: tuple[int, ...]) -> None:
        if self._known.get(site) != values:
            self._known[site] = values
            for at, value in zip(site.binding, values, strict=True):
                self._cache.patch(at, struct.pack("<I", value & 0xFFFFFFFF))
