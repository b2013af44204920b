"""Claims: each is data that loads, holds on a run made as it describes, and has a falsifier that flips it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import made_up_run
import pytest
from made_up_run import PROFILES

from vmlab import claims, costs
from vmlab.claims import PREDICATES
from vmlab.errors import ConfigError

NEEDED = {
    "cli-native-slow", "cli-bt-beats-native", "trap-vs-callout-vs-incache", "direct-execution", "popf-silent", "fidelity-all",
    "exit-cost-falls", "resource-control", "popek-goldberg", "ring-visible",
}
PROBE = {"rows": [
    {"instruction": name, "cpl0": "", "cpl1": "", "cpl3": "", "verdict": verdict}
    for name, verdict in {
        "cli": "traps", "lgdt": "traps", "sgdt": "same", "sidt": "same", "smsw": "same", "str": "silently different",
        "popf": "silently different", "pushf": "same", "push_seg": "silently different",
    }.items()
]}


@pytest.fixture(scope="module")
def run() -> list[dict[str, Any]]:
    return made_up_run.cells(densities=(50, 500))


def judge(claim: str, cells: list[dict[str, Any]], profiles: list[str] = PROFILES, **more: Any) -> dict[str, Any]:
    return claims.evaluate([claim], cells, profiles, **more)[0]


def altered(name: str, **values: float) -> dict[str, costs.Profile]:
    """A profile with other costs; ``__`` in a keyword stands for a dot."""
    return {name: costs.load(name).with_values({key.replace("__", "."): value for key, value in values.items()})}


def changed(
    cells: list[dict[str, Any]], technique: str, workload: str, way: made_up_run.Way, **told: str,
) -> list[dict[str, Any]]:
    """The run with one strategy broken: it does ``way`` for each of the workload's instructions."""
    made = []
    for cell in cells:
        parameters = cell["parameters"]
        hit = cell["technique"] == technique and parameters["workload"] == workload
        if hit and all(parameters.get(key) == value for key, value in told.items()):
            of = {key: parameters[key] for key in ("sensitive", "emulation") if key in parameters}
            cell = made_up_run.cell(
                technique, of, workload, parameters["density"], dict.fromkeys(made_up_run.NAMED[workload], way),
            )
        made.append(cell)
    return made


def test_every_claim_is_complete_and_its_predicate_exists() -> None:
    assert set(claims.names()) >= NEEDED
    for name in claims.names():
        claim = claims.load(name)
        assert claim.predicate in PREDICATES
        assert claim.falsifier and claim.scope and claim.source


def test_an_unknown_claim_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="popf-silent"):
        claims.load("popf-silnt")


