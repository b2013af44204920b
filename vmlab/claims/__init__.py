"""Claims: sentences of the textbook and of papers, each turned into a check of a run.

A claim is data (one YAML file in ``data/``): statement, source, kind, scope, a predicate's name with its
arguments, and what would falsify it. The predicates are functions of :mod:`counted` and :mod:`priced`.
A verdict is an answer, not a failure: ``fails`` is as good a result as ``holds``, and where the evidence is
missing the verdict is ``undecided`` with the reason.

    evaluate(["popf-silent"], results["cells"], ["prescott-2005"])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vmlab import costs
from vmlab.claims import counted, priced
from vmlab.claims.evidence import Cell, Evidence, Finding, Missing
from vmlab.claims.model import Claim, load, names
from vmlab.errors import ConfigError

__all__ = ["PREDICATES", "Claim", "evaluate", "load", "names"]

Predicate = Callable[[Evidence, Mapping[str, Any]], Finding]

#: What a claim's ``predicate`` may name.
PREDICATES: Mapping[str, Predicate] = {
    "outcome_goes_wrong": counted.outcome_goes_wrong,
    "faithful": counted.faithful,
    "runs_directly": counted.runs_directly,
    "monitor_regains": counted.monitor_regains,
    "trapping_would_not_do": counted.trapping_would_not_do,
    "shows_the_ring": counted.shows_the_ring,
    "instruction_is_slow": priced.instruction_is_slow,
    "translated_is_faster": priced.translated_is_faster,
    "dearer_step_by_step": priced.dearer_step_by_step,
    "round_trip_fell": priced.round_trip_fell,
}


def evaluate(
    ids: Sequence[str], cells: Sequence[Cell], profiles: Sequence[str], *,
    probe: Mapping[str, Any] | None = None, costbook: Mapping[str, costs.Profile] | None = None,
) -> list[dict[str, Any]]:
    """The verdicts on the claims ``ids``, in that order, as results.json holds them.

    :param cells: priced cells of a run.
    :param profiles: names of the cost profiles to judge on.
    :param probe: the result of ``vmlab probe``, for the claims about single instructions.
    :param costbook: profiles by name in place of the built-in ones (altered costs).
    :raises ConfigError: an unknown claim or profile.
    """
    book = {name: (costbook or {}).get(name) or costs.load(name) for name in profiles}
    evidence = Evidence(cells, tuple(profiles), book, probe)
    return [_judge(load(name), evidence) for name in ids]


def _judge(claim: Claim, evidence: Evidence) -> dict[str, Any]:
    predicate = PREDICATES.get(claim.predicate)
    if predicate is None:
        raise ConfigError(f"claim {claim.id}: no predicate {claim.predicate!r}; there are {', '.join(PREDICATES)}")
    try:
        finding = predicate(evidence, claim.arguments)
    except Missing as missing:
        finding = Finding("undecided", str(missing))
    return {
        "id": claim.id, "statement": claim.statement, "source": claim.source, "kind": claim.kind,
        "verdict": finding.verdict, "by_profile": dict(finding.by_profile), "figures": finding.figures,
        "calibrated": _calibrated(claim, evidence), "reason": finding.reason,
    }


def _calibrated(claim: Claim, evidence: Evidence) -> bool:
    """Whether a figure of the claim's own source set a cost, so that its verdict is no prediction."""
    shared = costs.path_table()
    tables = [shared.paths, shared.shared, *(profile.costs for profile in evidence.costs.values())]
    return any(claim.id in figure.calibrates for table in tables for figure in table.values())
