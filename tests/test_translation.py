"""The translator: units, chains, look-ups, states, counted by hand; and `vmlab translate`."""

from __future__ import annotations

import json
from typing import Any

import pytest
from machinelab import CODE, DATA, DEBUG_EXIT, PATHS, STACK0, asm, kernel

from vmlab.cli.main import main
from vmlab.errors import GuestError, UnsupportedByStrategy
from vmlab.machine.pc import Machine
from vmlab.strategies.native import Native
from vmlab.strategies.translation import BinaryTranslation
from vmlab.vmm.translation.listing import listing

END = f"cli; xor eax, eax; {DEBUG_EXIT}"
#: After Adams & Agesen's example (§3.1), in our own words: is EDI a prime number? EAX = 1 if so.
IS_PRIME = ("f: mov ecx, edi; mov esi, 2; cmp esi, ecx; jge yes; next: mov eax, ecx; cdq; idiv esi; test edx, edx; jz no;"
            "inc esi; cmp esi, ecx; jl next; yes: mov eax, 1; ret; no: xor eax, eax; ret")


def run(source: str, handlers: Any = None, budget: int = 100_000, **parameters: Any) -> BinaryTranslation:
    guest = BinaryTranslation(Machine(), parameters)
    guest.load(kernel(source, handlers), "")
    guest.run(budget)
    return guest


def test_the_published_example_makes_four_units_and_leaves_two_continuations_never_taken() -> None:
    """isPrime(49): the function itself, the loop's head, its tail, and "not prime"; both ways to "prime" stay unmapped."""
    guest = run(f"jmp start; {IS_PRIME}; start: mov edi, 49; call f; mov [{DATA:#x}], eax; {END}")
    assert guest.read_guest(DATA, 4) == bytes(4)
    first, end = CODE + 2, CODE + 2 + len(asm(IS_PRIME, CODE + 2))
    inside = [u for u in listing(guest.translator, guest.machine.counter) if first <= u["guest"] < end]
    assert [u["executed"] for u in inside] == [1, 6, 5, 1]      # 49 is divided by 2, 3, 4, 5, 6 and 7
    waiting = [leaving["to"] for u in inside for leaving in u["exits"] if not leaving["chained"]]
    assert len(waiting) == 2
    assert len(set(waiting)) == 1
    kinds = {piece["kind"] for u in inside for piece in u["pieces"]}
    assert kinds == {"identical", "control flow"}


def test_a_loop_enters_the_monitor_only_until_it_is_chained() -> None:
    counts = [run(f"mov ecx, {n}; l: cli; sti; nop; dec ecx; jnz l; {END}").counts for n in (10, 10_000)]
    for kind in ("bt.callout.chain", "bt.translate.unit", "bt.chain"):
        assert counts[0][kind] == counts[1][kind], kind


def test_units_executed_and_lookups_are_counted_by_the_machine() -> None:
    """One hundred calls: caller's loop, function, return; the first return of each kind misses."""
    events = run(f"mov ecx, 100; l: call f; dec ecx; jnz l; jmp e; f: nop; ret; e: {END}").snapshot().events
    assert events["translated.lookup"] == 101 + 100 - 100       # RET to CODE at the start, and a hundred here
    assert events["bt.lookup.indirect"] == 2                     # each of the two return addresses once


def test_without_the_switches_every_exit_asks() -> None:
    source = f"mov ecx, 50; l: call f; dec ecx; jnz l; jmp e; f: nop; ret; e: {END}"
    off = run(source, chaining="off", lookup="callout")
    assert off.counts["bt.chain"] == 0
    assert off.counts["bt.callout.chain"] >= 100
    assert off.counts["bt.callout.indirect"] == 51
    assert off.snapshot().kernel == run(source).snapshot().kernel


@pytest.mark.parametrize("line", range(8))
def test_an_interrupt_at_any_moment_finds_the_guests_own_state(line: int) -> None:
    """Raised by the guest's own write to the UART at each place of a chained loop; the handler logs what it saw."""
    slots = ["nop"] * 8
    slots[line] = "mov dx, 0x3f9; mov al, 2; out dx, al"
    pic = "".join(f"mov al, {v}; out {p}, al;" for p, v in ((0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xEF)))
    source = (f"{pic} mov dx, 0x3fc; mov al, 8; out dx, al; mov ecx, 3; sti; l: pushfd; popfd; {'; '.join(slots)};"
              f"mov dx, 0x3f9; mov al, 0; out dx, al; dec ecx; jnz l; {END}")
    handler = (f"push eax; push edx; mov dx, 0x3fa; in al, dx; inc dword ptr [{DATA:#x}]; mov al, 0x20; out 0x20, al; pop edx; pop eax; iretd")
    image = kernel(source, {0x24: handler})
    native, here = Native(Machine()), BinaryTranslation(Machine())
    for guest in (native, here):
        guest.load(image, "")
        guest.run(10_000)
    assert here.read_guest(DATA, 4) == native.read_guest(DATA, 4) != bytes(4)
    assert here.guest_state() == native.guest_state()


