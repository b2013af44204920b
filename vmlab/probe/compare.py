"""What a run outside ring 0 did that the same instruction does not do in ring 0."""

from __future__ import annotations

from vmlab.ledger import EXCEPTIONS
from vmlab.probe.bench import FLAGS, SEGMENTS, Outcome, Trap

_SELECTORS = {*SEGMENTS, "LDTR", "TR", "old SS"}
_PLAIN = {*FLAGS, "halted", "interrupt shadow"}


def differences(here: Outcome, there: Outcome) -> list[str]:
    """Effects of ``here`` that ``there`` (ring 0) does not have, or has with another value, each in words.

    What neither instruction touched is no effect, so that a stack segment that must belong to the ring, or flags
    that the machine's owner had set before, do not count.
    """
    found = []
    for name in _order(here.changed | there.changed):
        value, other = here.state.get(name), there.state.get(name)
        if value == other:
            continue
        found.append(f"{name} {_number(name, value)}, not {_number(name, other)}" if other is not None and value is not None
                     else f"{name} {_number(name, value)} too" if other is None else f"no {name}")
    return found


def _order(names: frozenset[str]) -> list[str]:
    """What people look for first: flags, then selectors, general registers, the rest; addresses last."""
    def rank(name: str) -> tuple[int, str]:
        if name in FLAGS:
            return 0, name
        if name in _SELECTORS:
            return 1, name
        return (4 if name.startswith(("stack", "memory", "old")) else 3 if name in ("ESP", "EIP") else 2), name

    return sorted(names, key=rank)


def _number(name: str, value: int | None) -> str:
    if value is None:
        return "absent"
    if name in _PLAIN:
        return str(value)
    return f"{value:04X}" if name in _SELECTORS or name == "limit" else f"{value:08X}"


def trap_words(trap: Trap) -> str:
    """``#GP(0)``, ``#UD``: an exception as the manuals write it."""
    name = f"#{EXCEPTIONS.get(trap.vector, str(trap.vector)).upper()}"
    return name if trap.error_code is None else f"{name}({trap.error_code:X})" if trap.error_code else f"{name}(0)"
