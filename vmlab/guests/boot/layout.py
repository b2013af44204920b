"""What every loader says of a PC's memory, and where it puts its own things."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from vmlab.errors import GuestImageError
from vmlab.guests.image import GuestImage

PAGE = 0x1000
LOW_END, HIGH_START = 0xA0000, 0x100000     # the PC's hole: display memory and ROM
RAM, RESERVED = 1, 2                        # types of a memory map's entries, the same in all protocols (ACPI §15)
#: Free low memory for what a loader tells the kernel; the second where the image itself reaches over the first.
ARENAS = (0x9000, 0x80000)
ARENA_SIZE = 0x18000


class Placed(NamedTuple):
    """A module in guest memory."""

    address: int
    size: int


@dataclass(frozen=True)
class Start:
    """What a boot loader does: bytes in guest-physical memory, then a jump.

    The CPU is in 32-bit protected mode without paging, on flat segments, interrupts off; or in real mode with all segments at 0.
    ``registers``: general registers by number; the others hold 0.
    """

    pieces: tuple[tuple[int, bytes], ...]
    rip: int
    registers: Mapping[int, int] = field(default_factory=dict)
    real_mode: bool = False


def memory_regions(memory: int) -> list[tuple[int, int, int]]:
    """The memory map of a PC with ``memory`` bytes of RAM from 0: (base, bytes, type)."""
    regions = [(0, LOW_END, RAM), (LOW_END, HIGH_START - LOW_END, RESERVED)]
    if memory > HIGH_START:
        regions.append((HIGH_START, memory - HIGH_START, RAM))
    return regions


def arena(image: GuestImage) -> int:
    """Where in low memory the loader's own things go: the first place that the image leaves free."""
    for at in ARENAS:
        if not any(s.address < at + ARENA_SIZE and at < s.address + s.memory_size for s in image.segments):
            return at
    raise GuestImageError(f"guest image {image.name!r} leaves no room in low memory for what its loader must tell it")


def place_modules(image: GuestImage, memory: int, highest: int = 1 << 32) -> list[Placed]:
    """Where the image's modules go: page-aligned, from the top of RAM (or ``highest``) down.

    Raises :class:`GuestImageError` where they do not fit.
    """
    found, end = [], min(memory, highest) & ~(PAGE - 1)
    for module in image.modules:
        end = (end - len(module)) & ~(PAGE - 1)
        found.append(Placed(end, len(module)))
    if image.modules and end < max(image.end, HIGH_START):
        size = sum(map(len, image.modules))
        raise GuestImageError(f"guest {image.name!r} and its {size:,} bytes of modules do not fit into {memory >> 20} MiB of RAM; "
                              "give it more (ram=…)")
    return found


def segments_and_modules(image: GuestImage, places: Sequence[Placed]) -> list[tuple[int, bytes]]:
    """The image and its modules as bytes to place."""
    pieces = [(s.address, s.data + bytes(s.memory_size - len(s.data))) for s in image.segments]
    return pieces + [(place.address, module) for place, module in zip(places, image.modules, strict=True)]
