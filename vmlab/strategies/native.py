"""The bare machine: the guest at CPL 0 on the physical CPU. The baseline, and the oracle for all others."""

from __future__ import annotations

from vmlab.guests import GuestImage
from vmlab.machine.cpu import Segment
from vmlab.machine.state import RAX, RBX
from vmlab.strategies.base import GUEST_MEMORY, GuestState, Strategy, physical_state
from vmlab.strategies.techniques import NativeTechnique
from vmlab.vmm.boot import MULTIBOOT_MAGIC, place_multiboot


class Native(NativeTechnique, Strategy):
    """No VMM: interrupts and faults go through the guest's own IDT."""

    def load(self, image: GuestImage, command_line: str) -> None:
        machine = self.machine
        info = place_multiboot(image, command_line, GUEST_MEMORY, machine.ram.write)
        cpu = machine.cpu
        cpu.enter_protected(image.entry, Segment(0x08, 0, 0xFFFFFFFF, 0xCF9B00), Segment(0x10, 0, 0xFFFFFFFF, 0xCF9300))
        cpu.load()
        cpu.set_gpr(RAX, MULTIBOOT_MAGIC)
        cpu.set_gpr(RBX, info)
        cpu.store()

    def deliver_interrupt(self, vector: int) -> None:
        """On the bare machine only a device interrupts: raise its line instead (``machine.pic.set_line``)."""
        irq = vector - self.machine.pic.master.base
        self.machine.pic.set_line(irq & 7, True)

    def guest_state(self) -> GuestState:
        return physical_state(self.machine.cpu)
