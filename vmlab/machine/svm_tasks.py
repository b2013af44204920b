"""Task switches of a guest in guest mode (APM Vol. 2 §15.14.1): whether they exit, and those that do not."""

from __future__ import annotations

import ctypes

from vmlab.machine import task
from vmlab.machine import vmcb as v
from vmlab.machine.cpu import NT, Cpu
from vmlab.machine.decode import Instruction
from vmlab.machine.operands import far_selector
from vmlab.machine.paging import NestedFault, PageFault
from vmlab.machine.state import AT_CR

_BY = {task.Reason.RETURN: v.TASK_BY_IRET, task.Reason.JUMP: v.TASK_BY_JUMP}


class InterceptedTask(Exception):
    """A task switch in the course of a delivery is intercepted."""

    def __init__(self, selector: int, info: int, during: int) -> None:
        super().__init__()
        self.selector, self.info, self.during = selector, info, during


class _RevocableCpu(Cpu):
    """The guest's CPU in a task switch: what it stores is noted, so that a nested fault in the middle leaves no trace."""

    def __init__(self, cpu: Cpu) -> None:
        super().__init__(cpu.engine, cpu.ram, cpu.window, cpu.layout)
        self.nested_root = cpu.nested_root
        self._before = cpu.window.raw()
        self._old: list[tuple[int, bytes]] = []

    def write_linear(self, address: int, data: bytes, *, user: bool = False) -> None:
        self._old += [(pa, self.ram.read(pa, n)) for pa, n in self.pieces(address, len(data), write=True, user=user)]
        super().write_linear(address, data, user=user)

    def revoke(self) -> None:
        """As it was before the switch, for the switch will be tried again."""
        for pa, data in reversed(self._old):
            self.ram.write(pa, data)
        control = memoryview(self._before).cast("Q")
        for number in (0, 3):
            self.set_cr(number, control[AT_CR // 8 + number])
        ctypes.memmove(self.window.address, self._before, len(self._before))


def instructed(cpu: Cpu, op: str, instruction: Instruction) -> tuple[int, int] | None:
    """EXITINFO1 and 2 of the task switch that this far transfer makes; None where it makes none, or faults before it does."""
    if cpu.long_mode or (op == "iret" and not cpu.system_flags & NT):
        return None
    try:
        found = task.wanted(cpu, instruction, None if op == "iret" else far_selector(cpu, instruction))
    except (PageFault, NestedFault):
        return None             # Unicorn comes upon it as well
    return None if found is None else (found[0], _BY.get(found[1], 0))


def switch_in_guest(cpu: Cpu, selector: int, error_code: int | None, return_rip: int, reason: task.Reason = task.Reason.GATE) -> None:
    """Without an exit, all or nothing; raises :class:`NestedFault` where a nested table lacks a page."""
    revocable = _RevocableCpu(cpu)
    try:
        task.switch(revocable, selector, error_code, return_rip, reason)
    except NestedFault:
        revocable.revoke()
        raise
