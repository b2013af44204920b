"""The Multiboot information that a loader leaves in memory for a kernel, as bytes.

Source: Multiboot Specification 0.6.96, section 3.3 "Boot information format". EAX = 0x2BADB002, EBX = its address.
"""

from __future__ import annotations

import struct

BOOT_MAGIC = 0x2BADB002
_MEMORY, _COMMAND_LINE, _MAP, _LOADER = 1 << 0, 1 << 2, 1 << 6, 1 << 9
_INFO_SIZE = 120  # up to and including the APM and VBE fields, which stay zero
_LOW_END, _HIGH_START = 0xA0000, 0x100000
_RAM, _RESERVED = 1, 2


def information(address: int, memory: int, command_line: str, loader: str = "vmlab") -> bytes:
    """The structure and what it points at, to be placed at guest-physical ``address``.

    :param memory: bytes of RAM from 0; at least 1 MiB.
    """
    if memory < _HIGH_START:
        raise ValueError(f"a Multiboot kernel needs at least 1 MiB of memory, not {memory} bytes")
    regions = [(0, _LOW_END, _RAM), (_LOW_END, _HIGH_START - _LOW_END, _RESERVED)]
    if memory > _HIGH_START:
        regions.append((_HIGH_START, memory - _HIGH_START, _RAM))
    # An entry's size field does not count itself; entries: base, length, type.
    memory_map = b"".join(struct.pack("<IQQI", 20, base, length, kind) for base, length, kind in regions)
    text = command_line.encode("ascii") + b"\0"
    map_at = address + _INFO_SIZE
    text_at = map_at + len(memory_map)
    loader_at = text_at + len(text)
    info = bytearray(_INFO_SIZE)
    struct.pack_into("<III", info, 0, _MEMORY | _COMMAND_LINE | _MAP | _LOADER, _LOW_END >> 10, (memory - _HIGH_START) >> 10)
    struct.pack_into("<I", info, 16, text_at)
    struct.pack_into("<II", info, 44, len(memory_map), map_at)
    struct.pack_into("<I", info, 64, loader_at)
    return bytes(info) + memory_map + text + loader.encode("ascii") + b"\0"
