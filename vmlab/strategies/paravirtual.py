"""Paravirtualization: the guest's kernel is changed so that it asks instead of executing sensitive instructions.

The interface is Xen's public one (xen/include/public): interrupts are events, the interrupt flag is a byte in a page that
guest and VMM share, and the guest's own page tables are the machine's, changed only through checked hypercalls. In 32 bits the
kernel runs in ring 1, hypercalls come by INT 0x82, and system calls (INT 0x80) go from ring 3 straight to ring 1. In 64 the
kernel shares ring 3 with its users, on page tables of its own; hypercalls and system calls both come by SYSCALL, and all
pass through the hypervisor. The native image serves: it patches itself when it is started at its paravirtual entry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vmlab.guests import GuestImage
from vmlab.machine.cpu import IF
from vmlab.strategies.base import GuestState, Strategy, physical_state
from vmlab.strategies.techniques import ParavirtualizationTechnique
from vmlab.vmm.host import PHYSICAL_BASE, physical_bus
from vmlab.vmm.xen import SIF_PRIVILEGED, SIF_SERVICES
from vmlab.vmm.xen.domain import Domain
from vmlab.vmm.xen.domain64 import WideDomain
from vmlab.vmm.xen.hypervisor import Hypervisor
from vmlab.vmm.xen.ring1 import NarrowHypervisor
from vmlab.vmm.xen.ring3 import WideHypervisor


class Paravirtualization(ParavirtualizationTechnique, Strategy):
    """The guest's kernel at CPL 1, in 64 bits at CPL 3, by hypercalls."""

    #: Made by :meth:`load`, for only the image says how wide its kernel is.
    domain: Domain
    hypervisor: Hypervisor

    @property
    def _all_by_hypercall(self) -> bool:
        return self.chosen["services"] == "hypercall"

    def load(self, image: GuestImage, command_line: str) -> None:
        machine = self.machine
        chosen: dict[str, Any] = {"direct_paging": self.chosen["memory"] == "direct", "direct_calls": not self._all_by_hypercall,
                                  "bus": physical_bus(machine, self.counts, self.chosen["hypervisor"])}
        if image.pv is not None and image.pv.bits == 64:
            wide = WideDomain(machine.ram, self.guest_memory, self.counts, machine.engine.flush_tlb)
            self.domain, self.hypervisor = wide, WideHypervisor(machine, wide, self.counts, self.refused, **chosen)
        else:
            self.domain = Domain(machine.ram, self.guest_memory, self.counts, machine.engine.flush_tlb)
            self.hypervisor = NarrowHypervisor(machine, self.domain, self.counts, self.refused, **chosen)
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

    def tell(self, image: GuestImage, before: str, command_line: str) -> None:
        self.domain.tell(command_line)

    def frame_address(self, gpa: int) -> int:
        return self.domain.machine(gpa)
