"""What a PC's firmware leaves in memory: vectors, the BIOS data area, the tables of the MultiProcessor Specification.

Sources: IBM PC/AT Technical Reference (vectors, BIOS data area); Intel MultiProcessor Specification 1.4 chapter 4
(floating pointer, configuration table). The firmware itself is no program: who calls it is told so on the serial port.
"""

from __future__ import annotations

import struct

from vmlab.errors import GuestImageError
from vmlab.guests.boot.layout import Start
from vmlab.guests.image import GuestImage

#: Extended BIOS data area: the last KiB of base memory, where the floating pointer is searched first (MP Specification §4).
EBDA = 0x9FC00
_BASE_KIB = EBDA >> 10
_POINTER, _TABLE = EBDA + 0x10, EBDA + 0x20
_LAPIC, _IOAPIC = 0xFEE00000, 0xFEC00000
_LAPIC_ID, _LAPIC_VERSION, _IOAPIC_ID, _IOAPIC_VERSION = 0, 0x14, 1, 0x11
_ENABLED, _BOOTSTRAP = 1, 2
_INT, _NMI, _EXTINT = 0, 1, 3          # interrupt types (table 4-9)
_ISA_BUS = 0
#: The ISA interrupt of the timer reaches the I/O APIC at input 2, for the 8259 pair's INTR is at 0 (MP Specification §3.6.1).
TIMER_INPUT = 2

#: Linear address of the routine that all interrupt vectors lead to before a guest sets its own.
NO_SERVICE = 0xFE000
# mov si, text ; mov dx, 0x3F8 ; 1: cs lodsb ; test al, al ; jz 2f ; out dx, al ; jmp 1b ; 2: cli ; hlt ; jmp 2b
_NO_SERVICE_CODE = bytes.fromhex("be18e0 baf803 2eac 84c0 7403 ee ebf7 fa f4 ebfc")
_NO_SERVICE_TEXT = b"\r\nvmlab: the firmware of this machine has no services (INT n in real mode)\r\n\0"


#: Where the code lies that programs timer and interrupt controllers, and the handler of the tick.
_SETUP, _SETUP_SIZE, _TICK = 0x500, 0x100, 0xFE080
_TICK_VECTOR = 8
#: (port, value) in the order of IBM's BIOS: both controllers (ICW1 to ICW4: edges, vectors 8 and 0x70, cascade, 8086), which interrupts
#: are let in (timer, keyboard, the slave, diskette; clock, …), and channel 0 of the timer in mode 3, as slow as it goes.
_DEVICES = ((0x20, 0x11), (0x21, _TICK_VECTOR), (0x21, 4), (0x21, 1), (0xA0, 0x11), (0xA1, 0x70), (0xA1, 2), (0xA1, 1), (0x21, 0xB8), (0xA1, 0x8F),
            (0x43, 0x36), (0x40, 0), (0x40, 0))
# push ax, ds ; mov ax, 0x40 ; mov ds, ax ; inc dword [0x6C] ; mov al, 0x20 ; out 0x20, al ; pop ds, ax ; iret
_TICK_CODE = bytes.fromhex("50 1e b84000 8ed8 66ff066c00 b020 e620 1f 58 cf")


def with_timer(image: GuestImage, begin: Start) -> Start:
    """``begin`` behind code of the guest's that programs timer and interrupt controllers as a BIOS does; the tick counts at 0040:006C.

    Raises :class:`GuestImageError` where the image itself lies there.
    """
    if any(segment.address < _SETUP + _SETUP_SIZE and segment.address + segment.memory_size > _SETUP for segment in image.segments):
        raise GuestImageError(f"timer=bios: guest image {image.name!r} lies at {_SETUP:#x}, where the code is that programs the timer")
    eax = begin.registers.get(0, 0)
    code = b"".join(bytes((0xB0, value, 0xE6, port)) for port, value in _DEVICES)     # mov al, value ; out port, al
    code += (b"\x66" if begin.real_mode else b"") + b"\xb8" + struct.pack("<I", eax) + b"\xe9"
    width = 2 if begin.real_mode else 4
    code += (begin.rip - (_SETUP + len(code) + width) & (1 << 8 * width) - 1).to_bytes(width, "little")
    tick = struct.pack("<HH", _TICK & 0xFFFF, 0xF000)
    return Start(((_SETUP, code), (_TICK, _TICK_CODE), (4 * _TICK_VECTOR, tick), *begin.pieces), _SETUP, begin.registers, begin.real_mode)


def areas() -> tuple[tuple[int, bytes], ...]:
    """(guest-physical address, bytes)."""
    code = _NO_SERVICE_CODE.ljust(0x18, b"\x90") + _NO_SERVICE_TEXT
    return ((0, struct.pack("<HH", NO_SERVICE & 0xFFFF, 0xF000) * 256), (0x400, _data_area()), (NO_SERVICE, code),
            (_POINTER, _floating_pointer()), (_TABLE, _configuration_table()))


def _data_area() -> bytes:
    """BIOS data area, 0x400–0x4FF: the serial port, the EBDA's segment, equipment, KiB of base memory, the display's ports and mode."""
    area = bytearray(0x100)
    struct.pack_into("<H", area, 0x00, 0x3F8)
    struct.pack_into("<HH", area, 0x0E, EBDA >> 4, 0x0222)      # equipment: one serial port, 80×25 colour, a coprocessor
    struct.pack_into("<H", area, 0x13, _BASE_KIB)
    struct.pack_into("<BH", area, 0x49, 3, 80)                  # text mode 3, 80 columns
    struct.pack_into("<H", area, 0x63, 0x3D4)                   # the display's index port
    area[0x75] = 0
    return bytes(area)


def _sum_to_zero(raw: bytearray, at: int) -> bytes:
    raw[at] = -sum(raw) & 0xFF
    return bytes(raw)


def _floating_pointer() -> bytes:
    """§4.1: signature, address of the table, length in paragraphs, revision 1.4, checksum, no default configuration, no IMCR."""
    return _sum_to_zero(bytearray(struct.pack("<4sIBBB5B", b"_MP_", _TABLE, 1, 4, 0, 0, 0, 0, 0, 0)), 10)


def _configuration_table() -> bytes:
    """§4.2–4.3: one processor, the ISA bus, one I/O APIC, where each ISA interrupt goes, and what is at LINT0 and LINT1."""
    entries = [
        struct.pack("<BBBBIIII", 0, _LAPIC_ID, _LAPIC_VERSION, _ENABLED | _BOOTSTRAP, 0, 0, 0, 0),
        struct.pack("<BB6s", 1, _ISA_BUS, b"ISA   "),
        struct.pack("<BBBBI", 2, _IOAPIC_ID, _IOAPIC_VERSION, _ENABLED, _IOAPIC),
    ]
    for irq in range(16):
        if irq != 2:        # the slave's, which is no interrupt of a device
            entries.append(struct.pack("<BBHBBBB", 3, _INT, 0, _ISA_BUS, irq, _IOAPIC_ID, TIMER_INPUT if irq == 0 else irq))
    entries.append(struct.pack("<BBHBBBB", 4, _EXTINT, 0, _ISA_BUS, 0, 0xFF, 0))
    entries.append(struct.pack("<BBHBBBB", 4, _NMI, 0, _ISA_BUS, 0, 0xFF, 1))
    body = b"".join(entries)
    header = struct.pack("<4sHBB8s12sIHHIHBB", b"PCMP", 44 + len(body), 4, 0, b"VMLAB   ", b"PC          ", 0, 0, len(entries), _LAPIC, 0, 0, 0)
    return _sum_to_zero(bytearray(header + body), 7)
