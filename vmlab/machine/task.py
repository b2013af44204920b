"""The hardware task switch of 32-bit protected mode, as far as a kernel uses it: an exception through a task gate.

A kernel gives its double-fault handler a task so that it has a stack of its own when the kernel's is at fault.
Follows SDM Vol. 3A §7.3 and figure 7-2. Only the bare CPU does this; there is no LDT, and no way back by IRET
with NT set, because such a handler does not return.
"""

from __future__ import annotations

import struct

from vmlab.machine.cpu import NT, Cpu, Segment
from vmlab.machine.delivery import INVALID_TSS, NOT_PRESENT, Fault, read_descriptor
from vmlab.machine.paging import PageFault
from vmlab.machine.state import CS, DS, ES, FS, GS, RSP, SS

_SIZE = 0x68
_SEGMENTS = (ES, CS, SS, DS, FS, GS)
_LINK, _CR3, _EIP, _REGISTERS, _SELECTORS, _LDT = 0x00, 0x1C, 0x20, 0x28, 0x48, 0x60
_AVAILABLE, _BUSY = 0x9, 0xB
_TASK_SWITCHED = 1 << 3             # CR0.TS


def switch(cpu: Cpu, selector: int, error_code: int | None, return_rip: int) -> None:
    """Leave the running task for the one whose TSS ``selector`` names, nested in it, and push the error code there.

    :raises Fault: as the CPU would; a fault after CR3 is loaded happens in the new task.
    """
    new = read_descriptor(cpu, selector, INVALID_TSS)
    if new.flags >> 8 & 0x1F != _AVAILABLE or new.limit < _SIZE - 1:
        raise Fault(INVALID_TSS, selector & 0xFFFC)
    if not new.flags & 1 << 15:
        raise Fault(NOT_PRESENT, selector & 0xFFFC)
    old = cpu.table("tr")
    try:
        saved = bytearray(cpu.read_linear(old.base, _SIZE))
        task = bytearray(cpu.read_linear(new.base, _SIZE))
        ldt = struct.unpack_from("<H", task, _LDT)[0]
        if ldt & 0xFFFC:
            raise Fault(INVALID_TSS, ldt & 0xFFFC)
        struct.pack_into("<II8I", saved, _EIP, return_rip & 0xFFFFFFFF, cpu.eflags & 0xFFFFFFFF, *(cpu.gpr(i) & 0xFFFFFFFF for i in range(8)))
        struct.pack_into("<6I", saved, _SELECTORS, *(cpu.selector(i) for i in _SEGMENTS))
        struct.pack_into("<I", task, _LINK, old.selector)
        cpu.write_linear(old.base, bytes(saved))
        cpu.write_linear(new.base, bytes(task))
        at = cpu.table("gdt").base + (selector & ~7) + 5
        cpu.write_linear(at, bytes((cpu.read_linear(at, 1)[0] | _BUSY & ~_AVAILABLE,)))
    except PageFault as fault:
        raise Fault(14, fault.error_code, fault.address) from fault
    # Unicorn stops the process at a task register that is marked busy, so the cache keeps the type of an available TSS.
    cpu.set_table("tr", Segment(selector & 0xFFFC, new.base, new.limit, new.flags))
    cpu.set_cr(0, cpu.cr(0) | _TASK_SWITCHED)
    cpu.set_cr(3, struct.unpack_from("<I", task, _CR3)[0])
    rip, flags, *registers = struct.unpack_from("<II8I", task, _EIP)
    for number, value in enumerate(registers):
        cpu.set_gpr(number, value)
    selectors = struct.unpack_from("<6H", b"".join(task[_SELECTORS + 4 * i : _SELECTORS + 4 * i + 2] for i in range(6)))
    for number, value in zip(_SEGMENTS, selectors, strict=True):
        if value & 0xFFFC:
            segment = read_descriptor(cpu, value, INVALID_TSS)
            if not segment.flags & 1 << 15:
                raise Fault(NOT_PRESENT, value & 0xFFFC)
        elif number in (CS, SS):
            raise Fault(INVALID_TSS, 0)
        else:
            segment = Segment(value, 0, 0, 0)
        cpu.set_segment(number, segment)
    cpu.set_cpl(selectors[1] & 3)
    cpu.eflags = flags | NT | 2
    cpu.rip = rip
    cpu.clear_shadow()
    if error_code is not None:
        top = cpu.gpr(RSP) - 4 & 0xFFFFFFFF
        try:
            cpu.write_linear(cpu.segment(SS).base + top & 0xFFFFFFFF, struct.pack("<I", error_code))
        except PageFault as fault:
            raise Fault(14, fault.error_code, fault.address) from fault
        cpu.set_gpr(RSP, top)
    cpu.forget_exception()
