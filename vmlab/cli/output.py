"""What verbs print with: streams that cannot fail on a sign, plain tables, and a progress line."""

from __future__ import annotations

import codecs
import io
import json
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

#: Signs that a console without UTF-8 is given in place of ours.
PLAIN = {
    "×": "x", "–": "-", "—": "-", "−": "-", "…": "...", "→": "->", "≥": ">=", "≤": "<=", "±": "+/-", "·": ".",
    "“": '"', "”": '"', "‘": "'", "’": "'", "✓": "ok", "✗": "x", "÷": "/", "§": "section ", "│": "|", "─": "-", "█": "#",
    "●": "*", "├": "+", "└": "+", "µ": "u",
}


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(PLAIN.get(sign, "?") for sign in error.object[error.start:error.end]), error.end


codecs.register_error("vmlab.plain", _plain)


def tame_streams() -> None:
    """Let stdout and stderr replace signs that their encoding lacks, instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="vmlab.plain")


def print_json(value: Any) -> None:
    """One JSON document on stdout, ASCII only, so that any console and any pipe can carry it."""
    print(json.dumps(value, indent=2, sort_keys=False))


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns aligned with spaces: numbers to the right, words to the left, a rule below the head."""
    lines = [[_text(field) for field in row] for row in rows]
    number = [
        bool(lines) and all(not row[i] or row[i][0].isdigit() or (row[i][0] in "-." and len(row[i]) > 1) for row in lines)
        for i in range(len(head))
    ]
    widths = [max([len(title), *(len(row[i]) for row in lines)]) for i, title in enumerate(head)]

    def line(fields: Sequence[str]) -> str:
        padded = (f.rjust(w) if n else f.ljust(w) for f, w, n in zip(fields, widths, number, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join([line(head), "  ".join("-" * width for width in widths), *map(line, lines)])


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.2f}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


class Progress:
    """What is under way: one line that is rewritten on a terminal, one plain line per cell elsewhere."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self.total, self.done = total, 0
        self.stream = sys.stderr if stream is None else stream
        self.live = self.stream.isatty()
        self.started = time.monotonic()

    def finished(self, name: str, status: str, seconds: float) -> None:
        """One more cell is done."""
        self.done += 1
        note = "" if status == "ok" else f" {status.upper()}"
        if not self.live:
            print(f"[{self.done}/{self.total}] {name}{note} ({seconds:.1f} s)", file=self.stream, flush=True)
            return
        if note:
            self.stream.write(f"\r\x1b[K{name}{note}\n")
        filled = 24 * self.done // max(self.total, 1)
        elapsed = time.monotonic() - self.started
        left = elapsed / self.done * (self.total - self.done)
        bar = "█" * filled + "·" * (24 - filled)
        self.stream.write(f"\r\x1b[K{bar} {self.done}/{self.total}  {elapsed:.0f} s, about {left:.0f} s left")
        self.stream.flush()

    def close(self) -> None:
        """Leave the terminal's line clean."""
        if self.live:
            self.stream.write("\r\x1b[K")
            self.stream.flush()
