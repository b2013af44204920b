"""An IDE channel with up to two disks, by programmed input and output: ATA/ATAPI-5 (ANSI NCITS 340-2000; sections below).

Commands: read and write sectors one by one or several a block, IDENTIFY DEVICE, and those that only have to succeed. No DMA.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from vmlab.machine.devices.disk import REQUEST_NS, SECTOR, SECTOR_NS
from vmlab.machine.timeline import Handle, Timeline

COMMAND_PORT, COMMAND_COUNT, CONTROL_PORT = 0x1F0, 8, 0x3F6
# Command block registers (§7): offset from the first port.
_DATA, _ERROR, _COUNT, _NUMBER, _LOW, _HIGH, _DEVICE, _STATUS = range(8)
_ERR, _DRQ, _DSC, _DRDY, _BSY = 0x01, 0x08, 0x10, 0x40, 0x80            # status (§7.15)
_ABORTED, _ID_NOT_FOUND = 0x04, 0x10                                     # error (§7.10)
_SLAVE, _LBA = 0x10, 0x40                                                # device/head
_NO_INTERRUPT, _RESET = 0x02, 0x04                                       # device control (§7.9)
_READ, _WRITE, _READ_MULTIPLE, _WRITE_MULTIPLE, _IDENTIFY = (0x20, 0x21), (0x30, 0x31), 0xC4, 0xC5, 0xEC
_SET_MULTIPLE, _DIAGNOSTIC = 0xC6, 0x90
#: Commands that have nothing to do here: recalibrate, verify, seek, initialize parameters, standby and idle, flush, set features.
_SUCCEED = frozenset({0x10, 0x40, 0x41, 0x70, 0x91, 0x94, 0x95, 0x96, 0x97, 0xE0, 0xE1, 0xE2, 0xE3, 0xE5, 0xE6, 0xE7, 0xEF})
_HEADS, _SECTORS, _LARGEST_BLOCK = 16, 63, 16


class Drive:
    """One disk: its content, in whole sectors of 512 bytes."""

    def __init__(self, content: bytes) -> None:
        self._content = bytearray(content)
        self.block = 0                      # sectors a block of READ and WRITE MULTIPLE; 0: not allowed

    @property
    def content(self) -> bytes:
        """All sectors."""
        return bytes(self._content)

    @property
    def sectors(self) -> int:
        return len(self._content) // SECTOR

    def read(self, sector: int, count: int) -> bytes:
        return bytes(self._content[sector * SECTOR:(sector + count) * SECTOR])

    def write(self, sector: int, data: bytes) -> None:
        self._content[sector * SECTOR:sector * SECTOR + len(data)] = data

    def identity(self) -> bytes:
        """§8.12, table 10: geometry, names, LBA, PIO mode 4."""
        cylinders = min(self.sectors // (_HEADS * _SECTORS), 16383)
        words = [0] * 256
        words[0], words[1], words[3], words[6] = 0x0040, cylinders, _HEADS, _SECTORS
        for at, size, text in ((10, 10, "0"), (23, 4, "1.0"), (27, 20, "vmlab disk")):
            padded = text.ljust(2 * size)
            words[at:at + size] = [ord(padded[2 * i]) << 8 | ord(padded[2 * i + 1]) for i in range(size)]
        words[47], words[49], words[53] = 0x8000 | _LARGEST_BLOCK, 0x0200, 3
        words[54], words[55], words[56] = cylinders, _HEADS, _SECTORS
        words[57], words[58] = struct.unpack("<HH", struct.pack("<I", cylinders * _HEADS * _SECTORS))
        words[59] = 0x100 | self.block if self.block else 0
        words[60], words[61] = struct.unpack("<HH", struct.pack("<I", min(self.sectors, (1 << 28) - 1)))
        words[64], words[67], words[68], words[80] = 3, 120, 120, 0x20
        return struct.pack("<256H", *words)


class Ide:
    """The channel at 0x1F0 and 0x3F6; ``line`` is IRQ 14. Without a disk the channel is empty and reads all ones."""

    def __init__(self, timeline: Timeline, line: Callable[[bool], None], images: tuple[bytes, ...]) -> None:
        self._timeline, self._line = timeline, line
        self.drives = [Drive(image) for image in images]
        self._handle: Handle | None = None
        self.due: int | None = None
        self.control = 0
        self._reset()

    def _reset(self) -> None:
        """After power-on and a software reset: the signature of a device without packets (§9.1)."""
        self._timeline.cancel(self._handle)
        self._handle = self.due = None
        self.error = self.count = self.number = 1
        self.low = self.high = self.device = self.features = 0
        self.status = _DRDY | _DSC
        self.buffer, self.position = bytearray(), 0
        self.command, self.left = 0, 0
        self.interrupt = False

    @property
    def _drive(self) -> Drive | None:
        number = 1 if self.device & _SLAVE else 0
        return self.drives[number] if number < len(self.drives) else None

    # ---- the command block
    def read(self, offset: int, size: int) -> int:
        if not self.drives:
            return (1 << 8 * size) - 1
        if offset == _DATA:
            return self._take(size)
        if offset == _STATUS:
            if self.interrupt:          # else a driver that polls would pull at the line for nothing
                self.interrupt = False
                self._line(False)
            return self._visible_status()
        return {_ERROR: self.error, _COUNT: self.count, _NUMBER: self.number, _LOW: self.low, _HIGH: self.high,
                _DEVICE: self.device | 0xA0}[offset]

    def _visible_status(self) -> int:
        return self.status if self._drive is not None else 0   # an absent device's registers are answered with zero (§9.16.1)

    def write(self, offset: int, size: int, value: int) -> None:
        if not self.drives:
            return
        if offset == _DATA:
            self._give(value, size)
            return
        value &= 0xFF
        if offset == _STATUS:
            if not self.status & _BSY:
                self._begin(value)
        elif not self.status & (_BSY | _DRQ):
            name = {_ERROR: "features", _COUNT: "count", _NUMBER: "number", _LOW: "low", _HIGH: "high", _DEVICE: "device"}[offset]
            setattr(self, name, value)

    def read_control(self) -> int:
        """Alternate status: as the status, without taking the interrupt back."""
        return self._visible_status() if self.drives else 0xFF

    def write_control(self, value: int) -> None:
        """Device control: interrupts off, software reset."""
        if value & _RESET and not self.control & _RESET:
            self._reset()
        self.control = value & 0xFF
        self._raise()

    # ---- commands
    @property
    def _address(self) -> int:
        """The first sector: a linear address of 28 bits, or cylinder, head and sector (§7.3)."""
        if self.device & _LBA:
            return (self.device & 0xF) << 24 | self.high << 16 | self.low << 8 | self.number
        return ((self.high << 8 | self.low) * _HEADS + (self.device & 0xF)) * _SECTORS + self.number - 1

    def _advance(self, sectors: int) -> None:
        """The registers follow what was transferred."""
        address = self._address + sectors
        if self.device & _LBA:
            self.number, self.low, self.high = address & 0xFF, address >> 8 & 0xFF, address >> 16 & 0xFF
            self.device = self.device & 0xF0 | address >> 24 & 0xF
        else:
            track, number = divmod(address, _SECTORS)
            cylinder, head = divmod(track, _HEADS)
            self.number, self.low, self.high = number + 1, cylinder & 0xFF, cylinder >> 8 & 0xFF
            self.device = self.device & 0xF0 | head
        self.count = (self.count - sectors) & 0xFF
        self.left -= sectors

    def _begin(self, command: int) -> None:
        drive = self._drive
        self.interrupt = False
        self._line(False)
        if drive is None:
            return
        self.command, self.error, self.status = command, 0, _DRDY | _DSC
        multiple = command in (_READ_MULTIPLE, _WRITE_MULTIPLE)
        if command == _DIAGNOSTIC:
            self._reset()
            self._finish()
        elif command == _IDENTIFY:
            self.left = 0
            self._later(1)
        elif command == _SET_MULTIPLE:
            if self.count > _LARGEST_BLOCK or self.count & (self.count - 1):
                self._fail(_ABORTED)
            else:
                drive.block = self.count
                self._finish()
        elif command in (*_READ, *_WRITE) or (multiple and drive.block):
            self.left = self.count or 256
            if self._address < 0 or self._address + self.left > drive.sectors:
                self._fail(_ID_NOT_FOUND)
            elif command in (*_WRITE, _WRITE_MULTIPLE):
                self._expect()              # the first block is asked for without an interrupt (§9.7)
            else:
                self._later(self._block(drive))
        elif command in _SUCCEED:
            self._finish()
        else:
            self._fail(_ABORTED)

    def _block(self, drive: Drive) -> int:
        """Sectors of the next block."""
        return min(self.left, drive.block if self.command in (_READ_MULTIPLE, _WRITE_MULTIPLE) else 1)

    def _later(self, sectors: int) -> None:
        """The medium is busy with so many sectors."""
        self.status = _DRDY | _BSY
        first = self.command == _IDENTIFY or self.left == (self.count or 256)
        self.due = self._timeline.now + (REQUEST_NS if first else 0) + SECTOR_NS * sectors
        self._handle = self._timeline.at(self.due, self._done)

    def _done(self) -> None:
        """A block was read from the medium, or written to it."""
        self._handle = self.due = None
        drive = self._drive
        assert drive is not None
        if self.command in (*_WRITE, _WRITE_MULTIPLE):
            drive.write(self._address, bytes(self.buffer))
            self._advance(len(self.buffer) // SECTOR)
            self.buffer = bytearray()
            if self.left:
                self._expect()
                self._interrupt()
            else:
                self._finish()
            return
        if self.command == _IDENTIFY:
            self.buffer = bytearray(drive.identity())
        else:
            self.buffer = bytearray(drive.read(self._address, self._block(drive)))
        self.position = 0
        self.status = _DRDY | _DSC | _DRQ
        self._interrupt()

    def _expect(self) -> None:
        """The next block of a write is to come through the data register."""
        drive = self._drive
        assert drive is not None
        self.buffer, self.position = bytearray(self._block(drive) * SECTOR), 0
        self.status = _DRDY | _DSC | _DRQ

    def _take(self, size: int) -> int:
        if not self.status & _DRQ or self.command in (*_WRITE, _WRITE_MULTIPLE):
            return 0
        value = int.from_bytes(self.buffer[self.position:self.position + size], "little")
        self.position += size
        if self.position >= len(self.buffer):
            self.status &= ~_DRQ
            if self.command != _IDENTIFY:
                self._advance(len(self.buffer) // SECTOR)
            drive = self._drive
            if self.left and drive is not None:
                self._later(self._block(drive))
        return value

    def _give(self, value: int, size: int) -> None:
        if not self.status & _DRQ or self.command not in (*_WRITE, _WRITE_MULTIPLE):
            return
        end = min(self.position + size, len(self.buffer))
        self.buffer[self.position:end] = value.to_bytes(8, "little")[:end - self.position]
        self.position = end
        if end == len(self.buffer):
            self._later(end // SECTOR)

    def _finish(self) -> None:
        self.status = _DRDY | _DSC
        self._interrupt()

    def _fail(self, error: int) -> None:
        self.error, self.left = error, 0
        self.status = _DRDY | _DSC | _ERR
        self._interrupt()

    def _interrupt(self) -> None:
        self.interrupt = True
        self._raise()

    def _raise(self) -> None:
        self._line(self.interrupt and not self.control & _NO_INTERRUPT)

    # ---- state
    _FIELDS = ("due", "control", "error", "count", "number", "low", "high", "device", "features", "status", "position", "command", "left",
               "interrupt")

    def state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._FIELDS} | {
            "buffer": bytes(self.buffer), "drives": [(drive.content, drive.block) for drive in self.drives]}

    def from_state(self, state: dict[str, Any]) -> None:
        self._timeline.cancel(self._handle)
        for name in self._FIELDS:
            setattr(self, name, state[name])
        self.buffer = bytearray(state["buffer"])
        self.drives = [Drive(content) for content, _ in state["drives"]]
        for drive, (_, block) in zip(self.drives, state["drives"], strict=True):
            drive.block = block
        self._handle = None if self.due is None else self._timeline.at(self.due, self._done)


class IdeControl:
    """The control block of an :class:`Ide` channel, one port. Its state is the channel's."""

    def __init__(self, channel: Ide) -> None:
        self._channel = channel

    def read(self, offset: int, size: int) -> int:
        return self._channel.read_control()

    def write(self, offset: int, size: int, value: int) -> None:
        self._channel.write_control(value)

    def state(self) -> dict[str, Any]:
        return {}

    def from_state(self, state: dict[str, Any]) -> None:
        """Nothing is kept here."""
