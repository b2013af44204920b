"""The paravirtual interface as numbers and structures, for 32-bit guests with PAE.

Facts from Xen's public headers, named at each item (xen/include/public/…). Nothing here acts.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vmlab.machine.memory import PAGE, Ram

# xen.h: __HYPERVISOR_*; 54 and 55 are __HYPERVISOR_arch_6 and _7, here the lab's own:
# ring_op(command, frame, answer) and port_io(op, port, size, value).
HYPERCALLS = {
    0: "set_trap_table", 1: "mmu_update", 2: "set_gdt", 3: "stack_switch", 4: "set_callbacks", 5: "fpu_taskswitch",
    10: "update_descriptor", 13: "multicall", 14: "update_va_mapping", 15: "set_timer_op", 17: "xen_version", 18: "console_io",
    20: "grant_table_op", 21: "vm_assist", 23: "iret", 24: "vcpu_op", 26: "mmuext_op", 29: "sched_op", 32: "event_channel_op",
    33: "physdev_op", 54: "ring_op", 55: "port_io",
}
#: What a hypercall is for, where that is not its own name's business: the kinds of ``crossing.*``.
SERVICES = {
    "mmu_update": "memory", "update_va_mapping": "memory", "mmuext_op": "memory", "multicall": "batch", "iret": "return",
    "stack_switch": "schedule", "fpu_taskswitch": "schedule", "sched_op": "schedule", "set_timer_op": "time", "vcpu_op": "time",
    "console_io": "console", "event_channel_op": "event", "physdev_op": "device", "ring_op": "device", "port_io": "device",
}                                   # all others: "setup"
HYPERCALL_VECTOR = 0x82
SYSCALL_VECTOR = 0x80               # the one vector that may go from ring 3 to ring 1 without the hypervisor

# errno.h, negated as hypercalls return them
ENOENT, ESRCH, EFAULT, EEXIST, ENODEV, EINVAL, ENOSPC, ENOSYS, ETIME = -2, -3, -14, -17, -19, -22, -28, -38, -62

# arch-x86/xen-x86_32.h: selectors in the hypervisor's part of every GDT, and where the hypervisor's hole begins
FLAT_RING1_CS, FLAT_RING1_DS = 0xE019, 0xE021
FLAT_RING3_CS, FLAT_RING3_DS = 0xE02B, 0xE033
HYPERVISOR_START = 0xF5800000
M2P_START = 0xF5800000

# arch-x86/xen.h: the guest's part of the GDT
FIRST_RESERVED_GDT_PAGE = 14
FIRST_RESERVED_GDT_ENTRY = FIRST_RESERVED_GDT_PAGE * 512

# xen.h: mmu_update, mmuext_op, update_va_mapping
DOMID_SELF = 0x7FF0
MMU_NORMAL_PT_UPDATE, MMU_MACHPHYS_UPDATE, MMU_PT_UPDATE_PRESERVE_AD = 0, 1, 2
MMU_UPDATE_PREEMPTED = 1 << 31
MMUEXT_PIN_LEVELS = {0: 1, 1: 2, 2: 3}      # MMUEXT_PIN_L1_TABLE … L3; there is no L4 with 32 bits
MMUEXT_UNPIN_TABLE, MMUEXT_NEW_BASEPTR, MMUEXT_FLUSH_CACHE = 4, 5, 12
MMUEXT_FLUSHES = frozenset((6, 8, 10))      # TLB_FLUSH_LOCAL, _MULTI, _ALL: all the same with one vCPU
MMUEXT_INVLPGS = frozenset((7, 9, 11))      # INVLPG_LOCAL, _MULTI, _ALL
UVMF_TLB_FLUSH, UVMF_INVLPG, UVMF_FLUSHTYPE_MASK = 1, 2, 3

# event_channel.h, sched.h, version.h, physdev.h, xen.h
EVTCHNOP_BIND_VIRQ, EVTCHNOP_BIND_PIRQ, EVTCHNOP_CLOSE, EVTCHNOP_SEND, EVTCHNOP_STATUS, EVTCHNOP_BIND_IPI, EVTCHNOP_UNMASK = (
    1, 2, 3, 4, 5, 7, 9)
EVTCHNSTAT_CLOSED, EVTCHNSTAT_INTERDOMAIN, EVTCHNSTAT_PIRQ, EVTCHNSTAT_VIRQ, EVTCHNSTAT_IPI = 0, 2, 3, 4, 5
VIRQ_TIMER, NR_VIRQS = 0, 24
SCHEDOP_YIELD, SCHEDOP_BLOCK, SCHEDOP_SHUTDOWN = 0, 1, 2
XENVER_VERSION, XENVER_GET_FEATURES = 0, 6
CONSOLEIO_WRITE = 0
VCPUOP_IS_UP, VCPUOP_GET_RUNSTATE_INFO = 3, 4                               # vcpu.h
VCPUOP_SET_PERIODIC_TIMER, VCPUOP_STOP_PERIODIC_TIMER, VCPUOP_SET_SINGLESHOT_TIMER, VCPUOP_STOP_SINGLESHOT_TIMER = 6, 7, 8, 9
VCPU_SSHOTTMR_FUTURE, RUNSTATE_RUNNING = 1, 0
SHORTEST_PERIOD = 10_000            # ns; the header allows a hypervisor to refuse what is below a millisecond
WALL_CLOCK = 1_066_694_400          # seconds since 1970 at the machine's start: 21 October 2003, the same in every run
VMASST_CMD_ENABLE, VMASST_CMD_DISABLE = 0, 1
PHYSDEVOP_IRQ_STATUS_QUERY, PHYSDEVOP_EOI = 5, 12
RINGOP_CONNECT = 0                  # the lab's own
SIF_PRIVILEGED = 1
SIF_SERVICES = 1 << 31               # the lab's own: let every service go by hypercall
MAX_GUEST_CMDLINE = 1024
EVENT_PORTS = 1024                  # 32 words of 32 bits

#: Xen's forced-emulation prefix: UD2 and the letters "xen" before the instruction to emulate.
EMULATE_PREFIX = b"\x0f\x0bxen"
CPUID_CODE = b"\x0f\xa2"


def signed(value: int) -> int:
    """A 32-bit word as the hypervisor's ``long``."""
    return value - (1 << 32) if value & 0x80000000 else value


