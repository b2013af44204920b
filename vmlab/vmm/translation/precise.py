"""Where translated code is interrupted: the guest's state there, what a template did taken back, interrupts injected.

Inside the cache the physical registers are the guest's only between templates. :class:`~vmlab.vmm.translation.units.State` says for each
emitted instruction what must be undone, so that the guest never sees a moment that its own code does not have
(Adams & Agesen, ASPLOS 2006, §3: the translator must keep exceptions precise).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

from vmlab.errors import UnsupportedByStrategy
from vmlab.machine.pc import Machine
from vmlab.machine.state import RSP
from vmlab.parameters import Value
from vmlab.strategies.base import GuestState
from vmlab.vmm.long_monitor import LongModeMonitor
from vmlab.vmm.translation import Site, State, Translator
from vmlab.vmm.translation.layout import GATE, OLD_FLAGS, PENDING, SITE, TARGET
from vmlab.vmm.translation.priority import Priority
from vmlab.vmm.translation.vcpu import TranslatedCpu


class PreciseMonitor(LongModeMonitor):
    """A VMM that may be called in the middle of a template."""

    vcpu: TranslatedCpu
    translator: Translator
    priority: Priority

    def __init__(self, machine: Machine, parameters: Mapping[str, Value] | None = None) -> None:
        super().__init__(machine, parameters)
        self._site_at, self._pending_at, self._old_flags_at = (self.space.hole_frame(at) for at in (SITE, PENDING, OLD_FLAGS))
        self._state = State(0)       # the guest's, at the place that the CPU is at
        self._interpreting = False   # the guest's kernel is in code that is not translated: real mode, or not 64-bit in long mode
        self._at_work = False        # a callout is being carried out

    @abstractmethod
    def resume(self, site: Site | None = None) -> None:
        """Let the physical CPU go on where the virtual CPU is."""

    @property
    def _door(self) -> int:
        """The gate's linear address."""
        return self.translator.forms.linear(GATE)

    # ---- an exception or interrupt
    def _where(self) -> State:
        """The guest's state where the physical CPU is; sets the virtual RIP, changes nothing else."""
        self.priority.take()
        rip = self.machine.cpu.rip
        if self.vcpu.cpl == 3:
            state: State | None = State(rip)     # also where a user jumped to the VMM's pages, which it cannot execute
        elif rip == self._door:
            state = State(self.vcpu.rip)         # the VMM was running
            if not self._at_work and not self._interpreting:
                # No: an interrupt came just before, and waits until the callout is done, as if it had come a moment later.
                site = self.translator.sites.get(self.machine.ram.read32(self._site_at))
                state = None if site is None else State(site.guest, shadow=True)
        else:
            state = self.translator.states.get(rip) if self.space.in_hole(rip) else State(rip)
        if state is None:
            raise UnsupportedByStrategy(f"the CPU is in the translation cache at {rip:#x}, where no instruction was emitted")
        self._state = state
        self.vcpu.rip = self.translator.read_word(TARGET) if state.rip is None else state.rip
        return state

    def _undo(self) -> None:
        """Take back what a template did so far: from here on the physical registers are the guest's."""
        state, cpu = self._state, self.machine.cpu
        if state.template:
            self.counts["bt.undo"] += 1
            if state.early_flags:
                self.vcpu.flags = self.machine.ram.read32(self._old_flags_at)
            for register, at in state.saved:
                cpu.set_gpr(register, self.translator.read_word(at), 8)
            cpu.set_gpr(RSP, cpu.gpr(RSP) + state.esp, self.translator.forms.word)
        self._state = State(self.vcpu.rip)
        if self.space.in_hole(cpu.rip):
            cpu.rip = self._door   # not in a template any more; :meth:`resume` says where to go on

    def exception(self, vector: int, error_code: int | None, *, software: bool) -> None:
        self._where()
        self._undo()
        if vector == 6 and self._calls_system():
            self.follow_tables()
        else:
            super().exception(vector, error_code, software=software)
        self.resume()

    def _system_call(self) -> None:
        self.priority.take()
        super()._system_call()
        self.resume()

    def _calls_system(self) -> bool:
        """SYSCALL in user code of a 32-bit guest: the CPU's EFER.SCE is off, so it is an undefined instruction until the VMM has looked at it."""
        instruction = self.machine.faulting if self.vcpu.cpl == 3 and not self.in_long_mode else None
        if instruction is None or instruction.op != "syscall":
            return False
        self.emulate(instruction)
        return True

    def interrupt(self) -> None:
        if self._at_door:
            self.platform_devices.physical_interrupt()      # injected when the system call is done
            return
        state = self._where()
        self.platform_devices.physical_interrupt()
        if state.shadow:
            self._note_pending()     # the check behind the shadowed instruction finds it
            self.machine.request_attention(self.machine.cpu.rip == self._door)
        elif state.early_flags:
            self.machine.request_attention(True)    # before the user's first instruction, which comes next
        elif self.inject_pending():
            self.resume()
        self.follow_tables()

    def attend(self) -> bool:
        if self._at_door:
            return False     # a user's SYSCALL is done when the VMM has seen it
        state = self._where()
        if state.early_flags:
            return False
        if state.shadow:
            self._note_pending()
            self.machine.request_attention(self.machine.cpu.rip == self._door)      # before a callout: ask again behind it
            return False
        if not super().attend():
            return False
        self.resume()
        return True

    def inject(self, vector: int) -> None:
        self._undo()
        super().inject(vector)

    def inject_pending(self) -> bool:
        injected = super().inject_pending()
        self._note_pending()
        return injected

    def _note_pending(self) -> None:
        """Translated STI, POPF and IRET look here."""
        self.machine.ram.write32(self._pending_at, int(self.platform_devices.pending))
        self.priority.show()

    def guest_state(self) -> GuestState:
        """The guest's registers, also where the run was stopped in the middle of a template; it may be continued."""
        cpu = self.machine.cpu
        cpu.load()
        if self._at_door:
            self._system_call()
        state, before = self._where(), cpu.rip
        self._undo()
        cpu.store()     # it is loaded again to be looked at
        found = super().guest_state()
        if state.template:
            self.resume()
        else:
            cpu.rip = before
        cpu.store()
        return found
