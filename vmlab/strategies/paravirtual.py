"""Paravirtualization: the guest's kernel is changed so that it asks instead of executing sensitive instructions.

The interface is Xen's public 32-bit one (xen/include/public): the kernel runs in ring 1, hypercalls come by
INT 0x82, interrupts are events, the interrupt flag is a byte in a page that guest and VMM share, and the guest's own
page tables are the machine's, changed only through checked hypercalls. System calls (INT 0x80) go from ring 3 straight
to ring 1. The native image serves: it patches itself when it is started at its paravirtual entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vmlab.guests import GuestImage
from vmlab.machine.cpu import IF
from vmlab.machine.pc import Machine
from vmlab.parameters import Value
from vmlab.strategies.base import GUEST_MEMORY, GuestState, Strategy, physical_state
from vmlab.strategies.techniques import ParavirtualizationTechnique
from vmlab.vmm.host import PHYSICAL_BASE, physical_bus
from vmlab.vmm.xen import SIF_PRIVILEGED, SIF_SERVICES
from vmlab.vmm.xen_domain import Domain
from vmlab.vmm.xen_hypervisor import Hypervisor


class Paravirtualization(ParavirtualizationTechnique, Strategy):
    """The guest at CPL 1, by hypercalls."""

    def __init__(self, machine: Machine, parameters: Mapping[str, Value] | None = None) -> None:
        super().__init__(machine, parameters)
        self.domain = Domain(machine.ram, GUEST_MEMORY, self.counts, machine.engine.flush_tlb)
        self.hypervisor = Hypervisor(machine, self.domain, self.counts, self.refused,
                                     direct_paging=self.chosen["memory"] == "direct", direct_calls=not self._all_by_hypercall,
                                     bus=physical_bus(machine, self.counts, self.chosen["hypervisor"]))

    @property
    def _all_by_hypercall(self) -> bool:
        return self.chosen["services"] == "hypercall"

    def load(self, image: GuestImage, command_line: str) -> None:
        begin = self.domain.build(image, command_line, SIF_PRIVILEGED | (SIF_SERVICES if self._all_by_hypercall else 0))
        self.domain.start(self.machine.cpu, begin)

    def deliver_interrupt(self, vector: int) -> None:
        """Raise the event that the guest bound to the interrupt input of this vector."""
        self.hypervisor.events.raise_irq(vector - PHYSICAL_BASE)

    def guest_state(self) -> GuestState:
        """The physical CPU is the guest's own but for the interrupt flag, which is the upcall mask."""
        state = physical_state(self.machine.cpu)
        flags = state.eflags & ~IF | (0 if self.domain.shared.masked else IF)
        return GuestState(**{**vars(state), "eflags": flags})

    def watch(self, address: int, callback: Callable[[int], None]) -> None:
        self.machine.watch(address, callback)

    def frame_address(self, gpa: int) -> int:
        return self.domain.machine(gpa)
