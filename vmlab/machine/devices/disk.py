"""The block device: one DMA request at a time, completed by an interrupt. Register map: docs/machine.md.

The guest chooses every register's value, so each is checked when the command is given; memory moves at
completion, through whatever :class:`Memory` the device was wired to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from vmlab.machine.timeline import Handle, Timeline

FIRST_PORT, PORT_COUNT = 0xC00, 0x20
IDENTITY = int.from_bytes(b"VBLK", "little")
SECTOR = 512
MOST_SECTORS = 128
READ, WRITE, FLUSH = 1, 2, 3
#: Virtual nanoseconds a request takes, and each of its sectors: a fast disk of the period with a cache that hits.
REQUEST_NS, SECTOR_NS = 50_000, 2_000
# Offsets of the registers.
AT_ID, AT_CAPACITY, AT_SECTOR, AT_COUNT, AT_ADDRESS, AT_ADDRESS_HIGH, AT_COMMAND, AT_ACKNOWLEDGE = range(0, 0x20, 4)
# STATUS, read where COMMAND is written.
BUSY, DONE, ERROR, OVERRUN = 1, 2, 4, 8
ERROR_SHIFT = 8
BAD_SECTOR, BAD_ADDRESS, BAD_COMMAND, BAD_COUNT = 1, 2, 3, 4


class Memory(Protocol):
    """What the device moves data to and from, by the addresses that its driver gives it."""

    def contains(self, address: int, size: int) -> bool:
        """Whether there is memory at all of these addresses."""

    def read(self, address: int, size: int) -> bytes:
        """Bytes of memory."""

    def write(self, address: int, data: bytes) -> None:
        """Store into memory."""


class Registers:
    """The registers as a driver sees them, without what a command does: physical disk and a VMM's share them."""

    def __init__(self, line: Callable[[bool], None], sectors: int) -> None:
        self._line = line
        self.sectors = sectors
        self.sector = self.count = self.address = 0
        self.status = 0

    def read(self, offset: int, size: int) -> int:
        if size != 4:
            return 0xFFFFFFFF
        return {AT_ID: IDENTITY, AT_CAPACITY: self.sectors, AT_SECTOR: self.sector, AT_COUNT: self.count,
                AT_ADDRESS: self.address & 0xFFFFFFFF, AT_ADDRESS_HIGH: self.address >> 32, AT_COMMAND: self.status,
                AT_ACKNOWLEDGE: 0}.get(offset, 0xFFFFFFFF)

    def write(self, offset: int, size: int, value: int) -> None:
        if size != 4:
            return
        if offset == AT_SECTOR:
            self.sector = value
        elif offset == AT_COUNT:
            self.count = value
        elif offset == AT_ADDRESS:
            self.address = self.address & ~0xFFFFFFFF | value
        elif offset == AT_ADDRESS_HIGH:
            self.address = self.address & 0xFFFFFFFF | value << 32
        elif offset == AT_COMMAND:
            if self.status & (BUSY | DONE):
                self.status |= OVERRUN
            else:
                self.status = BUSY
                self.command(value)
        elif offset == AT_ACKNOWLEDGE:
            self.status &= BUSY
            self._line(False)

    def command(self, command: int) -> None:
        """Begin a request with the registers as they stand; BUSY is set."""
        raise NotImplementedError

    def refusal(self, command: int, memory: Memory) -> int:
        """The error number of a request that cannot be carried out, 0 where it can."""
        if command not in (READ, WRITE, FLUSH):
            return BAD_COMMAND
        if command == FLUSH:
            return 0
        if not 1 <= self.count <= MOST_SECTORS:
            return BAD_COUNT
        if self.sector + self.count > self.sectors:
            return BAD_SECTOR
        if self.address & 3 or not memory.contains(self.address, self.count * SECTOR):
            return BAD_ADDRESS
        return 0

    def complete(self, error: int = 0) -> None:
        """The request has ended: DONE, and the interrupt."""
        self.status = self.status & OVERRUN | DONE | (ERROR | error << ERROR_SHIFT if error else 0)
        self._line(True)

    _FIELDS: tuple[str, ...] = ("sectors", "sector", "count", "address", "status")

    def state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._FIELDS}

    def from_state(self, state: dict[str, Any]) -> None:
        for name in self._FIELDS:
            setattr(self, name, state[name])


class Disk(Registers):
    """The physical disk. ``image`` is cut to whole sectors; :attr:`content` is what it holds now."""

    def __init__(self, timeline: Timeline, line: Callable[[bool], None], memory: Memory, image: bytes) -> None:
        super().__init__(line, len(image) // SECTOR)
        self._timeline, self._memory = timeline, memory
        self._content = bytearray(image[:self.sectors * SECTOR])
        self._request: tuple[int, int, int, int, int] | None = None  # command, error, sector, count, address
        self._due = 0
        self._handle: Handle | None = None

    @property
    def content(self) -> bytes:
        """All sectors."""
        return bytes(self._content)

    def command(self, command: int) -> None:
        error = self.refusal(command, self._memory)
        sectors = 0 if error or command == FLUSH else self.count
        self._request = (command, error, self.sector, self.count, self.address)
        self._due = self._timeline.now + REQUEST_NS + SECTOR_NS * sectors
        self._handle = self._timeline.at(self._due, self._finish)

    def _finish(self) -> None:
        assert self._request is not None
        command, error, sector, count, address = self._request
        self._request = None
        at, size = sector * SECTOR, count * SECTOR
        if not error and command == READ:
            self._memory.write(address, bytes(self._content[at:at + size]))
        elif not error and command == WRITE:
            self._content[at:at + size] = self._memory.read(address, size)
        self.complete(error)

    def state(self) -> dict[str, Any]:
        return super().state() | {"request": self._request, "due": self._due, "content": self.content}

    def from_state(self, state: dict[str, Any]) -> None:
        super().from_state(state)
        self._content = bytearray(state["content"])
        self._request, self._due = state["request"], state["due"]
        self._timeline.cancel(self._handle)
        self._handle = None if self._request is None else self._timeline.at(self._due, self._finish)
