"""A VMM over a guest that may be a 64-bit one: what trap-and-emulate and binary translation have in common there.

Every guest begins in legacy mode, as :class:`~vmlab.vmm.real_monitor.RealModeMonitor` has it. When it enters long mode, the CPU does
too, and from then on the guest's kernel is at CPL 3 (:mod:`vmlab.vmm.long_mode`): the hole moves to the end of the 64-bit
space, each way between kernel and users changes the view of the address space, and users' SYSCALL leads to doors of the VMM's.
"""

from __future__ import annotations

from collections.abc import Mapping

from vmlab.errors import UnsupportedByStrategy
from vmlab.machine.decode import Instruction
from vmlab.machine.delivery import Fault
from vmlab.machine.pc import Machine
from vmlab.parameters import Value
from vmlab.strategies.base import GuestState
from vmlab.vmm.emulate_long import LongEmulator
from vmlab.vmm.long_mode import LongModeCpu
from vmlab.vmm.real_monitor import DOORS, RealModeMonitor
from vmlab.vmm.shadow_page import View
from vmlab.vmm.space import hole_address

# Where in the page of the doors SYSCALL leads, from 64- and from 32-bit code.
_SYSCALL = {hole_address(DOORS, 64): 64, hole_address(DOORS + 0x10, 64): 32}


class LongModeMonitor(RealModeMonitor):
    """Base of the techniques that deprivilege the guest's kernel, in legacy and in long mode."""

    vcpu: LongModeCpu

    def __init__(self, machine: Machine, parameters: Mapping[str, Value] | None = None) -> None:
        super().__init__(machine, parameters)
        self.in_long_mode = False
        self.emulator.registers.on_paging = self._registers_written
        for door in _SYSCALL:
            machine.gate(door, self._system_call)

    def make_emulator(self) -> LongEmulator:
        return LongEmulator(self.machine, self.vcpu, self.platform_devices, self.counts)

    # ---- modes and views
    def _registers_written(self, flush: bool) -> None:
        if self.vcpu.long_mode != self.in_long_mode:
            self._enter_long_mode()
        elif self.in_long_mode:
            self.vcpu.follow_efer()
        super()._registers_written(flush)

    def _enter_long_mode(self) -> None:
        if self.in_long_mode:
            raise UnsupportedByStrategy(f"the guest left long mode at {self.vcpu.rip:#x}, and this VMM does not go back with it")
        if self.vcpu.interpreted is not None:
            raise UnsupportedByStrategy(f"the guest enters long mode from 16-bit code at {self.vcpu.rip:#x}; this VMM wants it in 32-bit code first")
        self.prepare_long_mode()
        self.in_long_mode = True
        self.space.set_bits(64)
        self.pager.view = View.KERNEL
        self.vcpu.start_long_mode()
        self.vcpu.take_system_calls(*_SYSCALL)

    def prepare_long_mode(self) -> None:
        """The CPU is about to leave legacy mode."""

    def follow_tables(self) -> None:
        if self.in_long_mode:
            self.pager.show(View.USER if self.vcpu.cpl == 3 else View.KERNEL)
        super().follow_tables()

    def decode_at(self, rip: int) -> Instruction | None:
        try:
            return super().decode_at(rip)
        except Fault:
            return None     # not canonical: nothing can be fetched there

    # ---- system calls
    @property
    def _at_door(self) -> bool:
        """A user's SYSCALL has come here, and the VMM has not seen it yet."""
        return self.machine.cpu.rip in _SYSCALL

    def _system_call(self) -> None:
        """SYSCALL in code of a 64-bit guest, which led the CPU to the VMM: into the guest's kernel."""
        self.vcpu.system_call(_SYSCALL[self.machine.cpu.rip])
        self.counts["vmm.system_call"] += 1
        self.inject_pending()
        self.follow_tables()

    def interrupt(self) -> None:
        if self._at_door:
            self.platform_devices.physical_interrupt()      # injected when the system call is done
        else:
            super().interrupt()

    def attend(self) -> bool:
        return not self._at_door and super().attend()

    def guest_state(self) -> GuestState:
        self.machine.cpu.load()
        if self._at_door:
            self._system_call()
            self.machine.cpu.store()
        return super().guest_state()
