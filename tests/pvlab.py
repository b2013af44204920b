"""Small paravirtual guests for tests: a kernel written as bytes, and a domain to ask for things directly."""

from __future__ import annotations

import struct

from vmlab import guests
from vmlab.guests import GuestImage
from vmlab.machine.memory import PAGE
from vmlab.machine.pc import Machine, Stop
from vmlab.strategies.paravirtual import Paravirtualization
from vmlab.vmm import xen
from vmlab.vmm.xen.domain64 import WideDomain
from vmlab.vmm.xen.frames import TABLES, Kind

ENTRY, PAGE_VA, DATA, STACK = 0x100040, 0x101000, 0x102000, 0x104000
EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI = range(8)
INT82 = b"\xcd\x82"
LOOP = b"\xeb\xfe"
#: OUT of EAX to the debug-exit port, by hypercall.
EXIT_WITH_EAX = (b"\x89\xc6" + b"".join(bytes((0xB8 + r,)) + struct.pack("<I", v) for r, v in ((EBX, 1), (ECX, 0xF4), (EDX, 4), (EAX, 55)))
                 + INT82 + LOOP)


def image(code: bytes, data: bytes = b"", size: int = 0x5000, bits: int = 32) -> GuestImage:
    """``code`` at ENTRY, ``data`` at DATA, a hypercall page between them."""
    memory = bytearray(size)
    memory[0x40 : 0x40 + len(code)] = code
    memory[DATA - 0x100000 : DATA - 0x100000 + len(data)] = data
    segment = guests.Segment(0x100000, bytes(memory), len(memory))
    notes = guests.PvNotes(ENTRY, PAGE_VA, 0, 0, "test", "xen-3.0", "generic", "yes" if bits == 32 else "", "", bits)
    return GuestImage("test", (segment,), ENTRY, notes, {}, "")


def mov(register: int, value: int) -> bytes:
    return bytes((0xB8 + register,)) + struct.pack("<I", value & 0xFFFFFFFF)


def call(number: int, *arguments: int) -> bytes:
    """A hypercall with constant arguments."""
    return b"".join(mov(r, v) for r, v in zip((EBX, ECX, EDX, ESI, EDI), arguments, strict=False)) + mov(EAX, number) + INT82


def call64(number: int, *arguments: int) -> str:
    """The same of a 64-bit guest, as assembly: SYSCALL loses RCX and R11."""
    registers = ("rdi", "rsi", "rdx", "r10", "r8")
    return "".join(f"movabs {r}, {v:#x};" for r, v in zip(registers, arguments, strict=False)) + f"mov eax, {number}; syscall;"


#: The end of a 64-bit guest with EAX as its exit code.
EXIT64 = "mov r10d, eax; mov edi, 1; mov esi, 0xf4; mov edx, 4; mov eax, 55; syscall;"


def guest(code: bytes = LOOP, data: bytes = b"", memory: str = "direct", path: str = "portable", bits: int = 32, disk: bytes | None = None,
          **chosen: str) -> Paravirtualization:
    """A guest at its entry, not yet started."""
    strategy = Paravirtualization(Machine(path=path, disk=disk), {"memory": memory, **chosen})
    strategy.load(image(code, data, bits=bits), "")
    return strategy


def run(code: bytes, data: bytes = b"", memory: str = "direct", budget: int = 100_000, path: str = "portable", bits: int = 32,
        **chosen: str) -> tuple[Stop, Paravirtualization]:
    strategy = guest(code, data, memory, path, bits, **chosen)
    return strategy.run(budget), strategy


