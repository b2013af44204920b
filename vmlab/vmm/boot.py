"""Loading: what a boot loader does before the guest's first instruction."""

from __future__ import annotations

from collections.abc import Callable

from vmlab.guests import GuestImage, multiboot

MULTIBOOT_MAGIC = multiboot.BOOT_MAGIC
#: Guest-physical address of the Multiboot information: free low memory on every PC.
INFO_ADDRESS = 0x9000


def place_multiboot(image: GuestImage, command_line: str, memory_size: int, write: Callable[[int, bytes], None]) -> int:
    """Copy the image's segments and the Multiboot information into guest memory; returns the information's gpa.

    ``write(gpa, data)`` stores into guest-physical memory. EAX must then hold :data:`MULTIBOOT_MAGIC`,
    EBX the returned address (Multiboot Specification 0.6.96 §3.2).
    """
    for segment in image.segments:
        write(segment.address, segment.data + bytes(segment.memory_size - len(segment.data)))
    write(INFO_ADDRESS, multiboot.information(INFO_ADDRESS, memory_size, command_line))
    return INFO_ADDRESS
