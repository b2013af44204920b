"""Trap-and-emulate: the guest's kernel at CPL 1, every privileged instruction a real #GP that the VMM emulates.

On classical x86 (``sensitive: silent``) some sensitive instructions do not trap: POPF and IRET drop IF
without a word, PUSH CS and SMSW tell the truth. ``sensitive: trap`` is a hypothetical x86 on which the
instructions in :data:`SENSITIVE` raise #GP above CPL 0, so that Popek and Goldberg's condition holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vmlab.machine.pc import Machine
from vmlab.parameters import Parameter, Value
from vmlab.vmm.monitor import DeprivilegingMonitor

#: Sensitive and unprivileged on x86 (Robin & Irvine, USENIX Security 2000, §3), as far as the lab makes
#: them trap; far transfers, INT n and stack-segment loads are sensitive too and fault by themselves.
SENSITIVE = frozenset({
    "pushf", "popf", "iret", "sgdt", "sidt", "sldt", "str", "smsw",
    "lar", "lsl", "verr", "verw", "mov_from_seg", "push_seg", "call_far", "ret_far",
})

#: Workloads of the built-in guest whose outcome classical x86 changes, and by which instruction.
_SILENT_DAMAGE = {
    "pushf_popf": "PUSHF shows the real IF and POPF silently leaves it alone",
    "interrupt": "IRET from the handler silently drops IF, so interrupts stay off",
    "mixed": "POPF and IRET silently drop IF",
}


class TrapAndEmulate(DeprivilegingMonitor):
    """The VMM of the textbook's first sections."""

    name = "trap-and-emulate"
    summary = "guest kernel at CPL 1; each privileged instruction traps and is emulated"
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "memory": Parameter("who owns the page tables", "static", ("static",)),
        "hypervisor": Parameter("where the VMM stands", "type1", ("type1",)),
        "sensitive": Parameter("do sensitive instructions trap (a hypothetical x86) or not (classical x86)", "silent", ("silent", "trap")),
    }

    def __init__(self, machine: Machine, parameters: Mapping[str, Value] | None = None) -> None:
        trap = (parameters or {}).get("sensitive", "silent") == "trap"
        self.true_selectors = trap
        super().__init__(machine, parameters)
        if trap:
            machine.trapping = SENSITIVE

    @classmethod
    def unfaithful(cls, workload: str, parameters: Mapping[str, Value]) -> str | None:
        if parameters.get("sensitive", "silent") == "trap":
            return None
        return _SILENT_DAMAGE.get(workload)
