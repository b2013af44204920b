"""The way in and out of a 64-bit guest: kernel and users both in ring 3, each on page tables of their own.

SYSCALL arrives at the hypervisor, whoever made it. From the guest's kernel it is a hypercall (RAX, and RDI RSI RDX R10 R8:
arch-x86/xen-x86_64.h); from one of its users it is a system call, which goes on in the kernel at the callback that the guest
named (set_callbacks): the hypervisor changes the page tables on the way in, and again on the way out, by HYPERVISOR_iret.
So do INT n, exceptions and events. Nothing passes the hypervisor by, which is why system calls of 64-bit guests are dear.

A frame has RCX and R11 on top, and the RPL of CS in it says who was interrupted: 3 a user, 0 the kernel.
"""

from __future__ import annotations

import struct

from vmlab.errors import GuestFault, GuestRefused
from vmlab.ledger import Counts
from vmlab.machine.cpu import AC, DF, IF, IOPL, NT, RF, TF, VM, Segment
from vmlab.machine.paging import PF_USER, PageFault
from vmlab.machine.pc import Machine
from vmlab.machine.state import CS, FS, GS, R8, R10, R11, RAX, RCX, RDI, RDX, RSI, RSP, SS
from vmlab.vmm import xen
from vmlab.vmm.host import PhysicalBus
from vmlab.vmm.xen.domain64 import ENTRY, ENTRY32, WideDomain
from vmlab.vmm.xen.hypervisor import PAGE_FAULT, Hypervisor

_UD = 6
_SYSCALL_SIZE = 2
#: Flags that are cleared on the way into the guest's kernel; DF as well on the way of a system call.
_CLEARED = AC | VM | RF | NT | TF
#: The ring from which on instructions count as the users': none of them while the guest's kernel runs in ring 3.
_USERS, _NO_USERS = 3, 4


