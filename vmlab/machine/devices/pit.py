"""The interval timer, an 8254 (Intel 8254 data sheet), and the port that gates its third channel.

Channel 0 drives IRQ 0; channel 2's gate and output are bits of port 0x61. The input clock is the PC's,
1 193 182 Hz. Modes, as the data sheet's "Mode Definitions" describe them:

| mode | OUT |
|---|---|
| 0 | low when programmed, high N + 1 clocks after the count was written, and stays high |
| 2 | low for the last of every N clocks |
| 3 | high for (N + 1) / 2 clocks, low for N / 2 |

Modes 1, 4 and 5 hold OUT high and their count still. A count written in modes 2 and 3 while counting takes
effect at the end of the period. The interrupt line shows a rising edge as a short low pulse, so that a
request is not withdrawn by OUT's falling edge before the CPU accepted it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vmlab.machine.timeline import Handle, Timeline

HZ = 1_193_182
NANOSECONDS = 1_000_000_000
_CONTROL = 3  # offset of the control word register


def _ticks(time: int) -> int:
    """Clock pulses up to ``time``."""
    return time * HZ // NANOSECONDS


def time_of(tick: int) -> int:
    """When clock pulse ``tick`` comes, in nanoseconds."""
    return -(-tick * NANOSECONDS // HZ)


class Channel:
    """One counter: programmed by bytes, read by bytes, its count a function of time."""

    def __init__(self, timeline: Timeline, rising: Callable[[], None] | None = None,
                 level: Callable[[bool], None] | None = None) -> None:
        """:param rising: called at each rising edge that counting makes; :param level: told of OUT when programming changes it."""
        self._timeline, self._rising, self._level = timeline, rising, level
        # As firmware leaves it, but for the ticks: OUT is high and nothing counts.
        self.mode, self.access, self.bcd = 3, 3, False
        self.count = 0            # what was written, 0 standing for the largest
        self.start = 0            # the clock pulse that loaded the count
        self.counting = False     # a count was written since the control word
        self.gate = True
        self.stopped = 0          # mode 0 with the gate low: clocks counted before
        self.next_count: int | None = None   # modes 2, 3: takes effect at …
        self.next_start = 0                  # … this clock pulse
        self._low: int | None = None         # first byte of a two-byte write
        self._latched: list[int] = []        # bytes of a latched count, still to be read
        self._status: int | None = None
        self._high_next = False              # two-byte read: which byte comes
        self._handle: Handle | None = None

    # ---- the count as a function of time
    @property
    def _periodic(self) -> bool:
        return self.mode in (2, 3)

    @property
    def _n(self) -> int:
        n = self.count or (10_000 if self.bcd else 0x10000)
        return max(n, 2) if self._periodic else n  # the data sheet: a count of 1 is illegal in modes 2 and 3

    def _settle(self, tick: int) -> None:
        """Let a new count of modes 2 and 3 take effect."""
        if self.next_count is not None and tick >= self.next_start:
            self.count, self.start, self.next_count = self.next_count, self.next_start, None

    def _elapsed(self) -> int:
        """Clock pulses counted since the count was loaded; negative before that."""
        if self.mode == 0 and not self.gate:
            return self.stopped
        tick = _ticks(self._timeline.now)
        self._settle(tick)
        return tick - self.start

    @property
    def out(self) -> bool:
        """The level of OUT."""
        if self.mode == 0:
            return self.counting and self._elapsed() >= self._n
        if not self._periodic or not self.counting or not self.gate:
            return True
        elapsed = self._elapsed()
        if elapsed < 0:
            return True
        phase = elapsed % self._n
        return phase != self._n - 1 if self.mode == 2 else phase < (self._n + 1) // 2

    def current(self) -> int:
        """The count as the counting element holds it, in binary."""
        n = self._n
        elapsed = max(self._elapsed(), 0) if self.counting else 0
        if self.mode == 0:
            value = n - elapsed
        elif not self._periodic or not self.gate:
            value = n
        elif self.mode == 2:
            value = n - elapsed % n
        else:  # by twos, down from an even number in each half
            phase, half = elapsed % n, (n + 1) // 2
            value = (n & ~1) - 2 * (phase if phase < half else phase - half)
        return value % (10_000 if self.bcd else 0x10000)

    # ---- programming
    def control(self, value: int) -> None:
        """A control word for this channel: access, mode, BCD; counting stops until a count is written."""
        before = self.out
        self.access, self.bcd = value >> 4 & 3, bool(value & 1)
        mode = value >> 1 & 7
        self.mode = mode & 3 if mode >= 6 else mode  # bit 2 does not matter in modes 2 and 3
        self.counting, self.next_count, self._low, self._high_next = False, None, None, False
        self._latched, self._status = [], None
        self._schedule()
        if self._level is not None and self.out != before:
            self._level(self.out)

    def write(self, value: int) -> None:
        """A byte of the count."""
        if self.access == 3:
            if self._low is None:
                self._low = value
                if self.mode == 0:
                    self.counting = False  # the first byte stops the count
                    self._schedule()
                return
            value, self._low = self._low | value << 8, None
        elif self.access == 2:
            value <<= 8
        if self.bcd:
            value = sum(min(value >> 4 * i & 0xF, 9) * 10**i for i in range(4))
        tick = _ticks(self._timeline.now)
        self._settle(tick)
        if self._periodic and self.counting and self.gate and tick >= self.start:
            self.next_count, self.next_start = value, self.start + ((tick - self.start) // self._n + 1) * self._n
            return
        self.count, self.start, self.counting, self.stopped, self.next_count = value, tick + 1, True, 0, None
        if self._level is not None and self.mode == 0:
            self._level(False)
        self._schedule()

    def set_gate(self, level: bool) -> None:
        """GATE: low suspends mode 0 and stops modes 2 and 3; its rising edge starts those anew."""
        if level == self.gate:
            return
        if self.mode == 0 and not level:
            self.stopped = self._elapsed()
        self.gate = level
        tick = _ticks(self._timeline.now)
        if level and self.mode == 0:
            self.start = tick - self.stopped
        elif level and self._periodic:
            if self.next_count is not None:
                self.count, self.next_count = self.next_count, None
            self.start = tick + 1
        self._schedule()

    # ---- reading
    def latch(self) -> None:
        """Counter latch command: hold the count until it is read; ignored while one is held."""
        if not self._latched:
            self._latched = self._bytes(self.current())

    def latch_status(self) -> None:
        """Read-back command: hold OUT, null count and the control word."""
        if self._status is None:
            null = not self.counting or self.next_count is not None or self._elapsed() < 0
            self._status = self.out << 7 | null << 6 | self.access << 4 | self.mode << 1 | self.bcd

    def _bytes(self, value: int) -> list[int]:
        if self.bcd:
            value = sum(value // 10**i % 10 << 4 * i for i in range(4))
        low, high = value & 0xFF, value >> 8
        return {1: [low], 2: [high]}.get(self.access, [low, high])

    def read(self) -> int:
        """The next byte: a latched status, a latched count, or the count as it runs."""
        if self._status is not None:
            status, self._status = self._status, None
            return status
        if self._latched:
            return self._latched.pop(0)
        running = self._bytes(self.current())
        if len(running) == 1:
            return running[0]
        self._high_next = not self._high_next
        return running[0] if self._high_next else running[1]

    # ---- the next edge
    def _schedule(self) -> None:
        if self._rising is None:
            return
        self._timeline.cancel(self._handle)
        self._handle = None
        if not self.counting or not self.gate or self.mode not in (0, 2, 3):
            return
        tick = _ticks(self._timeline.now)
        self._settle(tick)
        if self.mode == 0:
            if tick - self.start < self._n:
                self._handle = self._timeline.at(time_of(self.start + self._n), self._edge)
        else:
            periods = max((tick - self.start) // self._n, 0) + 1
            self._handle = self._timeline.at(time_of(self.start + periods * self._n), self._edge)

    def _edge(self) -> None:
        assert self._rising is not None
        self._rising()
        if self._periodic:
            self._schedule()

    # ---- state
    _FIELDS = ("mode", "access", "bcd", "count", "start", "counting", "gate", "stopped", "next_count", "next_start",
               "_low", "_status", "_high_next")

    def state(self) -> dict[str, Any]:
        return {name.lstrip("_"): getattr(self, name) for name in self._FIELDS} | {"latched": list(self._latched)}

    def from_state(self, state: dict[str, Any]) -> None:
        for name in self._FIELDS:
            setattr(self, name, state[name.lstrip("_")])
        self._latched = list(state["latched"])
        self._schedule()


class Pit:
    """Three channels at ports 0x40–0x42 and the control word at 0x43; ``line`` is IRQ 0."""

    def __init__(self, timeline: Timeline, line: Callable[[bool], None]) -> None:
        def pulse() -> None:
            line(False)
            line(True)

        self.channels = [Channel(timeline, pulse, line), Channel(timeline), Channel(timeline)]
        self.channels[2].gate = False

    def read(self, offset: int, size: int) -> int:
        if offset == _CONTROL:
            return 0xFF  # the control word register is not readable: the bus floats
        return self.channels[offset].read()

    def write(self, offset: int, size: int, value: int) -> None:
        value &= 0xFF
        if offset != _CONTROL:
            self.channels[offset].write(value)
        elif value >> 6 == 3:  # read-back: active-low bits say what to latch
            for number, channel in enumerate(self.channels):
                if value & 2 << number:
                    if not value & 0x20:
                        channel.latch()
                    if not value & 0x10:
                        channel.latch_status()
        elif not value & 0x30:
            self.channels[value >> 6].latch()
        else:
            self.channels[value >> 6].control(value)

    def state(self) -> dict[str, Any]:
        return {"channels": [channel.state() for channel in self.channels]}

    def from_state(self, state: dict[str, Any]) -> None:
        for channel, saved in zip(self.channels, state["channels"], strict=True):
            channel.from_state(saved)


class SystemControl:
    """Port 0x61 of the PC: bit 0 gates channel 2, bit 1 lets its output to the speaker, bit 5 shows that output.

    Bit 4 toggles with every refresh of memory, about every 15 µs.
    """

    _REFRESH_NS = 15_085

    def __init__(self, timeline: Timeline, channel: Channel) -> None:
        self._timeline, self._channel = timeline, channel
        self.value = 0

    def read(self, offset: int, size: int) -> int:
        refresh = self._timeline.now // self._REFRESH_NS & 1
        return self.value | refresh << 4 | self._channel.out << 5

    def write(self, offset: int, size: int, value: int) -> None:
        self.value = value & 0x0F
        self._channel.set_gate(bool(value & 1))

    def state(self) -> dict[str, Any]:
        return {"value": self.value}

    def from_state(self, state: dict[str, Any]) -> None:
        self.value = state["value"]