@dataclass(frozen=True)
class Trap:
    """struct trap_info: who may raise it by INT n, whether events are masked on the way, and the handler."""

    level: int
    mask_events: bool
    cs: int
    address: int


def parse_trap(raw: bytes) -> tuple[int, Trap]:
    """(vector, trap) from one 8-byte struct trap_info; an address of 0 ends the array."""
    vector, flags, cs, address = struct.unpack("<BBHI", raw)
    return vector, Trap(flags & 3, bool(flags & 4), cs if cs & 3 else cs | 1, address)


def start_info(*, pages: int, shared_info: int, pt_base: int, pt_frames: int, mfn_list: int, command_line: str,
               flags: int = SIF_PRIVILEGED) -> bytes:
    """struct start_info (xen.h), 32-bit: what the guest finds at ESI."""
    text = command_line.encode("ascii")
    if len(text) >= MAX_GUEST_CMDLINE:
        raise ValueError(f"a command line has at most {MAX_GUEST_CMDLINE - 1} characters, not {len(text)}")
    return struct.pack(
        "<32sIIIIIIIIIIII1024sII",
        b"xen-3.0-x86_32p", pages, shared_info, flags,
        0, 0, 0, 0,                              # no store, no console ring
        pt_base, pt_frames, mfn_list, 0, 0, text,
        0, 0,                                    # the p2m list lies in the mapped region
    )


def hypercall_page() -> bytes:
    """Stub n at n * 32: MOV EAX, n; INT 0x82; RET. The one for iret is jumped to and saves EAX first."""
    page = bytearray(PAGE)
    for number in range(PAGE // 32):
        load = b"\xb8" + struct.pack("<I", number) + bytes((0xCD, HYPERCALL_VECTOR))
        stub = b"\x50" + load if HYPERCALLS.get(number) == "iret" else load + b"\xc3"
        page[number * 32 : number * 32 + len(stub)] = stub
    return bytes(page)


class SharedInfo:
    """struct shared_info of a domain of one vCPU, in the machine page at ``frame`` (hpa)."""

    _PENDING, _MASK, _SELECTOR, _CR2 = 0, 1, 4, 8     # struct vcpu_info: 64 bytes, 32 of them
    _TIME, _EVENTS, _EVENT_MASKS, _WALL_CLOCK = 32, 2048, 2048 + 128, 2048 + 256

    def __init__(self, ram: Ram, frame: int) -> None:
        self._ram, self.frame = ram, frame
        ram.write(frame, bytes(PAGE))
        self.masked = True          # a domain starts with upcalls masked
        # struct vcpu_time_info: TSC and system time are both virtual nanoseconds from 0, so ((tsc << 1) * 2**31) >> 32
        # is right for ever. The version is even: no update is under way.
        ram.write(frame + self._TIME, struct.pack("<IIQQIbxxx", 2, 0, 0, 0, 1 << 31, 1))
        ram.write(frame + self._WALL_CLOCK, struct.pack("<III", 2, WALL_CLOCK, 0))

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
        self._ram.write32(self.frame + self._CR2, address)

    def _bit(self, field: int, port: int) -> tuple[int, int]:
        return self.frame + field + 4 * (port // 32), 1 << port % 32

    def raise_event(self, port: int) -> None:
        """Set the port pending; if that is new and the port is not masked, ask for an upcall."""
        at, bit = self._bit(self._EVENTS, port)
        word = self._ram.read32(at)
        if word & bit:
            return
        self._ram.write32(at, word | bit)
        self._select(port)

    def _select(self, port: int) -> None:
        at, bit = self._bit(self._EVENT_MASKS, port)
        if self._ram.read32(at) & bit:
            return
        selector = self.frame + self._SELECTOR
        self._ram.write32(selector, self._ram.read32(selector) | 1 << port // 32)
        self._ram.bytes[self.frame + self._PENDING] = 1

    def clear_event(self, port: int) -> None:
        """The port was closed: nothing is pending there."""
        at, bit = self._bit(self._EVENTS, port)
        self._ram.write32(at, self._ram.read32(at) & ~bit)

    def unmask(self, port: int) -> None:
        """EVTCHNOP_unmask: an event that came meanwhile asks for its upcall now."""
        at, bit = self._bit(self._EVENT_MASKS, port)
        self._ram.write32(at, self._ram.read32(at) & ~bit)
        at, bit = self._bit(self._EVENTS, port)
        if self._ram.read32(at) & bit:
            self._select(port)
