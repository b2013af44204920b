"""Interrupts and exceptions through the IDT: what the CPU does and Unicorn leaves out.

Follows SDM Vol. 3A §6.12 (protected mode) and §6.14 (IA-32e mode): gate, privilege, stack from the TSS
or IST, frame, error code, then flags. A fault on the way becomes a double fault by the table of
§6.15 "Interrupt 8", a fault while delivering that one shuts the CPU down.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Protocol

from vmlab.errors import GuestError, TripleFault
from vmlab.machine.cpu import IF, NT, RF, TF, VM, Segment, unpack_descriptor
from vmlab.machine.paging import PageFault
from vmlab.machine.state import CS, DS, ES, FS, GS, RSP, SS

INVALID_OPCODE, DOUBLE_FAULT, INVALID_TSS, NOT_PRESENT, STACK_FAULT, GENERAL_PROTECTION, PAGE_FAULT = 6, 8, 10, 11, 12, 13, 14
HAS_ERROR_CODE = frozenset({8, 10, 11, 12, 13, 14, 17})
_CONTRIBUTORY = frozenset({0, 10, 11, 12, 13})
_INTERRUPT_GATES = (0x6, 0xE)
_TASK_GATE = 0x5


class Fault(Exception):
    """An exception raised by the machine itself while it carries out a step of the CPU."""

    def __init__(self, vector: int, error_code: int | None = None, address: int | None = None) -> None:
        super().__init__(f"exception {vector}")
        self.vector, self.error_code, self.address = vector, error_code, address


#: (vector, error code, software, external) of the event under way, and the fault that its delivery raised.
Diverter = Callable[[int, int | None, bool, bool, Fault], None]
#: Enters the task of a task gate: vector, TSS selector, error code, where the old task goes on.
TaskSwitch = Callable[[int, int, int | None, int], None]


class DeliveringCpu(Protocol):
    """What delivery needs of a CPU: the physical one, or a VMM's virtual one with the guest's tables."""

    rip: int
    eflags: int
    cr2: int

    @property
    def cpl(self) -> int: ...

    @property
    def long_mode(self) -> bool: ...

    def cr(self, number: int) -> int: ...

    def gpr(self, number: int) -> int: ...

    def set_gpr(self, number: int, value: int, size: int = 4) -> None: ...

    def selector(self, number: int) -> int: ...

    def segment(self, number: int) -> Segment: ...

    def set_segment(self, number: int, value: Segment) -> None: ...

    def table(self, name: str) -> Segment: ...

    def set_cpl(self, cpl: int) -> None: ...

    def clear_shadow(self) -> None: ...

    def forget_exception(self) -> None: ...

    def read_linear(self, address: int, size: int, *, user: bool = False) -> bytes: ...

    def write_linear(self, address: int, data: bytes, *, user: bool = False) -> None: ...


def deliver(cpu: DeliveringCpu, vector: int, error_code: int | None = None, *, software: bool = False,
            return_rip: int | None = None, fault_rip: int | None = None, external: bool = False,
            on_fault: Diverter | None = None, on_task: TaskSwitch | None = None) -> int:
    """Enter the handler of ``vector``; returns the vector that was really delivered (8 after a double fault).

    :param software: INT n: the gate's DPL is checked against CPL.
    :param return_rip: pushed as the return address; default the CPU's RIP.
    :param fault_rip: where RIP points if a fault takes the place of a software interrupt.
    :param external: a device interrupt: a fault on the way does not make a double fault.
    :param on_fault: told of each fault on the way before it takes effect; what it raises ends the delivery.
    :param on_task: carries out a task switch; without it a task gate ends the run.
    :raises TripleFault: when the double fault cannot be delivered either.
    :raises GuestError: at a task gate where nobody switches tasks.
    """
    return_rip = cpu.rip if return_rip is None else return_rip
    try:
        _enter(cpu, vector, error_code, return_rip, software=software, on_task=on_task)
        return vector
    except Fault as second:
        if fault_rip is not None:
            cpu.rip = fault_rip
        if on_fault is not None:
            on_fault(vector, error_code, software, external, second)
        if second.vector == PAGE_FAULT and second.address is not None:
            cpu.cr2 = second.address    # only now: a page fault that a VMM intercepts leaves CR2 alone
        if vector == DOUBLE_FAULT:
            raise TripleFault(_last_words(cpu, second)) from second
        if not (software or external) and doubles(vector, second.vector):
            return deliver(cpu, DOUBLE_FAULT, 0, on_fault=on_fault, on_task=on_task)
        return deliver(cpu, second.vector, second.error_code, on_fault=on_fault, on_task=on_task)


def doubles(first: int, second: int) -> bool:
    """Whether ``second``, raised while exception ``first`` was being delivered, makes a double fault (SDM Vol. 3A table 6-5)."""
    return (first in _CONTRIBUTORY and second in _CONTRIBUTORY) or (
        first == PAGE_FAULT and (second in _CONTRIBUTORY or second == PAGE_FAULT))


def _last_words(cpu: DeliveringCpu, fault: Fault) -> str:
    return (f"triple fault at {cpu.rip:#x}: exception {fault.vector} while delivering a double fault "
            f"(IDT at {cpu.table('idt').base:#x}, limit {cpu.table('idt').limit:#x})")


def read_descriptor(cpu: DeliveringCpu, selector: int, vector: int = GENERAL_PROTECTION, ext: int = 0) -> Segment:
    """The descriptor that ``selector`` names in the GDT or LDT; raises :class:`Fault` (``vector``) outside its limit."""
    table = cpu.table("ldt" if selector & 4 else "gdt")
    offset = selector & ~7
    if offset + 7 > table.limit:
        raise Fault(vector, (selector & 0xFFFC) + ext)
    return unpack_descriptor(_read(cpu, table.base + offset, 8), selector)


def _read(cpu: DeliveringCpu, address: int, size: int) -> bytes:
    try:
        return cpu.read_linear(address, size)
    except PageFault as fault:
        raise Fault(PAGE_FAULT, fault.error_code, fault.address) from fault


def _write(cpu: DeliveringCpu, address: int, data: bytes, user: bool) -> None:
    try:
        cpu.write_linear(address, data, user=user)
    except PageFault as fault:
        raise Fault(PAGE_FAULT, fault.error_code, fault.address) from fault


def _enter(cpu: DeliveringCpu, vector: int, error_code: int | None, return_rip: int, *, software: bool,
           on_task: TaskSwitch | None) -> None:
    if not cpu.cr(0) & 1:
        _enter_real_mode(cpu, vector, return_rip)
        return
    long_mode = cpu.long_mode
    ext = int(not software)  # SDM Vol. 3A §6.13: set for interrupts and earlier exceptions alike
    idt = cpu.table("idt")
    size = 16 if long_mode else 8
    if vector * size + size - 1 > idt.limit:
        raise Fault(GENERAL_PROTECTION, vector * 8 + 2 + ext)
    raw = _read(cpu, idt.base + vector * size, size)
    low, selector, ist, kind, middle = struct.unpack_from("<HHBBH", raw)
    offset = low | middle << 16
    if long_mode:
        offset |= struct.unpack_from("<I", raw, 8)[0] << 32
    gate = kind & 0x1F
    if gate not in ((0xE, 0xF) if long_mode else (_TASK_GATE, 0x6, 0x7, 0xE, 0xF)):
        raise Fault(GENERAL_PROTECTION, vector * 8 + 2 + ext)
    cpl = cpu.cpl
    if software and (kind >> 5) & 3 < cpl:
        raise Fault(GENERAL_PROTECTION, vector * 8 + 2)
    if not kind & 0x80:
        raise Fault(NOT_PRESENT, vector * 8 + 2 + ext)
    if gate == _TASK_GATE:
        if on_task is None:
            raise GuestError(f"exception {vector} at {return_rip:#x} goes to a task of its own, and nobody here switches tasks")
        on_task(vector, selector, error_code, return_rip)
        return
    if not selector & 0xFFFC:
        raise Fault(GENERAL_PROTECTION, ext)
    code = read_descriptor(cpu, selector, ext=ext)
    if not code.flags & (1 << 12) or not code.flags & (1 << 11) or code.dpl > cpl:
        raise Fault(GENERAL_PROTECTION, (selector & 0xFFFC) + ext)
    if not code.flags & (1 << 15):
        raise Fault(NOT_PRESENT, (selector & 0xFFFC) + ext)
    if long_mode and code.flags & (0x60 << 16) != 0x20 << 16:  # L without D
        raise Fault(GENERAL_PROTECTION, (selector & 0xFFFC) + ext)
    new_cpl = cpl if code.flags & (1 << 10) else code.dpl
    flags = cpu.eflags
    virtual_8086 = bool(flags & VM)
    if virtual_8086 and new_cpl:
        raise Fault(GENERAL_PROTECTION, (selector & 0xFFFC) + ext)     # SDM Vol. 3A §20.3.1: only ring 0 handles what leaves it
    old_ss, old_sp, old_cs = cpu.selector(SS), cpu.gpr(RSP), cpu.selector(CS)
    wide = bool(gate & 8)
    values = [return_rip, old_cs, flags]
    new_ss: Segment | None = None
    if long_mode:
        if ist & 7:
            sp = _tss_stack64(cpu, 0x24 + 8 * ((ist & 7) - 1))
        elif new_cpl < cpl:
            sp = _tss_stack64(cpu, 4 + 8 * new_cpl)
        else:
            sp = old_sp
        sp &= ~15
        values += [old_sp, old_ss]
        if new_cpl < cpl:
            new_ss = Segment(new_cpl, 0, 0xFFFFFFFF, 0x00CF9300 | new_cpl << 13)
    elif new_cpl < cpl:
        sp, new_ss = _tss_stack32(cpu, new_cpl, ext)
        values += [old_sp & 0xFFFFFFFF, old_ss]
        if virtual_8086:
            values += [cpu.selector(number) for number in (ES, DS, FS, GS)]
    else:
        sp = old_sp
    if error_code is not None:
        values.insert(0, error_code)
    item, mask = ("Q", 0xFFFFFFFFFFFFFFFF) if long_mode else ("I", 0xFFFFFFFF) if wide else ("H", 0xFFFF)
    frame = struct.pack(f"<{len(values)}{item}", *[value & mask for value in values])
    stack = new_ss or cpu.segment(SS)
    if long_mode:
        top = sp - len(frame)
        _write(cpu, top, frame, user=new_cpl == 3)
        cpu.set_gpr(RSP, top, 8)
    else:
        mask = 0xFFFFFFFF if stack.flags & (1 << 22) else 0xFFFF
        top = (sp - len(frame)) & mask
        _write(cpu, (stack.base + top) & 0xFFFFFFFF, frame, user=new_cpl == 3)
        cpu.set_gpr(RSP, top, 4 if mask > 0xFFFF else 2)
    if new_ss is not None:
        cpu.set_segment(SS, new_ss)
    if virtual_8086:
        for number in (ES, DS, FS, GS):
            cpu.set_segment(number, Segment(0, 0, 0, 0))
    cpu.set_segment(CS, Segment((selector & 0xFFFC) | new_cpl, code.base, code.limit, code.flags | 0x100))
    cpu.set_cpl(new_cpl)
    cpu.clear_shadow()
    new_flags = flags & ~(TF | NT | RF | VM)
    if gate in _INTERRUPT_GATES:
        new_flags &= ~IF
    cpu.eflags = new_flags
    cpu.rip = offset if long_mode or wide else offset & 0xFFFF
    cpu.forget_exception()


def _tss_stack64(cpu: DeliveringCpu, offset: int) -> int:
    tss = cpu.table("tr")
    if offset + 7 > tss.limit:
        raise Fault(INVALID_TSS, tss.selector & 0xFFFC)
    return int(struct.unpack("<Q", _read(cpu, tss.base + offset, 8))[0])


def _tss_stack32(cpu: DeliveringCpu, level: int, ext: int) -> tuple[int, Segment]:
    """ESP and SS for ring ``level`` from a 32-bit TSS (SDM Vol. 3A figure 7-2)."""
    tss = cpu.table("tr")
    if 4 + 8 * level + 5 > tss.limit:
        raise Fault(INVALID_TSS, (tss.selector & 0xFFFC) + ext)
    sp, selector = struct.unpack("<IH", _read(cpu, tss.base + 4 + 8 * level, 6))
    if not selector & 0xFFFC or selector & 3 != level:
        raise Fault(INVALID_TSS, (selector & 0xFFFC) + ext)
    segment = read_descriptor(cpu, selector, INVALID_TSS, ext)
    writable_data = segment.flags & (1 << 12) and not segment.flags & (1 << 11) and segment.flags & (1 << 9)
    if segment.dpl != level or not writable_data:
        raise Fault(INVALID_TSS, (selector & 0xFFFC) + ext)
    if not segment.flags & (1 << 15):
        raise Fault(STACK_FAULT, (selector & 0xFFFC) + ext)
    return sp, segment


def _enter_real_mode(cpu: DeliveringCpu, vector: int, return_rip: int) -> None:
    """Real-address mode: the vector table at IDTR.base (SDM Vol. 3A §20.1.4)."""
    idt = cpu.table("idt")
    if vector * 4 + 3 > idt.limit:
        raise Fault(DOUBLE_FAULT if vector != DOUBLE_FAULT else GENERAL_PROTECTION)
    offset, selector = struct.unpack("<HH", _read(cpu, idt.base + vector * 4, 4))
    top = (cpu.gpr(RSP) - 6) & 0xFFFF
    frame = struct.pack("<HHH", return_rip & 0xFFFF, cpu.selector(CS), cpu.eflags & 0xFFFF)
    _write(cpu, cpu.segment(SS).base + top, frame, user=False)
    cpu.set_gpr(RSP, top, 2)
    cpu.set_segment(CS, Segment(selector, selector << 4, 0xFFFF, cpu.segment(CS).flags))
    cpu.eflags = cpu.eflags & ~(IF | TF)
    cpu.clear_shadow()
    cpu.rip = offset
    cpu.forget_exception()
