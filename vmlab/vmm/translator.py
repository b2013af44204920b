"""The translator: guest kernel code in, translation units in a cache out.

A unit is a straight line of at most :data:`UNIT_LIMIT` guest instructions, ended by control flow (Adams &
Agesen, ASPLOS 2006, §3). Ordinary instructions are copied (IDENT). Sensitive ones become other code that
works on the virtual CPU inside the cache, or a callout into the VMM. Direct jumps lead, once their
target is translated, straight to its unit (chaining).

Every template leaves the guest's registers and arithmetic flags as the guest's instruction would, and
touches guest memory before it changes anything, so that a fault finds the state of the guest's
instruction. Memory of the VMM is addressed absolutely, through a flat DS.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from vmlab.errors import UnsupportedByStrategy
from vmlab.ledger import Counts
from vmlab.machine.counter import Tag, Tags
from vmlab.machine.decode import Instruction, decode
from vmlab.vmm.space import HOLE, StaticSpace

UNIT_LIMIT = 12
# Linear addresses in the hole. One page is writable by the guest's ring and never trusted; the rest is read-only to it.
VIRTUAL_FLAGS = HOLE + 0x11000      # IF and IOPL of the virtual CPU
SITE = VIRTUAL_FLAGS + 4            # which callout is being made
TARGET = VIRTUAL_FLAGS + 8          # where an indirect jump or return wants to go
SCRATCH0, SCRATCH1 = VIRTUAL_FLAGS + 16, VIRTUAL_FLAGS + 20
PENDING = HOLE + 0x12000            # not zero: an interrupt waits for the virtual IF
GATE = HOLE + 0x13000               # the door to the VMM
CACHE, CACHE_SIZE = HOLE + 0x100000, 1 << 20

_IN_CACHE = frozenset({"cli", "sti", "pushf", "popf", "rdtsc"})
_SYSTEM_CAUSES = frozenset({"cli", "sti", "pushf", "popf", "iret", "in", "out", "cpuid", "rdtsc", "hlt"})
_SEGMENT_OPS = frozenset({"mov_to_seg", "mov_from_seg", "push_seg", "pop_seg", "load_far"})
_TRAP_OPS = frozenset({"int", "int3", "into", "int1"})


@dataclass(frozen=True)
class Site:
    """A place in the cache that calls out: why, for which guest instruction, and what to patch for a chain exit."""

    cause: str
    guest: int
    instruction: Instruction | None
    patch: int = 0


@dataclass
class Unit:
    """One translation unit: guest range, cache range, and which guest instruction each cache address belongs to."""

    guest: int
    source: bytes
    start: int
    end: int = 0
    boundaries: dict[int, int] = field(default_factory=dict)
    instructions: int = 0


class Translator:
    """The cache and what is in it. Knows nothing of execution; :mod:`vmlab.strategies.translation` runs it."""

    def __init__(self, space: StaticSpace, counts: Counts, *, in_cache: bool,
                 on_patch: Callable[[int, int], None], watched: Mapping[int, Callable[[int], None]],
                 watch: Callable[[int, Callable[[int], None]], None]) -> None:
        self.space, self.ram, self.counts = space, space.ram, counts
        self.in_cache = in_cache
        self._on_patch, self._watched, self._watch = on_patch, watched, watch
        space.map_hole(VIRTUAL_FLAGS, 0x1000, writable=True)
        space.map_hole(PENDING, 0x1000)
        self.ram.write(space.map_hole(GATE, 0x1000), b"\xcc")  # never executed: the machine's hook is here
        space.map_hole(CACHE, CACHE_SIZE)
        self.units: dict[int, Unit] = {}
        self.sites: list[Site] = []
        self.tags: dict[int, Tag] = {}
        #: cache address → guest address, where the guest's state is exactly that before the guest's instruction
        self.boundaries: dict[int, int] = {}
        #: cache address of any emitted instruction → guest instruction that it works for
        self.owners: dict[int, int] = {}
        self._next = CACHE
        self.flushes = 0

    # ---- asked by the machine and the monitor
    def tag_block(self, pc: int, instructions: list[Instruction]) -> Tags | None:
        """What a block's machine instructions stand for; None outside the cache (the guest's own code)."""
        if not self.space.in_hole(pc):
            return None
        tags: Tags = []
        at = pc
        for instruction in instructions:
            tags.append(self.tags.get(at))
            at += instruction.size
        return tags

    def find(self, guest: int) -> Unit | None:
        """The unit that begins at this guest address, if it is translated."""
        return self.units.get(guest)

    def flush(self) -> None:
        """Throw every translation away."""
        self.counts["bt.invalidate"] += len(self.units)
        self.units.clear()
        self.sites.clear()
        self.tags.clear()
        self.boundaries.clear()
        self.owners.clear()
        self._on_patch(CACHE, CACHE + CACHE_SIZE)
        self._next = CACHE
        self.flushes += 1

    def check_sources(self, read: Callable[[int, int], bytes]) -> None:
        """Refuse to lie: this translator does not follow a guest that rewrites translated code."""
        for unit in self.units.values():
            if read(unit.guest, len(unit.source)) != unit.source:
                raise UnsupportedByStrategy(f"the guest rewrote its code at {unit.guest:#x} after it was translated; "
                                            "this translator does not trace code pages")

    # ---- translation
    def translate(self, guest: int, read: Callable[[int, int], bytes], iopl: int) -> Unit:
        """Translate the unit at ``guest``; ``read(address, size)`` fetches guest code and raises a guest's fault."""
        if self._next + 4096 > CACHE + CACHE_SIZE:
            self.flush()
        emitter = _Emitter(self, guest, self._next, iopl)
        at = guest
        while True:
            instruction = decode(_fetch(read, at), 32)
            if instruction is None:
                emitter.callout("fault", at, None)
                break
            if instruction.op == "sti" and self.in_cache and emitter.count == UNIT_LIMIT - 1:
                # Its shadow needs the next instruction in the same unit: STI begins the next unit instead.
                emitter.fall_through(at)
                break
            following = at + instruction.size
            emitter.begin(at)
            if emitter.instruction(at, instruction, read):
                at = following
                break
            at = following
            if emitter.count >= UNIT_LIMIT:
                emitter.fall_through(at)
                break
        unit = emitter.finish()
        unit.source = read(guest, max(at - guest, 1))
        self.units[guest] = unit
        self._next = unit.end
        self.counts["bt.translate.unit"] += 1
        self.counts["bt.translate.instruction"] += max(unit.instructions, 1)
        self.counts["bt.translate.bytes_in"] += at - guest
        self.counts["bt.translate.bytes_out"] += unit.end - unit.start
        return unit

    def chain(self, site: Site, target: Unit) -> None:
        """Patch the exit jump of ``site`` to lead straight to ``target``."""
        self._put(site.patch, b"\xe9" + struct.pack("<i", target.start - (site.patch + 5)))
        self._on_patch(site.patch, site.patch + 5)
        self.counts["bt.chain"] += 1

    def _put(self, linear: int, data: bytes) -> None:
        self.ram.write(self.space.hole_frame(linear), data)

    def watcher(self, guest: int, cache: int) -> None:
        callback = self._watched.get(guest)
        if callback is not None:
            self._watch(cache, callback)


