"""The paravirtual VMM: what reaches it, and how it goes back into the guest.

The guest's kernel runs in ring 1 and never executes a sensitive instruction; it asks. What reaches this file are
software interrupts (hypercalls), exceptions of the guest to pass on, and the machine's own interrupts, which become
events. On every way back pending events are delivered, if the guest lets them (xen/include/public/event_channel.h).
The hypercalls themselves are in :mod:`vmlab.vmm.xen_calls`, :mod:`vmlab.vmm.xen_mmu` and :mod:`vmlab.vmm.xen_events`.
"""

from __future__ import annotations

import struct

from vmlab.errors import GuestFault, GuestRefused
from vmlab.ledger import Counts
from vmlab.machine.cpu import IF, IOPL, NT, RF, TF, VM, Cpu, Segment
from vmlab.machine.delivery import HAS_ERROR_CODE
from vmlab.machine.paging import PageFault
from vmlab.machine.pc import DISK_IRQ, PIT_IRQ, UART_IRQ, Machine, Stop, StopReason, cpuid
from vmlab.machine.state import CS, RAX, RBX, RCX, RDI, RDX, RSI, RSP, SS
from vmlab.vmm import xen
from vmlab.vmm.disk import DiskDriver
from vmlab.vmm.host import PhysicalBus
from vmlab.vmm.platform import program_physical_pic
from vmlab.vmm.xen_calls import Call, Calls
from vmlab.vmm.xen_domain import Domain
from vmlab.vmm.xen_events import EventChannels
from vmlab.vmm.xen_memory import GuestMemory
from vmlab.vmm.xen_mmu import Mmu
from vmlab.vmm.xen_ports import GuestPorts
from vmlab.vmm.xen_ring import BlockRing
from vmlab.vmm.xen_time import GuestTimers

_UD, _NM, _GP, _PF = 6, 7, 13, 14
_CR0_TS = 1 << 3
_ARGUMENTS = (RBX, RCX, RDX, RSI, RDI)
_MULTICALL_ENTRY = 32
#: A guest that blocks through so many physical interrupts, none of which is an event of its own, waits for ever.
_VAIN_INTERRUPTS = 10_000
#: As many calls as one multicall may have; Xen's own list has no end but a look at other domains on the way.
MAX_MULTICALL = 128


