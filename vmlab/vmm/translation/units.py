"""What the translator makes, as data: units, the pieces they consist of, the sites where they call out, and states.

A *unit* is the translation of a straight line of guest code. A *piece* is one guest instruction in it, with its
kind. A *site* is a place where the unit leaves the cache: an exit to code not translated yet, or a callout. A *state*
says, for one address in the cache, how the guest's registers follow from the machine's there.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from vmlab.machine.decode import Instruction


@dataclass(frozen=True)
class Mode:
    """What translations have built in: another mode, and all of them are void.

    :ivar bits: of the kernel's code: 32 or 64.
    :ivar selector: of the kernel's code segment.
    """

    bits: int = 32
    selector: int = 0x08
    iopl: int = 0


class Kind(enum.Enum):
    """How one guest instruction was translated."""

    IDENT = "identical"        # copied
    RELOCATED = "relocated"    # a copy whose operand, relative to RIP, is reached from the cache in another way
    IN_CACHE = "in-cache"      # other code, which works on the virtual CPU without leaving the cache
    CALLOUT = "callout"        # the VMM carries it out
    CONTROL = "control flow"   # jumps, calls and returns
    SIMULATE = "simulated"     # adapted: the access is carried out in the cache, or by the VMM without a trap
    FORWARD = "forwarding"     # a jump to where the access was translated anew


@dataclass(frozen=True)
class State:
    """The guest's state when the machine is about to execute one particular instruction of the cache.

    Before a template's commit it is the state before the guest's instruction: what the template did so far is undone.
    After the commit it is the state after it.

    :ivar rip: the guest's instruction pointer; None: it is in :data:`~vmlab.vmm.translation.layout.TARGET`.
    :ivar saved: (register, address): guest registers that the template has put away.
    :ivar esp: to be added to ESP.
    :ivar shadow: STI came just before: no interrupt may be taken here (SDM Vol. 2, STI).
    :ivar early_flags: the virtual flags are those after the instruction; those before it are kept.
    """

    rip: int | None
    saved: tuple[tuple[int, int], ...] = ()
    esp: int = 0
    shadow: bool = False
    early_flags: bool = False

    @property
    def template(self) -> bool:
        """Whether something must be undone to have the guest's state."""
        return bool(self.saved or self.esp or self.early_flags)


@dataclass(frozen=True)
class Piece:
    """One guest instruction: its address, what became of it, and where that lies in the cache."""

    guest: int
    instruction: Instruction | None   # None: no instruction there, #UD
    kind: Kind
    start: int
    end: int
    first_site: int = 0               # its sites, and those of the pieces behind it, begin here in the unit's


@dataclass(eq=False)
class Site:
    """A place where a unit leaves the cache.

    ``form`` of an exit: how its target is patched in. "jump" and "jcc" end in a rel32 at ``patch`` that first leads to
    ``stub``; "inline" has its stub at the unit's end, where the next unit may take its place; "forward" is a jump in place of an
    access that was adapted; "" for callouts.
    """

    number: int
    cause: str
    guest: int | None                 # exits: the target; callouts: the instruction's own address; None: in TARGET
    unit: Unit
    instruction: Instruction | None = None
    form: str = ""
    stub: int = 0
    spare: int = 0                    # another stub, where the next unit took the place of the first
    patch: int = 0
    target: Unit | None = None        # the unit that it is chained to
    after: int = 0                    # callouts: cache address of the next piece, if the unit goes on
    calls: int = 0
    #: Addresses of operands that the VMM fills in: a simulated store's window, what an IRET to user mode may expect.
    binding: tuple[int, ...] = ()

    @property
    def is_exit(self) -> bool:
        return bool(self.form)


@dataclass(eq=False)
class Unit:
    """One translation unit.

    ``start`` is where direct jumps enter; ``entry`` where the look-up table leads, which checks that the target
    is really this unit's guest address (0: not looked up so far).
    """

    guest: int
    start: int
    source: bytes = b""
    entry: int = 0
    end: int = 0
    pieces: list[Piece] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    #: Every address of an emitted machine instruction.
    addresses: list[int] = field(default_factory=list)
    incoming: set[Site] = field(default_factory=set)
    alive: bool = True

    @property
    def guest_end(self) -> int:
        return self.guest + len(self.source)
