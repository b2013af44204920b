"""A guest image as the rest of the lab sees it: bytes to place, where to start, what it says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vmlab.errors import GuestImageError
from vmlab.parameters import Parameter


@dataclass(frozen=True)
class Segment:
    """Bytes to place at guest-physical ``address``; the rest up to ``memory_size`` bytes is zero."""

    address: int
    data: bytes
    memory_size: int


@dataclass(frozen=True)
class PvNotes:
    """What the Xen ELF notes say (xen/include/public/elfnote.h). Addresses are virtual.

    ``bits``: width of the kernel, told by that of its notes' numbers, for the file is an ELF32 either way.
    """

    entry: int
    hypercall_page: int | None
    virt_base: int
    paddr_offset: int
    guest_os: str
    xen_version: str
    loader: str
    pae_mode: str
    features: str
    bits: int = 32


#: Boot protocols by name: who says what a kernel finds in memory and registers when it starts.
PROTOCOLS = {
    "multiboot": "Multiboot 1: an ELF with a Multiboot header, entered in 32-bit protected mode",
    "pvh": "Xen's PVH: an ELF with the note PHYS32_ENTRY, entered in 32-bit protected mode",
    "linux32": "Linux boot protocol, 32-bit entry of a bzImage",
    "linux64": "Linux boot protocol, 64-bit entry of a bzImage",
    "sector": "a disk image: its first sector at 0x7C00 in real mode, as a PC's firmware does",
}


@dataclass(frozen=True)
class GuestImage:
    """A kernel as a boot loader sees it: bytes to place, where to start, by which protocol."""

    name: str
    segments: tuple[Segment, ...]
    entry: int
    pv: PvNotes | None
    symbols: Mapping[str, int]
    sha256: str
    #: One of :data:`PROTOCOLS`.
    protocol: str = "multiboot"
    #: What the loader puts into memory beside the kernel: Multiboot modules; for Linux the first is the initrd.
    modules: tuple[bytes, ...] = ()
    #: Linux boot protocol: the setup header, from offset 0x1F1 of the file.
    setup: bytes = b""
    #: Disks that the machine has for this guest, in their order: IDE drives.
    drives: tuple[bytes, ...] = ()
    #: Timer and interrupt controllers at the start: "reset", or "bios" (boot/firmware.py).
    timer: str = "reset"

    @property
    def end(self) -> int:
        """First guest-physical address behind the image."""
        return max(s.address + s.memory_size for s in self.segments)

    def symbol(self, name: str) -> int:
        """The symbol's address; :class:`GuestImageError` if the image has none of that name."""
        try:
            return self.symbols[name]
        except KeyError:
            raise GuestImageError(f"guest image {self.name!r} has no symbol {name!r}; the lab needs it to measure") from None


@dataclass(frozen=True)
class Workload:
    """One thing that a guest can be told to do, with the parameters that it takes."""

    name: str
    summary: str
    parameters: Mapping[str, Parameter]
    #: Whether interrupts arrive in it at times that differ by technique, so that the full state at its end may too.
    asynchronous: bool = False
