"""What an instruction is: lengths, names and classes, against Capstone's own objects and against the manual."""

from __future__ import annotations

from collections.abc import Iterator

import capstone
import pytest
from capstone import x86_const as cs_x86
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vmlab.machine.code import code_of
from vmlab.machine.decode import decode, decode_block

_MODES = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}
_ENGINES = {bits: capstone.Cs(capstone.CS_ARCH_X86, mode) for bits, mode in _MODES.items()}
for _engine in _ENGINES.values():
    _engine.detail = True


def _one_by_one(raw: bytes, bits: int) -> Iterator[capstone.CsInsn]:
    """By the binding, each instruction in a window of its own: at most 15 bytes (SDM Vol. 2A §2.3.11)."""
    at = 0
    while at < len(raw):
        found = next(_ENGINES[bits].disasm(raw[at:at + 15], 0, 1), None)
        if found is None:
            return
        yield found
        at += found.size


def _accesses(found: capstone.CsInsn) -> list[int]:
    return [operand.access for operand in found.operands if operand.type == cs_x86.X86_OP_MEM]


_prefixes = st.sampled_from([b"\x66", b"\x67", b"\xf2", b"\xf3", b"\xf0", b"\x2e", b"\x36", b"\x64", b"\x65", b"\x48", b"\x41", b"\x4f"])
_opcodes = st.one_of(st.binary(min_size=n, max_size=n).map(start.__add__) for start, n in (
    (b"", 1), (b"\x0f", 1), (b"\x0f\x38", 1), (b"\x0f\x3a", 1), (b"\xc4", 3), (b"\xc5", 2), (b"\x62", 4)))
_instruction = st.tuples(st.lists(_prefixes, max_size=3).map(b"".join), _opcodes, st.binary(max_size=9)).map(b"".join)
_straight_lines = st.one_of(st.binary(max_size=40), st.lists(_instruction, max_size=12).map(b"".join))


@settings(max_examples=300, deadline=None)
@given(raw=_straight_lines, bits=st.sampled_from([16, 32, 64]))
@example(raw=b"\x66" * 14 + b"\x90", bits=32)           # 15 bytes, the longest there may be
@example(raw=b"\x66" * 15 + b"\x90", bits=32)           # 16: #GP on a CPU, nothing here
@example(raw=b"\x90\x0f\xff", bits=64)                  # ends in what does not decode
@example(raw=b"\x90\xe8\x00\x00", bits=64)              # ends in the middle of an instruction
@example(raw=b"", bits=16)
def test_a_line_decodes_as_its_instructions_one_by_one(raw: bytes, bits: int) -> None:
    whole, each = decode_block(raw, bits), list(_one_by_one(raw, bits))
    assert [(ours.size, ours.raw) for ours in whole] == [(theirs.size, bytes(theirs.bytes)) for theirs in each]
    for ours, theirs in zip(whole, each, strict=True):
        mnemonic = theirs.mnemonic.split()[-1]
        assert (ours.cs.id, ours.cs.mnemonic, ours.cs.op_str) == (theirs.id, theirs.mnemonic, theirs.op_str)
        assert ours.rep == (ours.string and theirs.prefix[0] in (0xF2, 0xF3))
        assert ours.search == (ours.rep and mnemonic[:4] in ("scas", "cmps"))
        if ours.string:
            assert theirs.opcode[0] in (*range(0x6C, 0x70), *range(0xA4, 0xA8), *range(0xAA, 0xB0)) and ours.kind == "alu"
        jumps = theirs.group(capstone.CS_GRP_JUMP) or theirs.group(capstone.CS_GRP_CALL) or mnemonic in ("ret", "loop", "loope", "loopne")
        assert (ours.kind in ("branch", "jcc", "indirect")) == jumps
        if ours.kind in ("load", "store") and mnemonic[:3] not in ("pus", "pop", "ent", "lea"):
            assert (ours.kind == "store") == any(access & capstone.CS_AC_WRITE for access in _accesses(theirs))
        if ours.kind == "alu" and not ours.string and mnemonic not in ("lea", "nop"):
            assert not _accesses(theirs)
        again = decode(raw[sum(one.size for one in whole[:whole.index(ours)]):], bits)
        assert again is ours        # one object for all places with the same bytes


@pytest.mark.parametrize(("raw", "bits", "expected"), [
    ("90", 64, [(1, None, "alu")]), ("f390", 64, [(2, None, "alu")]),                               # NOP, PAUSE
    ("b878563412", 32, [(5, None, "alu")]), ("b878563412", 16, [(3, None, "alu"), (2, None, "alu")]),   # MOV r, imm; XOR AL, imm8 … of the rest
    ("66b878563412", 16, [(6, None, "alu")]), ("66b87856", 64, [(4, None, "alu")]),
    ("48b88877665544332211", 64, [(10, None, "alu")]), ("48b801000000", 32, [(1, None, "alu"), (5, None, "alu")]),  # REX, or DEC
    ("a100000000", 32, [(5, None, "load")]), ("67a10000", 32, [(4, None, "load")]), ("a100000000000000", 64, []),
    ("0fa2", 64, [(2, "cpuid", "alu")]), ("fa", 32, [(1, "cli", "alu")]), ("ee", 32, [(1, "out", "alu")]),
    ("f30fb8c0", 64, [(4, None, "alu")]),                                                           # POPCNT: F3 is no REP
    ("f3a4", 64, [(2, None, "alu")]), ("a4", 16, [(1, None, "alu")]), ("f20f10c1", 64, [(4, None, "alu")]),   # MOVS; MOVSD of SSE
    ("f048010f", 64, [(4, None, "store")]), ("8b0425efbeadde", 64, [(7, None, "load")]),
    ("0f22d8", 64, [(3, "mov_to_cr", "alu")]), ("8ed8", 32, [(2, "mov_to_seg", "alu")]), ("ff2d00000000", 32, [(6, "jmp_far", "indirect")]),
    ("7500", 64, [(2, None, "jcc")]), ("0f8500000000", 64, [(6, None, "jcc")]), ("e2fe", 64, [(2, None, "jcc")]), ("c3", 64, [(1, None, "indirect")]),
    ("0f0b", 64, [(2, None, "alu")]), ("06", 64, []), ("900f04", 64, [(1, None, "alu")]),           # UD2; what 64-bit mode has not
])
def test_by_hand(raw: str, bits: int, expected: list[tuple[int, str | None, str]]) -> None:
    assert [(one.size, one.op, one.kind) for one in decode_block(bytes.fromhex(raw), bits)] == expected


def test_the_same_bytes_of_another_mode_are_other_code() -> None:
    raw = bytes.fromhex("40b878563412")         # INC EAX; MOV EAX, imm32 | REX MOV EAX, imm32 | INC AX; MOV AX, imm16; …
    assert [len(code_of(raw, bits).instructions) for bits in (32, 64)] == [2, 1]
    assert code_of(raw, 16).instructions[1].size == 3
    assert code_of(raw, 32) is code_of(bytes(raw), 32)


def test_code_that_ends_in_the_middle_of_an_instruction() -> None:
    code = code_of(bytes.fromhex("fa90e800"), 32)
    assert [one.size for one in code.instructions] == [1, 1]
    assert code.offsets == {0: 0, 1: 1, 4: 2}
    assert [(at, one.op) for at, one in code.system] == [(0, "cli")]
