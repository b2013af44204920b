"""Code of the user's own for ``vmlab translate``: assembled or in hexadecimal, and a guest that calls it once."""

from __future__ import annotations

import hashlib
import struct

from vmlab.errors import ConfigError
from vmlab.guests import GuestImage
from vmlab.guests.image import Segment

#: Where the code lies, who calls it, and its stack; of 64-bit code also the page tables and descriptors.
_ENTRY, _CODE, _STACK, _LONG = 0x100000, 0x100100, 0x90000, 0x100040
_TABLES, _GDT = 0x70000, 0x73000

# cli; xor eax, eax; mov dx, 0xf4; out dx, eax; hlt: the end, after the code was called.
_END = bytes.fromhex("fa 31c0 66baf400 ef f4")
# Into long mode (SDM Vol. 3A §9.8.5): CR4.PAE, CR3, EFER.LME with SCE, CR0.PG with WP, GDT, far jump.
_TO_LONG = bytes.fromhex(
    "b820000000 0f22e0"                 # mov eax, 0x20; mov cr4, eax
    "b800000700 0f22d8"                 # mov eax, tables; mov cr3, eax
    "b9800000c0 0f32 0d01010000 0f30"   # mov ecx, EFER; rdmsr; or eax, 0x101; wrmsr
    "0f20c0 0d00000180 0f22c0"          # mov eax, cr0; or eax, 0x80010000; mov cr0, eax
    "0f011520300700"                    # lgdt [pointer]
    "ea400010000800"                    # jmp 8:long
)
_LARGE = 1 << 21


def assembled(source: str, bits: int) -> bytes:
    """Machine code of ``source`` in Intel syntax. Raises ConfigError without an assembler, and for what it refuses."""
    try:
        import keystone  # type: ignore[import-untyped]
    except ImportError:
        raise ConfigError("--asm needs an assembler: pip install 'vmlab[asm]' (keystone-engine); or give machine code with --bytes") from None
    try:
        code, _ = keystone.Ks(keystone.KS_ARCH_X86, keystone.KS_MODE_64 if bits == 64 else keystone.KS_MODE_32).asm(source, _CODE)
    except keystone.KsError as error:
        raise ConfigError(f"--asm: {error}") from None
    if not code:
        raise ConfigError("--asm: no instruction in it")
    return bytes(code)


def from_hex(words: str) -> bytes:
    """Machine code in hexadecimal. Raises ConfigError."""
    try:
        raw = bytes.fromhex(words)
    except ValueError as error:
        raise ConfigError(f"--bytes: {error}") from None
    if not raw:
        raise ConfigError("--bytes: no byte in it")
    return raw


def image(code: bytes, bits: int) -> GuestImage:
    """A guest that calls the code once, and ends. In 64 bits 1 GiB is mapped one to one, and SYSCALL is on."""
    if bits == 32:
        segments = [(_ENTRY, _caller(_ENTRY, b""))]
        symbols = {"caller": _ENTRY, "code": _CODE}
    else:
        load_stack = bytes.fromhex("b810000000 8ed0")      # mov eax, 0x10; mov ss, eax
        tables = b"".join(struct.pack("<512Q", *entries) for entries in (
            [_TABLES + 0x1003] + [0] * 511, [_TABLES + 0x2003] + [0] * 511, [page * _LARGE | 0x83 for page in range(512)]))
        gdt = struct.pack("<4QHI", 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0, 3 * 8 - 1, _GDT)      # the pointer at its end
        segments = [(_TABLES, tables), (_GDT, gdt), (_ENTRY, _TO_LONG), (_LONG, _caller(_LONG, load_stack))]
        symbols = {"boot": _ENTRY, "caller": _LONG, "code": _CODE}
    placed = tuple(Segment(at, data, len(data)) for at, data in (*segments, (_CODE, code)))
    return GuestImage("your code", placed, _ENTRY, None, symbols, hashlib.sha256(code).hexdigest())


def _caller(at: int, first: bytes) -> bytes:
    """At ``at``: load a stack, call the code, end."""
    stack = first + b"\xbc" + struct.pack("<I", _STACK)
    return stack + b"\xe8" + struct.pack("<i", _CODE - (at + len(stack) + 5)) + _END
