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
from vmlab.claims import checks, counted, priced
from vmlab.claims.evidence import Cell, Evidence, Finding, Margins, Missing
from vmlab.claims.model import Claim, load, names
from vmlab.errors import ConfigError

__all__ = ["NEED_PROBE", "PREDICATES", "Claim", "evaluate", "findings", "flips", "load", "names"]

Predicate = Callable[[Evidence, Mapping[str, Any]], Finding]

#: What a claim's ``predicate`` may name.
PREDICATES: Mapping[str, Predicate] = {
    "checks": checks.checks,
    "outcome_goes_wrong": counted.outcome_goes_wrong,
    "faithful": counted.faithful,
    "runs_directly": counted.runs_directly,
    "trapping_would_not_do": counted.trapping_would_not_do,
    "shows_the_ring": counted.shows_the_ring,
    "rings_collapse": counted.rings_collapse,
    "model_gives": counted.model_gives,
    "instruction_is_slow": priced.instruction_is_slow,
    "translated_is_faster": priced.translated_is_faster,
    "dearer_step_by_step": priced.dearer_step_by_step,
    "round_trip_fell": priced.round_trip_fell,
}

#: Predicates that judge the result of ``vmlab probe`` and not cells.
NEED_PROBE = frozenset({"trapping_would_not_do", "shows_the_ring", "rings_collapse"})


def evaluate(
    ids: Sequence[str], cells: Sequence[Cell], profiles: Sequence[str], *,
    probe: Mapping[str, Any] | None = None, costbook: Mapping[str, costs.Profile] | None = None,
    absent: Mapping[str, Mapping[str, str]] | None = None,
) -> list[dict[str, Any]]:
    """The verdicts on the claims ``ids``, in that order, as results.json holds them.

    :param cells: cells of a run, priced or not.
    :param profiles: names of the cost profiles to judge on; a claim adds those that its sentence speaks of.
    :param probe: the result of ``vmlab probe``, for the claims about single instructions.
    :param costbook: profiles by name in place of the built-in ones (altered costs).
    :param absent: claim -> block of its experiment -> why the lab cannot run that.
    :raises ConfigError: an unknown claim or profile, or a claim whose file names what does not exist.
    """
    return [_record(claim, evidence, finding) for claim, evidence, finding in findings(
        ids, cells, profiles, probe=probe, costbook=costbook, absent=absent)]


def findings(
    ids: Sequence[str], cells: Sequence[Cell], profiles: Sequence[str], *,
    probe: Mapping[str, Any] | None = None, costbook: Mapping[str, costs.Profile] | None = None,
    absent: Mapping[str, Mapping[str, str]] | None = None,
) -> list[tuple[Claim, Evidence, Finding]]:
    """What :func:`evaluate` records, before it is made into data: with the margins that the verdicts hang on."""
    book = {name: (costbook or {}).get(name) or costs.load(name) for name in profiles}
    found = []
    for claim in map(load, ids):
        wanted = {*book, *(str(name) for name in claim.arguments.get("scope", ()))}
        known = dict(book) | {name: (costbook or {}).get(name) or costs.load(name) for name in sorted(wanted - set(book))}
        order = tuple(sorted(known, key=lambda name: (known[name].year, name)))
        evidence = Evidence(cells, order, known, probe, claim.experiment, (absent or {}).get(claim.id, {}))
        found.append((claim, evidence, _judge(claim, evidence)))
    return found


def _judge(claim: Claim, evidence: Evidence) -> Finding:
    predicate = PREDICATES.get(claim.predicate)
    if predicate is None:
        raise ConfigError(f"claim {claim.id}: no predicate {claim.predicate!r}; there are {', '.join(PREDICATES)}")
    try:
        return predicate(evidence, claim.arguments)
    except Missing as missing:
        return Finding("undecided", str(missing))
    except ConfigError as error:
        raise ConfigError(f"claim {claim.id}: {error}") from error


def _record(claim: Claim, evidence: Evidence, finding: Finding) -> dict[str, Any]:
    speaks_of = [name for name in claim.arguments.get("scope", finding.margins) if name in finding.margins]
    return {
        "id": claim.id, "statement": claim.statement, "source": claim.source, "kind": claim.kind,
        "verdict": finding.verdict, "by_profile": dict(finding.by_profile), "figures": finding.figures,
        "calibrated": _calibrated(claim, evidence, finding), "reason": finding.reason,
        "confidence": {
            name: costs.agreement(margins.of, evidence.profile(name), margins.enough)
            for name, margins in finding.margins.items()
        },
        "flips": flips(finding),
        "decided_by": {name: _decider(evidence.profile(name), finding.margins[name]) for name in speaks_of},
    }


def flips(finding: Finding) -> list[str]:
    """The profiles, oldest first, on which the verdict is the opposite of the overall one."""
    opposite = {"holds": "fails", "fails": "holds"}.get(finding.verdict)
    return [name for name, verdict in finding.by_profile.items() if verdict == opposite]


def _decider(profile: costs.Profile, margins: Margins) -> dict[str, object] | None:
    found = costs.decider(margins.of, profile, margins.enough)
    return found.as_dict() if found else None


def _calibrated(claim: Claim, evidence: Evidence, finding: Finding) -> bool:
    """Whether a figure of the claim's own source set a cost, so that its verdict is no prediction."""
    if finding.margins:
        used = [
            figure for name, margins in finding.margins.items() for margin in margins.of
            for figure in margin.figures(evidence.profile(name)).values()
        ]
        return any(claim.id in figure.calibrates for figure in used)
    shared = costs.path_table()
    tables = [shared.paths, shared.shared, *(profile.costs for profile in evidence.costs.values())]
    return any(claim.id in figure.calibrates for table in tables for figure in table.values())
