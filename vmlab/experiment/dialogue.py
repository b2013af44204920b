"""A dialogue with a guest on its serial port: wait for a text, send one, and so on.

What is sent arrives at the first block boundary behind the last character of what was waited for: a run with a dialogue is the same on
every host, and one that is saved there and goes on another time is the same too. Written as ``expect "$ " send "ls\\n" expect "$ "``.
"""

from __future__ import annotations

import codecs
import functools
import shlex
from collections.abc import Callable, Sequence
from typing import Literal

from vmlab.errors import ConfigError
from vmlab.machine.pc import Machine, Stop, StopReason

Step = tuple[Literal["expect", "send"], str]


def parse(script: str) -> list[Step]:
    """The steps that ``script`` names; ``\\n``, ``\\x1b`` and their like stand for characters. Raises :class:`ConfigError`."""
    try:
        words = shlex.split(script)
    except ValueError as error:
        raise ConfigError(f"script: {script!r}: {error}") from None
    steps: list[Step] = []
    for verb, text in zip(words[::2], [*words[1::2], None], strict=False):
        if text is None or verb not in ("expect", "send"):
            raise ConfigError(f"script: {script!r}: expect TEXT or send TEXT is needed at {verb!r}")
        try:
            plain = codecs.decode(text.encode("latin-1", "backslashreplace"), "unicode_escape")
            plain.encode("latin-1")
        except ValueError as error:
            raise ConfigError(f"script: {text!r}: {error}") from None
        if not plain:
            raise ConfigError(f"script: an empty text to {verb}")
        steps.append(("expect" if verb == "expect" else "send", plain))
    return steps


def script_of(steps: Sequence[Step]) -> str:
    """``steps`` as :func:`parse` reads them."""
    return " ".join(f"{verb} {shlex.quote(text.encode('unicode_escape').decode())}" for verb, text in steps)


def split(script: str) -> tuple[str, str]:
    """The script up to the first text to wait for, and the rest; both empty where it waits for none. Raises as :func:`parse` does."""
    steps = parse(script)
    at = next((number for number, (verb, _) in enumerate(steps) if verb == "expect"), None)
    return ("", "") if at is None else (script_of(steps[:at + 1]), script_of(steps[at + 1:]))


class Dialogue:
    """Carries out ``steps`` on ``machine``; the run stops behind the last, if that is something to wait for."""

    def __init__(self, machine: Machine, steps: Sequence[Step]) -> None:
        self._machine = machine
        self._steps = list(steps)
        self._end = bool(steps) and steps[-1][0] == "expect"
        #: Called once, when the first text that was waited for has come.
        self.on_first: Callable[[], None] = _nothing
        self._from = 0                      # in the console: what came before was spoken of already
        machine.console_listeners.append(self._heard)
        self._speak()

    @property
    def waits_for(self) -> str | None:
        """The text that has still to come, or None."""
        return next((text for verb, text in self._steps if verb == "expect"), None)

    def go_on_with(self, steps: Sequence[Step]) -> None:
        """Carry these out from here on, in place of what was left."""
        self._steps = list(steps)
        self._end = bool(steps) and steps[-1][0] == "expect"

    def _speak(self) -> None:
        """Send what comes before the next text to wait for."""
        timeline = self._machine.timeline
        while self._steps and self._steps[0][0] == "send":
            timeline.at(timeline.now, functools.partial(self._machine.uart.receive, self._steps.pop(0)[1].encode("latin-1")))

    def _heard(self, character: int) -> None:
        if not self._steps:
            return
        wanted = self._steps[0][1].encode("latin-1")
        console = self._machine.console
        if character != wanted[-1] or len(console) - self._from < len(wanted) or not console.endswith(wanted):
            return
        self._from = len(console)
        self._steps.pop(0)
        first, self.on_first = self.on_first, _nothing
        first()
        self._speak()
        if not self._steps and self._end:
            self._machine.stop(Stop(StopReason.SAID))


def _nothing() -> None:
    """Nobody asked."""
