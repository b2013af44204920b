"""Operands relative to RIP (64-bit mode; SDM Vol. 2 §2.2.1.6): a copy in the cache must reach what the guest's instruction reached.

The cache lies elsewhere, so the address becomes absolute: a bare displacement where 32 bits with sign hold it (mod 00, a SIB
byte without base and index), else a register that the instruction does not use, put away for as long.
"""

from __future__ import annotations

import struct

from vmlab.machine.code import Tag
from vmlab.machine.decode import Instruction
from vmlab.machine.state import RCX, RDI, RSI
from vmlab.vmm.translation.emitter import Emitter
from vmlab.vmm.translation.forms import fits

_LEGACY = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3")
_ADDRESS_SIZE = 0x67
_X, _B = 2, 1
_LONGEST = 15
_WORD = 0xFFFFFFFFFFFFFFFF


def is_relative(instruction: Instruction) -> bool:
    """Whether this instruction of 64-bit code has a memory operand relative to RIP: mod 00, r/m 101."""
    at = instruction.cs.modrm_offset
    return bool(at) and instruction.raw[at] & 0xC7 == 5


def reached(instruction: Instruction, following: int) -> int:
    """The effective address of that operand; ``following`` is the next instruction's."""
    displacement = struct.unpack_from("<i", instruction.raw, instruction.cs.modrm_offset + 1)[0]
    return int(following + displacement) & (0xFFFFFFFF if _ADDRESS_SIZE in bytes(instruction.cs.prefix) else _WORD)


def split(raw: bytes) -> tuple[bytes, int, bytes]:
    """(legacy prefixes, REX or 0, the rest)."""
    n = 0
    while raw[n] in _LEGACY:
        n += 1
    return (raw[:n], raw[n], raw[n + 1:]) if raw[n] & 0xF0 == 0x40 else (raw[:n], 0, raw[n:])


def _rebased(instruction: Instruction, operand: bytes) -> bytes:
    """The instruction with other bytes in place of ModRM and displacement. REX.X and REX.B, which counted for nothing, go."""
    at, raw = instruction.cs.modrm_offset, instruction.raw
    prefixes, rex, rest = split(raw)
    head = len(prefixes) + bool(rex)
    return prefixes + (bytes((rex & ~(_X | _B),)) if rex else b"") + rest[:at - head] + operand + raw[at + 5:]


def absolute(instruction: Instruction, address: int) -> bytes | None:
    """The instruction with a bare displacement; None where the address does not fit in one."""
    narrow = _ADDRESS_SIZE in bytes(instruction.cs.prefix)     # then the displacement is not sign-extended
    reg = instruction.raw[instruction.cs.modrm_offset] & 0x38
    new = _rebased(instruction, bytes((reg | 4, 0x25)) + struct.pack("<I", address & 0xFFFFFFFF))
    return new if (narrow or fits(address)) and len(new) <= _LONGEST else None


def copy(em: Emitter, instruction: Instruction, following: int, tag: Tag) -> None:
    """Emit an ordinary instruction with such an operand; the guest's instruction is complete afterwards."""
    address = reached(instruction, following)
    bare = absolute(instruction, address)
    if bare is not None:
        em.emit(bare, tag)
        return
    modrm = instruction.raw[instruction.cs.modrm_offset]
    rex = split(instruction.raw)[1]
    scratch = RDI if modrm >> 3 & 7 == RSI and not rex & 4 else RSI     # no instruction with ModRM uses them unsaid
    em.save(scratch)
    em.emit(bytes((0x48, 0xB8 | scratch)) + struct.pack("<Q", address))
    em.emit(_rebased(instruction, bytes((modrm & 0x38 | scratch,))), tag)
    em.commit(following)
    em.restore(scratch)


def load_target(em: Emitter, instruction: Instruction, following: int) -> None:
    """``mov rcx, <operand>`` for the operand of an indirect jump or call (FF /2, FF /4) of 64-bit code. RCX must be saved."""
    prefixes, rex, rest = split(instruction.raw)       # rest: FF, ModRM …
    if not is_relative(instruction):
        em.emit(prefixes + bytes((0x48 | rex & (_X | _B), 0x8B, rest[1] & 0xC7 | RCX << 3)) + rest[2:])
        return
    address = reached(instruction, following)
    if _ADDRESS_SIZE in bytes(instruction.cs.prefix) or fits(address):
        em.emit(prefixes + bytes((0x48, 0x8B, RCX << 3 | 4, 0x25)) + struct.pack("<I", address & 0xFFFFFFFF))
        return
    em.emit(b"\x48\xb9" + struct.pack("<Q", address))
    em.emit(prefixes + b"\x48\x8b\x09")                # mov rcx, [rcx]
