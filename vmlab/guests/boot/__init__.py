"""Boot loaders: what the firmware and a loader do before a kernel's first instruction, one file a protocol.

    begin = boot.start(image, "console=ttyS0", 256 << 20)
    for gpa, data in begin.pieces: …

A loader's last steps that change the CPU's mode are guest code (see linux.py): they run under every technique like all other code.
"""

from __future__ import annotations

from collections.abc import Callable

from vmlab.errors import GuestImageError
from vmlab.guests.boot import firmware, linux, multiboot, pvh, sector
from vmlab.guests.boot.layout import Start, arena, place_modules, segments_and_modules
from vmlab.guests.image import GuestImage

__all__ = ["Start", "arena", "start"]

_EAX, _EBX = 0, 3


def _multiboot(image: GuestImage, command_line: str, memory: int) -> Start:
    at, modules = arena(image), place_modules(image, memory)
    info = multiboot.information(at, memory, command_line, modules)
    pieces = (*segments_and_modules(image, modules), (at, info))
    return Start(pieces, image.entry, {_EAX: multiboot.BOOT_MAGIC, _EBX: at})


def _pvh(image: GuestImage, command_line: str, memory: int) -> Start:
    at, modules = arena(image), place_modules(image, memory)
    pieces = (*segments_and_modules(image, modules), (at, pvh.start_info(at, memory, command_line, modules)))
    return Start(pieces, image.entry, {_EBX: at})


_LOADERS: dict[str, Callable[[GuestImage, str, int], Start]] = {
    "multiboot": _multiboot, "pvh": _pvh, "linux32": linux.start, "linux64": linux.start, "sector": sector.start,
}


def start(image: GuestImage, command_line: str, memory: int) -> Start:
    """What firmware and loader leave for ``image`` in ``memory`` bytes of RAM. Raises :class:`GuestImageError` where it does not fit."""
    if image.end > memory:
        raise GuestImageError(f"guest image {image.name!r} needs memory up to {image.end:#x}; it has {memory >> 20} MiB of RAM (ram=…)")
    try:
        command_line.encode("ascii")
    except UnicodeEncodeError:
        raise GuestImageError(f"the command line of guest {image.name!r} has characters beyond ASCII: {command_line!r}") from None
    begin = _LOADERS[image.protocol](image, command_line, memory)
    if image.timer == "bios":
        begin = firmware.with_timer(image, begin)
    return Start((*firmware.areas(), *begin.pieces), begin.rip, begin.registers, begin.real_mode)
