"""Measuring the CPU that one has: a few lines of machine code in user mode, and a guest of our own under KVM.

``native`` runs loops of single instructions in an executable page; ``kvm`` runs a guest of a few bytes that exits for one
reason over and over; ``report`` makes a cost profile of provenance ``measured`` of it. What cannot be measured on a host is
said, with the reason, and never guessed.

Nothing here is part of a run of the lab: counts do not depend on the host, and prices only where a profile is asked for.
"""

from __future__ import annotations

from vmlab.measure.report import Measured, measure, profile_text

__all__ = ["Measured", "measure", "profile_text"]
