"""The ledger at every instruction, quickly: only what changed since the last look is summed anew.

:meth:`vmlab.machine.counter.Counter.snapshot` sums over every block that ever ran. From one instruction to the next only the block
that the CPU was in and the one that it is in now can change, so their old part is taken away and their new part added. The result
is the same (a test compares them step by step). Where an instruction passes without a look, :meth:`RunningLedger.note` keeps its block in mind.
"""

from __future__ import annotations

from vmlab.ledger import Snapshot
from vmlab.machine.code import Block, total
from vmlab.machine.counter import Counter
from vmlab.strategies.base import Strategy

_Cuts = tuple[tuple[tuple[tuple[int, int], int], ...], tuple[int, int] | None]
_Signature = tuple[int, ...]


class RunningLedger:
    """Snapshots of one strategy's run, each the cheaper for the one before."""

    def __init__(self, strategy: Strategy) -> None:
        self._strategy, self._counter = strategy, strategy.machine.counter
        self._known: dict[int, tuple[Block, _Signature, _Cuts, Snapshot]] = {}
        self._events: dict[str, int] = {}
        self._user = self._kernel = self._machine = 0
        self._touched: dict[int, Block] = {}
        self._blocks = -1  # how many there were at the last look; another number: look at all of them

    def note(self) -> None:
        """An instruction begins, and :meth:`snapshot` will not be asked for it."""
        block = self._counter.current
        if block is not None:
            self._touched[id(block)] = block

    def snapshot(self, upto: int) -> Snapshot:
        """As ``strategy.snapshot(upto)``."""
        counter: Counter = self._counter
        block, within = counter.current, None
        if block is not None:
            index_here = block.offsets.get(upto - block.pc)
            if index_here is not None and index_here < len(block.instructions):
                within = block, index_here, counter.user
        self.note()
        count = len(counter.blocks) + len(counter._apart)
        for one in counter._all_blocks() if count != self._blocks else self._touched.values():
            runs, taken, again = one.runs, one.taken, one.again
            signature = (runs[0], runs[1], taken[0], taken[1], again[0], again[1])
            mine: _Cuts = tuple(one.cuts.items()), within[1:] if within is not None and within[0] is one else None
            known = self._known.get(id(one))
            if known is None or known[1] != signature or known[2] != mine:
                self._replace(one, signature, mine, known[3] if known is not None else None)
        self._touched, self._blocks = {} if block is None else {id(block): block}, count
        events = dict(self._events)
        irets = dict(zip(("iret.same", "iret.outer"), counter.irets, strict=True))
        for source in (irets, self._strategy.machine.events, self._strategy.counts):
            for kind, n in source.items():
                events[kind] = events.get(kind, 0) + n
        counts = self._strategy.counts
        return Snapshot({kind: n for kind, n in events.items() if n}, self._user + counts.get("emulated.user", 0),
                        self._kernel + counts.get("emulated.kernel", 0), self._machine)

    def _replace(self, block: Block, signature: _Signature, cuts: _Cuts, old: Snapshot | None) -> None:
        here = cuts[1]
        new = total([block], None if here is None else (block, *here))
        self._known[id(block)] = (block, signature, cuts, new)  # the block is kept, so that its identity stays its own
        for part, sign in ((old, -1), (new, 1)):
            if part is not None:
                for kind, n in part.events.items():
                    self._events[kind] = self._events.get(kind, 0) + sign * n
                self._user += sign * part.user
                self._kernel += sign * part.kernel
                self._machine += sign * part.machine
