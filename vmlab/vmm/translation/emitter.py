"""Writing one unit: machine code, and for each of its instructions the guest's state there.

The emitter knows how to put a register away and bring it back, how to leave the cache, and what to note on the
way. Templates (``sensitive``, ``control``) are written in these terms. The rules that they keep: no arithmetic flag
changes but by the guest's own instruction, and guest memory is touched before the commit, so that a fault finds a
state that can be undone.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from vmlab.machine.counter import Tag
from vmlab.machine.decode import Instruction
from vmlab.machine.state import RAX, RCX
from vmlab.vmm.translation.layout import GATE, MISS, PENDING, SAVED_EAX, SAVED_ECX, SITE, TABLE, TARGET
from vmlab.vmm.translation.units import Kind, Piece, Site, State, Unit

if TYPE_CHECKING:
    from vmlab.vmm.translation.translator import Translator

_SLOTS = {RAX: SAVED_EAX, RCX: SAVED_ECX}
_SS = b"\x36"
#: ``mov dword ss:[SITE], number; jmp GATE``: how a unit leaves.
LEAVE_SIZE = 16


def relative(at: int, size: int, target: int) -> bytes:
    """The rel32 of a branch of ``size`` bytes at ``at`` that leads to ``target``."""
    return struct.pack("<I", (target - (at + size)) & 0xFFFFFFFF)


def jump(at: int, target: int) -> bytes:
    """``jmp target``."""
    return b"\xe9" + relative(at, 5, target)


def leave(at: int, number: int) -> bytes:
    """Into the VMM: note the site, go through the gate."""
    return store_word(SITE, number) + jump(at + 11, GATE)


def store_word(address: int, value: int) -> bytes:
    """``mov dword ss:[address], value``."""
    return _SS + b"\xc7\x05" + struct.pack("<II", address, value & 0xFFFFFFFF)


def store_byte(address: int, value: int) -> bytes:
    """``mov byte ss:[address], value``."""
    return _SS + b"\xc6\x05" + struct.pack("<IB", address, value)


def store(address: int, register: int) -> bytes:
    """``mov ss:[address], register`` (32 bits)."""
    return _SS + bytes([0x89, register << 3 | 5]) + struct.pack("<I", address)


def load(register: int, address: int) -> bytes:
    """``mov register, ss:[address]`` (32 bits)."""
    return _SS + bytes([0x8B, register << 3 | 5]) + struct.pack("<I", address)


def load_by_byte(table: int) -> bytes:
    """``movzx ecx, byte ss:[ecx + table]``."""
    return _SS + b"\x0f\xb6\x89" + struct.pack("<I", table)


def stack_byte(offset: int) -> bytes:
    """``movzx ecx, byte [esp + offset]``."""
    return b"\x0f\xb6\x4c\x24" + bytes([offset])


class Emitter:
    """Writes one unit; :meth:`finish` puts it into the cache."""

    def __init__(self, translator: Translator, unit: Unit, selector: int, iopl: int) -> None:
        self.t, self.unit = translator, unit
        self.selector, self.iopl = selector, iopl
        self.code = bytearray()
        self.state = State(unit.guest)
        #: Emit the pending-interrupt check after the next guest instruction: STI came before.
        self.check_next = False
        self._tags: dict[int, Tag] = {}
        self._states: dict[int, State] = {}
        self._far: list[tuple[int, Callable[[int], None]]] = []   # (offset of a rel32, writes the stub that it leads to)
        self._stubs: list[tuple[int, bytes]] = []

    @property
    def here(self) -> int:
        return self.unit.start + len(self.code)

    @property
    def count(self) -> int:
        return len(self.unit.pieces)

    # ---- guest instructions
    def begin(self, guest: int) -> None:
        """The next bytes belong to the guest's instruction at ``guest``; the state is exactly the guest's."""
        self.state = State(guest, shadow=self.check_next)
        self._guest, self._piece_at = guest, self.here
        self.t.watcher(guest, self.here)

    def piece(self, instruction: Instruction | None, kind: Kind) -> None:
        """The guest instruction begun last is translated."""
        self.unit.pieces.append(Piece(self._guest, instruction, kind, self._piece_at, self.here))

    # ---- machine instructions
    def emit(self, data: bytes, tag: Tag | None = None, *marks: str) -> int:
        """One machine instruction; returns its address."""
        at = self.here
        self._states[at] = self.state
        if not self.code:
            marks = ("unit", *marks)
        if marks:
            tag = Tag(tag.guest, tag.how, marks) if tag else Tag(marks=marks)
        if tag is not None:
            self._tags[at] = tag
        self.code += data
        return at

    def save(self, register: int, tag: Tag | None = None) -> None:
        """Put a guest register away."""
        self.emit(store(_SLOTS[register], register), tag)
        self.state = replace(self.state, saved=(*self.state.saved, (register, _SLOTS[register])))

    def restore(self, register: int, tag: Tag | None = None) -> None:
        """Bring a guest register back."""
        self.emit(load(register, _SLOTS[register]), tag)
        self.state = replace(self.state, saved=tuple(s for s in self.state.saved if s[0] != register))

    def moved_stack(self, undo: int) -> None:
        """The template moved ESP; ``undo`` more must be added to it to have the guest's again."""
        self.state = replace(self.state, esp=self.state.esp + undo)

    def commit(self, following: int | None) -> None:
        """The guest's instruction is complete: from here on the state is the one after it (None: at the indirect target)."""
        self.state = replace(self.state, rip=following, esp=0, shadow=False)

    # ---- leaving the cache
    def site(self, cause: str, guest: int | None, instruction: Instruction | None = None, form: str = "") -> Site:
        return self.t.new_site(cause, guest, self.unit, instruction, form)

    def callout(self, cause: str, guest: int, instruction: Instruction | None) -> Site:
        """The VMM carries this instruction out."""
        site = self.site(cause, guest, instruction)
        self._leave(site)
        return site

    def _leave(self, site: Site) -> None:
        site.stub = self.here
        raw = leave(self.here, site.number)
        self.emit(raw[:11])
        self.emit(raw[11:])

    def callout_if_not(self, skip: bytes, site: Site) -> None:
        """``skip`` (a JECXZ without its displacement) jumps over a callout that lies apart; ECX is brought back on the way."""
        self.emit(skip + b"\x05")
        self._branch_apart(b"\xe9", site, restore_ecx=True)

    def exit_inline(self, target: int) -> None:
        """The unit ends by going on at guest address ``target``: a stub whose place the next unit may take."""
        self.commit(target)
        site = self.site("chain", target, form="inline")
        site.patch = self.here
        self._leave(site)

    def exit_jump(self, target: int, tag: Tag | None = None) -> None:
        """``jmp`` to the unit at guest address ``target``."""
        self._exit(b"\xe9", "jump", target, tag)

    def exit_jcc(self, condition: int, target: int, tag: Tag | None = None) -> None:
        """``jcc`` to the unit at guest address ``target``."""
        self._exit(bytes([0x0F, 0x80 | condition]), "jcc", target, tag)

    def _exit(self, opcode: bytes, form: str, target: int, tag: Tag | None) -> None:
        site = self.site("chain", target, form=form)
        site.patch = self.here + len(opcode)
        self._branch_apart(opcode, site, tag=tag)

    def _branch_apart(self, opcode: bytes, site: Site, *, tag: Tag | None = None, restore_ecx: bool = False) -> None:
        state = replace(self.state, rip=site.guest, shadow=False) if site.is_exit else self.state
        self.emit(opcode + bytes(4), tag)

        def write(at: int) -> None:
            raw = b""
            if restore_ecx:
                self._states[at] = state
                raw = load(RCX, SAVED_ECX)
            exact = replace(state, saved=tuple(s for s in state.saved if s[0] != RCX)) if restore_ecx else state
            self._states[at + len(raw)] = self._states[at + len(raw) + 11] = exact
            self._stubs.append((at, raw + leave(at + len(raw), site.number)))
            site.stub = at

        self._far.append((len(self.code) - 4, write))

    def check_pending(self) -> None:
        """Interrupts may just have been enabled: into the VMM if one waits. ECX must be saved; no flag is touched."""
        self.emit(load(RCX, PENDING))
        self.callout_if_not(b"\xe3", self.site("interrupt", self.state.rip))

    def saved_check(self) -> None:
        """:meth:`check_pending` with nothing saved before or after."""
        self.save(RCX)
        self.check_pending()
        self.restore(RCX)

    def look_up(self) -> None:
        """Go on at the guest address in TARGET, by the table or through the VMM. ECX must be saved."""
        if self.t.options.lookup != "in-cache":
            self.restore(RCX)
            self._leave(self.site("indirect", None))
            return
        self.emit(_SS + b"\x0f\xb7\x0d" + struct.pack("<I", TARGET))                # movzx ecx, word ss:[TARGET]
        self.emit(_SS + b"\xff\x24\x8d" + struct.pack("<I", TABLE), None, "lookup")  # jmp ss:[TABLE + 4*ecx]

    # ---- the end
    def finish(self) -> None:
        """Write the stubs that lie apart, and the whole into the cache."""
        unit = self.unit
        if len(self.code) < LEAVE_SIZE:
            self.code += b"\x90" * (LEAVE_SIZE - len(self.code))  # room for the stub whose place the unit may have taken
        for offset, write in self._far:
            at = self.t.cache.stub_space()
            write(at)
            self.code[offset:offset + 4] = relative(unit.start + offset, 4, at)
        unit.end = self.here
        self.t.cache.put(unit.start, bytes(self.code))
        for at, raw in self._stubs:
            self.t.cache.put(at, raw)
        unit.addresses = list(self._states)
        self.t.states.update(self._states)
        self.t.tags.update(self._tags)


def entry_code(at: int, guest: int, body: int) -> list[tuple[bytes, State]]:
    """Where the look-up table leads: is the target really ``guest``? Then bring ECX back and go on at ``body``.

    (Machine instruction, state before it.) The last one is a jump unless ``body`` follows at once.
    """
    to_target, arrived = State(None, ((RCX, SAVED_ECX),)), State(guest, ((RCX, SAVED_ECX),))
    code = [
        (load(RCX, TARGET), to_target),
        (b"\x8d\x89" + struct.pack("<I", -guest & 0xFFFFFFFF), to_target),           # lea ecx, [ecx - guest]
        (b"\xe3\x05", to_target),                                                    # jecxz over the miss
        (jump(at + 15, MISS), to_target),
        (load(RCX, SAVED_ECX), arrived),
    ]
    if body != at + 27:
        code.append((jump(at + 27, body), State(guest)))
    return code


#: Bytes of :func:`entry_code` without its jump.
ENTRY_SIZE = 27
