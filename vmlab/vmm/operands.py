"""Operands of decoded instructions of 32- and 64-bit code: registers by number and size, effective addresses, immediates."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import capstone
from capstone import x86_const as cs_x86

from vmlab.errors import GuestRefused
from vmlab.machine.decode import Instruction, decode
from vmlab.machine.delivery import Fault
from vmlab.machine.memory import PAGE
from vmlab.machine.paging import PageFault
from vmlab.machine.state import CS, DS, ES, FS, GS, RBP, RSP, SS

#: Reads guest code: (address, size); raises what fetching there would.
Fetch = Callable[[int, int], bytes]
_NAMES = ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di")
#: Capstone register → (number, size in bytes, shift).
REGISTERS: dict[int, tuple[int, int, int]] = {}
for _number, _name in enumerate(_NAMES):
    REGISTERS[getattr(cs_x86, f"X86_REG_E{_name.upper()}")] = (_number, 4, 0)
    REGISTERS[getattr(cs_x86, f"X86_REG_{_name.upper()}")] = (_number, 2, 0)
    REGISTERS[getattr(cs_x86, f"X86_REG_R{_name.upper()}")] = (_number, 8, 0)
    if _number >= 4:
        REGISTERS[getattr(cs_x86, f"X86_REG_{_name.upper()}L")] = (_number, 1, 0)
for _number in range(8, 16):
    for _suffix, _size in (("", 8), ("D", 4), ("W", 2), ("B", 1)):
        REGISTERS[getattr(cs_x86, f"X86_REG_R{_number}{_suffix}")] = (_number, _size, 0)
for _number, _name in enumerate("acdb"):
    REGISTERS[getattr(cs_x86, f"X86_REG_{_name.upper()}L")] = (_number, 1, 0)
    REGISTERS[getattr(cs_x86, f"X86_REG_{_name.upper()}H")] = (_number, 1, 8)
SEGMENTS = {cs_x86.X86_REG_ES: ES, cs_x86.X86_REG_CS: CS, cs_x86.X86_REG_SS: SS,
            cs_x86.X86_REG_DS: DS, cs_x86.X86_REG_FS: FS, cs_x86.X86_REG_GS: GS}
CONTROL = {getattr(cs_x86, f"X86_REG_CR{i}"): i for i in range(9)}
DEBUG = {getattr(cs_x86, f"X86_REG_DR{i}"): i for i in range(8)}


class Registers(Protocol):
    """What an operand needs of a CPU, physical or virtual."""

    def gpr(self, number: int) -> int: ...

    def set_gpr(self, number: int, value: int, size: int = 4) -> None: ...

    def segment(self, number: int) -> Any: ...

    def read_linear(self, address: int, size: int, *, user: bool = False) -> bytes: ...

    def write_linear(self, address: int, data: bytes, *, user: bool = False) -> None: ...

    @property
    def cpl(self) -> int: ...

    @property
    def bits(self) -> int: ...

    def advance(self, size: int) -> int: ...


#: No instruction is longer (SDM Vol. 2 §2.3.11).
FETCHED = 15


def fetch(cpu: Registers, address: int) -> bytes:
    """Up to 15 bytes of code at a linear address: fewer where the next page is absent."""
    inside = min(FETCHED, PAGE - address % PAGE)
    raw = cpu.read_linear(address, inside)
    if inside < FETCHED:
        with contextlib.suppress(PageFault):
            raw += cpu.read_linear(address + inside, FETCHED - inside)
    return raw


def read_instruction(fetch: Fetch, at: int, bits: int) -> tuple[Instruction | None, PageFault | GuestRefused | Fault | None]:
    """What lies at ``at``: (instruction, None), (None, None) for bytes that are none, (None, what fetching raised).

    The next page is looked at only by an instruction that reaches into it, as the CPU would.
    """
    inside = min(15, PAGE - at % PAGE)
    try:
        raw = fetch(at, inside)
        found = decode(raw, bits)
        if found is None and inside < 15:
            found = decode(raw + fetch((at + inside) & (1 << bits) - 1, 15 - inside), bits)
    except (PageFault, GuestRefused, Fault) as fault:
        return None, fault
    return found, None


class AddressForm(NamedTuple):
    """How an instruction's memory operand says where it is: what of it does not depend on the CPU's registers."""

    offset: int
    base: int | None            # general registers by number, and what of them counts
    base_mask: int
    index_register: int | None
    index_mask: int
    scale: int
    behind: int | None          # relative to RIP, behind an instruction of so many bytes
    segment: int
    mask: int                   # the address size

    def linear(self, cpu: Registers) -> int:
        """The address, wrapped to the address size (SDM Vol. 1 §3.7.5)."""
        offset = self.offset
        if self.base is not None:
            offset += cpu.gpr(self.base) & self.base_mask
        elif self.behind is not None:
            offset += cpu.advance(self.behind)
        if self.index_register is not None:
            offset += (cpu.gpr(self.index_register) & self.index_mask) * self.scale
        offset &= self.mask
        if cpu.bits == 64:
            return int(offset + (cpu.segment(self.segment).base if self.segment in (FS, GS) else 0)) & 0xFFFFFFFFFFFFFFFF
        return int(cpu.segment(self.segment).base + offset) & 0xFFFFFFFF


def address_form(instruction: Instruction, operand: Any) -> AddressForm:
    """What a memory operand says."""
    memory = operand.mem
    base, index = REGISTERS.get(memory.base), REGISTERS.get(memory.index)
    if memory.segment in SEGMENTS:
        segment = SEGMENTS[memory.segment]
    else:
        segment = SS if base is not None and base[0] in (RBP, RSP) else DS
    return AddressForm(int(memory.disp), base[0] if base else None, (1 << (8 * base[1])) - 1 if base else 0,
                       index[0] if index else None, (1 << (8 * index[1])) - 1 if index else 0, int(memory.scale),
                       instruction.size if memory.base == cs_x86.X86_REG_RIP else None, segment, (1 << (8 * instruction.cs.addr_size)) - 1)


def effective_address(cpu: Registers, instruction: Instruction, operand: Any) -> int:
    """Linear address of a memory operand."""
    return address_form(instruction, operand).linear(cpu)


def read_operand(cpu: Registers, instruction: Instruction, operand: Any, size: int | None = None) -> int:
    """The operand's value; ``size`` overrides the width of a memory operand."""
    if operand.type == cs_x86.X86_OP_IMM:
        return int(operand.imm)
    if operand.type == cs_x86.X86_OP_REG:
        number, width, shift = REGISTERS[operand.reg]
        return (cpu.gpr(number) >> shift) & ((1 << (8 * width)) - 1)
    raw = cpu.read_linear(effective_address(cpu, instruction, operand), size or operand.size, user=cpu.cpl == 3)
    return int.from_bytes(raw, "little")


