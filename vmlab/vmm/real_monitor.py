"""A VMM over a guest in real mode: what trap-and-emulate and binary translation have in common there.

Real mode has no privilege levels, so nothing there can be deprivileged, and ring 1 has no real mode. The VMM interprets: it
carries out every instruction of the guest's by itself, as VMMs did for the start of their guests before CPUs had an
unrestricted guest mode (APM Vol. 2 §15.19, paged real mode; SDM Vol. 3C §25.1.2, unrestricted guests). System instructions are the
emulator's, all others run on the second CPU (:mod:`vmlab.vmm.single_step`). This goes on after CR0.PE is set, while segments of real mode
are still loaded, until CS and SS are flat 32-bit ones; and begins again should the guest clear CR0.PE.
Meanwhile the physical CPU stands in front of a door in the VMM's pages, where the machine calls the VMM before each step.
"""

from __future__ import annotations

from collections.abc import Mapping

from vmlab.machine.cpu import Segment
from vmlab.machine.delivery import Fault
from vmlab.machine.memory import PAGE
from vmlab.machine.paging import PageFault
from vmlab.machine.pc import Machine
from vmlab.machine.state import CS, SS
from vmlab.parameters import Value
from vmlab.vmm.guest_tables import CR0_PE
from vmlab.vmm.long_mode import uncompressed
from vmlab.vmm.monitor import DeprivilegingMonitor
from vmlab.vmm.operands import read_instruction
from vmlab.vmm.space import HOLE
from vmlab.vmm.vcpu import KERNEL_RING, Interpreted

#: The VMM's page of doors, and the one for interpretation.
DOORS = HOLE + 0x14000
INTERPRETER = DOORS + 0x20
_SEGMENTS = range(6)
_BIG = 1 << 22
_CODE, _DATA = 0x9B00, 0x9300
_TRAPS = frozenset({"int", "int3", "into", "int1"})
# Physical CS and SS meanwhile: flat, ring 1; nobody is shown them.
_DOOR_CODE = Segment(0xFFF8 | KERNEL_RING, 0, 0xFFFFFFFF, 0x00CF9B00 | KERNEL_RING << 13)
_DOOR_STACK = Segment(0xFFF0 | KERNEL_RING, 0, 0xFFFFFFFF, 0x00CF9300 | KERNEL_RING << 13)


class RealModeMonitor(DeprivilegingMonitor):
    """Base of the techniques that deprivilege the guest's kernel where the CPU lets them, and interpret it where not."""

    def __init__(self, machine: Machine, parameters: Mapping[str, Value] | None = None) -> None:
        super().__init__(machine, parameters)
        machine.ram.write(self.space.map_hole(DOORS, PAGE), b"\xcc" * 0x30)     # never executed: the machine's hooks are here

    def start_in_real_mode(self, rip: int) -> None:
        self.mmu.enter_real_mode()
        vcpu = self.vcpu
        vcpu.idt = Segment(0, 0, 0x3FF, 0)
        vcpu.gdt = Segment(0, 0, 0xFFFF, 0)
        self._begin(rip, {number: Segment(0, 0, 0xFFFF, _CODE if number == CS else _DATA) for number in _SEGMENTS})

    def _begin(self, rip: int, segments: dict[int, Segment]) -> None:
        self.vcpu.interpreted = Interpreted(rip, segments)
        cpu = self.machine.cpu
        cpu.set_segment(CS, _DOOR_CODE)
        cpu.set_segment(SS, _DOOR_STACK)
        cpu.set_cpl(KERNEL_RING)
        cpu.rip = INTERPRETER
        self.vcpu.rip = rip

    def _registers_written(self, flush: bool) -> None:
        super()._registers_written(flush)
        if not self.mmu.cr0 & CR0_PE and self.vcpu.interpreted is None:
            segments = {number: uncompressed(self.vcpu.segment(number)) for number in _SEGMENTS}
            self._begin(self.vcpu.rip, segments)

    def interpret(self) -> None:
        """The instruction at the virtual CPU's RIP, whatever it is."""
        vcpu = self.vcpu
        at = vcpu.rip
        limit = 0xFFFFFFFFFFFFFFFF if vcpu.bits == 64 else 0xFFFFFFFF
        self.counts["vmm.decode"] += 1
        try:
            instruction, fault = read_instruction(vcpu.fetch, (vcpu.segment(CS).base + at) & limit, vcpu.bits)
            if isinstance(fault, PageFault):
                raise Fault(14, fault.error_code, fault.address)
            if fault is not None:
                raise fault
            if instruction is None:
                raise Fault(6)
            if instruction.op in _TRAPS:
                self.software_interrupt(instruction)
            elif self.emulator.knows(instruction.op):
                self.emulator.emulate(instruction)
            elif instruction.op is None:
                self.stores.carry_out(vcpu, instruction, vcpu.segment(CS).base + at)
            else:
                raise Fault(6)
        except Fault as fault_of_guest:
            self.reflect(fault_of_guest)
        if vcpu.shadow_at == at:
            vcpu.shadow_at = None
        self._end()
        self.inject_pending()

    def _end(self) -> None:
        """Leave the guest to the CPU again, if it is now in a mode in which that can run it."""
        vcpu = self.vcpu
        interpreted = vcpu.interpreted
        if interpreted is None or not vcpu.cr(0) & CR0_PE:
            return
        if vcpu.cpl == 0 and any(interpreted.segments[number].base or not interpreted.segments[number].flags & _BIG for number in (CS, SS)):
            return
        rip, vcpu.interpreted = vcpu.rip, None
        for number, segment in interpreted.segments.items():
            vcpu.set_segment(number, segment)
        vcpu.rip = rip
