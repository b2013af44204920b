"""The recorder: a hook on every instruction, and a ledger at each.

Works on the portable path, where everything that happens passes through Python; the ledger is the same on both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from capstone import CS_OP_IMM
from unicorn import unicorn_const as uc_const

from vmlab.errors import ConfigError, GuestError
from vmlab.experiment.cell import Run
from vmlab.ledger import Snapshot
from vmlab.machine.decode import Instruction, decode
from vmlab.machine.engine import CODE_CALLBACK
from vmlab.machine.paging import PageFault
from vmlab.machine.state import HF_CS32, HF_CS64
from vmlab.parameters import Value
from vmlab.trace.lanes import Lane, lane_of
from vmlab.trace.ledger import RunningLedger
from vmlab.trace.symbols import Symbols

#: Steps recorded at most, unless the caller says otherwise.
LIMIT = 10_000
_NAMES = ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di")


@dataclass(frozen=True)
class Moment:
    """The CPU just before a step: registers, privilege, both interrupt flags, and whose interrupts wait."""

    registers: Mapping[str, int]
    cpl: int
    real_if: bool
    virtual_if: bool
    pending: tuple[str, ...]
    guest_mode: bool = False
    """Under hardware assistance: whether the CPU is in guest mode."""


@dataclass
class Step:
    """One attempt to execute an instruction, and what followed from it.

    ``where``: "guest" (the guest's code at its own address), "cache" (translated code) or "monitor" (the VMM's code in machine memory).
    ``guest`` is the address of the guest instruction that it stands for, where there is one. ``number`` counts the guest
    instructions completed before it, from the beginning of the region of interest. ``events`` is all that was counted until the next step.
    """

    number: int
    address: int
    where: str
    code: str
    raw: str
    guest: int | None
    guest_code: str
    symbol: str
    before: Moment
    after: Moment | None = None
    events: dict[str, int] = field(default_factory=dict)
    instructions: int = 0
    """Guest instructions completed by it."""

    def changed(self) -> dict[str, tuple[int, int]]:
        """Registers that the step changed: name -> (before, after)."""
        after = self.after.registers if self.after else self.before.registers
        return {name: (old, after[name]) for name, old in self.before.registers.items() if after.get(name, old) != old}


@dataclass(frozen=True)
class Trigger:
    """When a device raises ``line`` of the machine's interrupt controller: before the guest instruction with this number, or the
    ``visit``-th time (from 1) that the guest comes to the instruction at ``address``.
    """

    line: int
    number: int | None = None
    address: int | None = None
    visit: int = 1


@dataclass(frozen=True)
class Trace:
    """The steps of one run, and what run it was. ``complete``: the run ended within the window; ``end`` says how."""

    technique: str
    parameters: Mapping[str, Value]
    platform: str
    steps: list[Step]
    complete: bool
    end: str


class _EnoughError(Exception):
    """The window has been recorded; ends the run."""


def record(technique: str, parameters: Mapping[str, Value], *, first: int = 0, last: int | None = None, limit: int = LIMIT,
           whole: bool = False, interrupt: Trigger | None = None, registers: bool = True) -> Trace:
    """Run a cell and record part of it.

    :param first: guest instructions of the region of interest to let pass unrecorded.
    :param last: guest instruction of the region at which to stop; None: at the region's end.
    :param limit: steps recorded at most.
    :param whole: count from the guest's first instruction instead of from the region's, and go on after the region.
    :param interrupt: raise a line of the machine's interrupt controller, as a device would.
    :param registers: keep the general registers of every moment; without them a long recording takes half the memory.
    :raises ConfigError: an unknown technique or parameter, or a window that is empty.
    """
    if limit < 1 or (last is not None and last <= first):
        raise ConfigError(f"nothing to record: from {first} to {last}, at most {limit} steps")
    run = Run(technique, parameters, path="portable")
    recorder = Recorder(run, first, last, limit, whole, interrupt, registers)
    complete, end = True, "the guest ended its run"
    try:
        stop = run.go()
        end = stop.reason.value
    except _EnoughError:
        complete, end = False, "the window was recorded"
    except GuestError as error:
        end = str(error)
    recorder.finish()
    return Trace(technique, dict(parameters), run.platform(), recorder.steps, complete, end)


class Recorder:
    """Attached to a run before it goes; :attr:`steps` grows while it does."""

    def __init__(self, run: Run, first: int, last: int | None, limit: int, whole: bool, interrupt: Trigger | None, registers: bool = True) -> None:
        self._run, self._machine, self._first, self._last, self._limit = run, run.machine, first, last, limit
        self._interrupt, self._registers = interrupt, registers
        self._visits, self._last_guest = 0, -1
        self._lane: Lane = lane_of(run.strategy)
        self._ledger = RunningLedger(run.strategy)
        self._symbols = Symbols(run.image.symbols)
        self._whole = whole
        self._origin: int | None = 0 if whole else None
        self._previous: Snapshot | None = None
        self.steps: list[Step] = []
        run.machine.engine.hook(uc_const.UC_HOOK_CODE, CODE_CALLBACK, self._on_instruction)

    def _on_instruction(self, _uc: int, address: int, _size: int, _data: int) -> None:
        try:
            self._instruction(address)
        except BaseException as failure:  # noqa: BLE001 - nothing may cross Unicorn's frames
            self._machine.fail(failure)

    def _instruction(self, address: int) -> None:
        if self._machine.failure is not None:
            return
        if self._origin is None:
            mark = self._run.marks.get("vmlab_roi_begin")
            if mark is None:
                return
            self._origin = mark.user + mark.kernel
        if self._previous is None and self._time(address) - self._origin < self._first - 64:
            return  # far from the window: no ledger needed yet
        if self._machine.ending is not None:
            return
        repeats = bool(self.steps) and self.steps[-1].address == address and self.steps[-1].code.startswith("rep")
        if repeats and self._previous is not None:
            self._ledger.note()
            return  # the next element of the same instruction: whatever it brings belongs to the same step
        now = self._ledger.snapshot(address)
        number = now.user + now.kernel - self._origin
        if self._interrupt is not None and self._is_time(self._interrupt, number, address):
            line, self._interrupt = self._interrupt.line, None
            self._machine.pic.set_line(line, False)
            self._machine.pic.set_line(line, True)
        if number < self._first:
            return
        self._machine.cpu.load()
        moment = self._moment()
        if self.steps:
            self._close(now, moment)
        ended = not self._whole and "vmlab_roi_end" in self._run.marks
        if ended or (self._last is not None and number >= self._last) or len(self.steps) >= self._limit:
            self._previous = None
            raise _EnoughError
        self._previous = now
        self.steps.append(self._step(number, address, moment))

    def _is_time(self, trigger: Trigger, number: int, address: int) -> bool:
        if trigger.number is not None:
            return number >= trigger.number
        guest = self._lane.place(address)[1]
        if guest is not None and guest != self._last_guest:
            self._last_guest = guest
            self._visits += guest == trigger.address
        return self._visits == trigger.visit

    def _time(self, address: int) -> int:
        """Virtual time with the instruction at ``address`` about to run: cheap, and exact but for what the VMM emulated of this block."""
        counter = self._machine.counter
        block = counter.current
        index = block.offsets.get(address - block.pc) if block is not None else None
        return counter.time - (block.guest_weight_from(index) if block is not None and index is not None else 0)

    def _close(self, now: Snapshot, moment: Moment | None) -> None:
        """What happened since the last step belongs to it."""
        if self._previous is None:
            return
        step, delta = self.steps[-1], now.minus(self._previous)
        for kind, count in delta.events.items():
            step.events[kind] = step.events.get(kind, 0) + count
        step.instructions += delta.user + delta.kernel
        step.after = moment or step.after

    def finish(self) -> None:
        """The run has ended: the last step's events are those up to the end."""
        if self.steps and self._previous is not None:
            self._machine.cpu.load()
            self._close(self._run.strategy.snapshot(), self._moment())

    def _moment(self) -> Moment:
        cpu, flags = self._machine.cpu, self._lane.flags()
        return Moment(self._general() if self._registers else {}, cpu.cpl, flags.real_if, flags.virtual_if, flags.pending, self._machine.in_guest)

    def _general(self) -> dict[str, int]:
        cpu = self._machine.cpu
        wide = bool(cpu.hflags & HF_CS64)
        registers = {("r" if wide else "e") + name: cpu.gpr(i) & (2**64 - 1 if wide else 2**32 - 1) for i, name in enumerate(_NAMES)}
        return registers | {f"r{i}": cpu.gpr(i) for i in range(8, 16)} if wide else registers

    def _step(self, number: int, address: int, moment: Moment) -> Step:
        cpu = self._machine.cpu
        bits = 64 if cpu.hflags & HF_CS64 else 32 if cpu.hflags & HF_CS32 else 16
        instruction = decode(self._fetch(address), bits)
        where, guest = self._lane.place(address)
        stands_for = instruction if guest == address else self._guest_code(guest, address) if guest is not None else None
        return Step(
            number, address, where, _text(instruction, address), instruction.raw.hex() if instruction else "", guest,
            _text(stands_for, guest or 0) if guest is not None else "", self._symbols.name(guest if guest is not None else address), moment)

    def _fetch(self, address: int) -> bytes:
        """Up to 15 bytes at a linear address; fewer where a page ends that nothing follows."""
        cpu = self._machine.cpu
        for size in (15, min(15, 0x1000 - address % 0x1000)):
            try:
                data: bytes = cpu.read_linear(address, size)
            except (GuestError, PageFault):
                continue
            return data
        return b""

    def _guest_code(self, guest: int, address: int) -> Instruction | None:
        """The guest's instruction that translated code stands for (translated kernels are 32-bit)."""
        found = decode(self._fetch(guest), 32)
        block = self._machine.counter.current
        if found is None and block is not None and block.tags is not None:
            # Not mapped where the CPU is now (a shadow that is not filled): what the translator read when it made this block.
            here = block.offsets.get(address - block.pc, 0)
            found = next((tag.guest for tag in block.tags[here:] if tag is not None), None)
        return found


