"""Virtual time and what is due in it: a heap of due times, run at block boundaries.

Devices that act by themselves (timers, the disk) put a callback at a due time. The machine asks for
:attr:`Timeline.next_due`, makes it a limit of its instruction counter, and calls :meth:`Timeline.run_due` at the
first block boundary at or after it: never early, at most one block late, and always at the same instruction.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(order=True, slots=True)
class Handle:
    """A due time that was asked for. Equal times run in the order in which they were asked for."""

    due: int
    order: int
    callback: Callable[[], None] | None = field(compare=False)


class Timeline:
    """Callbacks at due times, in virtual nanoseconds.

    :param clock: the time now.
    :param changed: called after the next due time may have changed.
    """

    def __init__(self, clock: Callable[[], int], changed: Callable[[], None]) -> None:
        self._clock, self._changed = clock, changed
        self._heap: list[Handle] = []
        self._asked = 0

    @property
    def now(self) -> int:
        """Virtual time, in nanoseconds."""
        return self._clock()

    @property
    def next_due(self) -> int | None:
        """The earliest due time; None when nothing is due ever."""
        while self._heap and self._heap[0].callback is None:
            heapq.heappop(self._heap)
        return self._heap[0].due if self._heap else None

    def at(self, due: int, callback: Callable[[], None]) -> Handle:
        """Call ``callback`` at ``due`` (at once, that is at the next block boundary, where that has passed)."""
        self._asked += 1
        handle = Handle(due, self._asked, callback)
        heapq.heappush(self._heap, handle)
        self._changed()
        return handle

    def cancel(self, handle: Handle | None) -> None:
        """Take a callback back; harmless for None and for one that has run."""
        if handle is not None and handle.callback is not None:
            handle.callback = None
            self._changed()

    def pending(self) -> list[Handle]:
        """What is due, in the order in which it will run."""
        return sorted(handle for handle in self._heap if handle.callback is not None)

    def reorder(self, handles: list[Handle]) -> None:
        """Equal due times run in the order of ``handles`` from now on; these are all that are pending."""
        for number, handle in enumerate(handles, self._asked + 1):
            handle.order = number
        self._asked += len(handles)
        self._heap = list(handles)
        heapq.heapify(self._heap)
        self._changed()

    def run_due(self) -> None:
        """Run what is due by now, in order of due times; what that makes due by now runs as well."""
        while True:
            due = self.next_due
            if due is None or due > self._clock():
                break
            handle = heapq.heappop(self._heap)
            callback, handle.callback = handle.callback, None
            assert callback is not None
            callback()
        self._changed()
