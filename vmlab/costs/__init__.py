"""Costs: what the counted events of a run cost on a named CPU generation.

Nothing here runs a guest. A *profile* (YAML, one CPU generation) holds cycles; the *path table*
(``paths.yaml``, one for all generations) holds the length of a VMM's handlers in instructions;
*rules* say which figures each event kind is priced by; *pricing* multiplies. Every figure has a
value, a range and a provenance (see ``docs/cost-profiles.md``).

    profile = load("prescott-2005")
    price({"machine.cli": 1000}, profile, "x86")     # Price(total=60000.0, low=…, high=…, …)
"""

from __future__ import annotations

from vmlab.costs.bibliography import Reference, bibliography, bibtex
from vmlab.costs.explain import explain_cost, explain_event, references_used, unit_of
from vmlab.costs.figures import PROVENANCES, Figure
from vmlab.costs.model import NoFigure
from vmlab.costs.paths import PathTable, path_table
from vmlab.costs.pricing import (
    Price,
    Ratio,
    Unsupported,
    breakeven,
    costs_used,
    nominal,
    price,
    slowdown,
    unit_cost,
)
from vmlab.costs.profile import PLATFORMS, Profile, load, names, own_names, supports, user_profiles
from vmlab.costs.quantity import Quantity
from vmlab.costs.rules import CAUSES, NOT_PRICED, RULES, Rule
from vmlab.costs.sampling import SAMPLES, SEED
from vmlab.costs.sensitivity import Decider, agreement, decider, holds

__all__ = [
    "CAUSES", "NOT_PRICED", "PLATFORMS", "PROVENANCES", "RULES", "SAMPLES", "SEED", "Decider", "Figure", "NoFigure",
    "PathTable", "Price", "Profile", "Quantity", "Ratio", "Reference", "Rule", "Unsupported", "agreement",
    "bibliography", "bibtex", "breakeven", "costs_used", "decider", "explain_cost", "explain_event", "holds", "load",
    "names", "nominal", "own_names", "path_table", "price", "references_used", "slowdown", "supports", "unit_cost",
    "unit_of", "user_profiles",
]
