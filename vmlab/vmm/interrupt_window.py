"""A hardware-assisted guest's interrupt window and task priority (APM Vol. 2 §15.21).

A virtual interrupt that is intercepted makes the CPU exit as soon as the guest would take it. The guest's CR8 is V_TPR, which it reads
and writes with no exit; the virtual local APIC's TPR is brought into step with it whenever somebody looks.
"""

from __future__ import annotations

from vmlab.ledger import Counts
from vmlab.machine import vmcb as v
from vmlab.machine.devices.lapic import Lapic
from vmlab.machine.vmcb import CountedVmcb
from vmlab.vmm.guest_mode import GuestModeCpu

_PRIORITY_SHIFT = 16


class InterruptWindow:
    """V_IRQ with its intercept: open while an interrupt waits for the guest."""

    def __init__(self, vmcb: CountedVmcb, counts: Counts) -> None:
        self._vmcb, self._counts = vmcb, counts
        #: The bits of ``interrupt_control`` that say what the CPU was asked to exit for; None: nothing.
        self.opened: int | None = None

    def open(self, vector_class: int | None = None) -> None:
        """Exit when the guest would take an interrupt: any, or one of this class (the vector's high half), which must be above V_TPR."""
        wanted = v.V_IGNORE_TPR if vector_class is None else vector_class << _PRIORITY_SHIFT
        if self.opened == wanted:
            return
        self._counts["interrupt.window"] += 1
        if self.opened is None:
            self._vmcb["intercepts"] |= v.intercept_bit(v.EXIT_VINTR)
        control = self._vmcb["interrupt_control"]
        self._vmcb["interrupt_control"] = control & ~(v.V_PRIORITY | v.V_IGNORE_TPR) | v.V_IRQ | wanted
        self.opened = wanted

    def state(self) -> int | None:
        """What it is open for; None: closed."""
        return self.opened

    def from_state(self, state: int | None) -> None:
        """The VMCB is as it was."""
        self.opened = state

    def close(self) -> None:
        """It was reached, or nothing waits for it any more."""
        if self.opened is not None:
            self._vmcb["intercepts"] &= ~v.intercept_bit(v.EXIT_VINTR)
            self._vmcb["interrupt_control"] &= ~(v.V_IRQ | v.V_PRIORITY | v.V_IGNORE_TPR)
            self.opened = None


class NonMaskable:
    """A non-maskable interrupt that waits for the guest. The guest handles one and takes no other until its IRET."""

    def __init__(self, cpu: GuestModeCpu, vmcb: CountedVmcb, counts: Counts) -> None:
        self._cpu, self._vmcb, self._counts = cpu, vmcb, counts
        self.waits = self._blocked = False

    def accept(self) -> None:
        """The guest's APIC sent one; it is injected before the next entry. Only the guest's own accesses do that: it has exited."""
        self.waits = True

    def inject(self) -> None:
        """Inject it if that can be. The CPU does not tell its end by itself: the guest's IRET is intercepted (APM Vol. 2 §15.20, §15.21.4)."""
        if not self.waits or self._blocked or self._cpu.read("event_injection") or self._cpu.read("interrupt_shadow"):
            return
        self.waits, self._blocked = False, True
        self._counts["interrupt.injected"] += 1
        self._counts["vmm.inject"] += 1
        self._vmcb["intercepts"] |= v.intercept_bit(v.EXIT_IRET)
        self._cpu.write("event_injection", v.event(v.EVENT_NMI, 2))

    def handled(self) -> None:
        """Its handler is about to return: RIP is at its IRET."""
        self._blocked = False
        self._vmcb["intercepts"] &= ~v.intercept_bit(v.EXIT_IRET)

    def state(self) -> tuple[bool, bool]:
        """Whether one waits, and whether one is being handled."""
        return self.waits, self._blocked

    def from_state(self, state: tuple[bool, bool]) -> None:
        """The VMCB is as it was."""
        self.waits, self._blocked = state


class TaskPriority:
    """CR8 and the local APIC's TPR: one register for the guest, two for the machine."""

    def __init__(self, cpu: GuestModeCpu, lapic: Lapic) -> None:
        self._cpu, self._lapic = cpu, lapic

    def take(self) -> None:
        """The guest may have written CR8: V_TPR is the newer."""
        found = self._cpu.read("interrupt_control") & v.V_TPR
        if found != self._lapic.tpr >> 4:
            self._lapic.set_tpr(found << 4)

    def show(self) -> None:
        """The guest may have written TPR in memory: CR8 follows."""
        control = self._cpu.read("interrupt_control")
        if control & v.V_TPR != self._lapic.tpr >> 4:
            self._cpu.write("interrupt_control", control & ~v.V_TPR | self._lapic.tpr >> 4)

    @property
    def held_back(self) -> int | None:
        """The class of an interrupt that waits for nothing but a lower TPR; None where there is none. To be asked after :meth:`take`."""
        lapic = self._lapic
        highest, in_service = lapic.irr.bit_length() - 1, lapic.isr.bit_length() - 1
        waits = highest >= 0 and in_service >> 4 < highest >> 4 <= lapic.tpr >> 4
        return highest >> 4 if waits and lapic.on else None
