"""The bare machine: the guest at CPL 0 on the physical CPU. The baseline, and the oracle for all others."""

from __future__ import annotations

from typing import Any

from vmlab.guests import GuestImage, boot
from vmlab.machine.cpu import Segment
from vmlab.strategies.base import GuestState, Strategy, physical_state
from vmlab.strategies.techniques import NativeTechnique


class Native(NativeTechnique, Strategy):
    """No VMM: interrupts and faults go through the guest's own IDT."""

    def load(self, image: GuestImage, command_line: str) -> None:
        machine, begin = self.machine, boot.start(image, command_line, self.guest_memory)
        for gpa, data in begin.pieces:
            machine.ram.write(gpa, data)
        cpu = machine.cpu
        if begin.real_mode:
            cpu.rip = begin.rip
        else:
            cpu.enter_protected(begin.rip, Segment(0x08, 0, 0xFFFFFFFF, 0xCF9B00), Segment(0x10, 0, 0xFFFFFFFF, 0xCF9300))
            cpu.load()
        for number, value in begin.registers.items():
            cpu.set_gpr(number, value)
        cpu.store()

    def deliver_interrupt(self, vector: int) -> None:
        """On the bare machine only a device interrupts: raise its line instead (``machine.pic.set_line``)."""
        irq = vector - self.machine.pic.master.base
        self.machine.pic.set_line(irq & 7, True)

    def state(self) -> dict[str, Any]:
        return self._counted()

    def from_state(self, state: dict[str, Any]) -> None:
        """All else is the machine's."""
        self._count_on(state)

    def guest_state(self) -> GuestState:
        return physical_state(self.machine.cpu)
