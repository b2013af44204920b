"""The hardware task switch of 32-bit protected mode: through a task gate, by a far JMP or CALL, and back by IRET with NT.

A kernel gives its double-fault handler a task so that it has a stack of its own when the kernel's is at fault.
Follows SDM Vol. 3A §7.3, tables 7-1 and 7-2, figure 7-2. The bare machine does it but for IRET, which is Unicorn's own (a hook on every
IRET would slow down every handler); a VMM does all of it on the guest's virtual CPU. There is no LDT.
"""

from __future__ import annotations

import enum
import struct
from typing import Protocol

from vmlab.errors import GuestError, UnsupportedByStrategy
from vmlab.machine.cpu import NT, VM, Segment
from vmlab.machine.decode import Instruction
from vmlab.machine.delivery import GENERAL_PROTECTION, INVALID_TSS, NOT_PRESENT, STACK_FAULT, DeliveringCpu, Fault, read_descriptor
from vmlab.machine.paging import PageFault
from vmlab.machine.state import CS, DS, ES, FS, GS, RSP, SS

_SIZE = 0x68
_SEGMENTS = (ES, CS, SS, DS, FS, GS)
_REAL = 0x0000F300                  # a segment of virtual-8086 mode: present, DPL 3, writable data
_LINK, _CR3, _EIP, _EFLAGS, _SELECTORS, _LDT = 0x00, 0x1C, 0x20, 0x24, 0x48, 0x60
_AVAILABLE, _BUSY, _GATE = 0x9, 0xB, 0x5
_NARROW = (0x1, 0x3)               # of the 80286
_BUSY_BIT = 0x2
_TASK_SWITCHED = 1 << 3             # CR0.TS
#: The instructions that may switch tasks; all but INT n, which goes through the IDT.
INSTRUCTIONS = frozenset({"jmp_far", "call_far", "iret"})


class Reason(enum.Enum):
    """What leaves the running task (SDM Vol. 3A table 7-2)."""

    GATE = "an event through a task gate: the new task is nested in the old one"
    CALL = "a far CALL: likewise"
    JUMP = "a far JMP: the old task is no longer busy"
    RETURN = "IRET with NT: back to the task that the link names"


class TaskCpu(DeliveringCpu, Protocol):
    """What a task switch needs of a CPU beyond delivery. ``virtual_8086``: it can run a task of that mode."""

    virtual_8086: bool

    def task_selector(self, number: int) -> int:
        """The selector that the outgoing task's TSS is to hold."""

    def set_table(self, name: str, value: Segment) -> None: ...

    def set_cr(self, number: int, value: int) -> None: ...


def switch(cpu: TaskCpu, selector: int, error_code: int | None, return_rip: int, reason: Reason = Reason.GATE) -> None:
    """Leave the running task for the one whose TSS ``selector`` names; the error code of an event is pushed there.

    :raises Fault: as the CPU would; a fault after CR3 is loaded happens in the new task.
    :raises GuestError: at a 16-bit TSS.
    :raises UnsupportedByStrategy: at a task of virtual-8086 mode where the CPU's owner cannot run one.
    """
    returns, nests = reason is Reason.RETURN, reason in (Reason.GATE, Reason.CALL)
    wrong = INVALID_TSS if reason in (Reason.GATE, Reason.RETURN) else GENERAL_PROTECTION
    new = read_descriptor(cpu, selector, wrong)
    kind = new.flags >> 8 & 0x1F
    if kind in _NARROW:
        raise GuestError(f"the guest at {cpu.rip:#x} switches to the 16-bit task {selector:#x}; only 32-bit tasks are carried")
    if kind != (_BUSY if returns else _AVAILABLE) or selector & 4:
        raise Fault(wrong, selector & 0xFFFC)
    if not new.flags & 1 << 15:
        raise Fault(NOT_PRESENT, selector & 0xFFFC)
    if new.limit < _SIZE - 1:
        raise Fault(INVALID_TSS, selector & 0xFFFC)
    old, gdt = cpu.table("tr"), cpu.table("gdt").base
    if old.limit < _SIZE - 1:
        raise Fault(INVALID_TSS, old.selector & 0xFFFC)
    marks = ([(old.selector, False)] if reason in (Reason.JUMP, Reason.RETURN) else []) + ([] if returns else [(selector, True)])
    try:
        saved = bytearray(cpu.read_linear(old.base, _SIZE))
        task = bytearray(cpu.read_linear(new.base, _SIZE))
        kinds = [(gdt + (marked & ~7) + 5, cpu.read_linear(gdt + (marked & ~7) + 5, 1)[0], busy) for marked, busy in marks]
        # Everything is probed before anything is changed: a fault so far is the old task's.
        cpu.write_linear(old.base, bytes(saved))
        if nests:
            cpu.write_linear(new.base, bytes(task[:2]))
        for at, kind, _ in kinds:
            cpu.write_linear(at, bytes((kind,)))
    except PageFault as fault:
        raise Fault(14, fault.error_code, fault.address) from fault
    ldt = struct.unpack_from("<H", task, _LDT)[0]
    if ldt & 0xFFFC:
        raise Fault(INVALID_TSS, ldt & 0xFFFC)
    if struct.unpack_from("<I", task, _EFLAGS)[0] & VM and not cpu.virtual_8086:
        raise UnsupportedByStrategy(
            f"the guest at {cpu.rip:#x} switches to a task of virtual-8086 mode ({selector:#x}), which runs at ring 3 with the kernel's "
            "interrupt flag and IOPL; of the VMMs only a hardware-assisted one carries it")
    flags = cpu.eflags & 0xFFFFFFFF
    struct.pack_into("<II8I", saved, _EIP, return_rip & 0xFFFFFFFF, flags & ~NT if returns else flags, *(cpu.gpr(i) & 0xFFFFFFFF for i in range(8)))
    for i, number in enumerate(_SEGMENTS):
        struct.pack_into("<H", saved, _SELECTORS + 4 * i, cpu.task_selector(number))
    cpu.write_linear(old.base, bytes(saved))
    if nests:
        cpu.write_linear(new.base, struct.pack("<H", old.selector))
    for at, kind, busy in kinds:
        cpu.write_linear(at, bytes((kind | _BUSY_BIT if busy else kind & ~_BUSY_BIT,)))
    # Unicorn stops the process at a task register that is marked busy, so the cache keeps the type of an available TSS.
    cpu.set_table("tr", Segment(selector & 0xFFFC, new.base, new.limit, new.flags & ~(_BUSY_BIT << 8)))
    cpu.set_cr(0, cpu.cr(0) | _TASK_SWITCHED)
    if cpu.cr(0) >> 31:
        cpu.set_cr(3, struct.unpack_from("<I", task, _CR3)[0])
    _load(cpu, task, nests)
    if error_code is not None:
        top = cpu.gpr(RSP) - 4 & 0xFFFFFFFF
        try:
            cpu.write_linear(cpu.segment(SS).base + top & 0xFFFFFFFF, struct.pack("<I", error_code))
        except PageFault as fault:
            raise Fault(14, fault.error_code, fault.address) from fault
        cpu.set_gpr(RSP, top)
    cpu.forget_exception()


