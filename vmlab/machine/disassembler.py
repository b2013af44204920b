"""The thin edge to Capstone's C interface: a whole block in one call, no object of the binding's per instruction.

The binding copies some 3 KB and makes twenty Python objects for each instruction, which costs a hundred times what Capstone
itself takes. Here the array that ``cs_disasm`` fills is read by :mod:`struct`; where its fields lie is asked of the binding's own
ctypes structures. :func:`full` is the binding's view, for the few instructions whose operands somebody looks at.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import capstone
from capstone import x86 as cs_structures

_MODES = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}
_CAPSTONE = {bits: capstone.Cs(capstone.CS_ARCH_X86, mode) for bits, mode in _MODES.items()}
for _engine in _CAPSTONE.values():
    _engine.detail = True
_cs_disasm, _cs_free = capstone._cs.cs_disasm, capstone._cs.cs_free
_HANDLES = {bits: engine.csh for bits, engine in _CAPSTONE.items()}


def _layout(structure: Any, *, whole: bool, **fields: str) -> struct.Struct:
    """What unpacks the named fields, each by a format of its own, out of a ctypes structure; ``whole``: one of several in a row."""
    form, at = "=", 0
    for name, format_ in fields.items():
        offset = getattr(structure, name).offset
        form += f"{offset - at}x{format_}"
        at = offset + struct.calcsize("=" + format_)
    return struct.Struct(f"{form}{ctypes.sizeof(structure) - at}x" if whole else form)


_INSN = _layout(capstone._cs_insn, whole=True, id="I", size="H", mnemonic="32s", detail="Q" if ctypes.sizeof(ctypes.c_void_p) == 8 else "I")
_GROUPS = _layout(capstone._cs_detail, whole=False, groups="8s", groups_count="B")
_X86_AT = capstone._cs_detail.arch.offset
_X86 = _layout(cs_structures.CsX86, whole=False, prefix="4s", opcode="4s", modrm="B", op_count="B")
_OPERANDS_AT = _X86_AT + cs_structures.CsX86.operands.offset
_OPERAND = _layout(cs_structures.X86Op, whole=True, type="I", value="I", access="B")   # the value is a union: a register is its first word
_DETAIL = _OPERANDS_AT + 8 * _OPERAND.size
T = TypeVar("T")


class Facts(NamedTuple):
    """What decides an instruction's class: Capstone's numbers, and its prefixes and opcode as bytes."""

    id: int
    mnemonic: str                               # without "rep", "lock"
    groups: bytes
    prefix: bytes
    opcode: bytes
    modrm: int
    operands: tuple[tuple[int, int, int], ...]  # (type, register, access)


def split(raw: bytes, bits: int, count: int, make: Callable[[bytes, Facts], T], known: dict[bytes, T]) -> list[T]:
    """The first ``count`` instructions of a straight line (0: all), up to the first bytes that do not decode.

    What is not ``known`` by its bytes is made, and known from then on.
    """
    array = ctypes.POINTER(capstone._cs_insn)()
    n = _cs_disasm(_HANDLES[bits], raw, len(raw), 0, count, ctypes.byref(array))
    if not n:
        return []
    try:
        found, at = [], 0
        for number, size, mnemonic, detail in _INSN.iter_unpack(ctypes.string_at(array, n * _INSN.size)):
            piece = raw[at:at + size]
            instruction = known.get(piece)
            if instruction is None:
                instruction = known[piece] = make(piece, _facts(number, mnemonic, detail))
            found.append(instruction)
            at += size
        return found
    finally:
        _cs_free(array, n)


def _facts(number: int, mnemonic: bytes, at: int) -> Facts:
    detail = ctypes.string_at(at, _DETAIL)
    groups, groups_count = _GROUPS.unpack_from(detail)
    prefix, opcode, modrm, operands = _X86.unpack_from(detail, _X86_AT)
    return Facts(number, mnemonic.partition(b"\0")[0].decode("ascii").split()[-1], groups[:groups_count], prefix, opcode, modrm,
                 tuple(_OPERAND.iter_unpack(detail[_OPERANDS_AT:_OPERANDS_AT + operands * _OPERAND.size])))


def full(raw: bytes, bits: int) -> capstone.CsInsn:
    """The binding's view of one instruction, its address 0."""
    return next(_CAPSTONE[bits].disasm(raw, 0, 1))
