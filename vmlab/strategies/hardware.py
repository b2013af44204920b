"""Hardware assistance: the guest at its own CPL 0, in guest mode, under AMD-V (APM Vol. 2 chapter 15).

CLI, STI, PUSHF, POPF, IRET, descriptor loads, faults and INT n run on the CPU with no exit. The VMM is
entered for what it intercepts: ports, HLT, CPUID, MSRs, control registers, physical interrupts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

from vmlab.errors import TripleFault
from vmlab.guests import GuestImage, boot
from vmlab.ledger import Snapshot
from vmlab.machine import task
from vmlab.machine import vmcb as v
from vmlab.machine.cpu import NT, Segment
from vmlab.machine.decode import Instruction, decode
from vmlab.machine.delivery import DOUBLE_FAULT, HAS_ERROR_CODE, PAGE_FAULT, Fault, doubles
from vmlab.machine.memory import PAGE
from vmlab.machine.paging import CR0_PG, EFER_LMA
from vmlab.machine.pc import Machine, Stop, StopReason
from vmlab.machine.state import FS, GS, RAX, RSP, SS
from vmlab.machine.svm import Svm
from vmlab.machine.svm_host import FREE_FRAMES
from vmlab.machine.vmcb import CountedVmcb, Vmcb
from vmlab.parameters import Value
from vmlab.strategies.base import GuestState, Strategy, physical_state, visible_registers
from vmlab.strategies.techniques import HardwareAssistedTechnique
from vmlab.vmm.assisted_memory import AssistedMemory, Nested, Shadowed
from vmlab.vmm.emulate import Emulator
from vmlab.vmm.guest_mode import GuestModeCpu
from vmlab.vmm.guest_tables import GuestMemory, GuestMmu
from vmlab.vmm.host import physical_bus
from vmlab.vmm.interrupt_window import InterruptWindow, NonMaskable, TaskPriority
from vmlab.vmm.operands import FETCHED, fetch
from vmlab.vmm.platform import VirtualPlatform
from vmlab.vmm.registers import HARMLESS_MSRS
from vmlab.vmm.shadow import ShadowPager
from vmlab.vmm.space import GUEST_FRAMES
from vmlab.vmm.stores import Stores
from vmlab.vmm.vcpu import VirtualCpu

# The VMM's frames: VMCB, permission maps (3 and 2 pages).
_VMCB, _IOPM, _MSRPM = (FREE_FRAMES + 0x1000 * page for page in (0, 1, 4))
_ALWAYS = (v.EXIT_INTR, v.EXIT_CPUID, v.EXIT_HLT, v.EXIT_IOIO, v.EXIT_MSR, v.EXIT_SHUTDOWN, *v.EXITS_OF_SVM)


def _permission_map() -> bytes:
    """The MSR permission map: every register exits but those that are the guest's own business (APM Vol. 2 §15.11)."""
    bits = bytearray(b"\xff" * 0x2000)
    for number in HARMLESS_MSRS:
        at = 2 * (number & 0x1FFF) + (0x4000 if number >> 30 else 0)
        bits[at // 8] &= ~(3 << at % 8)
    return bytes(bits)


class HardwareAssisted(HardwareAssistedTechnique, Strategy):
    """A VMM on AMD-V. Its main loop is :meth:`run`; each exit reason has one method."""

    def __init__(self, machine: Machine, parameters: Mapping[str, Value] | None = None) -> None:
        super().__init__(machine, parameters)
        machine.cpu.load()
        self._reset_registers = [machine.cpu.gpr(number) for number in range(8)]
        self.svm = Svm(machine)
        machine.monitor = self
        self.vmcb = CountedVmcb(machine.ram, _VMCB, self.counts)
        self.mmu = GuestMmu(GuestMemory(machine.ram, GUEST_FRAMES, self.guest_memory), self.counts)
        scheme = str(self.chosen["memory"])
        self._nested = scheme == "nested"
        self.cpu = GuestModeCpu(machine.cpu, self.vmcb, self.mmu, nested=self._nested)
        self.platform_devices = VirtualPlatform(machine, physical_bus(machine, self.counts, self.chosen["hypervisor"]), self.counts, self.mmu.memory)
        self.emulator = Emulator(machine, cast(VirtualCpu, self.cpu), self.platform_devices, self.counts)
        self.emulator.registers.carries_long_mode = True
        self.emulator.registers.on_tsc = lambda offset: self.cpu.write("tsc_offset", offset)
        self.memory: AssistedMemory = (
            Nested(self, str(self.chosen["nested_page"]), self.platform_devices.is_device) if self._nested
            else Shadowed(self, ShadowPager(self.mmu, self.counts, scheme=scheme, space=None, is_device=self.platform_devices.is_device)))
        self.stores = Stores(machine, self.mmu, self.emulator, self.memory.forget, own_tables=True)
        self._window = InterruptWindow(self.vmcb, self.counts)
        self._priority = TaskPriority(self.cpu, self.platform_devices.lapic)
        self.platform_devices.before_access, self.platform_devices.after_store = self._priority.take, self._priority.show
        self._nmi = NonMaskable(self.cpu, self.vmcb, self.counts)
        self.platform_devices.on_nmi = self._nmi.accept
        self._exits: dict[int, Callable[[], None]] = {
            **dict.fromkeys(range(v.EXIT_CR_READ, v.EXIT_DR_READ), self.emulate_next),
            v.EXIT_CPUID: self.emulate_next, v.EXIT_MSR: self.emulate_next, v.EXIT_HLT: self._halt, v.EXIT_IOIO: self._port,
            v.EXIT_IRET: self._nmi_handled, v.EXIT_INTR: self._nothing, v.EXIT_VINTR: self._window.close,
            **dict.fromkeys(v.EXITS_OF_SVM, self._undefined),
            v.EXIT_SHUTDOWN: self._shutdown, v.EXIT_TASK_SWITCH: self._task_switch, **self.memory.exits,
        }

        if self.machine.native_events is not None:
            self.svm.on_exit = self._exit_at_once
            self.svm.at_once = frozenset({*range(v.EXIT_CR_READ, v.EXIT_DR_READ), v.EXIT_CPUID, v.EXIT_MSR, v.EXIT_IOIO, *self.memory.exits})
        self._handled = False       # the exit that ended the run was handled before it did

    # ---- loading
    def load(self, image: GuestImage, command_line: str) -> None:
        cpu = self.machine.cpu
        begin = boot.start(image, command_line, self.guest_memory)
        for gpa, data in begin.pieces:
            self.mmu.memory.write(gpa, data)
        if begin.real_mode:
            self.mmu.enter_real_mode()
        self._prepare_vmcb(begin)
        self.svm.vmload(_VMCB)
        for number, value in enumerate(self._reset_registers):
            self.cpu.set_gpr(number, value)
        for number, value in begin.registers.items():
            self.cpu.set_gpr(number, value)
        cpu.store()

    def _prepare_vmcb(self, begin: boot.Start) -> None:
        ram, vmcb = self.machine.ram, self.vmcb
        vmcb.clear()
        ram.write(_IOPM, b"\xff" * 0x3000)   # every port
        ram.write(_MSRPM, _permission_map())
        vmcb["iopm_base"], vmcb["msrpm_base"] = _IOPM, _MSRPM
        vmcb["intercepts"] = sum(v.intercept_bit(code) for code in _ALWAYS) | self.memory.prepare(vmcb)
        vmcb["interrupt_control"] = v.V_INTR_MASKING
        vmcb["asid"] = 1
        # The state that a loader leaves; on shadow tables paging is on, and the guest does not know.
        code, data = ((Segment(0, 0, 0xFFFF, 0x9B00), Segment(0, 0, 0xFFFF, 0x9300)) if begin.real_mode else
                      (Segment(0x08, 0, 0xFFFFFFFF, 0xCF9B00), Segment(0x10, 0, 0xFFFFFFFF, 0xCF9300)))
        vmcb.set_segment("cs", code)
        for name in ("ss", "ds", "es", "fs", "gs"):
            vmcb.set_segment(name, data)
        vmcb.set_segment("tr", Segment(0, 0, 0, 0x8900))
        vmcb.set_segment("ldtr", Segment(0, 0, 0, 0x8200))
        vmcb["gdtr.limit"], vmcb["idtr.limit"] = 0xFFFF, 0x3FF
        vmcb["dr6"], vmcb["dr7"] = 0xFFFF0FF0, 0x400
        vmcb["rflags"], vmcb["rip"] = 2, begin.rip

    def frame_address(self, gpa: int) -> int:
        return GUEST_FRAMES + gpa

    # ---- the main loop
    def run(self, budget: int | None = None) -> Stop:
        machine = self.machine
        if budget is not None:
            machine.budget = budget
        while True:
            if not self.svm.in_guest:
                self._before_entry()
            self._handled = False
            stop = self.svm.run(_VMCB)
            if stop.reason is not StopReason.REQUESTED:
                return stop
            if not self._handled:
                self._exits.get(self.cpu.at_exit(), self._unexpected)()
                self.memory.follow()
                machine.cpu.store()
                self.cpu.settle()
            if machine.ending is not None and machine.ending.reason is not StopReason.REQUESTED:
                return machine.ending

    def _exit_at_once(self) -> bool:
        """The same for one exit in the middle of the run, where that can be: True to enter the guest again."""
        machine, cpu = self.machine, self.cpu
        self._exits.get(cpu.at_exit(), self._unexpected)()
        self.memory.follow()
        if machine.ending is None and not machine.pic.pending and not machine.stale_code:
            self._before_entry()
            return True
        cpu.settle()
        self._handled = True
        return False

    def _unexpected(self) -> None:
        raise AssertionError(f"#VMEXIT {self.cpu.read('exit_code'):#x} at {self.cpu.rip:#x}, which this VMM never asked for")

    def snapshot(self, upto: int | None = None) -> Snapshot:
        self.cpu.settle()
        return super().snapshot(upto)

    # ---- exits
    def emulate_next(self) -> None:
        """Decode the instruction that exited and carry it out; what it would have raised goes to the guest."""
        instruction = self._decode()
        try:
            if instruction is None or not self.emulator.knows(instruction.op):
                raise Fault(6)
            self.emulator.emulate(instruction)
            self.cpu.end_shadow()
        except Fault as fault:
            self.inject(fault)

    def _decode(self) -> Instruction | None:
        """AMD-V does not say which instruction exited, nor how long it is: the VMM fetches it."""
        self.counts["vmm.decode"] += 1
        cpu = self.cpu
        at, bits = cpu.code_at()
        known, mmu = self.svm.exiting, cpu.mmu
        if known is not None and not mmu.cr0 & CR0_PG:
            return known
        if known is not None and at % PAGE <= PAGE - FETCHED:   # the machine knows it, but the fetch walks the guest's tables, which shows
            gpa = mmu.translate(at)
            return known if mmu.memory.holds(gpa, known.raw) else decode(mmu.memory.read(gpa, FETCHED), bits)
        return decode(fetch(cpu, at), bits)

    def _port(self) -> None:
        """IN and OUT: port, size and the next RIP are in the exit information; INS and OUTS need decoding."""
        info = self.cpu.read("exit_info_1")
        if info & v.IO_STRING:
            self.emulate_next()
            return
        port, size = info >> v.IO_PORT_SHIFT, (info >> v.IO_SIZE_SHIFT) & 7
        self.counts["vmm.device"] += 1
        if info & v.IO_IN:
            self.cpu.set_gpr(RAX, self.platform_devices.port_read(port, size), size)
        else:
            self.platform_devices.port_write(port, size, self.cpu.gpr(RAX))
        self.cpu.rip = self.cpu.read("exit_info_2")
        self.cpu.end_shadow()
        self.emulator.count("in" if info & v.IO_IN else "out", self.cpu.cpl == 3)

    def _halt(self) -> None:
        """HLT: wait for an interrupt that the guest accepts; the run is over when none can come."""
        self.emulate_next()
        self._priority.take()
        if not self.cpu.interrupts_enabled:     # nothing can wake it, whatever else goes on in the machine
            self.machine.idle()
            self.machine.stop(Stop(StopReason.HALTED))
        elif self.platform_devices.pending or self._nmi.waits:
            self.machine.idle()
        else:
            while self.svm.wait().reason is StopReason.REQUESTED and not self.platform_devices.pending:
                pass

    def _undefined(self) -> None:
        """AMD-V's own instructions: the guest has none (EFER.SVME is hidden), so the bare machine would raise #UD."""
        self.inject(Fault(6))

    def carry_out(self, address: int) -> None:
        """The instruction at RIP accesses ``address``, where the CPU must not: the VMM does all of it."""
        instruction = self._decode()
        if instruction is None:
            raise AssertionError(f"the instruction at {self.cpu.rip:#x} accessed {address:#x}, and cannot be decoded")
        try:
            self.stores.carry_out(self.cpu, instruction, address)
            self.cpu.end_shadow()
        except Fault as fault:
            self.inject(fault)

    def note_foreign(self, gpa: int, verb: str = "mapped") -> None:
        """The guest reached for a frame that is not its own: it sees an empty bus."""
        self.refused.append(f"the guest at {self.cpu.rip:#x} {verb} guest-physical {gpa:#x}, "
                            f"beyond its {self.guest_memory >> 20} MiB; nothing answers there")
        self.counts["safety.refused"] += 1

    def _task_switch(self) -> None:
        """On shadow tables the VMM switches tasks: a new task brings a CR3. What went wrong is the guest's exception."""
        cpu = self.cpu
        selector, info, during = cpu.read("exit_info_1") & 0xFFFF, cpu.read("exit_info_2"), cpu.read("exit_interrupt_info")
        event = during & v.EVENT_TYPE if during & v.EVENT_VALID else None
        reason = (task.Reason.RETURN if info & v.TASK_BY_IRET else task.Reason.JUMP if info & v.TASK_BY_JUMP
                  else task.Reason.CALL if event is None else task.Reason.GATE)
        instruction = self._decode() if event in (None, v.EVENT_SOFTWARE) else None     # RIP is at it
        user = cpu.cpl == 3
        try:
            task.switch(cpu, selector, info & 0xFFFFFFFF if info & v.TASK_HAS_ERROR else None,
                        cpu.rip if instruction is None else cpu.advance(instruction.size), reason)
        except Fault as fault:
            self.inject(fault, during if event is not None else 0)
        else:
            if instruction is not None and instruction.op is not None:
                self.emulator.count(instruction.op, user)
            else:
                self.counts["vmm.emulate"] += 1

    def _shutdown(self) -> None:
        raise TripleFault(f"triple fault: the guest's CPU shut down at {self.cpu.rip:#x}")

    def _nothing(self) -> None:
        """A physical interrupt: :meth:`_before_entry` lets the host take it."""

    # ---- events for the guest
    def inject(self, fault: Fault, during: int = 0) -> None:
        """Raise an exception in the guest. ``during``: the event whose delivery raised it (SDM Vol. 3A §6.15, double fault)."""
        if fault.vector == PAGE_FAULT and fault.address is not None:
            self.cpu.cr2 = fault.address
        vector, error_code = fault.vector, (fault.error_code or 0) if fault.vector in HAS_ERROR_CODE else None
        if during & v.EVENT_TYPE == v.EVENT_EXCEPTION:
            if during & 0xFF == DOUBLE_FAULT:
                raise TripleFault(f"triple fault at {self.cpu.rip:#x}: exception {vector} while delivering a double fault")
            if doubles(during & 0xFF, vector):
                vector, error_code = DOUBLE_FAULT, 0
        self.counts["vmm.inject"] += 1
        self.counts[f"reflect.{vector}"] += 1
        self.cpu.write("event_injection", v.event(v.EVENT_EXCEPTION, vector, error_code))

    def inject_again(self, during: int) -> None:
        """The event whose delivery an exit interrupted. INT n needs no help: RIP is still at it."""
        if during and during & v.EVENT_TYPE != v.EVENT_SOFTWARE:
            self.counts["vmm.inject"] += 1
            self.cpu.write("event_injection", during)

    def _before_entry(self) -> None:
        """Take physical interrupts, then inject a virtual one, or ask for the moment when the guest accepts it."""
        platform = self.platform_devices
        if self.machine.pic.pending:
            self.svm.take_interrupts()
        elif not (platform.pending or platform.lapic.irr or self._nmi.waits or self._window.opened is not None):     # as before most entries
            self.cpu.settle()
            return
        if self._nmi.waits:
            self._nmi.inject()
        if platform.lapic.irr:
            self._priority.take()
        if not platform.pending:
            held_back = self._priority.held_back
            if held_back is None:
                self._window.close()
            else:
                self._window.open(held_back)
        elif not self.cpu.interrupts_enabled or self.cpu.read("interrupt_shadow") or self.cpu.read("event_injection"):
            self._window.open()
        else:
            self._window.close()
            self.counts["interrupt.injected"] += 1
            self.counts["vmm.inject"] += 1
            self.cpu.write("event_injection", v.event(v.EVENT_INTERRUPT, platform.acknowledge()))
        self.cpu.settle()

    def _nmi_handled(self) -> None:
        """The handler of an NMI is about to return. One that waits comes behind its IRET (SDM Vol. 3A §6.7.1), which the VMM carries out then.

        Not a return to another task: the NMI comes before that one, on top of the handler's frame.
        """
        self._nmi.handled()
        cpu = self.cpu
        if self._nmi.waits and (cpu.long_mode or not cpu.eflags & NT):
            self.carry_out(cpu.segment(SS).base + cpu.gpr(RSP))

    def interrupt(self) -> None:
        """The host took a physical interrupt: forward it to the guest's controller."""
        self.counts["vmm.device"] += 1
        self.platform_devices.physical_interrupt()

    def exception(self, vector: int, error_code: int | None, *, software: bool) -> None:
        """Only the guest has exceptions, and the CPU delivers those to it."""
        raise AssertionError(f"exception {vector} in the VMM's own code")

    def deliver_interrupt(self, vector: int) -> None:
        pic = self.platform_devices.pic
        pic.set_line((vector - pic.master.base) & 7, True)
        if self.svm.in_guest:
            self.svm.kick()

    # ---- to be saved
    def state(self) -> dict[str, Any]:
        self.cpu.settle()
        return self._counted() | {
            "svm": self.svm.state(), "mmu": self.mmu.state(), "cpu": self.cpu.state(), "registers": self.emulator.registers.state(),
            "devices": self.platform_devices.state(), "memory": self.memory.pager.state(), "window": self._window.state(),
            "nmi": self._nmi.state(),
        }

    def from_state(self, state: dict[str, Any]) -> None:
        parts: tuple[tuple[str, Any], ...] = (("svm", self.svm), ("mmu", self.mmu), ("cpu", self.cpu), ("registers", self.emulator.registers),
                                              ("devices", self.platform_devices), ("memory", self.memory.pager), ("window", self._window))
        for name, part in parts:
            part.from_state(state[name])
        self._nmi.from_state(state["nmi"])
        self._count_on(state)

    # ---- state
    @property
    def long_mode(self) -> bool:
        """The CPU's EFER in guest mode, else the one in the VMCB: the VMM is in a mode of its own."""
        if self.svm.in_guest:
            return super().long_mode
        return bool(Vmcb(self.machine.ram, _VMCB)["efer"] & EFER_LMA)

    def guest_state(self) -> GuestState:
        physical = self.machine.cpu
        if self.svm.in_guest:
            return self._believed(physical_state(physical))
        physical.load()
        vmcb = Vmcb(self.machine.ram, _VMCB)  # looked at from outside: not the VMM's work
        in_vmcb = {RAX: vmcb["rax"], RSP: vmcb["rsp"]}
        gpr = visible_registers(lambda number: in_vmcb.get(number, physical.gpr(number)), bool(vmcb["efer"] & EFER_LMA))
        es, cs, ss, ds = (segment.selector for segment in vmcb.switched_segments())
        selectors = (es, cs, ss, ds, physical.selector(FS), physical.selector(GS))
        return self._believed(GuestState(
            gpr=gpr, rip=vmcb["rip"], eflags=vmcb["rflags"], selectors=selectors,
            cr0=vmcb["cr0"], cr2=vmcb["cr2"], cr3=vmcb["cr3"], cr4=vmcb["cr4"],
            gdt=(vmcb["gdtr.base"], vmcb["gdtr.limit"]), idt=(vmcb["idtr.base"], vmcb["idtr.limit"])))

    def _believed(self, true: GuestState) -> GuestState:
        """The state with the control registers that the guest wrote, in place of those that it runs with."""
        mmu = self.mmu
        return true if self._nested else dataclasses.replace(true, cr0=mmu.cr0, cr3=mmu.cr3, cr4=mmu.cr4)
