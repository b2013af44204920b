"""Every claim that is a list of checks: it holds on a run made up as its sentence says, and its falsifier flips it.

The made-up runs say per iteration what each mechanism would count. The real cells are judged by ``vmlab claims``; what is
tested here is that a claim can fail, and by what.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vmlab import claims, costs
from vmlab.claims import checks
from vmlab.claims.running import experiments
from vmlab.errors import ConfigError
from vmlab.experiment.gather import Gatherer
from vmlab.experiment.lab import Lab
from vmlab.ledger import EVENTS

ITERATIONS = 1000
Events = dict[str, float]

LOOP: Events = {"machine.alu": 2, "machine.branch": 1}
CALL: Events = {"interrupt.software": 1, "machine.iret": 1, "machine.int": 1, "machine.load": 40, "machine.alu": 60, "machine.store": 20}
#: What a system call of a 64-bit paravirtual guest has besides.
BOUNCE: Events = {"machine.syscall": 2, "trap.syscall": 2, "crossing.system_call": 1, "crossing.return": 1, "hypercall.iret": 1, "vmm.inject": 1,
                  "guest.side": 2}
TRAP: Events = {"trap.gp": 1, "vmm.decode": 1}
EXIT: Events = {"entry": 1, "vmcb.read": 8, "vmcb.write": 4}
#: A trace fault under shadow paging: the store is decoded and carried out, and a shadow entry follows.
TRACED: Events = EXIT | {"exit.page_fault": 2, "entry": 2, "vmm.decode": 1, "shadow.trace.write": 1, "vmm.shadow_update": 2}
FAULT: Events = {"fault.delivered.14": 1, "machine.iret": 1, "machine.load": 30, "machine.alu": 60}


def plus(*parts: Events) -> Events:
    return {kind: sum(part.get(kind, 0) for part in parts) for part_ in parts for kind in part_}


def times(n: float, part: Events) -> Events:
    return {kind: n * count for kind, count in part.items()}


#: Claim -> block -> what it counts an iteration. A block that is not named does LOOP. "outcome" is the digest of its end.
HOLDS: dict[str, dict[str, dict[str, Any]]] = {
    "translated-clean": {"native": {"retired.cli": 12, "retired.popf": 3}, "translated": {"machine.popf": 2, "translated.incache": 15}},
    "chaining": {"translated": {"translated.unit": 60, "bt.chain": 0.01, "bt.callout.chain": 0.01}},
    "pv-no-traps": {
        "paravirtual": {"trap.int": 9, "hypercall.port_io": 9, "trap.ud": 1, "emulate.prefix": 1, "emulate.cpuid": 1},
        "deprivileged": times(20, TRAP),
    },
    "one-kernel-both": {
        "native": {"retired.kernel": 6, "retired.cli": 1, "retired.sti": 1}, "paravirtual": {"retired.kernel": 10, "machine.store": 2},
    },
    "microkernel": {"services": {"trap.int": 2, "hypercall.port_io": 2}, "calls": {"crossing.system_call": 1, "crossing.return": 1}},
    "type2-correct-without-bt": {"trapping": times(4, TRAP), "silent": {"outcome": "wrong"}, "translated": {"machine.store": 20}},
    "resource-control": {name: {"interrupt.monitor": 0.001, "interrupt.delivered": 0.001} for name in ("trapped", "translated", "assisted")},
    "type2-world-switch": {
        "native": {"machine.in": 1, "machine.out": 1}, "own": TRAP | {"vmm.device": 1},
        "hosted": TRAP | {"host.world_switch": 4, "machine.load": 20, "machine.mov_to_cr": 12, "machine.lgdt": 8, "machine.out": 2},
    },
    "pagetables-not-privileged": {"stale": {"outcome": "wrong"}, "traced": {"shadow.trace.write": 1, "trap.pf": 1}},
    "pagetable-costly": {"native": {"machine.store": 1}, "soft": {"bt.callout.system": 0.5}, "hard": TRACED},
    "bt-beats-early-hw": {
        "forkwait-soft": {"bt.callout.system": 400}, "forkwait-hard": times(400, TRACED),
        "ptemod-soft": {"bt.callout.system": 1}, "ptemod-hard": TRACED,
        "in-soft": {"bt.callout.in": 1}, "in-hard": EXIT | {"exit.io": 1, "emulate.in": 1},
        "syscall-soft": {"bt.callout.system": 2}, "syscall-hard": {"machine.syscall": 1, "machine.sysret": 1},
        "callret-soft": {"bt.lookup.indirect": 1}, "callret-hard": {"machine.branch": 1, "machine.indirect": 1},
    },
    "server-io-mixed": {
        "server-soft": {"bt.callout.system": 20}, "server-hard": times(10, TRACED),
        "null_call-soft": {"bt.callout.system": 6}, "null_call-hard": CALL,
    },
    "hw-beats-sw-today": {
        f"{w}-{side}": TRAP if side == "soft" else {"machine.store": 1}
        for w in ("forkwait", "ptemod", "pgfault", "ctxsw", "null_call", "mmap") for side in ("soft", "hard")
    },
    "exits-dominate": {
        "native": {"machine.alu": 100}, "shadow": plus({"machine.alu": 100}, TRACED, EXIT | {"exit.io": 0.2}),
        "linux-native": {"machine.alu": 100, "machine.in": 3}, "linux-shadow": plus({"machine.alu": 100}, TRACED, times(3, EXIT | {"exit.io": 1}))},
    "shadow-eager-vs-lazy": {
        "ptemod-tracing": TRACED, "ptemod-lazy": EXIT | {"exit.page_fault": 0.1, "entry": 0.1},
        "ctxsw-tracing": EXIT | {"exit.cr_write": 2, "entry": 2},
        "ctxsw-lazy": EXIT | {"exit.cr_write": 2, "exit.page_fault": 12, "entry": 14, "shadow.fault.hidden": 12, "vmm.shadow_update": 12},
    },
    "guest-vs-hypervisor-faults": {
        "native": {"fault.delivered.14": 3}, "shadow": {"reflect.14": 3, "shadow.fault.hidden": 9, "exit.page_fault": 12},
    },
    "nested-no-exits": {"ptemod": {"machine.store": 1}, "ctxsw": {"machine.mov_to_cr": 2}, "pgfault": FAULT},
    "nested-walk": {
        "native": {"walk.reference.guest": 40, "tlb.miss.data": 10},
        "nested": {"walk.reference.guest": 40, "walk.reference.nested": 200, "tlb.miss.data": 10},
        "shadow": {"walk.reference.guest": 40, "tlb.miss.data": 10},
    },
    "pv-syscall-direct": {"native": CALL, "paravirtual": CALL},
    "pv-syscall-64": {"native": CALL, "assisted": CALL, "paravirtual": plus(CALL, BOUNCE)},
    "pv-batching": {
        "single": {"hypercall.mmu_update": 160, "mmu.update": 160}, "batched": {"hypercall.mmu_update": 10, "mmu.update": 160}},
    "pv-io-ring": {"ports": {"hypercall.port_io": 12}, "ring": {"hypercall.event_channel_op": 1}},
}

#: Claim -> what flips it: other counts of some blocks, or other costs by profile.
FALSIFIERS: list[tuple[str, dict[str, dict[str, Any]], dict[str, dict[str, float]]]] = [
    ("translated-clean", {"translated": {"machine.cli": 1, "retired.cli": 1}}, {}),
    ("chaining", {"translated": {"translated.unit": 50, "bt.callout.chain": 50, "bt.chain": 0.01}}, {}),
    ("translated-clean", {"translated": {"translated.sensitive": 1}}, {}),
    ("pv-no-traps", {"paravirtual": TRAP | {"emulate.cli": 1, "trap.ud": 1, "emulate.prefix": 1}}, {}),
    ("one-kernel-both", {"native": {"retired.kernel": 8, "retired.cli": 1, "retired.sti": 1}}, {}),
    ("microkernel", {"services": TRAP | {"emulate.out": 1, "trap.int": 2, "hypercall.port_io": 2}}, {}),
    ("microkernel", {"calls": {"crossing.system_call": 1}}, {}),
    ("microkernel", {}, {"prescott-2005": {"int.delivery": 20_000}}),
    ("type2-correct-without-bt", {"silent": {"outcome": "right"}}, {}),
    ("type2-correct-without-bt", {}, {"prescott-2005": {
        "exception.delivery": 1, "insn.iret": 1, "path.trap": 1, "path.decode": 1}}),
    ("resource-control", {"translated": {"machine.cli": 0.001}}, {}),
    ("resource-control", {"assisted": {"exit.interrupt": 0.001, "interrupt.injected": 0.001}}, {}),
    ("type2-world-switch", {"hosted": TRAP | {"vmm.device": 1}}, {}),
    ("pagetables-not-privileged", {"stale": {"outcome": "right", "trap.pf": 1}}, {}),
    ("pagetable-costly", {}, {"prescott-2005": {"entry": 233, "exit.page_fault": 193, "vmread": 5, "vmwrite": 5}}),
    ("bt-beats-early-hw", {}, {"prescott-2005": {
        "entry": 31, "exit.page_fault": 51, "exit.io": 38, "vmread": 1, "vmwrite": 1, "path.exit": 10, "path.decode": 10,
        "path.shadow_update": 10}}),
    ("server-io-mixed", {"server-hard": {"machine.alu": 10}}, {}),
    ("hw-beats-sw-today", {
        f"{w}-hard": EXIT | {"exit.cr_write": 9, "entry": 9}
        for w in ("forkwait", "ptemod", "pgfault", "ctxsw", "null_call", "mmap", "cli_sti")}, {}),
    ("exits-dominate", {"shadow": EXIT | {"exit.io": 1, "machine.alu": 100}}, {}),
    ("exits-dominate", {"linux-shadow": EXIT | {"exit.cpuid": 1, "machine.alu": 100}}, {}),
    ("exits-dominate", {"linux-shadow": plus({"machine.alu": 9000}, TRACED)}, {}),
    ("shadow-eager-vs-lazy", {"ctxsw-lazy": EXIT | {"exit.cr_write": 2, "entry": 2}}, {
        "prescott-2005": {"exit.cr_write": 100}}),
    ("guest-vs-hypervisor-faults", {"shadow": {"reflect.14": 4, "shadow.fault.hidden": 8}}, {}),
    ("nested-no-exits", {"ctxsw": {"exit.cr_write": 2}}, {}),
    ("nested-walk", {"nested": {"walk.reference.guest": 40, "tlb.miss.data": 10}}, {}),
    ("pv-syscall-direct", {"paravirtual": plus(CALL, {"trap.int": 1, "hypercall.iret": 1})}, {}),
    ("pv-syscall-64", {"paravirtual": CALL}, {}),
    ("pv-syscall-64", {"assisted": plus(CALL, {"exit.other": 1, "entry": 1})}, {}),
    ("pv-batching", {"batched": {"hypercall.mmu_update": 160, "mmu.update": 160}}, {}),
    ("pv-io-ring", {"ring": {"hypercall.event_channel_op": 12}}, {}),
]


def known(counts: dict[str, Any]) -> dict[str, float]:
    """The counts whose kinds the ledger has: parts of the machine that are not there yet count nothing."""
    return {kind: n for kind, n in counts.items() if kind in EVENTS}


def cells(claim: str, changed: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A finished cell for each block of the claim's experiment."""
    made = []
    for name, block in claims.load(claim).experiment.items():
        counts = dict({**HOLDS[claim], **changed}.get(name, {}))
        end = counts.pop("outcome", "right")
        events = {kind: round(n * ITERATIONS) for kind, n in plus(known(counts), LOOP).items()}
        parameters = {key: value for key, value in block.items() if key != "technique"}
        nested = parameters.get("memory") == "nested"
        platform = ("svm-npt" if nested else "svm") if block["technique"] == "hardware-assisted" else "x86"
        made.append({
            "technique": block["technique"], "parameters": parameters, "status": "ok", "platform": platform, "events": events,
            "work": {"operations": 2 * ITERATIONS, "iterations": ITERATIONS},
            "instructions": {"guest": {"user": 0, "kernel": 10 * ITERATIONS}, "machine": 10 * ITERATIONS},
            "phases": {"roi.warm": {"events": events}, "empty": {"events": {k: n * ITERATIONS for k, n in LOOP.items()}}},
            "fidelity": {"outcome": end},
        })
    return made


