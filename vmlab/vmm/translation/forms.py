"""The instruction forms that templates are written in, for 32-bit and for 64-bit code.

The VMM's words lie in the hole, at the end of the linear space, so that code of both sizes reaches them by a bare 32-bit
displacement (in 64-bit mode it is sign-extended: SDM Vol. 2 §2.2.1.3): 32-bit code through SS, the one segment register
that a kernel cannot leave null, 64-bit code through a SIB byte without base and index. None of these forms touches a flag.
"""

from __future__ import annotations

import struct

from vmlab.machine.state import RCX
from vmlab.vmm.space import hole_address
from vmlab.vmm.translation.layout import GATE, SITE, TABLE

#: ``mov dword [SITE], number; jmp GATE``: how a unit leaves. The first instruction has 11 bytes.
LEAVE_SIZE, LEAVE_JUMP = 16, 11
_SS, _REX_W = b"\x36", b"\x48"


def relative(at: int, size: int, target: int) -> bytes:
    """The rel32 of a branch of ``size`` bytes at ``at`` that leads to ``target``."""
    return struct.pack("<I", (target - (at + size)) & 0xFFFFFFFF)


def jump(at: int, target: int) -> bytes:
    """``jmp target``."""
    return b"\xe9" + relative(at, 5, target)


def fits(value: int) -> bool:
    """Whether a 64-bit word is the sign extension of 32 bits."""
    return (value + (1 << 31)) & 0xFFFFFFFFFFFFFFFF < 1 << 32


class Forms:
    """Encodings for code of ``bits``; addresses of the VMM's words are those of ``layout``.

    :ivar word: bytes of a register, a pointer and an entry of the look-up table.
    :ivar mask: of an address.
    """

    def __init__(self, bits: int) -> None:
        self.bits, self.word, self.mask = bits, bits // 8, (1 << bits) - 1
        self._wide = bits == 64
        self.rex = _REX_W if self._wide else b""

    def linear(self, address: int) -> int:
        """Where the CPU finds what ``layout`` puts at ``address``."""
        return hole_address(address, self.bits)

    def pack(self, value: int) -> bytes:
        """A word in memory."""
        return (value & self.mask).to_bytes(self.word, "little")

    def _at(self, opcode: bytes, register: int, address: int, *, wide: bool = False) -> bytes:
        """``opcode`` with a register and the VMM's word at ``address``."""
        where = struct.pack("<I", address & 0xFFFFFFFF)
        if self._wide:
            rex = 0x40 | wide << 3 | register >> 3 << 2
            return (bytes((rex,)) if rex != 0x40 else b"") + opcode + bytes(((register & 7) << 3 | 4, 0x25)) + where
        return _SS + opcode + bytes((register << 3 | 5,)) + where

    # ---- the VMM's words
    def store_word(self, address: int, value: int) -> bytes:
        """``mov dword [address], value``."""
        return self._at(b"\xc7", 0, address) + struct.pack("<I", value & 0xFFFFFFFF)

    def store_byte(self, address: int, value: int) -> bytes:
        """``mov byte [address], value``."""
        return self._at(b"\xc6", 0, address) + bytes((value,))

    def store(self, address: int, register: int) -> bytes:
        """``mov [address], register``, all of it."""
        return self._at(b"\x89", register, address, wide=True)

    def store_cl(self, address: int) -> bytes:
        """``mov byte [address], cl``."""
        return self._at(b"\x88", RCX, address)

    def load(self, register: int, address: int) -> bytes:
        """``mov register, [address]``, all of it."""
        return self._at(b"\x8b", register, address, wide=True)

    def load_low(self, register: int, address: int) -> bytes:
        """``mov register, dword [address]``: the upper half becomes 0."""
        return self._at(b"\x8b", register, address)

    def pop(self, address: int) -> bytes:
        """``pop [address]``, a whole word."""
        return self._at(b"\x8f", 0, address)

    # ---- by index
    def load_by_byte(self, table: int) -> bytes:
        """``movzx ecx, byte [ecx + table]``."""
        return (b"" if self._wide else _SS) + b"\x0f\xb6\x89" + struct.pack("<I", table)

    def load_half(self, address: int) -> bytes:
        """``movzx ecx, word [address]``."""
        return self._at(b"\x0f\xb7", RCX, address)

    def load_byte(self, address: int) -> bytes:
        """``movzx ecx, byte [address]``."""
        return self._at(b"\x0f\xb6", RCX, address)

    def jump_by_table(self) -> bytes:
        """``jmp [TABLE + word*ecx]``."""
        return (b"\xff\x24\xcd" if self._wide else _SS + b"\xff\x24\x8d") + struct.pack("<I", TABLE)

    # ---- registers and the guest's stack
    def stack_byte(self, offset: int) -> bytes:
        """``movzx ecx, byte [esp + offset]``."""
        return b"\x0f\xb6\x4c\x24" + bytes((offset,))

    def stack_half(self, offset: int) -> bytes:
        """``movzx ecx, word [esp + offset]``."""
        return b"\x0f\xb7\x4c\x24" + bytes((offset,))

    def load_stack(self, register: int, offset: int) -> bytes:
        """``mov register, [esp + offset]``."""
        return self.rex + bytes((0x8B, register << 3 | 0x44, 0x24, offset))

    def store_stack(self, register: int) -> bytes:
        """``mov [esp], register``."""
        return self.rex + bytes((0x89, register << 3 | 4, 0x24))

    def move_stack(self, by: int) -> bytes:
        """``lea esp, [esp + by]``: no flag is touched."""
        return self.rex + b"\x8d\xa4\x24" + struct.pack("<i", by)

    def subtract(self, value: int) -> bytes:
        """``lea ecx, [ecx - value]``; the value, as far as it matters, has 32 bits with sign."""
        return self.rex + b"\x8d\x89" + struct.pack("<I", -value & 0xFFFFFFFF)

    def leave(self, at: int, number: int) -> bytes:
        """Into the VMM: note the site, go through the gate."""
        return self.store_word(SITE, number) + jump(at + LEAVE_JUMP, self.linear(GATE))


NARROW, LONG = Forms(32), Forms(64)
