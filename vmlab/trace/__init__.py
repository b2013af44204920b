"""Traces: what one run really did, step by step, recorded from the machine.

A *step* is one attempt of the CPU to execute an instruction, with everything that followed from it until the next:
a trap, what the VMM did, an interrupt. Nothing in a step is guessed; its events are the difference of two ledgers, so the steps
of a run add up to the run's own. Recording is attached from outside (:class:`Recorder`); a machine that is not
recorded has no code for it and pays nothing.

    trace = record("binary-translation", {"workload": "cli_sti", "iterations": 2}, limit=100)
"""

from __future__ import annotations

from vmlab.trace.recorder import Step, Trace, Trigger, record
from vmlab.trace.words import did, kind_of

__all__ = ["Step", "Trace", "Trigger", "did", "kind_of", "record"]
