"""The translator: guest kernel code in, translation units in a cache out (Adams & Agesen, ASPLOS 2006, §3).

Read in this order: ``units`` (what is made: units, sites, states), ``forms`` (how instructions are encoded, for 32 and 64
bits), ``emitter`` (writes one unit), ``sensitive`` and ``control`` (the templates), ``relative`` (operands relative to RIP),
``cache`` (memory, chains, look-up table, invalidation), ``translator`` (decides), ``pages`` (guest code that the guest
writes), ``precise`` (interrupted anywhere). :mod:`vmlab.strategies.translation` runs what they make. docs/binary-translation.md tells the whole.
"""

from vmlab.vmm.translation.translator import Options, Translator
from vmlab.vmm.translation.units import Kind, Mode, Piece, Site, State, Unit

__all__ = ["Kind", "Mode", "Options", "Piece", "Site", "State", "Translator", "Unit"]
