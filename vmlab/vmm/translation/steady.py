"""How a translator warms up, and how it does once it is warm: the second half of its work, beside the first.

The promise of a translator with chains and an in-cache look-up is that the monitor is entered for translation or control flow
only while it learns. What a kernel does with its machine (callouts) and what its machine does to it (faults, interrupts) is no
part of that, and is counted apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vmlab.ledger import Snapshot

#: Entries into the monitor because it was not known where to go on.
CONTROL_FLOW = ("bt.callout.chain", "bt.callout.indirect")


class Learning:
    """What was learned when: units translated and exits chained, by the power of two of virtual time that came next."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, int], int] = {}

    def note(self, what: str, time: int) -> None:
        """``what`` ("translated", "chained") happened at ``time``."""
        key = what, (time - 1).bit_length() if time else 0
        self._seen[key] = self._seen.get(key, 0) + 1

    def curve(self, end: int) -> list[dict[str, int]]:
        """What had been done by each power of two of virtual time (guest instructions, and idle time), and by ``end``.

        Anything twice translated counts twice.
        """
        powers = [n for n in range(end.bit_length()) if 1 << n < end]
        rows = [(1 << n, n) for n in powers] + [(end, 64)]
        return [{"instructions": time, **{what: sum(n for (of, power), n in self._seen.items() if of == what and power <= upto)
                                          for what in ("translated", "chained")}} for time, upto in rows]


def halves(begin: Snapshot, middle: Snapshot, end: Snapshot) -> list[dict[str, Any]]:
    """A row for each half of a run, or of the region that is measured; see :func:`row`."""
    return [{"half": name} | row(part.events) for name, part in (("first", middle.minus(begin)), ("second", end.minus(middle)))]


def row(events: Mapping[str, int]) -> dict[str, Any]:
    """Units executed and translated, entries for translation or control flow, all three per 1000 units executed; and what is apart."""
    def total(*kinds: str) -> int:
        return sum(events.get(kind, 0) for kind in kinds)

    units = total("translated.unit")
    entries, made = total(*CONTROL_FLOW), total("bt.translate.unit")
    return {
        "units": units, "entries": entries, "translated": made,
        "entries_per_1000": 1000 * entries / units if units else None, "translated_per_1000": 1000 * made / units if units else None,
        "callouts": sum(n for kind, n in events.items() if kind.startswith("bt.callout.") and kind not in CONTROL_FLOW),
        "interrupts": total("interrupt.injected"), "sensitive": total("translated.sensitive"),
    }
