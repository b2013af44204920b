"""minios under every technique and memory scheme: the outcome is the bare machine's, and foreign memory stays foreign."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass

import pytest

from vmlab import guests, strategies
from vmlab.errors import GuestError
from vmlab.guests.minios.workloads import WORKLOADS
from vmlab.machine.pc import Machine
from vmlab.parameters import Value

#: Everything that claims to carry a paging guest faithfully.
NARROW: Mapping[str, tuple[str, Mapping[str, Value]]] = {
    "trap-tracing": ("trap-and-emulate", {"memory": "tracing", "sensitive": "trap"}),
    "trap-lazy": ("trap-and-emulate", {"memory": "lazy", "sensitive": "trap"}),
}
BOTH: Mapping[str, tuple[str, Mapping[str, Value]]] = {
    "paravirtual": ("paravirtualization", {"memory": "direct"}),
    "hardware-tracing": ("hardware-assisted", {"memory": "tracing"}),
    "hardware-lazy": ("hardware-assisted", {"memory": "lazy"}),
    "hardware-nested": ("hardware-assisted", {"memory": "nested"}),
}
TRANSLATED: Mapping[str, tuple[str, Mapping[str, Value]]] = {
    "translation-tracing": ("binary-translation", {"memory": "tracing"}),
    "translation-lazy": ("binary-translation", {"memory": "lazy"}),
}
SILENT: Mapping[str, tuple[str, Mapping[str, Value]]] = {"trap-silent": ("trap-and-emulate", {"memory": "tracing", "sensitive": "silent"})}
WAYS = [("minios", way) for way in (*NARROW, *BOTH)] + [("minios64", way) for way in BOTH]
#: The 64-bit kernel at CPL 3, in a view of its own. Every workload under all schemes: tests/test_memory_schemes.py -m slow.
WIDE = [("minios64", way) for way in ("translation-lazy", "trap-tracing")]
#: The 32-bit kernel translated. Every workload: as above.
THIN = [("minios", way) for way in TRANSLATED]
#: For kernels that break or forbid: also what is not faithful in everything.
ALL_WAYS = [*WAYS, *(("minios", way) for way in (*TRANSLATED, *SILENT)), *WIDE]
SMALL: Mapping[str, Mapping[str, Value]] = {
    "fork": {"pages": 30}, "mmap": {"pages": 24}, "build": {"pages": 20}, "chase": {"pages": 40}, "mixed": {"pages": 8},
    "random": {"seeds": 2, "iterations": 40}, "idle": {"timer": 100_000},
}


_POISON = b"\xa5\x5a\x3c\xc3" * 1024


@dataclass(frozen=True)
class Ended:
    """What a run let the world see, and what its VMM refused."""

    console: str
    exit_code: int | None
    outcome: bytes
    disk: bytes | None
    refused: tuple[str, ...] = ()
    error: GuestError | None = None
    outside_kept: bool = True

    def seen(self) -> tuple[object, ...]:
        return self.console, self.exit_code, self.outcome, self.disk


@functools.cache
def run(guest: str, way: str, workload: str, more: tuple[tuple[str, Value], ...] = ()) -> Ended:
    technique, chosen = {"native": ("native", {}), **NARROW, **BOTH, **TRANSLATED, **SILENT}[way]
    values: dict[str, Value] = {"guest": guest, "workload": workload, "iterations": 6, "timer": 0, **SMALL.get(workload, {}), **dict(more)}
    image = guests.load(guest)
    machine = Machine(disk=guests.disk(values))
    strategy = strategies.load(technique)(machine, chosen)
    strategy.load(image, guests.command_line(values))
    behind = strategy.frame_address(0) + strategy.guest_memory
    poison = b"" if technique == "native" or workload != "bad" else _POISON * ((machine.ram.size - behind) // len(_POISON))
    machine.ram.write(behind, poison)
    error = None
    try:
        exit_code = strategy.run(20_000_000_000).exit_code
    except GuestError as failure:
        exit_code, error = None, failure
    at, end = image.symbol("vmlab_outcome_start"), image.symbol("vmlab_outcome_end")
    content = None if machine.disk is None else machine.disk.content
    return Ended(machine.console.decode(), exit_code, strategy.read_guest(at, end - at), content, tuple(strategy.refused), error,
                 machine.ram.read(behind, len(poison)) == poison)


@pytest.mark.parametrize(("guest", "way"), [*WAYS, ("minios64", "translation-lazy")])
@pytest.mark.parametrize("workload", sorted(set(WORKLOADS) - {"bad"}))
def test_the_outcome_is_the_bare_machines(guest: str, way: str, workload: str) -> None:
    ended = run(guest, way, workload)
    assert ended.seen() == run(guest, "native", workload).seen()
    assert ended.exit_code == 0
    assert not ended.refused


def test_a_flag_that_is_dropped_without_a_word_stops_the_clock() -> None:
    """Classical x86: IRET from ring 1 leaves IF alone, so no tick comes while a program runs."""
    ended = run("minios", "trap-silent", "idle")
    assert ended.exit_code == 1
    assert "FAILED: no tick came while a program was running" in ended.console


@pytest.mark.parametrize(("guest", "way"), WAYS)
def test_twenty_random_programs_agree(guest: str, way: str) -> None:
    sizes = (("seeds", 20), ("seed", 100), ("iterations", 40))
    assert run(guest, way, "random", sizes).seen() == run(guest, "native", "random", sizes).seen()


@pytest.mark.slow
@pytest.mark.parametrize(("guest", "way"), [*WAYS, *WIDE, *THIN])
def test_a_thousand_random_programs_agree(guest: str, way: str) -> None:
    sizes = (("seeds", 1000), ("seed", 1), ("iterations", 24))
    assert run(guest, way, "random", sizes).seen() == run(guest, "native", "random", sizes).seen()


@pytest.mark.parametrize(("guest", "way"), [*WAYS, *WIDE, *THIN])
@pytest.mark.parametrize("workload", ["server", "mixed"])
def test_ticks_change_no_outcome(guest: str, way: str, workload: str) -> None:
    for timer, phase in ((20_000, 0), (20_000, 9_001)):
        assert run(guest, way, workload, (("timer", timer), ("phase", phase))).seen() == run(guest, "native", workload).seen()


@pytest.mark.parametrize(("guest", "way"), ALL_WAYS)
@pytest.mark.parametrize(("bad", "words"), [
    ("stack-overflow", "double fault"), ("recursive-fault", "double fault"), ("stray-pointer", "exception 14"),
])
def test_a_broken_kernel_says_so_and_ends(guest: str, way: str, bad: str, words: str) -> None:
    """The double fault's handler is a task of its own in 32 bits, which a VMM must switch to, and has an interrupt stack in 64."""
    ended = run(guest, way, "bad", (("bad", bad),))
    if way.startswith("paravirtual") and words == "double fault":   # Xen ends a domain whose kernel has no stack to take a fault on
        assert re.search("the guest's stack at .* is not there", str(ended.error)), ended
        return
    assert ended.exit_code == 2
    assert ended.console.splitlines()[1].startswith(f"minios: {words}")


