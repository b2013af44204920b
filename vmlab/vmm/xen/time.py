"""Time for a paravirtual guest: the clock in shared memory, and the timers it may set.

System time is virtual nanoseconds since the machine's start, which the time stamp counter counts too, so that the
clock in ``shared_info`` is right for ever once it is written (xen/include/public/xen.h: vcpu_time_info). A guest's
timer comes due by the physical interval timer: the hypervisor programs it, takes its interrupt, and raises VIRQ_TIMER.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from vmlab.ledger import Counts
from vmlab.machine.pc import Machine
from vmlab.vmm import xen
from vmlab.vmm.host import PhysicalBus
from vmlab.vmm.timer import PhysicalTimer
from vmlab.vmm.xen.abi import Abi
from vmlab.vmm.xen.memory import GuestMemory


class GuestTimers:
    """The vCPU's single-shot timer (which set_timer_op sets too) and its periodic one."""

    def __init__(self, machine: Machine, bus: PhysicalBus, memory: GuestMemory, abi: Abi, counts: Counts,
                 expired: Callable[[], None]) -> None:
        self._machine, self._memory, self._abi, self._expired = machine, memory, abi, expired
        self._physical = PhysicalTimer(machine, bus, counts)
        self._single: int | None = None
        self._periodic: int | None = None
        self._period = 0
        self.blocked = 0                # virtual ns that the vCPU spent blocked

    def interrupt(self) -> None:
        """The physical timer's interrupt: whoever is due has expired; the next one is armed."""
        self._physical.fired()
        now, expired = self._machine.time, False
        if self._single is not None and self._single <= now:
            self._single, expired = None, True
        if self._periodic is not None and self._periodic <= now:
            self._periodic += (now - self._periodic) // self._period * self._period + self._period
            expired = True
        if expired:
            self._expired()
        self._arm()

    def _arm(self) -> None:
        due = [time for time in (self._single, self._periodic) if time is not None]
        self._physical.arm(min(due) if due else None)

    # ---- hypercalls
    def set_timer_op(self, low: int, high: int, *_: int) -> int:
        """VIRQ_TIMER at this system time, at once if that has passed; 0 takes the wish back. 64 bits: two words in 32."""
        timeout = low if self._abi.bits == 64 else low | high << 32
        self._single = timeout or None
        self._arm()
        return 0

    def vcpu_op(self, command: int, vcpu: int, argument: int, *_: int) -> int:
        """The timers of vcpu.h, and what else can be asked of the one vCPU there is."""
        if vcpu:
            return xen.ENOENT
        if command == xen.VCPUOP_IS_UP:
            return 1
        if command == xen.VCPUOP_SET_SINGLESHOT_TIMER:
            timeout, flags = struct.unpack("<QI", self._memory.read(argument, 12))
            if flags & xen.VCPU_SSHOTTMR_FUTURE and timeout < self._machine.time:
                return xen.ETIME
            self._single = timeout
        elif command == xen.VCPUOP_STOP_SINGLESHOT_TIMER:
            self._single = None
        elif command == xen.VCPUOP_SET_PERIODIC_TIMER:
            period = struct.unpack("<Q", self._memory.read(argument, 8))[0]
            if period < xen.SHORTEST_PERIOD:
                return xen.EINVAL
            self._period, self._periodic = period, self._machine.time + period
        elif command == xen.VCPUOP_STOP_PERIODIC_TIMER:
            self._periodic = None
        elif command == xen.VCPUOP_GET_RUNSTATE_INFO:
            now = self._machine.time
            self._memory.write(argument, self._abi.runstate.pack(xen.RUNSTATE_RUNNING, now, now - self.blocked, 0, self.blocked, 0))
            return 0
        else:
            return xen.ENOSYS
        self._arm()
        return 0