def patterns(claim: str) -> set[str]:
    """The event patterns that a claim's checks name."""
    rows = claims.load(claim).arguments.get("checks", [])
    return {p for row in rows for side in ("count", "price", "over") for p in row.get(side, {}).get("events", [])}


#: Patterns whose kinds the ledger does not have yet. One that it has by now fails the test below, so the list can only shrink.
NOT_YET: set[str] = set()


def waiting(claim: str) -> bool:
    return bool(patterns(claim) & NOT_YET)


def test_every_pattern_of_a_claim_names_kinds_of_the_ledger_or_waits_for_them() -> None:
    for name in claims.names():
        for pattern in patterns(name):
            try:
                checks.kinds([pattern])
                assert pattern not in NOT_YET, f"the ledger has {pattern} now: take it out of NOT_YET"
            except ConfigError:
                assert pattern in NOT_YET, f"{name}: {pattern}"


def judge(claim: str, changed: dict[str, dict[str, Any]], book: dict[str, dict[str, float]]) -> dict[str, Any]:
    altered = {name: costs.load(name).with_values(values) for name, values in book.items()}
    return claims.evaluate([claim], cells(claim, changed), ["prescott-2005", "haswell-2013"], costbook=altered)[0]


@pytest.mark.parametrize("claim", sorted(HOLDS))
def test_it_holds_where_the_sentence_is_true(claim: str) -> None:
    if waiting(claim):
        pytest.skip("the machine does not count these events yet")
    found = judge(claim, {}, {})
    assert found["verdict"] == "holds", found["reason"]