def _load(cpu: TaskCpu, task: bytearray, nested: bool) -> None:
    """The registers of the new task; from here on faults are its own."""
    rip, flags, *registers = struct.unpack_from("<II8I", task, _EIP)
    for number, value in enumerate(registers):
        cpu.set_gpr(number, value)
    cpu.rip = rip
    cpu.clear_shadow()
    selectors = dict(zip(_SEGMENTS, (struct.unpack_from("<H", task, _SELECTORS + 4 * i)[0] for i in range(len(_SEGMENTS))), strict=True))
    ring = 3 if flags & VM else selectors[CS] & 3
    cpu.eflags = flags | (NT if nested else 0) | 2
    if flags & VM:
        for number, value in selectors.items():
            cpu.set_segment(number, Segment(value, value << 4, 0xFFFF, _REAL))
        cpu.set_cpl(ring)
    else:
        cpu.set_segment(CS, _code(cpu, selectors[CS]))
        cpu.set_cpl(ring)
        cpu.set_segment(SS, _stack(cpu, selectors[SS], ring))
        for number in (DS, ES, FS, GS):
            cpu.set_segment(number, _data(cpu, selectors[number], ring))


def _present(found: Segment, vector: int = NOT_PRESENT) -> Segment:
    if not found.flags & 1 << 15:
        raise Fault(vector, found.selector & 0xFFFC)
    return found


def _code(cpu: TaskCpu, selector: int) -> Segment:
    """CS of a new task: its RPL is the new CPL, and a conforming segment may be of an inner ring (SDM Vol. 3A table 7-1)."""
    if not selector & 0xFFFC:
        raise Fault(INVALID_TSS, 0)
    found = read_descriptor(cpu, selector, INVALID_TSS)
    conforming = bool(found.flags & 1 << 10)
    if found.flags >> 11 & 3 != 3 or (found.dpl > selector & 3 if conforming else found.dpl != selector & 3):
        raise Fault(INVALID_TSS, selector & 0xFFFC)
    return _present(found)


def _stack(cpu: TaskCpu, selector: int, ring: int) -> Segment:
    if not selector & 0xFFFC:
        raise Fault(INVALID_TSS, 0)
    found = read_descriptor(cpu, selector, INVALID_TSS)
    writable = found.flags >> 11 & 3 == 2 and found.flags & 1 << 9
    if not writable or found.dpl != ring or selector & 3 != ring:
        raise Fault(INVALID_TSS, selector & 0xFFFC)
    return _present(found, STACK_FAULT)


def _data(cpu: TaskCpu, selector: int, ring: int) -> Segment:
    if not selector & 0xFFFC:
        return Segment(selector, 0, 0, 0)
    found = read_descriptor(cpu, selector, INVALID_TSS)
    code, conforming = found.flags >> 11 & 1, found.flags & 0x0C00 == 0x0C00
    readable = found.flags & 1 << 12 and (not code or found.flags & 1 << 9)
    if not readable or (not conforming and found.dpl < max(ring, selector & 3)):
        raise Fault(INVALID_TSS, selector & 0xFFFC)
    return _present(found)


def wanted(cpu: DeliveringCpu, instruction: Instruction, target: int | None) -> tuple[int, Reason] | None:
    """The TSS that this instruction would switch to, and why; None where it does not, or would fault before it does.

    :param target: the selector of a far JMP or CALL.
    :raises PageFault: when descriptor or link cannot be read.
    """
    if cpu.long_mode or not cpu.cr(0) & 1 or cpu.eflags & VM:
        return None
    if target is None:
        if instruction.op != "iret" or not cpu.eflags & NT:
            return None
        return int.from_bytes(cpu.read_linear(cpu.table("tr").base + _LINK, 2), "little"), Reason.RETURN
    reason = Reason.JUMP if instruction.op == "jmp_far" else Reason.CALL
    try:
        found = read_descriptor(cpu, target)
        kind = found.flags >> 8 & 0x1F
        if not target & 0xFFFC or kind not in (_AVAILABLE, _GATE, *_NARROW[:1]) or found.dpl < max(cpu.cpl, target & 3):
            return None
        if kind != _GATE:
            return target, reason
        return (found.base & 0xFFFF, reason) if found.flags & 1 << 15 else None
    except Fault:
        return None
