"""Figures in words: what a cost is, where it comes from, and what it is used for."""

from __future__ import annotations

from collections.abc import Mapping

from vmlab.costs.bibliography import Reference, bibliography
from vmlab.costs.figures import Figure
from vmlab.costs.model import CostModel, NoFigure
from vmlab.costs.pricing import costs_used
from vmlab.costs.profile import Profile
from vmlab.costs.rules import NOT_PRICED, RULES
from vmlab.errors import ConfigError


def unit_of(key: str) -> str:
    """The unit of a cost key."""
    if key == "mhz":
        return "MHz"
    return {"path": "instructions", "shared": "ns"}.get(key.split(".")[0], "cycles")


def explain_figure(figure: Figure) -> str:
    """One figure: value, range, provenance, source and note, on one or two lines."""
    unit = unit_of(figure.key)
    text = f"{figure.key}: {figure.value:g} {unit} ({figure.low:g} to {figure.high:g}), {figure.provenance}"
    cited = "; ".join(bibliography()[source].words() for source in figure.sources)
    if cited:
        text += f": {cited}" if figure.provenance == "cited" else f"; see {cited}"
    if figure.where:
        text += f" ({figure.where})"
    if figure.measured_on:
        text += " on {} by `{}`, {}".format(*figure.measured_on)
    if figure.calibrates:
        text += f" [calibrates {', '.join(figure.calibrates)}]"
    return text + (f"\n  {figure.note}" if figure.note else "")


def explain_cost(profile: Profile, key: str) -> str:
    """What a cost key is on this profile, for people; says so where a default steps in.

    :raises ConfigError: the profile has no such cost.
    """
    figure = profile.figure(key)
    if figure is None:
        profile.with_values({key: 1.0})  # raises with the nearest key
        raise ConfigError(f"profile {profile.name!r} has no cost {key!r}")
    text = explain_figure(figure)
    return text if figure.key == key else f"{key} has no figure of its own; {text}"


def explain_event(profile: Profile, kind: str) -> str:
    """How one event of a kind is priced on this profile: the sum, then each figure in it.

    :raises ConfigError: no such event kind.
    """
    if kind in NOT_PRICED:
        return f"{kind}: not priced: {NOT_PRICED[kind]}"
    if kind not in RULES:
        raise ConfigError(f"no event kind {kind!r} in the ledger's table")
    model = CostModel.of(profile)
    try:
        head = f"{kind}: {model.unit(kind):.4g} cycles on {profile.name}, shown as {RULES[kind].cause}"
        lines = [explain_figure(figure) for _, figure in model.figures(kind)]
    except NoFigure as lacking:
        return f"{kind}: no price on {profile.name}: {lacking}"
    if any(key.startswith("path.") for _, key in RULES[kind].terms):
        lines.append(f"an instruction of VMM code costs {model.instruction():.3g} cycles on {profile.name}")
    return "\n".join([head, *lines])


def references_used(events: Mapping[str, int], profile: Profile) -> list[Reference]:
    """The documents whose figures have a part in the price of these events, by key."""
    keys = {source for figure in costs_used(events, profile).values() for source in figure.sources}
    return [bibliography()[key] for key in sorted(keys)]