@pytest.mark.parametrize(("claim", "changed", "book"), FALSIFIERS, ids=[f"{i}-{row[0]}" for i, row in enumerate(FALSIFIERS)])
def test_its_falsifier_flips_it(claim: str, changed: dict[str, dict[str, Any]], book: dict[str, dict[str, float]]) -> None:
    if waiting(claim):
        pytest.skip("the machine does not count these events yet")
    found = judge(claim, changed, book)
    assert found["verdict"] == "fails", found["reason"]


def test_every_list_of_checks_has_a_made_up_run_and_a_falsifier() -> None:
    lists = {name for name in claims.names() if claims.load(name).predicate == "checks"}
    assert lists == set(HOLDS) == {claim for claim, _, _ in FALSIFIERS}
    for name in lists:
        named = {ref["cell"] for row in claims.load(name).arguments["checks"] for side in ("count", "price", "over")
                 if "cell" in (ref := row.get(side, {}))}
        assert named <= set(claims.load(name).experiment), name


@pytest.mark.parametrize("claim", sorted(HOLDS))
def test_without_its_cells_it_is_undecided_with_the_reason(claim: str) -> None:
    found = claims.evaluate([claim], [], ["prescott-2005"])[0]
    assert found["verdict"] == "undecided" and "no finished cell" in found["reason"]


