"""The block device as a shared ring: the guest writes requests into memory, one event says that there are some.

The page has the layout of xen/include/public/io/ring.h, requests and responses that of io/blkif.h at the guest's width. The
backend is the hypervisor itself and drives the physical disk. Everything on the ring is the guest's word and is
copied before it is checked. A segment names a frame by its machine frame number, where Xen takes a grant reference:
there is nobody but the hypervisor to grant it to, and the frame must be the guest's own.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from vmlab.ledger import Counts
from vmlab.machine.devices import disk as d
from vmlab.machine.memory import PAGE, Ram
from vmlab.vmm import xen
from vmlab.vmm.disk import DiskDriver, Request
from vmlab.vmm.xen.abi import Abi
from vmlab.vmm.xen.events import EventChannels
from vmlab.vmm.xen.frames import FrameTable, Kind, Refused
from vmlab.vmm.xen.memory import GuestMemory

RING_SIZE = 32                      # (4096 - 64) / 108, or / 112 in 64 bits, down to a power of two
_HEADER = 64
_REQ_PROD, _REQ_EVENT, _RSP_PROD, _RSP_EVENT = 0, 4, 8, 12
BLKIF_OP_READ, BLKIF_OP_WRITE, BLKIF_OP_FLUSH = 0, 1, 3
BLKIF_OKAY, BLKIF_ERROR, BLKIF_EOPNOTSUPP = 0, -1, -2
_MOST_SEGMENTS = 11
_COMMANDS = {BLKIF_OP_READ: d.READ, BLKIF_OP_WRITE: d.WRITE, BLKIF_OP_FLUSH: d.FLUSH}


@dataclass
class _Transfer:
    """One request of the ring on its way: a physical request for each segment."""

    identity: int
    operation: int
    pieces: list[tuple[int, int, int]]          # sector, count, hpa
    held: list[int]                             # frames that stay writable until it is done


class BlockRing:
    """The backend of the one block device. ``refuse`` records what the guest tried."""

    def __init__(self, ram: Ram, frames: FrameTable, memory: GuestMemory, events: EventChannels, driver: DiskDriver,
                 counts: Counts, refuse: Callable[[str], None], abi: Abi) -> None:
        self._entry, self._id_at = abi.ring_entry, abi.ring_id
        self._ram, self._frames, self._memory, self._events = ram, frames, memory, events
        self._driver, self._counts, self._refuse = driver, counts, refuse
        self._page = 0                          # hpa; 0: not connected
        self._port = 0
        self._consumed = self._produced = 0     # req_cons and rsp_prod_pvt of io/ring.h

    @property
    def frame(self) -> int | None:
        """The mfn of the connected ring."""
        return self._page >> 12 or None

    # ---- hypercall
    def ring_op(self, command: int, mfn: int, answer: int, *_: int) -> int:
        """The lab's own, in place of xenbus: connect the ring in this frame; answers (port, sectors).

        The page stays writable memory, which no page table can be, for as long as it is a ring: for ever.
        """
        if command != xen.RINGOP_CONNECT:
            return xen.ENOSYS
        sectors = self._driver.sectors
        if sectors is None:
            return xen.ENODEV
        if self._page:
            return xen.EEXIST
        self._memory.write(answer, bytes(8))
        try:
            self._frames.get(mfn, Kind.WRITABLE)
        except Refused as refusal:
            self._refuse(f"the guest offered a ring: {refusal}")
            return xen.EINVAL
        port = self._events.connect(self._notified)
        if port is None:
            self._frames.put(mfn)
            return xen.ENOSPC
        self._page, self._port = mfn << 12, port
        self._memory.write(answer, struct.pack("<II", port, sectors))
        return 0

    # ---- requests
    def _notified(self) -> None:
        """The guest says that there are requests; take all that are there."""
        wanted = self._ram.read32(self._page + _REQ_PROD)
        if wanted - self._produced & 0xFFFFFFFF > RING_SIZE:
            self._refuse(f"the guest claims {wanted - self._produced & 0xFFFFFFFF} requests on a ring of {RING_SIZE}")
            return
        while self._consumed != wanted:
            at = self._page + _HEADER + self._entry * (self._consumed % RING_SIZE)
            self._consumed = self._consumed + 1 & 0xFFFFFFFF
            self._counts["ring.request"] += 1
            self._begin(self._ram.read(at, self._entry))
        self._ram.write32(self._page + _REQ_EVENT, self._consumed + 1)  # to be told of the next one (RING_FINAL_CHECK_FOR_REQUESTS)

    def _begin(self, raw: bytes) -> None:
        operation, segments, _handle = struct.unpack_from("<BBH", raw)
        identity, sector = struct.unpack_from("<QQ", raw, self._id_at)
        transfer = _Transfer(identity, operation, [], [])
        if operation not in _COMMANDS:
            self._respond(transfer, BLKIF_EOPNOTSUPP)
            return
        if operation == BLKIF_OP_FLUSH:
            transfer.pieces.append((0, 0, 0))
        elif not 1 <= segments <= _MOST_SEGMENTS:
            self._respond(transfer, BLKIF_ERROR)
            return
        else:
            try:
                self._map(transfer, raw, segments, sector)
            except Refused as refusal:
                self._refuse(f"the guest gave a block request: {refusal}")
                self._respond(transfer, BLKIF_ERROR)
                return
        self._submit(transfer)

    def _map(self, transfer: _Transfer, raw: bytes, segments: int, sector: int) -> None:
        """Check every segment. A frame that the disk will write must be writable memory, and stays so until then."""
        for number in range(segments):
            mfn, first, last = struct.unpack_from("<IBBxx", raw, self._id_at + 16 + 8 * number)
            if first > last or last >= PAGE // d.SECTOR:
                raise Refused(f"sectors {first} to {last} of a page")
            if not self._frames.owns(mfn):
                raise Refused(f"frame {mfn:#x} is not the guest's")
            if transfer.operation == BLKIF_OP_READ:
                self._frames.get(mfn, Kind.WRITABLE)
                transfer.held.append(mfn)
            transfer.pieces.append((sector, last - first + 1, (mfn << 12) + first * d.SECTOR))
            sector += last - first + 1
        if sector > (self._driver.sectors or 0):
            raise Refused(f"sector {sector - 1} of a disk of {self._driver.sectors}")

    def _submit(self, transfer: _Transfer) -> None:
        """All pieces at once: the physical disk takes them in order, and requests end in the order they came in."""
        left, failed = len(transfer.pieces), 0

        def done(error: int) -> None:
            nonlocal left, failed
            left, failed = left - 1, failed or error
            if not left:
                self._respond(transfer, BLKIF_ERROR if failed else BLKIF_OKAY)

        for sector, count, address in transfer.pieces:
            self._driver.submit(Request(_COMMANDS[transfer.operation], sector, count, address, done))

    def _respond(self, transfer: _Transfer, status: int) -> None:
        """Put the response on the ring, and raise the event if the guest wants to hear of this one (ring.h: rsp_event)."""
        for mfn in transfer.held:
            self._frames.put(mfn)
        at = self._page + _HEADER + self._entry * (self._produced % RING_SIZE)
        self._ram.write(at, struct.pack("<QBxh", transfer.identity, transfer.operation, status))
        old, self._produced = self._produced, self._produced + 1 & 0xFFFFFFFF
        self._ram.write32(self._page + _RSP_PROD, self._produced)
        wanted = self._ram.read32(self._page + _RSP_EVENT)
        if (self._produced - wanted & 0xFFFFFFFF) < (self._produced - old & 0xFFFFFFFF):
            self._events.notify_guest(self._port)
