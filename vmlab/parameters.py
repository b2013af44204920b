"""A parameter that a strategy or guest declares: what it may be, and what it is when unsaid."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from vmlab.errors import ConfigError

Value = str | int | bool


def nearest(word: str, choices: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest of ``choices``, or the whole list when none is near."""
    known = sorted(choices)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; choose from {', '.join(known)}" if known else ""


@dataclass(frozen=True)
class Parameter:
    """One parameter: help text, default, and either the allowed words or the range of a whole number."""

    help: str
    default: Value
    choices: tuple[str, ...] | None = None
    minimum: int = 0
    maximum: int = 2**31 - 1

    def check(self, name: str, value: object) -> Value:
        """``value`` if it is allowed, else :class:`ConfigError` that names the nearest choice."""
        if self.choices is not None:
            if not isinstance(value, str) or value not in self.choices:
                raise ConfigError(f"{name}: {value!r} is not allowed{nearest(str(value), self.choices)}")
            return value
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{name}: a whole number is needed, not {value!r}")
        if not self.minimum <= value <= self.maximum:
            raise ConfigError(f"{name}: {value} is outside {self.minimum}..{self.maximum}")
        return value


@dataclass(frozen=True)
class Text(Parameter):
    """A parameter that is any text: a command line, the name of a file."""

    def check(self, name: str, value: object) -> Value:
        """``value`` as text; a number is what was meant as one word."""
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise ConfigError(f"{name}: a text is needed, not {value!r}")
        return str(value)
