"""One cell: a technique runs a guest once, and everything counted becomes an unpriced record.

Runs inside a worker. Phases are cut where the guest passes its own markers: symbols recognised by
address (``vmlab_roi_begin``, ``vmlab_roi_warm``, ``vmlab_roi_end``), at no cost to any technique. A guest that
measures something small also runs the same loop without it, between ``vmlab_empty_begin`` and ``vmlab_empty_end``:
the phase ``empty``, to be taken off the region of interest.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from vmlab import guests, strategies
from vmlab.errors import GuestError, UnsupportedByStrategy, VmlabError
from vmlab.experiment import clock, dialogue, resume
from vmlab.experiment.saved_run import Saved
from vmlab.ledger import Snapshot
from vmlab.machine import tlb
from vmlab.machine.devices import vga
from vmlab.machine.pc import Machine, Stop, StopReason
from vmlab.parameters import Value
from vmlab.strategies.base import Strategy
from vmlab.strategies.techniques import BESIDE_GUEST, machine_memory

#: Guest instructions after which a run counts as an endless loop, unless the cell says otherwise.
DEFAULT_BUDGET = 2_000_000_000
_MARKERS = ("vmlab_roi_begin", "vmlab_roi_warm", "vmlab_roi_end")
_EMPTY = ("vmlab_empty_begin", "vmlab_empty_end")
_PHASES = ("boot", "roi.cold", "roi.warm", "exit")

Cell = dict[str, Any]


class Run:
    """A guest loaded under a technique, its markers watched. ``marks`` are the counts at each marker passed."""

    def __init__(self, technique: str, parameters: Mapping[str, Value], *, path: str | None = None, saved: Saved | None = None,
                 kind: type[Strategy] | None = None) -> None:
        """:param saved: a run that this one goes on from, instead of booting its guest.
        :param kind: what runs it in the place of ``technique``'s own class."""
        self.technique, self.parameters = technique, dict(parameters)
        self.kind = kind or strategies.load(technique)
        self.guest = str(parameters.get("guest", "nano"))
        self.image = guests.configured(parameters) if saved is None else resume.image(saved)
        self.workload = str(parameters.get("workload", ""))
        self.machine = Machine(machine_memory(parameters), path, disk=guests.disk(parameters), drives=self.image.drives,
                               guest_ram=machine_memory(parameters) - BESIDE_GUEST, tlb=tlb.configured(parameters))
        self.strategy: Strategy = self.kind(self.machine, parameters)
        clock.install(self.strategy, parameters)
        self.marks: dict[str, Snapshot] = {}
        #: How the run stopped; None as long as it has not, or where an error ended it.
        self.ended: Stop | None = None
        for marker in (*_MARKERS, *_EMPTY):
            if marker in self.image.symbols:
                self.strategy.watch(self.image.symbols[marker], self._marker(marker))
        if saved is None:
            line = guests.command_line(parameters) if guests.workloads(self.guest) else str(parameters.get("append", ""))
            self.strategy.load(self.image, line)
        else:
            resume.restore(self, saved)
        script = dialogue.parse(str(parameters.get("script", "")))
        said = 0 if saved is None else len(dialogue.parse(str(saved.values["parameters"].get("script", ""))))
        self.dialogue = dialogue.Dialogue(self.machine, script[said:]) if script[said:] else None

    def become(self, parameters: Mapping[str, Value]) -> None:
        """A guest at the end of its boot is another cell from here on, of the same technique, guest and machine (see boots.py)."""
        before, self.parameters = self.parameters, dict(parameters)
        self.workload = str(parameters.get("workload", ""))
        if self.dialogue is not None:
            self.dialogue.go_on_with(dialogue.parse(dialogue.split(str(parameters.get("script", "")))[1]))
        else:
            self.strategy.tell(self.image, guests.command_line(before), guests.command_line(parameters))
        self.machine.budget = int(parameters.get("budget", DEFAULT_BUDGET))

    def _marker(self, name: str) -> Callable[[int], None]:
        def passed(address: int) -> None:
            if name not in self.marks:
                self.marks[name] = self.strategy.snapshot(address)
        return passed

    def go(self) -> Stop:
        """Run to the end of the guest or of its budget."""
        budget = self.parameters.get("budget", DEFAULT_BUDGET)
        return self.strategy.run(int(budget))

    def platform(self) -> str:
        """What the run needed of a CPU: the technique's platform, with ``-64`` where the guest has gone into long mode."""
        return self.kind.platform(self.parameters) + ("-64" if self.strategy.long_mode else "")

    def phases(self) -> dict[str, Snapshot]:
        """The counts of each phase; a guest without markers, or that ended early, has what it reached."""
        end = self.strategy.snapshot()
        begin = self.marks.get("vmlab_roi_begin", Snapshot() if not any(m in self.image.symbols for m in _MARKERS) else end)
        finish = self.marks.get("vmlab_roi_end", end)
        warm = self.marks.get("vmlab_roi_warm", finish)
        found = dict(zip(_PHASES, (begin, warm.minus(begin), finish.minus(warm), end.minus(finish)), strict=True))
        if all(marker in self.marks for marker in _EMPTY):
            first, last = (self.marks[marker] for marker in _EMPTY)
            found["empty"] = last.minus(first)
            # The phases stay a partition: the empty loop is not part of what it lies in.
            ends = zip(_PHASES, (begin, warm, finish, end), strict=True)
            around = next(name for name, upto in ends if last.machine <= upto.machine)
            found[around] = found[around].minus(found["empty"])
        return found

    def outcome(self, exit_code: int | None) -> str:
        """SHA-256 of what the guest let the world see: console, exit code, final disk, outcome bytes.

        Device writes belong to the *state* of full virtualization: a paravirtual guest drives its
        interrupt controller by hypercalls, and has the same outcome with other writes.
        """
        digest = hashlib.sha256()

        def part(name: str, data: bytes) -> None:
            digest.update(f"{name} {len(data)}\n".encode() + data)

        part("console", bytes(self.machine.console))
        part("exit", repr(exit_code).encode())
        if self.machine.disk is not None:
            part("disk", self.machine.disk.content)
        for drive in self.machine.ide.drives:
            part("drive", drive.content)
        start, stop = (self.image.symbols.get(f"vmlab_outcome_{end}") for end in ("start", "end"))
        if start is not None and stop is not None:
            part("outcome", self.strategy.read_guest(start, stop - start))
        return digest.hexdigest()

    def work(self) -> dict[str, int] | None:
        """Operations and iterations, and whatever else the guest counted (symbols ``vmlab_count_NAME``)."""
        at = self.image.symbols.get("vmlab_work")
        if at is None:
            return None
        raw = self.strategy.read_guest(at, 8)
        found = {"operations": int.from_bytes(raw[:4], "little"), "iterations": int.from_bytes(raw[4:], "little")}
        for name, address in self.image.symbols.items():
            if name.startswith("vmlab_count_"):
                found[name.removeprefix("vmlab_count_")] = int.from_bytes(self.strategy.read_guest(address, 4), "little")
        return found


