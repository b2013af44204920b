"""The paravirtual VMM: what reaches it, and how it goes back into the guest.

The guest's kernel never executes a sensitive instruction; it asks. What reaches this file are hypercalls, exceptions of
the guest to pass on, and the machine's own interrupts, which become events. On every way back pending events are
delivered, if the guest lets them (xen/include/public/event_channel.h). What depends on the ring that the kernel runs in
is in :mod:`vmlab.vmm.xen.ring1` (32 bits) and :mod:`vmlab.vmm.xen.ring3` (64). The hypercalls themselves are in
:mod:`vmlab.vmm.xen.calls`, :mod:`vmlab.vmm.xen.mmu` and :mod:`vmlab.vmm.xen.events`.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from vmlab.errors import GuestFault, GuestRefused
from vmlab.ledger import Counts
from vmlab.machine.board import DISK_IRQ, PIT_IRQ, UART_IRQ
from vmlab.machine.cpu import Cpu
from vmlab.machine.delivery import HAS_ERROR_CODE
from vmlab.machine.paging import PageFault
from vmlab.machine.pc import Machine, Stop, StopReason, cpuid
from vmlab.machine.state import RAX, RBX, RCX, RDX
from vmlab.vmm import xen
from vmlab.vmm.disk import DiskDriver
from vmlab.vmm.host import PhysicalBus
from vmlab.vmm.platform import program_physical_pic
from vmlab.vmm.xen.abi import Trap
from vmlab.vmm.xen.calls import Call, Calls
from vmlab.vmm.xen.domain import Domain
from vmlab.vmm.xen.events import EventChannels
from vmlab.vmm.xen.memory import GuestMemory
from vmlab.vmm.xen.mmu import Mmu
from vmlab.vmm.xen.ports import GuestPorts
from vmlab.vmm.xen.ring import BlockRing
from vmlab.vmm.xen.time import GuestTimers

_UD, _NM, PAGE_FAULT = 6, 7, 14
_CR0_TS = 1 << 3
_MULTICALL_WORDS = 8                # struct multicall_entry: number, result, six arguments
#: A guest that blocks through so many physical interrupts, none of which is an event of its own, waits for ever.
_VAIN_INTERRUPTS = 10_000
#: As many calls as one multicall may have; Xen's own list has no end but a look at other domains on the way.
MAX_MULTICALL = 128


class _Known(NamedTuple):
    """What a hypercall's number stands for: the events of its entry and of itself, and who carries it out (None: nobody)."""

    crossing: str
    event: str
    is_iret: bool
    call: Call | None


