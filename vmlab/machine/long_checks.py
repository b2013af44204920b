"""Checks of 64-bit mode that Unicorn leaves out: which exception an address that is not canonical raises, and where."""

from __future__ import annotations

from capstone import x86_const as cs_x86

from vmlab.machine.code import Block
from vmlab.machine.cpu import Cpu
from vmlab.machine.decode import Instruction
from vmlab.machine.operands import effective_address
from vmlab.machine.state import RBP, RSP

_STACK_BASES = frozenset({cs_x86.X86_REG_RSP, cs_x86.X86_REG_RBP, cs_x86.X86_REG_ESP, cs_x86.X86_REG_EBP})
_OWN_BASES = frozenset({cs_x86.X86_REG_FS, cs_x86.X86_REG_GS})
_PUSHING = frozenset({"push", "pushf", "pushfq", "call", "enter"})
_POPPING = frozenset({"pop", "popf", "popfq", "ret", "iretq", "iretd", "retf", "retfq"})
_WORD = 0xFFFFFFFFFFFFFFFF


def canonical(address: int) -> bool:
    """Whether bits 63 to 47 are equal (SDM Vol. 1 §3.3.7.1)."""
    return (address + (1 << 47)) & _WORD < 1 << 48


def is_stack_fault(cpu: Cpu, instruction: Instruction) -> bool:
    """Whether the #GP(0) that Unicorn raised at this instruction of 64-bit code is #SS(0), for its address is the stack's (SDM Vol. 3A §6.15)."""
    for operand in instruction.cs.operands:
        if operand.type == cs_x86.X86_OP_MEM and operand.mem.base in _STACK_BASES and operand.mem.segment not in _OWN_BASES:
            return not canonical(effective_address(cpu, instruction, operand))
    name = instruction.cs.mnemonic.split()[-1]
    if name == "leave":
        return not canonical(cpu.gpr(RBP))
    if name in _PUSHING:
        return not canonical(cpu.gpr(RSP) - 8 & _WORD)
    return name in _POPPING and not canonical(cpu.gpr(RSP))


def back_to_transfer(cpu: Cpu, block: Block) -> int | None:
    """RIP is not canonical, and the near transfer that ends ``block`` led there: it is that instruction's #GP, so go back to before it.

    Returns its linear address; None where the block ends otherwise (IRET, SYSRET: the CPU is in its new ring already).
    """
    last = block.instructions[-1] if block.instructions else None
    name = "" if last is None else last.cs.mnemonic.split()[-1]
    if last is None or last.kind != "indirect" or last.op is not None or name not in ("jmp", "call", "ret"):
        return None
    if name == "call":
        cpu.set_gpr(RSP, cpu.gpr(RSP) + 8, 8)
    elif name == "ret":
        cpu.set_gpr(RSP, cpu.gpr(RSP) - 8 - (int(last.cs.operands[0].imm) if last.cs.operands else 0), 8)
    cpu.rip = block.end - last.size
    return cpu.rip
