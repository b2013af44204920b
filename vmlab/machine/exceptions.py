"""Taking exceptions and interrupts: from Unicorn's hooks to a monitor, to guest mode, or through the IDT.

Who takes them? With no monitor, the guest: through the IDT in machine memory. With a monitor (a VMM), the
monitor: its Python methods are the handlers that a real VMM keeps behind its own IDT. Either way the CPU
got there by a real exception at a real privilege level.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from unicorn import unicorn_const as uc_const

from vmlab.errors import UnsupportedHost
from vmlab.ledger import EXCEPTIONS
from vmlab.machine import state as hidden
from vmlab.machine import task
from vmlab.machine.counter import ALWAYS, WHEN_ENABLED
from vmlab.machine.cpu import IF
from vmlab.machine.decode import Instruction
from vmlab.machine.delivery import GENERAL_PROTECTION, HAS_ERROR_CODE, STACK_FAULT, deliver
from vmlab.machine.engine import INTR_CALLBACK, INVALID_CALLBACK
from vmlab.machine.long_checks import back_to_transfer, canonical, is_stack_fault

if TYPE_CHECKING:
    from vmlab.machine.pc import Machine

#: Above this, the number that Unicorn's exception hook gets is an exit code (QEMU: EXCP_VMEXIT).
_VMEXIT = 0x100


class Exceptions:
    """Faults, traps and software interrupts of the CPU."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        #: The instruction that just faulted, as decoded before its block first ran (None: not known).
        self.faulting: Instruction | None = None
        machine.engine.hook(uc_const.UC_HOOK_INSN_INVALID, INVALID_CALLBACK, self._on_invalid)

    def listen(self) -> None:
        """Have Unicorn tell of exceptions: on the fast path C hears of them first (fast_events.py)."""
        self._machine.engine.hook(uc_const.UC_HOOK_INTR, INTR_CALLBACK, self.on_exception)

    def on_exception(self, _uc: int, vector: int, _data: int) -> None:
        machine = self._machine
        try:
            if machine.failure is not None:
                machine.engine.stop()
                return
            cpu, counter = machine.cpu, machine.counter
            cpu.load()
            if vector >= _VMEXIT:
                self._exit_guest(vector - _VMEXIT)
                return
            software = cpu.is_software_interrupt and vector != 1
            error_code = cpu.error_code if vector in HAS_ERROR_CODE and not software else None
            cpu.forget_exception()
            if machine.in_guest and machine.guest_mode is not None and machine.guest_mode.deliver_injected():
                counter.current = None
            elif software:
                self._software_interrupt(vector, counter.instruction_before(cpu.rip + cpu.segment(hidden.CS).base))
            else:
                lost = vector == GENERAL_PROTECTION and not error_code and cpu.hflags & hidden.HF_CS64 and not canonical(cpu.rip)
                if lost and counter.current is not None:
                    back_to_transfer(cpu, counter.current)
                self.faulting = self._leave()
                cpu.forget_exception()      # again: behind an IRET, leaving its block read the state anew
                self.take(vector, error_code)
            cpu.store()
            counter.set_cpl(cpu.cpl)
        except BaseException as failure:  # noqa: BLE001
            machine.fail(failure)

    def _on_invalid(self, _uc: int, _data: int) -> bool:
        machine = self._machine
        try:
            if machine.failure is not None:
                return False
            cpu = machine.cpu
            cpu.load()
            self.faulting = machine.counter.leave(cpu.rip + cpu.segment(hidden.CS).base)
            cpu.forget_exception()
            self.take(6, None)
            cpu.store()
            machine.counter.set_cpl(cpu.cpl)
            return True
        except BaseException as failure:  # noqa: BLE001
            machine.fail(failure)
            return False

    def _leave(self) -> Instruction | None:
        """The instruction at RIP did not complete; returns it."""
        machine = self._machine
        instruction = machine.counter.leave(machine.cpu.rip + machine.cpu.segment(hidden.CS).base)
        if instruction is not None and instruction.search:
            machine.events["machine.string"] -= 1  # this element was not looked at after all
        return instruction

    def _exit_guest(self, code: int) -> None:
        """The CPU itself found an intercept."""
        machine = self._machine
        if machine.guest_mode is None:
            raise UnsupportedHost(f"the CPU left a guest mode that the machine did not enter (exit code {code:#x})")
        # An event to inject comes before the instruction at RIP, even before its fetch can fault.
        if machine.guest_mode.deliver_injected():
            machine.counter.current = None
        else:
            self._leave()
            machine.guest_mode.exit(code, machine.cpu.error_code)
        machine.cpu.store()
        machine.counter.set_cpl(machine.cpu.cpl)

    def _software_interrupt(self, vector: int, last: tuple[int, Instruction] | None) -> None:
        machine = self._machine
        cpu, counter = machine.cpu, machine.counter
        start = cpu.rip - (last[1].size if last else 2)
        at = start + cpu.segment(hidden.CS).base
        if machine.monitor is not None and vector not in machine.direct_gates and not machine.in_guest:
            if cpu.cpl <= machine.software_gates.get(vector, 0):
                counter.leave(at, retired=True)
                self.take(vector, None, software=True)
            else:  # the monitor's gate is more privileged: #GP, the instruction did not retire
                cpu.rip = start
                self.faulting = counter.leave(at)
                self.take(13, vector * 8 + 2)
            return
        delivered = self.deliver(vector, None, software=True, fault_rip=start)
        counter.leave(at, retired=delivered == vector)
        if delivered == vector:
            machine.events["interrupt.software"] += 1
        elif delivered is not None:
            machine.events[f"fault.delivered.{delivered}"] += 1

    def take(self, vector: int, error_code: int | None, *, software: bool = False) -> None:
        """An exception goes to the monitor, or through the IDT."""
        machine = self._machine
        if (vector == GENERAL_PROTECTION and not error_code and machine.cpu.hflags & hidden.HF_CS64 and self.faulting is not None
                and is_stack_fault(machine.cpu, self.faulting)):
            vector = STACK_FAULT
        if machine.monitor is not None and not machine.in_guest:
            name = "int" if software else EXCEPTIONS.get(vector, "mc")
            machine.events[f"trap.{name}"] += 1
            machine.monitor.exception(vector, error_code, software=software)
            return
        delivered = self.deliver(vector, error_code)
        if delivered is not None:
            machine.events[f"fault.delivered.{delivered}"] += 1

    def deliver(self, vector: int, error_code: int | None, *, software: bool = False, external: bool = False,
                fault_rip: int | None = None) -> int | None:
        """Through the IDT in machine memory; None when that made the CPU leave guest mode."""
        machine = self._machine
        if machine.in_guest and machine.guest_mode is not None:
            return machine.guest_mode.deliver(vector, error_code, software=software, external=external, fault_rip=fault_rip)
        return deliver(machine.cpu, vector, error_code, software=software, external=external, fault_rip=fault_rip,
                       on_task=lambda vector, selector, code, rip: task.switch(machine.cpu, selector, code, rip))


