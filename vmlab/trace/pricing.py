"""Cycles of steps: each step's events priced like any ledger, so that the steps of a run cost what the run costs."""

from __future__ import annotations

from vmlab import costs
from vmlab.trace.recorder import Trace


def cycles(trace: Trace, profile: str) -> list[float] | None:
    """Nominal cycles of each step; None where this CPU could not have run it.

    A hypercall's gate is one event and its call another, possibly of neighbouring steps: sums are exact, a single step may show one of the two.

    :raises ConfigError: no such profile.
    """
    loaded = costs.load(profile)
    made = []
    for step in trace.steps:
        found = costs.nominal(step.events, loaded, trace.platform)
        if isinstance(found, costs.Unsupported):
            return None
        made.append(found)
    return made
