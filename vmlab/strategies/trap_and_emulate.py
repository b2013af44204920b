"""Trap-and-emulate: the guest's kernel at CPL 1, every privileged instruction a real #GP that the VMM emulates.

On classical x86 (``sensitive: silent``) some sensitive instructions do not trap: POPF and IRET drop IF
without a word, PUSH CS and SMSW tell the truth. ``sensitive: trap`` is a hypothetical x86 on which the
instructions in :data:`SENSITIVE` raise #GP above CPL 0, so that Popek and Goldberg's condition holds.
"""

from __future__ import annotations

from collections.abc import Mapping

from vmlab.machine.decode import Instruction
from vmlab.machine.pc import Machine
from vmlab.machine.state import HF_SHADOW
from vmlab.parameters import Value
from vmlab.strategies.techniques import TrapAndEmulateTechnique
from vmlab.vmm.long_mode import LongModeCpu
from vmlab.vmm.long_monitor import LongModeMonitor
from vmlab.vmm.real_monitor import INTERPRETER
from vmlab.vmm.vcpu import KERNEL_RING

#: Sensitive and unprivileged on x86 (Robin & Irvine, USENIX Security 2000, §3), as far as the lab makes
#: them trap; far transfers, INT n and stack-segment loads are sensitive too and fault by themselves.
SENSITIVE = frozenset({
    "pushf", "popf", "iret", "sgdt", "sidt", "sldt", "str", "smsw",
    "lar", "lsl", "verr", "verw", "mov_from_seg", "push_seg", "call_far", "ret_far",
})

class TrapAndEmulate(TrapAndEmulateTechnique, LongModeMonitor):
    """The VMM of the textbook's first sections.

    A 64-bit guest's kernel runs at CPL 3 in a view of its own. There an IRET or far return to its users would not trap, and they
    would go on in the kernel's view; so the CPU has no descriptors while the kernel runs, and whatever loads one raises #GP.
    """

    def __init__(self, machine: Machine, parameters: Mapping[str, Value] | None = None) -> None:
        trap = (parameters or {}).get("sensitive", "silent") == "trap"
        self.true_selectors = trap
        super().__init__(machine, parameters)
        self._holding_back = False
        machine.gate(INTERPRETER, self._interpret)
        if trap:
            machine.trapping = SENSITIVE
        # A technique of somebody's own may do more at a CLI than this one does.
        native = machine.native_events if type(self) is TrapAndEmulate else None
        self._shortcuts = None
        if native is not None:
            self._shortcuts = native.offer(self.counts, self.vcpu.words_at)
            self.pager.let_c_fill(native.offer_faults(self.counts, self.mmu.memory.base, self.mmu.memory.size))

    def make_vcpu(self) -> LongModeCpu:
        vcpu = LongModeCpu(self.machine.cpu, self.space, self.mmu, true_selectors=self.true_selectors)
        vcpu.in_place = True
        return vcpu

    def follow_tables(self) -> None:
        if self.in_long_mode:
            kernel = self.vcpu.cpl == 0
            self.vcpu.empty_gdt(kernel)
            self.machine.counter.user_from = 4 if kernel else 3
        super().follow_tables()

    def _interpret(self) -> None:
        self.interpret()
        self.follow_tables()

    def exception(self, vector: int, error_code: int | None, *, software: bool) -> None:
        if self._holding_back:      # the instruction in the shadow trapped
            self._holding_back = False
            self.machine.cpu.clear_shadow()
        super().exception(vector, error_code, software=software)

    def inject_pending(self) -> bool:
        """As ever; an interrupt that the shadow of STI holds back waits for one instruction, not for the end of its block.

        The CPU has such a shadow too, and comes to a block's end behind the instruction in it.
        """
        injected = super().inject_pending()
        vcpu = self.vcpu
        if not injected and vcpu.shadow_at is not None and vcpu.shadow_at == vcpu.rip and self.platform_devices.pending and vcpu.interpreted is None:
            self._holding_back = True
            self.machine.cpu.hflags |= HF_SHADOW
        return injected

    def emulate(self, instruction: Instruction) -> None:
        super().emulate(instruction)
        if self._shortcuts is not None and instruction.op in ("cli", "sti") and self.machine.cpu.cpl == KERNEL_RING:
            self._shortcuts.trap(instruction.op)
