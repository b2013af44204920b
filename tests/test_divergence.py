"""Where two runs first part: found on programs whose first difference is known by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from machinelab import CODE, DEBUG_EXIT, asm, kernel

from vmlab import guests
from vmlab.errors import GuestError
from vmlab.experiment import divergence
from vmlab.experiment.cell import run_cell
from vmlab.experiment.divergence import first_divergence, record_steps
from vmlab.experiment.silent import first_silent
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
    assert divergence.symbol_at(symbols, 0x1010) == "loop"
    assert divergence.symbol_at(symbols, 0x1014) == "loop+0x4"
    assert divergence.symbol_at(symbols, 0x100F) == "begin+0xf"
    assert divergence.symbol_at(symbols, 0xFFF) == ""


def test_the_built_in_guests_difference_has_a_symbol() -> None:
    found = first_divergence("trap-and-emulate", {**SILENT, "guest": "nano", "workload": "pushf_popf", "iterations": 2, "density": 100})
    assert found is not None and found["symbol"] and found["suspect"]["instruction"].startswith("pushf")


@pytest.mark.parametrize(("source", "instruction", "shown"), [
    ("cli; pushfd;", "pushfd", "shows IF 1, not 0"),
    ("sti; nop; pushfd; pop eax; and eax, 0xfffffdff; push eax; popfd;", "popfd", "leaves IF 1, not 0"),
    ("sti; nop; pushfd; pop eax; or eax, 0x3000; push eax; popfd;", "popfd", "leaves IOPL 0, not 3"),
    ("sti; nop; push 2; push cs; push offset_; iretd;", "push cs", "shows a selector of ring 1"),
    ("sti; nop; sgdt [esp - 8];", "sgdt [esp - 8]", "shows the VMM's GDTR"),
    ("sti; nop; mov ax, ss;", "mov ax, ss", "shows a selector of ring 1"),
    ("sti; nop; mov ecx, 0x10; lar eax, ecx;", "lar eax, ecx", "shows a descriptor of ring 1"),
])
def test_the_first_instruction_that_goes_wrong_unseen(boots: Boots, source: str, instruction: str, shown: str) -> None:
    boots(kernel(source.replace("offset_", "0x10000") + "nop;" + END))
    found = first_silent(SILENT, 100_000)
    assert found is not None
    assert (found["instruction"], found["shown"]) == (instruction, shown)
    assert found["sentence"].endswith(f"'{instruction}' at {found['address']:#x}, which {shown}")


def test_what_traps_or_tells_the_truth_is_nothing_to_report(boots: Boots) -> None:
    """With IF on, PUSHF and POPF show and do what they should; CLI and STI trap."""
    boots(kernel("sti; nop; pushfd; popfd; mov ax, ds; smsw ax; cli; sti;" + END))
    assert first_silent(SILENT, 100_000) is None


def test_a_guest_that_ends_badly_under_classical_x86_says_what_went_wrong_first(boots: Boots) -> None:
    """A kernel that stops when PUSHF does not show what CLI did."""
    boots(kernel("cli; pushfd; pop eax; test eax, 0x200; mov eax, 3; jnz bad; xor eax, eax; bad:" + DEBUG_EXIT))
    cell = run_cell("trap-and-emulate", SILENT)
    assert cell["status"] == "failed"
    assert "exit code 3" in cell["error"] and "'pushfd'" in cell["error"] and "shows IF 1, not 0" in cell["error"]
    assert cell["fidelity"]["first_difference"]["instruction"] == "pushfd"
    assert run_cell("trap-and-emulate", TRAP)["status"] == "ok"
