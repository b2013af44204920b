"""A step in words: of which kind it is, and what the VMM did."""

from __future__ import annotations

from collections.abc import Mapping
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

#: What a translator does to go on with code that it has not seen: new units, links between them. In a long run it is no news.
_TRANSLATING = ("bt.callout.chain", "bt.callout.indirect", "bt.chain", "bt.lookup.", "bt.translate.", "vmm.guest_walk")


def kind_of(step: Step) -> str:
    """The step's kind, one of :data:`NAMES`."""
    for name, prefixes in KINDS:
        if any(event.startswith(prefixes) for event in step.events):
            return name
    return "instruction"


def eventful(step: Step) -> bool:
    """Whether something happened that is worth a stop: more than an instruction, and more than a translator's reading on."""
    return kind_of(step) != "instruction" and not all(event.startswith((*_SILENT, *_TRANSLATING)) for event in step.events)


def did(step: Step) -> list[str]:
    """What happened beside the instruction itself, in the ledger's words, machine's doings first."""
    return in_words(step.events)


def in_words(events: Mapping[str, int]) -> list[str]:
    """Counted events in the ledger's words, machine's doings first; those that say only how an instruction was executed are left out."""
    said = []
    for event, count in sorted(events.items(), key=lambda row: (EVENTS[row[0]].provenance != "machine" if row[0] in EVENTS else True)):
        if event.startswith(_SILENT):
            continue
        words = EVENTS[event].words if event in EVENTS else event
        said.append(words + (f" ×{count}" if count > 1 else ""))
    return said
