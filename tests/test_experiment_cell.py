"""What a worker makes of one run: phases that partition the counts, the empty loop, what a technique cannot carry, the disk."""

from __future__ import annotations

import pytest

from vmlab import guests
from vmlab.experiment.cell import Run, run_cell
from vmlab.ledger import Snapshot

NULL_CALL = {"guest": "minios", "workload": "null_call", "iterations": 300}


def test_phases_partition_what_was_counted_and_the_empty_loop_is_one_of_them() -> None:
    run = Run("native", NULL_CALL)
    run.go()
    phases = run.phases()
    assert list(phases) == ["boot", "roi.cold", "roi.warm", "exit", "empty"]
    total = Snapshot()
    for phase in phases.values():
        total = total.plus(phase)
    assert total == run.strategy.snapshot().minus(Snapshot())
    # 300 rounds of an empty loop in user mode, against 300 calls: the kernel runs in one of them only.
    assert phases["roi.warm"].events["interrupt.software"] == 300
    assert phases["empty"].kernel == 0 and 600 <= phases["empty"].user < 1000


def test_a_guest_without_an_empty_loop_has_no_such_phase() -> None:
    cell = run_cell("native", {"guest": "nano", "workload": "cli_sti", "iterations": 20, "density": 100})
    assert list(cell["phases"]) == ["boot", "roi.cold", "roi.warm", "exit"]


def test_what_a_technique_cannot_carry_is_unsupported_with_the_reason() -> None:
    cell = run_cell("trap-and-emulate", {**NULL_CALL, "memory": "static", "sensitive": "trap"})
    assert (cell["status"], cell["platform"]) == ("unsupported", "x86")
    assert "paging" in cell["error"]


def test_the_disks_final_content_is_part_of_the_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = {"guest": "minios", "workload": "io", "iterations": 3}
    usual = run_cell("native", parameters)
    assert usual["status"] == "ok" and usual["events"]["interrupt.delivered"] > 0
    assert run_cell("native", parameters)["fidelity"] == usual["fidelity"]
    # A byte that the guest neither reads nor writes makes another outcome.
    content = guests.disk(parameters)
    assert content is not None
    monkeypatch.setattr(guests, "disk", lambda _: content[:-1] + bytes([content[-1] ^ 1]))
    other = run_cell("native", parameters)
    assert other["console"] == usual["console"] and other["fidelity"]["outcome"] != usual["fidelity"]["outcome"]


@pytest.mark.parametrize(("technique", "memory", "platform"), [
    ("native", "", "x86"), ("binary-translation", "lazy", "x86"), ("paravirtualization", "direct", "x86"),
    ("hardware-assisted", "lazy", "svm"), ("hardware-assisted", "nested", "svm-npt")])
def test_a_guest_in_long_mode_needs_a_cpu_that_has_it(technique: str, memory: str, platform: str) -> None:
    more = {"memory": memory} if memory else {}
    for guest, bits in (("minios", ""), ("minios64", "-64")):
        cell = run_cell(technique, {"guest": guest, "workload": "syscall", "iterations": 1, **more})
        assert (cell["status"], cell["platform"]) == ("ok", platform + bits)
