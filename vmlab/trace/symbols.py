"""Names for addresses."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping


class Symbols:
    """A guest image's symbols, to name an address by the nearest one below."""

    def __init__(self, symbols: Mapping[str, int]) -> None:
        rows = sorted((address, name) for name, address in symbols.items())
        self._addresses, self._names = [row[0] for row in rows], [row[1] for row in rows]

    def name(self, address: int) -> str:
        """``name`` or ``name+0x12``; "" where no symbol is near."""
        at = bisect_right(self._addresses, address) - 1
        if at < 0 or address - self._addresses[at] > 0x10000:
            return ""
        offset = address - self._addresses[at]
        return self._names[at] + (f"+{offset:#x}" if offset else "")
