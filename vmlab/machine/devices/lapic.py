"""The local APIC (xAPIC) at physical 0xFEE00000: SDM Vol. 3A chapter 10; section numbers below are of that chapter.

It stands between the devices and the CPU's INTR: its own interrupts have vectors and priorities, and its
LINT0 input passes the 8259 pair's INTR through (ExtINT). It starts as firmware leaves it, in virtual wire
mode (§10.1): enabled, LINT0 = ExtINT, timer masked.

One CPU: fixed, lowest-priority and NMI IPIs reach it or nobody; SMI, INIT and start-up IPIs have no effect.
LINT1 and LINT0 in other modes than ExtINT deliver nothing, for nothing is wired to them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vmlab.machine.protocols import InterruptSource
from vmlab.machine.timeline import Handle, Timeline

BASE, SIZE = 0xFEE00000, 0x1000
# Register offsets (§10.4.1 table 10-1).
ID, VERSION, TPR, PPR, EOI, LDR, DFR, SVR, ISR, TMR, IRR, ESR, ICR_LOW, ICR_HIGH = (
    0x20, 0x30, 0x80, 0xA0, 0xB0, 0xD0, 0xE0, 0xF0, 0x100, 0x180, 0x200, 0x280, 0x300, 0x310)
LVT_TIMER, LVT_LINT0, LVT_LINT1, LVT_ERROR, INITIAL_COUNT, CURRENT_COUNT, DIVIDE = (0x320, 0x350, 0x360, 0x370, 0x380, 0x390, 0x3E0)
_VERSION = 3 << 16 | 0x14     # four LVT entries, an integrated APIC
_ENABLED = 1 << 8             # in SVR
_MASKED, _PERIODIC = 1 << 16, 1 << 17
_MODE, _EXTINT = 7 << 8, 7 << 8
_FIXED, _LOWEST_PRIORITY, _NMI = 0, 1, 4    # delivery modes (§10.6.1)
#: Bits of each LVT entry that can be written (§10.5.1 figure 10-8).
_LVT_BITS = {LVT_TIMER: 0x300FF, LVT_LINT0: 0x1A7FF, LVT_LINT1: 0x1A7FF, LVT_ERROR: 0x100FF}
_SEND_ILLEGAL, _RECEIVED_ILLEGAL, _ILLEGAL_REGISTER = 1 << 5, 1 << 6, 1 << 7   # ESR (§10.5.3)


class Lapic:
    """The local APIC of CPU 0. Its timer counts nanoseconds, divided as programmed.

    :param external: the 8259 pair, at LINT0.
    :param changed: called after anything that may change :attr:`pending`.
    """

    def __init__(self, timeline: Timeline, external: InterruptSource, changed: Callable[[], None]) -> None:
        self._timeline, self._external, self._changed = timeline, external, changed
        #: IA32_APIC_BASE bit 11: off, the CPU's INTR pin is the 8259 pair's (§10.4.3).
        self.on = True
        self.id = self.tpr = self.ldr = 0
        self.dfr = 0xFFFFFFFF
        self.svr = 0xFF | _ENABLED
        self.irr = self.isr = self.tmr = 0          # 256 bits each
        #: Told of the end of a level-triggered interrupt: its vector (§10.8.5). An I/O APIC listens.
        self.on_eoi: Callable[[int], None] = lambda vector: None
        #: An NMI for this CPU.
        self.on_nmi: Callable[[], None] = lambda: None
        self.esr = self.errors = 0       # as latched by a write to ESR; since then
        self.icr = 0
        self.lvt = {LVT_TIMER: _MASKED, LVT_LINT0: _EXTINT, LVT_LINT1: _MASKED, LVT_ERROR: _MASKED}
        self.initial = self.divide = 0
        self.started = 0                 # when the timer began to count down from ``initial``
        self._handle: Handle | None = None

    # ---- what the CPU sees
    @property
    def pending(self) -> bool:
        """INTR to the CPU."""
        return self._passes_external or self._next() is not None

    def acknowledge(self) -> int:
        """The vector that the CPU is to take; the 8259 pair's go first, as they wait for nobody's EOI here."""
        if self._passes_external:
            vector = self._external.acknowledge()
            self._changed()
            return vector
        found = self._next()
        if found is None:
            return self.svr & 0xFF  # the spurious interrupt (§10.9)
        self.irr &= ~(1 << found)
        self.isr |= 1 << found
        self._changed()
        return found

    @property
    def _passes_external(self) -> bool:
        if not self.on:
            return self._external.pending
        lint0 = self.lvt[LVT_LINT0]
        return bool(self.svr & _ENABLED) and not lint0 & _MASKED and lint0 & _MODE == _EXTINT and self._external.pending

    def _next(self) -> int | None:
        """The vector in IRR above the processor priority (§10.8.3)."""
        highest = self.irr.bit_length() - 1
        return highest if self.on and highest >= 0 and highest >> 4 > self.ppr >> 4 else None

    @property
    def ppr(self) -> int:
        """Processor priority: TPR, or the class of what is in service (§10.8.3.1)."""
        in_service = max(self.isr.bit_length() - 1, 0)
        return self.tpr if self.tpr >> 4 >= in_service >> 4 else in_service & 0xF0

    def set_tpr(self, value: int) -> None:
        """Write the task priority (also CR8, which is its high half: §10.8.6)."""
        self.tpr = value & 0xFF
        self._changed()

    def set_on(self, on: bool) -> None:
        """IA32_APIC_BASE bit 11. Off and on again is a reset, but for what firmware sets up after one."""
        if on != self.on:
            self.from_state(Lapic(self._timeline, self._external, lambda: None).state() | {"on": on})

    def accept(self, vector: int, level: bool = False) -> None:
        """An interrupt for this CPU."""
        if vector < 16:
            self._error(_RECEIVED_ILLEGAL)
        elif self.svr & _ENABLED and self.on:
            self.irr |= 1 << vector
            self.tmr = self.tmr & ~(1 << vector) | level << vector
            self._changed()

    def message(self, vector: int, delivery: int, destination: int, logical: bool, level: bool) -> bool:
        """An interrupt message on the bus (§10.6.1, §10.6.2): whether it was for this CPU."""
        if logical:
            mine = bool(destination & self.ldr) if self.dfr >> 28 == 0xF else self._in_cluster(destination)
        else:
            mine = destination in (self.id, 0xFF)
        if mine and delivery in (_FIXED, _LOWEST_PRIORITY):
            self.accept(vector, level)
        elif mine and delivery == _NMI:
            self.on_nmi()
        return mine

    def _in_cluster(self, destination: int) -> bool:
        """The cluster model: the high half names the cluster, 15 all of them; the low half is a set of its members (§10.6.2.2)."""
        return destination >> 4 in (self.ldr >> 4, 0xF) and bool(destination & self.ldr & 0xF)

    def _error(self, bit: int) -> None:
        self.errors |= bit
        entry = self.lvt[LVT_ERROR]
        if not entry & _MASKED and entry & 0xFF >= 16:
            self.accept(entry & 0xFF)

    # ---- registers
    def read(self, offset: int, size: int) -> int:
        if size != 4 or offset & 0xF:
            return 0
        reader = _READERS.get(offset)
        if reader is not None:
            return reader(self)
        if offset in self.lvt:
            return self.lvt[offset]
        for first, bits in ((ISR, self.isr), (TMR, self.tmr), (IRR, self.irr)):
            if first <= offset < first + 0x80:
                return bits >> 2 * (offset - first) & 0xFFFFFFFF
        self._error(_ILLEGAL_REGISTER)
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        if size != 4 or offset & 0xF:
            return
        if offset == EOI:
            if self.isr:
                vector = self.isr.bit_length() - 1
                self.isr &= ~(1 << vector)
                if self.tmr >> vector & 1:
                    self.on_eoi(vector)
                self._changed()
        elif offset == TPR:
            self.set_tpr(value)
        elif offset in self.lvt:
            self._set_lvt(offset, value)
        elif offset == INITIAL_COUNT:
            self.initial, self.started = value, self._timeline.now
            self._schedule()
        elif offset == DIVIDE:
            left = self.current_count()
            self.divide = value & 0xB
            if self.initial:  # goes on from the count that it had
                self.started = self._timeline.now - (self.initial - left) * self._divisor
            self._schedule()
        elif offset == ICR_LOW:
            self.icr = self.icr & ~0xFFFFFFFF | value & 0xCCFFF
            self._send()
        elif offset == ICR_HIGH:
            self.icr = self.icr & 0xFFFFFFFF | (value & 0xFF000000) << 32
        elif offset == SVR:
            self._set_svr(value)
        elif offset == ESR:
            self.esr, self.errors = self.errors, 0
        elif offset == ID:
            self.id = value >> 24
        elif offset == LDR:
            self.ldr = value >> 24
        elif offset == DFR:
            self.dfr = value | 0x0FFFFFFF
        elif offset not in (VERSION, PPR, CURRENT_COUNT) and not ISR <= offset < IRR + 0x80:
            self._error(_ILLEGAL_REGISTER)

    def _set_lvt(self, offset: int, value: int) -> None:
        if not self.svr & _ENABLED:
            value |= _MASKED  # §10.4.7.2: while disabled by software, entries are masked and stay so
        before = self.current_count()
        self.lvt[offset] = value & _LVT_BITS[offset]
        if offset == LVT_TIMER:
            if self.initial and not before and not value & _PERIODIC:
                self.initial = 0  # a one-shot that is over does not begin again by changing mode
            self._schedule()
        self._changed()

    def _set_svr(self, value: int) -> None:
        self.svr = value & 0x3FF
        if not value & _ENABLED:
            for offset in self.lvt:
                self.lvt[offset] |= _MASKED
            self._schedule()
        self._changed()

    def _send(self) -> None:
        """ICR: an interprocessor interrupt, which only this CPU can get (§10.6.1)."""
        vector, delivery, shorthand = self.icr & 0xFF, self.icr >> 8 & 7, self.icr >> 18 & 3
        if vector < 16 and delivery in (_FIXED, _LOWEST_PRIORITY):
            self._error(_SEND_ILLEGAL)
        elif shorthand == 0:
            self.message(vector, delivery, self.icr >> 56, bool(self.icr >> 11 & 1), False)
        elif shorthand != 3:        # to itself, or to all with itself
            self.message(vector, delivery, self.id, False, False)

    # ---- timer
    @property
    def _divisor(self) -> int:
        """§10.5.4 figure 10-10."""
        code = self.divide & 3 | self.divide >> 1 & 4
        return 1 << (code + 1 & 7)

    def current_count(self) -> int:
        """What the timer has left to count."""
        if not self.initial:
            return 0
        counted = (self._timeline.now - self.started) // self._divisor
        if self.lvt[LVT_TIMER] & _PERIODIC:
            return self.initial - counted % self.initial
        return max(self.initial - counted, 0)

    def _schedule(self) -> None:
        """The timer's next interrupt; none while it is masked."""
        self._timeline.cancel(self._handle)
        self._handle = None
        if not self.initial or self.lvt[LVT_TIMER] & _MASKED:
            return
        period, now = self.initial * self._divisor, self._timeline.now
        if self.lvt[LVT_TIMER] & _PERIODIC:
            self._handle = self._timeline.at(self.started + ((now - self.started) // period + 1) * period, self._fire)
        elif now < self.started + period:
            self._handle = self._timeline.at(self.started + period, self._fire)

    def _fire(self) -> None:
        self.accept(self.lvt[LVT_TIMER] & 0xFF)
        if self.lvt[LVT_TIMER] & _PERIODIC:
            self._schedule()
        else:
            self._handle = None

    # ---- state
    _FIELDS = ("on", "id", "tpr", "ldr", "dfr", "svr", "irr", "isr", "tmr", "esr", "errors", "icr", "initial", "divide", "started")

    def state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._FIELDS} | {"lvt": dict(self.lvt)}

    def from_state(self, state: dict[str, Any]) -> None:
        for name in self._FIELDS:
            setattr(self, name, state[name])
        self.lvt = dict(state["lvt"])
        self._schedule()
        self._changed()


#: Registers that are one number each; some kernels read ID at every look at their own CPU.
_READERS: dict[int, Callable[[Lapic], int]] = {
    ID: lambda apic: apic.id << 24, VERSION: lambda apic: _VERSION, TPR: lambda apic: apic.tpr, PPR: lambda apic: apic.ppr,
    EOI: lambda apic: 0, LDR: lambda apic: apic.ldr << 24, DFR: lambda apic: apic.dfr, SVR: lambda apic: apic.svr, ESR: lambda apic: apic.esr,
    ICR_LOW: lambda apic: apic.icr & 0xFFFFFFFF, ICR_HIGH: lambda apic: apic.icr >> 32, INITIAL_COUNT: lambda apic: apic.initial,
    CURRENT_COUNT: lambda apic: apic.current_count(), DIVIDE: lambda apic: apic.divide,
}