class WideHypervisor(Hypervisor):
    """The hypervisor of a 64-bit guest. It always knows which half of the guest runs, since it alone changes from one to the other."""

    argument_registers = (RDI, RSI, RDX, R10, R8)
    domain: WideDomain

    def __init__(self, machine: Machine, domain: WideDomain, counts: Counts, refused: list[str], *, direct_paging: bool,
                 direct_calls: bool, bus: PhysicalBus) -> None:
        self.in_users = False
        self.system_calls = 0           # the guest's callback for SYSCALL; 0: it has none
        self._gs_bases = [0, 0]         # of the kernel and of its users, while the other runs
        self._gates: tuple[dict[int, int], dict[int, int]] = ({}, {})
        super().__init__(machine, domain, counts, refused, direct_paging=direct_paging, direct_calls=direct_calls, bus=bus)
        self._calls["set_segment_base"] = self.set_segment_base
        machine.gate(ENTRY, self._entered)
        machine.gate(ENTRY32, self._entered_from_32)
        machine.counter.user_from = _NO_USERS

    # ---- in
    def _before_syscall(self, cs: int) -> None:
        """The CPU's state as it was before SYSCALL, but for RCX and R11; RIP is behind the instruction."""
        cpu, descriptor = self.cpu, self.domain.tables.descriptor
        cpu.set_segment(SS, descriptor(xen.FLAT_RING3_SS64))
        cpu.set_segment(CS, descriptor(cs))
        cpu.set_cpl(3)
        cpu.eflags = cpu.gpr(R11) | IF
        cpu.rip = cpu.gpr(RCX)

    def _entered(self) -> None:
        """SYSCALL from 64-bit code."""
        self._before_syscall(xen.FLAT_RING3_CS64)
        if not self.in_users:
            self.hypercall()
        else:
            self.counts["crossing.system_call"] += 1
            if self.system_calls:
                self.counts["vmm.inject"] += 1
                self.enter(xen.FLAT_RING3_CS64, self.system_calls, None)
                self.cpu.eflags &= ~DF
            else:
                self._no_system_call()
        self.deliver_events()

    def _entered_from_32(self) -> None:
        """SYSCALL from 32-bit code, for which a guest can name no callback here."""
        self._before_syscall(xen.FLAT_RING3_CS32)
        self.counts["crossing.system_call"] += 1
        self._no_system_call()
        self.deliver_events()

    def _no_system_call(self) -> None:
        """SYSCALL with nobody to answer it is no instruction (arch/x86 of Xen: the callback's absence is #UD)."""
        self.cpu.rip -= _SYSCALL_SIZE
        self.reflect(_UD, None, software=False)

    def software(self, vector: int) -> bool:
        """No INT n is the hypervisor's own."""
        return False

    def reflect(self, vector: int, error_code: int | None, *, software: bool) -> None:
        """As for any guest, but that the CPU takes its kernel for a user: the guest is told who it was."""
        if vector == PAGE_FAULT and error_code is not None:
            error_code = error_code & ~PF_USER | (PF_USER if self.in_users else 0)
        super().reflect(vector, error_code, software=software)

    def enter(self, cs: int, address: int, error_code: int | None) -> None:
        """Onto the guest's kernel stack: [RCX, R11, (error code), RIP, CS, RFLAGS, RSP, SS], and on at ``address``.

        RFLAGS.IF is the upcall mask the other way round, and the mask is in CS's word too, bits 32 to 39
        (xen-x86_64.h: struct cpu_user_regs). The stack is aligned to 16 bytes first, as the CPU does it.
        """
        cpu = self.cpu
        masked = self.domain.shared.masked
        flags = (cpu.eflags & ~(IF | IOPL)) | (0 if masked else IF)
        rsp, selector = cpu.gpr(RSP), cpu.selector(CS) | 3
        interrupted = [cpu.rip, selector if self.in_users else selector & ~3, flags, rsp, cpu.selector(SS) | 3]
        interrupted[1] |= int(masked) << 32
        if error_code is not None:
            interrupted.insert(0, error_code)
        if self.in_users:
            self._change_side()
            rsp = self.kernel_stack[1]
        words = [cpu.gpr(RCX), cpu.gpr(R11), *interrupted]
        rsp = (rsp & ~15) - 8 * len(words) & self.abi.mask
        self.push(rsp, struct.pack(f"<{len(words)}Q", *words))
        for number, flat in ((SS, xen.FLAT_RING3_SS64), (CS, xen.FLAT_RING3_CS64)):
            if cpu.selector(number) != flat:        # the hypervisor's own descriptors never change
                cpu.set_segment(number, self.domain.tables.descriptor(flat))
        cpu.set_cpl(3)
        cpu.set_gpr(RSP, rsp, 8)
        cpu.eflags = (cpu.eflags & ~_CLEARED) | IF
        cpu.rip = address

    # ---- out
    def iret(self) -> None:
        """struct iret_context on the kernel's stack. CS with RPL 3: to a user, and so to other page tables; else to the kernel."""
        cpu = self.cpu
        try:
            rax, r11, rcx, how, rip, cs, flags, rsp, ss = struct.unpack("<9Q", self.memory.read(cpu.gpr(RSP), 72))
        except PageFault as fault:
            raise GuestFault(PAGE_FAULT, fault.error_code, cpu.rip, "the frame for iret is not there") from fault
        if cs & 0xFFFC | 3 != xen.FLAT_RING3_CS64 or ss & 0xFFFC | 3 != xen.FLAT_RING3_SS64:
            raise GuestRefused(f"the guest asked iret to go to selectors {cs & 0xFFFF:#x} and {ss & 0xFFFF:#x}")
        if (rip + (1 << 47)) & self.abi.mask >= 1 << 48:
            raise GuestRefused(f"the guest asked iret to go to {rip:#x}, which is no address")
        if cs & 3 == 3:
            if not self.domain.user_root:
                raise GuestRefused("the guest asked iret to go to its users, for whom it has named no page tables")
            self._change_side()
        cpu.eflags = (flags & ~(IOPL | VM)) | IF | 2
        cpu.set_gpr(RAX, rax, 8)
        in_syscall = how & xen.VGCF_IN_SYSCALL
        cpu.set_gpr(RCX, rip if in_syscall else rcx, 8)         # SYSRET takes RIP and RFLAGS from these two
        cpu.set_gpr(R11, cpu.eflags if in_syscall else r11, 8)
        cpu.set_gpr(RSP, rsp, 8)
        cpu.rip = rip
        self.domain.shared.masked = not flags & IF

    def _change_side(self) -> None:
        """From the guest's kernel to its users or back: the other page tables, the other GS base (Xen: toggle_guest_mode)."""
        self.in_users = users = not self.in_users
        self.counts["guest.side"] += 1
        cpu = self.cpu
        gs = cpu.segment(GS)
        self._gs_bases[not users] = gs.base
        cpu.set_segment(GS, Segment(gs.selector, self._gs_bases[users], gs.limit, gs.flags))
        cpu.set_cr(3, self.domain.user_root if users else self.domain.root)
        self.domain.frames.tlb_flushed()
        self.machine.blocks.space_changed()
        self.machine.counter.user_from = _USERS if users else _NO_USERS
        self.machine.software_gates = self._gates[users]

    def set_segment_base(self, which: int, base: int, *_: int) -> int:
        """Bases that need 64 bits: FS, and GS of the kernel and of its users (xen-x86_64.h: SEGBASE_*)."""
        cpu = self.cpu
        if which in (xen.SEGBASE_FS, xen.SEGBASE_GS_KERNEL, xen.SEGBASE_GS_USER) and (base + (1 << 47)) & self.abi.mask >= 1 << 48:
            return xen.EINVAL
        if which in (xen.SEGBASE_FS, xen.SEGBASE_GS_KERNEL):        # the kernel asks, so its own GS is the one in force
            number = FS if which == xen.SEGBASE_FS else GS
            old = cpu.segment(number)
            cpu.set_segment(number, Segment(old.selector, base, old.limit, old.flags))
        elif which == xen.SEGBASE_GS_USER:
            self._gs_bases[True] = base
        elif which == xen.SEGBASE_GS_USER_SEL and base & 0xFFFF <= 3:
            self._gs_bases[True] = 0                                # a null selector; no others are kept by side
        else:
            return xen.EINVAL
        return 0

    def set_system_calls(self, address: int) -> None:
        self.system_calls = address

    def open_gates(self) -> None:
        """The CPU's gates cannot tell the guest's kernel from its users: level 3 is for both, 1 and 2 for the kernel alone."""
        self._gates = ({vector: 3 for vector, trap in self.traps.items() if trap.level},
                       {vector: 3 for vector, trap in self.traps.items() if trap.level == 3})
        self.machine.software_gates = self._gates[self.in_users]


