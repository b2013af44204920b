"""The workloads of ``nano`` as the rest of the lab sees them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from vmlab.guests.image import Workload
from vmlab.parameters import Parameter

_ITERATIONS = Parameter("iterations of the workload's loop", 50_000, minimum=1, maximum=100_000_000)
_DENSITY = Parameter("instances of the named instruction per 1000 other instructions", 100, minimum=1, maximum=1000)

# What is counted as an operation is said here, and exactly in counts.py.
_SUMMARIES = {
    "cli_sti": "CLI and STI, two operations an iteration",
    "pushf_popf": "save, disable and restore the interrupt flag by PUSHF, CLI, POPF",
    "port_io": "OUT to and IN from the UART's scratch register and line status",
    "cpuid": "CPUID, leaf 0",
    "rdtsc": "RDTSC, checked never to run backwards",
    "interrupt": "two UART interrupts an iteration, awaited by STI;HLT and with interrupts enabled",
    "compute": "60 001 user-mode instructions and one INT 0x80 an iteration (it has no density)",
    "mixed": "all of the others once an iteration, with two interrupts and a short user program",
}


def _workload(name: str, summary: str) -> Workload:
    parameters = {"iterations": _ITERATIONS} if name == "compute" else {"iterations": _ITERATIONS, "density": _DENSITY}
    return Workload(name, summary, MappingProxyType(parameters), asynchronous=name in ("interrupt", "mixed"))


#: By name.
WORKLOADS: Mapping[str, Workload] = MappingProxyType({n: _workload(n, s) for n, s in _SUMMARIES.items()})
