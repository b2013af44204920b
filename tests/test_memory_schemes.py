"""The operating system guest under every memory scheme: the bare machine's outcome, and as many guest instructions.

A few workloads by default; all of them, in both widths, with ``python -m pytest tests/test_memory_schemes.py -m slow``.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

from vmlab import guests
from vmlab.experiment.cell import run_cell

Cell = dict[str, Any]
#: (technique, memory) that carry a paged guest faithfully.
_ASSISTED = [("hardware-assisted", "tracing"), ("hardware-assisted", "lazy"), ("hardware-assisted", "nested")]
_DEPRIVILEGED = [(technique, memory) for technique in ("trap-and-emulate", "binary-translation") for memory in ("tracing", "lazy")]
SCHEMES = dict.fromkeys(("minios", "minios64"), (*_DEPRIVILEGED, *_ASSISTED))
#: Instructions depend on when interrupts arrive, and that on what the VMM does: only the outcome must be equal.
WITH_DEVICES = frozenset({"build", "mixed", "io", "idle"})
QUICK = ("ptemod", "protfault", "ctxsw")
#: Besides, by default, of the 32-bit guest.
USUAL = ("syscall", "forkwait", "pagefault", "random")


@functools.cache
def run(guest: str, workload: str, technique: str, memory: str = "") -> Cell:
    more = {"memory": memory} if memory else {}
    if technique == "trap-and-emulate":
        more["sensitive"] = "trap"
    return run_cell(technique, {"guest": guest, "workload": workload, "iterations": 5, **more})


def check(guest: str, workload: str, technique: str, memory: str) -> Cell:
    native, cell = run(guest, workload, "native"), run(guest, workload, technique, memory)
    assert cell["status"] == native["status"] == "ok", cell["error"]
    assert cell["fidelity"]["outcome"] == native["fidelity"]["outcome"]
    if workload not in WITH_DEVICES:
        assert cell["instructions"]["guest"] == native["instructions"]["guest"]
    return cell


_CASES = [(guest, technique, memory) for guest, schemes in SCHEMES.items() for technique, memory in schemes]


@pytest.mark.parametrize("workload", QUICK)
@pytest.mark.parametrize(("guest", "technique", "memory"), _CASES)
def test_the_guest_does_what_it_does_on_the_bare_machine(guest: str, technique: str, memory: str, workload: str) -> None:
    check(guest, workload, technique, memory)


@pytest.mark.parametrize("workload", USUAL)
@pytest.mark.parametrize(("guest", "technique", "memory"), [
    *(("minios", *scheme) for scheme in SCHEMES["minios"]), *((guest, "paravirtualization", "direct") for guest in SCHEMES)])
def test_usual_operations_do_what_they_do_on_the_bare_machine(guest: str, technique: str, memory: str, workload: str) -> None:
    if technique != "paravirtualization":
        check(guest, workload, technique, memory)
        return
    native, cell = run(guest, workload, "native"), run(guest, workload, technique, memory)
    assert cell["status"] == native["status"] == "ok", cell["error"]
    assert cell["fidelity"]["outcome"] == native["fidelity"]["outcome"]  # a ported kernel runs other instructions


@pytest.mark.slow
@pytest.mark.parametrize("workload", [name for name in guests.workloads("minios") if name not in ("bad", *QUICK)])
@pytest.mark.parametrize(("guest", "technique", "memory"), _CASES)
def test_every_workload_does_what_it_does_on_the_bare_machine(guest: str, technique: str, memory: str, workload: str) -> None:
    check(guest, workload, technique, memory)


@pytest.mark.parametrize("guest", SCHEMES)
def test_nested_paging_never_exits_for_the_guests_own_memory_management(guest: str) -> None:
    """In the region of interest: no control register, no page fault, no INVLPG; pages touched for the first time aside."""
    for workload in QUICK:
        events = check(guest, workload, "hardware-assisted", "nested")["events"]
        exits = {kind for kind in events if kind.startswith("exit.")} - {"exit.io", "exit.nested_page_fault"}
        assert exits == set(), workload
        assert events.get("exit.nested_page_fault", 0) == events.get("nested.fault", 0)


def test_lazy_fill_exits_for_every_invlpg_and_cr3_load_and_tracing_for_every_table_store() -> None:
    native = run("minios", "ptemod", "native")["events"]
    lazy = check("minios", "ptemod", "hardware-assisted", "lazy")["events"]
    assert lazy.get("exit.invlpg", 0) == native.get("retired.invlpg", 0)
    traced = check("minios", "ptemod", "hardware-assisted", "tracing")["events"]
    assert "exit.invlpg" not in traced
    assert traced["shadow.trace.write"] == traced["emulate.other"] > 0
    assert "shadow.trace.write" not in lazy
