"""Where two runs first part: found on programs whose first difference is known by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from machinelab import CODE, DEBUG_EXIT, asm, kernel

from vmlab import guests
from vmlab.errors import GuestError
from vmlab.experiment import divergence
from vmlab.experiment.divergence import first_divergence, record_steps
from vmlab.guests import GuestImage

SILENT = {"guest": "test", "sensitive": "silent"}
TRAP = {"guest": "test", "sensitive": "trap"}
Boots = Callable[[GuestImage], None]
END = "xor eax, eax;" + DEBUG_EXIT


@pytest.fixture
def boots(monkeypatch: pytest.MonkeyPatch) -> Boots:
    """Makes the guest called "test" a small kernel."""
    def use(image: GuestImage) -> None:
        monkeypatch.setattr(guests, "load", lambda name, *_: image)
        monkeypatch.setattr(guests, "workloads", lambda name: {})
    return use


def test_no_divergence_is_none(boots: Boots) -> None:
    boots(kernel("cli; mov ecx, 3; l: inc ebx; loop l; sti; cli;" + END))
    assert first_divergence("trap-and-emulate", SILENT) is None
    assert first_divergence("native", {"guest": "test"}) is None


def test_the_first_instruction_that_shows_a_difference_is_named_with_its_cause(boots: Boots) -> None:
    """CLI is emulated on the virtual IF; silent PUSHF pushes the real one, and POP EBX is where it shows."""
    source = "cli; nop; pushfd; pop ebx; nop;" + END
    boots(kernel(source))
    found = first_divergence("trap-and-emulate", SILENT)
    assert found is not None
    pop = CODE + len(asm("cli; nop; pushfd"))
    assert (found["address"], found["instruction"]) == (pop, "pop ebx")
    assert list(found["registers"]) == ["ebx"]
    natively, here = found["registers"]["ebx"]
    assert natively ^ here == 1 << 9 and here & 1 << 9  # IF, which the deprivileged guest sees on
    assert found["suspect"] == {"address": pop - 1, "symbol": "", "instruction": "pushfd"}
    assert first_divergence("trap-and-emulate", TRAP) is None


def test_another_path_is_a_difference_in_eip(boots: Boots) -> None:
    """The test of bit 0 of CS tells ring 1 from ring 0, and the branch goes elsewhere."""
    boots(kernel(f".byte 0x0e; test dword ptr [esp], 1; jnz away; nop; away: nop;{END}"))
    found = first_divergence("trap-and-emulate", SILENT)
    assert found is not None
    assert found["instruction"].startswith("jne") and list(found["registers"]) == ["eip"]
    assert found["suspect"]["instruction"].startswith("push")


def test_a_fault_that_the_vmm_handled_unseen_is_no_step(boots: Boots) -> None:
    boots(kernel("cli; cli; nop;" + END))
    run, steps = record_steps("trap-and-emulate", SILENT)
    assert run.machine.console == b""
    at = [address for address, _ in steps]
    assert at.count(CODE) == 1 and at.count(CODE + 1) == 1


def test_only_so_many_instructions_are_compared(boots: Boots) -> None:
    """What differs behind the limit is not looked for; the run's own end (its budget) is no error here."""
    boots(kernel("mov ecx, 5000; l: nop; loop l; pushfd; pop ebx;" + END))
    assert first_divergence("trap-and-emulate", SILENT, limit=2000) is None
    found = first_divergence("trap-and-emulate", SILENT, limit=20_000)
    assert found is not None and found["step"] > 10_000


def test_runs_that_differ_from_the_start_are_refused(monkeypatch: pytest.MonkeyPatch, boots: Boots) -> None:
    boots(kernel(END))
    run, steps = record_steps("native", {"guest": "test"})
    other = [(address + 1, registers) for address, registers in steps]
    answers = iter([(run, steps), (run, other)])
    monkeypatch.setattr(divergence, "record_steps", lambda *_: next(answers))
    with pytest.raises(GuestError, match="before their first instruction"):
        first_divergence("trap-and-emulate", SILENT)


def test_symbols_name_the_nearest_place_below() -> None:
    symbols = {"begin": 0x1000, "loop": 0x1010}
    assert divergence._symbol(symbols, 0x1010) == "loop"
    assert divergence._symbol(symbols, 0x1014) == "loop+0x4"
    assert divergence._symbol(symbols, 0x100F) == "begin+0xf"
    assert divergence._symbol(symbols, 0xFFF) == ""


def test_the_built_in_guests_difference_has_a_symbol() -> None:
    found = first_divergence("trap-and-emulate", {**SILENT, "guest": "nano", "workload": "pushf_popf", "iterations": 2, "density": 100})
    assert found is not None and found["symbol"] and found["suspect"]["instruction"].startswith("pushf")
