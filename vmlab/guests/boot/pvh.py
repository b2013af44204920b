"""Xen's PVH start of day: the structure that EBX points at.

Sources: xen/include/public/arch-x86/hvm/start_info.h (hvm_start_info, version 1), docs/misc/pvh.pandoc ("CPU state":
32-bit protected mode, flat segments, paging off, EBX = the structure).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from vmlab.guests.boot.layout import Placed, memory_regions

MAGIC, VERSION = 0x336EC578, 1
_INFO_SIZE, _MODULE_SIZE, _REGION_SIZE = 56, 32, 24


def start_info(address: int, memory: int, command_line: str, modules: Sequence[Placed]) -> bytes:
    """The structure, and behind it the list of modules, the memory map and the command line, to be placed at ``address``."""
    regions = memory_regions(memory)
    modules_at = address + _INFO_SIZE
    map_at = modules_at + _MODULE_SIZE * len(modules)
    text_at = map_at + _REGION_SIZE * len(regions)
    info = struct.pack("<IIIIQQQQII", MAGIC, VERSION, 0, len(modules), modules_at if modules else 0, text_at, 0, map_at, len(regions), 0)
    table = b"".join(struct.pack("<QQQQ", module.address, module.size, 0, 0) for module in modules)
    memory_map = b"".join(struct.pack("<QQII", *region, 0) for region in regions)
    return info + table + memory_map + command_line.encode("ascii") + b"\0"