@pytest.mark.parametrize(("guest", "way"), ALL_WAYS)
def test_a_kernel_without_an_idt_ends_with_a_reason(guest: str, way: str) -> None:
    ended = run(guest, way, "bad", (("bad", "no-idt"),))
    if way.startswith("paravirtual"):       # LIDT is not its own to execute, and it says so
        assert ended.exit_code == 2
        assert "minios: exception 13" in ended.console
        return
    assert ended.exit_code is None
    assert ended.error is not None
    assert "triple fault" in str(ended.error)


@pytest.mark.parametrize(("guest", "way"), ALL_WAYS)
def test_a_disk_image_that_is_too_short_is_said_to_be(guest: str, way: str) -> None:
    ended = run(guest, way, "io", (("sectors", 10),))
    assert ended.exit_code == 1
    assert "FAILED: the disk refused a sector" in ended.console


@pytest.mark.parametrize(("guest", "way"), ALL_WAYS)
@pytest.mark.parametrize("bad", ["foreign-frame", "foreign-table", "foreign-dma"])
def test_foreign_memory_is_neither_read_nor_written(guest: str, way: str, bad: str) -> None:
    ended = run(guest, way, "bad", (("bad", bad),))
    assert ended.exit_code != 0
    assert "gave badbadba" not in ended.console
    assert "foreign-dma gave 00000000" not in ended.console
    assert ended.refused, ended.console
    assert ended.outside_kept
