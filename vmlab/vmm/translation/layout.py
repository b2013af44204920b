"""Where translated code and its data lie: linear addresses in the VMM's hole.

One page is writable by the guest's ring, because translated code runs there and must write; nothing in it is
trusted. All else is read-only to the guest. Translated code reaches these through SS, the one segment register that a
kernel cannot leave null.
"""

from __future__ import annotations

from vmlab.vmm.space import HOLE

# ---- the writable page
VIRTUAL_FLAGS = HOLE + 0x11000      # IF and IOPL of the virtual CPU
SITE = VIRTUAL_FLAGS + 4            # number of the callout under way
TARGET = VIRTUAL_FLAGS + 8          # where an indirect jump or return wants to go
NEW_FLAGS = VIRTUAL_FLAGS + 12      # virtual flags that an IRET is about to set
SAVED_EAX, SAVED_ECX = VIRTUAL_FLAGS + 16, VIRTUAL_FLAGS + 20

# ---- the read-only page
PENDING = HOLE + 0x12000            # not zero: an interrupt waits for the virtual IF
VIRTUAL_CR = PENDING + 16           # CR0, CR1 (none), CR2, CR3, CR4 as the guest believes them
#: By bits 8–15 of a flags image: 0 where POPF may set it without the VMM (TF and NT clear, IOPL as it is).
FLAGS_REFUSED = PENDING + 0x100
#: By the same bits: what the second byte of :data:`VIRTUAL_FLAGS` becomes.
FLAGS_VIRTUAL = PENDING + 0x200
#: By bits 16–23 of a flags image: 0 where IRET may set it without the VMM (none but AC and ID).
FLAGS_UPPER = PENDING + 0x300

GATE = HOLE + 0x13000               # the door to the VMM
#: 65,536 cache addresses, by the low 16 bits of a guest address: no flag is touched in getting them (MOVZX).
TABLE, TABLE_ENTRIES = HOLE + 0x40000, 1 << 16
CACHE, CACHE_LIMIT = HOLE + 0x100000, 1 << 20
#: At the cache's bottom: where look-ups miss.
MISS, FIRST_UNIT = CACHE, CACHE + 0x20
