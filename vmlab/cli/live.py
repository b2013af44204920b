"""A guest from a file, run while one looks on: its console, a dialogue with it, or one's own keyboard.

``vmlab run IMAGE`` comes here. The run is a cell like any other, alone: 'vmlab experiment' compares techniques.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmlab.errors import ConfigError
from vmlab.parameters import Value

if TYPE_CHECKING:
    from vmlab.experiment.cell import Run
    from vmlab.experiment.matrix import Cell
    from vmlab.experiment.saved_run import Saved
    from vmlab.machine.timeline import Handle

#: Ends an interactive run: Ctrl-], as in telnet.
ESCAPE = 0x1D
#: Virtual nanoseconds between looks at the keyboard, and host seconds between those at the clock.
_LOOK, _REFRESH = 1_000_000, 0.5
_DIALOGUE = "talk to the guest by --expect TEXT and --send TEXT"
_IMAGE_SUFFIXES = (".elf", ".img", ".bin", ".flat")


def is_image(text: str | None) -> bool:
    """Whether the argument names an image file, and no workload."""
    return text is not None and (os.sep in text or "/" in text or text.startswith("$") or text.endswith(_IMAGE_SUFFIXES) or Path(text).is_file())


class Script(argparse.Action):
    """``--send`` and ``--expect`` keep the order in which they are given."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None) -> None:
        steps = list(getattr(namespace, self.dest) or [])
        steps.append((str(option_string).lstrip("-"), values))
        setattr(namespace, self.dest, steps)


def configure(parser: argparse.ArgumentParser) -> None:
    """Options for images."""
    images = parser.add_argument_group("an image from a file", "an ELF kernel with a Multiboot header or a PVH note, a bzImage, or a boot disk")
    images.add_argument("--initrd", metavar="FILE", help="initial RAM disk, or Multiboot module")
    images.add_argument("--append", metavar="TEXT", help="the kernel's command line")
    images.add_argument("--disk", metavar="FILE", action="append", default=[], help="an IDE disk; may be given twice")
    images.add_argument("--ram", type=int, metavar="MIB", help="RAM that the guest has (default: 32)")
    images.add_argument("--budget", type=int, metavar="N", help="most guest instructions (default: two thousand million; interactive: no limit)")
    images.add_argument("--expect", dest="script", metavar="TEXT", action=Script,
                        help="wait until the guest says this; the run ends behind the last: status 0 when it came, 1 when the run ended before")
    images.add_argument("--send", dest="script", metavar="TEXT", action=Script, help=r"then type this (\n is Enter); in the order given")


    images.add_argument("--save", type=Path, metavar="FILE",
                        help="write the guest as it stands at the end, behind the last --expect or your Ctrl-]; native and hardware-assisted")
    images.add_argument("--from", dest="saved", type=Path, metavar="FILE",
                        help="go on from there, in place of booting an image: only --expect, --send, --budget and --save go with it")


#: Options that a saved run has answered.
_ANSWERED = ("workload", "technique", "strategy", "iterations", "density", "sets", "initrd", "append", "disk", "ram")


def check(arguments: argparse.Namespace) -> None:
    """Options that do not go together. :raises ConfigError: what, and why."""
    if arguments.saved is not None:
        given = [name for name in _ANSWERED if getattr(arguments, name)]
        if given:
            word = {"workload": arguments.workload, "sets": "--set"}.get(given[0], f"--{given[0]}")
            raise ConfigError(f"--from {arguments.saved}: the saved run has its own answer to {word}")
    elif not arguments.technique and not arguments.strategy:
        raise ConfigError("--technique NAME is needed ('native': not virtualized at all); 'vmlab list techniques' names them")
    if arguments.save is not None and arguments.saved is None and not is_image(arguments.workload):
        raise ConfigError("--save is for a guest from a file; a workload starts anew in no time")