class Hypervisor:
    """Takes every exception and interrupt of the machine while a paravirtual guest runs (a ``Monitor``).

    :param direct_paging: the guest may make page tables of its own, not only change L1 entries.
    :param bus: the way to the physical devices.
    :param direct_calls: INT 0x80 may go from ring 3 to ring 1 with no hypervisor between; else it is a service like any other.
    """

    def __init__(self, machine: Machine, domain: Domain, counts: Counts, refused: list[str], *, direct_paging: bool,
                 direct_calls: bool, bus: PhysicalBus) -> None:
        self.machine, self.domain, self.counts, self.refused = machine, domain, counts, refused
        self.cpu: Cpu = machine.cpu
        self.bus = bus
        self._direct_calls = direct_calls
        program_physical_pic(machine, (PIT_IRQ, UART_IRQ, DISK_IRQ))
        self.memory = GuestMemory(machine.cpu)
        self.traps: dict[int, xen.Trap] = {}
        self.kernel_stack = (xen.FLAT_RING1_DS, 0)
        self.event_callback: tuple[int, int] | None = None
        self.events = EventChannels(domain.shared, self.memory)
        self.timers = GuestTimers(machine, bus, self.memory, counts, lambda: self.events.raise_virq(xen.VIRQ_TIMER))
        self._disk = DiskDriver(machine, bus, counts)
        self._blocked = False       # the vCPU waits in the hypervisor: what comes is delivered on the way back
        ports = GuestPorts(bus, domain, self._disk, self.events, counts, self.refuse)
        self.ring = BlockRing(machine.ram, domain.frames, self.memory, self.events, self._disk, counts, self.refuse)
        mmu = Mmu(machine.cpu, domain, self.memory, counts, refused, direct=direct_paging)
        self._calls: dict[str, Call] = {
            **Calls(self).table(), "event_channel_op": self.events.event_channel_op, "mmu_update": mmu.mmu_update,
            "mmuext_op": mmu.mmuext_op, "update_va_mapping": mmu.update_va_mapping, "multicall": self._multicall,
            "set_timer_op": self.timers.set_timer_op, "vcpu_op": self.timers.vcpu_op,
            "port_io": ports.port_io, "ring_op": self.ring.ring_op,
        }
        machine.monitor = self
        self.open_gates()

    # ---- the monitor's entries
    def exception(self, vector: int, error_code: int | None, *, software: bool) -> None:
        """A trap into the hypervisor: a hypercall, a request to emulate, or the guest's own exception."""
        if software and vector == xen.HYPERCALL_VECTOR:
            self._hypercall()
        elif vector == _UD and not software and self._emulate_on_request():
            self.counts["crossing.emulation"] += 1
        else:
            self.counts["crossing.system_call" if software else "crossing.exception"] += 1
            self._reflect(vector, error_code, software=software)
        self._deliver_events()

    def interrupt(self) -> None:
        """The machine's interrupt: acknowledge it, and see whose it is."""
        self.counts["crossing.interrupt"] += 1
        irq = self.bus.acknowledge()
        if irq == PIT_IRQ:
            self.timers.interrupt()
        elif irq == DISK_IRQ:
            self._disk.interrupt()
        else:
            self.events.raise_irq(irq)
        if not self._blocked:
            self._deliver_events()

    def block(self) -> None:
        """SCHEDOP_block: the physical CPU waits in HLT until there is an event for the guest; the run ends if none can come."""
        machine, shared = self.machine, self.domain.shared
        shared.masked = False       # letting events in and looking for one is one step: no wake-up is lost
        machine.idle()
        since, self._blocked, vain = machine.time, True, 0
        while not shared.pending and machine.ending is None:
            vain += 1
            if vain < _VAIN_INTERRUPTS and machine.wait():
                machine.interrupts.take()
            elif machine.ending is None:
                machine.stop(Stop(StopReason.HALTED))
        self._blocked = False
        self.timers.blocked += machine.time - since

    # ---- into the guest
    def _deliver_events(self) -> None:
        shared = self.domain.shared
        if self.event_callback is None or shared.masked or not shared.pending:
            return
        self.counts["event.upcall"] += 1
        self._enter(*self.event_callback, None)
        shared.masked = True

    def _reflect(self, vector: int, error_code: int | None, *, software: bool) -> None:
        """An exception goes to the guest's handler, or ends the guest that has none."""
        trap = self.traps.get(vector)
        if vector == _NM:               # what fpu_taskswitch asked for has happened: the FPU may be used now
            self.set_task_switched(False)
        if vector == _PF:
            self.domain.shared.set_cr2(self.cpu.cr2)
            if self.cpu.cr2 >= xen.HYPERVISOR_START:
                self.refuse(f"the guest at {self.cpu.rip:#x} reached for the hypervisor's memory at {self.cpu.cr2:#x}")
        if trap is None:
            raise GuestFault(vector, error_code, self.cpu.rip, "the paravirtual guest has set no handler")
        self.counts["vmm.inject"] += 1
        if not software:
            self.counts[f"reflect.{vector}"] += 1
        self._enter(trap.cs, trap.address, error_code if vector in HAS_ERROR_CODE and not software else None)
        if trap.mask_events:
            self.domain.shared.masked = True

    def set_task_switched(self, on: bool) -> None:
        """CR0.TS, so that the next use of the FPU is #NM (device not available)."""
        cr0 = self.cpu.cr(0)
        self.cpu.set_cr(0, cr0 | _CR0_TS if on else cr0 & ~_CR0_TS)

    def _enter(self, cs: int, eip: int, error_code: int | None) -> None:
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
        self._push(esp, struct.pack(f"<{len(words)}I", *words))
        if stack is not None:
            cpu.set_segment(SS, stack)
        cpu.set_segment(CS, self._code(cs))
        cpu.set_cpl(1)
        cpu.set_gpr(RSP, esp)
        cpu.eflags = (cpu.eflags & ~(TF | NT | RF | VM)) | IF
        cpu.rip = eip

    def _push(self, address: int, frame: bytes) -> None:
        """A frame onto the guest's kernel stack; a guest whose stack is not there, or is not its own, ends."""
        if address + len(frame) > xen.HYPERVISOR_START:
            raise GuestRefused(f"the guest at {self.cpu.rip:#x} had the hypervisor write to {address:#x}, which is not its own")
        try:
            self.memory.write(address, frame)
        except PageFault as fault:
            raise GuestFault(_PF, fault.error_code, self.cpu.rip, f"the guest's stack at {address:#x} is not there") from fault

    def _code(self, selector: int) -> Segment:
        """A code segment of the guest's; ends a guest that names another."""
        if selector not in (xen.FLAT_RING1_CS, xen.FLAT_RING3_CS):
            raise GuestRefused(f"the guest asked to run with the code selector {selector:#x}")
        return self.domain.tables.descriptor(selector)

    def refuse(self, what: str) -> None:
        """Record what the guest tried and may not."""
        self.counts["safety.refused"] += 1
        self.refused.append(what)

    # ---- emulation on request
    def _emulate_on_request(self) -> bool:
        """UD2 "xen" CPUID: the guest asks for CPUID as the hypervisor shows it. False if it is another #UD."""
        cpu = self.cpu
        try:
            code = self.memory.read(cpu.rip, len(xen.EMULATE_PREFIX + xen.CPUID_CODE))
        except PageFault:
            return False
        if code != xen.EMULATE_PREFIX + xen.CPUID_CODE:
            return False
        user = cpu.cpl == 3
        answer = cpuid(cpu.gpr(RAX) & 0xFFFFFFFF, cpu.gpr(RCX) & 0xFFFFFFFF)
        for register, value in zip((RAX, RBX, RCX, RDX), answer, strict=True):
            cpu.set_gpr(register, value)
        cpu.rip += len(code)
        self.counts["emulate.prefix"] += 1
        self.counts["emulate.cpuid"] += 1
        self.counts["emulated.user" if user else "emulated.kernel"] += 1
        self.machine.counter.time += 1
        return True

    # ---- hypercalls
    def _hypercall(self) -> None:
        cpu = self.cpu
        number = cpu.gpr(RAX) & 0xFFFFFFFF
        self.counts[f"crossing.{xen.SERVICES.get(xen.HYPERCALLS.get(number, ''), 'setup')}"] += 1
        if xen.HYPERCALLS.get(number) == "iret":
            self.counts["hypercall.iret"] += 1
            self._iret()
        else:
            cpu.set_gpr(RAX, self._call(number, [cpu.gpr(register) & 0xFFFFFFFF for register in _ARGUMENTS]))

    def _call(self, number: int, arguments: list[int]) -> int:
        """One hypercall by its number; a pointer that leads nowhere is -EFAULT."""
        name = xen.HYPERCALLS.get(number)
        self.counts[f"hypercall.{name or 'unknown'}"] += 1
        call = self._calls.get(name or "")
        if call is None:
            return xen.ENOSYS
        try:
            return call(*arguments)
        except PageFault:
            return xen.EFAULT

    def _multicall(self, calls: int, count: int, *_: int) -> int:
        """struct multicall_entry: several hypercalls for one transition. Calls that change RIP cannot be among them."""
        if count > MAX_MULTICALL:
            return xen.EINVAL
        for at in range(calls, calls + _MULTICALL_ENTRY * count, _MULTICALL_ENTRY):
            number, _result, *arguments = struct.unpack("<8I", self.memory.read(at, _MULTICALL_ENTRY))
            inner = xen.HYPERCALLS.get(number) in ("multicall", "iret")
            result = xen.EINVAL if inner else self._call(number, arguments[:5])
            self.memory.write(at + 4, struct.pack("<I", result & 0xFFFFFFFF))
        return 0

    def set_traps(self, traps: dict[int, xen.Trap]) -> None:
        """The guest's handlers are these from now on."""
        self.traps = traps
        self.open_gates()

    def open_gates(self) -> None:
        """The hypervisor's IDT as INT n sees it: hypercalls from ring 1, and what the guest opened to its users."""
        gates = {xen.HYPERCALL_VECTOR: 1}
        for vector, trap in self.traps.items():
            if vector != xen.HYPERCALL_VECTOR:
                gates[vector] = max(trap.level, 0)
        direct = self.traps.get(xen.SYSCALL_VECTOR)
        if direct is not None and (direct.mask_events or direct.level < 3 or not self._direct_calls):
            direct = None           # no CPU can set a mask in memory on its way: then it must come through here
        self.domain.tables.set_direct_gate(xen.SYSCALL_VECTOR, direct)
        self.machine.software_gates = gates
        self.machine.direct_gates = frozenset() if direct is None else frozenset((xen.SYSCALL_VECTOR,))

    def set_kernel_stack(self, ss: int, esp: int) -> None:
        """Where the CPU and the hypervisor build frames on the way from ring 3."""
        self.kernel_stack = (ss, esp)
        self.domain.tables.set_kernel_stack(ss, esp)

    def _iret(self) -> None:
        """HYPERVISOR_iret: EAX, then the frame of an IRET; EFLAGS.IF gives the upcall mask."""
        cpu = self.cpu
        esp = cpu.gpr(RSP) & 0xFFFFFFFF
        try:
            eax, eip, cs, eflags = struct.unpack("<4I", self.memory.read(esp, 16))
            selector = cs & 0xFFFF
            outer = selector & 3 == 3
            new_esp, ss = struct.unpack("<2I", self.memory.read(esp + 16, 8)) if outer else (esp + 16, 0)
        except PageFault as fault:
            raise GuestFault(_PF, fault.error_code, cpu.rip, "the frame for iret is not there") from fault
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
