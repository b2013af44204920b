"""The paravirtual VMM: what its trap handlers and hypercalls do, one method each.

The guest's kernel runs in ring 1 and never executes a sensitive instruction; it asks. What reaches this file are
software interrupts (hypercalls), exceptions of the guest to pass on, and the machine's own interrupts, which become
events. On every way back pending events are delivered, if the guest lets them (xen/include/public/event_channel.h).
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from vmlab.errors import GuestFault, GuestRefused
from vmlab.ledger import Counts
from vmlab.machine.cpu import IF, IOPL, NT, RF, TF, VM, Cpu, Segment
from vmlab.machine.delivery import HAS_ERROR_CODE
from vmlab.machine.paging import PageFault
from vmlab.machine.pc import UART_PORT, Machine, Stop, StopReason, cpuid
from vmlab.machine.state import CS, RAX, RBX, RCX, RDI, RDX, RSI, RSP, SS
from vmlab.vmm import xen
from vmlab.vmm.platform import PHYSICAL_BASE, VirtualPlatform
from vmlab.vmm.xen_domain import Domain

_GP, _PF, _UD = 13, 14, 6
_ARGUMENTS = (RBX, RCX, RDX, RSI, RDI)
_PIC_PORTS = frozenset((0x20, 0x21, 0xA0, 0xA1))
_WRITE_CHUNK = 4096


class Hypervisor:
    """Takes every exception and interrupt of the machine while a paravirtual guest runs (a ``Monitor``)."""

    def __init__(self, machine: Machine, domain: Domain, counts: Counts, refused: list[str]) -> None:
        self.machine, self.domain, self.counts, self.refused = machine, domain, counts, refused
        self.cpu: Cpu = machine.cpu
        VirtualPlatform(machine)    # sets up the physical interrupt controller; the guest has none
        self.traps: dict[int, xen.Trap] = {}
        self.kernel_stack = (xen.FLAT_RING1_DS, 0)
        self.event_callback: tuple[int, int] | None = None
        self.port_of_irq: dict[int, int] = {}
        self._next_port = 1
        self._calls: dict[str, Callable[[int, int, int, int, int], int]] = {
            "set_trap_table": self._set_trap_table, "stack_switch": self._stack_switch, "set_callbacks": self._set_callbacks,
            "update_va_mapping": self._update_va_mapping, "xen_version": self._xen_version, "console_io": self._console_io,
            "sched_op": self._sched_op, "event_channel_op": self._event_channel_op, "port_io": self._port_io,
        }
        machine.monitor = self
        self._open_gates()

    # ---- the monitor's entries
    def exception(self, vector: int, error_code: int | None, *, software: bool) -> None:
        """A trap into the hypervisor: a hypercall, a request to emulate, or the guest's own exception."""
        if software and vector == xen.HYPERCALL_VECTOR:
            self._hypercall()
        elif software or not (vector == _UD and self._emulate_on_request()):
            self._reflect(vector, error_code, software=software)
        self._deliver_events()

    def interrupt(self) -> None:
        """The machine's interrupt: acknowledge it, and make it an event of the guest."""
        irq = self.machine.pic.acknowledge() - PHYSICAL_BASE
        if irq >= 8:
            self.machine.ports.write(0xA0, 1, 0x20)
        self.machine.ports.write(0x20, 1, 0x20)
        self.raise_irq(irq)
        self._deliver_events()

    def raise_irq(self, irq: int) -> None:
        """An interrupt for the guest becomes an event, if the guest has bound it."""
        port = self.port_of_irq.get(irq)
        if port is not None:
            self.domain.shared.raise_event(port)

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
        if vector == _PF:
            self.domain.shared.set_cr2(self.cpu.cr2)
            if self.cpu.cr2 >= xen.HYPERVISOR_START:
                self._refuse(f"the guest at {self.cpu.rip:#x} reached for the hypervisor's memory at {self.cpu.cr2:#x}")
        if trap is None:
            raise GuestFault(vector, error_code, self.cpu.rip, "the paravirtual guest has set no handler")
        self.counts["vmm.inject"] += 1
        if not software:
            self.counts[f"reflect.{vector}"] += 1
        self._enter(trap.cs, trap.address, error_code if vector in HAS_ERROR_CODE and not software else None)
        if trap.mask_events:
            self.domain.shared.masked = True

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
            stack: Segment | None = self.domain.descriptor(ss)
        else:
            esp, stack = cpu.gpr(RSP) & 0xFFFFFFFF, None
        if error_code is not None:
            words.insert(0, error_code)
        esp = (esp - 4 * len(words)) & 0xFFFFFFFF
        self._write(esp, struct.pack(f"<{len(words)}I", *words))
        if stack is not None:
            cpu.set_segment(SS, stack)
        cpu.set_segment(CS, self._code(cs))
        cpu.set_cpl(1)
        cpu.set_gpr(RSP, esp)
        cpu.eflags = (cpu.eflags & ~(TF | NT | RF | VM)) | IF
        cpu.rip = eip

    def _code(self, selector: int) -> Segment:
        """A code segment of the guest's; ends a guest that names another."""
        segment = self.domain.descriptor(selector)
        if selector not in (xen.FLAT_RING1_CS, xen.FLAT_RING3_CS):
            raise GuestRefused(f"the guest asked to run with the code selector {selector:#x}")
        return segment

    # ---- guest memory
    def _read(self, address: int, size: int) -> bytes:
        """Guest memory by linear address, never the hypervisor's. Raises :class:`PageFault`."""
        if address + size > xen.HYPERVISOR_START:
            raise PageFault(address, 1)
        return self.cpu.read_linear(address, size)

    def _write(self, address: int, data: bytes) -> None:
        if address + len(data) > xen.HYPERVISOR_START:
            raise GuestRefused(f"the guest at {self.cpu.rip:#x} had the hypervisor write to {address:#x}, which is not its own")
        try:
            self.cpu.write_linear(address, data)
        except PageFault as fault:
            raise GuestFault(_PF, fault.error_code, self.cpu.rip, f"the guest's stack at {address:#x} is not there") from fault

    def _refuse(self, what: str) -> None:
        self.counts["safety.refused"] += 1
        self.refused.append(what)

    # ---- emulation on request
    def _emulate_on_request(self) -> bool:
        """UD2 "xen" CPUID: the guest asks for CPUID as the hypervisor shows it. False if it is another #UD."""
        cpu = self.cpu
        try:
            code = self._read(cpu.rip, len(xen.EMULATE_PREFIX + xen.CPUID_CODE))
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
        name = xen.HYPERCALLS.get(cpu.gpr(RAX) & 0xFFFFFFFF)
        self.counts[f"hypercall.{name or 'unknown'}"] += 1
        if name == "iret":
            self._iret()
            return
        call = self._calls.get(name or "")
        result = xen.ENOSYS
        if call is not None:
            arguments = [cpu.gpr(register) & 0xFFFFFFFF for register in _ARGUMENTS]
            try:
                result = call(*arguments)
            except PageFault:
                result = xen.EFAULT
        cpu.set_gpr(RAX, result)

    def _set_trap_table(self, table: int, *_: int) -> int:
        if not table:
            self.traps.clear()
        while table:
            vector, trap = xen.parse_trap(self._read(table, 8))
            if not trap.address:
                break
            self.traps[vector] = trap
            table += 8
        self._open_gates()
        return 0

    def _open_gates(self) -> None:
        """The hypervisor's IDT as INT n sees it: hypercalls from ring 1, and what the guest opened to its users."""
        gates = {xen.HYPERCALL_VECTOR: 1}
        for vector, trap in self.traps.items():
            if vector != xen.HYPERCALL_VECTOR:
                gates[vector] = max(trap.level, 0)
        direct = self.traps.get(xen.SYSCALL_VECTOR)
        if direct is not None and (direct.mask_events or direct.level < 3):
            direct = None           # no CPU can set a mask in memory on its way: then it must come through here
        self.domain.set_direct_gate(xen.SYSCALL_VECTOR, direct)
        self.machine.software_gates = gates
        self.machine.direct_gates = frozenset() if direct is None else frozenset((xen.SYSCALL_VECTOR,))

    def _stack_switch(self, ss: int, esp: int, *_: int) -> int:
        if ss | 1 != xen.FLAT_RING1_DS:
            return xen.EINVAL
        self.kernel_stack = (ss | 1, esp)
        self.domain.set_kernel_stack(ss | 1, esp)
        return 0

    def _set_callbacks(self, event_cs: int, event_eip: int, _failsafe_cs: int, _failsafe_eip: int, *_: int) -> int:
        # The failsafe callback is for a return whose selectors fail; here such a return ends the guest.
        self.event_callback = (event_cs | 1, event_eip)
        return 0

    def _update_va_mapping(self, address: int, low: int, high: int, _flags: int, *_: int) -> int:
        result = self.domain.update_mapping(address, low | high << 32)
        if result:
            self._refuse(f"the guest asked to map {low | high << 32:#x} at {address:#x}")
        self.machine.engine.flush_tlb()
        return result

    def _xen_version(self, command: int, buffer: int, *_: int) -> int:
        if command == xen.XENVER_VERSION:
            return 3 << 16
        if command == xen.XENVER_GET_FEATURES:
            submap = struct.unpack("<I", self._read(buffer, 4))[0]
            if submap:
                return xen.EINVAL
            self._write(buffer + 4, bytes(4))
            return 0
        return xen.ENOSYS

    def _console_io(self, command: int, count: int, buffer: int, *_: int) -> int:
        """The text goes out by the serial port, as the hypervisor's own does."""
        if command != xen.CONSOLEIO_WRITE:
            return xen.ENOSYS
        while count:
            size = min(count, _WRITE_CHUNK)
            for character in self._read(buffer, size):
                self.machine.port_write(UART_PORT, 1, character)
            buffer, count = buffer + size, count - size
        return 0

    def _sched_op(self, command: int, argument: int, *_: int) -> int:
        if command == xen.SCHEDOP_YIELD:
            return 0
        if command == xen.SCHEDOP_SHUTDOWN:
            self.machine.stop(Stop(StopReason.EXIT, struct.unpack("<I", self._read(argument, 4))[0]))
            return 0
        if command != xen.SCHEDOP_BLOCK:
            return xen.ENOSYS
        shared = self.domain.shared
        shared.masked = False       # letting events in and looking for one is one step: no wake-up is lost
        self.machine.idle()
        if not shared.pending and not self.machine.pic.pending:  # no device here acts by itself: for ever
            self.machine.stop(Stop(StopReason.HALTED))
        return 0

    def _event_channel_op(self, command: int, argument: int, *_: int) -> int:
        if command == xen.EVTCHNOP_BIND_PIRQ:
            irq = struct.unpack("<I", self._read(argument, 4))[0]
            if irq >= 16:
                return xen.EINVAL
            if irq in self.port_of_irq:
                return xen.EBUSY
            self._write(argument + 8, struct.pack("<I", self._next_port))
            self.port_of_irq[irq] = self._next_port
            self._next_port += 1
            return 0
        port = struct.unpack("<I", self._read(argument, 4))[0]
        irq = next((i for i, p in self.port_of_irq.items() if p == port), None)
        if irq is None:
            return xen.EINVAL
        if command == xen.EVTCHNOP_UNMASK:
            self.domain.shared.unmask(port)
            return 0
        if command == xen.EVTCHNOP_CLOSE:
            del self.port_of_irq[irq]
            return 0
        return xen.ENOSYS

    def _port_io(self, write: int, port: int, size: int, value: int, *_: int) -> int:
        """The lab's own: IN or OUT for a guest that may use the port. The interrupt controller is the hypervisor's."""
        if size not in (1, 2, 4) or port > 0xFFFF or write > 1:
            return xen.EINVAL
        self.counts["vmm.device"] += 1
        if port in _PIC_PORTS:
            self._refuse(f"the guest asked for port {port:#x} of the interrupt controller")
            return xen.EINVAL if write else (1 << 8 * size) - 1
        if write:
            self.machine.port_write(port, size, value)
            return 0
        return self.machine.port_read(port, size)

    def _iret(self) -> None:
        """HYPERVISOR_iret: EAX, then the frame of an IRET; EFLAGS.IF gives the upcall mask."""
        cpu = self.cpu
        esp = cpu.gpr(RSP) & 0xFFFFFFFF
        try:
            eax, eip, cs, eflags = struct.unpack("<4I", self._read(esp, 16))
            selector = cs & 0xFFFF
            outer = selector & 3 == 3
            new_esp, ss = struct.unpack("<2I", self._read(esp + 16, 8)) if outer else (esp + 16, 0)
        except PageFault as fault:
            raise GuestFault(_PF, fault.error_code, cpu.rip, "the frame for iret is not there") from fault
        if eflags & VM or selector & 3 not in (1, 3):
            raise GuestRefused(f"the guest asked iret to go to selector {selector:#x}, flags {eflags:#x}")
        code = self._code(selector)
        if outer:
            if ss & 0xFFFF != xen.FLAT_RING3_DS:
                raise GuestRefused(f"the guest asked iret for the user stack selector {ss & 0xFFFF:#x}")
            cpu.set_segment(SS, self.domain.descriptor(xen.FLAT_RING3_DS))
        cpu.set_segment(CS, code)
        cpu.set_cpl(3 if outer else 1)
        cpu.eflags = (eflags & ~(IOPL | VM)) | IF | 2
        cpu.set_gpr(RAX, eax)
        cpu.set_gpr(RSP, new_esp)
        cpu.rip = eip
        self.domain.shared.masked = not eflags & IF