@pytest.mark.parametrize("path", PATHS)
def test_a_stop_in_a_template_shows_what_it_has_put_away(path: str) -> None:
    """RET looks its target up with ECX put away, and a budget may end there: ECX is still the loop's count."""
    image = kernel(f"mov ecx, 40; l: push ecx; call f; pop ecx; dec ecx; jnz l; jmp e; f: nop; ret; e: {END}")
    in_template = 0
    for budget in range(100, 120):
        guest = BinaryTranslation(Machine(path=path))
        guest.load(image, "")
        with pytest.raises(GuestError, match="budget"):
            guest.run(budget)
        in_template += guest.translator.states[guest.machine.cpu.rip].template
        ran = guest.machine.time - 16     # the start of every such kernel
        assert guest.guest_state().gpr[1] == 40 - ran // 7, budget     # MOV, then seven a pass, of which the sixth is DEC
    assert in_template


def test_what_is_not_carried_says_so() -> None:
    with pytest.raises(UnsupportedByStrategy, match="single-steps"):
        run(f"push 0x102; popfd; nop; {END}")


def test_code_reads_its_own_bytes() -> None:
    guest = run(f"l: mov eax, [l]; mov [{DATA:#x}], eax; {END}")
    assert guest.read_guest(DATA, 4) == asm(f"l: mov eax, [l]; mov [{DATA:#x}], eax", CODE)[:4]


def test_a_store_beside_translated_code_cuts_nothing_off() -> None:
    guest = run(f"mov dword ptr [{CODE + 0x800:#x}], 5; mov ebx, [{CODE + 0x800:#x}]; mov [{DATA:#x}], ebx; {END}")
    assert guest.read_guest(DATA, 4) == b"\5\0\0\0"
    assert guest.counts["bt.code_write"] == 1
    assert guest.counts["bt.invalidate"] == 0


def test_the_stack_holds_the_guests_return_addresses() -> None:
    guest = run(f"call f; f: pop eax; mov [{DATA:#x}], eax; {END}")
    assert int.from_bytes(guest.read_guest(DATA, 4), "little") == CODE + 5
    assert guest.guest_state().gpr[4] == STACK0


# ---- the command
def test_translate_shows_units_and_their_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["translate", "--bytes", "fa b8 01 00 00 00 fb c3", "--json"]) == 0
    units = {u["guest"]: u for u in json.loads(capsys.readouterr().out)["units"]}
    code = units[0x100100]
    assert [(p["text"], p["kind"], p["executed"]) for p in code["pieces"]] == [
        ("cli", "in-cache", 1), ("mov eax, 1", "identical", 1), ("sti", "in-cache", 1), ("ret", "control flow", 1)]
    assert code["native_cycles"] > code["cycles"] > 0


def test_translate_plays_its_steps_and_looks_at_guests(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["translate", "--asm", "mov ecx, 3; l: nop; loop l; ret", "--steps"]) == 0
    out = capsys.readouterr().out
    assert "was unmapped; translated to" in out
    assert "without the monitor" in out
    assert main(["translate", "nano", "--workload", "pushf_popf", "--iterations", "2", "--limit", "2"]) == 0
    assert "cycles a time" in capsys.readouterr().out


@pytest.mark.parametrize(("options", "said"), [
    (["--bytes", "zz"], "--bytes"), (["--asm", "bogus eax"], "--asm"), (["nano", "--workload", "cli_st"], "cli_sti"),
    (["nano", "--workload", "cli_sti", "--symbol", "main_"], "--symbol"), (["--bytes", "90", "--profile", "x"], "--profile"),
])
def test_bad_input_is_one_line(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["translate", *options]) == 2
    assert said in capsys.readouterr().err


def test_warm_up_counts_what_had_been_done_by_each_power_of_two() -> None:
    from vmlab.vmm.translation.steady import Learning

    learning = Learning()
    for at, what in ((0, "translated"), (2, "translated"), (2, "chained"), (5, "translated")):
        learning.note(what, at)
    assert [tuple(row.values()) for row in learning.curve(6)] == [(1, 1, 0), (2, 2, 1), (4, 2, 1), (6, 3, 1)]


def test_warm_up_of_a_guest_ends_with_the_ledgers_own_counts(capsys: pytest.CaptureFixture[str]) -> None:
    """And the guest runs no longer than unobserved."""
    import itertools
    import json

    from vmlab.cli.main import main
    from vmlab.experiment.cell import Run

    assert main(["translate", "nano", "--workload", "cli_sti", "--iterations", "20", "--warm-up", "--json"]) == 0
    curve = json.loads(capsys.readouterr().out)["warm_up"]
    run = Run("binary-translation", {"guest": "nano", "workload": "cli_sti", "iterations": 20})
    run.go()
    counts = run.strategy.snapshot().events
    assert curve[-1] == {"instructions": run.machine.time, "translated": counts["bt.translate.unit"], "chained": counts["bt.chain"]}
    assert all(a["translated"] <= b["translated"] for a, b in itertools.pairwise(curve))


def test_code_of_64_bits_is_translated_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    """mov r8, [rip + 0x10]; cli; ret: the operand is made absolute, and nothing else changes."""
    assert main(["translate", "--bits", "64", "--bytes", "4c 8b 05 10 00 00 00 fa c3", "--symbol", "code", "--json"]) == 0
    unit = json.loads(capsys.readouterr().out)["units"][0]
    assert [piece["kind"] for piece in unit["pieces"]] == ["relocated", "in-cache", "control flow"]
    assert unit["pieces"][0]["code"][0]["text"] == "mov r8, qword ptr [0x100117]"
    assert main(["translate", "nano", "--bits", "64"]) == 2
