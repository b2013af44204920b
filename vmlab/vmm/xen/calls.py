"""The smaller hypercalls: traps, stacks, descriptors, version, console, scheduling, physical interrupts."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from vmlab.machine.board import UART_PORT
from vmlab.machine.pc import Stop, StopReason
from vmlab.vmm import xen
from vmlab.vmm.xen.frames import Refused

if TYPE_CHECKING:
    from vmlab.vmm.xen.hypervisor import Hypervisor

#: A hypercall: five words in, EAX out. May raise :class:`~vmlab.machine.paging.PageFault`, which is -EFAULT.
Call = Callable[[int, int, int, int, int], int]

_LONGEST_TEXT = 1 << 16             # of one console_io; Xen goes on with more after a look at other domains


class Calls:
    """What needs little state of its own."""

    def __init__(self, hypervisor: Hypervisor) -> None:
        self._vmm, self._memory = hypervisor, hypervisor.memory
        self._machine, self._domain = hypervisor.machine, hypervisor.domain
        self._abi = hypervisor.abi
        self._assists: set[int] = set()

    def table(self) -> dict[str, Call]:
        """By the hypercall's name."""
        return {
            "set_trap_table": self._set_trap_table, "set_gdt": self._set_gdt, "stack_switch": self._stack_switch,
            "set_callbacks": self._set_callbacks, "fpu_taskswitch": self._fpu_taskswitch,
            "update_descriptor": self._update_descriptor, "xen_version": self._xen_version, "console_io": self._console_io,
            "vm_assist": self._vm_assist, "sched_op": self._sched_op, "physdev_op": self._physdev_op,
        }

    # ---- traps, stacks, descriptors
    def _set_trap_table(self, table: int, *_: int) -> int:
        traps = dict(self._vmm.traps) if table else {}
        size = self._abi.trap.size
        for at in range(table, table + size * 257, size) if table else ():
            vector, trap = self._abi.parse_trap(self._memory.read(at, size))
            if not trap.address:
                break
            if trap.cs != self._abi.kernel_cs or not self._callable(trap.address):
                return xen.EINVAL
            traps[vector] = trap
        else:
            if table:
                return xen.EINVAL   # more entries than there are vectors
        self._vmm.set_traps(traps)
        return 0

    def _callable(self, address: int) -> bool:
        """Whether a guest of 64 bits may name this as code; in 32 bits every word is an address."""
        return self._abi.bits == 32 or (address + (1 << 47)) & self._abi.mask < 1 << 48

    def _stack_switch(self, ss: int, esp: int, *_: int) -> int:
        ss = self._abi.kernel_selector(ss)
        if ss != self._abi.kernel_ss:
            return xen.EINVAL
        self._vmm.set_kernel_stack(ss, esp)
        return 0

    def _set_callbacks(self, *arguments: int) -> int:
        # The failsafe callback is for a return whose selectors fail; here such a return ends the guest.
        if self._abi.bits == 64:
            event, failsafe, system_calls = arguments[:3]
            if not all(map(self._callable, (event, failsafe, system_calls))):
                return xen.EINVAL
            self._vmm.event_callback = (self._abi.kernel_cs, event)
            self._vmm.set_system_calls(system_calls)
            return 0
        event_cs, event, failsafe_cs = arguments[:3]
        if {event_cs | 1, failsafe_cs | 1} != {self._abi.kernel_cs}:
            return xen.EINVAL
        self._vmm.event_callback = (event_cs | 1, event)
        return 0

    def _set_gdt(self, frames: int, entries: int, *_: int) -> int:
        entries &= 0xFFFFFFFF
        if entries > xen.FIRST_RESERVED_GDT_ENTRY:
            return xen.EINVAL
        pages = (entries + 511) // 512
        try:
            self._domain.tables.set_gdt(list(struct.unpack(self._abi.words(pages), self._memory.read(frames, self._abi.word * pages))), entries)
        except Refused as refusal:
            return self._refuse(f"a descriptor table: {refusal}")
        self._domain.flush_tlb()
        return 0

    def _update_descriptor(self, *arguments: int) -> int:
        """An address and a descriptor, both of 64 bits."""
        wide = arguments[:2] if self._abi.bits == 64 else (arguments[0] | arguments[1] << 32, arguments[2] | arguments[3] << 32)
        address, descriptor = wide
        try:
            self._domain.tables.update(address, descriptor & 0xFFFFFFFF, descriptor >> 32)
        except Refused as refusal:
            return self._refuse(f"a descriptor: {refusal}")
        return 0

    def _refuse(self, what: str) -> int:
        self._vmm.refuse(f"the guest at {self._vmm.cpu.rip:#x} asked for {what}")
        return xen.EINVAL

    def _fpu_taskswitch(self, on: int, *_: int) -> int:
        """The next use of the FPU is #NM, once; or none any more."""
        self._vmm.set_task_switched(bool(on))
        return 0

    def _vm_assist(self, command: int, kind: int, *_: int) -> int:
        """Those that change nothing here: segment limits are not used, and the M2P is never in the users' root. No others."""
        offered = {32: (xen.VMASST_TYPE_4GB_SEGMENTS, xen.VMASST_TYPE_4GB_SEGMENTS_NOTIFY), 64: (xen.VMASST_TYPE_M2P_STRICT,)}
        if kind not in offered[self._abi.bits]:
            return xen.EINVAL
        if command not in (xen.VMASST_CMD_ENABLE, xen.VMASST_CMD_DISABLE):
            return xen.ENOSYS
        (self._assists.add if command == xen.VMASST_CMD_ENABLE else self._assists.discard)(kind)
        return 0

    # ---- version and console
    def _xen_version(self, command: int, buffer: int, *_: int) -> int:
        if command == xen.XENVER_VERSION:
            return 3 << 16
        if command == xen.XENVER_GET_FEATURES:
            if self._memory.read32(buffer):
                return xen.EINVAL
            features = 1 << xen.XENFEAT_MMU_PT_UPDATE_PRESERVE_AD if self._vmm.direct_paging else 0
            self._memory.write(buffer + 4, struct.pack("<I", features))
            return 0
        return xen.ENOSYS

    def _console_io(self, command: int, count: int, buffer: int, *_: int) -> int:
        """The text goes out by the serial port, as the hypervisor's own does."""
        if command != xen.CONSOLEIO_WRITE:
            return xen.ENOSYS
        count &= 0xFFFFFFFF
        if count > _LONGEST_TEXT:
            return xen.EINVAL
        self._vmm.bus.port_write(UART_PORT, 1, *self._memory.read(buffer, count))
        return 0

    # ---- scheduling
    def _sched_op(self, command: int, argument: int, *_: int) -> int:
        if command == xen.SCHEDOP_YIELD:
            return 0
        if command == xen.SCHEDOP_SHUTDOWN:
            self._machine.stop(Stop(StopReason.EXIT, self._memory.read32(argument)))
            return 0
        if command != xen.SCHEDOP_BLOCK:
            return xen.ENOSYS
        self._vmm.block()
        return 0

    # ---- devices
    def _physdev_op(self, command: int, argument: int, *_: int) -> int:
        """Physical interrupts are edges here and were acknowledged when they became events."""
        if command not in (xen.PHYSDEVOP_EOI, xen.PHYSDEVOP_IRQ_STATUS_QUERY):
            return xen.ENOSYS
        if self._memory.read32(argument) >= 16:
            return xen.EINVAL
        if command == xen.PHYSDEVOP_IRQ_STATUS_QUERY:
            self._memory.write(argument + 4, bytes(4))  # needs no EOI, is not shared
        return 0
