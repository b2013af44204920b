"""The fast path: the same counts as :class:`~vmlab.machine.counter.Counter`, kept in C.

``native/blocks.c`` is called by Unicorn at every block and adds to tables that live here; Python is asked only when
a block is new, an interrupt waits or the budget is spent. All memory is allocated and grown on this side, so that
the library is one function. Without a library (no prebuilt one, no compiler) nothing is lost but time:
:func:`connect` answers None, :func:`why_not` says why, and the machine counts in Python.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

from unicorn import unicorn_const as uc_const

from vmlab.ledger import Snapshot
from vmlab.machine.code import Block, Code
from vmlab.machine.counter import Counter, block_hook
from vmlab.machine.decode import Instruction
from vmlab.machine.engine import CODE_CALLBACK
from vmlab.machine.fast_events import LEFT, LEFT_AT, WORDS, FastEvents
from vmlab.machine.native import build
from vmlab.machine.state import AT_HFLAGS

if TYPE_CHECKING:
    from vmlab.machine.pc import Machine

# The first words of machine.h's ``state``, each 8 bytes, in its order; fast_events.py has the others.
(_TIME, _LIMIT, _USER, _ATTENTION, _CURRENT, _PLACES, _MASK, _RECORDS, _HFLAGS, _ATTEND, _READ_CPL, _CPL, _SAME, _OUTER, _USER_FROM) = range(15)
_REP, _RING, _IRET = 1 << 32, 1 << 33, 1 << 34
_RECORD, _PLACE = 8, 2  # words in a ``record`` and a ``place``
_COUNTS = struct.Struct("=6Q")
_WORD = 0xFFFFFFFFFFFFFFFF
_NEVER = _WORD  # a place whose block was closed: matches nothing, ends no search

_ATTEND_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_uint32)
_CPL_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int)
_BLOCK_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_void_p)

Attend = Callable[[int, int], bool]


def _words(count: int) -> tuple[memoryview, int]:
    """``count`` 64-bit words, all 0, and their address. The view keeps the memory alive."""
    memory = (ctypes.c_uint64 * count)()
    return memoryview(memory).cast("B").cast("Q"), ctypes.addressof(memory)


class FastCounter(Counter):
    """A :class:`Counter` that C adds to, in memory at ``address``. The numbers per block are read back when somebody asks.

    :param attend: called with (pc, size) in the rare cases; may not raise; True when the block is known and may run.
    :param hflags: address of the CPU's flags word that holds CPL, or None: ``read_cpl`` is called instead.
    """

    def __init__(self, read_cpl: Callable[[], int], attend: Attend, hflags: int | None) -> None:
        self.state, self.address = _words(WORDS)
        #: What C does about events; None: nothing.
        self.events: FastEvents | None = None
        self._closed: tuple[Block, int] | None = None   # the current block where it is in no table any more, and the time then
        self._callbacks = _ATTEND_CALLBACK(attend), _CPL_CALLBACK(read_cpl)
        for word, callback in zip((_ATTEND, _READ_CPL), self._callbacks, strict=True):
            self.state[word] = ctypes.cast(callback, ctypes.c_void_p).value or 0
        self.state[_HFLAGS] = hflags or 0
        self.by_number: list[Block | None] = []
        self._free: list[int] = []
        self.records, _ = _words(1)
        self._grow_records(1024)
        self._free.remove(0)
        super().__init__(read_cpl)
        self._rebuild_places()

    # ---- what both sides see
    @property
    def time(self) -> int:
        return self.state[_TIME]

    @time.setter
    def time(self, value: int) -> None:
        self.state[_TIME] = value

    def pass_one(self) -> None:
        self.state[_TIME] += 1

    @property
    def limit(self) -> int:
        return self.state[_LIMIT]

    @limit.setter
    def limit(self, value: int) -> None:
        self.state[_LIMIT] = min(value, 1 << 62)

    @property
    def user(self) -> int:
        return self.state[_USER]

    @user.setter
    def user(self, value: int) -> None:
        self.state[_USER] = value

    @property
    def user_from(self) -> int:
        return self.state[_USER_FROM]

    @user_from.setter
    def user_from(self, value: int) -> None:
        self.state[_USER_FROM] = value

    @property
    def attention(self) -> int:
        return self.state[_ATTENTION]

    @attention.setter
    def attention(self, value: int) -> None:
        self.state[_ATTENTION] = value if self.events is not None else bool(value)  # else C cannot see EFLAGS

    @property
    def current(self) -> Block | None:
        return self.by_number[self.state[_CURRENT]] or self._closed_one()

    @current.setter
    def current(self, block: Block | None) -> None:
        closed = block is not None and block.slot < 0   # a monitor's detour put it back, and its code was forgotten meanwhile
        self._closed = (block, self.state[_TIME]) if closed and block is not None else None
        self.state[_CURRENT] = 0 if block is None or closed else block.slot

    def _closed_one(self) -> Block | None:
        """That block, as long as nothing has run since."""
        return self._closed[0] if self._closed is not None and self._closed[1] == self.state[_TIME] else None

    def leave(self, rip: int, *, retired: bool = False) -> Instruction | None:
        """As :meth:`Counter.leave`, which runs at every trap, without the properties' calls."""
        state = self.state
        block = self.by_number[state[_CURRENT]]
        if block is None:
            return None if self._closed_one() is None else super().leave(rip, retired=retired)
        state[_CURRENT] = 0
        instructions = block.instructions
        index = block.offsets.get(rip - block.pc)
        if index is None or index >= len(instructions):
            if index is None and self.events is not None:
                self.events.learn(block)        # at bytes that Unicorn did not read to the end, see there
            self._completed(block, None)
            return None
        if self.events is not None:
            state[LEFT], state[LEFT_AT] = block.slot, rip - block.pc
            self.events.learn(block)
        cut = index + 1 if retired else index
        if cut < len(instructions):
            key = (cut, state[_USER])
            block.cuts[key] = block.cuts.get(key, 0) + 1
            state[_TIME] -= block.guest_weight_from(cut)
        return instructions[index]

    def snapshot(self, upto: int | None = None) -> Snapshot:
        if self.events is not None:
            self.events.drain()
        return super().snapshot(upto)

    def runs_by_code(self) -> dict[tuple[int, str, int], tuple[int, int]]:
        if self.events is not None:
            self.events.drain()
        return super().runs_by_code()

    def set_cpl(self, cpl: int) -> None:
        state = self.state
        state[_CPL], state[_USER] = cpl, cpl >= state[_USER_FROM]

    @property
    def cpl(self) -> int:
        return self.state[_CPL]

    @cpl.setter
    def cpl(self, value: int) -> None:
        self.state[_CPL] = value

    @property
    def irets(self) -> tuple[int, int]:
        return self.state[_SAME], self.state[_OUTER]

    def _count_iret(self, outer: bool) -> None:
        self.state[_OUTER if outer else _SAME] += 1

    # ---- blocks
    def add(self, block: Block) -> None:
        super().add(block)
        if block.slot < 0:
            if not self._free:
                self._grow_records(2 * len(self.by_number))
            number = block.slot = self._free.pop()
            self.by_number[number] = block
            at = number * _RECORD
            traits = block.weight | (_REP if block.rep else 0) | (_RING if block.ring else 0) | (_IRET if block.iret else 0)
            self.records[at:at + _RECORD] = _view(*block.runs, *block.taken, *block.again, block.end & _WORD, traits)
        if 2 * self._used >= len(self._places) // _PLACE:
            self._rebuild_places()
        else:
            self._place(block)

    def close(self, block: Block) -> None:
        number = block.slot
        if self.events is not None and number > 0:
            self.events.drain(number)
            self.events.forget(number)
        super().close(block)
        if number < 0:
            return
        self._read_back(block)
        self.by_number[number] = None
        self._free.append(number)
        block.slot = -1

    def _take_out(self, block: Block) -> bool:
        """A suspended block keeps its record, which no search finds."""
        if not super()._take_out(block):
            return False
        at = self._search(block.pc, block.size | block.slot << 32)
        self._places[at], self._places[at + 1] = _NEVER, _NEVER
        return True

    def _count_again(self, block: Block) -> None:
        self.records[block.slot * _RECORD + 4 + self.user] += 1

    def _all_blocks(self) -> Iterable[Block]:
        for block in self.by_number:
            if block is not None:
                self._read_back(block)
        return super()._all_blocks()

    def _read_back(self, block: Block) -> None:
        counts = _COUNTS.unpack_from(self.records, block.slot * _RECORD * 8)
        block.runs[:], block.taken[:], block.again[:] = counts[0:2], counts[2:4], counts[4:6]

    # ---- the tables
    def _grow_records(self, count: int) -> None:
        """Make room for ``count`` records; number 0 is never given to a block."""
        before = len(self.by_number)
        records, self.state[_RECORDS] = _words(count * _RECORD)
        records[:before * _RECORD] = self.records[:before * _RECORD]
        self.records = records
        self.by_number.extend([None] * (count - before))
        if self.events is not None:
            self.events.grow(count)
        self._free.extend(range(count - 1, before - 1, -1))

    def _rebuild_places(self) -> None:
        """A hash table with a quarter of its places taken, without the traces of closed blocks."""
        live = [block for block in self.by_number if block is not None and self.blocks.get(block.key) is block]
        places = 1024
        while places < 4 * len(live):
            places *= 2
        self._places, self.state[_PLACES] = _words(places * _PLACE)
        self.state[_MASK] = places - 1
        self._used = 0
        for block in live:
            self._place(block)

    def _place(self, block: Block) -> None:
        at = self._search(block.pc, 0, size=block.size)
        self._used += not self._places[at + 1]  # a closed block's place is taken again: the same code comes and goes many times
        self._places[at], self._places[at + 1] = block.pc, block.size | block.slot << 32

    def _search(self, pc: int, what: int, *, size: int | None = None) -> int:
        """Index of the place that holds ``what`` (0: of one that is free), on the path of searches for (pc, size); as ``find`` of blocks.c."""
        size = what & 0xFFFFFFFF if size is None else size
        mask, places = self.state[_MASK], self._places
        wanted = (what,) if what else (0, _NEVER)
        at = (((pc + (size << 40)) * 0x9E3779B97F4A7C15) & _WORD) >> 32
        while places[(at & mask) * _PLACE + 1] not in wanted:
            at += 1
        return (at & mask) * _PLACE