def parameters(arguments: argparse.Namespace) -> dict[str, Value]:
    """What the options say, as parameters of a cell."""
    from vmlab.experiment import dialogue

    found: dict[str, Value] = {}
    for key in ("initrd", "append", "ram", "budget"):
        value = getattr(arguments, key)
        if value is not None:
            found[key] = value
    if arguments.disk:
        found["drives"] = ",".join(arguments.disk)
    if arguments.script:
        steps = [dialogue.parse(f"{verb} {_quoted(text)}")[0] for verb, text in arguments.script]
        found["script"] = dialogue.script_of(steps)
    return found


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\"'\"'") + "'"


def run(technique: str, image: str, values: dict[str, Value], lab: Any, *, profiles: list[str] | None = None,
        quiet: bool = False, save: Path | None = None) -> dict[str, Any]:
    """Run the image; returns its priced cell.

    :param quiet: its console goes to stderr, for stdout is to hold something else.
    :param save: where to write the guest as it stands in the end.
    :raises ConfigError: runs of this technique cannot be saved.
    :raises ExperimentError: this one cannot, or the file cannot be written.
    """
    from vmlab.experiment import single

    cell = single.expand(technique, None, image, values, lab)[0]
    if save is not None:
        _check_saving(save, cell)
    return _run(cell, values, lab, profiles, quiet, save, None)


def _check_saving(save: Path, cell: Cell) -> None:
    """Said before a guest has booted for minutes. :raises ConfigError: a run of this technique cannot be saved, or there is no such place."""
    from vmlab import strategies
    from vmlab.strategies.base import Strategy

    if strategies.load(cell.technique).state is Strategy.state:
        raise ConfigError(f"--save {save}: a run under {cell.technique} cannot be saved; one that is native or hardware-assisted can")
    if cell.parameters.get("tlb", "off") != "off":
        raise ConfigError(f"--save {save}: a run that models the TLB cannot be saved")
    if not save.parent.is_dir():
        raise ConfigError(f"--save {save}: there is no folder {save.parent}")


def go_on(file: Path, values: dict[str, Value], lab: Any, *, profiles: list[str] | None = None, quiet: bool = False,
          save: Path | None = None) -> dict[str, Any]:
    """Go on from a saved run; the rest as in :func:`run`. The cell is that of the whole run, from its boot.

    :param values: of ``script`` and ``budget``.
    """
    from vmlab.experiment import resume, saved_run
    from vmlab.experiment.matrix import BASELINE, Cell

    saved = saved_run.read(file, lab.code())
    try:
        technique, before = str(saved.values["technique"]), dict(saved.values["parameters"])
    except (KeyError, TypeError, ValueError) as error:
        raise resume.misfit(error) from error
    script = " ".join(str(part["script"]) for part in (before, values) if "script" in part)
    chosen = {**before, **values, **({"script": script} if script else {})}
    return _run(Cell(technique, chosen, chosen if technique == BASELINE else {}), values, lab, profiles, quiet, save, saved)


def _run(cell: Cell, values: dict[str, Value], lab: Any, profiles: list[str] | None, quiet: bool, save: Path | None,
         saved: Saved | None) -> dict[str, Any]:
    from vmlab.experiment.cell import run_cell
    from vmlab.experiment.pricing import complete

    chosen = dict(cell.parameters)
    interactive = "script" not in values and sys.stdin.isatty()
    if interactive and "budget" not in values:
        chosen["budget"] = 1 << 62
    watcher = Watcher(sys.stderr if quiet else sys.stdout, keyboard=interactive, spoken_to="script" in values)
    with _raw_terminal() if interactive else contextlib.nullcontext():
        try:
            record = run_cell(cell.technique, chosen, watcher.attach, saved)
        finally:
            watcher.close()
    if save is not None:
        watcher.save(save, lab.code())
    return complete([cell], {cell.id: record}, lab.profiles() if profiles is None else profiles, lab)[0]


