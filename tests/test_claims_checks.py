"""The general predicate: counts, outcomes and prices as data; confidence and the cost that decides, on made-up cells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from vmlab import claims, costs
from vmlab.claims import checks, model
from vmlab.claims.evidence import Evidence, Missing
from vmlab.errors import ConfigError

P4, PENRYN, WESTMERE = "prescott-2005", "penryn-2008", "westmere-2010"
BLOCKS = {
    "native": {"technique": "native", "workload": "w"},
    "soft": {"technique": "binary-translation", "workload": "w", "memory": "tracing"},
    "hard": {"technique": "hardware-assisted", "workload": "w", "memory": "tracing"},
    "nested": {"technique": "hardware-assisted", "workload": "w", "memory": "nested"},
}


def cell(technique: str, events: dict[str, int], outcome: str = "o", **more: Any) -> dict[str, Any]:
    parameters = {"guest": "g", "workload": "w", "iterations": 100, **more}
    platform = {"hardware-assisted": "svm-npt" if more.get("memory") == "nested" else "svm"}.get(technique, "x86")
    return {
        "technique": technique, "parameters": parameters, "status": "ok", "platform": platform, "events": events,
        "work": {"operations": 200, "iterations": 100}, "instructions": {"guest": {"user": 3000, "kernel": 1000}, "machine": 4000},
        "phases": {"roi.warm": {"events": events}, "empty": {"events": {"machine.alu": 100}}}, "fidelity": {"outcome": outcome},
    }


CELLS = [
    cell("native", {"machine.alu": 1000}),
    cell("binary-translation", {"machine.alu": 1500, "bt.callout.system": 100}, memory="tracing"),
    cell("hardware-assisted", {"machine.alu": 1000, "exit.page_fault": 100, "entry": 100}, "x", memory="tracing"),
    cell("hardware-assisted", {"machine.alu": 1000}, memory="nested"),
]


def evidence(cells: list[dict[str, Any]] = CELLS, profiles: tuple[str, ...] = (P4, PENRYN, WESTMERE)) -> Evidence:
    return Evidence(cells, profiles, {name: costs.load(name) for name in profiles}, blocks=BLOCKS)


def find(*rows: Mapping[str, Any], cells: list[dict[str, Any]] = CELLS, **arguments: Any) -> Any:
    return checks.checks(evidence(cells), {"checks": list(rows), "scope": [P4], **arguments})


@pytest.mark.parametrize(("reference", "value"), [
    ({"cell": "hard", "events": ["exit.*"]}, 100), ({"cell": "hard", "events": ["exit.*", "entry"], "per": "iteration"}, 2),
    ({"cell": "hard", "events": ["exit.*", "!exit.page_fault"]}, 0), ({"cell": "hard", "events": ["entry"], "per": "operation"}, 0.5),
    ({"cell": "native", "events": ["machine.alu"], "per": "instruction"}, 0.25),
    ({"cell": "native", "events": ["machine.alu"], "per": "1000 instructions"}, 250),
    ({"cell": "native", "events": ["machine.alu"], "in": "empty"}, 100),
])
def test_counts_by_hand(reference: dict[str, Any], value: float) -> None:
    assert checks.counted(evidence(), reference) == value


def test_counts_are_bounded_and_divided() -> None:
    exits = {"cell": "hard", "events": ["exit.*"]}
    assert find({"name": "few", "count": exits, "at_most": 100}).verdict == "holds"
    assert find({"name": "few", "count": exits, "at_most": 99}).verdict == "fails"
    share = {"name": "share", "count": {"cell": "hard", "events": ["exit.page_fault"]}, "over": exits, "at_least": 0.9}
    found = find(share)
    assert found.verdict == "holds" and found.figures == {"share": 1.0} and "at least 0.9" in found.reason
    with pytest.raises(Missing, match="counted none"):
        find(share | {"over": {"cell": "nested", "events": ["exit.*"]}})


def test_outcomes_are_the_same_or_differ() -> None:
    assert find({"name": "end", "outcome": "soft", "same_as": "native"}).verdict == "holds"
    assert find({"name": "end", "outcome": "hard", "same_as": "native"}).verdict == "fails"
    assert find({"name": "end", "outcome": "hard", "differs_from": "native"}).verdict == "holds"


def test_a_cell_is_taken_at_its_own_size_else_at_the_largest() -> None:
    sizes = [dict(cell("native", {"machine.alu": n})) for n in (10, 40, 90)]
    for made, iterations in zip(sizes, (1, 4, 9), strict=True):
        made["parameters"] = made["parameters"] | {"iterations": iterations}
    blocks = {"begun": {"technique": "native", "iterations": 1}, "long": {"technique": "native", "iterations": 4},
              "absent": {"technique": "native", "iterations": 7}, "any": {"technique": "native"}}
    found = Evidence(sizes, (P4,), {P4: costs.load(P4)}, blocks=blocks)
    assert [found.cell(name)["parameters"]["iterations"] for name in ("begun", "long", "absent", "any")] == [1, 4, 9, 9]
    assert len(found.sizes("long")) == 3
    slope = checks.cycles(found, {"cell": "long", "less": "begun"}, P4)
    assert slope.value(costs.load(P4)) == pytest.approx(30 * costs.load(P4).figure("class.alu").value)  # type: ignore[union-attr]


def test_a_verdict_that_the_costs_leave_open_says_how_far() -> None:
    row = {"name": "even", "price": {"cell": "hard"}, "over": {"cell": "hard"}, "at_least": 1.0}
    assert find(row, certainty=0.9).verdict == "holds"
    value = checks.cycles(evidence(), {"cell": "hard"}, P4).value(costs.load(P4))
    found = find({"name": "close", "price": {"cell": "hard"}, "at_least": value * 0.999}, certainty=0.9)
    assert found.verdict == "undecided" and "of the cost samples agree, 90% are asked for" in found.reason


def test_prices_are_judged_on_every_profile_and_the_scope_decides() -> None:
    row = {"name": "hard over soft", "price": {"cell": "hard"}, "over": {"cell": "soft"}, "at_least": 1}
    found = find(row)
    assert found.verdict == "holds" and set(found.by_profile) == {P4, PENRYN, WESTMERE}
    nested = find({"name": "n", "price": {"cell": "nested"}, "over": {"cell": "soft"}, "at_most": 1}, scope=[WESTMERE])
    assert nested.verdict == "holds" and nested.by_profile[PENRYN] == "undecided", "no nested paging on a Penryn"
    assert "does not provide" in nested.figures[PENRYN]["reason"]


def test_an_iteration_is_priced_without_the_empty_loop() -> None:
    found = find({"name": "c", "price": {"cell": "native", "per": "iteration"}, "at_most": 9, "at_least": 9})
    assert found.figures[P4] == {"c": 9.0} and found.verdict == "holds"


def test_costs_alone_are_priced_where_the_cpu_has_them() -> None:
    row = {"name": "trip", "price": {"costs": ["entry", "exit.vmmcall"]}, "at_least": 3000}
    found = checks.checks(evidence(profiles=(P4, "k8-2005")), {"checks": [row], "scope": [P4]})
    assert found.by_profile == {P4: "holds", "k8-2005": "undecided"}


def test_enough_of_several_and_certainty() -> None:
    good = {"name": "a", "price": {"cell": "hard"}, "over": {"cell": "native"}, "at_least": 2}
    bad = {"name": "b", "price": {"cell": "hard"}, "over": {"cell": "native"}, "at_least": 1e6}
    assert find(good, bad).verdict == "fails"
    assert find(good, bad, enough=1).verdict == "holds"
    coin = {"name": "c", "price": {"cell": "native"}, "at_most": 1000}
    assert find(coin).verdict == "holds"
    assert find(coin, certainty=0.95).verdict == "undecided"


def test_what_is_missing_is_said() -> None:
    with pytest.raises(Missing, match="has no cell 'softt'; did you mean 'soft'"):
        find({"name": "x", "count": {"cell": "softt", "events": ["entry"]}})
    with pytest.raises(Missing, match="no finished cell of technique: binary-translation"):
        find({"name": "x", "count": {"cell": "soft", "events": ["entry"]}}, cells=CELLS[:1])
    failed = [CELLS[0], CELLS[1] | {"status": "failed", "error": "it fell over"}]
    with pytest.raises(Missing, match="it fell over"):
        find({"name": "x", "count": {"cell": "soft", "events": ["entry"]}}, cells=failed)
    with pytest.raises(ConfigError, match=r"exitt\.\*"):
        find({"name": "x", "count": {"cell": "soft", "events": ["exitt.*"]}})
    with pytest.raises(ConfigError, match="unknown key 'att_most'"):
        find({"name": "x", "count": {"cell": "soft", "events": ["entry"]}, "att_most": 1})


@pytest.fixture
def made_up_claim(monkeypatch: pytest.MonkeyPatch) -> str:
    row = {"name": "hard over soft", "price": {"cell": "hard"}, "over": {"cell": "soft"}, "at_least": 1}
    claim = model.Claim("made-up", "s", "s", "priced", "s", "checks", {"checks": [row], "scope": [P4]}, "f", BLOCKS)
    monkeypatch.setattr(claims, "load", lambda name: claim)
    return claim.id


def test_a_verdict_has_confidence_and_the_cost_that_decides_it(made_up_claim: str) -> None:
    found = claims.evaluate([made_up_claim], CELLS, [PENRYN])[0]
    assert found["verdict"] == "holds" and set(found["confidence"]) == {P4, PENRYN}
    assert found["confidence"][P4] > 0.9 and list(found["decided_by"]) == [P4]
    decided = found["decided_by"][P4]
    for value, verdict in ((decided["flips_at"] * 1.01, "after"), (decided["value"], "before")):
        book = {P4: costs.load(P4).with_values({decided["cost"]: value})}
        again = claims.evaluate([made_up_claim], CELLS, [PENRYN], costbook=book)[0]["verdict"]
        rising = decided["flips_at"] > decided["value"]
        assert again == ("fails" if verdict == "after" and rising else "holds")


def test_the_generation_where_each_of_several_crosses_is_named() -> None:
    from vmlab.cli.claims import screen

    rows = [{"name": name, "price": {"cell": name}, "over": {"cell": "native"}, "at_most": limit}
            for name, limit in (("soft", 9999), ("hard", 9999), ("nested", 1))]
    finding = checks.checks(evidence(), {"checks": rows, "scope": [WESTMERE]})
    verdict = {"id": "i", "statement": "s", "reason": "r", "kind": "priced", "calibrated": False, "decided_by": {}, "flips": [],
               "verdict": finding.verdict, "by_profile": finding.by_profile, "figures": finding.figures, "confidence": {}}
    assert "First so: soft: westmere-2010; hard: westmere-2010; nested: westmere-2010" in " ".join(screen(verdict).split())
    verdict["figures"] = finding.figures | {"so on": {"soft": [P4], "nested": [WESTMERE]}}
    assert "soft: prescott-2005; hard: nowhere" in " ".join(screen(verdict).split())


def test_what_the_lab_cannot_run_is_the_reason(made_up_claim: str) -> None:
    found = claims.evaluate([made_up_claim], CELLS, [], absent={made_up_claim: {"soft": "no such technique here"}})[0]
    assert (found["verdict"], found["reason"]) == ("undecided", "no such technique here")


def test_the_generation_where_it_flips(made_up_claim: str) -> None:
    cells = [CELLS[0], cell("binary-translation", {"machine.alu": 1500, "bt.callout.system": 450}, memory="tracing"), CELLS[2]]
    found = claims.evaluate([made_up_claim], cells, [PENRYN, WESTMERE, "haswell-2013"])[0]
    assert found["verdict"] == "holds" and found["by_profile"]["haswell-2013"] == "fails"
    assert found["flips"] == [name for name, verdict in found["by_profile"].items() if verdict == "fails"]
