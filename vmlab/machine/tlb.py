"""A model of the translation lookaside buffers and of the page walks that fill them.

Unicorn's own TLB says nothing about a real one (it is direct-mapped, and resized by the host's clock), so this one is
kept beside it. It holds tags, no translations: it counts misses, flushes, and the references to table entries that
each walk makes, at the tables' true number of levels. Nothing that runs depends on it, and the same run gives the same
counts everywhere. :mod:`vmlab.machine.accesses` feeds it.

Instruction and data side are apart, each set-associative with least-recently-used replacement; pages of all sizes share
the sets. *Walk caches* keep upper-level entries (SDM Vol. 3A §4.10.3; APM Vol. 2 §15.25.8 has none of them in
the count): without them a walk of n levels makes n references, and under nested paging of m levels (n + 1)(m + 1) − 1, of
which n read the guest's entries. PAE's page-directory pointers are registers and cost none.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

from vmlab.errors import ConfigError
from vmlab.ledger import Counts
from vmlab.parameters import Parameter, Value

INSTRUCTION, DATA = "instruction", "data"


@dataclass(frozen=True)
class TlbConfig:
    """What is modelled.

    :param entries: of the instruction side and of the data side each. :param ways: associativity.
    :param walk_caches: entries kept for each upper level; 0: none.
    :param tagged: entries carry the guest's tag (AMD: ASID, Intel: VPID), so that entering and leaving a guest flushes nothing.
    """

    entries: int = 64
    ways: int = 4
    walk_caches: int = 0
    tagged: bool = False

    def __post_init__(self) -> None:
        if self.entries < 1 or self.ways < 1 or self.entries % self.ways or self.walk_caches < 0:
            raise ConfigError(f"a TLB of {self.entries} entries in sets of {self.ways} cannot be built: give a multiple")


#: What a cell may say of the model; a cell that says nothing has none, at no cost.
PARAMETERS: Mapping[str, Parameter] = {
    "tlb": Parameter("model translation lookaside buffers and page walks", "off", choices=("off", "on")),
    "tlb_entries": Parameter("entries of the instruction side and of the data side each", 64, minimum=1, maximum=65_536),
    "tlb_ways": Parameter("associativity of both sides", 4, minimum=1, maximum=65_536),
    "walk_caches": Parameter("upper-level entries that walks keep, for each level; 0: none", 0, maximum=1024),
    "asid": Parameter("entries carry the guest's tag (AMD: ASID, Intel: VPID)", "off", choices=("off", "on")),
}


def configured(parameters: Mapping[str, Value]) -> TlbConfig | None:
    """The model that a cell's parameters ask for; None: no model. Raises ConfigError for a geometry that cannot be."""
    chosen = {key: parameter.check(key, parameters.get(key, parameter.default)) for key, parameter in PARAMETERS.items()}
    if chosen["tlb"] == "off":
        return None
    return TlbConfig(int(chosen["tlb_entries"]), int(chosen["tlb_ways"]), int(chosen["walk_caches"]), chosen["asid"] == "on")


@dataclass(frozen=True)
class WalkSteps:
    """One walk: for each entry read, from the root down, (what names it, guest-physical address); the page's size and kind.

    ``nested``: the levels that a nested walk of a guest-physical address reads, named likewise; None without nested paging.
    """

    entries: tuple[tuple[tuple[int, int], int], ...]
    page_shift: int
    frame: int
    is_global: bool
    nested: Callable[[int], tuple[tuple[int, int], ...]] | None = None


class _Sets:
    """Least recently used within each set. Values say whether the entry is global."""

    def __init__(self, entries: int, ways: int) -> None:
        self._ways = ways
        self._sets: list[dict[Hashable, bool]] = [{} for _ in range(entries // ways)]

    def hit(self, index: int, tag: Hashable) -> bool:
        found = self._sets[index % len(self._sets)]
        if tag not in found:
            return False
        found[tag] = found.pop(tag)  # most recently used last
        return True

    def add(self, index: int, tag: Hashable, is_global: bool) -> None:
        found = self._sets[index % len(self._sets)]
        if len(found) >= self._ways:
            del found[next(iter(found))]
        found[tag] = is_global

    def drop(self, doomed: Callable[[Hashable, bool], bool]) -> None:
        for entries in self._sets:
            for tag in [tag for tag, is_global in entries.items() if doomed(tag, is_global)]:
                del entries[tag]


#: What tells address spaces apart: the host's, or a guest's by its tag.
Space = int


class Tlb:
    """The two sides and the walk caches of one CPU. ``events`` gets ``tlb.*`` and ``walk.reference.*``."""

    def __init__(self, config: TlbConfig, events: Counts) -> None:
        self.config, self._events = config, events
        self._sides = {side: _Sets(config.entries, config.ways) for side in (INSTRUCTION, DATA)}
        self._sizes = {12}
        caches = config.walk_caches
        self._upper = _Sets(caches * 4, caches) if caches else None    # one set for each level

    def access(self, side: str, space: Space, linear: int, walk: Callable[[], WalkSteps | None]) -> bool:
        """The CPU translates ``linear``; True for a hit. A miss walks and fills; ``walk`` gives None where nothing is mapped."""
        sets = self._sides[side]
        for shift in self._sizes:
            if sets.hit(linear >> shift, (space, shift, linear >> shift)):
                return True
        steps = walk()
        if steps is None:
            return False
        self._events[f"tlb.miss.{side}"] += 1
        self._count(space, steps)
        self._sizes.add(steps.page_shift)
        sets.add(linear >> steps.page_shift, (space, steps.page_shift, linear >> steps.page_shift), steps.is_global)
        return False

    # ---- references
    def _count(self, space: Space, steps: WalkSteps) -> None:
        names = [name for name, _ in steps.entries]
        first = self._known(("guest", space), names)
        read = steps.entries[first:]
        self._events["walk.reference.guest"] += len(read)
        if steps.nested is not None:
            for gpa in (*(at for _, at in read), steps.frame):
                levels = list(steps.nested(gpa))
                self._events["walk.reference.nested"] += len(levels) - self._known(("nested", 0), levels)

    def _known(self, kind: Hashable, names: list[tuple[int, int]]) -> int:
        """How many of the upper entries need not be read, for a cached one leads on; all of them are cached now."""
        if self._upper is None:
            return 0
        known = 0
        for i, name in enumerate(names[:-1]):
            if self._upper.hit(name[0], (kind, name)):
                known = i + 1
            else:
                self._upper.add(name[0], (kind, name), False)
        return known

    # ---- flushes
    def flush(self, space: Space | None = None, *, keep_global: bool = False) -> None:
        """Everything of ``space`` (None: of all); a CR3 load keeps global pages where CR4.PGE is on."""
        self._events["tlb.flush.full"] += 1
        for sets in self._sides.values():
            sets.drop(lambda tag, is_global: _of(tag, space) and not (keep_global and is_global))
        if self._upper is not None:
            self._upper.drop(lambda tag, _: True)

    def flush_page(self, space: Space, linear: int) -> None:
        """INVLPG: the page of ``linear``, global or not, and the walk caches (SDM Vol. 3A §4.10.4.1)."""
        self._events["tlb.flush.page"] += 1
        doomed = {(space, shift, linear >> shift) for shift in self._sizes}
        for sets in self._sides.values():
            sets.drop(lambda tag, _: tag in doomed)
        if self._upper is not None:
            self._upper.drop(lambda tag, _: True)


def _of(tag: Hashable, space: Space | None) -> bool:
    return space is None or (isinstance(tag, tuple) and tag[0] == space)