def _view(*values: int) -> memoryview:
    return memoryview(struct.pack(f"={len(values)}Q", *values)).cast("Q")


# ---- the library
class Library(NamedTuple):
    """Addresses of its functions, ``vmlab_`` before each name."""

    block: int
    clock: int
    exception: int
    gate: int
    port: int
    time_stamp: int
    guessed_time_stamp: int
    world_switch: int


@functools.cache
def _load() -> Library | str:
    """The library's functions, or the reason why there is none."""
    try:
        return _find()
    except build.Unavailable as reason:
        return str(reason)


def _find() -> Library:
    """The library that the installation brought, else the one in the user's cache, built now if it is not there."""
    try:
        name = build.file_name()
        prebuilt = build.HERE / name
        if prebuilt.exists():
            try:
                return _open(str(prebuilt))
            except build.Unavailable:
                pass  # made for another kind of host: this one may have a compiler
        cached = build.cache_directory() / name
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory
        raise build.Unavailable(str(error)) from error
    if not cached.exists():
        build.compile_library(cached)
    return _open(str(cached))


def _open(path: str) -> Library:
    try:
        library = ctypes.CDLL(path)
        addresses = [ctypes.cast(getattr(library, f"vmlab_{name}"), ctypes.c_void_p).value or 0 for name in Library._fields]
    except (OSError, AttributeError) as error:
        raise build.Unavailable(f"the library cannot be loaded: {error}") from error
    found = Library(*addresses)
    if not _counts_right(found.block):
        raise build.Unavailable(f"the library {path} counts wrongly on this host")
    return found


