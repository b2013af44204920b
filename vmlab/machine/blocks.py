"""Blocks of code: decoded before they first run, hooked where the machine must step in, forgotten when they change."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from unicorn import unicorn_const as uc_const
from unicorn import x86_const as x86

from vmlab.errors import GuestBudget
from vmlab.machine import state as hidden
from vmlab.machine import task
from vmlab.machine.code import Block, Code, code_of
from vmlab.machine.decode import Instruction
from vmlab.machine.engine import CODE_CALLBACK, EDGE_CALLBACK
from vmlab.machine.fetch import Fetch
from vmlab.machine.instructions import Instructions, carried_out, flushes
from vmlab.machine.memory import PAGE
from vmlab.machine.state import HF_CS32, HF_CS64

if TYPE_CHECKING:
    from vmlab.machine.pc import Machine


_RDTSC = b"\x0f\x31"


def _hpa(pieces: list[tuple[int, int]], offset: int) -> int | None:
    for at, n in pieces:
        if offset < n:
            return at + offset
        offset -= n
    return None


class Blocks:
    """What happens at the start of a block in the rare cases, and at the exact addresses that somebody asked for."""

    #: Virtual time is no count of instructions here.
    guesses_time = False

    def __init__(self, machine: Machine, instructions: Instructions) -> None:
        self._machine, self._instructions = machine, instructions
        self._watched: dict[int, Callable[[int], None]] = {}
        self._gates: dict[int, Callable[[], None]] = {}
        self._hooked: dict[int, tuple[int, Instruction | None]] = {}
        self._fetch = Fetch(machine.cpu)
        #: Where the code of each key was first seen: (hpa, bytes) of each page's part.
        self._places: dict[int, list[tuple[int, int]]] = {}
        #: Keys of blocks that lie elsewhere in other address spaces: the records by code. Unicorn keeps the translations of all.
        self._ambiguous: dict[int, dict[Code, Block]] = {}
        #: The same bytes ran at one address in two modes, which no switch of spaces tells of: every block is looked at from then on.
        self.mixed = False
        #: Those of the ambiguous that were looked at in the present address space.
        self._looked_at: list[Block] = []
        machine.engine.hook(uc_const.UC_HOOK_EDGE_GENERATED, EDGE_CALLBACK, self._on_new_code)

    def watch(self, address: int, callback: Callable[[int], None]) -> None:
        """Call ``callback(address)`` whenever the instruction at this address is about to run."""
        self._watched[address] = callback

    def gate(self, address: int, callback: Callable[[], None]) -> None:
        """Reaching ``address`` calls ``callback``, which must move RIP."""
        self._gates[address] = callback

    # ---- a block's start
    def attend(self, pc: int, size: int) -> bool:
        """The rare cases of a block's start; True when the block may run and be counted now."""
        machine = self._machine
        counter = machine.counter
        if machine.failure is not None or machine.ending is not None:
            self._pass_by(pc, size)
            machine.engine.stop()
            return False
        due = machine.timeline.next_due
        if due is not None and counter.time >= due:
            machine.timeline.run_due()
            if machine.stale_code:
                return False
        if machine.interrupts.attention:
            self._pass_by(pc, size)
            if machine.interrupts.attend(pc, size):
                return False
        block = counter.blocks.get(pc << 16 | size)
        if self.mixed and block is not None and block.code.bits != self._bits():
            counter.suspend(block)
            block = None
        if block is None:
            block = self._new(pc, size)
            if block is None:
                return False
        if counter.time + block.weight > machine.last_moment:
            machine.fail(GuestBudget(f"the budget of {machine.budget} guest instructions was spent; the guest was at {pc:#x}"))
            return False
        return True

    def _pass_by(self, pc: int, size: int) -> None:
        """Unicorn translated this block, and perhaps it does not run now: when it does, nobody may ask."""
        if pc << 16 | size not in self._machine.counter.blocks and self._machine.failure is None:
            self._machine.cpu.load()
            self._note_place(pc << 16 | size, self._fetch.pieces(pc, size))

    def _new(self, pc: int, size: int) -> Block | None:
        """Decode a block before its first run; None when it must be translated again because of new hooks."""
        machine = self._machine
        cpu = machine.cpu
        cpu.load()
        pieces = self._fetch.pieces(pc, size)
        code = code_of(self._bytes_at(pieces), self._bits())
        if self._hook_new(pc, code):
            base = cpu.segment(hidden.CS).base
            machine.engine.remove_blocks(pc, pc + size)
            machine.engine.write_register(x86.UC_X86_REG_RIP, pc - base)
            return None
        tags = machine.tagger(pc, code.instructions)
        self._note_place(pc << 16 | size, pieces)
        others = self._ambiguous.get(pc << 16 | size)
        block = None if others is None else others.get(code)
        if block is None or block.tags != tags:
            block = Block(pc, code, tags)
        if others is not None:
            others[code] = block
            self._looked_at.append(block)
        machine.counter.add(block)
        return block

    def _bytes_at(self, pieces: list[tuple[int, int]]) -> bytes:
        """Code that the CPU is about to run."""
        machine = self._machine
        machine.code_frames.update(pa // PAGE for pa, _ in pieces)
        return b"".join([machine.ram.read(pa, n) for pa, n in pieces])

    def _bits(self) -> int:
        """The mode of code at a block's start."""
        cpu = self._machine.cpu
        cpu.load()
        return 64 if cpu.hflags & HF_CS64 else 32 if cpu.hflags & HF_CS32 else 16

    def _hook_new(self, pc: int, code: Code) -> bool:
        """Have the hooks that code at ``pc`` wants, and no stale ones; True if that was not so before."""
        changed = False
        known, watched, gates = self._hooked, self._watched, self._gates
        for offset, i in code.offsets.items():
            address = pc + offset
            if i == len(code.instructions):
                continue
            if address in known and self._is_stale(address, code.instructions[i]):
                self._machine.engine.unhook(known.pop(address)[0])
                self._others_apart(address, code.instructions[i])
                changed = True
            if (address in watched or address in gates) and address not in known:
                self._hook(address, code.instructions[i])
                changed = True
        for offset, instruction in code.system:
            if pc + offset not in known and self._wants_hook(instruction):
                self._hook(pc + offset, instruction)
                self._others_apart(pc + offset, instruction)
                changed = True
        return changed

    def _is_stale(self, address: int, instruction: Instruction) -> bool:
        """The guest may have rewritten code in another length, or mapped other code, which no check of known blocks sees."""
        hooked = self._hooked[address][1]
        return hooked is not None and hooked.raw != instruction.raw

    def _others_apart(self, address: int, instruction: Instruction) -> None:
        """What Unicorn translates has the hooks of its moment in it: code with another instruction at ``address`` has to be looked at again."""
        counter, hpa = self._machine.counter, self._fetch.pieces(address, 1)[0][0]
        for block in counter.within(address, address + 1):
            index = block.offsets.get(address - block.pc, len(block.instructions))
            if index < len(block.instructions) and block.instructions[index].raw == instruction.raw:
                continue
            if _hpa(self._places[block.key], address - block.pc) == hpa:
                counter.close(block)    # overwritten: what it was is nowhere any more
            else:
                self._set_apart(block.key)

    def _note_place(self, key: int, pieces: list[tuple[int, int]]) -> None:
        """Code of this address and size lies there. If it was seen elsewhere, it may come back with its address space."""
        if self._places.setdefault(key, pieces) != pieces and key not in self._ambiguous:
            self._set_apart(key)

    def _set_apart(self, key: int) -> None:
        """From now on the moments at which other code may lie here are looked at."""
        counter = self._machine.counter
        if not self._ambiguous:
            for other in [b for b in counter.blocks.values() if any(flushes(instruction) for _, instruction in b.code.system)]:
                self.forget(other.pc, other.end)
        others = self._ambiguous.setdefault(key, {})
        block = counter.blocks.get(key)
        if block is not None:
            counter.suspend(block)
            others[block.code] = block

    def _wants_hook(self, instruction: Instruction) -> bool:
        return (carried_out(instruction) or instruction.op in self._machine.trapping
                or instruction.search or instruction.undefined or instruction.random
                or self._may_switch_tasks(instruction)
                or (bool(self._ambiguous or self._machine.accesses is not None) and flushes(instruction)))

    def _may_switch_tasks(self, instruction: Instruction) -> bool:
        """Whether the CPU in guest mode must look at this instruction first, because a task switch is intercepted."""
        guest_mode = self._machine.guest_mode
        return guest_mode is not None and instruction.op in task.INSTRUCTIONS and self._machine.in_guest and guest_mode.watches_tasks()

    def _hook(self, address: int, instruction: Instruction | None) -> None:
        gate, native = self._gates.get(address), self._machine.native_events
        if native is not None and gate is not None and address not in self._watched:
            handle = native.hook_gate(address, gate)
        elif native is None or instruction is None or self._is_asked(address, instruction):
            handle = self._machine.engine.hook(uc_const.UC_HOOK_CODE, CODE_CALLBACK, self.on_instruction, address, address)
        elif instruction.op in ("in", "out"):
            handle = native.hook_port(address, instruction)
        elif instruction.raw == _RDTSC and self._machine.cycles is None:
            handle = native.hook_time_stamp(address, guessed=self.guesses_time)
        else:
            handle = self._machine.engine.hook(uc_const.UC_HOOK_CODE, CODE_CALLBACK, self.on_instruction, address, address)
        self._hooked[address] = (handle, instruction)

    def _is_asked(self, address: int, instruction: Instruction) -> bool:
        """Whether somebody besides the machine has to do with an instruction that C can carry out."""
        return instruction.op in self._machine.trapping or address in self._watched or address in self._gates

    def ended_in_hlt(self) -> bool:
        """Whether the CPU, which stopped, executed HLT: the block that ran ends with one, right before RIP."""
        cpu, block = self._machine.cpu, self._machine.counter.current
        return (block is not None and bool(block.instructions) and block.instructions[-1].op == "hlt"
                and (cpu.rip + cpu.segment(hidden.CS).base - block.end) & 0xFFFFFFFF == 0)

    # ---- code that changed
    def _on_new_code(self, _uc: int, block_at: object, _previous: int, _data: int) -> None:
        """Unicorn translated a block: if it replaces one that we know, the code may have changed."""
        try:
            pc, rest = block_at[0], block_at[1]  # type: ignore[index]
            size = (rest >> 16) & 0xFFFF
            self._broken_off(pc, size)
            old = self._machine.counter.blocks.get(pc << 16 | size)
            if old is not None:
                self._check(old)
        except BaseException as failure:  # noqa: BLE001
            self._machine.fail(failure)

    def _broken_off(self, pc: int, size: int) -> None:
        """A block that overwrites itself is broken off by Unicorn at the storing instruction, which runs again, alone.

        Control that came there by itself would go on beyond that one instruction, as it did before.
        """
        counter = self._machine.counter
        running = counter.current
        if running is None or not running.pc <= pc < running.end:
            return
        index = running.offsets.get(pc - running.pc)
        if index is not None and index < len(running.instructions) - 1 and running.instructions[index].size == size:
            counter.leave(pc)

    def _check(self, block: Block) -> None:
        machine = self._machine
        counter = machine.counter
        bits, pieces = self._bits(), self._fetch.pieces(block.pc, block.size)
        if self._places[block.key] != pieces:
            self._set_apart(block.key)
        elif self._bytes_at(pieces) != block.code.raw:      # overwritten: what it was is nowhere any more
            for other in counter.within(block.pc, block.end):
                counter.close(other)
        elif bits != block.code.bits:
            self.mixed = True
            machine.interrupts.update()
            self._set_apart(block.key)

    def space_changed(self) -> None:
        """Other pages may be mapped from the next block on: ambiguous blocks have to be looked at before they run."""
        for block in self._looked_at:
            self._machine.counter.suspend(block)
        self._looked_at.clear()

    def forget(self, start: int, end: int) -> None:
        """Code in ``start <= address < end`` was changed by the host or the guest: decode it anew."""
        counter, engine = self._machine.counter, self._machine.engine
        for block in counter.within(start, end):
            counter.close(block)
        for address in [a for a in self._hooked if start <= a < end]:
            engine.unhook(self._hooked.pop(address)[0])
        if self._machine.cpu.can_fetch(start) and self._machine.cpu.can_fetch(end - 1):
            engine.remove_blocks(start, end)
        else:       # asked for code that is not mapped now, Unicorn raises a page fault of its own, and in guest mode shuts down
            self._machine.drop_translations()

    # ---- an exact address
    def on_instruction(self, _uc: int, address: int, _size: int, _data: int) -> None:
        """The instruction at ``address``, which somebody asked for, is about to run."""
        machine = self._machine
        try:
            if machine.ending is not None or machine.failure is not None:
                machine.engine.stop()
                return
            watcher = self._watched.get(address)
            if watcher is not None:
                watcher(address)
            gate = self._gates.get(address)
            instruction = self._hooked[address][1]
            if gate is not None:
                machine.cpu.load()
                machine.cpu.rip = address - machine.cpu.segment(hidden.CS).base
                machine.counter.leave(address)
                gate()
                machine.make_rip_count()
            elif instruction is not None and instruction.op is not None:
                if flushes(instruction):
                    self.space_changed()
                self._instructions.carry_out(address, instruction)
            elif instruction is not None and instruction.random:
                self._instructions.draw(address, instruction)
            elif instruction is not None and instruction.search:
                self._instructions.search_element(instruction)
            elif instruction is not None and instruction.undefined:
                self._instructions.undefined(address)
        except BaseException as failure:  # noqa: BLE001
            machine.fail(failure)