class Asking:
    """Makes hypercalls for a guest without running it: what the hypervisor does, one call at a time."""

    def __init__(self, strategy: Paravirtualization | None = None) -> None:
        self.strategy = strategy or guest()
        self.hypervisor, self.domain = self.strategy.hypervisor, self.strategy.domain
        self.ram, self.frames = self.strategy.machine.ram, self.domain.frames
        self.strategy.machine.cpu.load()
        self.abi = self.domain.abi

    def call(self, number: int, *arguments: int) -> int:
        values = [*arguments, 0, 0, 0, 0, 0][:5]
        return self.hypervisor._call(number, [value & self.abi.mask for value in values])

    def put(self, address: int, data: bytes) -> int:
        """Place data in the guest's memory; returns where."""
        self.domain.write(address, data)
        return address

    def update(self, *updates: tuple[int, int]) -> int:
        self.put(DATA, b"".join(struct.pack("<QQ", *update) for update in updates))
        return self.call(1, DATA, len(updates), 0, xen.DOMID_SELF)

    def extended(self, *operations: tuple[int, int]) -> int:
        self.put(DATA, b"".join(self.abi.extended.pack(command, argument, 0) for command, argument in operations))
        return self.call(26, DATA, len(operations), 0, xen.DOMID_SELF)

    def map(self, address: int, entry: int, flags: int = 2) -> int:
        if self.abi.bits == 64:
            return self.call(14, address, entry, flags)
        return self.call(14, address, entry & 0xFFFFFFFF, entry >> 32, flags)

    def entry_at(self, address: int) -> int:
        """Machine address of the L1 entry for a linear address below the guest's memory size."""
        table, (*upper, last) = self.domain.root, self.domain.format.shifts
        for shift in upper:
            table = self.ram.read64(table + 8 * (address >> shift & 511)) & 0xFFFFFF000
        return table + 8 * (address >> last & 511)

    def fresh_frame(self, pfn: int) -> int:
        """A frame of the guest's that nothing maps writable, all zero; its mfn."""
        mfn = self.domain.mfn(pfn)
        assert self.map(pfn * PAGE, mfn << 12 | 1) == 0
        self.ram.write(mfn << 12, bytes(PAGE))
        return mfn


def check_counts(strategy: Paravirtualization) -> None:
    """Count every use of every frame anew, from the tables themselves, and compare; no table may be writable."""
    domain, frames, ram = strategy.domain, strategy.domain.frames, strategy.machine.ram
    uses: dict[int, int] = {}
    kinds: dict[int, Kind] = {}

    def use(mfn: int, kind: Kind) -> None:
        assert frames.owns(mfn)
        assert kinds.setdefault(mfn, kind) is kind, f"{mfn:#x} is {kinds[mfn]} and {kind}"
        uses[mfn] = uses.get(mfn, 0) + 1

    wide = domain.abi.bits == 64
    use(domain.root >> 12, Kind.L4 if wide else Kind.L3)
    if isinstance(domain, WideDomain) and domain.user_root:
        use(domain.user_root >> 12, Kind.L4)
    if strategy.hypervisor.ring.frame is not None:
        use(strategy.hypervisor.ring.frame, Kind.WRITABLE)
    for mfn in domain.tables._guests:
        use(mfn, Kind.DESCRIPTORS)
    for mfn in range(frames.first, frames.first + frames.count):
        kind = frames.kind(mfn)
        if frames.pinned(mfn):
            use(mfn, kind)
        if kind not in TABLES:
            continue
        for slot in range(512):
            entry = ram.read64((mfn << 12) + 8 * slot)
            target = (entry & 0xFFFFFF000) >> 12
            if not entry & 1:
                continue
            assert not wide or entry & 4 or (kind is Kind.L4 and 256 <= slot < 272), "the guest's kernel runs in ring 3"
            if kind is Kind.L4:
                if not 256 <= slot < 272:
                    use(target, Kind.L3)
                else:
                    assert (slot, entry & ~0x20) in ((256, 0x5005), (260, 0x6003))
            elif kind is Kind.L3 and wide:
                use(target, Kind.L2)
            elif kind is Kind.L3:
                if slot < 4:
                    use(target, Kind.L2_HOLE if slot == 3 else Kind.L2)
            elif kind is Kind.L1:
                if target == domain.shared.frame >> 12:
                    continue
                assert frames.owns(target)
                if entry & 2:
                    use(target, Kind.WRITABLE)
            elif kind is Kind.L2_HOLE and slot >= 428:
                assert entry in (0x3001, 0x4001, 0x3021, 0x4021)
            else:
                use(target, Kind.L1)
    for mfn in range(frames.first, frames.first + frames.count):
        assert frames.uses(mfn) == uses.get(mfn, 0), f"frame {mfn:#x}: {frames.kind(mfn)}"
        assert frames.kind(mfn) is kinds.get(mfn, Kind.NONE)