def _text(instruction: Instruction | None, address: int) -> str:
    """Assembly with the real target of a relative jump or call."""
    if instruction is None:
        return "(bad)"
    operands = instruction.cs.operands
    if instruction.kind in ("branch", "jcc") and len(operands) == 1 and operands[0].type == CS_OP_IMM:
        mask = 2**32 - 1 if address < 2**32 else 2**64 - 1
        return f"{instruction.cs.mnemonic} {(address + int(operands[0].imm)) & mask:#x}"
    return instruction.text


def as_json(step: Step, cycles: float | None = None) -> dict[str, Any]:
    """A step as a line of JSON: addresses in hexadecimal, counts and cycles as numbers."""
    from vmlab.trace.words import did, kind_of

    before, after = step.before, step.after or step.before
    return {
        "number": step.number, "kind": kind_of(step), "where": step.where, "address": f"{step.address:#x}", "code": step.code, "bytes": step.raw,
        "guest": None if step.guest is None else f"{step.guest:#x}", "guest_code": step.guest_code, "symbol": step.symbol,
        "before": _moment_json(before), "after": _moment_json(after),
        "changed": {name: [f"{old:#x}", f"{new:#x}"] for name, (old, new) in step.changed().items()},
        "events": dict(step.events), "did": did(step), "instructions": step.instructions, "cycles": cycles,
    }


def _moment_json(moment: Moment) -> dict[str, Any]:
    return {"cpl": moment.cpl, "if": moment.real_if, "virtual_if": moment.virtual_if, "pending": list(moment.pending),
            "guest_mode": moment.guest_mode}