def test_indirect_costs_wait_for_a_model_and_one_without_recovery_falsifies_them() -> None:
    assert claims.evaluate(["indirect-costs"], [], [])[0]["verdict"] == "undecided"
    cell = {"technique": "hardware-assisted", "parameters": {"workload": "cpuid"}, "status": "ok"}
    for cycles, verdict in ((900.0, "holds"), (0.0, "fails")):
        with_model = [cell | {"models": {"footprint": {"cycles_per_exit": cycles}}}]
        assert claims.evaluate(["indirect-costs"], with_model, [])[0]["verdict"] == verdict


def test_a_check_whose_cells_are_not_here_is_left_out_and_named() -> None:
    here = [cell for cell in cells("exits-dominate", {}) if cell["parameters"]["guest"] == "minios"]
    there = [cell for cell in cells("exits-dominate", {}) if cell["parameters"]["guest"] != "minios"]
    why = {"linux-native": "set VMLAB_GUEST_LINUX to the folder that it is in", "linux-shadow": "set VMLAB_GUEST_LINUX to the folder that it is in"}
    found = claims.evaluate(["exits-dominate"], here, ["prescott-2005"], absent={"exits-dominate": why})[0]
    assert found["verdict"] == "holds" and "not judged: Linux's boot" in found["reason"] and "set VMLAB_GUEST_LINUX" in found["reason"]
    found = claims.evaluate(["exits-dominate"], there, ["prescott-2005"])[0]
    assert found["verdict"] == "holds" and "not judged: memory's share of the exits" in found["reason"]
    found = claims.evaluate(["exits-dominate"], [], ["prescott-2005"], absent={"exits-dominate": why})[0]
    assert found["verdict"] == "undecided" and "set VMLAB_GUEST_LINUX" in found["reason"]


def test_a_guest_whose_image_is_not_here_is_no_failure_of_its_claim(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("VMLAB_GUEST_LINUX", raising=False)
    gatherer = Gatherer(Lab(), "claims", tmp_path)
    found, absent, skipped = experiments([claims.load("exits-dominate")], gatherer)
    assert absent == {"exits-dominate": {}}
    assert set(skipped["exits-dominate"]) == {"linux-native", "linux-shadow"}
    assert all("set VMLAB_GUEST_LINUX to the folder" in why for why in skipped["exits-dominate"].values())
    assert {cell.parameters["guest"] for cell in found["exits-dominate"]} == {"minios"}
