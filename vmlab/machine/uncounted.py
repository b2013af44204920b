"""A measuring switch, not a technique: the same machine with counting and the ledger's instructions off.

``benchmarks/linux.py`` asks what counting costs by running a guest on both. The guest boots here as well: devices, delivery and
the instructions that Unicorn leaves out are the machine's own. What is left out is what exact counts need: blocks are neither
decoded nor known, nothing is corrected, IN and OUT go through Unicorn's own hooks. Virtual time goes on by a guess, a tick for
every four bytes of code that run, so that a guest gets about as many timer interrupts and reads about the same clock.
Reached by ``Machine(path="uncounted")`` only: what such a run counts is no ledger.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from unicorn import x86_const as x86

from vmlab.errors import GuestBudget
from vmlab.machine import state as hidden
from vmlab.machine.blocks import Blocks
from vmlab.machine.code import code_of
from vmlab.machine.decode import Instruction
from vmlab.machine.instructions import Instructions, carried_out

if TYPE_CHECKING:
    from vmlab.machine.pc import Machine

#: What may be one of the instructions that the machine carries out, IN and OUT aside (SDM Vol. 2D table A-3): SYSCALL, MOV CR8, WRMSR,
#: RDTSC, RDMSR, SYSENTER, RDRAND, RDTSCP. A match is decoded, the rest never is.
_MAY_BE_CARRIED_OUT = re.compile(rb"\x0f[\x05\x20\x22\x30-\x34\xc7]|\x0f\x01\xf9")
_PORTS = frozenset({"in", "out", "ins", "outs"})


class UncountedBlocks(Blocks):
    """Looks at what Unicorn translates, by its bytes, and at the start of a block only when something is due."""

    guesses_time = True

    def __init__(self, machine: Machine, instructions: Instructions) -> None:
        self._hooked_pages: set[int] = set()
        #: Addresses of translated blocks that have not got their hooks yet.
        self._to_hook: set[int] = set()
        super().__init__(machine, instructions)

    def attend(self, pc: int, size: int) -> bool:
        machine = self._machine
        counter = machine.counter
        if machine.failure is not None or machine.ending is not None:
            machine.engine.stop()
            return False
        if counter.time > machine.last_moment:
            machine.fail(GuestBudget(f"the budget of {machine.budget} guest instructions, by the guess, was spent; the guest was at {pc:#x}"))
            return False
        due = machine.timeline.next_due
        if due is not None and counter.time >= due:
            machine.timeline.run_due()
            if machine.stale_code:
                return False
        if pc in self._to_hook:
            self._to_hook.discard(pc)
            machine.interrupts.update()
            if self._hook_new(pc, code_of(self._code_at(pc, size), self._bits())):
                machine.engine.remove_blocks(pc, pc + size)
                machine.engine.write_register(x86.UC_X86_REG_RIP, pc - machine.cpu.segment(hidden.CS).base)
                return False
        return not (machine.interrupts.attention and machine.interrupts.attend(pc, size))

    @property
    def mixed(self) -> bool:
        """Every block start is looked at as long as a translated one waits for its hooks."""
        return bool(self._to_hook)

    @mixed.setter
    def mixed(self, value: bool) -> None:
        pass

    def _on_new_code(self, _uc: int, block_at: object, _previous: int, _data: int) -> None:
        machine = self._machine
        try:
            pc, size = block_at[0], (block_at[1] >> 16) & 0xFFFF  # type: ignore[index]
            machine.cpu.load()
            asked = any(pc <= at < pc + size for at in (*self._watched, *self._gates))
            if pc >> 12 in self._hooked_pages or pc + size - 1 >> 12 in self._hooked_pages:     # what is hooked may be other code's
                asked = asked or any(pc <= at < pc + size for at in self._hooked)
            if asked or _MAY_BE_CARRIED_OUT.search(self._code_at(pc, size)):
                self._to_hook.add(pc)
                machine.interrupts.update()
        except BaseException as failure:  # noqa: BLE001 - nothing may cross Unicorn's frames
            machine.fail(failure)

    def _hook(self, address: int, instruction: Instruction | None) -> None:
        self._hooked_pages.add(address >> 12)
        super()._hook(address, instruction)

    def _wants_hook(self, instruction: Instruction) -> bool:
        return instruction.random or (carried_out(instruction) and instruction.op not in _PORTS)

    def on_instruction(self, uc: int, address: int, size: int, data: int) -> None:
        hooked = self._hooked.get(address)
        if hooked is not None and (hooked[1] is None or self._code_at(address, hooked[1].size) == hooked[1].raw):  # else other code is here now
            super().on_instruction(uc, address, size, data)

    def _code_at(self, address: int, size: int) -> bytes:
        return self._bytes_at(self._fetch.pieces(address, size))

    def ended_in_hlt(self) -> bool:
        cpu = self._machine.cpu
        return cpu.read_linear(cpu.rip - 1 + cpu.segment(hidden.CS).base, 1) == b"\xf4"

