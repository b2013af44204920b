"""What every technique must do, whoever wrote it: ``python -m pytest tests/test_conformance.py --technique FILE.py:CLASS``.

That the fast path and the portable one give the same record in all of it: ``-m slow``.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

from vmlab import guests, strategies
from vmlab.experiment.cell import run_cell
from vmlab.machine import fast
from vmlab.strategies.trap_and_emulate import SENSITIVE

Cell = dict[str, Any]
WORKLOADS = tuple(guests.workloads("nano"))
_ITERATIONS = {"compute": 3, "interrupt": 12, "mixed": 12}


@functools.cache
def run(technique: str, workload: str, **more: str) -> Cell:
    return run_cell(technique, {"guest": "nano", "workload": workload, "iterations": _ITERATIONS.get(workload, 200), "density": 100, **more})


def variants(technique: str) -> list[dict[str, str]]:
    """The defaults, and every other choice of a parameter, one at a time; memory aside: nano is unpaged."""
    parameters = strategies.load(technique).parameters
    return [{}] + [
        {name: choice} for name, parameter in parameters.items() if name not in ("memory", "nested_page")
        for choice in parameter.choices or () if choice != parameter.default
    ]


@pytest.mark.parametrize("workload", WORKLOADS)
def test_the_outcome_is_the_bare_machines_unless_declared_otherwise(technique: str, workload: str) -> None:
    native = run("native", workload)
    for variant in variants(technique):
        cell = run(technique, workload, **variant)
        declared = strategies.load(technique).unfaithful(workload, variant)
        assert cell["status"] == "ok", cell["error"]
        assert (cell["fidelity"]["outcome"] == native["fidelity"]["outcome"]) == (declared is None), variant


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_second_run_is_the_same(technique: str, workload: str) -> None:
    first = run(technique, workload)
    again = run_cell(technique, first["parameters"])
    for key in ("events", "instructions", "phases", "fidelity", "work", "console"):
        assert again[key] == first[key], key


@pytest.mark.parametrize(("workload", "culprit"), [("pushf_popf", "pushf"), ("interrupt", "iret"), ("mixed", "pushf")])
def test_silent_x86_goes_wrong_where_it_is_known_to(workload: str, culprit: str) -> None:
    difference = run("trap-and-emulate", workload, sensitive="silent")["fidelity"]["first_difference"]
    assert difference["suspect"]["instruction"].startswith(culprit)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_every_trap_was_emulated_or_reflected(workload: str) -> None:
    for sensitive in ("silent", "trap"):
        events = run("trap-and-emulate", workload, sensitive=sensitive)["events"]
        handled = sum(n for kind, n in events.items() if kind.startswith("emulate.")) + events.get("reflect.13", 0)
        assert events.get("trap.gp", 0) == handled


@pytest.mark.parametrize("workload", [w for w in WORKLOADS if w not in ("interrupt", "mixed")])
def test_traps_follow_from_what_the_bare_machine_ran(workload: str) -> None:
    """#GPs = the native run's privileged and sensitive instructions; RDTSC traps because the VMM sets CR4.TSD."""
    privileged = {"cli", "sti", "hlt", "in", "out", "rdtsc", "mov_to_cr", "mov_from_cr", "lgdt", "lidt", "ltr", "int"} | SENSITIVE
    native = run("native", workload)["events"]
    expected = sum(native.get(f"retired.{op}", 0) for op in privileged)
    assert run("trap-and-emulate", workload, sensitive="trap")["events"].get("trap.gp", 0) == expected


def test_hardware_assistance_exits_for_cpuid_and_not_for_cli() -> None:
    assert not any(kind.startswith("exit.") for kind in run("hardware-assisted", "cli_sti")["events"])
    cell = run("hardware-assisted", "cpuid")
    assert cell["events"]["exit.cpuid"] == cell["work"]["operations"] == run("native", "cpuid")["events"]["retired.cpuid"]


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_paravirtual_guest_raises_no_general_protection(workload: str) -> None:
    assert "trap.gp" not in run("paravirtualization", workload)["events"]


@pytest.mark.parametrize("workload", WORKLOADS)
def test_translated_kernels_retire_no_sensitive_instruction(workload: str) -> None:
    for emulation in ("in-cache", "callout"):
        events = run("binary-translation", workload, emulation=emulation)["events"]
        assert not events.get("retired.kernel", 0)
        assert not [op for op in SENSITIVE | {"cli", "sti", "hlt", "in", "out"} if f"retired.{op}" in events]


# ---- the fast path and the portable one
def _without_host(technique: str, path: str, monkeypatch: pytest.MonkeyPatch, **parameters: Any) -> Cell:
    """The cell's record, its ledgers by phase included, without what speaks of the host."""
    monkeypatch.setenv("VMLAB_MACHINE", path)
    cell = run_cell(technique, parameters)
    assert cell.pop("machine_path", path) == path
    del cell["host_seconds"]
    return cell


@pytest.mark.slow
@pytest.mark.parametrize("workload", WORKLOADS)
def test_both_paths_give_the_same_record(technique: str, workload: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under every choice of every parameter."""
    if reason := fast.why_not():
        pytest.skip(f"no C library here: {reason}")
    for variant in variants(technique):
        parameters = {"guest": "nano", "workload": workload, "iterations": _ITERATIONS.get(workload, 200), "density": 100, **variant}
        quick, portable = (_without_host(technique, path, monkeypatch, **parameters) for path in ("fast", "portable"))
        assert quick == portable, variant


@pytest.mark.slow
@pytest.mark.parametrize("guest", ["minios", "minios64"])
@pytest.mark.parametrize("workload", [name for name in guests.workloads("minios") if name != "bad"])
def test_both_paths_give_the_same_record_of_an_operating_system(technique: str, guest: str, workload: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under every memory scheme that carries a paging guest."""
    if reason := fast.why_not():
        pytest.skip(f"no C library here: {reason}")
    memory = strategies.load(technique).parameters.get("memory")
    for scheme in [choice for choice in memory.choices or () if choice not in ("static", "none")] if memory else [""]:
        more = {"memory": scheme} if scheme else {}
        if technique == "trap-and-emulate":
            more["sensitive"] = "trap"
        parameters = {"guest": guest, "workload": workload, "iterations": 3, **more}
        quick, portable = (_without_host(technique, path, monkeypatch, **parameters) for path in ("fast", "portable"))
        assert quick == portable, more
