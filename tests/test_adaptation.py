"""Adaptive translation: accesses that keep faulting on watched memory, simulated in the cache or called out, and the way back."""

from __future__ import annotations

import pytest
from machinelab import CODE, DATA, asm, kernel
from test_translation import END, run

from vmlab.experiment.cell import Run
from vmlab.machine.pc import Machine
from vmlab.strategies.native import Native
from vmlab.strategies.translation import BinaryTranslation
from vmlab.vmm.translation import Kind
from vmlab.vmm.translation.listing import listing

#: A hundred times beside translated code, in the middle of a unit.
_WATCHED = (f"mov ecx, 100; l: mov ebx, ecx; add dword ptr [{CODE + 0x800:#x}], ebx; dec ecx; jnz l;"
            f"mov eax, [{CODE + 0x800:#x}]; mov [{DATA:#x}], eax; {END}")


def test_an_access_that_keeps_faulting_is_simulated_or_called_out() -> None:
    """Eight traps; then all but the first, which opens the window, stay in the cache, or every one is a callout; the same memory."""
    simulated, called, off = (run(_WATCHED, adaptation=form) for form in ("simulate", "callout", "off"))
    for guest in (simulated, called, off):
        assert guest.read_guest(DATA, 4) == (5050).to_bytes(4, "little")
        assert guest.snapshot().kernel == off.snapshot().kernel
    assert [guest.counts["bt.code_write"] for guest in (simulated, called, off)] == [8, 8, 100]
    assert [guest.counts["bt.callout.adapted"] for guest in (simulated, called, off)] == [1, 92, 0]
    assert [guest.snapshot().events.get("translated.simulated", 0) for guest in (simulated, called, off)] == [91, 0, 0]
    assert [guest.counts["bt.adapt"] for guest in (simulated, called, off)] == [1, 1, 0]
    assert simulated.counts["bt.window"] == 1


def test_the_old_unit_jumps_forward_to_the_new_one() -> None:
    """What came before the access stays; the jump stands where the access stood; nobody had to be led elsewhere."""
    guest = run(_WATCHED)
    old = next(u for u in listing(guest.translator, guest.machine.counter) if u["guest"] == CODE + 5)
    assert [piece["kind"] for piece in old["pieces"]] == ["identical", "forwarding"]
    new = guest.translator.units[old["pieces"][-1]["guest"]]
    assert [(leaving["to"], leaving["form"], leaving["chained"]) for leaving in old["exits"]] == [(new.guest, "forward", True)]
    assert new.pieces[0].kind is Kind.SIMULATE
    assert guest.counts["bt.invalidate"] == 0


def test_code_that_a_simulated_store_reaches_is_cut_off() -> None:
    """The window's chart forbids bytes that were translated, also after the window was opened: the store calls out."""
    source = (f"mov ecx, 40; mov edi, {CODE + 0x800:#x}; l: mov byte ptr [edi], 0x90; cmp ecx, 20; jne s; call {CODE + 0x800:#x}; mov edx, eax;"
              f"s: cmp ecx, 10; jne n; mov edi, {CODE + 0x801:#x}; n: loop l; call {CODE + 0x800:#x}; mov [{DATA:#x}], eax;"
              f"mov [{DATA + 4:#x}], edx; {END}")
    body = asm("inc eax; inc eax; ret", CODE)      # the first byte becomes NOP in the loop, the second at its end
    image = kernel(source, data={CODE + 0x800: body})
    native, here = Native(Machine()), BinaryTranslation(Machine())
    for guest in (native, here):
        guest.load(image, "")
        guest.run(10_000)
    assert here.read_guest(DATA, 8) == native.read_guest(DATA, 8)
    assert here.guest_state() == native.guest_state()
    assert here.counts["bt.invalidate"] >= 1
    assert here.snapshot().events["translated.simulated"] > 0


