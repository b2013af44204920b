"""Physical memory: RAM from address 0, devices above it, and the open bus everywhere else.

RAM is an anonymous mapping shared with the engine, so that Python reads it with no call at all.
Where nothing answers reads give all ones and writes vanish, as on a PC's bus.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Callable, Iterator
from typing import Protocol

from unicorn import unicorn_const as uc_const

from vmlab.machine.engine import Engine

PAGE = 0x1000
FOUR_GIB = 1 << 32
_ZEROS = bytes(PAGE)
_PRESENT_OR_SWAPPED = 3 << 62
_PRIVATE: dict[str, int] = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


def _touched(address: int, size: int) -> memoryview | None:
    """For each page of this process's memory an entry that says whether it is there; what is not was never touched, hence zero, and
    reading it would cost a page fault.

    Linux tells (Documentation/admin-guide/mm/pagemap.rst); None where the host does not.
    """
    if mmap.PAGESIZE != PAGE:
        return None
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pages:
            pages.seek(8 * (address // PAGE))
            entries = pages.read(8 * (size // PAGE))
    except OSError:
        return None
    return memoryview(entries).cast("Q") if len(entries) == 8 * (size // PAGE) else None


class MemoryDevice(Protocol):
    """A device in physical memory. ``offset`` counts from the first address it was attached at."""

    def read(self, offset: int, size: int) -> int: ...

    def write(self, offset: int, size: int, value: int) -> None: ...


class Ram:
    """``size`` bytes of RAM at physical address 0. Addresses here are host-physical (hpa).

    :meth:`read` and its kind are the machine's own and a VMM's way to memory: devices do not answer there.
    """

    def __init__(self, engine: Engine, size: int) -> None:
        self.size = size
        # Private where there is a choice: a fork of this process has memory of its own (experiment/boots.py).
        self._map = mmap.mmap(-1, size, **_PRIVATE)
        self.bytes = memoryview(self._map)
        #: The same as 64-bit words of the host's, for who only compares.
        self.words = self.bytes.cast("Q")
        self._base = (ctypes.c_ubyte * size).from_buffer(self._map)
        #: Where RAM lies in this process: another engine may map the same memory.
        self.address = ctypes.addressof(self._base)
        engine.uc.mem_map_ptr(0, size, uc_const.UC_PROT_ALL, self.address)
        self._engine, self._end = engine, size
        self.open_bus = 0

    def attach(self, device: MemoryDevice, first: int, size: int, fail: Callable[[BaseException], None]) -> None:
        """Let ``device`` answer at ``size`` bytes from ``first``, in rising order of addresses; ``fail`` gets what it raises."""
        self._leave_open(first)

        def read(_uc: int, offset: int, size: int, _data: int) -> int:
            try:
                return device.read(offset, size)
            except BaseException as failure:  # noqa: BLE001 - nothing may cross Unicorn's frames
                fail(failure)
                return 0

        def write(_uc: int, offset: int, size: int, value: int, _data: int) -> None:
            try:
                device.write(offset, size, value)
            except BaseException as failure:  # noqa: BLE001
                fail(failure)

        self._engine.map_device(first, size, read, write)
        self._end = first + size

    def seal(self) -> None:
        """Nothing more will be attached: the rest of the first 4 GiB is open bus."""
        self._leave_open(FOUR_GIB)

    def _leave_open(self, end: int) -> None:
        def read(_uc: int, _offset: int, size: int, _data: int) -> int:
            self.open_bus += 1
            return (1 << (8 * size)) - 1

        def write(_uc: int, _offset: int, _size: int, _value: int, _data: int) -> None:
            self.open_bus += 1

        if self._end < end:
            self._engine.map_device(self._end, end - self._end, read, write)
            self._end = end

    def read(self, address: int, size: int) -> bytes:
        """``size`` bytes; what lies beyond RAM reads as 0xFF."""
        data = bytes(self.bytes[address:address + size])
        return data if len(data) == size else data + b"\xff" * (size - len(data))

    def write(self, address: int, data: bytes) -> None:
        """Store ``data``; what lies beyond RAM is dropped."""
        end = min(address + len(data), self.size)
        if address < end:
            self.bytes[address:end] = data[:end - address]

    def pages_in_use(self, first: int, size: int) -> Iterator[tuple[int, bytes]]:
        """Offset from ``first`` and content of each page that is not all zero, in order; ``first`` and ``size`` in whole pages."""
        touched = _touched(self.address + first, size)
        for at in range(0, size, PAGE):
            if touched is None or touched[at // PAGE] & _PRESENT_OR_SWAPPED:
                page = bytes(self.bytes[first + at:first + at + PAGE])
                if page != _ZEROS:
                    yield at, page

    def read32(self, address: int) -> int:
        if address + 4 > self.size:
            return 0xFFFFFFFF
        return int(struct.unpack_from("<I", self.bytes, address)[0])

    def write32(self, address: int, value: int) -> None:
        if address + 4 <= self.size:
            struct.pack_into("<I", self.bytes, address, value & 0xFFFFFFFF)

    def read64(self, address: int) -> int:
        if address + 8 > self.size:
            return 0xFFFFFFFFFFFFFFFF
        return int(struct.unpack_from("<Q", self.bytes, address)[0])

    def write64(self, address: int, value: int) -> None:
        if address + 8 <= self.size:
            struct.pack_into("<Q", self.bytes, address, value & 0xFFFFFFFFFFFFFFFF)
