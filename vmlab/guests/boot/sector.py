"""A disk image: the PC's firmware reads its first sector to 0x7C00 and jumps there in real mode, DL = the drive.

Sources: IBM PC/AT Technical Reference, BIOS listing (INT 19h); Plug and Play BIOS Specification 1.0A §3.2 for the registers.
The firmware of this lab has no services: INT 10h and its like end at :data:`vmlab.guests.boot.firmware.NO_SERVICE`, which says so.
"""

from __future__ import annotations

from vmlab.guests.boot.layout import Start
from vmlab.guests.image import GuestImage

AT, FIRST_DISK = 0x7C00, 0x80
_EDX, _ESP = 2, 4


def start(image: GuestImage, command_line: str, memory: int) -> Start:
    """The boot sector in memory; the command line is nobody's."""
    return Start(tuple((s.address, s.data) for s in image.segments), image.entry, {_EDX: FIRST_DISK, _ESP: AT}, real_mode=True)
