"""AMD-V: guest mode, VMRUN and #VMEXIT (APM Vol. 2 chapter 15).

The CPU itself runs VMRUN: it saves the host to the host save area, loads the guest from the VMCB, checks
intercepts and injects events. Unicorn leaves the rest of the world switch to whoever hooks its exceptions,
and that is this file: #VMEXIT (guest to the VMCB, host back from the save area), the intercepts that
QEMU's model lacks (ports, physical interrupts, RDTSC), V_IRQ, and delivery inside the guest.

The host that enters guests is in svm_host.py; see also ``docs/hardware-assistance.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vmlab.errors import TripleFault
from vmlab.machine import task
from vmlab.machine import vmcb as v
from vmlab.machine.counter import ALWAYS, WHEN_ENABLED
from vmlab.machine.cpu import IF
from vmlab.machine.decode import Instruction
from vmlab.machine.delivery import PAGE_FAULT, Fault, deliver
from vmlab.machine.fast_svm import AGAIN, EXIT_CODE, TOKEN
from vmlab.machine.paging import NestedFault, PageFault
from vmlab.machine.pc import Machine, Stop, StopReason
from vmlab.machine.state import HF2_GIF, HF2_HIF, HF2_VINTR, HF_GUEST, RAX
from vmlab.machine.svm_host import HOST_SAVE, VMRUN, Host
from vmlab.machine.svm_intercepts import Intercepts
from vmlab.machine.svm_switch import world_switch
from vmlab.machine.svm_tasks import InterceptedTask, instructed, switch_in_guest
from vmlab.machine.vmcb import Vmcb

_EVENTS = {code: f"exit.{v.exit_reason(code)}" for code in (*range(0xA0), v.EXIT_NPF)}


class _Diverted(Exception):
    """A fault during delivery inside the guest is intercepted."""

    def __init__(self, during: int, fault: Fault) -> None:
        super().__init__()
        self.during, self.fault = during, fault


class Svm(Host):
    """The machine's AMD-V, and the host-mode code by which a VMM uses it. One per machine."""

    def __init__(self, machine: Machine) -> None:
        self._vmcb = Vmcb(machine.ram, 0)
        self._host = Vmcb(machine.ram, HOST_SAVE)
        self._intercepts = Intercepts(self._vmcb, machine.ram)
        self._injected = 0
        self._virtual_interrupt = False
        self._kicked = False
        self._attention = 0
        self._code = 0              # of the last exit
        #: The instruction that exited, where the machine knows it: as long as nothing was mapped elsewhere, a fetch gives the same bytes.
        self.exiting: Instruction | None = None
        self._sound = b""           # what passed VMRUN's checks last time
        #: A VMM that handles an exit at once, in the middle of the run: True to enter the guest again (RIP is at VMRUN then). It is asked
        #: for the exit codes in ``at_once``; at all others, and where it says False, the run ends.
        self.on_exit: Callable[[], bool] | None = None
        self.at_once: frozenset[int] = frozenset()
        native = machine.native_events
        self._native = None if native is None else native.connect_svm(HOST_SAVE, VMRUN, self._plain_exit, self._plain_entry)
        #: Whether the CPU stands inside the guest: it runs there, or was stopped there by budget or device.
        self.in_guest = False
        machine.guest_mode = self
        machine.on_attention = self._attend
        super().__init__(machine)

    # ---- to be saved
    _FIELDS = ("_injected", "_virtual_interrupt", "_kicked", "_attention", "_code", "_sound", "in_guest")

    def state(self) -> dict[str, Any]:
        return {name.lstrip("_"): getattr(self, name) for name in self._FIELDS} | {"vmcb": self._vmcb.address}

    def from_state(self, state: dict[str, Any]) -> None:
        for name in self._FIELDS:
            setattr(self, name, state[name.lstrip("_")])
        self._vmcb.address = state["vmcb"]
        if self._native is not None and self.in_guest:
            waits = self._injected or self._virtual_interrupt or self._kicked
            self._native.entering(self._vmcb.address, self.machine.cpu.nested_root, not waits)

    # ---- VMRUN
    def run(self, address: int) -> Stop:
        """Enter the guest of the VMCB at ``address`` and return at its #VMEXIT (``REQUESTED``).

        The window onto the CPU is loaded afterwards: general registers other than RAX and RSP are the
        guest's and may be changed. A machine that stopped inside the guest goes on there.
        """
        machine = self.machine
        if self.in_guest:
            return machine.run()
        if not self._prepare(address):
            return Stop(StopReason.REQUESTED)
        return self._call(VMRUN, address)

    def _prepare(self, address: int) -> bool:
        """What VMRUN looks at and QEMU does not; False when it refuses, and exits at once."""
        machine, vmcb = self.machine, self._vmcb
        vmcb.address = address
        machine.events["entry"] += 1
        checked = vmcb.checked()
        if checked != self._sound and not self._consistent(vmcb):
            machine.cpu.rip = VMRUN
            self._record_exit(vmcb, v.EXIT_INVALID, 0, 0)
            return False
        self._sound = checked
        machine.blocks.space_changed()
        machine.tsc_offset, control, nested, injected, nested_root = vmcb.entry_controls()
        # Unicorn cannot take V_IRQ back from its CPU at #VMEXIT, so it never sees it: _attend() does it.
        self._virtual_interrupt = bool(control & v.V_IRQ)
        if control & v.V_IRQ:
            vmcb["interrupt_control"] = control & ~v.V_IRQ
        # Its VMRUN delivers an interrupt and then raises it as an exception as well: _attend() does that too.
        self._injected = injected if injected & v.EVENT_VALID else 0
        if injected:
            vmcb["event_injection"] = 0
        self._want_attention()
        self.in_guest = True
        machine.cpu.nested_root = nested_root if nested & 1 else 0
        if machine.accesses is not None:
            machine.accesses.world_switch(machine.cpu.nested_root or vmcb["cr3"])
        if self._native is not None:
            waits = self._injected or self._virtual_interrupt or self._kicked
            self._native.entering(address, machine.cpu.nested_root, not waits and machine.accesses is None)
        return True

    def _want_attention(self) -> None:
        wanted = ALWAYS if self._injected or self._kicked else WHEN_ENABLED if self._virtual_interrupt else 0
        if wanted != self._attention:
            self._attention = wanted
            self.machine.request_attention(bool(wanted), masked=wanted == WHEN_ENABLED)

    @staticmethod
    def _consistent(vmcb: Vmcb) -> bool:
        """The checks of VMRUN that QEMU leaves out (APM Vol. 2 §15.5.1)."""
        cr4, _, cr0, dr7, dr6, _, _ = vmcb.switched_registers()
        efer = vmcb["efer"]
        long_paging = efer & 1 << 8 and cr0 >> 31 & 1
        return bool(efer & 1 << 12 and vmcb["asid"] and vmcb["intercepts"] & v.intercept_bit(v.EXIT_VMRUN)
                    and not (cr0 & 1 << 29 and not cr0 & 1 << 30) and not cr0 >> 32 and not dr6 >> 32
                    and not dr7 >> 32 and not (long_paging and (not cr4 & 1 << 5 or not cr0 & 1)))

    def kick(self) -> None:
        """Make a running guest exit at its next instruction boundary, as an interrupt from another CPU does."""
        self._kicked = True
        if self._native is not None:
            self._native.not_plain()
        self._want_attention()

    # ---- #VMEXIT
    def exit(self, code: int, info_1: int = 0, info_2: int | None = None, *, during: int | None = None, told: bool = True) -> None:
        """The world switch back (APM Vol. 2 §15.6). The window must be loaded; it holds the host afterwards.

        The run ends, so that the VMM can handle the exit; without ``told`` the caller calls :meth:`exited`, which may handle it at once.

        :param info_2: None leaves what the CPU wrote.
        :param during: the event whose delivery was interrupted (EXITINTINFO).
        """
        vmcb = self._vmcb
        if self._native is not None:
            self._native.switch()
        else:
            world_switch(self.machine.cpu, vmcb, self._host)
        control = vmcb["interrupt_control"]
        vmcb["interrupt_control"] = control | v.V_IRQ if self._virtual_interrupt else control & ~v.V_IRQ
        self._record_exit(vmcb, code, info_1, info_2, during)
        self._virtual_interrupt = self._kicked = False
        self._code, self.exiting = code, None
        self._left()
        if told:
            self.machine.stop(Stop(StopReason.REQUESTED))

    def _plain_exit(self) -> None:
        """C carried out the switch of an exit with no event under way, and filled in the VMCB. It enters the guest again where it is told to."""
        native, machine = self._native, self.machine
        assert native is not None
        try:
            code = self._code = native.words[EXIT_CODE]
            self.exiting = native.tokens[native.state[TOKEN]]
            machine.events[_EVENTS.get(code) or f"exit.{v.exit_reason(code)}"] += 1
            self.in_guest = False       # no event was under way, and the TLB is not modelled: nothing else to take back
            machine.tsc_offset = 0
            if code in self.at_once and self.on_exit is not None and self.on_exit():
                machine.events["entry"] += 1
                machine.blocks.space_changed()
                self.in_guest = True
                native.words[AGAIN] = 1
            elif machine.ending is None:
                machine.stop(Stop(StopReason.REQUESTED))
        except BaseException as failure:  # noqa: BLE001 - nothing may cross Unicorn's frames
            machine.fail(failure)

    def _plain_entry(self) -> None:
        """C left it to Python to prepare that entry."""
        machine = self.machine
        try:
            self.in_guest = False
            machine.events["entry"] -= 1
            self._enter_again()
        except BaseException as failure:  # noqa: BLE001
            machine.fail(failure)

    def _left(self) -> None:
        """The host runs again."""
        machine = self.machine
        self.in_guest = False
        self._want_attention()
        machine.tsc_offset = 0
        if machine.accesses is not None:
            machine.accesses.world_switch()

    def exited(self) -> None:
        """The block that the guest left has been left, and the host runs: the VMM handles the exit now, or when the run has ended."""
        if self._code not in self.at_once or self.on_exit is None or not self.on_exit():
            if self.machine.ending is None:
                self.machine.stop(Stop(StopReason.REQUESTED))
        else:
            self._enter_again()

    def _enter_again(self) -> None:
        """The VMM handled the exit at once: on to VMRUN, unless it refuses."""
        machine = self.machine
        if self._prepare(self._vmcb.address):
            machine.cpu.set_gpr(RAX, self._vmcb.address, 8)
            machine.cpu.rip = VMRUN
        elif machine.ending is None:
            machine.stop(Stop(StopReason.REQUESTED))

    def _record_exit(self, vmcb: Vmcb, code: int, info_1: int, info_2: int | None, during: int | None = None) -> None:
        self.machine.events[_EVENTS.get(code) or f"exit.{v.exit_reason(code)}"] += 1
        vmcb["exit_code"], vmcb["exit_info_1"] = code, info_1
        if info_2 is not None:
            vmcb["exit_info_2"] = info_2
        vmcb["exit_interrupt_info"] = self._injected if during is None else during
        vmcb["event_injection"] = self._injected = 0

    # ---- what pc.py asks while the CPU is in guest mode
    def intercepts(self, op: str, instruction: Instruction) -> bool:
        """Before an instruction that the machine carries out itself: exit if it is intercepted."""
        if op in task.INSTRUCTIONS:
            return self._leaves_task(op, instruction)
        found = self._intercepts.of_instruction(op, instruction, self.machine.cpu)
        if found is not None:
            self.exit(*found, told=False)
        return found is not None

    def watches_tasks(self) -> bool:
        """Whether task switches exit."""
        return self._intercepts.wants(v.EXIT_TASK_SWITCH)

    def _leaves_task(self, op: str, instruction: Instruction) -> bool:
        """A far JMP or CALL to a task, or IRET with NT: Unicorn switches tasks without looking at the intercept, so the machine does."""
        found = instructed(self.machine.cpu, op, instruction) if self.watches_tasks() else None
        if found is not None:
            self.exit(v.EXIT_TASK_SWITCH, *found, during=0)
        return found is not None

    @property
    def virtual_tpr(self) -> int | None:
        """CR8 of a guest under V_INTR_MASKING: V_TPR (APM Vol. 2 §15.21.2)."""
        control = self._vmcb["interrupt_control"]
        return control & v.V_TPR if control & v.V_INTR_MASKING else None

    @virtual_tpr.setter
    def virtual_tpr(self, value: int | None) -> None:
        assert value is not None
        self._vmcb["interrupt_control"] = self._vmcb["interrupt_control"] & ~v.V_TPR | value

    def watches_cr0(self) -> bool:
        """Whether a read of CR0 exits."""
        return bool(self._vmcb["intercept_cr_read"] & 1)

    def lets_flush(self, op: str, number: int) -> bool:
        """Whether the guest's MOV to CR ``number``, or INVLPG, is carried out by the CPU itself."""
        if op == "invlpg":
            return not self._intercepts.wants(v.EXIT_INVLPG)
        return not self._vmcb["intercept_cr_write"] >> number & 1

    def lets_interrupts_in(self) -> bool:
        """Whether the CPU recognises a physical interrupt now (APM Vol. 2 §15.17, §15.21.1)."""
        cpu = self.machine.cpu
        if not cpu.hflags & HF_GUEST:
            return bool(cpu.hflags2 & HF2_GIF and cpu.system_flags & IF) and not cpu.shadow
        # Not in the interrupt shadow: an exit there would lose it, since Unicorn's VMRUN does not load it.
        if cpu.shadow or self._injected:
            return False
        return bool(cpu.hflags2 & HF2_HIF if cpu.hflags2 & HF2_VINTR else cpu.system_flags & IF)

    def takes_interrupt(self) -> bool:
        """A physical interrupt arrived in guest mode: exit if it is intercepted, else it is the guest's."""
        if not self._intercepts.wants(v.EXIT_INTR):
            return False
        self.exit(v.EXIT_INTR, 0, 0)
        return True

    def _attend(self) -> bool:
        """At a block's start: the injected event, a kick, or the virtual interrupt (APM Vol. 2 §15.20, §15.21.4)."""
        cpu = self.machine.cpu
        if not cpu.hflags & HF_GUEST:
            return False
        if self.deliver_injected():
            return True
        if cpu.shadow:
            return False
        if self._kicked and self._intercepts.wants(v.EXIT_INTR):
            self.exit(v.EXIT_INTR, 0, 0)
            return True
        if not self._virtual_interrupt or not cpu.system_flags & IF:
            return False
        control = self._vmcb["interrupt_control"]
        if not control & v.V_IGNORE_TPR and (control & v.V_PRIORITY) >> 16 <= control & v.V_TPR:
            return False
        if self._intercepts.wants(v.EXIT_VINTR):
            self.exit(v.EXIT_VINTR, 0, 0)
            return True
        self._virtual_interrupt = False
        self._want_attention()
        if self.deliver(self._vmcb["interrupt_vector"] & 0xFF, None, external=True) is not None:
            self.machine.events["interrupt.delivered"] += 1
        return True

    def deliver_injected(self) -> bool:
        """The event that VMRUN was told to inject enters the guest before its first instruction; False: there is none."""
        event = self._injected
        if not event:
            return False
        vector, kind = event & 0xFF, event & v.EVENT_TYPE
        external, software = kind in (v.EVENT_INTERRUPT, v.EVENT_NMI), kind == v.EVENT_SOFTWARE
        error_code = event >> 32 if event & v.EVENT_HAS_ERROR else None
        delivered = self.deliver(vector, error_code, software=software, external=external)
        if delivered is not None:
            whole = delivered == vector
            self.machine.events["interrupt.delivered" if external and whole else "interrupt.software" if software and whole
                                else f"fault.delivered.{delivered}"] += 1
        return True

    def deliver(self, vector: int, error_code: int | None, *, software: bool = False, external: bool = False,
                fault_rip: int | None = None) -> int | None:
        """Through the guest's own IDT; returns the vector delivered, or None when that ended in a #VMEXIT."""
        try:
            delivered = deliver(self.machine.cpu, vector, error_code, software=software, external=external,
                                fault_rip=fault_rip, on_fault=self._divert,
                                on_task=lambda event, selector, code, rip: self._switch_task(
                                    _event(event, code, software and event == vector, external and event == vector), selector, code, rip))
        except InterceptedTask as left:
            if fault_rip is not None:
                self.machine.cpu.rip = fault_rip
            self.exit(v.EXIT_TASK_SWITCH, left.selector, left.info, during=left.during)
            return None
        except _Diverted as diverted:
            fault = diverted.fault
            self.exit(v.EXIT_EXCEPTION + fault.vector, fault.error_code or 0, fault.address or 0, during=diverted.during)
            return None
        except NestedFault as missing:
            if fault_rip is not None:
                self.machine.cpu.rip = fault_rip
            self.exit(v.EXIT_NPF, missing.error_code, missing.gpa, during=_event(vector, error_code, software, external))
            return None
        except TripleFault:
            if not self._intercepts.wants(v.EXIT_SHUTDOWN):
                raise
            self.exit(v.EXIT_SHUTDOWN, 0, 0)
            return None
        if self._injected:
            self._injected = 0
            self._want_attention()
            if self._native is not None and not self._virtual_interrupt and not self._kicked and self.machine.accesses is None:
                self._native.plain()
        return delivered

    def _switch_task(self, event: int, selector: int, error_code: int | None, return_rip: int) -> None:
        """A task gate in the guest's IDT."""
        if self.watches_tasks():
            raise InterceptedTask(selector, 0 if error_code is None else v.TASK_HAS_ERROR | error_code, event)
        switch_in_guest(self.machine.cpu, selector, error_code, return_rip)

    def memory_fault(self, fault: PageFault | NestedFault) -> bool:
        """The machine, doing an instruction for the CPU, faulted on memory: exit if that is intercepted; False: it is the guest's own."""
        if isinstance(fault, NestedFault):
            self.exit(v.EXIT_NPF, fault.error_code, fault.gpa)
        elif self._vmcb["intercept_exceptions"] & 1 << PAGE_FAULT:
            self.exit(v.EXIT_EXCEPTION + PAGE_FAULT, fault.error_code, fault.address)
        else:
            return False
        return True

    def _divert(self, vector: int, error_code: int | None, software: bool, external: bool, fault: Fault) -> None:
        if self._vmcb["intercept_exceptions"] & 1 << fault.vector:
            raise _Diverted(_event(vector, error_code, software, external), fault)


def _event(vector: int, error_code: int | None, software: bool, external: bool) -> int:
    """What EXITINTINFO says of an event whose delivery an exit interrupted."""
    return v.event(v.EVENT_SOFTWARE if software else v.EVENT_INTERRUPT if external else v.EVENT_EXCEPTION, vector, error_code)
