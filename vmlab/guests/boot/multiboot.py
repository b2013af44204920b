"""The Multiboot information that a loader leaves in memory for a kernel, as bytes.

Source: Multiboot Specification 0.6.96, section 3.3 "Boot information format". EAX = 0x2BADB002, EBX = its address.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from vmlab.guests.boot.layout import HIGH_START, LOW_END, Placed, memory_regions

BOOT_MAGIC = 0x2BADB002
_MEMORY, _COMMAND_LINE, _MODULES, _MAP, _LOADER = 1 << 0, 1 << 2, 1 << 3, 1 << 6, 1 << 9
_INFO_SIZE = 120  # up to and including the APM and VBE fields, which stay zero


def information(address: int, memory: int, command_line: str, modules: Sequence[Placed] = (), loader: str = "vmlab") -> bytes:
    """The structure and what it points at, to be placed at guest-physical ``address``.

    :param memory: bytes of RAM from 0; at least 1 MiB.
    """
    if memory < HIGH_START:
        raise ValueError(f"a Multiboot kernel needs at least 1 MiB of memory, not {memory} bytes")
    # An entry's size field does not count itself; entries: base, length, type.
    memory_map = b"".join(struct.pack("<IQQI", 20, *region) for region in memory_regions(memory))
    text = command_line.encode("ascii") + b"\0"
    map_at = address + _INFO_SIZE
    modules_at = map_at + len(memory_map)
    text_at = modules_at + 16 * len(modules)
    loader_at = text_at + len(text)
    # A module: its first byte, the one behind its last, its own command line (empty: the end of the kernel's), reserved.
    table = b"".join(struct.pack("<IIII", module.address, module.address + module.size, loader_at - 1, 0) for module in modules)
    info = bytearray(_INFO_SIZE)
    flags = _MEMORY | _COMMAND_LINE | _MAP | _LOADER | (_MODULES if modules else 0)
    struct.pack_into("<III", info, 0, flags, LOW_END >> 10, (memory - HIGH_START) >> 10)
    struct.pack_into("<III", info, 16, text_at, len(modules), modules_at if modules else 0)
    struct.pack_into("<II", info, 44, len(memory_map), map_at)
    struct.pack_into("<I", info, 64, loader_at)
    return bytes(info) + memory_map + table + text + loader.encode("ascii") + b"\0"
