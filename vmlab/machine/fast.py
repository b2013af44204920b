"""Placeholder until the C library is wired (next commit)."""
from __future__ import annotations
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from vmlab.machine.counter import Counter
    from vmlab.machine.pc import Machine


def connect(machine: "Machine", address: int | None) -> "Counter | None":
    return None


def why_not() -> str:
    return "not built"
