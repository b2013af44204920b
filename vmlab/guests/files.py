"""Guests from files: which kind of image a file is, and what goes with it (initrd, disks, RAM).

A path may begin with an environment variable (``$VMLAB_GUEST_XV6/kernelmemfs``), so that a configuration, and the name of a cell,
is the same on every host.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from vmlab.errors import ConfigError, GuestImageError
from vmlab.guests import bzimage, elf
from vmlab.guests.boot import sector
from vmlab.guests.image import PROTOCOLS, GuestImage, Segment
from vmlab.parameters import Parameter, Text

SECTOR = 512
#: Linux kernels for other machines, by the magic number at offset 56 (Linux, Documentation/arch/arm64/booting.rst, riscv/boot-image-header.rst).
_AT_OTHER, _OTHERS = 56, {b"ARM\x64": "arm64", b"RSC\x05": "RISC-V"}
#: What a cell may say of a guest from a file, beside the technique's parameters. One that says nothing gets the default.
PARAMETERS: Mapping[str, Parameter] = MappingProxyType({
    "append": Text("the kernel's command line", ""),
    "initrd": Text("file of an initial RAM disk, or of a Multiboot module", ""),
    "drives": Text("files of IDE disks, separated by commas; behind the image where that is a disk itself", ""),
    "protocol": Parameter("how the image is started; auto: as its file says", "auto", ("auto", *PROTOCOLS)),
    "timer": Parameter("timer and interrupt controllers at the kernel's start: as after reset, or as a BIOS leaves them, ticking 18.2 times a second",
                       "reset", ("reset", "bios")),
    "script": Text("a dialogue on the serial port: expect TEXT send TEXT …, words quoted as in a shell; the run ends behind the last", ""),
})


def read(path: str, what: str = "guest image") -> bytes:
    """The file's bytes. Raises :class:`GuestImageError` that names it, or the environment variable that is missing."""
    found = os.path.expandvars(path)
    if found.startswith("$"):
        variable = found[1:].split("/")[0].strip("{}")
        raise GuestImageError(f"{what} {path!r}: set {variable} to the folder that it is in")
    try:
        return Path(found).read_bytes()
    except FileNotFoundError:
        raise GuestImageError(f"no {what} at {path!r}") from None
    except OSError as error:
        raise GuestImageError(f"{what} {path!r} cannot be read: {error.strerror or error}") from error


def parse(name: str, data: bytes, protocol: str = "auto") -> GuestImage:
    """``data`` as a guest image by its magic numbers. Raises :class:`GuestImageError` that says what is wrong, or what would do."""
    fits: tuple[str, ...]
    kinds = {"multiboot": "an ELF", "pvh": "an ELF or bzImage", "linux32": "a bzImage", "linux64": "a bzImage", "sector": "a boot disk"}
    if data[:4] == b"\x7fELF":
        kind, fits = "an ELF", ("multiboot", "pvh")
    elif bzimage.is_bzimage(data):
        kind, fits = "a bzImage", ("linux32", "linux64", "pvh")
    elif len(data) >= SECTOR and data[SECTOR - 2:SECTOR] == b"\x55\xaa":
        kind, fits = "a boot disk", ("sector",)
    elif data[_AT_OTHER:_AT_OTHER + 4] in _OTHERS:
        raise GuestImageError(f"guest image {name!r} is a Linux kernel for {_OTHERS[data[_AT_OTHER:_AT_OTHER + 4]]}; one for x86 is needed (bzImage)")
    else:
        raise GuestImageError(f"guest image {name!r} is not an ELF file, no bzImage ('HdrS' at 0x202) and no boot disk (0x55AA at 510)")
    if protocol != "auto" and protocol not in fits:
        raise GuestImageError(f"guest image {name!r} is {kind}; protocol {protocol!r} needs {kinds[protocol]}")
    if kind == "an ELF":
        return elf.parse(name, data, protocol)
    if kind == "a bzImage":
        return bzimage.parse(name, data, protocol)
    return _boot_disk(name, data)


def _boot_disk(name: str, data: bytes) -> GuestImage:
    return GuestImage(name, (Segment(sector.AT, data[:SECTOR], SECTOR),), sector.AT, None, MappingProxyType({}), hashlib.sha256(data).hexdigest(),
                      "sector", drives=(whole_sectors(name, data),))


def whole_sectors(name: str, data: bytes) -> bytes:
    """A disk's content, its last sector filled up. Raises :class:`GuestImageError` for an empty one."""
    if not data:
        raise GuestImageError(f"disk image {name!r} is empty")
    return data + bytes(-len(data) % SECTOR)


def equip(image: GuestImage, values: Mapping[str, object]) -> GuestImage:
    """``image`` with the initrd and the disks that ``values`` name. Raises :class:`GuestImageError` for files that are missing."""
    initrd, disks = str(values.get("initrd", "")), str(values.get("drives", ""))
    modules, drives = image.modules, image.drives
    if initrd:
        if image.protocol == "sector":
            raise ConfigError(f"initrd: {image.name!r} is a boot disk, which loads what it needs by itself")
        modules = (*modules, read(initrd, "initrd"))
    for path in filter(None, disks.split(",")):
        drives = (*drives, whole_sectors(path, read(path, "disk image")))
    if len(drives) > 2:
        raise ConfigError(f"drives: the machine has room for two IDE disks, not {len(drives)}")
    timer = str(values.get("timer", image.timer))
    changed = modules or drives or timer != image.timer
    return dataclasses.replace(image, modules=modules, drives=drives, timer=timer) if changed else image