def _counts_right(function: int) -> bool:
    """Let the library and Python count the same made-up run."""
    def no_cpl() -> int:
        return 3

    def unknown(pc: int, size: int) -> bool:
        return False

    fast, plain, failed = FastCounter(no_cpl, unknown, None), Counter(no_cpl), list[BaseException]()
    in_c, in_python = _BLOCK_FUNCTION(function), block_hook(plain, unknown, failed.append)
    for counter in (plain, fast):
        for pc, size, weight, rep, ring, iret in _SAMPLE:
            block = Block(pc, Code(bytes(size), 32, []), None)
            block.weight, block.rep, block.ring, block.iret = weight, rep, ring, iret
            counter.add(block)
    for number in (0, 0, 1, 2, 2, 0, 3, 0, 3, 0):
        pc, size = _SAMPLE[number][:2]
        in_c(None, pc, size, fast.address)
        in_python(0, pc, size, 0)
    counts = [[(b.pc, b.runs, b.taken, b.again) for b in counter._all_blocks()] for counter in (plain, fast)]
    return not failed and counts[0] == counts[1] and (
        (fast.time, fast.user, fast.cpl, fast.irets) == (plain.time, plain.user, plain.cpl, plain.irets))


#: Made-up blocks: (address, size, weight, REP, changes the ring, IRET). The third is the second's own iteration.
_SAMPLE = ((0x10, 4, 3, False, False, False), (0x20, 4, 2, True, False, False), (0x22, 2, 1, True, False, False),
           (0x30, 4, 1, False, True, True))


def why_not() -> str:
    """Why the fast path is not available on this host; empty when it is."""
    found = _load()
    return found if isinstance(found, str) else ""


def connect(machine: Machine, address: int | None, *, counting: bool = True) -> FastCounter | None:
    """Wire the C counter to ``machine``'s block hook; None where there is no library.

    :param address: of the CPU's state in memory (:func:`vmlab.machine.state.live_address`), or None.
    :param counting: False: time goes on by a guess, and no block is ever added or current (uncounted.py).
    """
    library = _load()
    if isinstance(library, str):
        return None

    def attend(pc: int, size: int) -> bool:
        try:
            return machine.blocks.attend(pc, size)
        except BaseException as failure:  # noqa: BLE001 - nothing may cross Unicorn's frames; run() raises it again
            machine.fail(failure)
            return False

    def read_cpl() -> int:
        try:
            return machine.read_cpl()
        except BaseException as failure:  # noqa: BLE001
            machine.fail(failure)
            return 0

    counter = FastCounter(read_cpl, attend, None if address is None else address + AT_HFLAGS)
    machine.engine.hook(uc_const.UC_HOOK_BLOCK, CODE_CALLBACK, library.block if counting else library.clock, data=counter.address)
    if address is not None:
        counter.events = FastEvents(machine, counter, address, library)
    return counter
