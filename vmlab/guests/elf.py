"""Reads an ELF kernel into a :class:`GuestImage`, and refuses whatever is not one with a clear sentence.

An i386 kernel with a Multiboot header, or one of either size with Xen's note PHYS32_ENTRY (PVH).
Sources: System V ABI, Intel386 supplement (ELF); Multiboot Specification 0.6.96 section 3.1 (header);
xen/include/public/elfnote.h (notes).
"""

from __future__ import annotations

import hashlib
import io
import struct
from types import MappingProxyType
from typing import Any

from vmlab.errors import GuestImageError
from vmlab.guests.image import GuestImage, PvNotes, Segment

MULTIBOOT_MAGIC = 0x1BADB002
_HEADER_SEARCH = 8192  # the header lies within the first 8192 bytes of the file, 4-byte aligned
_KNOWN_FLAGS = 0x0001_0003  # page-aligned modules, memory information, address fields (ignored for an ELF)
_NOTES = {1: "entry", 2: "hypercall_page", 3: "virt_base", 4: "paddr_offset", 5: "xen_version", 6: "guest_os",
          8: "loader", 9: "pae_mode", 10: "features", 18: "phys32_entry"}
_NUMBERS = {"entry", "hypercall_page", "virt_base", "paddr_offset", "phys32_entry"}
_MACHINES = {("EM_386", 32), ("EM_X86_64", 64)}


def parse(name: str, data: bytes, protocol: str = "auto") -> GuestImage:
    """``data`` as a guest image. Raises :class:`GuestImageError` that names the image and what is wrong.

    :param protocol: "multiboot", "pvh", or "auto": Multiboot where there is such a header, else PVH.
    """
    if len(data) < 4 or data[:4] != b"\x7fELF":
        raise GuestImageError(f"guest image {name!r} is not an ELF file")
    from elftools.common.exceptions import ELFError  # imported late: most commands read no image
    from elftools.elf.elffile import ELFFile
    from elftools.elf.sections import SymbolTableSection

    try:
        elf = ELFFile(io.BytesIO(data))
        if (elf["e_machine"], elf.elfclass) not in _MACHINES:
            raise GuestImageError(f"guest image {name!r} is for {elf['e_machine']}, {elf.elfclass} bits; a kernel for i386 or x86-64 is needed")
        if elf["e_type"] != "ET_EXEC":
            raise GuestImageError(f"guest image {name!r} is an ELF {elf['e_type']}, not an executable")
        headers = list(elf.iter_segments())
        segments = _segments(name, data, headers)
        values = _notes(name, data, headers)
        table = elf.get_section_by_name(".symtab")
        symbols = {}
        if isinstance(table, SymbolTableSection):
            symbols = {s.name: int(s["st_value"]) for s in table.iter_symbols() if s.name}
        entry = int(elf["e_entry"])
    except (ELFError, struct.error, ValueError, KeyError, AttributeError, UnicodeDecodeError, OverflowError) as error:
        raise GuestImageError(f"guest image {name!r} is truncated or damaged: {error or type(error).__name__}") from error
    phys32 = values.get("phys32_entry")
    if protocol == "pvh" or (protocol == "auto" and phys32 is not None and not _has_multiboot(name, data)):
        if not isinstance(phys32, int):
            raise GuestImageError(f"guest image {name!r} has no PVH entry (Xen's ELF note PHYS32_ENTRY)")
        protocol, entry = "pvh", phys32
    elif elf.elfclass == 64:
        raise GuestImageError(f"guest image {name!r} is for EM_X86_64, 64 bits, and has no PVH entry (Xen's ELF note PHYS32_ENTRY): "
                              "it cannot be started; a Multiboot kernel is 32-bit")
    elif not _has_multiboot(name, data):
        raise GuestImageError(f"guest image {name!r} has no Multiboot header in its first {_HEADER_SEARCH} bytes, and no PVH entry")
    else:
        protocol = "multiboot"
    if not any(s.address <= entry < s.address + s.memory_size for s in segments):
        raise GuestImageError(f"guest image {name!r}: the entry point {entry:#x} lies in no segment")
    return GuestImage(name, segments, entry, _pv(values), MappingProxyType(symbols), hashlib.sha256(data).hexdigest(), protocol)


