"""Physical memory: RAM from address 0, and the open bus above it.

RAM is an anonymous mapping shared with the engine, so that Python reads it with no call at all.
Nothing answers above it: reads give all ones and writes vanish, as on a PC's bus.
"""

from __future__ import annotations

import ctypes
import mmap
import struct

from unicorn import unicorn_const as uc_const

from vmlab.machine.engine import Engine

PAGE = 0x1000
FOUR_GIB = 1 << 32


class Ram:
    """``size`` bytes of RAM at physical address 0. Addresses here are host-physical (hpa)."""

    def __init__(self, engine: Engine, size: int) -> None:
        self.size = size
        self._map = mmap.mmap(-1, size)
        self.bytes = memoryview(self._map)
        self._base = (ctypes.c_ubyte * size).from_buffer(self._map)
        engine.uc.mem_map_ptr(0, size, uc_const.UC_PROT_ALL, ctypes.addressof(self._base))
        engine.uc.mmio_map(size, FOUR_GIB - size, self._read_nothing, None, self._write_nothing, None)
        self.open_bus = 0

    def _read_nothing(self, _uc: object, _offset: int, size: int, _data: object) -> int:
        self.open_bus += 1
        return (1 << (8 * size)) - 1

    def _write_nothing(self, _uc: object, _offset: int, _size: int, _value: int, _data: object) -> None:
        self.open_bus += 1

    def read(self, address: int, size: int) -> bytes:
        """``size`` bytes; what lies beyond RAM reads as 0xFF."""
        data = bytes(self.bytes[address:address + size])
        return data if len(data) == size else data + b"\xff" * (size - len(data))

    def write(self, address: int, data: bytes) -> None:
        """Store ``data``; what lies beyond RAM is dropped."""
        end = min(address + len(data), self.size)
        if address < end:
            self.bytes[address:end] = data[:end - address]

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
