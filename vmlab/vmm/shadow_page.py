"""One page of shadow table, and whose shadow it is: the material of :mod:`vmlab.vmm.shadow_tables`."""

from __future__ import annotations

import enum
import struct

from vmlab.machine.paging import RW, US

FRAME = 0x000FFFFFFFFFF000          # of an entry
ALL = RW | US                       # what upper entries give
CLEAN = 1 << 9                      # available to software: read-only only because the guest's D bit was clear
GLOBAL = 1 << 10                    # available to software: the guest's entry is global, and outlives a CR3 load
TABLE = struct.Struct("<512Q")
LAST = 511                          # the last entry of a table


class View(enum.Enum):
    """Whose shadow it is."""

    ONE = "the rights of supervisor and user are the CPU's own to tell apart"
    KERNEL = "the guest's kernel, at CPL 3: every page of the guest's is a user page"
    USER = "the guest's users: no page of the guest's kernel is there"


class ShadowPage:
    """One page of shadow table. ``key`` says what it stands for; ``parents`` maps entry addresses to the pages they are in."""

    __slots__ = ("access", "base", "children", "direct", "frame", "gfn", "has_global", "hole", "key", "level", "parents", "quadrant", "view")

    def __init__(self, key: Key, frame: int) -> None:
        self.key, self.frame = key, frame
        self.gfn, self.level, self.quadrant, self.access, self.direct, self.hole, self.view, self.base = key
        #: Whether an entry may be global. One that is filled without a word to Python must be taken for such.
        self.has_global = False
        self.parents: dict[int, ShadowPage] = {}
        self.children: dict[int, ShadowPage] = {}


#: Guest frame, level, quadrant (32-bit tables have 1024 entries), gathered rights of the levels above, direct, leads to the hole, view,
#: and the linear address that it begins at: a TLB's entries (``lazy``) belong to that; where tables are traced they serve any, and it is 0.
Key = tuple[int, int, int, int, bool, bool, View, int]
