"""The hypercalls by which a guest changes its page tables (xen/include/public/xen.h, "MMU-UPDATE REQUESTS").

The guest's tables are the machine's, and read-only to the guest: every change is asked for here and checked by the
frame table. One call carries up to :data:`MAX_BATCH` changes, so that a guest which waits with them pays for one
transition, not for many.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from vmlab.ledger import Counts
from vmlab.machine.cpu import Cpu
from vmlab.machine.paging import PageFault
from vmlab.vmm import xen
from vmlab.vmm.xen.abi import Abi
from vmlab.vmm.xen.domain import Domain
from vmlab.vmm.xen.frames import Kind, Refused
from vmlab.vmm.xen.memory import GuestMemory
from vmlab.vmm.xen.tables import FRAME

#: Xen goes on with a longer list after a look at other domains; here there are none, and one list has an end.
MAX_BATCH = 2048


class Mmu:
    """The physical CPU's page tables on behalf of one guest. ``direct``: the guest may do more than change an L1 entry."""

    def __init__(self, cpu: Cpu, domain: Domain, memory: GuestMemory, counts: Counts, refused: list[str], *, direct: bool) -> None:
        self._abi: Abi = domain.abi
        self._cpu, self._domain, self._memory, self._counts, self._refused = cpu, domain, memory, counts, refused
        self._frames = domain.frames
        self._direct = direct

    # ---- hypercalls
    def mmu_update(self, requests: int, count: int, done: int, domain: int, *_: int) -> int:
        """struct mmu_update: the machine address of an entry with the command in its low bits, and its new content."""
        if not self._direct:
            return xen.ENOSYS
        return self._batch(requests, count, done, domain, 16, self._one_update)

    def mmuext_op(self, operations: int, count: int, done: int, domain: int, *_: int) -> int:
        """struct mmuext_op: pins, the page-table base, and the TLB."""
        if not self._direct:
            return xen.ENOSYS
        return self._batch(operations, count, done, domain, self._abi.extended.size, self._one_extended)

    def update_va_mapping(self, address: int, *rest: int) -> int:
        """One L1 entry of the present address space, named by the linear address that it maps."""
        self._counts["mmu.update"] += 1
        entry, flags = (rest[0] | rest[1] << 32, rest[2]) if self._abi.bits == 32 else rest[:2]
        try:
            at = self._l1_entry(address)
            self._frames.update(at, entry)
        except Refused as refusal:
            return self._refuse(f"to map {entry:#x} at {address:#x}: {refusal}")
        kind = flags & xen.UVMF_FLUSHTYPE_MASK
        if kind == xen.UVMF_TLB_FLUSH:
            self._flush_all()
        elif kind == xen.UVMF_INVLPG:
            self._flush_page()
        return 0

    def _batch(self, array: int, count: int, done: int, domain: int, size: int,
               one: Callable[[bytes], int]) -> int:
        """Carry out a list until its end or the first that fails; ``done`` is told how many were."""
        count = count & 0xFFFFFFFF & ~xen.MMU_UPDATE_PREEMPTED
        domain &= 0xFFFFFFFF
        if domain != xen.DOMID_SELF:
            return xen.ESRCH
        if count > MAX_BATCH:
            return xen.EINVAL
        result = finished = 0
        while finished < count and not result:
            try:
                result = one(self._memory.read(array + size * finished, size))
            except PageFault:
                result = xen.EFAULT
            finished += not result
        if done:
            self._memory.write(done, struct.pack("<I", finished))
        return result

    # ---- single requests
    def _one_update(self, raw: bytes) -> int:
        self._counts["mmu.update"] += 1
        pointer, value = struct.unpack("<QQ", raw)
        command, address = pointer & 3, pointer & ~3
        try:
            if command == xen.MMU_NORMAL_PT_UPDATE:
                self._frames.update(address, value)
            elif command == xen.MMU_PT_UPDATE_PRESERVE_AD:
                self._frames.update(address, value | self._accessed_and_dirty(address))
            elif command == xen.MMU_MACHPHYS_UPDATE:
                if not self._frames.owns(address >> 12):
                    raise Refused(f"frame {address >> 12:#x} is not the guest's")
                self._domain.set_m2p(address >> 12, value & 0xFFFFFFFF)
            else:
                return xen.ENOSYS
        except Refused as refusal:
            return self._refuse(f"to write {value:#x} at machine address {address:#x}: {refusal}")
        return 0

    def _accessed_and_dirty(self, address: int) -> int:
        if not self._frames.owns(address >> 12):
            raise Refused(f"frame {address >> 12:#x} is not the guest's")
        mask = 0x60 if self._frames.kind(address >> 12) is Kind.L1 else 0x20
        return self._domain.ram.read64(address & ~7) & mask

    def _one_extended(self, raw: bytes) -> int:
        command, argument, _ = self._abi.extended.unpack(raw)
        try:
            if command in xen.MMUEXT_PIN_LEVELS:
                self._counts["mmuext.pin"] += 1
                self._frames.pin(argument, xen.MMUEXT_PIN_LEVELS[command])
            elif command == xen.MMUEXT_UNPIN_TABLE:
                self._counts["mmuext.unpin"] += 1
                self._frames.unpin(argument)
            elif command == xen.MMUEXT_NEW_BASEPTR:
                self._counts["mmuext.new_baseptr"] += 1
                self._domain.set_base(argument)
                self._cpu.set_cr(3, self._domain.root)
                self._frames.tlb_flushed()
            elif command == xen.MMUEXT_NEW_USER_BASEPTR and self._abi.bits == 64:
                self._counts["mmuext.new_user_baseptr"] += 1
                self._domain.set_user_base(argument)
            elif command in xen.MMUEXT_FLUSHES:
                self._flush_all()
            elif command in xen.MMUEXT_INVLPGS:
                self._flush_page()
            elif command == xen.MMUEXT_FLUSH_CACHE:
                return 0                # WBINVD: the lab's caches are not there to be seen
            else:
                return xen.ENOSYS
        except Refused as refusal:
            return self._refuse(f"for mmuext_op {command} on frame {argument:#x}: {refusal}")
        return 0

    def _refuse(self, what: str) -> int:
        self._counts["safety.refused"] += 1
        self._refused.append(f"the guest at {self._cpu.rip:#x} asked {what}")
        return xen.EINVAL

    # ---- the machine
    def _l1_entry(self, address: int) -> int:
        """Machine address of the L1 entry that maps ``address`` in the present address space."""
        if self._abi.reaches_hole(address, 1):
            raise Refused("the address is the hypervisor's")
        table = self._domain.root
        *upper, last = self._domain.format.shifts
        for shift in upper:         # an address of 32 bits has two of them for the L3
            entry = self._domain.ram.read64(table + 8 * (address >> shift & 511))
            if not entry & 1:
                raise Refused("there is no L1 table for this address")
            table = entry & FRAME
        return table + 8 * (address >> last & 511)

    def _flush_all(self) -> None:
        self._counts["mmuext.tlb_flush"] += 1
        self._domain.flush_tlb()
        self._frames.tlb_flushed()

    def _flush_page(self) -> None:
        """INVLPG. Unicorn's interface forgets all translations or none, which is more than was asked and never wrong."""
        self._counts["mmuext.invlpg"] += 1
        self._domain.flush_tlb()
