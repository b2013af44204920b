"""The hottest events in C (``native/events.c``): leaving a block at a trap, doors into a monitor, and shortcuts.

C takes over where nothing but the usual happens: it notes where a block was left, and asks Python what the event means. A
monitor may say of one trapping CLI or STI, or of one callout, that it does nothing but change the virtual interrupt flag; C then does
that too, and counts how often (:meth:`FastEvents.drain`). Everything else goes to the methods that the portable path uses.

There is no other way to these than through a CPU state that C can see; without one, all events are Python's.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from unicorn import unicorn_const as uc_const

from vmlab.ledger import EXCEPTIONS, Counts
from vmlab.machine.code import Block
from vmlab.machine.decode import Instruction
from vmlab.machine.engine import CODE_CALLBACK, INTR_CALLBACK, library
from vmlab.machine.fast_faults import HiddenFaults
from vmlab.machine.fast_svm import TOKEN, WorldSwitch
from vmlab.machine.instructions import port_encoding
from vmlab.machine.svm_intercepts import fixed_io_information

if TYPE_CHECKING:
    from vmlab.machine.fast import FastCounter, Library
    from vmlab.machine.pc import Machine
    from vmlab.machine.protocols import Monitor

# Words of ``state`` in native/machine.h behind those of the counter.
(CUTS, ENV, ERROR_CODE, IS_INT, OLD_EXCEPTION, STOPPED, ON_EXCEPTION, ON_TRAP, WHAT, _, GATES, ON_INSTRUCTION, ON_GATE, WRITE_REGISTER,
 LEFT, LEFT_AT, VIRTUAL_CPU, DOOR, SITES, SITE_COUNT, _, FAULTS, ON_PORT, TIME_STAMP) = range(15, 39)
WORDS = 39

_NONE, _NO_GATE = 0xFFFFFFFF, 0xFF
_CUT = struct.Struct("=6I4Q")
_SHORTCUT_AT, _N_AT, _HITS_AT = 20, 24, 40
_SITE = struct.Struct("=5Q")
_KINDS = {"cli": 1, "sti": 2}
_NAMES = {kind: op for op, kind in _KINDS.items()}
_GATE_TABLES = 64       # of a monitor that changes its gates with its guest's ring, kept
_SOFTWARE, _WITH_ERROR_CODE = 1 << 8, 1 << 9
_NOT_DECODED = 0        # the token of what no decoded instruction is at
_IN_DX, _READ = 0x10000, 1 << 24       # as in native/ports.c

_CALLBACK = ctypes.CFUNCTYPE(None)
_TRAPS = {vector: f"trap.{name}" for vector, name in EXCEPTIONS.items()}


class Shortcuts:
    """What a monitor lets C do, and the counts that each use stands for."""

    def __init__(self, events: FastEvents, counts: Counts, on_callouts: Callable[[int, int], None]) -> None:
        self._events, self._counts, self._on_callouts = events, counts, on_callouts

    def trap(self, op: str) -> None:
        """The CLI or STI that trapped last did nothing but change the virtual flag, and will do so again."""
        self._events.shorten(_KINDS[op])

    def callout(self, number: int, op: str, after: int, rip: int, size: int) -> None:
        """So did callout ``number``; the cache goes on at ``after``."""
        self._events.shorten_site(number, _KINDS[op], after, rip, size)

    def forget(self, number: int) -> None:
        """That callout is no more."""
        self._events.shorten_site(number, 0, 0, 0, 0)

    def trapped(self, kind: int, n: int) -> None:
        """``n`` traps went the short way."""
        self._emulated(kind, n, "vmm.decode")

    def called_out(self, number: int, kind: int, n: int) -> None:
        """``n`` callouts of this number did."""
        self._emulated(kind, n, f"bt.callout.{_NAMES[kind]}")
        self._on_callouts(number, n)

    def _emulated(self, kind: int, n: int, how: str) -> None:
        for event in (how, f"emulate.{_NAMES[kind]}", "vmm.emulate", "emulated.kernel"):
            self._counts[event] += n


class FastEvents:
    """Connects ``events.c`` to one machine."""

    def __init__(self, machine: Machine, counter: FastCounter, env: int, functions: Library) -> None:
        self._machine, self._counter, self._functions = machine, counter, functions
        self._state = state = counter.state
        self._tokens: list[Instruction | None] = [None]     # number 0 is _NOT_DECODED
        self._token_of: dict[Instruction, int] = {}
        self._tables: dict[int, memoryview] = {}        # by record number
        self._cuts = memoryview(b"")
        self.grow(len(counter.records) // 8)
        self._gates = self._no_gates = (ctypes.c_uint8 * 256)(*[_NO_GATE] * 256)
        self._known_gates: dict[int, tuple[dict[int, int], frozenset[int], ctypes.Array[ctypes.c_uint8]]] = {}
        self.shortcuts: Shortcuts | None = None
        self.faults: HiddenFaults | None = None
        self._sites = memoryview(bytearray())
        self._doors: dict[int, Callable[[], None]] = {}
        self._ports: list[ctypes.Array[ctypes.c_uint64]] = []      # kept: Unicorn may call a hook that was taken off once more
        layout = machine.cpu.layout
        register = ctypes.cast(library().uc_reg_write, ctypes.c_void_p).value or 0
        self._callbacks = (
            INTR_CALLBACK(machine.exceptions.on_exception), _CALLBACK(self._on_trap),
            CODE_CALLBACK(machine.blocks.on_instruction), _CALLBACK(self._on_gate), _CALLBACK(self._on_port))
        addresses = [ctypes.cast(callback, ctypes.c_void_p).value or 0 for callback in self._callbacks]
        for word, value in ((ENV, env), (ERROR_CODE, layout.error_code), (IS_INT, layout.exception_is_int),
                            (OLD_EXCEPTION, layout.old_exception), (WRITE_REGISTER, register),
                            *zip((ON_EXCEPTION, ON_TRAP, ON_INSTRUCTION, ON_GATE, ON_PORT), addresses, strict=True)):
            state[word] = value
        self.note_monitor(machine.monitor)
        machine.engine.hook(uc_const.UC_HOOK_INTR, INTR_CALLBACK, functions.exception, data=counter.address)

    # ---- what C asks
    def _on_trap(self) -> None:
        """The CPU left the block at an instruction that trapped, or executed INT n."""
        machine, state = self._machine, self._state
        try:
            what = state[WHAT]
            vector = what & 0xFF
            monitor = self._monitor
            if what & _SOFTWARE and monitor is not None:
                machine.events["trap.int"] += 1
                monitor.exception(vector, None, software=True)
                return
            machine.exceptions.faulting = self._tokens[state[TOKEN]]
            error_code = what >> 32 if what & _WITH_ERROR_CODE else None
            if monitor is None:
                machine.exceptions.take(vector, error_code)
            else:
                machine.events[_TRAPS.get(vector, "trap.mc")] += 1
                monitor.exception(vector, error_code, software=False)
        except BaseException as failure:  # noqa: BLE001 - nothing may cross Unicorn's frames
            machine.fail(failure)

    def _on_gate(self) -> None:
        try:
            self._doors[self._state[WHAT]]()
        except BaseException as failure:  # noqa: BLE001
            self._machine.fail(failure)

    def _on_port(self) -> None:
        machine, state = self._machine, self._state
        try:
            what = state[WHAT]
            if what & _READ:
                state[TOKEN] = machine.port_read(what & 0xFFFF, what >> 16 & 0xFF)
            else:
                machine.port_write(what & 0xFFFF, what >> 16 & 0xFF, state[TOKEN])
        except BaseException as failure:  # noqa: BLE001
            machine.fail(failure)

    def hook_port(self, address: int, instruction: Instruction) -> int:
        """An IN or OUT at ``address`` is C's as far as the CPU is concerned; gives the hook's handle."""
        port, size, size16 = port_encoding(instruction)
        site = (ctypes.c_uint64 * 7)(self._counter.address, _IN_DX if port is None else port, size, size16, instruction.op == "in",
                                     instruction.size, fixed_io_information(instruction))
        self._ports.append(site)
        return self._machine.engine.hook(uc_const.UC_HOOK_CODE, CODE_CALLBACK, self._functions.port, address, address,
                                         data=ctypes.addressof(site))

    def hook_time_stamp(self, address: int, *, guessed: bool) -> int:
        """The RDTSC at ``address`` is C's, outside guest mode; gives the hook's handle. ``guessed``: time is (uncounted.py)."""
        function = self._functions.guessed_time_stamp if guessed else self._functions.time_stamp
        return self._machine.engine.hook(uc_const.UC_HOOK_CODE, CODE_CALLBACK, function, address, address, data=self._counter.address)

    def hook_gate(self, address: int, callback: Callable[[], None]) -> int:
        """Reaching ``address`` calls ``callback``; gives the hook's handle."""
        self._doors[address] = callback
        return self._machine.engine.hook(uc_const.UC_HOOK_CODE, CODE_CALLBACK, self._functions.gate, address, address, data=self._counter.address)

    # ---- what C reads
    def note_time_stamp(self, ahead: int) -> None:
        """How far the time stamp counter is ahead of time."""
        self._state[TIME_STAMP] = ahead & 0xFFFFFFFFFFFFFFFF

    def set_gates(self, gates: Mapping[int, int], direct: frozenset[int]) -> None:
        """INT n with these vectors goes to the monitor, from rings up to the gate's; those in ``direct`` do not."""
        known = self._known_gates.get(id(gates))
        if known is None or known[0] != gates or known[1] != direct:
            table = (ctypes.c_uint8 * 256)(*[_NO_GATE] * 256)
            for vector, ring in gates.items():
                if vector not in direct:
                    table[vector] = ring
            if len(self._known_gates) >= _GATE_TABLES:
                self._known_gates.clear()
            known = self._known_gates[id(gates)] = dict(gates), direct, table
        self._gates = known[2]
        if self._monitor is not None:
            self._state[GATES] = ctypes.addressof(self._gates)

    def note_monitor(self, monitor: Monitor | None) -> None:
        """Without a monitor no INT n goes to one."""
        self._monitor = monitor
        self._state[GATES] = ctypes.addressof(self._no_gates if monitor is None else self._gates)

    def note_end(self, failed: bool, ending: bool) -> None:
        """Whether the run is about to end."""
        self._state[STOPPED] = failed | ending << 1

    def grow(self, count: int) -> None:
        """There are ``count`` records now."""
        memory = (ctypes.c_uint64 * count)()
        view = memoryview(memory).cast("B").cast("Q")
        view[:len(self._cuts)] = self._cuts if len(self._cuts) else view[:0]
        self._cuts, self._state[CUTS] = view, ctypes.addressof(memory)

    def learn(self, block: Block) -> None:
        """This block was left in the middle, and may be again: C is told where its instructions lie.

        Unicorn reads an instruction that will raise #GP only as far as it must to know that: such a block ends with bytes that are no
        whole instruction. Leaving it there leaves all that was decoded behind.
        """
        number = block.slot
        if number <= 0 or number in self._tables:
            return
        size = block.size
        table = memoryview((ctypes.c_uint8 * (16 + _CUT.size * (size + 1)))()).cast("B")
        struct.pack_into("=2Q", table, 0, block.pc, size)
        for offset in range(size + 1):
            _CUT.pack_into(table, 16 + _CUT.size * offset, _NONE, 0, _NONE, _NONE, 0, 0, 0, 0, 0, 0)
        before, offset = _NONE, 0
        for index, instruction in enumerate(block.instructions):
            after = offset + instruction.size
            if instruction not in self._token_of:
                self._token_of[instruction] = len(self._tokens)
                self._tokens.append(instruction)
            _CUT.pack_into(table, 16 + _CUT.size * offset, index, block.guest_weight_from(index), after, before,
                           int(instruction.search), 0, 0, 0, 0, self._token_of[instruction])
            before, offset = offset, after
        if offset < size:
            _CUT.pack_into(table, 16 + _CUT.size * offset, len(block.instructions), 0, _NONE, before, 0, 0, 0, 0, 0, _NOT_DECODED)
        elif offset == size:
            _CUT.pack_into(table, 16 + _CUT.size * offset, _NONE, 0, _NONE, before, 0, 0, 0, 0, 0, _NOT_DECODED)
        self._tables[number] = table
        self._cuts[number] = ctypes.addressof(ctypes.c_uint8.from_buffer(table))

    # ---- what C counted
    def drain(self, number: int | None = None) -> None:
        """Bring C's counts to where everybody reads them: of one record, or of all, and of the callouts."""
        by_number = self._counter.by_number
        for n in list(self._tables) if number is None else [number] if number in self._tables else []:
            self._drain_block(self._tables[n], by_number[n])
        if number is None:
            self._drain_sites()
            if self.faults is not None:
                self.faults.drain()

    def _drain_block(self, table: memoryview, block: Block | None) -> None:
        assert block is not None
        for offset, index in block.offsets.items():
            at = 16 + _CUT.size * offset
            for user in (0, 1):
                n = struct.unpack_from("=Q", table, at + _N_AT + 8 * user)[0]
                if n:
                    block.cuts[index, user] = block.cuts.get((index, user), 0) + n
            hits, kind = struct.unpack_from("=Q", table, at + _HITS_AT)[0], struct.unpack_from("=I", table, at + _SHORTCUT_AT)[0]
            if hits:
                assert self.shortcuts is not None
                self._machine.events["trap.gp"] += hits
                self.shortcuts.trapped(kind, hits)
            struct.pack_into("=3Q", table, at + _N_AT, 0, 0, 0)

    def _drain_sites(self) -> None:
        for at in range(0, len(self._sites), _SITE.size):
            what, after, rip, size, hits = _SITE.unpack_from(self._sites, at)
            if hits:
                assert self.shortcuts is not None
                self.shortcuts.called_out(at // _SITE.size, what, hits)
                _SITE.pack_into(self._sites, at, what, after, rip, size, 0)

    def forget(self, number: int) -> None:
        """The block of this number is closed; its counts have been drained."""
        if self._tables.pop(number, None) is not None:
            self._cuts[number] = 0

    # ---- guest mode
    def connect_svm(self, host: int, vmrun: int, on_exit: Callable[[], None], on_entry: Callable[[], None]) -> WorldSwitch:
        """Let C carry out #VMEXIT, and prepare VMRUN where nothing is to be done.

        :param host: hpa of the host save area.
        :param vmrun: linear address of the host's VMRUN.
        :param on_exit: called when the host is back.
        :param on_entry: prepares an entry that C leaves to Python.
        """
        return WorldSwitch(self._machine, self._state, self._tokens, self._counter.address, self._functions.world_switch, host, vmrun,
                           on_exit, on_entry)

    # ---- shadow page tables
    def offer_faults(self, counts: Counts, base: int, size: int) -> HiddenFaults:
        """A pager whose hidden faults C may carry out. ``base``, ``size``: the guest's memory, hpa and bytes."""
        self.faults = HiddenFaults(self._machine, counts, base, size)
        self._state[FAULTS] = self.faults.address
        return self.faults

    # ---- shortcuts
    def offer(self, counts: Counts, virtual_cpu: int, *, door: int = 0,
              on_callouts: Callable[[int, int], None] = lambda number, n: None) -> Shortcuts:
        """A monitor whose virtual CPU's flags C may change.

        :param virtual_cpu: address of what C needs of it (``virtual_cpu`` in machine.h).
        :param door: its gate, where callouts come through; ``on_callouts`` is told how many went the short way, by number.
        """
        self._state[VIRTUAL_CPU], self._state[DOOR] = virtual_cpu, door
        self.shortcuts = Shortcuts(self, counts, on_callouts)
        return self.shortcuts

    def shorten(self, kind: int) -> None:
        """The place at which the last block was left by a trap."""
        table = self._tables.get(self._state[LEFT])
        if table is not None:
            struct.pack_into("=I", table, 16 + _CUT.size * self._state[LEFT_AT] + _SHORTCUT_AT, kind)

    def shorten_site(self, number: int, kind: int, after: int, rip: int, size: int) -> None:
        """What callout ``number`` is; 0: the monitor's."""
        self._drain_sites()
        if _SITE.size * number >= len(self._sites):
            if not kind:
                return
            grown = memoryview((ctypes.c_uint8 * (_SITE.size * max(1024, 2 * number)))()).cast("B")
            grown[:len(self._sites)] = self._sites
            self._sites = grown
            self._state[SITES] = ctypes.addressof(ctypes.c_uint8.from_buffer(grown))
            self._state[SITE_COUNT] = len(grown) // _SITE.size
        _SITE.pack_into(self._sites, _SITE.size * number, kind, after, rip, size, 0)