def write_operand(cpu: Registers, instruction: Instruction, operand: Any, value: int, memory_size: int | None = None) -> None:
    """Store into a register (by its own width) or memory operand."""
    if operand.type == cs_x86.X86_OP_REG:
        number, width, shift = REGISTERS[operand.reg]
        if shift:
            value = (cpu.gpr(number) & ~0xFF00) | (value & 0xFF) << 8
            cpu.set_gpr(number, value, 4)
        else:
            cpu.set_gpr(number, value, width)
        return
    size = memory_size or operand.size
    data = (value & ((1 << (8 * size)) - 1)).to_bytes(size, "little")
    cpu.write_linear(effective_address(cpu, instruction, operand), data, user=cpu.cpl == 3)


def reads_what_it_writes(instruction: Instruction) -> bool:
    """Whether a memory operand is read, changed and written back."""
    both = capstone.CS_AC_READ | capstone.CS_AC_WRITE
    return any(operand.type == cs_x86.X86_OP_MEM and operand.access & both == both for operand in instruction.cs.operands)


def operand_size(instruction: Instruction) -> int:
    """Bytes: 4, or 2 with the operand-size prefix; the other way round in 16-bit code (SDM Vol. 1 §3.6)."""
    return 2 if (0x66 in bytes(instruction.cs.prefix)) != (instruction.bits == 16) else 4
