"""What classical x86 lets pass: the first sensitive instruction that told a deprivileged guest something else than the bare machine tells it.

A run under trap-and-emulate with ``sensitive: trap`` is faithful, and its VMM sees every sensitive instruction. So the guest runs once more,
that way, and each time such an instruction traps it is asked what the classical CPU would have shown or done in ring 1, on the
state that the CPU and the virtual CPU have at that moment. Up to the first answer that differs both runs are the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from capstone import x86_const as cs_x86

from vmlab.errors import GuestError
from vmlab.experiment.cell import Run
from vmlab.machine.cpu import IF
from vmlab.machine.decode import Instruction
from vmlab.machine.paging import PageFault
from vmlab.machine.pc import Stop, StopReason
from vmlab.machine.state import CS, RSP, SS
from vmlab.parameters import Value
from vmlab.strategies.trap_and_emulate import SENSITIVE, TrapAndEmulate
from vmlab.vmm.operands import operand_size, read_operand

_FLAGS_AT = {"pushf": 0, "popf": 0, "iret": 2}        # where on the stack their flags are, in operands
_TABLES = {"sgdt": "gdt", "sidt": "idt"}
_SELECTORS = {"sldt": "ldt", "str": "tr"}


class _Witness(TrapAndEmulate):
    """The VMM of that run. ``found`` is the first instruction that would have passed in silence, and what it would have shown."""

    found: tuple[int, Instruction, str] | None = None

    def emulate(self, instruction: Instruction) -> None:
        if self.found is None and instruction.op in SENSITIVE and self.vcpu.cpl == 0 and self.vcpu.interpreted is None:
            shown = self._shown(instruction)
            if shown is not None:
                self.found = (self.vcpu.rip, instruction, shown)
                self.machine.stop(Stop(StopReason.REQUESTED))
                return
        super().emulate(instruction)

    def _shown(self, instruction: Instruction) -> str | None:
        """What the CPU's own execution in ring 1 would have got wrong; None: nothing."""
        op, vcpu, cpu = str(instruction.op), self.vcpu, self.machine.cpu
        if op == "pushf":
            return _flags("shows", IF, vcpu.eflags)     # ring 1 runs with IF on and IOPL 0
        if op in ("popf", "iret"):
            return self._dropped(instruction)
        if op in _TABLES:
            return f"shows the VMM's {op[1:].upper()}R"
        if op in _SELECTORS:
            real, own = cpu.table(_SELECTORS[op]).selector, vcpu.table(_SELECTORS[op]).selector
            return None if real == own else f"shows {real:#x}, and the guest's own is {own:#x}"
        if op == "smsw":
            real, own = cpu.cr(0) & 0xFFFF, vcpu.cr(0) & 0xFFFF
            return None if real == own else f"shows {real:#x}, and the guest's own is {own:#x}"
        if op in ("mov_from_seg", "push_seg"):
            source = instruction.cs.operands[-1].reg
            return "shows a selector of ring 1" if source in (cs_x86.X86_REG_CS, cs_x86.X86_REG_SS) else None
        if op == "call_far":
            return "pushes a selector of ring 1"
        if op == "lar":
            found = vcpu.guest_descriptor(read_operand(vcpu, instruction, instruction.cs.operands[1], 2) & 0xFFFF)
            return "shows a descriptor of ring 1" if found is not None and found.dpl == 0 else None
        return None

    def _dropped(self, instruction: Instruction) -> str | None:
        """POPF and IRET in ring 1: IF and IOPL stay what they are."""
        vcpu, size = self.vcpu, operand_size(instruction)
        stack = vcpu.segment(SS)
        mask = 0xFFFFFFFF if stack.flags & 1 << 22 else 0xFFFF
        at = stack.base + (vcpu.gpr(RSP) + _FLAGS_AT[str(instruction.op)] * size & mask)
        try:
            wanted = int.from_bytes(vcpu.read_linear(at & 0xFFFFFFFF, size), "little")
        except PageFault:
            return None         # its own fault comes first
        return _flags("leaves", vcpu.eflags, wanted)


def _flags(verb: str, real: int, own: int) -> str | None:
    """IF and IOPL where they are not what they should be."""
    wrong = [f"{name} {real >> at & width}, not {own >> at & width}" for name, at, width in (("IF", 9, 1), ("IOPL", 12, 3))
             if (real ^ own) >> at & width]
    return f"{verb} {' and '.join(wrong)}" if wrong else None


def first_silent(parameters: Mapping[str, Value], budget: int) -> dict[str, Any] | None:
    """The first instruction of a trap-and-emulate run with ``sensitive: silent`` that went wrong unseen; None where none did.

    Returns ``{"address", "symbol", "instruction", "shown", "sentence"}``: where it is, what it did, and all of that as the end of a sentence.

    :param parameters: the cell's.
    :param budget: guest instructions to look at.
    """
    from vmlab.experiment.divergence import symbol_at

    run = Run("trap-and-emulate", {**parameters, "sensitive": "trap", "budget": budget}, kind=_Witness)
    with contextlib.suppress(GuestError):       # how this run ends is no matter: the finding is what came before
        run.go()
    witness = run.strategy
    assert isinstance(witness, _Witness)
    if witness.found is None:
        return None
    address, instruction, shown = witness.found
    linear = witness.vcpu.segment(CS).base + address
    symbol = symbol_at(run.image.symbols, linear)
    place = f" ({symbol})" if symbol else ""
    return {"address": linear, "symbol": symbol, "instruction": instruction.text, "shown": shown,
            "sentence": ("; the first sensitive instruction that did not trap and went wrong: "
                         f"'{instruction.text}' at {linear:#x}{place}, which {shown}")}

