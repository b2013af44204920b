"""What ``vmlab step`` can show: one thing that a guest's kernel does, under every technique beside each other.

A scenario is data: a workload, small enough to be followed instruction by instruction, and the lanes. A lane that the lab cannot
run says why, in its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vmlab.parameters import Value


@dataclass(frozen=True)
class LaneChoice:
    """One technique in a scenario, with parameters of its own and a name for them."""

    technique: str
    label: str = ""
    parameters: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class Scenario:
    """All of the workload's region of interest is shown. ``interrupt_at``: (guest instruction, line of the controller) that a device raises."""

    name: str
    title: str
    look: str
    workload: str
    parameters: Mapping[str, Value]
    lanes: tuple[LaneChoice, ...]
    guest: str = "nano"
    interrupt_at: tuple[int, int] | None = None


_FIVE = (
    LaneChoice("native"), LaneChoice("trap-and-emulate"), LaneChoice("binary-translation"), LaneChoice("paravirtualization"),
    LaneChoice("hardware-assisted"),
)
_FIVE_POPF = (
    LaneChoice("native"), LaneChoice("trap-and-emulate", "silent POPF", {"sensitive": "silent"}),
    LaneChoice("trap-and-emulate", "trapping POPF", {"sensitive": "trap"}), *_FIVE[2:],
)
_MEMORY = (
    LaneChoice("native"), LaneChoice("trap-and-emulate", "shadow, traced", {"memory": "tracing", "sensitive": "trap"}),
    LaneChoice("binary-translation", "shadow, traced", {"memory": "tracing"}),
    LaneChoice("paravirtualization", "direct", {"memory": "direct", "batch": 1}),
    LaneChoice("hardware-assisted", "shadow, traced", {"memory": "tracing"}),
    LaneChoice("hardware-assisted", "nested", {"memory": "nested"}),
)

_ALL = (
    Scenario(
        "cli", "One CLI, five ways",
        "Watch the real flag: natively CLI clears it; under a monitor only the virtual one changes. In the translation cache CLI is a store, "
        "and nothing leaves the cache once the code is there.",
        "cli_sti", {"iterations": 3, "density": 500}, _FIVE),
    Scenario(
        "popf", "POPF, which does not trap",
        "The kernel saves its flags, disables interrupts and restores the flags. Outside ring 0 a POPF leaves the interrupt flag alone and says "
        "nothing: see the virtual flag stay clear in the silent lane.",
        "pushf_popf", {"iterations": 2, "density": 500}, _FIVE_POPF),
    Scenario(
        "port-io", "Talking to a device",
        "OUT and IN to the serial port. Natively the device answers; every monitor must stand between.",
        "port_io", {"iterations": 2, "density": 500}, _FIVE),
    Scenario(
        "interrupt", "An interrupt arrives while the guest has interrupts off",
        "A device raises its line just after CLI. The machine's own flag stays set under every monitor: the monitor takes the interrupt and holds "
        "it back until the guest's STI.",
        "cli_sti", {"iterations": 3, "density": 500}, _FIVE, interrupt_at=(12, 4)),
    Scenario(
        "system-call", "A system call",
        "A program calls its kernel by INT 0x80: through the table in memory, through the monitor, or from ring 3 straight to ring 1.",
        "null_call", {"iterations": 2}, _MEMORY, guest="minios"),
    Scenario(
        "page-table-write", "One page-table entry is written",
        "Natively it is one store. With shadow tables it is a fault into the monitor; with direct paging a hypercall; with nested tables a store "
        "again.",
        "ptemod", {"iterations": 3}, _MEMORY, guest="minios"),
    Scenario(
        "page-fault", "A first touch of a page",
        "The guest's own page fault, and what the monitor adds to it.",
        "pagefault", {"iterations": 2}, _MEMORY, guest="minios"),
    Scenario(
        "fork", "Fork, a child that ends, wait",
        "Page tables are copied, filled and thrown away: the worst case of every shadow.",
        "forkwait", {"iterations": 1}, _MEMORY, guest="minios"),
)

#: By name.
SCENARIOS: Mapping[str, Scenario] = {scenario.name: scenario for scenario in _ALL}
