"""The real-time clock and its memory at ports 0x70 and 0x71: MC146818 data sheet (Motorola), IBM PC/AT Technical Reference (memory map).

The clock shows virtual time from midnight of :data:`EPOCH` on, so that every run sees the same dates.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable
from typing import Any

from vmlab.machine.timeline import Handle, Timeline

FIRST_PORT, PORT_COUNT = 0x70, 2
EPOCH = datetime.datetime(2000, 1, 1)
_SECOND = 1_000_000_000
# How long before an update UIP is up, and the update itself, with a 32 768 Hz crystal (data sheet, table 6): 244 µs and 1984 µs.
_UPDATE = 244_000 + 1_984_000
_A, _B, _C, _D, _CENTURY, _SHUTDOWN = 0x0A, 0x0B, 0x0C, 0x0D, 0x32, 0x0F
_TIMES = {0x00: "second", 0x02: "minute", 0x04: "hour", 0x07: "day", 0x08: "month", 0x09: "year"}
_ALARMS = {0x01: 0x00, 0x03: 0x02, 0x05: 0x04}
_UIP, _SET, _PERIODIC, _ALARM, _UPDATED, _BINARY, _HOURS_24 = 0x80, 0x80, 0x40, 0x20, 0x10, 0x04, 0x02
_REQUEST = 0x80
_PM = 0x80
_MEMORY_BELOW_64K, _ABOVE_1M, _ABOVE_1M_TOO, _ABOVE_16M, _BASE, _EQUIPMENT = 0x15, 0x17, 0x30, 0x34, 0x15, 0x14


def _replaced(moment: datetime.datetime, part: str, number: int) -> datetime.datetime:
    """``moment`` with one part of it set; raises ValueError where that is no date."""
    parts = {name: int(getattr(moment, name)) for name in ("year", "month", "day", "hour", "minute", "second")} | {part: number}
    return datetime.datetime(**parts)  # type: ignore[arg-type]


class Cmos:
    """MC146818 with 128 bytes. ``memory``: bytes of RAM, which firmware notes there for a guest to read."""

    def __init__(self, timeline: Timeline, line: Callable[[bool], None], memory: int) -> None:
        self._timeline, self._line = timeline, line
        self.index = 0
        self.bytes = bytearray(128)
        self.bytes[_A], self.bytes[_B], self.bytes[_D] = 0x26, _HOURS_24, 0x80   # 32 768 Hz, 1024 Hz; 24 hours, BCD; power is good
        self.bytes[_EQUIPMENT] = 0x22
        extended, high = min(max(memory - (1 << 20), 0) >> 10, 0xFFFF), max(memory - (16 << 20), 0) >> 16
        for at, value in ((_BASE, 640), (_ABOVE_1M, extended), (_ABOVE_1M_TOO, extended), (_ABOVE_16M, min(high, 0xFFFF))):
            self.bytes[at], self.bytes[at + 1] = value & 0xFF, value >> 8
        self.offset = 0                     # seconds that a guest set the clock forward
        self._handles: dict[int, Handle | None] = {}

    # ---- time
    def _moment(self) -> datetime.datetime:
        return EPOCH + datetime.timedelta(seconds=self._timeline.now // _SECOND + self.offset)

    def _shown(self, value: int) -> int:
        return value if self.bytes[_B] & _BINARY else value // 10 << 4 | value % 10

    def _meant(self, value: int) -> int:
        return value if self.bytes[_B] & _BINARY else (value >> 4) * 10 + (value & 0xF)

    def _time(self, register: int) -> int:
        moment = self._moment()
        if register == 0x06:
            return moment.isoweekday() % 7 + 1
        if register == _CENTURY:
            return self._shown(moment.year // 100)
        value = int(getattr(moment, _TIMES[register]))
        if register == 0x09:
            value %= 100
        if register == 0x04 and not self.bytes[_B] & _HOURS_24:
            return self._shown((value + 11) % 12 + 1) | (_PM if value >= 12 else 0)
        return self._shown(value)

    def _set_time(self, register: int, value: int) -> None:
        """The guest sets one part of the clock; parts that make no date are refused, as an undefined update would be."""
        moment = self._moment()
        number = self._meant(value & 0x7F if register == 0x04 and not self.bytes[_B] & _HOURS_24 else value)
        try:
            if register == _CENTURY:
                new = moment.replace(year=number * 100 + moment.year % 100)
            elif register == 0x09:
                new = moment.replace(year=moment.year // 100 * 100 + number)
            else:
                if register == 0x04 and not self.bytes[_B] & _HOURS_24:
                    number = number % 12 + (12 if value & _PM else 0)
                new = _replaced(moment, _TIMES[register], number)
            offset = self.offset + int((new - moment).total_seconds())
            _ = EPOCH + datetime.timedelta(seconds=offset)
        except (ValueError, OverflowError):
            return
        self.offset = offset

    # ---- interrupts
    def _raise(self, cause: int) -> None:
        self.bytes[_C] |= cause
        if self.bytes[_B] & cause:
            self.bytes[_C] |= _REQUEST
            self._line(True)

    def _period(self) -> int:
        """Nanoseconds between periodic interrupts: 32 768 Hz divided by 2^(rate − 1) (table 5); 0: none."""
        rate = self.bytes[_A] & 0xF
        if not rate:
            return 0
        return _SECOND * (1 << (rate + 6 if rate <= 2 else rate - 1)) // 32768

    def _schedule(self) -> None:
        """Events that are wanted, at their next multiples."""
        for cause, period in ((_PERIODIC, self._period()), (_UPDATED, _SECOND), (_ALARM, _SECOND)):
            wanted = period and self.bytes[_B] & cause and not self.bytes[_B] & (_SET if cause != _PERIODIC else 0)
            handle = self._handles.get(cause)
            if not wanted:
                self._timeline.cancel(handle)
                self._handles[cause] = None
            elif handle is None or handle.callback is None:
                due = (self._timeline.now // period + 1) * period
                self._handles[cause] = self._timeline.at(due, functools.partial(self._event, cause))

    def _event(self, cause: int) -> None:
        self._handles[cause] = None
        if cause != _ALARM or all(self.bytes[alarm] >= 0xC0 or self.bytes[alarm] == self._time(of) for alarm, of in _ALARMS.items()):
            self._raise(cause)
        self._schedule()

    # ---- ports
    def read(self, offset: int, size: int) -> int:
        if offset == 0:
            return 0xFF         # the index is not readable
        register = self.index
        if register in _TIMES or register in (0x06, _CENTURY):
            return self._time(register)
        if register == _A:
            updating = not self.bytes[_B] & _SET and self._timeline.now % _SECOND >= _SECOND - _UPDATE
            return self.bytes[_A] & ~_UIP | (_UIP if updating else 0)
        if register == _C:
            value, self.bytes[_C] = self.bytes[_C], 0
            self._line(False)
            return value
        return self.bytes[register]

    def write(self, offset: int, size: int, value: int) -> None:
        value &= 0xFF
        if offset == 0:
            self.index = value & 0x7F       # bit 7 masks NMI, of which this machine has no source
            return
        register = self.index
        if register in _TIMES or register == _CENTURY:
            self._set_time(register, value)
        elif register not in (0x06, _C, _D):
            self.bytes[register] = value & ~_UIP if register == _A else value
            if register in (_A, _B):
                self._schedule()

    def state(self) -> dict[str, Any]:
        return {"index": self.index, "bytes": bytes(self.bytes), "offset": self.offset}

    def from_state(self, state: dict[str, Any]) -> None:
        self.index, self.bytes, self.offset = state["index"], bytearray(state["bytes"]), state["offset"]
        for handle in self._handles.values():
            self._timeline.cancel(handle)
        self._handles.clear()
        self._schedule()
