"""The virtual machine control block: AMD-V's page that describes one guest CPU (APM Vol. 2 appendix B).

A control area says what the VMM intercepts and why the guest last exited; a state-save area holds the
guest's registers. This is a view onto machine memory, fields by name: ``vmcb["rip"] += 2``. The machine
uses it as it is; a VMM uses :class:`CountedVmcb`, which counts every field.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable, Mapping

from vmlab.ledger import Counts
from vmlab.machine.cpu import Segment
from vmlab.machine.memory import Ram

_SAVE = 0x400

#: Segment and table registers of the state-save area, 16 bytes each (APM Vol. 2 table B-2).
SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs", "gdtr", "ldtr", "idtr", "tr")

#: Name → (offset, struct code). Control area: APM Vol. 2 table B-1; state-save area: table B-2.
_LAYOUT: dict[str, tuple[int, str]] = {
    "intercept_cr_read": (0x000, "H"), "intercept_cr_write": (0x002, "H"), "intercept_dr_read": (0x004, "H"),
    "intercept_dr_write": (0x006, "H"), "intercept_exceptions": (0x008, "I"), "intercepts": (0x00C, "Q"),
    "iopm_base": (0x040, "Q"), "msrpm_base": (0x048, "Q"), "tsc_offset": (0x050, "Q"), "asid": (0x058, "I"),
    "tlb_control": (0x05C, "B"), "interrupt_control": (0x060, "I"), "interrupt_vector": (0x064, "I"),
    "interrupt_shadow": (0x068, "Q"), "exit_code": (0x070, "Q"), "exit_info_1": (0x078, "Q"), "exit_info_2": (0x080, "Q"),
    "exit_interrupt_info": (0x088, "Q"), "nested_control": (0x090, "Q"), "event_injection": (0x0A8, "Q"),
    "nested_cr3": (0x0B0, "Q"),
    "cpl": (_SAVE + 0x0CB, "B"), "efer": (_SAVE + 0x0D0, "Q"), "cr4": (_SAVE + 0x148, "Q"), "cr3": (_SAVE + 0x150, "Q"),
    "cr0": (_SAVE + 0x158, "Q"), "dr7": (_SAVE + 0x160, "Q"), "dr6": (_SAVE + 0x168, "Q"), "rflags": (_SAVE + 0x170, "Q"),
    "rip": (_SAVE + 0x178, "Q"), "rsp": (_SAVE + 0x1D8, "Q"), "rax": (_SAVE + 0x1F8, "Q"), "star": (_SAVE + 0x200, "Q"),
    "lstar": (_SAVE + 0x208, "Q"), "cstar": (_SAVE + 0x210, "Q"), "sfmask": (_SAVE + 0x218, "Q"),
    "kernel_gs_base": (_SAVE + 0x220, "Q"), "sysenter_cs": (_SAVE + 0x228, "Q"), "sysenter_esp": (_SAVE + 0x230, "Q"),
    "sysenter_eip": (_SAVE + 0x238, "Q"), "cr2": (_SAVE + 0x240, "Q"), "pat": (_SAVE + 0x268, "Q"),
}
for _i, _name in enumerate(SEGMENTS):
    _at = _SAVE + 16 * _i
    _LAYOUT |= {f"{_name}.selector": (_at, "H"), f"{_name}.attributes": (_at + 2, "H"),
                f"{_name}.limit": (_at + 4, "I"), f"{_name}.base": (_at + 8, "Q")}

FIELDS: Mapping[str, tuple[int, struct.Struct]] = {
    name: (offset, struct.Struct("<" + code)) for name, (offset, code) in _LAYOUT.items()}

#: What a world switch always moves, packed: one call in place of many. The first four segments, and the
#: registers that lie in a row.
SWITCHED_SEGMENTS = SEGMENTS[:4]
_FOUR_SEGMENTS = struct.Struct("<" + "HHIQ" * 4)
SWITCHED_REGISTERS = ("cr4", "cr3", "cr0", "dr7", "dr6", "rflags", "rip")
_SEVEN_REGISTERS = struct.Struct("<7Q")
_CONTROLS = struct.Struct("<Q8xI44xQ16xQQ")    # from 0x050 on
_SEGMENTS_AT, _REGISTERS_AT = _LAYOUT["es.selector"][0], _LAYOUT["cr4"][0]

# Exit codes (APM Vol. 2 appendix C). Those from 0x60 to 0x9F are also bits of `intercepts`, see intercept_bit().
EXIT_CR_READ, EXIT_CR_WRITE, EXIT_DR_READ, EXIT_EXCEPTION = 0x00, 0x10, 0x20, 0x40
EXIT_INTR, EXIT_VINTR, EXIT_RDTSC, EXIT_CPUID, EXIT_HLT, EXIT_IOIO, EXIT_MSR = 0x60, 0x64, 0x6E, 0x72, 0x78, 0x7B, 0x7C
EXIT_SHUTDOWN, EXIT_VMRUN, EXIT_VMMCALL, EXIT_RDTSCP, EXIT_NPF = 0x7F, 0x80, 0x81, 0x87, 0x400
EXIT_IRET, EXIT_INVLPG, EXIT_TASK_SWITCH = 0x74, 0x79, 0x7D
#: VMRUN, VMMCALL, VMLOAD, VMSAVE, STGI, CLGI, SKINIT and INVLPGA: what only a VMM may execute, with addresses of machine memory.
EXITS_OF_SVM = (EXIT_VMRUN, EXIT_VMMCALL, 0x82, 0x83, 0x84, 0x85, 0x86, 0x7A)
EXIT_INVALID = 0xFFFFFFFFFFFFFFFF

# interrupt_control (APM Vol. 2 §15.21)
V_TPR, V_IRQ, V_PRIORITY, V_IGNORE_TPR, V_INTR_MASKING = 0xF, 1 << 8, 0xF << 16, 1 << 20, 1 << 24

# event_injection and exit_interrupt_info (APM Vol. 2 §15.20 figure 15-4)
EVENT_INTERRUPT, EVENT_NMI, EVENT_EXCEPTION, EVENT_SOFTWARE = 0 << 8, 2 << 8, 3 << 8, 4 << 8
EVENT_HAS_ERROR, EVENT_VALID, EVENT_TYPE = 1 << 11, 1 << 31, 7 << 8

# exit_info_1 of an IOIO exit (APM Vol. 2 figure 15-2)
IO_IN, IO_STRING, IO_REP = 1 << 0, 1 << 2, 1 << 3
IO_SIZE_SHIFT, IO_ADDRESS_SHIFT, IO_PORT_SHIFT = 4, 7, 16

# exit_info_2 of a task switch exit: beside the error code in bits 0-31, how the switch came about (APM Vol. 2 §15.14.1)
TASK_BY_IRET, TASK_BY_JUMP, TASK_HAS_ERROR = 1 << 36, 1 << 38, 1 << 44


def intercept_bit(exit_code: int) -> int:
    """The bit of ``intercepts`` that makes the CPU exit with ``exit_code`` (0x60–0x9F)."""
    return 1 << (exit_code - EXIT_INTR)


def event(kind: int, vector: int, error_code: int | None = None) -> int:
    """A value for ``event_injection``."""
    if error_code is None:
        return EVENT_VALID | kind | vector
    return EVENT_VALID | kind | EVENT_HAS_ERROR | vector | (error_code & 0xFFFFFFFF) << 32


_REASONS = {
    EXIT_INTR: "interrupt", EXIT_VINTR: "interrupt_window", EXIT_RDTSC: "rdtsc", EXIT_RDTSCP: "rdtsc", 0x6F: "rdpmc",
    0x70: "pushf", 0x71: "popf", EXIT_CPUID: "cpuid", EXIT_IRET: "iret", 0x75: "software_interrupt", EXIT_HLT: "hlt", 0x79: "invlpg",
    EXIT_IOIO: "io", EXIT_MSR: "msr", EXIT_SHUTDOWN: "shutdown", EXIT_VMMCALL: "vmmcall", EXIT_NPF: "nested_page_fault",
    EXIT_EXCEPTION + 14: "page_fault", EXIT_TASK_SWITCH: "task_switch",
}


def exit_reason(code: int) -> str:
    """The ledger's name (:data:`vmlab.ledger.EXIT_REASONS`) of an exit code."""
    if code in _REASONS:
        return _REASONS[code]
    for first, end, name in ((0x00, 0x10, "cr_read"), (0x10, 0x20, "cr_write"), (0x20, 0x40, "dr_access"),
                             (0x40, 0x60, "exception"), (0x66, 0x6E, "descriptor_table")):
        if first <= code < end:
            return name
    return "other"