def _fetch(read: Callable[[int, int], bytes], address: int) -> bytes:
    """Up to 15 bytes of code. The last bytes of memory are fetched one page less."""
    return read(address, 15)


class _Emitter:
    """Writes one unit."""

    def __init__(self, translator: Translator, guest: int, start: int, iopl: int) -> None:
        self.t = translator
        self.unit = Unit(guest, b"", start)
        self.code = bytearray()
        self.iopl = iopl
        self.count = 0
        self._guest = guest
        self._stubs: list[tuple[int, Site]] = []   # (offset of the 5-byte exit jump, site)
        self._check_after: int | None = None       # emit the pending-interrupt check after this many instructions
        self._tags: dict[int, Tag] = {}

    @property
    def here(self) -> int:
        return self.unit.start + len(self.code)

    def begin(self, guest: int) -> None:
        """The next bytes belong to the guest instruction at ``guest``; the state is exact here."""
        self._guest = guest
        self.unit.boundaries[self.here] = guest
        self.count += 1
        self.t.watcher(guest, self.here)

    def emit(self, data: bytes, tag: Tag | None = None) -> None:
        """One machine instruction."""
        at = self.here
        self.t.owners[at] = self._guest
        if tag is not None:
            self.t.tags[at] = tag
        self.code += data

    # ---- pieces
    def store32(self, address: int, value: int, tag: Tag | None = None) -> None:
        self.emit(b"\xc7\x05" + struct.pack("<II", address, value & 0xFFFFFFFF), tag)

    def exit_jump(self, site_of: Callable[[int], Site], tag: Tag | None = None) -> None:
        """``jmp rel32`` to a stub that asks for the target; the jump is what chaining patches."""
        at = self.here
        self._stubs.append((len(self.code), site_of(at)))
        self.emit(b"\xe9\0\0\0\0", tag)

    def chain_to(self, target: int, tag: Tag | None = None) -> None:
        """Leave for the unit at guest address ``target``: directly if it exists."""
        known = self.t.find(target)
        if known is not None:
            self.emit(b"\xe9" + struct.pack("<i", known.start - (self.here + 5)), tag)
            self.t.counts["bt.chain"] += 1
        else:
            self.exit_jump(lambda at: Site("chain", target, None, at), tag)

    def call_vmm(self, site: Site) -> None:
        """Into the VMM: note the site, jump to the gate."""
        self.store32(SITE, len(self.t.sites))
        self.t.sites.append(site)
        self.emit(b"\xe9" + struct.pack("<i", GATE - (self.here + 5)))

    def callout(self, cause: str, at: int, instruction: Instruction | None) -> None:
        """The VMM carries this instruction out; the unit ends, since it may go anywhere."""
        self.call_vmm(Site(cause, at, instruction))

    def fall_through(self, target: int) -> None:
        self.chain_to(target)

    # ---- one guest instruction
    def instruction(self, at: int, ins: Instruction, read: Callable[[int, int], bytes]) -> bool:
        """Translate one instruction; True when it ended the unit."""
        following = (at + ins.size) & 0xFFFFFFFF
        op = ins.op
        check_now = self._check_after is not None
        if op == "sti" and self.t.in_cache and not self._shadow_can_follow(following, read):
            self.callout("sti", at, ins)
            return True
        if op is not None and not (self.t.in_cache and op in _IN_CACHE and not _has_size_prefix(ins)):
            self.callout(_cause(op), at, ins)
            return True
        if op is not None:
            self._in_cache(op, at, ins)
        elif ins.kind in ("branch", "jcc", "indirect"):
            self._control_flow(at, ins, following, check=check_now)
            return True
        else:
            self.emit(ins.raw, Tag(ins, "ident"))
        if check_now:
            self._check_after = None
            self._check_pending(following)
        if op == "sti":
            self._check_after = 1
        return False

    def _shadow_can_follow(self, following: int, read: Callable[[int, int], bytes]) -> bool:
        """STI's shadow covers one instruction; in the cache only if that one is run by the cache too, or by the VMM, which checks."""
        after = decode(_fetch(read, following), 32)
        return after is not None and after.op != "sti"

    def _in_cache(self, op: str, at: int, ins: Instruction) -> None:
        done = Tag(ins, "incache")
        if op == "cli":
            self.emit(b"\xc6\x05" + struct.pack("<IB", VIRTUAL_FLAGS + 1, self.iopl << 4), done)
        elif op == "sti":
            self.emit(b"\xc6\x05" + struct.pack("<IB", VIRTUAL_FLAGS + 1, self.iopl << 4 | 2), done)
        elif op == "rdtsc":
            self.emit(b"\x0f\x31", done)  # virtual time is physical time here: the offset is 0
        elif op == "pushf":
            # The physical IF is always 1 and IOPL 0, so image - 0x200 + virtual flags is the guest's; LEA adds without flags.
            self.emit(b"\x9c")
            self.emit(b"\xa3" + struct.pack("<I", SCRATCH0))
            self.emit(b"\x89\x0d" + struct.pack("<I", SCRATCH1))
            self.emit(b"\x8b\x04\x24")
            self.emit(b"\x8b\x0d" + struct.pack("<I", VIRTUAL_FLAGS))
            self.emit(b"\x8d\x84\x08" + struct.pack("<i", -0x200))
            self.emit(b"\x89\x04\x24")
            self.emit(b"\xa1" + struct.pack("<I", SCRATCH0))
            self.emit(b"\x8b\x0d" + struct.pack("<I", SCRATCH1), done)
        elif op == "popf":
            self._popf(at, ins)

    def _popf(self, at: int, ins: Instruction) -> None:
        """POPF: IF to the virtual CPU, the rest by a real POPF; a change of IOPL, or TF or NT, is the VMM's business."""
        self.emit(b"\xa3" + struct.pack("<I", SCRATCH0))
        self.emit(b"\x8b\x04\x24")
        self.emit(b"\x25" + struct.pack("<I", 0x7100))                      # and eax, IOPL|NT|TF (flags are about to be replaced)
        self.emit(b"\x3d" + struct.pack("<I", self.iopl << 12))            # cmp
        self.emit(b"\x74\x14")                                              # je over the callout (5 + 10 + 5 bytes)
        self.emit(b"\xa1" + struct.pack("<I", SCRATCH0))
        self.call_vmm(Site("popf", at, ins))
        self.emit(b"\x8b\x04\x24")
        self.emit(b"\x25" + struct.pack("<I", 0x3200))
        self.emit(b"\xa3" + struct.pack("<I", VIRTUAL_FLAGS))
        self.emit(b"\xa1" + struct.pack("<I", SCRATCH0))
        self.emit(b"\x9d", Tag(ins, "incache"))
        self._check_pending((at + ins.size) & 0xFFFFFFFF)

    def _check_pending(self, following: int, tag: Tag | None = None) -> None:
        """After interrupts may have been enabled: into the VMM if one waits. JECXZ tests without touching flags."""
        self.emit(b"\x89\x0d" + struct.pack("<I", SCRATCH1), tag)
        self.emit(b"\x8b\x0d" + struct.pack("<I", PENDING))
        self.emit(b"\xe3\x15")                                              # jecxz over the callout (6 + 10 + 5 bytes)
        self.emit(b"\x8b\x0d" + struct.pack("<I", SCRATCH1))
        self.call_vmm(Site("interrupt", following, None))
        self.emit(b"\x8b\x0d" + struct.pack("<I", SCRATCH1))

    def _control_flow(self, at: int, ins: Instruction, following: int, *, check: bool) -> None:
        """Jumps and calls. ``check``: STI came before, so a pending interrupt is looked for at the target."""
        mnemonic = ins.cs.mnemonic.split()[-1]
        done = Tag(ins, "incache")

        def leave_for(target: int, tag: Tag | None = None) -> None:
            if check:
                self._check_pending(target, tag)
                tag = None
            self.chain_to(target, tag)

        if ins.kind == "branch":
            target = (at + int(ins.cs.operands[0].imm)) & 0xFFFFFFFF
            if mnemonic == "call":
                self.emit(b"\x68" + struct.pack("<I", following))
            leave_for(target, done)
        elif ins.kind == "jcc":
            target = (at + int(ins.cs.operands[0].imm)) & 0xFFFFFFFF
            opcode = ins.cs.opcode
            if opcode[0] == 0x0F or 0x70 <= opcode[0] <= 0x7F:
                condition = (opcode[1] if opcode[0] == 0x0F else opcode[0]) & 0xF
                self.emit(bytes([0x0F, 0x80 | condition]) + bytes(4), done)
                distance = 4
            else:  # LOOPcc, JECXZ: only a short form exists
                self.emit(ins.raw[:-2] + bytes([opcode[0], 0]), done)
                distance = 1
            behind = len(self.code)
            leave_for(following)
            over = len(self.code) - behind
            self.code[behind - distance:behind] = over.to_bytes(distance, "little")
            leave_for(target)
        else:
            self._indirect(at, ins, following, mnemonic)

    def _indirect(self, at: int, ins: Instruction, following: int, mnemonic: str) -> None:
        """Returns and indirect jumps: the target goes to :data:`TARGET`, the VMM looks it up."""
        done = Tag(ins, "incache")
        if mnemonic == "ret":
            self.emit(b"\x8f\x05" + struct.pack("<I", TARGET), None if ins.cs.operands else done)
            if ins.cs.operands:
                release = int(ins.cs.operands[0].imm)
                self.emit(b"\x8d\xa4\x24" + struct.pack("<I", release), done)  # lea esp, [esp + release]
        else:
            modrm_at = ins.raw.rindex(bytes([0xFF]), 0, len(ins.raw) - 1) if ins.raw[0] != 0xFF else 0
            prefixes, modrm, rest = ins.raw[:modrm_at], ins.raw[modrm_at + 1], ins.raw[modrm_at + 2:]
            self.emit(b"\xa3" + struct.pack("<I", SCRATCH0))
            self.emit(prefixes + bytes([0x8B, modrm & 0xC7]) + rest)            # mov eax, <the operand>
            self.emit(b"\xa3" + struct.pack("<I", TARGET))
            self.emit(b"\xa1" + struct.pack("<I", SCRATCH0), None if mnemonic == "call" else done)
            if mnemonic == "call":
                self.emit(b"\x68" + struct.pack("<I", following), done)
        self.call_vmm(Site("indirect", at, ins))

    def finish(self) -> Unit:
        """Append the stubs, write the unit into the cache."""
        for offset, site in self._stubs:
            stub = self.here
            self.code[offset + 1:offset + 5] = struct.pack("<i", stub - (self.unit.start + offset + 5))
            self._guest = site.guest
            self.call_vmm(site)
        self.t._put(self.unit.start, bytes(self.code))
        self.unit.end = self.here
        self.unit.instructions = self.count
        self.t.boundaries.update(self.unit.boundaries)
        return self.unit


def _has_size_prefix(ins: Instruction) -> bool:
    return 0x66 in bytes(ins.cs.prefix)


def _cause(op: str) -> str:
    if op in _SYSTEM_CAUSES:
        return op
    if op in _SEGMENT_OPS:
        return "segment"
    return "int" if op in _TRAP_OPS else "system"
