"""The guest's memory as its hypervisor reaches it: by the guest's own linear addresses, below the hole."""

from __future__ import annotations

import struct

from vmlab.machine.cpu import Cpu
from vmlab.machine.paging import PageFault
from vmlab.vmm.xen.abi import Abi


class GuestMemory:
    """Every pointer in a hypercall goes through here; one into the hypervisor's hole is a page fault like any other."""

    def __init__(self, cpu: Cpu, abi: Abi) -> None:
        self._cpu, self._abi = cpu, abi

    def read(self, address: int, size: int) -> bytes:
        """``size`` bytes at a linear address. Raises :class:`PageFault`."""
        self._check(address, size, 1)
        return self._cpu.read_linear(address, size)

    def write(self, address: int, data: bytes) -> None:
        """Store at a linear address that the guest's kernel could write. Raises :class:`PageFault`."""
        self._check(address, len(data), 3)
        self._cpu.write_linear(address, data)

    def read32(self, address: int) -> int:
        """One word. Raises :class:`PageFault`."""
        return int(struct.unpack("<I", self.read(address, 4))[0])

    def read_word(self, address: int) -> int:
        """One C long. Raises :class:`PageFault`."""
        return int.from_bytes(self.read(address, self._abi.word), "little")

    def _check(self, address: int, size: int, error_code: int) -> None:
        if self._abi.reaches_hole(address, size):
            raise PageFault(address, error_code)
