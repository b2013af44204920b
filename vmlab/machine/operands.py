"""Where an instruction that the CPU is about to run finds its operand in memory."""

from __future__ import annotations

from typing import Any

from capstone import x86_const as cs_x86

from vmlab.machine.cpu import Cpu
from vmlab.machine.decode import Instruction
from vmlab.machine.state import CS, DS, ES, FS, GS, HF_CS32, HF_CS64, RBP, RSP, SS

_NAMES = ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di")
#: Capstone's register → (number, bytes).
_REGISTERS = {getattr(cs_x86, f"X86_REG_{prefix}{name}".upper()): (i, size)
              for i, name in enumerate(_NAMES) for prefix, size in (("", 2), ("e", 4), ("r", 8))}
_REGISTERS |= {getattr(cs_x86, f"X86_REG_R{i}{suffix}"): (i, size) for i in range(8, 16) for suffix, size in (("", 8), ("D", 4), ("W", 2))}
_SEGMENTS = {cs_x86.X86_REG_ES: ES, cs_x86.X86_REG_CS: CS, cs_x86.X86_REG_SS: SS,
             cs_x86.X86_REG_DS: DS, cs_x86.X86_REG_FS: FS, cs_x86.X86_REG_GS: GS}


def effective_address(cpu: Cpu, instruction: Instruction, operand: Any) -> int:
    """Linear address of a memory operand (SDM Vol. 1 §3.7.5)."""
    memory = operand.mem
    offset = int(memory.disp)
    base = _REGISTERS.get(memory.base)
    if base is not None:
        offset += cpu.gpr(base[0]) & ((1 << 8 * base[1]) - 1)
    elif memory.base == cs_x86.X86_REG_RIP:
        offset += cpu.rip + instruction.size
    index = _REGISTERS.get(memory.index)
    if index is not None:
        offset += (cpu.gpr(index[0]) & ((1 << 8 * index[1]) - 1)) * memory.scale
    segment = _SEGMENTS.get(memory.segment, SS if base is not None and base[0] in (RBP, RSP) else DS)
    offset &= (1 << 8 * instruction.cs.addr_size) - 1
    if cpu.hflags & HF_CS64:
        return int(offset + (cpu.segment(segment).base if segment in (FS, GS) else 0)) & 0xFFFFFFFFFFFFFFFF
    return int(cpu.segment(segment).base + offset) & 0xFFFFFFFF


def number_of(register: int) -> int:
    """The number of the general register that Capstone calls ``register``."""
    return _REGISTERS[register][0]


def far_selector(cpu: Cpu, instruction: Instruction) -> int:
    """The selector of a far JMP or CALL; raises :class:`~vmlab.machine.paging.PageFault` where it cannot be read."""
    operands = instruction.cs.operands
    if len(operands) == 2:
        return int(operands[0].imm) & 0xFFFF
    size = 2 if 0x66 in bytes(instruction.cs.prefix) else 4
    if not cpu.hflags & HF_CS32:
        size = 6 - size
    address = effective_address(cpu, instruction, operands[0])
    return int.from_bytes(cpu.read_linear(address + size, 2, user=cpu.cpl == 3), "little")
