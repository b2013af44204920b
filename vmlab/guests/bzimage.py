"""Reads a bzImage, the file that a Linux kernel (and memtest86+) is distributed as, into a :class:`GuestImage`.

Source: Linux, Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header". The kernel inside is compressed; by default the
image is entered as its file says and unpacks itself. With ``protocol="pvh"`` it is unpacked here, as a hypervisor's domain builder
does, and its ELF is entered by its own note.
"""

from __future__ import annotations

import bz2
import hashlib
import lzma
import struct
import zlib
from types import MappingProxyType

from vmlab.errors import GuestImageError
from vmlab.guests import elf
from vmlab.guests.image import GuestImage, Segment
from vmlab.guests.lz4 import unpack_legacy

MAGIC = b"HdrS"
_AT_MAGIC, _SETUP_SECTS, _HEADER, _SECTOR = 0x202, 0x1F1, 0x1F1, 512
_OLDEST = 0x20A                     # has pref_address and init_size
_LOADED_HIGH, _KERNEL_64 = 1, 1     # bit 0 of loadflags, of xloadflags
_LOW_KERNEL = 0x100000


def is_bzimage(data: bytes) -> bool:
    """Whether the file has the boot protocol's magic number."""
    return data[_AT_MAGIC:_AT_MAGIC + 4] == MAGIC


def parse(name: str, data: bytes, protocol: str = "auto") -> GuestImage:
    """``data`` as a guest image. Raises :class:`GuestImageError` that names the image and what is wrong.

    :param protocol: "linux32", "linux64", "pvh", or "auto": the 64-bit entry where there is one.
    """
    if len(data) < 0x268:
        raise GuestImageError(f"guest image {name!r} is truncated: its header needs {0x268} bytes, the file has {len(data)}")
    version, = struct.unpack_from("<H", data, 0x206)
    if version < _OLDEST or not data[0x211] & _LOADED_HIGH:
        raise GuestImageError(f"guest image {name!r} speaks version {version >> 8}.{version & 0xFF:02} of the Linux boot protocol; "
                              "2.10 or newer is needed")
    paragraphs, = struct.unpack_from("<I", data, 0x1F4)     # size of the protected-mode part, in 16 bytes
    begin = ((data[_SETUP_SECTS] or 4) + 1) * _SECTOR
    if begin + 16 * paragraphs - 16 > len(data):
        raise GuestImageError(f"guest image {name!r} is truncated: it needs {begin + 16 * paragraphs} bytes, the file has {len(data)}")
    if protocol == "pvh":
        return elf.parse(name, _payload(name, data, begin), "pvh")
    has_64 = bool(version >= 0x20C and data[0x236] & _KERNEL_64)
    if protocol == "linux64" and not has_64:
        raise GuestImageError(f"guest image {name!r} has no 64-bit entry; try protocol=linux32")
    header_end = 0x202 + data[0x201]
    relocatable = bool(data[0x234])
    preferred, init_size = struct.unpack_from("<QI", data, 0x258)
    at = preferred if relocatable else struct.unpack_from("<I", data, 0x214)[0] or _LOW_KERNEL
    kernel = data[begin:]
    segment = Segment(at, kernel, max(len(kernel), init_size))
    return GuestImage(name, (segment,), at, None, MappingProxyType({}), hashlib.sha256(data).hexdigest(),
                      "linux64" if protocol == "linux64" or (protocol == "auto" and has_64) else "linux32", setup=data[_HEADER:header_end])


def _payload(name: str, data: bytes, begin: int) -> bytes:
    """The kernel inside, unpacked."""
    offset, length = struct.unpack_from("<II", data, 0x248)
    packed = data[begin + offset:begin + offset + length]
    unpack = {b"\x1f\x8b": lambda raw: zlib.decompressobj(31).decompress(raw), b"BZ": lambda raw: bz2.BZ2Decompressor().decompress(raw),
              b"\xfd7": lambda raw: lzma.LZMADecompressor().decompress(raw), b"\x02!": unpack_legacy, b"\x7fE": bytes}.get(packed[:2])
    if unpack is None:
        raise GuestImageError(f"guest image {name!r} holds a kernel in a compression that is not known here ({packed[:4].hex()}); "
                              "try protocol=linux64")
    try:
        return unpack(packed)
    except (zlib.error, OSError, EOFError, lzma.LZMAError, ValueError) as error:
        raise GuestImageError(f"guest image {name!r}: the kernel inside cannot be unpacked: {error}") from error
