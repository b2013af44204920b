"""What a guest's time stamp counter counts: guest instructions, or the cycles of a CPU generation.

The time stamp counter of a real machine goes on while a VMM runs and while the CPU switches worlds; that is how a guest finds out what
an exit costs it. The lab's VMMs are Python, and its clock is virtual time, which stands still meanwhile. Under ``clock: PROFILE`` the
counter shows instead what everything that happened so far *costs* on that CPU: the events that have been counted, each at the price that
:mod:`vmlab.costs` gives it, and the waiting in HLT at the CPU's clock rate. No figure is added to those of the pricing, so what a guest
measures with RDTSC is what the lab prices (docs/hardware-assistance.md, docs/adr/0018-priced-clock.md).

Devices keep to virtual time: interrupts come at the same instruction whatever the prices are.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vmlab.costs import Profile, Unsupported, load, names, path_table, supports, unit_cost
from vmlab.errors import UnsupportedByStrategy
from vmlab.parameters import Parameter, Value

if TYPE_CHECKING:
    from vmlab.strategies.base import Strategy

INSTRUCTIONS = "instructions"
#: What a cell may say of the clock. Only built-in profiles: their text is part of a cell's identity.
PARAMETERS: Mapping[str, Parameter] = {
    "clock": Parameter("what the time stamp counter counts: guest instructions, or the cycles that everything so far costs on a CPU generation",
                       INSTRUCTIONS, (INSTRUCTIONS, *names())),
}


def fingerprint(parameters: Mapping[str, Value]) -> str | None:
    """A hash of the prices that a cell's guest can see on its clock; None where it sees none."""
    name = str(parameters.get("clock", INSTRUCTIONS))
    if name == INSTRUCTIONS:
        return None
    paths = path_table()
    figures = sorted((key, figure.value) for table in (load(name).costs, paths.paths, paths.shared) for key, figure in table.items())
    return hashlib.sha256(repr((figures, sorted(paths.mix.items()))).encode()).hexdigest()[:12]


class PricedClock:
    """Cycles that everything counted so far costs on ``profile``, for a guest under ``strategy``.

    :raises UnsupportedByStrategy: the CPU could not have run this technique, or (later) has no figure for what happened.
    """

    def __init__(self, strategy: Strategy, profile: Profile, platform: str) -> None:
        if not supports(profile, platform):
            raise UnsupportedByStrategy(f"clock: {profile.name} could not have run this: it provides {', '.join(sorted(profile.provides))}, "
                                        f"and the platform is {platform}")
        self._strategy, self._profile = strategy, profile
        self._units: dict[str, float] = {}
        self._cycles_per_nanosecond = profile.costs["mhz"].value / 1000

    def __call__(self, address: int | None) -> int:
        """Cycles, with the instruction at ``address`` about to run (None: between two)."""
        events, units = self._strategy.snapshot(address).events, self._units
        for kind in events.keys() - units.keys():
            units[kind] = self._unit(kind)
        waited = self._strategy.machine.idle_time * self._cycles_per_nanosecond
        # fsum rounds once, whatever the order: the same number on every path and host.
        return int(math.fsum((waited, *(n * units[kind] for kind, n in events.items()))))

    def _unit(self, kind: str) -> float:
        unit = unit_cost(kind, self._profile)
        if isinstance(unit, Unsupported):
            raise UnsupportedByStrategy(f"clock: {unit.reason}, so this CPU's clock cannot go on")
        return unit


def install(strategy: Strategy, parameters: Mapping[str, Value]) -> None:
    """Let the machine's time stamp counter be what the cell says. Raises ConfigError for an unknown profile, else as :class:`PricedClock`."""
    name = str(PARAMETERS["clock"].check("clock", parameters.get("clock", INSTRUCTIONS)))
    if name != INSTRUCTIONS:
        strategy.machine.cycles = PricedClock(strategy, load(name), strategy.platform(parameters))
