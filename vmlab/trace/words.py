"""A step in words: of which kind it is, and what the VMM did."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmlab.ledger import EVENTS

if TYPE_CHECKING:
    from vmlab.trace.recorder import Step

#: Kinds of steps by the events that make them so, the first that fits; what fits none is an "instruction".
KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("exit", ("exit.",)),
    ("hypercall", ("hypercall.",)),
    ("callout", ("bt.callout.",)),
    ("trap", ("trap.",)),
    ("interrupt", ("interrupt.", "event.upcall")),
    ("fault", ("fault.delivered.", "reflect.")),
    ("entry", ("entry",)),
    ("translation", ("bt.",)),
)
NAMES = (*(name for name, _ in KINDS), "instruction")

#: Events that say how an instruction was executed, or sum up others; in words they would say nothing new.
_SILENT = ("machine.", "retired.", "translated.", "emulated.", "iret.", "vmm.emulate", "bt.translate.bytes")


def kind_of(step: Step) -> str:
    """The step's kind, one of :data:`NAMES`."""
    for name, prefixes in KINDS:
        if any(event.startswith(prefixes) for event in step.events):
            return name
    return "instruction"


def did(step: Step) -> list[str]:
    """What happened beside the instruction itself, in the ledger's words, machine's doings first."""
    said = []
    for event, count in sorted(step.events.items(), key=lambda row: (EVENTS[row[0]].provenance != "machine" if row[0] in EVENTS else True)):
        if event.startswith(_SILENT):
            continue
        words = EVENTS[event].words if event in EVENTS else event
        said.append(words + (f" ×{count}" if count > 1 else ""))
    return said
