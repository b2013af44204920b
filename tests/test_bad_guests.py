"""Guests that misbehave, under each technique: a clean end, one reason, and the machine's other memory untouched."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from machinelab import CODE, DATA, DEBUG_EXIT, PATHS, kernel

from vmlab import guests, strategies
from vmlab.errors import GuestBudget, GuestError, GuestImageError, GuestRefused, TripleFault
from vmlab.experiment.cell import run_cell
from vmlab.guests import GuestImage
from vmlab.machine.pc import Machine, Stop, StopReason
from vmlab.strategies.base import Strategy
from vmlab.strategies.translation import BinaryTranslation
from vmlab.vmm.space import HOLE, HOLE_FRAMES

#: Technique and parameters. The paravirtual one needs an image with Xen's notes: see below.
FULL: tuple[tuple[str, Mapping[str, str]], ...] = (
    ("native", {}), ("trap-and-emulate", {"sensitive": "silent"}), ("trap-and-emulate", {"sensitive": "trap"}),
    ("binary-translation", {"emulation": "in-cache"}), ("binary-translation", {"emulation": "callout"}), ("hardware-assisted", {}),
)
DEPRIVILEGED = tuple(pair for pair in FULL if pair[0] in ("trap-and-emulate", "binary-translation"))
EVERY = pytest.mark.parametrize(("technique", "parameters"), FULL, ids=lambda value: value if isinstance(value, str) else "-".join(value.values()))
SOME = pytest.mark.parametrize(
    ("technique", "parameters"), DEPRIVILEGED, ids=lambda value: value if isinstance(value, str) else "-".join(value.values()))


def boot(technique: str, parameters: Mapping[str, str], image: GuestImage, path: str = "portable") -> Strategy:
    strategy = strategies.load(technique)(Machine(64 << 20, path), parameters)
    strategy.load(image, "")
    return strategy


@pytest.mark.parametrize("path", PATHS)
@EVERY
def test_an_endless_loop_with_interrupts_off_ends_by_its_budget(technique: str, parameters: Mapping[str, str], path: str) -> None:
    strategy = boot(technique, parameters, kernel("cli; l: jmp l"), path)
    with pytest.raises(GuestBudget, match="20000"):
        strategy.run(20_000)
    counted = strategy.snapshot()
    assert 19_990 <= counted.user + counted.kernel <= 20_000
    assert strategy.guest_state().rip == CODE + 1
    assert not strategy.refused


@EVERY
def test_a_fault_without_an_idt_is_a_triple_fault(technique: str, parameters: Mapping[str, str]) -> None:
    strategy = boot(technique, parameters, kernel("nop; ud2", idt_limit=0))
    with pytest.raises(TripleFault, match="triple fault"):
        strategy.run(20_000)


@EVERY
def test_faults_that_fault_again_are_a_triple_fault(technique: str, parameters: Mapping[str, str]) -> None:
    """Gates that are not present: #UD becomes #NP becomes #DF becomes the end."""
    strategy = boot(technique, parameters, kernel("nop; ud2"))
    with pytest.raises(TripleFault):
        strategy.run(20_000)


@EVERY
def test_a_halt_that_nothing_ends_is_the_end(technique: str, parameters: Mapping[str, str]) -> None:
    for source in ("cli; hlt; nop", "sti; hlt; nop"):
        strategy = boot(technique, parameters, kernel(source))
        assert strategy.run(20_000) == Stop(StopReason.HALTED)


@EVERY
def test_a_jump_to_where_no_memory_is_ends_with_the_address(technique: str, parameters: Mapping[str, str]) -> None:
    """Where a translator's fetch finds an empty bus, the guest gets the #UD of that, and has no handler for it."""
    strategy = boot(technique, parameters, kernel("mov eax, 0x7ff00000; jmp eax"))
    with pytest.raises(GuestError, match="0x7ff00000"):
        strategy.run(20_000)


@SOME
def test_a_store_into_the_vmms_hole_is_refused(technique: str, parameters: Mapping[str, str]) -> None:
    for address in (HOLE, HOLE + 0x1000, HOLE + 0x3FFFFC):
        image = kernel(f"mov ebx, 0xdeadbeef; mov dword ptr [{address:#x}], ebx; xor eax, eax;" + DEBUG_EXIT)
        strategy = boot(technique, parameters, image)
        with pytest.raises(GuestRefused, match=f"{address:#x}"):
            strategy.run(20_000)
        assert len(strategy.refused) == 1
        assert strategy.snapshot().events["safety.refused"] == 1
        assert strategy.machine.ram.read32(HOLE_FRAMES + address - HOLE) != 0xDEADBEEF


def _first_unit(strategy: BinaryTranslation) -> int:
    unit = strategy.translator.find(CODE)
    assert unit is not None
    return unit.start


