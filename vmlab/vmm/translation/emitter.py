"""Writing one unit: machine code, and for each of its instructions the guest's state there.

The emitter knows how to put a register away and bring it back, how to leave the cache, and what to note on the
way. Templates (``sensitive``, ``control``) are written in these terms. The rules that they keep: no arithmetic flag
changes but by the guest's own instruction, and guest memory is touched before the commit, so that a fault finds a
state that can be undone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from vmlab.machine.code import Tag
from vmlab.machine.decode import Instruction
from vmlab.machine.state import RAX, RCX, RSP
from vmlab.vmm.translation.forms import LEAVE_JUMP, LEAVE_SIZE, Forms, fits, jump, relative
from vmlab.vmm.translation.layout import MISS, PENDING, TARGET, saved
from vmlab.vmm.translation.units import Kind, Piece, Site, State, Unit

if TYPE_CHECKING:
    from vmlab.vmm.translation.translator import Translator

class Emitter:
    """Writes one unit; :meth:`finish` puts it into the cache."""

    def __init__(self, translator: Translator, unit: Unit) -> None:
        self.t, self.unit = translator, unit
        self.forms, self.mode = translator.forms, translator.mode
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
        self._guest, self._piece_at, self._first_site = guest, self.here, len(self.unit.sites)
        self.t.watcher(guest, self.here)

    def piece(self, instruction: Instruction | None, kind: Kind) -> None:
        """The guest instruction begun last is translated."""
        self.unit.pieces.append(Piece(self._guest, instruction, kind, self._piece_at, self.here, self._first_site))

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
        self.emit(self.forms.store(saved(register), register), tag)
        self.state = replace(self.state, saved=(*self.state.saved, (register, saved(register))))

    def restore(self, register: int, tag: Tag | None = None) -> None:
        """Bring a guest register back."""
        self.emit(self.forms.load(register, saved(register)), tag)
        self.state = replace(self.state, saved=tuple(s for s in self.state.saved if s[0] != register))

    def moved_stack(self, undo: int) -> None:
        """The template moved ESP; ``undo`` more must be added to it to have the guest's again."""
        self.state = replace(self.state, esp=self.state.esp + undo)

    def moved_to_saved_stack(self) -> None:
        """ESP holds something else now; what it was before, with all that is to be undone, lies in its slot."""
        self.state = replace(self.state, saved=(*self.state.saved, (RSP, saved(RSP))))

    def flags_changed_early(self) -> None:
        """The virtual flags are those after the instruction from here on."""
        self.state = replace(self.state, early_flags=True)

    def commit(self, following: int | None) -> None:
        """The guest's instruction is complete: from here on the state is the one after it (None: at the indirect target)."""
        kept = tuple(s for s in self.state.saved if s[0] != RSP)
        self.state = replace(self.state, rip=following, saved=kept, esp=0, shadow=False)

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
        raw = self.forms.leave(self.here, site.number)
        self.emit(raw[:LEAVE_JUMP])
        self.emit(raw[LEAVE_JUMP:])

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
                raw = self.forms.load(RCX, saved(RCX))
            exact = replace(state, saved=tuple(s for s in state.saved if s[0] != RCX)) if restore_ecx else state
            self._states[at + len(raw)] = self._states[at + len(raw) + LEAVE_JUMP] = exact
            self._stubs.append((at, raw + self.forms.leave(at + len(raw), site.number)))
            site.stub = at

        self._far.append((len(self.code) - 4, write))

    def check_pending(self) -> None:
        """Interrupts may just have been enabled: into the VMM if one waits. ECX must be saved; no flag is touched."""
        self.emit(self.forms.load_low(RCX, PENDING))
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
        self.emit(self.forms.load_half(TARGET))
        self.emit(self.forms.jump_by_table(), None, "lookup")

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


def entry_size(forms: Forms, guest: int) -> int:
    """Bytes of :func:`entry_code` without its last jump."""
    return sum(len(raw) for raw, _ in _entry(forms, 0, guest))


def _entry(forms: Forms, at: int, guest: int) -> list[tuple[bytes, State]]:
    to_target, arrived = State(None, ((RCX, saved(RCX)),)), State(guest, ((RCX, saved(RCX)),))
    code = [(forms.load(RCX, TARGET), to_target)]
    if forms.bits == 32 or fits(-guest):
        code.append((forms.subtract(guest), to_target))
    else:
        both = State(None, ((RCX, saved(RCX)), (RAX, saved(RAX))))
        code += [
            (forms.store(saved(RAX), RAX), to_target),
            (b"\x48\xb8" + forms.pack(-guest), both),                                # mov rax, -guest
            (b"\x48\x8d\x0c\x01", both),                                            # lea rcx, [rcx + rax]
            (forms.load(RAX, saved(RAX)), both),
        ]
    code.append((b"\xe3\x05", to_target))                                           # jecxz over the miss
    code.append((jump(at + sum(len(raw) for raw, _ in code), forms.linear(MISS)), to_target))
    code.append((forms.load(RCX, saved(RCX)), arrived))
    return code


def entry_code(forms: Forms, at: int, guest: int, body: int) -> list[tuple[bytes, State]]:
    """Where the look-up table leads: is the target really ``guest``? Then bring ECX back and go on at ``body``.

    (Machine instruction, state before it.) The last one is a jump unless ``body`` follows at once.
    """
    code = _entry(forms, at, guest)
    end = at + sum(len(raw) for raw, _ in code)
    if body != end:
        code.append((jump(end, body), State(guest)))
    return code