def run_cell(technique: str, parameters: Mapping[str, Value], attach: Callable[[Run], None] | None = None, saved: Saved | None = None) -> Cell:
    """Run one cell; returns its unpriced record (see docs/experiments.md for the fields).

    A guest that ends badly gives status ``failed`` and a sentence; for a pair that the technique
    declares unfaithful that same end is the expected finding, and the status stays ``ok``. What the technique
    cannot carry, found at loading or on the way, gives status ``unsupported`` and the reason.

    :param attach: called with the loaded guest before it runs (a console that is watched or typed at).
    :param saved: a run to go on from; ``parameters`` are its own, with the rest of its script.
    """
    started = time.perf_counter()
    try:
        return _run(technique, parameters, started, attach, saved)
    except UnsupportedByStrategy as reason:
        kind = strategies.describe(technique)
        return {"technique": technique, "parameters": dict(parameters), "status": "unsupported", "error": str(reason),
                "platform": kind.platform(parameters), "host_seconds": round(time.perf_counter() - started, 6)}


def _run(technique: str, parameters: Mapping[str, Value], started: float, attach: Callable[[Run], None] | None, saved: Saved | None) -> Cell:
    run = Run(technique, parameters, saved=saved)
    if attach is not None:
        attach(run)
    exit_code: int | None = None
    error: str | None = None
    try:
        stop = run.ended = run.go()
        exit_code = stop.exit_code
        waited = run.dialogue.waits_for if run.dialogue is not None else None
        if waited is not None:
            error = f"{stop.reason.value} before it said {waited!r}; its last line: {_last_line(run.machine.console)}"
        elif stop.reason is StopReason.HALTED:
            error = "the guest halted with nothing left to wake it"
        elif exit_code not in (0, None):
            error = f"the guest ended with exit code {exit_code}: {_last_line(run.machine.console)}"
    except GuestError as ended:
        error = str(ended)
    declared = run.kind.unfaithful(run.workload, parameters)
    unseen = None
    if error is not None:
        error += _on_screen(run)
        unseen = None if declared else _unseen(run)
        if unseen is not None:
            error += unseen["sentence"]
    phases = run.phases()
    region = phases["roi.cold"].plus(phases["roi.warm"])
    deterministic_state = run.kind.full_virtualization and not guests.asynchronous(parameters) and error is None
    record: Cell = {
        "technique": technique, "parameters": dict(parameters),
        "status": "ok" if error is None or declared else "failed", "error": error,
        "platform": run.platform(), "work": run.work(),
        "instructions": _instructions(region), "events": region.events,
        "phases": {name: {"events": s.events, "instructions": _instructions(s)} for name, s in phases.items()},
        "fidelity": {"outcome": run.outcome(exit_code), "state": run.strategy.state_digest() if deterministic_state else None,
                     "declared": declared},
        "safety": {"refused": run.strategy.refused},
        "efficiency": efficiency(region),
        "exit_code": exit_code, "console": run.machine.console.decode("ascii", "replace"),
        "machine_path": run.machine.path,
        "host_seconds": round(time.perf_counter() - started, 6),
    }
    curve = run.strategy.warm_up()
    if curve:
        record["warm_up"] = curve
    if declared:
        record["fidelity"]["first_difference"] = _divergence(technique, parameters)
    elif unseen:
        record["fidelity"]["first_difference"] = unseen
    return record