def test_a_store_into_the_translation_cache_is_refused_and_the_cache_is_as_it_was() -> None:
    """The guest learns where it runs from nothing; here the test tells it."""
    found = boot("binary-translation", {}, kernel("nop; xor eax, eax;" + DEBUG_EXIT))
    assert isinstance(found, BinaryTranslation)
    found.run(20_000)
    cache = _first_unit(found)
    strategy = boot("binary-translation", {}, kernel(f"nop; mov byte ptr [{cache:#x}], 0xcc; xor eax, eax;" + DEBUG_EXIT))
    assert isinstance(strategy, BinaryTranslation)
    with pytest.raises(GuestRefused, match=f"store to the VMM.s memory at {cache:#x}"):
        strategy.run(20_000)
    assert _first_unit(strategy) == cache
    assert strategy.machine.ram.read(strategy.space.hole_frame(cache), 1) != b"\xcc"


@SOME
def test_a_store_through_the_vmms_own_hands_is_refused_too(technique: str, parameters: Mapping[str, str]) -> None:
    """SIDT and the stack of an emulated PUSHF are stores that the VMM makes for the guest."""
    for source in (f"mov esp, {HOLE + 0x100:#x}; int 0x80", f"sidt [{HOLE + 0x20:#x}]"):
        strategy = boot(technique, parameters, kernel(source + "; xor eax, eax;" + DEBUG_EXIT, {0x80: "iretd"}))
        with pytest.raises(GuestRefused):
            strategy.run(20_000)


@EVERY
def test_a_stack_that_points_nowhere_ends_the_run(technique: str, parameters: Mapping[str, str]) -> None:
    """Pushes beyond RAM vanish; the return goes to what an empty bus gives, where nothing is."""
    strategy = boot(technique, parameters, kernel(f"mov esp, 0x7f000000; call next; next: mov ebx, [{DATA}]; ret"))
    with pytest.raises(GuestError):
        strategy.run(20_000)


# ---- the paravirtual guest is nano, told to do what it should not by its own image being damaged
def damaged(source: bytes, at: str) -> GuestImage:
    """nano, with ``source`` written over its code at a symbol."""
    image = guests.load("nano")
    address = image.symbols[at]
    segments = []
    for segment in image.segments:
        if segment.address <= address < segment.address + len(segment.data):
            offset = address - segment.address
            data = segment.data[:offset] + source + segment.data[offset + len(source):]
            segment = type(segment)(segment.address, data, segment.memory_size)
        segments.append(segment)
    return type(image)(image.name, tuple(segments), image.entry, image.pv, image.symbols, image.sha256)


BOOTED = "nano: workload=cli_sti iterations=10 density=100\n"


@pytest.mark.parametrize(("code", "says", "refused"), [
    (b"\xfa\xeb\xfd", "exception 13 error code 00000000 at {at:08x}", 0),                                # cli
    (b"\x0f\x0b", "exception 6 error code 00000000 at {at:08x}", 0),                                     # ud2
    (b"\xb8\x00\x00\xf0\x7f\xff\xe0", "exception 14 error code 00000000 at 7ff00000", 0),               # a jump to where no memory is
    (b"\xc7\x05\x00\x00\x80\xf5\x07\x00\x00\x00", "exception 14 error code 00000003 at {at:08x}", 1),  # a store where the hypervisor lives
])
def test_a_paravirtual_guest_that_misbehaves_gets_its_own_fault(code: bytes, says: str, refused: int) -> None:
    """Each fault is bounced to nano's handler, which names it and ends the run with exit code 2."""
    image = damaged(code, "vmlab_roi_begin")
    strategy = strategies.load("paravirtualization")(Machine(64 << 20, "portable"))
    strategy.load(image, guests.command_line({"workload": "cli_sti", "iterations": 10, "density": 100}))
    assert strategy.run(500_000) == Stop(StopReason.EXIT, 2)
    at = image.symbols["vmlab_roi_begin"]
    assert strategy.machine.console.decode() == f"{BOOTED}nano: {says.format(at=at)}\n"
    assert len(strategy.refused) == refused


def test_a_paravirtual_guest_that_loops_ends_by_its_budget() -> None:
    strategy = strategies.load("paravirtualization")(Machine(64 << 20, "portable"))
    strategy.load(damaged(b"\xeb\xfe", "vmlab_roi_begin"), guests.command_line({"workload": "cli_sti", "iterations": 10, "density": 100}))
    with pytest.raises(GuestBudget):
        strategy.run(500_000)


# ---- as cells: a sentence, and what was counted until then
@pytest.mark.parametrize("technique", ["native", "trap-and-emulate", "binary-translation", "paravirtualization", "hardware-assisted"])
def test_a_spent_budget_is_a_failed_cell_that_keeps_its_counts(technique: str) -> None:
    cell = run_cell(technique, {"guest": "nano", "workload": "cli_sti", "iterations": 10_000, "density": 100, "budget": 50_000})
    assert cell["status"] == "failed" and "budget" in cell["error"]
    assert cell["phases"]["boot"]["instructions"]["machine"] > 0


def test_an_image_that_is_cut_short_is_named(tmp_path: Path) -> None:
    whole = (Path(guests.__file__).parent / "nano" / "nano.elf").read_bytes()
    for size in (0, 3, 60, 400, len(whole) // 2):
        file = tmp_path / f"cut{size}.elf"
        file.write_bytes(whole[:size])
        with pytest.raises(GuestImageError, match=f"cut{size}.elf"):
            guests.load(file)
    with pytest.raises(GuestImageError, match="absent"):
        guests.load(tmp_path / "absent.elf")