class Interrupts:
    """The CPU's INTR pin, and a monitor's wish to be asked at the next block start.

    ``attention`` is what the block hook looks at: the pin is up or the monitor asked.
    """

    def __init__(self, machine: Machine, exceptions: Exceptions) -> None:
        self._machine, self._exceptions = machine, exceptions
        self.attention = self._requested = self._masked = False
        self._nmi = False
        #: IRETs that had retired when an NMI was taken: until the next one another waits (SDM Vol. 3A §6.7.1). None: none is under way.
        self._nmi_since: int | None = None
        #: A monitor that asked by :meth:`request` is called at block starts; True when it moved RIP.
        self.on_attention: Callable[[], bool] = lambda: False

    def request(self, on: bool, *, masked: bool = False) -> None:
        """A monitor wants to be asked (``on_attention``) before the next block runs; ``masked``: it has nothing to do while EFLAGS.IF is off."""
        if on != self._requested or (on and masked) != self._masked:
            self._requested, self._masked = on, on and masked
            self.update()

    def raise_nmi(self) -> None:
        """A non-maskable interrupt; one that comes while another is waiting is the same one."""
        self._nmi = True
        self.update()

    @property
    def nmi_ready(self) -> bool:
        """Whether the CPU takes a waiting NMI now, at a block's start."""
        machine, last = self._machine, self._machine.counter.current
        retired = sum(machine.counter.irets) + bool(last is not None and last.iret)     # the block that just ended is not counted yet
        if self._nmi_since is not None and retired > self._nmi_since:
            self._nmi_since = None
        return self._nmi and self._nmi_since is None and not machine.cpu.shadow

    def take_nmi(self) -> None:
        """The CPU accepts the NMI: vector 2, whatever IF says."""
        self._nmi, self._nmi_since = False, sum(self._machine.counter.irets)
        self.update()
        self._machine.events["interrupt.delivered"] += 1
        self._exceptions.deliver(2, None, external=True)

    def state(self) -> dict[str, Any]:
        retired = sum(self._machine.counter.irets)
        return {"requested": self._requested, "masked": self._masked, "nmi": self._nmi,
                "nmi_since": None if self._nmi_since is None else self._nmi_since - retired}

    def from_state(self, state: dict[str, Any]) -> None:
        """IRETs are counted from this machine's own start."""
        since = state["nmi_since"]
        self._requested, self._masked, self._nmi = state["requested"], state["masked"], state["nmi"]
        self._nmi_since = None if since is None else since + sum(self._machine.counter.irets)
        self.update()

    def update(self) -> None:
        """The pin may have changed."""
        machine = self._machine
        pin = machine.intr.pending
        self.attention = self._requested or self._nmi or pin
        at_once = machine.blocks.mixed or self._nmi or (self._requested and not self._masked) or (pin and machine.guest_mode is not None)
        machine.counter.attention = ALWAYS if at_once else WHEN_ENABLED if self.attention else 0

    @property
    def recognised(self) -> bool:
        """Whether the CPU takes an interrupt now, if there is one."""
        machine = self._machine
        if machine.guest_mode is not None:
            return machine.guest_mode.lets_interrupts_in()
        return bool(machine.cpu.system_flags & IF) and not machine.cpu.shadow

    def attend(self, pc: int, size: int) -> bool:
        """At a block's start with the pin up, or a monitor that asked; True when RIP was moved."""
        machine = self._machine
        cpu, counter = machine.cpu, machine.counter
        cpu.load()
        cpu.rip = pc - cpu.segment(hidden.CS).base
        in_string = counter.continues(pc + size)
        cpl = cpu.cpl
        if self._nmi and self.nmi_ready:
            self.take_nmi()
        elif machine.intr.pending and self.recognised:
            self.take()
        elif not (self._requested and self.on_attention()):
            return False
        if in_string:
            counter.interrupted_string()
        counter.drop(cpl)
        machine.make_rip_count()
        return True

    def take(self) -> None:
        """The CPU accepts the interrupt."""
        machine = self._machine
        in_guest = machine.in_guest
        if in_guest and machine.guest_mode is not None and machine.guest_mode.takes_interrupt():
            return
        machine.events["interrupt.delivered"] += 1
        if machine.monitor is not None and not in_guest:
            machine.events["interrupt.monitor"] += 1
            machine.monitor.interrupt()
        else:
            self._exceptions.deliver(machine.intr.acknowledge(), None, external=True)