def _unseen(run: Run) -> dict[str, Any] | None:
    """Of a guest that ended badly under the classical x86: the first sensitive instruction that went wrong without a trap."""
    if run.technique != "trap-and-emulate" or run.strategy.chosen["sensitive"] != "silent":
        return None
    from vmlab.experiment import silent

    counted = run.strategy.snapshot()
    try:
        return silent.first_silent(run.parameters, counted.user + counted.kernel)
    except VmlabError as error:
        return {"error": str(error), "sentence": f"; which instruction went wrong unseen was not found: {error}"}


def _divergence(technique: str, parameters: Mapping[str, Value]) -> dict[str, Any] | None:
    """The first diverging instruction of a declared infidelity, found on a small run of the same cell."""
    from vmlab.experiment.divergence import first_divergence

    small = {**parameters, "iterations": 2}
    try:
        return first_divergence(technique, small)
    except VmlabError as error:
        return {"error": str(error)}


def _instructions(snapshot: Snapshot) -> dict[str, Any]:
    return {"guest": {"user": snapshot.user, "kernel": snapshot.kernel}, "machine": snapshot.machine}


def efficiency(snapshot: Snapshot) -> dict[str, float]:
    """Shares of the guest's instructions: at their own address, in the translation cache, by the VMM."""
    events = snapshot.events
    retired = events.get("retired.user", 0) + events.get("retired.kernel", 0)
    ident, incache = events.get("translated.ident", 0), events.get("translated.incache", 0)
    emulated = events.get("emulated.user", 0) + events.get("emulated.kernel", 0)
    everything = retired + ident + incache + emulated
    if not everything:
        return {"retired": 0.0, "translated": 0.0, "emulated": 0.0}
    return {"retired": retired / everything, "translated": (ident + incache) / everything, "emulated": emulated / everything}


def _on_screen(run: Run) -> str:
    """What the guest's display shows at a bad end, for a kernel whose last words go there: as the end of a sentence."""
    first = vga.TEXT + 2 * run.machine.vga.start
    shown = [line for line in vga.text(run.strategy.read_guest(first, 2 * vga.COLUMNS * vga.ROWS)) if line.strip()]
    return f"; its screen ends with {' / '.join(shown[-2:])!r}" if shown else ""


def _last_line(console: bytes | bytearray) -> str:
    lines = bytes(console).decode("ascii", "replace").strip().splitlines()
    return lines[-1] if lines else "it printed nothing"