def _segments(name: str, data: bytes, headers: list[Any]) -> tuple[Segment, ...]:
    found = []
    for header in headers:
        if header["p_type"] != "PT_LOAD" or not header["p_memsz"]:
            continue
        start, size, memsz = header["p_offset"], header["p_filesz"], header["p_memsz"]
        if start + size > len(data) or size > memsz:
            raise GuestImageError(
                f"guest image {name!r} is truncated: a segment needs bytes up to {start + size}, the file has {len(data)}"
            )
        if header["p_paddr"] + memsz > 1 << 32:
            raise GuestImageError(f"guest image {name!r}: a segment reaches beyond 4 GiB")
        found.append(Segment(header["p_paddr"], data[start : start + size], memsz))
    if not found:
        raise GuestImageError(f"guest image {name!r} has no segment to load")
    return tuple(found)


def _notes(name: str, data: bytes, headers: list[Any]) -> dict[str, int | str]:
    """The Xen notes. Each note: name size, desc size, type, name, desc."""
    values: dict[str, int | str] = {}
    for header in headers:
        if header["p_type"] != "PT_NOTE":
            continue
        at, end = header["p_offset"], header["p_offset"] + header["p_filesz"]
        if end > len(data):
            raise GuestImageError(f"guest image {name!r} is truncated: its notes lie behind the end of the file")
        while at + 12 <= end:
            name_size, desc_size, kind = struct.unpack_from("<III", data, at)
            owner_at = at + 12
            desc_at = owner_at + (name_size + 3 & ~3)
            at = desc_at + (desc_size + 3 & ~3)
            if at > end:
                raise GuestImageError(f"guest image {name!r}: a note reaches beyond its segment")
            if data[owner_at : owner_at + name_size] != b"Xen\0" or kind not in _NOTES:
                continue
            desc = data[desc_at : desc_at + desc_size]
            key = _NOTES[kind]
            if key in _NUMBERS:  # "Numeric types are either 4 or 8 bytes"
                if desc_size not in (4, 8):
                    raise GuestImageError(f"guest image {name!r}: the note {key} has {desc_size} bytes, not 4 or 8")
                values[key] = int.from_bytes(desc, "little")
                if key == "entry":
                    values["bits"] = 8 * desc_size
            else:
                values[key] = desc.rstrip(b"\0").decode("ascii")
    return values


def _pv(values: dict[str, int | str]) -> PvNotes | None:
    """What the notes say of a paravirtual entry, None where they have none."""
    if "entry" not in values:
        return None

    def number(key: str) -> int:
        return int(values.get(key, 0))

    def text(key: str) -> str:
        return str(values.get(key, ""))

    page = number("hypercall_page") if "hypercall_page" in values else None
    return PvNotes(number("entry"), page, number("virt_base"), number("paddr_offset"), text("guest_os"),
                   text("xen_version"), text("loader"), text("pae_mode"), text("features"), number("bits"))


def _has_multiboot(name: str, data: bytes) -> bool:
    """Whether there is a Multiboot header. Raises :class:`GuestImageError` for one that asks for what is not there."""
    for at in range(0, min(len(data), _HEADER_SEARCH) - 11, 4):
        magic, flags, checksum = struct.unpack_from("<III", data, at)
        if magic == MULTIBOOT_MAGIC and (magic + flags + checksum) & 0xFFFFFFFF == 0:
            needed = flags & 0xFFFF & ~_KNOWN_FLAGS  # the low 16 bits are requirements, the high ones may be ignored
            if needed:
                raise GuestImageError(f"guest image {name!r} asks for Multiboot features {needed:#x}, which are not there")
            return True
    return False
