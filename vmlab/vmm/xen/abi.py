"""What the width of a paravirtual guest changes in the interface: selectors, the hole, the layout of structures.

Facts from Xen's public headers, named at each item (xen/include/public/…). Nothing here acts.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vmlab.machine.memory import PAGE, Ram
from vmlab.vmm import xen


@dataclass(frozen=True)
class Trap:
    """struct trap_info: who may raise it by INT n, whether events are masked on the way, and the handler."""

    level: int
    mask_events: bool
    cs: int
    address: int


@dataclass(frozen=True)
class Abi:
    """The interface of one width. ``kernel_cs`` … are the flat selectors that a kernel and its users run on."""

    bits: int
    magic: bytes
    kernel_cs: int
    kernel_ss: int
    user_cs: int
    user_ss: int
    m2p: int                            # where the guest sees the machine-to-physical table
    trap: struct.Struct                 # struct trap_info: vector, flags, code selector, address
    extended: struct.Struct             # struct mmuext_op: command and two arguments
    runstate: struct.Struct             # struct vcpu_runstate_info: state, since when, four times
    ring_entry: int                     # bytes of a union blkif_sring_entry (io/blkif.h)
    ring_id: int                        # where in a request its id lies; the sector, and the segments, follow

    @property
    def word(self) -> int:
        """Bytes of a C long."""
        return self.bits // 8

    @property
    def mask(self) -> int:
        """All bits of a C long."""
        return (1 << self.bits) - 1

    def words(self, count: int) -> str:
        """Format of ``count`` C longs for :mod:`struct`."""
        return f"<{count}{'Q' if self.bits == 64 else 'I'}"

    def signed(self, value: int) -> int:
        """A C long as the hypervisor's own."""
        return value - (1 << self.bits) if value >> self.bits - 1 else value

    def reaches_hole(self, address: int, size: int) -> bool:
        """Whether these bytes are not all the guest's to use: the hypervisor's, or no linear addresses at all."""
        end = address + size
        if self.bits == 32:
            return end > xen.HYPERVISOR_START
        return end > 1 << 64 if address >= xen.WIDE_HYPERVISOR_END else end > 1 << 47

    def parse_trap(self, raw: bytes) -> tuple[int, Trap]:
        """(vector, trap) from one struct trap_info; an address of 0 ends the array. The selector gets the kernel's ring."""
        vector, flags, cs, address = self.trap.unpack(raw)
        return vector, Trap(flags & 3, bool(flags & 4), self.kernel_selector(cs), address)

    def kernel_selector(self, selector: int) -> int:
        """As Xen mends it: nobody asks for ring 0."""
        return selector | 3 if self.bits == 64 else selector if selector & 3 else selector | 1

    def start_info(self, *, pages: int, shared_info: int, pt_base: int, pt_frames: int, mfn_list: int, command_line: str,
                   flags: int = xen.SIF_PRIVILEGED) -> bytes:
        """struct start_info (xen.h): what the guest finds at ESI or RSI."""
        text = command_line.encode("ascii")
        if len(text) >= xen.MAX_GUEST_CMDLINE:
            raise ValueError(f"a command line has at most {xen.MAX_GUEST_CMDLINE - 1} characters, not {len(text)}")
        return struct.pack(
            "<32sIIIIIIIIIIII1024sII" if self.bits == 32 else "<32sQQI4xQI4xQI4xQQQQQ1024sQQ",
            self.magic, pages, shared_info, flags,
            0, 0, 0, 0,                              # no store, no console ring
            pt_base, pt_frames, mfn_list, 0, 0, text,
            0, 0,                                    # the p2m list lies in the mapped region
        )

    @property
    def command_line_at(self) -> int:
        """The offset of ``cmd_line`` in struct start_info."""
        return struct.calcsize("<32sIIIIIIIIIIII" if self.bits == 32 else "<32sQQI4xQI4xQI4xQQQQQ")

    def hypercall_page(self) -> bytes:
        """Stub n at n * 32. The one for iret is jumped to, and leaves on the stack what the call itself takes.

        32 bits: MOV EAX, n; INT 0x82; RET. 64: SYSCALL loses RCX and R11, so they are saved around it (that they are, and
        that iret finds RAX, R11, RCX on top of its frame, is in arch-x86/xen-x86_64.h: struct iret_context).
        """
        page = bytearray(PAGE)
        for number in range(PAGE // 32):
            load = b"\xb8" + struct.pack("<I", number)
            iret = xen.HYPERCALLS.get(number) == "iret"
            if self.bits == 32:
                enter = load + bytes((0xCD, xen.HYPERCALL_VECTOR))
                stub = b"\x50" + enter if iret else enter + b"\xc3"
            else:
                stub = b"\x51\x41\x53" + (b"\x50" if iret else b"") + load + b"\x0f\x05" + (b"" if iret else b"\x41\x5b\x59\xc3")
            page[number * 32 : number * 32 + len(stub)] = stub
        return bytes(page)


#: 32 bits with PAE (arch-x86/xen-x86_32.h): the kernel in ring 1, users in ring 3.
NARROW = Abi(32, b"xen-3.0-x86_32p", xen.FLAT_RING1_CS, xen.FLAT_RING1_DS, xen.FLAT_RING3_CS, xen.FLAT_RING3_DS, xen.M2P_START,
             struct.Struct("<BBHI"), struct.Struct("<III"), struct.Struct("<I5Q"), 108, 4)
#: 64 bits (arch-x86/xen-x86_64.h): both in ring 3. 64-bit members are aligned to 8 bytes, in 32-bit C to 4.
WIDE = Abi(64, b"xen-3.0-x86_64", xen.FLAT_RING3_CS64, xen.FLAT_RING3_SS64, xen.FLAT_RING3_CS64, xen.FLAT_RING3_SS64,
           xen.WIDE_HYPERVISOR_START, struct.Struct("<BBH4xQ"), struct.Struct("<I4xQQ"), struct.Struct("<I4x5Q"), 112, 8)


class SharedInfo:
    """struct shared_info of a domain of one vCPU, in the machine page at ``frame`` (hpa).

    Its words are C longs: of 32 or 64 bits, and as many of them for pending events and for masks as they have bits.
    """

    _PENDING, _MASK = 0, 1              # struct vcpu_info: 64 bytes, 32 of them
    _TIME, _EVENTS = 32, 2048

    def __init__(self, ram: Ram, frame: int, abi: Abi = NARROW) -> None:
        self._ram, self.frame, self._bits = ram, frame, abi.bits
        word = abi.word
        self._selector, self._cr2 = word, 2 * word
        self._event_masks = self._EVENTS + word * self._bits
        wall_clock = self._EVENTS + 2 * word * self._bits
        self._read, self._write = (ram.read32, ram.write32) if word == 4 else (ram.read64, ram.write64)
        #: Event channels that there can be (event_channel.h: EVTCHN_2L_NR_CHANNELS); port 0 is never given.
        self.ports = self._bits * self._bits
        ram.write(frame, bytes(PAGE))
        self.masked = True          # a domain starts with upcalls masked
        # struct vcpu_time_info: TSC and system time are both virtual nanoseconds from 0, so ((tsc << 1) * 2**31) >> 32
        # is right for ever. The version is even: no update is under way.
        ram.write(frame + self._TIME, struct.pack("<IIQQIbxxx", 2, 0, 0, 0, 1 << 31, 1))
        ram.write(frame + wall_clock, struct.pack("<III", 2, xen.WALL_CLOCK, 0))

    @property
    def pending(self) -> bool:
        """evtchn_upcall_pending: something waits for an upcall."""
        return bool(self._ram.bytes[self.frame + self._PENDING])

    @property
    def masked(self) -> bool:
        """evtchn_upcall_mask: the guest's interrupt flag, the other way round."""
        return bool(self._ram.bytes[self.frame + self._MASK])

    @masked.setter
    def masked(self, value: bool) -> None:
        self._ram.bytes[self.frame + self._MASK] = int(value)

    def set_cr2(self, address: int) -> None:
        """arch.cr2: where a page fault happened."""
        self._write(self.frame + self._cr2, address)

    def _bit(self, field: int, port: int) -> tuple[int, int]:
        return self.frame + field + self._bits // 8 * (port // self._bits), 1 << port % self._bits

    def raise_event(self, port: int) -> None:
        """Set the port pending; if that is new and the port is not masked, ask for an upcall."""
        at, bit = self._bit(self._EVENTS, port)
        word = self._read(at)
        if word & bit:
            return
        self._write(at, word | bit)
        self._select(port)

    def _select(self, port: int) -> None:
        at, bit = self._bit(self._event_masks, port)
        if self._read(at) & bit:
            return
        selector = self.frame + self._selector
        self._write(selector, self._read(selector) | 1 << port // self._bits)
        self._ram.bytes[self.frame + self._PENDING] = 1

    def clear_event(self, port: int) -> None:
        """The port was closed: nothing is pending there."""
        at, bit = self._bit(self._EVENTS, port)
        self._write(at, self._read(at) & ~bit)

    def unmask(self, port: int) -> None:
        """EVTCHNOP_unmask: an event that came meanwhile asks for its upcall now."""
        at, bit = self._bit(self._event_masks, port)
        self._write(at, self._read(at) & ~bit)
        at, bit = self._bit(self._EVENTS, port)
        if self._read(at) & bit:
            self._select(port)
