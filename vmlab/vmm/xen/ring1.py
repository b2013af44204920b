"""The way in and out of a 32-bit guest: its kernel in ring 1, its users in ring 3, hypercalls by INT 0x82.

INT 0x80 may go from ring 3 to ring 1 with no hypervisor between. Frames are those of arch-x86/xen-x86_32.h.
"""

from __future__ import annotations

import struct

from vmlab.errors import GuestFault, GuestRefused
from vmlab.machine.cpu import IF, IOPL, NT, RF, TF, VM, Segment
from vmlab.machine.paging import PageFault
from vmlab.machine.state import CS, RAX, RBX, RCX, RDI, RDX, RSI, RSP, SS
from vmlab.vmm import xen
from vmlab.vmm.xen.hypervisor import PAGE_FAULT, Hypervisor


class NarrowHypervisor(Hypervisor):
    """The hypervisor of a 32-bit guest."""

    argument_registers = (RBX, RCX, RDX, RSI, RDI)

    def exception(self, vector: int, error_code: int | None, *, software: bool) -> None:
        """INT 0x82 is a hypercall, and comes first: most entries are one."""
        if software and vector == xen.HYPERCALL_VECTOR:
            self.hypercall()
            self.deliver_events()
        else:
            super().exception(vector, error_code, software=software)

    def software(self, vector: int) -> bool:
        """No other INT n is more than the guest's own."""
        return False

    def enter(self, cs: int, eip: int, error_code: int | None) -> None:
        """Build the frame of an interrupt on the guest's kernel stack and go to ``cs:eip`` in ring 1.

        EFLAGS.IF in it is the guest's upcall mask the other way round, and the mask stands in the high half of
        CS's word too (arch-x86/xen-x86_32.h: struct cpu_user_regs).
        """
        cpu = self.cpu
        masked = self.domain.shared.masked
        flags = (cpu.eflags & ~(IF | IOPL)) | (0 if masked else IF)
        words = [cpu.rip, cpu.selector(CS) | int(masked) << 16, flags]
        if cpu.cpl == 3:
            words += [cpu.gpr(RSP) & 0xFFFFFFFF, cpu.selector(SS)]
            ss, esp = self.kernel_stack
            stack: Segment | None = self.domain.tables.descriptor(ss)
        else:
            esp, stack = cpu.gpr(RSP) & 0xFFFFFFFF, None
        if error_code is not None:
            words.insert(0, error_code)
        esp = (esp - 4 * len(words)) & 0xFFFFFFFF
        self.push(esp, struct.pack(f"<{len(words)}I", *words))
        if stack is not None:
            cpu.set_segment(SS, stack)
        cpu.set_segment(CS, self._code(cs))
        cpu.set_cpl(1)
        cpu.set_gpr(RSP, esp)
        cpu.eflags = (cpu.eflags & ~(TF | NT | RF | VM)) | IF
        cpu.rip = eip

    def _code(self, selector: int) -> Segment:
        """A code segment of the guest's; ends a guest that names another."""
        if selector not in (xen.FLAT_RING1_CS, xen.FLAT_RING3_CS):
            raise GuestRefused(f"the guest asked to run with the code selector {selector:#x}")
        return self.domain.tables.descriptor(selector)

    def open_gates(self) -> None:
        """Hypercalls from ring 1, what the guest opened to its users, and perhaps INT 0x80 past the hypervisor."""
        gates = {xen.HYPERCALL_VECTOR: 1}
        for vector, trap in self.traps.items():
            if vector != xen.HYPERCALL_VECTOR:
                gates[vector] = max(trap.level, 0)
        direct = self.traps.get(xen.SYSCALL_VECTOR)
        if direct is not None and (direct.mask_events or direct.level < 3 or not self.direct_calls):
            direct = None           # no CPU can set a mask in memory on its way: then it must come through here
        self.domain.tables.set_direct_gate(xen.SYSCALL_VECTOR, direct)
        self.machine.software_gates = gates
        self.machine.direct_gates = frozenset() if direct is None else frozenset((xen.SYSCALL_VECTOR,))

    def set_kernel_stack(self, ss: int, esp: int) -> None:
        super().set_kernel_stack(ss, esp)
        self.domain.tables.set_kernel_stack(ss, esp)

    def iret(self) -> None:
        """HYPERVISOR_iret: EAX, then the frame of an IRET; EFLAGS.IF gives the upcall mask."""
        cpu = self.cpu
        esp = cpu.gpr(RSP) & 0xFFFFFFFF
        try:
            eax, eip, cs, eflags = struct.unpack("<4I", self.memory.read(esp, 16))
            selector = cs & 0xFFFF
            outer = selector & 3 == 3
            new_esp, ss = struct.unpack("<2I", self.memory.read(esp + 16, 8)) if outer else (esp + 16, 0)
        except PageFault as fault:
            raise GuestFault(PAGE_FAULT, fault.error_code, cpu.rip, "the frame for iret is not there") from fault
        if eflags & VM or selector & 3 not in (1, 3):
            raise GuestRefused(f"the guest asked iret to go to selector {selector:#x}, flags {eflags:#x}")
        code = self._code(selector)
        if outer:
            if ss & 0xFFFF != xen.FLAT_RING3_DS:
                raise GuestRefused(f"the guest asked iret for the user stack selector {ss & 0xFFFF:#x}")
            cpu.set_segment(SS, self.domain.tables.descriptor(xen.FLAT_RING3_DS))
        cpu.set_segment(CS, code)
        cpu.set_cpl(3 if outer else 1)
        cpu.eflags = (eflags & ~(IOPL | VM)) | IF | 2
        cpu.set_gpr(RAX, eax)
        cpu.set_gpr(RSP, new_esp)
        cpu.rip = eip
        self.domain.shared.masked = not eflags & IF
