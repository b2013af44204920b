"""What the machine asks of those above it: a VMM that takes its exceptions, and AMD-V while a guest runs in it."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol

from vmlab.machine.decode import Instruction
from vmlab.machine.paging import NestedFault, PageFault


class StopReason(enum.Enum):
    """Why :meth:`Machine.run` returned."""

    EXIT = "the guest ended its run"
    HALTED = "the CPU halted with nothing left to wake it"
    RESET = "the guest reset the machine"
    SAID = "the guest said what was waited for"
    REQUESTED = "the monitor asked for it"
    LEFT = "who looked on had seen enough"


@dataclass(frozen=True)
class Stop:
    """The end of a run: why, and the guest's exit code where it gave one."""

    reason: StopReason
    exit_code: int | None = None


class Monitor(Protocol):
    """What the machine asks of a VMM. State is loaded before and stored after every call."""

    def exception(self, vector: int, error_code: int | None, *, software: bool) -> None:
        """A trap: RIP at the faulting instruction, or for INT n (``software``) past it."""

    def interrupt(self) -> None:
        """The INTR line is up and the CPU took it; RIP is where the guest would have gone on."""


class GuestMode(Protocol):
    """What the machine asks of its AMD-V (svm.py) while the CPU is in guest mode. State is loaded before every call."""

    #: CR8 of a guest whose interrupts are virtual (V_INTR_MASKING); None where it is the physical APIC's.
    virtual_tpr: int | None

    def exit(self, code: int, info_1: int = 0, info_2: int | None = None) -> None:
        """#VMEXIT: the guest into the VMCB, the host into the CPU, and the end of the run."""

    def intercepts(self, op: str, instruction: Instruction) -> bool:
        """Whether this instruction exits instead of being carried out; if so, the switch is done: :meth:`exited` comes next."""

    def exited(self) -> None:
        """After :meth:`intercepts`, and with the block left: the VMM handles the exit now, or when the run has ended."""

    def watches_tasks(self) -> bool:
        """Whether far JMP, far CALL and IRET must be looked at, because a task switch is to exit."""

    def memory_fault(self, fault: PageFault | NestedFault) -> bool:
        """The machine faulted on memory in an instruction that it carries out: True when it made an exit."""

    def watches_cr0(self) -> bool:
        """Whether a read of CR0, SMSW included, exits."""

    def lets_flush(self, op: str, number: int) -> bool:
        """Whether MOV to control register ``number``, or INVLPG, runs in the guest without an exit."""

    def lets_interrupts_in(self) -> bool:
        """Whether the CPU recognises a physical interrupt now, in guest mode or out of it."""

    def takes_interrupt(self) -> bool:
        """A physical interrupt in guest mode: True when it made an exit, False when it is the guest's own."""

    def deliver_injected(self) -> bool:
        """Deliver what VMRUN was told to inject, if that is still to do; it comes before anything else."""

    def deliver(self, vector: int, error_code: int | None, *, software: bool = False, external: bool = False,
                fault_rip: int | None = None) -> int | None:
        """Through the guest's IDT: the vector delivered, or None when the attempt ended in an exit."""


class InterruptSource(Protocol):
    """What stands at the CPU's INTR pin."""

    @property
    def pending(self) -> bool:
        """The level of INTR."""

    def acknowledge(self) -> int:
        """The CPU takes the interrupt: its vector."""
