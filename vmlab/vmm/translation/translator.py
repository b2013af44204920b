"""Decides: which guest instructions make a unit, how each is translated, which units exist.

A unit is a straight line of at most :data:`UNIT_LIMIT` guest instructions, ended by control flow. Ordinary instructions
are copied (IDENT); sensitive ones have a template, or call out. A unit goes on behind a callout that comes back.
Nothing here executes: :mod:`vmlab.strategies.translation` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vmlab.errors import GuestRefused
from vmlab.ledger import Counts
from vmlab.machine.code import Tag, Tags
from vmlab.machine.decode import Instruction
from vmlab.machine.delivery import Fault
from vmlab.machine.paging import PageFault
from vmlab.machine.state import RCX
from vmlab.vmm.operands import Fetch, read_instruction
from vmlab.vmm.space import StaticSpace
from vmlab.vmm.translation import relative
from vmlab.vmm.translation.cache import Cache
from vmlab.vmm.translation.control import control_flow
from vmlab.vmm.translation.emitter import Emitter, entry_code, entry_size
from vmlab.vmm.translation.forms import LEAVE_JUMP, LEAVE_SIZE, LONG, NARROW
from vmlab.vmm.translation.layout import CACHE_LIMIT, GATE, MISS, PENDING, TARGET, VIRTUAL_FLAGS, saved
from vmlab.vmm.translation.sensitive import Template, flag_tables, template
from vmlab.vmm.translation.simulate import simulable, simulate
from vmlab.vmm.translation.steady import Learning
from vmlab.vmm.translation.units import Kind, Mode, Site, State, Unit

UNIT_LIMIT = 12

_SYSTEM_CAUSES = frozenset({"cli", "sti", "pushf", "popf", "iret", "in", "out", "cpuid", "rdtsc", "hlt"})
_SEGMENT_OPS = frozenset({"mov_to_seg", "mov_from_seg", "push_seg", "pop_seg", "load_far"})
_TRAP_OPS = frozenset({"int", "int3", "into", "int1"})
#: Callouts after which the guest goes on elsewhere.
_LEAVES = _TRAP_OPS | {"iret", "jmp_far", "call_far", "ret_far", "sysenter", "sysexit", "syscall", "sysret"}


@dataclass(frozen=True)
class Options:
    """What is switched on, so that an experiment can show what each part buys."""

    emulation: str = "in-cache"     # sensitive instructions: in-cache | callout
    lookup: str = "in-cache"        # indirect targets: in-cache | callout
    chaining: str = "on"            # exits patched to lead to their targets: on | off
    adaptation: str = "simulate"    # accesses that keep faulting on watched memory: simulate | callout | off
    guilty_after: int = 8           # faults until then
    cache_size: int = CACHE_LIMIT   # bytes
    unit_limit: int = UNIT_LIMIT    # guest instructions


class Translator:
    """All translations of one guest. ``units`` and their pieces and sites are the data to look at."""

    def __init__(self, space: StaticSpace, counts: Counts, options: Options, *, on_patch: Callable[[int, int], None],
                 watched: Callable[[int], Callable[[int], None] | None], watch: Callable[[int, Callable[[int], None]], None]) -> None:
        self.space, self.ram, self.counts, self.options = space, space.ram, counts, options
        self._watched, self._watch = watched, watch
        space.map_hole(VIRTUAL_FLAGS, 0x1000, writable=True, user=True)
        space.map_hole(PENDING, 0x1000, user=True)
        self.ram.write(space.map_hole(GATE, 0x1000, user=True), b"\xcc")  # never executed: the machine's hook is here
        self.cache = Cache(space, options.cache_size, on_patch)
        self.mode, self.forms = Mode(), NARROW
        self.units: dict[int, Unit] = {}
        #: Guest instructions that kept faulting on memory which the VMM watches (:mod:`vmlab.vmm.translation.adapt`).
        self.guilty: set[int] = set()
        #: cache address of a machine instruction → the guest's state before it
        self.states: dict[int, State] = {}
        self.tags: dict[int, Tag] = {}
        self.sites: dict[int, Site] = {}
        self._next_site = 1
        self.generation = 0
        #: Asked when the cache is emptied, for listings: how often each of its addresses had run by then.
        self.runs_by_code: Callable[[], Mapping[tuple[int, str, int], tuple[int, int]]] = dict
        #: When what was learned, and the clock for that.
        self.learning = Learning()
        self.clock: Callable[[], int] = lambda: 0
        self.emptied_at: Mapping[tuple[int, str, int], tuple[int, int]] = {}
        #: Told of what happens to translations (for `vmlab translate --steps`): (what, unit, site).
        self.listener: Callable[[str, Unit, Site | None], None] = lambda what, unit, site: None
        #: Told of units made and thrown away (the keeper of code pages).
        self.on_unit: Callable[[Unit], None] = lambda unit: None
        self.on_drop: Callable[[Unit], None] = lambda unit: None
        #: Told of sites that are no more (the keeper of windows).
        self.on_site_gone: Callable[[Site], None] = lambda site: None
        self._begin_generation()

    def _begin_generation(self) -> None:
        self.generation += 1
        miss = self.forms.linear(MISS)
        self.sites = {0: Site(0, "indirect", None, Unit(0, miss))}
        restored = miss + len(self.forms.load(RCX, saved(RCX)))
        self.states = {miss: State(None, ((RCX, saved(RCX)),)), restored: State(None), restored + LEAVE_JUMP: State(None)}
        self.tags = {}
        for address, table in flag_tables(self.mode.iopl).items():
            self.ram.write(self.space.hole_frame(address), table)

    # ---- asked by the machine and the strategy
    def tag_block(self, pc: int, instructions: list[Instruction]) -> Tags | None:
        """What a block's machine instructions stand for; None outside the cache (the guest's own code)."""
        if not self.space.in_hole(pc):
            return None
        tags: Tags = []
        at = pc
        for instruction in instructions:
            tags.append(self.tags.get(at))
            at += instruction.size
        return tags

    def guest_address(self, cache: int) -> int:
        """The guest's instruction pointer when the machine is about to execute what lies here in the cache."""
        rip = self.states[cache].rip
        return self.read_word(TARGET) if rip is None else rip

    def read_word(self, address: int) -> int:
        """One of the words that translated code stores."""
        return int.from_bytes(self.ram.read(self.space.hole_frame(address), self.forms.word), "little")

    def find(self, guest: int) -> Unit | None:
        """The unit that begins at this guest address, if it is translated."""
        return self.units.get(guest)

    def new_site(self, cause: str, guest: int | None, unit: Unit, instruction: Instruction | None, form: str) -> Site:
        """A new way out of ``unit``."""
        site = Site(self._next_site, cause, guest, unit, instruction, form)
        self._next_site += 1
        self.sites[site.number] = site
        unit.sites.append(site)
        return site

    def watcher(self, guest: int, cache: int) -> None:
        """Somebody watches this guest address: have the machine watch where its translation begins."""
        callback = self._watched(guest)
        if callback is not None:
            seen = callback

            def passed(address: int) -> None:
                state = self.states.get(address)
                if state is not None and state.rip == guest:  # else: other code lies here by now
                    seen(address)

            self._watch(cache, passed)

    # ---- throwing away
    def evict_all(self) -> None:
        """The cache is full: begin anew."""
        self.counts["bt.evict"] += len(self.units)
        self._forget_all("evicted")

    def flush(self) -> None:
        """What all translations rest on (IOPL, the kernel's code segment) has changed."""
        self.counts["bt.invalidate"] += len(self.units)
        self._forget_all("invalidated")

    def _forget_all(self, why: str) -> None:
        for unit in self.units.values():
            unit.alive = False
            self.listener(why, unit, None)
            self.on_drop(unit)
            for site in unit.sites:
                self.on_site_gone(site)
        self.units.clear()
        self.emptied_at = self.runs_by_code()
        self.cache.clear()
        self._begin_generation()

    def invalidate(self, unit: Unit) -> None:
        """This unit's guest code is no longer what was translated: cut it off."""
        self.counts["bt.invalidate"] += 1
        del self.units[unit.guest]
        self.drop(unit)
        self.listener("invalidated", unit, None)
        self.on_drop(unit)

    def drop(self, unit: Unit) -> None:
        """Take the unit out of all tables, and its place in the chains."""
        unit.alive = False
        for address in unit.addresses:
            self.states.pop(address, None)
            self.tags.pop(address, None)
        self.cache.remove(unit)
        for site in sorted(unit.incoming, key=lambda s: s.number):
            self.cache.unchain(site)
            at = site.spare or site.stub
            if site.form == "inline":
                self.states[site.stub] = self.states[at] = self.states[at + LEAVE_JUMP] = State(site.guest)
        for site in unit.sites:
            self.detach(site)

    def detach(self, site: Site) -> None:
        """This site's code runs no more."""
        if site.target is not None:
            site.target.incoming.discard(site)
            site.target = None
        self.sites.pop(site.number, None)
        self.on_site_gone(site)

    def set_mode(self, mode: Mode) -> None:
        """What templates have built in."""
        if mode != self.mode:
            before, self.mode = self.mode, mode
            self.flush()
            if mode.bits != before.bits:
                self.forms = LONG if mode.bits == 64 else NARROW
                self.cache.use(self.forms)
                self._begin_generation()

    # ---- chaining
    def chain(self, site: Site, target: Unit) -> None:
        """Patch an exit to lead straight to ``target``."""
        self.cache.chain(site, target)
        self.counts["bt.chain"] += 1
        self.learning.note("chained", self.clock())
        self.listener("chained", target, site)

    # ---- translation
    def translate(self, guest: int, fetch: Fetch, *, after: Site | None = None, indirect: bool = False) -> Unit:
        """Translate the unit at ``guest``.

        :param after: the exit that leads here; where they are neighbours, the unit takes its stub's place.
        :param indirect: the unit is looked up: give it an entry that checks its address.
        :raises PageFault: the first instruction cannot be fetched.
        """
        if self.cache.full:
            self.evict_all()
            after = None
        bottom = self.cache.next_unit
        if after is not None and after.unit.alive and self.cache.follows(after):
            self.cache.take_place_of(after)
            taken = range(after.stub, after.stub + LEAVE_SIZE)
            after.unit.addresses = [at for at in after.unit.addresses if at not in taken]
        start = self.cache.next_unit
        unit = Unit(guest, start)
        if indirect:
            unit.entry, unit.start = start, start + entry_size(self.forms, guest)
        try:
            self._fill(unit, fetch, self.options.unit_limit)
        except (PageFault, GuestRefused, Fault):
            self.cache.take_back(bottom)
            raise
        if indirect:
            self._write_entry(unit, unit.entry)
            self.cache.enter(unit)
        self.units[guest] = unit
        self.counts["bt.translate.unit"] += 1
        self.learning.note("translated", self.clock())
        self.counts["bt.translate.instruction"] += max(len(unit.pieces), 1)
        self.counts["bt.translate.bytes_in"] += len(unit.source)
        self.counts["bt.translate.bytes_out"] += unit.end - start
        self.on_unit(unit)
        self.listener("translated", unit, None)
        return unit

    def give_entry(self, unit: Unit) -> None:
        """The unit was reached directly so far and is looked up now."""
        if not unit.entry:
            unit.entry = self.cache.reserve(entry_size(self.forms, unit.guest) + 5)
            self._write_entry(unit, unit.entry)
        self.cache.enter(unit)

    def _write_entry(self, unit: Unit, at: int) -> None:
        for raw, state in entry_code(self.forms, at, unit.guest, unit.start):
            self.cache.put(at, raw)
            self.states[at] = state
            unit.addresses.append(at)
            at += len(raw)

    def _fill(self, unit: Unit, fetch: Fetch, limit: int) -> None:
        em = Emitter(self, unit)
        mask, bits = self.forms.mask, self.forms.bits
        at = unit.guest
        while True:
            ins, fault = read_instruction(fetch, at, bits)
            if fault is not None:
                if not em.count:
                    self._take_back(unit)
                    raise fault
                em.exit_inline(at)
                break
            if ins is None:
                em.begin(at)
                em.callout("fault", at, None)
                em.piece(None, Kind.CALLOUT)
                at += 1
                break
            following = (at + ins.size) & mask
            if ins.op == "sti" and em.count == limit - 1 and em.count and self._template(ins):
                em.exit_inline(at)   # its shadow needs the next instruction in the same unit
                break
            em.begin(at)
            ended = self._instruction(em, at, ins, following, fetch)
            at = following
            if ended:
                break
            another_page = at >> 12 != unit.guest >> 12   # perhaps not even mapped
            if (em.count >= limit or another_page) and not em.check_next:
                em.exit_inline(at)
                break
        em.finish()
        unit.source = fetch(unit.guest, (at - unit.guest) & mask)
        self.cache.unit_written(unit)

    def _take_back(self, unit: Unit) -> None:
        for site in unit.sites:
            del self.sites[site.number]

    def _template(self, ins: Instruction) -> Template | None:
        return template(ins) if self.options.emulation == "in-cache" else None

    def _instruction(self, em: Emitter, at: int, ins: Instruction, following: int, fetch: Fetch) -> bool:
        """Translate one instruction; True when it ended the unit."""
        shadowed = em.check_next
        if ins.op is not None:
            found = self._template(ins)
            if found is not None and ins.op == "sti" and (shadowed or not self._shadow_can_follow(following, fetch)):
                found = None
            if found is None:
                return self._callout(em, at, ins)
            ended = found(em, at, ins)
            em.piece(ins, Kind.IN_CACHE)
            if ended:
                return True
        elif ins.kind in ("branch", "jcc", "indirect"):
            control_flow(em, at, ins)
            em.piece(ins, Kind.CONTROL)
            return True
        elif at in self.guilty:
            in_cache = self.options.adaptation == "simulate" and simulable(ins, self.forms.bits)
            site = simulate(em, at, ins) if in_cache else em.callout("adapted", at, ins)
            em.piece(ins, Kind.SIMULATE)
            site.after = em.here
            if not in_cache:
                em.check_next = False
                return False
        elif self.forms.bits == 64 and relative.is_relative(ins):
            relative.copy(em, ins, following, Tag(ins, "incache"))
            em.piece(ins, Kind.RELOCATED)
        else:
            em.emit(ins.raw, Tag(ins, "ident"))
            em.piece(ins, Kind.IDENT)
        em.commit(following)
        if shadowed:
            em.saved_check()
        em.check_next = ins.op == "sti"
        return False

    def _callout(self, em: Emitter, at: int, ins: Instruction) -> bool:
        op = ins.op or ""
        cause = op if op in _SYSTEM_CAUSES else "segment" if op in _SEGMENT_OPS else "int" if op in _TRAP_OPS else "system"
        site = em.callout(cause, at, ins)
        em.piece(ins, Kind.CALLOUT)
        if op in _LEAVES:
            return True
        site.after = em.here
        em.check_next = False  # the VMM looks for waiting interrupts itself
        return False

    def _shadow_can_follow(self, following: int, fetch: Fetch) -> bool:
        """STI's shadow covers one instruction; in the cache only if that one is known and is no STI."""
        after, _ = read_instruction(fetch, following, self.forms.bits)
        return after is not None and after.op != "sti"


__all__ = ["Options", "Translator"]
