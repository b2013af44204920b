"""Hidden page faults of a lazy shadow in C (``native/faults.c``): the windows that C looks through, and what it counted."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vmlab.ledger import Counts
from vmlab.machine.paging import RW, US, G

if TYPE_CHECKING:
    from vmlab.machine.pc import Machine

# Words of ``faults`` and of a ``window`` in native/machine.h.
_WINDOWS, _HEAD, _SIZE = 256, 4, 11
_HIDDEN, _DIRTY = 2, 3


class HiddenFaults:
    """Made by :meth:`vmlab.machine.fast_events.FastEvents.offer_faults`; a pager that uses it voids it whenever more than a leaf changes."""

    def __init__(self, machine: Machine, counts: Counts, base: int, size: int) -> None:
        self._machine, self._counts = machine, counts
        memory = (ctypes.c_uint64 * (_HEAD + _WINDOWS * _SIZE))()
        self._words, self.address = memoryview(memory).cast("B").cast("Q"), ctypes.addressof(memory)
        self._words[0], self._words[1] = base, size
        self._base, self._host = base, machine.ram.address
        self._used: set[int] = set()

    def learn(self, address: int, uppers: Sequence[tuple[int, int]], size: int, table: int, leaves: int, global_pages: bool) -> None:
        """The shadow page at ``leaves`` (hpa) gives what the guest's table does for the 2 MiB around ``address``.

        :param uppers: the guest's upper entries, which give their rights: (gpa, value).
        :param size: of an entry in bytes. :param table: gpa of the guest's entry of the first page.
        :param global_pages: whether the G bit of an entry means something (CR4.PGE).
        """
        number = address >> 21 & _WINDOWS - 1
        access = RW | US
        for _, entry in uppers:
            access &= entry
        if global_pages:
            access |= G
        places = [self._host + self._base + gpa for gpa, _ in uppers]
        values = [entry for _, entry in uppers]
        at = _HEAD + number * _SIZE
        self._words[at:at + _SIZE] = memoryview((ctypes.c_uint64 * _SIZE)(
            1, address & ~0x1FFFFF, size, len(uppers), *[*places, 0, 0][:2], *[*values, 0, 0][:2],
            self._host + self._base + table, access, self._host + leaves)).cast("B").cast("Q")
        self._used.add(number)

    def void(self) -> None:
        """Nothing that was learnt holds any more."""
        for number in self._used:
            self._words[_HEAD + number * _SIZE] = 0
        self._used.clear()

    @property
    def waiting(self) -> int:
        """Faults that C carried out and nobody has brought into the ledger yet."""
        return self._words[_HIDDEN] + self._words[_DIRTY]

    def drain(self) -> None:
        """Bring what C counted into the ledger."""
        hidden, dirty = self._words[_HIDDEN], self._words[_DIRTY]
        if hidden or dirty:
            self._words[_HIDDEN] = self._words[_DIRTY] = 0
            self._machine.events["trap.pf"] += hidden + dirty
            counts = self._counts
            for event, n in (("shadow.fault.hidden", hidden), ("shadow.fault.dirty", dirty), ("vmm.guest_walk", hidden + dirty),
                             ("vmm.shadow_update", hidden + dirty)):
                if n:
                    counts[event] += n
