"""The cache's memory: where units lie, how exits are patched to lead to them, the look-up table.

Units grow from the bottom, stubs that lie apart from the top; when they meet, everything is thrown away and the cache
fills anew. A unit whose guest code changed is cut off: every exit that led to it gets its stub back, and its look-up
entry misses again. Its room is free only after the next flush.
"""

from __future__ import annotations

from collections.abc import Callable

from vmlab.machine.state import RCX
from vmlab.vmm.space import StaticSpace
from vmlab.vmm.translation.forms import LEAVE_SIZE, NARROW, Forms, jump, relative
from vmlab.vmm.translation.layout import CACHE, FIRST_UNIT, MISS, TABLE, TABLE_ENTRIES, saved
from vmlab.vmm.translation.units import Site, Unit

#: The longest unit with its stubs is far below this.
UNIT_ROOM = 4096
_STUB, _JUMP = 24, 5


class Cache:
    """Machine memory for translations. ``on_patch(start, end)`` hears of code that changed."""

    def __init__(self, space: StaticSpace, size: int, on_patch: Callable[[int, int], None]) -> None:
        self.space, self.size, self._on_patch = space, size, on_patch
        self.forms = NARROW
        space.map_hole(CACHE, size, user=True)
        space.map_hole(TABLE, 8 * TABLE_ENTRIES, user=True)
        self._begin()

    def _begin(self) -> None:
        forms = self.forms
        self._first, self.end = forms.linear(FIRST_UNIT), forms.linear(CACHE) + self.size
        self._bottom, self._top = self._first, self.end
        self._clear_table()

    def use(self, forms: Forms) -> None:
        """Code of another size follows; what is here must have been cleared."""
        self.forms = forms
        self._begin()

    @property
    def used(self) -> int:
        """Bytes taken by units and stubs."""
        return self._bottom - self._first + self.end - self._top

    # ---- memory
    def put(self, linear: int, data: bytes) -> None:
        """Write into the cache."""
        self.space.ram.write(self.space.hole_frame(linear), data)

    def patch(self, linear: int, data: bytes) -> None:
        """Change code that may have run."""
        self.put(linear, data)
        self._on_patch(linear, linear + len(data))

    @property
    def full(self) -> bool:
        """Whether another unit may not fit."""
        return self._bottom + UNIT_ROOM > self._top

    @property
    def next_unit(self) -> int:
        """Where the next unit will begin."""
        return self._bottom

    def unit_written(self, unit: Unit) -> None:
        """The unit's bytes are in place: the next one follows."""
        self._bottom = unit.end

    def stub_space(self) -> int:
        """Room for one stub that lies apart."""
        self._top -= _STUB
        return self._top

    def take_back(self, bottom: int) -> None:
        """The unit that was to begin here could not be translated."""
        self._bottom = bottom

    def reserve(self, size: int) -> int:
        """Room for ``size`` bytes beside the units."""
        at = self._bottom
        self._bottom += size
        return at

    def clear(self) -> None:
        """Forget all translated code."""
        self._on_patch(self.forms.linear(CACHE), self.end)
        self._begin()

    # ---- the look-up table
    def _clear_table(self) -> None:
        forms, miss = self.forms, self.forms.linear(MISS)
        restore = forms.load(RCX, saved(RCX))
        self.put(MISS, restore + forms.leave(miss + len(restore), 0))
        self.put(TABLE, forms.pack(miss) * TABLE_ENTRIES)

    def _entry_of(self, unit: Unit) -> int:
        return TABLE + self.forms.word * (unit.guest & 0xFFFF)

    def enter(self, unit: Unit) -> None:
        """Let look-ups of this unit's guest address find it; another unit with the same low 16 bits loses its place."""
        self.put(self._entry_of(unit), self.forms.pack(unit.entry))

    def remove(self, unit: Unit) -> None:
        """Let look-ups of this unit's guest address miss."""
        forms, at = self.forms, self._entry_of(unit)
        if unit.entry and self.space.ram.read(self.space.hole_frame(at), forms.word) == forms.pack(unit.entry):
            self.put(at, forms.pack(forms.linear(MISS)))

    # ---- chains
    def follows(self, site: Site) -> bool:
        """Whether the next unit may take the place of this exit's stub: they are neighbours, and the jump that leads to
        this unit's own stub again, should this unit be cut off, does not reach into the next one."""
        return site.form == "inline" and site.stub + LEAVE_SIZE == self._bottom and site.stub - site.unit.start >= _JUMP

    def take_place_of(self, site: Site) -> None:
        """The next unit begins where this exit's stub was, and needs no jump to be reached."""
        self._bottom = site.stub
        site.spare = self.stub_space()
        self.put(site.spare, self.forms.leave(site.spare, site.number))
        self._on_patch(site.stub, site.stub + LEAVE_SIZE)

    def chain(self, site: Site, unit: Unit) -> None:
        """Lead this exit straight to ``unit``."""
        if site.form == "inline":
            if site.stub != unit.start:
                self.patch(site.stub, jump(site.stub, unit.start))
        else:
            self.patch(site.patch, relative(site.patch, 4, unit.start))
        site.target = unit
        unit.incoming.add(site)

    def unchain(self, site: Site) -> None:
        """Lead this exit to its stub again."""
        if site.target is None:
            return
        site.target.incoming.discard(site)
        site.target = None
        if site.spare:
            self.patch(site.stub, jump(site.stub, site.spare))
        elif site.form == "inline":
            self.patch(site.stub, self.forms.leave(site.stub, site.number))
        else:
            self.patch(site.patch, relative(site.patch, 4, site.stub))