def test_an_unknown_profile_is_refused(run: list[dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match="prescott-2005"):
        judge("cli-native-slow", run, ["prescot-2005"])


@pytest.mark.parametrize("claim", sorted(NEEDED))
def test_without_evidence_the_verdict_is_undecided_with_a_reason_or_needs_none(claim: str) -> None:
    found = judge(claim, [])
    cited = claims.load(claim).kind == "cited"
    assert found["verdict"] == ("holds" if cited else "undecided")
    assert found["reason"]


def test_claims_are_judged_in_the_order_asked(run: list[dict[str, Any]]) -> None:
    ids = ["popf-silent", "cli-native-slow", "direct-execution"]
    assert [claim["id"] for claim in claims.evaluate(ids, run, PROFILES)] == ids


def test_cli_is_slow_on_the_deep_pipeline_only() -> None:
    found = judge("cli-native-slow", [])
    assert found["verdict"] == "holds" and found["calibrated"]
    assert found["by_profile"]["prescott-2005"] == "holds"
    assert found["by_profile"]["penryn-2008"] == found["by_profile"]["k8-2005"] == "fails"


def test_cli_native_slow_is_falsified_by_penryns_cli() -> None:
    book = altered("prescott-2005", insn__cli=5, insn__sti=8)
    assert judge("cli-native-slow", [], costbook=book)["verdict"] == "fails"


def test_the_translated_pair_beats_the_native_one_where_cli_is_slow(run: list[dict[str, Any]]) -> None:
    found = judge("cli-bt-beats-native", run)
    assert found["verdict"] == "holds"
    figures = found["figures"]["prescott-2005"]
    assert figures["native"] == pytest.approx(124)
    assert figures["translated"] < 40
    assert "penryn-2008" in found["figures"]["stops"] and "prescott-2005" not in found["figures"]["stops"]


def test_cli_bt_beats_native_is_falsified_by_a_cheap_cli(run: list[dict[str, Any]]) -> None:
    book = altered("prescott-2005", insn__cli=2, insn__sti=2)
    assert judge("cli-bt-beats-native", run, costbook=book)["verdict"] == "fails"


def test_cli_bt_beats_native_is_falsified_by_a_translator_that_calls_out(run: list[dict[str, Any]]) -> None:
    broken = changed(run, "binary-translation", "cli_sti", {"bt.callout.cli": 1, "emulate.cli": 1}, emulation="in-cache")
    assert judge("cli-bt-beats-native", broken)["verdict"] == "fails"


def test_the_steady_state_is_what_counts_where_the_run_has_one(run: list[dict[str, Any]]) -> None:
    whole = judge("cli-bt-beats-native", run)["figures"]["prescott-2005"]["translated"]
    warm = [
        cell | {"phases": {"roi.warm": {"events": {k: n for k, n in cell["events"].items() if not k.startswith("bt.translate")}}}}
        for cell in run
    ]
    assert judge("cli-bt-beats-native", warm)["figures"]["prescott-2005"]["translated"] < whole - 5


def test_trap_callout_and_cache_cost_what_was_published(run: list[dict[str, Any]]) -> None:
    found = judge("trap-vs-callout-vs-incache", run)
    assert found["verdict"] == "holds" and found["calibrated"]
    figures = found["figures"]["prescott-2005"]
    assert figures["trap"] == pytest.approx(2030, rel=0.02) and figures["callout"] == pytest.approx(1254, rel=0.02)
    assert found["by_profile"].keys() == set(PROFILES)


def test_trap_vs_callout_is_falsified_by_a_cheap_trap(run: list[dict[str, Any]]) -> None:
    book = altered("prescott-2005", exception__delivery=20, insn__iret=20, path__trap=20, path__decode=20)
    assert judge("trap-vs-callout-vs-incache", run, costbook=book)["verdict"] == "fails"


def test_a_cell_that_did_not_use_its_mechanism_is_not_compared(run: list[dict[str, Any]]) -> None:
    leaky = changed(run, "binary-translation", "rdtsc", {"bt.callout.rdtsc": 1, "emulate.rdtsc": 1}, emulation="in-cache")
    found = judge("trap-vs-callout-vs-incache", leaky)
    assert found["verdict"] == "undecided" and "bt.callout.rdtsc" in found["reason"]


def test_cells_of_other_work_are_not_compared(run: list[dict[str, Any]]) -> None:
    cells = [
        cell | {"parameters": cell["parameters"] | {"iterations": 7}}
        if cell["technique"] == "trap-and-emulate" and cell["parameters"]["workload"] == "rdtsc" else cell
        for cell in run
    ]
    assert judge("trap-vs-callout-vs-incache", cells)["verdict"] == "undecided"


def test_computing_runs_directly_and_costs_nothing_and_both_can_be_falsified(run: list[dict[str, Any]]) -> None:
    steady = [
        cell | {"phases": {"roi.warm": {"events": {k: n for k, n in cell["events"].items() if not k.startswith("bt.")}}}}
        for cell in run
    ]
    found = judge("direct-execution", steady)
    assert found["verdict"] == "holds" and not found["calibrated"]
    emulating = [
        cell | {"efficiency": {"retired": 0.9, "translated": 0.0, "emulated": 0.1}}
        if cell["technique"] == "paravirtualization" else cell for cell in steady
    ]
    assert judge("direct-execution", emulating)["verdict"] == "fails"
    # What is said is never rounded up to the whole.
    for emulated, words in ((0.0, "all of"), (2e-6, "at least 99.9998 %"), (0.00056, "at least 99.94 %")):
        cells = [cell | {"efficiency": {"retired": 1 - emulated, "translated": 0.0, "emulated": emulated}} for cell in steady]
        assert judge("direct-execution", cells)["reason"].startswith(f"{words} the guest's instructions" if not emulated else words)
    assert judge("direct-execution", run)["verdict"] == "fails", "a fifth of the time goes into translating"


def test_popf_is_silent_and_a_popf_that_traps_falsifies_it(run: list[dict[str, Any]]) -> None:
    found = judge("popf-silent", run)
    assert found["verdict"] == "holds"
    assert found["figures"]["first_difference"]["line"] == 3
    mended = [outcome(cell, "pushf_popf-1000") if wrong(cell) else cell for cell in run]
    assert judge("popf-silent", mended)["verdict"] == "fails"


def test_popf_silent_needs_the_trapping_machine_to_go_right(run: list[dict[str, Any]]) -> None:
    both = [outcome(c, "other") if c["parameters"].get("sensitive") and "popf" in c["parameters"]["workload"] else c for c in run]
    found = judge("popf-silent", both)
    assert found["verdict"] == "fails" and "not what decides" in found["reason"]


def test_fidelity_lists_declared_exceptions_and_any_other_difference_falsifies_it(run: list[dict[str, Any]]) -> None:
    found = judge("fidelity-all", run)
    assert found["verdict"] == "holds" and len(found["figures"]["declared"]) == 1
    broken = [
        outcome(cell, "other") if cell["technique"] == "binary-translation" and cell["parameters"]["workload"] == "pushf_popf"
        else cell for cell in run
    ]
    found = judge("fidelity-all", broken)
    assert found["verdict"] == "fails" and "binary-translation on pushf_popf" in found["reason"]


def test_fidelity_is_undecided_while_a_cell_failed(run: list[dict[str, Any]]) -> None:
    failed = [*run, run[1] | {"status": "failed"}]
    assert judge("fidelity-all", failed)["verdict"] == "undecided"


def wrong(cell: dict[str, Any]) -> bool:
    return bool(cell["fidelity"]["outcome"].endswith("-wrong"))


def outcome(cell: dict[str, Any], digest: str) -> dict[str, Any]:
    return cell | {"fidelity": cell["fidelity"] | {"outcome": digest}}


def test_exits_became_cheap_and_a_dear_haswell_falsifies_it() -> None:
    found = judge("exit-cost-falls", [])
    assert found["verdict"] == "holds" and found["calibrated"]
    assert found["figures"]["cycles"]["prescott-2005"] == 3963
    assert found["figures"]["factor"] == pytest.approx(3963 / 746, abs=0.01) and found["figures"]["years"] == 5
    penryn = costs.load("penryn-2008")
    dear = {key: penryn.costs[key].value for key in ("entry", "exit.vmmcall")}
    book = {"westmere-2010": costs.load("westmere-2010").with_values(dear)}
    assert judge("exit-cost-falls", [], [*PROFILES, "westmere-2010"], costbook=book)["verdict"] == "fails"


def test_exit_cost_names_its_own_profiles() -> None:
    found = judge("exit-cost-falls", [], ["k8-2005"])
    assert found["verdict"] == "holds" and list(found["figures"]["cycles"]) == ["prescott-2005", "westmere-2010"]


def test_popek_goldberg_counts_violators_against_the_published_lists() -> None:
    found = judge("popek-goldberg", [], probe=PROBE)
    assert found["verdict"] == "holds"
    assert found["figures"]["violators"] == ["popf", "push_seg", "pushf", "sgdt", "sidt", "smsw", "str"]
    counts = sorted(published["count"] for published in found["figures"]["published"].values())
    assert counts == [14, 18, 19]


def test_popek_goldberg_is_falsified_by_a_cpu_on_which_all_trap() -> None:
    all_trap = {"rows": [row | {"verdict": "traps"} for row in PROBE["rows"]]}
    assert judge("popek-goldberg", [], probe=all_trap)["verdict"] == "fails"


def test_the_ring_is_visible_and_umip_falsifies_it() -> None:
    assert judge("ring-visible", [], probe=PROBE)["verdict"] == "holds"
    trapping = ("smsw", "sgdt", "str")
    umip = {"rows": [row | {"verdict": "traps"} if row["instruction"] in trapping else row for row in PROBE["rows"]]}
    assert judge("ring-visible", [], probe=umip)["verdict"] == "fails"


def test_claims_and_report_import_neither_unicorn_nor_the_machine() -> None:
    code = (
        "import sys, vmlab.claims, vmlab.report; vmlab.claims.evaluate(['exit-cost-falls'], [], vmlab.costs.names());"
        "bad = [m for m in sys.modules if m.split('.')[0] in ('unicorn', 'capstone', 'matplotlib')"
        " or m.startswith(('vmlab.machine', 'vmlab.strategies', 'vmlab.vmm', 'vmlab.guests'))]; sys.exit(repr(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


RINGS = [{"access": f"{word} of a supervisor page", "bits": 64, "cpl0": "runs", "cpl1": "runs", "cpl3": "#PF"} for word in ("read", "write")]


def test_rings_collapse_and_a_paging_that_tells_ring_1_falsifies_it() -> None:
    assert judge("ring-compression", [], probe={"rings": RINGS})["verdict"] == "holds"
    assert judge("ring-compression", [], probe={"rings": [RINGS[0], RINGS[1] | {"cpl1": "#PF"}]})["verdict"] == "fails"
    assert judge("ring-compression", [], probe={"rings": [RINGS[0] | {"cpl3": "runs"}]})["verdict"] == "fails"
    assert judge("ring-compression", [], probe=PROBE)["verdict"] == "undecided"