class Watcher:
    """Shows what the guest says and how far it is; types what the keyboard says."""

    def __init__(self, out: Any, *, keyboard: bool, spoken_to: bool) -> None:
        self._out, self._keyboard, self._spoken_to = out, keyboard, spoken_to
        self._title = bool(out.isatty())
        self._line = not self._title and sys.stderr.isatty() and out is not sys.stderr
        self._shown = 0.0
        self._run: Run | None = None
        self._handle: Handle | None = None
        self._idle = 0

    def attach(self, run: Run) -> None:
        """Listen to the guest, and look up from time to time."""
        self._run = run
        run.machine.console_listeners.append(self._heard)
        if self._keyboard:
            run.machine.patience = 1 << 62      # somebody may still press a key
            print(f"vmlab: Ctrl-] ends the run of {run.image.name}", file=sys.stderr)
        elif not self._spoken_to:
            print(f"vmlab: no terminal to type at; {_DIALOGUE}", file=sys.stderr)
        if self._keyboard or self._title or self._line:
            self._look_again()

    def _heard(self, character: int) -> None:
        self._out.write(chr(character))
        if character == 10 or self._keyboard:
            self._out.flush()

    def _look_again(self) -> None:
        assert self._run is not None
        timeline = self._run.machine.timeline
        self._handle = timeline.at(timeline.now + _LOOK, self._look)

    def _look(self) -> None:
        assert self._run is not None
        machine = self._run.machine
        if self._keyboard:
            waits = machine.events.get("idle", 0) != self._idle
            self._idle = machine.events.get("idle", 0)
            typed = _keys(0.01 if waits and machine.uart.idle else 0.0)
            if ESCAPE in typed:
                from vmlab.machine.pc import Stop, StopReason

                machine.stop(Stop(StopReason.LEFT))
                return
            if typed:
                machine.uart.receive(typed)
        now = time.monotonic()
        if now - self._shown >= _REFRESH:
            self._shown = now
            self._show(self.status())
        self._look_again()

    def status(self) -> str:
        """How far the run is: guest instructions, exits, simulated time."""
        assert self._run is not None
        machine = self._run.machine
        counted = {**machine.events, **self._run.strategy.counts}
        exits = sum(n for kind, n in counted.items() if kind.startswith(("exit.", "trap.", "hypercall.", "bt.callout.")))
        return f"{machine.time / 1e6:,.1f} M instructions, {exits:,} exits, {machine.time / 1e9:.3f} s simulated"

    def _show(self, text: str) -> None:
        if self._title:
            self._out.write(f"\x1b]2;vmlab: {text}\x07")
            self._out.flush()
        elif self._line:
            sys.stderr.write(f"\r{text:<78}")
            sys.stderr.flush()

    def save(self, path: Path, code: str) -> None:
        """Write the guest as it stands. :raises ExperimentError: it has ended, or cannot be saved now."""
        from vmlab.errors import ExperimentError, UnsupportedByStrategy
        from vmlab.experiment import resume
        from vmlab.machine.pc import StopReason

        run = self._run
        if run is None or run.ended is None or run.ended.reason not in (StopReason.SAID, StopReason.LEFT):
            raise ExperimentError(f"--save {path}: the guest has ended, and nothing can go on; end the run by --expect TEXT or Ctrl-]")
        run.machine.timeline.cancel(self._handle)
        try:
            resume.save(run, path, code)
        except UnsupportedByStrategy as reason:
            raise ExperimentError(f"--save {path}: {reason}") from reason

    def close(self) -> None:
        """The last of the console, on a line of its own."""
        if self._line:
            sys.stderr.write(f"\r{'':<78}\r")
        if self._run is not None and self._run.machine.console and self._run.machine.console[-1] != 10:
            self._out.write("\n")
        self._out.flush()


def _keys(wait: float) -> bytes:
    """What was typed; waits so many host seconds for it."""
    import select

    if not select.select([sys.stdin], [], [], wait)[0]:
        return b""
    return os.read(sys.stdin.fileno(), 256) or bytes((ESCAPE,))


@contextlib.contextmanager
def _raw_terminal() -> Iterator[None]:
    """The terminal hands on each key as it is pressed, and echoes nothing: the guest does."""
    try:
        import termios
        import tty
    except ImportError:
        raise ConfigError("this system's terminal cannot be typed at; " + _DIALOGUE) from None
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setraw(descriptor)
    after = termios.tcgetattr(descriptor)
    after[1] = before[1]                        # output stays as it was: a line feed returns the carriage
    termios.tcsetattr(descriptor, termios.TCSADRAIN, after)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