class Vmcb:
    """Fields of the VMCB at host-physical ``address``, which is page aligned."""

    def __init__(self, ram: Ram, address: int) -> None:
        self.address = address
        self.bytes = ram.bytes

    def __getitem__(self, field: str) -> int:
        offset, code = FIELDS[field]
        value: int = code.unpack_from(self.bytes, self.address + offset)[0]
        return value

    def __setitem__(self, field: str, value: int) -> None:
        offset, code = FIELDS[field]
        code.pack_into(self.bytes, self.address + offset, value)

    def entry_controls(self) -> tuple[int, int, int, int, int]:
        """What VMRUN acts on: tsc_offset, interrupt_control, nested_control, event_injection, nested_cr3."""
        tsc_offset, interrupts, nested, event, root = _CONTROLS.unpack_from(self.bytes, self.address + 0x50)
        return tsc_offset, interrupts, nested, event, root

    def checked(self) -> bytes:
        """The bytes that VMRUN's checks of consistency look at."""
        at = self.address
        return bytes(self.bytes[at + 0x0C:at + 0x14]) + bytes(self.bytes[at + 0x58:at + 0x5C]) + bytes(self.bytes[at + 0x4D0:at + 0x570])

    def clear(self) -> None:
        """All fields zero."""
        self.bytes[self.address:self.address + 0x1000] = bytes(0x1000)

    def segment(self, name: str) -> Segment:
        """One of :data:`SEGMENTS`, its attributes spread to where a descriptor has them (APM Vol. 2 §15.5.1)."""
        attributes = self[f"{name}.attributes"]
        return Segment(self[f"{name}.selector"], self[f"{name}.base"], self[f"{name}.limit"],
                       (attributes & 0xFF) << 8 | (attributes & 0xF00) << 12)

    def set_segment(self, name: str, value: Segment) -> None:
        """Store a descriptor cache: attributes are bits 8–15 and 20–23 of the descriptor's high doubleword."""
        self[f"{name}.selector"], self[f"{name}.base"], self[f"{name}.limit"] = value.selector, value.base, value.limit
        self[f"{name}.attributes"] = (value.flags >> 8) & 0xFF | (value.flags >> 12) & 0xF00


    def switched_segments(self) -> tuple[Segment, ...]:
        """ES, CS, SS, DS."""
        at = self.address + _SEGMENTS_AT
        return _unpack_segments(bytes(self.bytes[at:at + _FOUR_SEGMENTS.size]))

    def set_switched_segments(self, segments: Iterable[Segment]) -> None:
        """Store ES, CS, SS, DS."""
        flat: list[int] = []
        for s in segments:
            flat += s.selector, (s.flags >> 8) & 0xFF | (s.flags >> 12) & 0xF00, s.limit, s.base
        _FOUR_SEGMENTS.pack_into(self.bytes, self.address + _SEGMENTS_AT, *flat)

    def switched_registers(self) -> tuple[int, ...]:
        """Those of :data:`SWITCHED_REGISTERS`."""
        return _SEVEN_REGISTERS.unpack_from(self.bytes, self.address + _REGISTERS_AT)

    def set_switched_registers(self, *values: int) -> None:
        """Store those of :data:`SWITCHED_REGISTERS`."""
        _SEVEN_REGISTERS.pack_into(self.bytes, self.address + _REGISTERS_AT, *values)


@functools.lru_cache(maxsize=1024)
def _unpack_segments(raw: bytes) -> tuple[Segment, ...]:
    flat = _FOUR_SEGMENTS.unpack(raw)
    return tuple(Segment(flat[i], flat[i + 3], flat[i + 2], (flat[i + 1] & 0xFF) << 8 | (flat[i + 1] & 0xF00) << 12)
                 for i in range(0, 16, 4))


class CountedVmcb(Vmcb):
    """The VMM's way to the VMCB: each field read and written is an event, so that the same policy can be
    priced where fields cost an instruction each (Intel's VMREAD and VMWRITE)."""

    def __init__(self, ram: Ram, address: int, counts: Counts) -> None:
        super().__init__(ram, address)
        self.counts = counts

    def __getitem__(self, field: str) -> int:
        self.counts["vmcb.read"] += 1
        offset, code = FIELDS[field]
        value: int = code.unpack_from(self.bytes, self.address + offset)[0]
        return value

    def __setitem__(self, field: str, value: int) -> None:
        self.counts["vmcb.write"] += 1
        offset, code = FIELDS[field]
        code.pack_into(self.bytes, self.address + offset, value)
