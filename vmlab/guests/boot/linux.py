"""The Linux boot protocol: the zero page, and the last steps of a loader before the kernel's 32- or 64-bit entry.

Source: Linux, Documentation/arch/x86/boot.rst ("The Real-Mode Kernel Header", "32-bit Boot Protocol", "64-bit Boot Protocol") and
zero-page.rst. Those last steps, descriptor tables and for the 64-bit entry paging, are the code below, which the guest's CPU runs.
"""

from __future__ import annotations

import struct

from vmlab.errors import GuestImageError
from vmlab.guests.boot.layout import PAGE, Start, arena, memory_regions, place_modules, segments_and_modules
from vmlab.guests.image import GuestImage

# Offsets in the zero page, which are those of the file's first sectors too.
HEADER, HEADER_END = 0x1F1, 0x202
_E820_COUNT, _E820_TABLE, _EXT_RAMDISK = 0x1E8, 0x2D0, 0xC0
_TYPE_OF_LOADER, _LOADFLAGS, _RAMDISK, _COMMAND_LINE, _INITRD_MAX, _COMMAND_MAX = 0x210, 0x211, 0x218, 0x228, 0x22C, 0x238
_VIDEO = 0x00                           # struct screen_info
_UNDEFINED_LOADER, _CAN_USE_HEAP = 0xFF, 0x80
_ESI = 6
# In the arena: the zero page, the loader's code and GDT, the command line; then six pages of tables for the 64-bit entry.
_CODE, _GDT, _TEXT, _TABLES = PAGE, PAGE + 0x80, PAGE + 0x100, 4 * PAGE
_ENTRY_64 = 0x200                       # of the protected-mode kernel
_SELECTORS = (0, 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF, 0x00AF9B000000FFFF)  # __BOOT_CS 0x10, __BOOT_DS 0x18, 64-bit code 0x20


def start(image: GuestImage, command_line: str, memory: int) -> Start:
    """Everything in place for ``image.entry``, the address that the protected-mode kernel was loaded at."""
    at = arena(image)
    page = bytearray(PAGE)
    page[HEADER:HEADER + len(image.setup)] = image.setup
    highest = struct.unpack_from("<I", page, _INITRD_MAX)[0] + 1
    longest = struct.unpack_from("<I", page, _COMMAND_MAX)[0]
    if len(command_line) > longest:
        raise GuestImageError(f"guest image {image.name!r} takes a command line of at most {longest} characters, not {len(command_line)}")
    places = place_modules(image, memory, highest)
    if len(places) > 1:
        raise GuestImageError(f"guest image {image.name!r}: the Linux boot protocol has one initrd, not {len(places)} modules")
    if places:
        struct.pack_into("<II", page, _RAMDISK, places[0].address, places[0].size)
    page[_TYPE_OF_LOADER] = _UNDEFINED_LOADER
    page[_LOADFLAGS] &= ~_CAN_USE_HEAP
    struct.pack_into("<I", page, _COMMAND_LINE, at + _TEXT)
    struct.pack_into("<BBHBB", page, _VIDEO, 0, 24, 0, 0, 3)    # cursor, then text mode 3 …
    page[_VIDEO + 7], page[_VIDEO + 14], page[_VIDEO + 15] = 80, 25, 1  # … of 80×25, on a VGA
    regions = memory_regions(memory)
    page[_E820_COUNT] = len(regions)
    for i, region in enumerate(regions):
        struct.pack_into("<QQI", page, _E820_TABLE + 20 * i, *region)
    pieces = [*segments_and_modules(image, places), (at, bytes(page)), (at + _TEXT, command_line.encode("ascii") + b"\0")]
    gdt = struct.pack(f"<{len(_SELECTORS)}Q", *_SELECTORS)
    pieces.append((at + _GDT, gdt + struct.pack("<HI", len(gdt) - 1, at + _GDT)))
    to = at + _GDT + len(gdt)
    if image.protocol == "linux64":
        pieces += [(at + _CODE, _enter_64(to, at + _TABLES, image.entry + _ENTRY_64)), (at + _TABLES, _identity(at + _TABLES))]
    else:
        pieces.append((at + _CODE, _enter_32(to, at + _CODE, image.entry)))
    return Start(tuple(pieces), at + _CODE, {_ESI: at})


def _enter_32(gdtr: int, at: int, entry: int) -> bytes:
    """lgdt ; jmp 0x10:next ; next: DS, ES, SS, FS, GS = 0x18 ; jmp entry. ESI, and zero in the other registers, stay."""
    begin = bytes.fromhex("0f0115") + struct.pack("<I", gdtr) + b"\xea" + struct.pack("<IH", at + 14, 0x10)
    code = begin + bytes.fromhex("b818000000 8ed8 8ec0 8ed0 8ee0 8ee8 31c0")
    return code + b"\xe9" + struct.pack("<i", entry - (at + len(code) + 5))


def _enter_64(gdtr: int, tables: int, entry: int) -> bytes:
    """lgdt ; DS … = 0x18 ; CR4.PAE ; CR3 ; EFER.LME ; CR0.PG ; jmp 0x20:entry."""
    return (bytes.fromhex("0f0115") + struct.pack("<I", gdtr) + bytes.fromhex("b818000000 8ed8 8ec0 8ed0 8ee0 8ee8")
            + bytes.fromhex("b820000000 0f22e0 b8") + struct.pack("<I", tables) + bytes.fromhex("0f22d8 b9800000c0 0f32 0d00010000 0f30")
            + bytes.fromhex("b811000080 0f22c0 ea") + struct.pack("<IH", entry, 0x20))


def _identity(at: int) -> bytes:
    """Page tables that map the first 4 GiB one to one with pages of 2 MiB, to be placed at ``at``."""
    top = struct.pack("<Q", at + PAGE | 3).ljust(PAGE, b"\0")
    directory_pointers = struct.pack("<4Q", *(at + (2 + i) * PAGE | 3 for i in range(4))).ljust(PAGE, b"\0")
    return top + directory_pointers + struct.pack("<2048Q", *(i << 21 | 0x83 for i in range(2048)))
