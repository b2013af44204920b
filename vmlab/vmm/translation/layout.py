"""Where translated code and its data lie: addresses in the VMM's hole, as 32-bit code has them.

In 64-bit mode the hole is at the end of the 64-bit space: the same addresses, sign-extended
(:func:`~vmlab.vmm.space.hole_address`). One page is writable by the guest's ring, because translated code runs there and
must write; nothing in it is trusted. All else is read-only to the guest. Words have 8 bytes, of which 32-bit code uses 4.
"""

from __future__ import annotations

from vmlab.vmm.space import HOLE

# ---- the writable page
VIRTUAL_FLAGS = HOLE + 0x11000      # IF and IOPL of the virtual CPU
SITE = VIRTUAL_FLAGS + 4            # number of the callout under way
TARGET = VIRTUAL_FLAGS + 8          # where an indirect jump or return wants to go
NEW_FLAGS = VIRTUAL_FLAGS + 16      # virtual flags that an IRET is about to set
NEW_STACK = VIRTUAL_FLAGS + 24      # and the stack pointer (64-bit mode, where every IRET loads it)
SAVED = VIRTUAL_FLAGS + 32          # registers that a template has put away, by number (0-7)
SIMULATED = SAVED + 8 * 8            # a simulated store's offset from its window's page
OLD_FLAGS = SAVED + 9 * 8            # virtual flags before an IRET to user mode
NEW_PRIORITY = SAVED + 10 * 8        # what CR8 is about to become
PRIORITY = SAVED + 11 * 8            # CR8
PRIORITY_WRITTEN = SAVED + 12 * 8    # not zero: by translated code, and the local APIC's model has not heard of it

# ---- the read-only page
PENDING = HOLE + 0x12000            # not zero: an interrupt waits for the virtual IF
VIRTUAL_CR = PENDING + 16           # CR0, CR1 (none), CR2, CR3, CR4 as the guest believes them
PRIORITY_WAITS = PENDING + 0x88     # not zero: an interrupt waits that a lower task priority may let through
NEGATIVE_STACK = PENDING + 0x80     # minus the selector in SS (64-bit mode)
#: By bits 8–15 of a flags image: 0 where POPF may set it without the VMM (TF and NT clear, IOPL as it is).
FLAGS_REFUSED = PENDING + 0x100
#: By the same bits: what the second byte of :data:`VIRTUAL_FLAGS` becomes.
FLAGS_VIRTUAL = PENDING + 0x200
#: By bits 16–23 of a flags image: 0 where IRET may set it without the VMM (none but AC and ID).
FLAGS_UPPER = PENDING + 0x300
#: By a byte: 0 where it is less than 16 (bits 8–15 of an offset in a page; a task priority).
BELOW_16 = PENDING + 0x400

GATE = HOLE + 0x13000               # the door to the VMM
#: Windows on watched pages of the guest's, and a chart beside each (read-only; the first forbids every store).
WINDOWS, CHARTS, WINDOW_COUNT = HOLE + 0x20000, HOLE + 0x30000, 16
#: What a simulated store is bound to before it has a window: page, chart, window.
NO_WINDOW = (0, CHARTS, WINDOWS)
#: 65,536 cache addresses, by the low 16 bits of a guest address: no flag is touched in getting them (MOVZX).
TABLE, TABLE_ENTRIES = HOLE + 0x40000, 1 << 16
CACHE, CACHE_LIMIT = HOLE + 0x100000, 1 << 20
#: At the cache's bottom: where look-ups miss.
MISS, FIRST_UNIT = CACHE, CACHE + 0x20


def saved(register: int) -> int:
    """Where a template puts this register away."""
    return SAVED + 8 * register