class Hypervisor(ABC):
    """Takes every exception and interrupt of the machine while a paravirtual guest runs (a ``Monitor``).

    :param direct_paging: the guest may make page tables of its own, not only change L1 entries.
    :param bus: the way to the physical devices.
    :param direct_calls: INT 0x80 may go from ring 3 to ring 1 with no hypervisor between; else it is a service like any other.
    """

    #: Where the five arguments of a hypercall are.
    argument_registers: ClassVar[tuple[int, ...]]

    def __init__(self, machine: Machine, domain: Domain, counts: Counts, refused: list[str], *, direct_paging: bool,
                 direct_calls: bool, bus: PhysicalBus) -> None:
        self.machine, self.domain, self.counts, self.refused = machine, domain, counts, refused
        self.cpu: Cpu = machine.cpu
        self.bus = bus
        self.direct_paging, self.direct_calls = direct_paging, direct_calls
        program_physical_pic(machine, (PIT_IRQ, UART_IRQ, DISK_IRQ))
        self.abi = domain.abi
        self.memory = GuestMemory(machine.cpu, self.abi)
        self.traps: dict[int, Trap] = {}
        self.kernel_stack = (self.abi.kernel_ss, 0)
        self.event_callback: tuple[int, int] | None = None
        self.events = EventChannels(domain.shared, self.memory)
        self.timers = GuestTimers(machine, bus, self.memory, self.abi, counts, lambda: self.events.raise_virq(xen.VIRQ_TIMER))
        self._disk = DiskDriver(machine, bus, counts)
        self._blocked = False       # the vCPU waits in the hypervisor: what comes is delivered on the way back
        ports = GuestPorts(bus, domain, self._disk, self.events, counts, self.refuse)
        self.ring = BlockRing(machine.ram, domain.frames, self.memory, self.events, self._disk, counts, self.refuse, self.abi)
        mmu = Mmu(machine.cpu, domain, self.memory, counts, refused, direct=direct_paging)
        self._calls: dict[str, Call] = {
            **Calls(self).table(), "event_channel_op": self.events.event_channel_op, "mmu_update": mmu.mmu_update,
            "mmuext_op": mmu.mmuext_op, "update_va_mapping": mmu.update_va_mapping, "multicall": self._multicall,
            "set_timer_op": self.timers.set_timer_op, "vcpu_op": self.timers.vcpu_op,
            "port_io": ports.port_io, "ring_op": self.ring.ring_op,
        }
        self._known_calls: dict[int, _Known] = {}
        self._registers, self._mask = machine.cpu.gprs, self.abi.mask
        machine.monitor = self
        self.open_gates()

    # ---- the monitor's entries
    def exception(self, vector: int, error_code: int | None, *, software: bool) -> None:
        """A trap into the hypervisor: a hypercall, a request to emulate, or the guest's own exception."""
        if software and self.software(vector):
            pass
        elif vector == _UD and not software and self._emulate_on_request():
            self.counts["crossing.emulation"] += 1
        else:
            self.counts["crossing.system_call" if software else "crossing.exception"] += 1
            self.reflect(vector, error_code, software=software)
        self.deliver_events()

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
            self.deliver_events()

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
    def deliver_events(self) -> None:
        if self.event_callback is None:
            return
        shared = self.domain.shared
        if shared.masked or not shared.pending:
            return
        self.counts["event.upcall"] += 1
        self.enter(*self.event_callback, None)
        shared.masked = True

    def reflect(self, vector: int, error_code: int | None, *, software: bool) -> None:
        """An exception goes to the guest's handler, or ends the guest that has none."""
        trap = self.traps.get(vector)
        if vector == _NM:               # what fpu_taskswitch asked for has happened: the FPU may be used now
            self.set_task_switched(False)
        if vector == PAGE_FAULT:
            self.domain.shared.set_cr2(self.cpu.cr2)
            if self.abi.reaches_hole(self.cpu.cr2, 1):
                self.refuse(f"the guest at {self.cpu.rip:#x} reached for the hypervisor's memory at {self.cpu.cr2:#x}")
        if trap is None:
            raise GuestFault(vector, error_code, self.cpu.rip, "the paravirtual guest has set no handler")
        self.counts["vmm.inject"] += 1
        if not software:
            self.counts[f"reflect.{vector}"] += 1
        self.enter(trap.cs, trap.address, error_code if vector in HAS_ERROR_CODE and not software else None)
        if trap.mask_events:
            self.domain.shared.masked = True

    def set_task_switched(self, on: bool) -> None:
        """CR0.TS, so that the next use of the FPU is #NM (device not available)."""
        cr0 = self.cpu.cr(0)
        self.cpu.set_cr(0, cr0 | _CR0_TS if on else cr0 & ~_CR0_TS)

    @abstractmethod
    def software(self, vector: int) -> bool:
        """INT ``vector`` that the hypervisor's gates let through: whether it was the hypervisor's own."""

    @abstractmethod
    def enter(self, cs: int, address: int, error_code: int | None) -> None:
        """Build the frame of an interrupt on the guest's kernel stack and go to ``cs:address`` in its kernel."""

    @abstractmethod
    def iret(self) -> None:
        """HYPERVISOR_iret: go back through the frame on the kernel's stack."""

    @abstractmethod
    def open_gates(self) -> None:
        """The hypervisor's IDT as INT n sees it: what the guest opened to its users, and what it may use itself."""

    def push(self, address: int, frame: bytes) -> None:
        """A frame onto the guest's kernel stack; a guest whose stack is not there, or is not its own, ends."""
        if self.abi.reaches_hole(address, len(frame)):
            raise GuestRefused(f"the guest at {self.cpu.rip:#x} had the hypervisor write to {address:#x}, which is not its own")
        try:
            self.memory.write(address, frame)
        except PageFault as fault:
            raise GuestFault(PAGE_FAULT, fault.error_code, self.cpu.rip, f"the guest's stack at {address:#x} is not there") from fault

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
        self.machine.counter.pass_one()
        return True

    # ---- hypercalls
    def hypercall(self) -> None:
        """The call whose number is in EAX; the answer goes there."""
        registers, mask, counts = self._registers, self._mask, self.counts     # one function: it runs for every hypercall
        number = registers[RAX] & 0xFFFFFFFF
        known = self._known_calls.get(number) or self._known_call(number)
        counts[known.crossing] += 1
        counts[known.event] += 1
        if known.is_iret:
            self.iret()
            return
        result = xen.ENOSYS
        if known.call is not None:
            try:
                a, b, c, d, e = self.argument_registers
                result = known.call(registers[a] & mask, registers[b] & mask, registers[c] & mask, registers[d] & mask, registers[e] & mask)
            except PageFault:
                result = xen.EFAULT
        registers[RAX] = result & mask

    def _known_call(self, number: int) -> _Known:
        found = self._known_calls.get(number)
        if found is None:
            name = xen.HYPERCALLS.get(number, "")
            found = _Known(f"crossing.{xen.SERVICES.get(name, 'setup')}", f"hypercall.{name or 'unknown'}", name == "iret", self._calls.get(name))
            if name:
                self._known_calls[number] = found
        return found

    def _call(self, number: int, arguments: list[int]) -> int:
        """One hypercall by its number; a pointer that leads nowhere is -EFAULT."""
        known = self._known_call(number)
        self.counts[known.event] += 1
        if known.call is None:
            return xen.ENOSYS
        try:
            return known.call(*arguments)
        except PageFault:
            return xen.EFAULT

    def _multicall(self, calls: int, count: int, *_: int) -> int:
        """struct multicall_entry: several hypercalls for one transition. Calls that change RIP cannot be among them."""
        if count > MAX_MULTICALL:
            return xen.EINVAL
        word = self.abi.word
        entry = _MULTICALL_WORDS * word
        for at in range(calls, calls + entry * count, entry):
            number, _result, *arguments = struct.unpack(self.abi.words(_MULTICALL_WORDS), self.memory.read(at, entry))
            inner = xen.HYPERCALLS.get(number) in ("multicall", "iret")
            result = xen.EINVAL if inner else self._call(number, arguments[:5])
            self.memory.write(at + word, (result & self.abi.mask).to_bytes(word, "little"))
        return 0

    def set_traps(self, traps: dict[int, Trap]) -> None:
        """The guest's handlers are these from now on."""
        self.traps = traps
        self.open_gates()

    def set_system_calls(self, address: int) -> None:
        """Where system calls of the guest's users go on (64 bits)."""
        raise NotImplementedError

    def set_kernel_stack(self, ss: int, esp: int) -> None:
        """Where the CPU and the hypervisor build frames on the way from ring 3."""
        self.kernel_stack = (ss, esp)