def test_an_access_is_copied_again_when_nobody_watches_what_it_reaches() -> None:
    """Sixty-four callouts in a row for plain memory; then it costs what it did before."""
    source = (f"mov edi, {CODE + 0x800:#x}; mov ecx, 300; l: nop; mov [edi], ecx; cmp ecx, 290; jne s; mov edi, {DATA:#x}; s: loop l; {END}")
    guest = run(source)
    assert guest.read_guest(DATA, 4) == (1).to_bytes(4, "little")
    assert (guest.counts["bt.adapt"], guest.counts["bt.adapt.back"]) == (1, 1)
    assert guest.counts["bt.callout.adapted"] == 1 + 64     # the window's, and the vain ones
    assert guest.translator.guilty == set()


@pytest.mark.parametrize("guest", ["minios", "minios64"])
@pytest.mark.parametrize("form", ["simulate", "callout", "off"])
def test_page_tables_that_are_written_agree_in_every_form(form: str, guest: str) -> None:
    """Entries made present stay in the cache; those that a shadow entry follows from call out. The bare machine's outcome."""
    outcomes = []
    for technique, more in (("native", {}), ("binary-translation", {"memory": "tracing", "adaptation": form})):
        cell = Run(technique, {"guest": guest, "workload": "mmap", "iterations": 6, **more})
        outcomes.append((cell.outcome(cell.go().exit_code), cell.strategy.snapshot()))
    (expected, native), (found, here) = outcomes
    assert found == expected
    assert (here.user, here.kernel) == (native.user, native.kernel)
    traps, callouts, simulated = (here.events.get(kind, 0) for kind in ("shadow.trace.write", "bt.callout.adapted", "translated.simulated"))
    assert (traps, callouts, simulated) == {"simulate": (18, 105, 103), "callout": (18, 208, 0), "off": (226, 0, 0)}[form]


_LAPIC = 0xFEE00000
#: Self-IPIs by the ICR, of the vector in AL.
_IPI = f"mov dword ptr [{_LAPIC + 0x300:#x}], {{vector:#x}};"


def test_the_task_priority_is_set_in_the_cache() -> None:
    """A hundred and one stores by one instruction: eight faults, one callout that opens the window, the others stay; reads see the last."""
    source = (f"mov ecx, 101; l: mov eax, ecx; and eax, 0xf; shl eax, 4; mov [{_LAPIC + 0x80:#x}], eax; loop l;"
              f"mov eax, [{_LAPIC + 0x80:#x}]; mov [{DATA:#x}], eax; {END}")
    native, here = Native(Machine()), BinaryTranslation(Machine())
    for guest in (native, here):
        guest.load(kernel(source), "")
        guest.run(10_000)
    assert here.guest_state() == native.guest_state()
    assert here.read_guest(DATA, 4) == native.read_guest(DATA, 4) == (0x10).to_bytes(4, "little")
    assert here.snapshot().kernel == native.snapshot().kernel
    assert here.counts["bt.callout.adapted"] == 1
    assert here.snapshot().events["translated.simulated"] == 101 - 8 - 1


def test_lowering_the_task_priority_lets_a_waiting_interrupt_in() -> None:
    """Raised, an IPI to itself that must wait, lowered: the handler comes right behind the store, in each round."""
    low, high = (f"mov [{_LAPIC + 0x80:#x}], {register};" for register in ("ebx", "ebx"))
    source = (f"mov dword ptr [{_LAPIC + 0xF0:#x}], 0x1ff; sti; mov esi, 40; l: mov ebx, 0x50; test esi, 1; jz h; mov ebx, 0; h: nop; {high}"
              f"mov edx, [{DATA + 4:#x}]; test esi, 3; jnz s; mov dword ptr [{_LAPIC + 0x300:#x}], 0x41; s: dec esi; jnz l; mov ebx, 0;"
              f"{low} nop; {END}")
    handler = f"inc dword ptr [{DATA:#x}]; mov [{DATA + 8:#x}], esi; add [{DATA + 12:#x}], esi; mov dword ptr [{_LAPIC + 0xB0:#x}], 0; iretd"
    native, here = Native(Machine()), BinaryTranslation(Machine())
    for guest in (native, here):
        guest.load(kernel(source, {0x41: handler}), "")
        guest.run(20_000)
    assert here.guest_state() == native.guest_state()
    assert here.read_guest(DATA, 16) == native.read_guest(DATA, 16)
    assert int.from_bytes(here.read_guest(DATA, 4), "little") == 10
    assert here.snapshot().events["translated.simulated"] > 0
