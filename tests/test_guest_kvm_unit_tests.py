"""kvm-unit-tests, unmodified, under every technique. Need their images (tests/foreign.py); slow.

Every line that is not a PASS has its reason here, and docs/foreign-guests.md shows the same table: an improvement fails these tests as a
regression does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from foreign import KVM_UNIT_TESTS, TECHNIQUES, environment, guest, lines, run

from vmlab import costs
from vmlab.parameters import Value

pytestmark = pytest.mark.slow

MOVAPS = {"FAIL: unaligned movaps exception": "Unicorn does not check the alignment of SSE operands"}
NULLIFIED = {"FAIL: Test ret/iret with a nullified segment": "Unicorn clears the base of GS with a selector that IRET nullifies; a CPU keeps it"}
FORCED = {"SKIP: Skipping tests that require forced emulation, use kvm.force_emulation_prefix=1 to enable": "a prefix of KVM's own"}
NO_BREAKPOINTS = {f"FAIL: no fep: #DB occurred after {verb} SS": "VMMs that deprivilege keep debug registers, without breakpoints"
                  for verb in ("MOV", "POP")}
NO_CLWB = {"SKIP: clwb": "CPUID has no CLWB", "SKIP: pcommit": "CPUID has no PCOMMIT"}
HOLE = "keeps its own pages"                        # the kernel maps the end of the linear space, where a deprivileging VMM is
NMI = "sends itself an NMI"                         # whose end these VMMs cannot see where IRET runs on the CPU or in the cache


@dataclass(frozen=True)
class Expected:
    """PASS lines, every other verdict with its reason, the error that ends the cell (None: the test ended the run itself), and what it needs."""

    passes: int
    others: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None
    parameters: Mapping[str, Value] = field(default_factory=dict)


#: Natively and under hardware assistance, nested and shadow, the same lines come.
FAITHFUL: Mapping[str, Expected] = {
    "x86_64/setjmp": Expected(10), "x86_64/tsc": Expected(3), "x86_64/rdpru": Expected(1), "x86_64/rmap_chain": Expected(1),
    "x86_64/memory": Expected(5, NO_CLWB), "i386/cmpxchg8b": Expected(1), "x86_64/smap": Expected(18), "x86_64/umip": Expected(11),
    "x86_64/ioapic": Expected(19), "x86_64/eventinj": Expected(13), "i386/taskswitch": Expected(0), "i386/taskswitch2": Expected(13),
    "x86_64/realmode": Expected(127, parameters={"timer": "bios"}), "i386/emulator": Expected(84, MOVAPS | FORCED, error="exit code 1:"),
    "x86_64/emulator": Expected(148, MOVAPS | NULLIFIED | FORCED, error="exit code 1:"),
}
#: Where the kernel runs above ring 0. A run that the technique cannot carry says why, and has no lines.
DEPRIVILEGED: Mapping[str, Expected] = {
    **{name: FAITHFUL[name] for name in ("x86_64/setjmp", "x86_64/tsc", "x86_64/rdpru", "x86_64/rmap_chain", "x86_64/memory", "i386/cmpxchg8b",
                                         "x86_64/umip", "i386/taskswitch")},
    "i386/emulator": Expected(82, MOVAPS | NO_BREAKPOINTS | FORCED, error="exit code 1:"),
    "i386/taskswitch2": Expected(0, error=NMI),
    **dict.fromkeys(("x86_64/ioapic", "x86_64/eventinj", "x86_64/emulator"), Expected(0, error=HOLE)),
}
#: SMAP needs a kernel at ring 0. A translated guest's CPUID does not tell of it, and the test has nothing to do; a trapping VMM is not asked.
SMAP = {"translation": Expected(0, error="exit code 38"), "trapping": Expected(0, error="exit code 63")}
CASES = [(how, name, expected) for how in ("native", "nested", "shadow") for name, expected in FAITHFUL.items()]
CASES += [(how, name, expected) for how in ("translation", "trapping") for name, expected in {**DEPRIVILEGED, "x86_64/smap": SMAP[how]}.items()]


@pytest.mark.parametrize(("how", "name", "expected"), CASES, ids=[f"{how}-{name}" for how, name, _ in CASES])
def test_its_lines(how: str, name: str, expected: Expected, tmp_path: Path) -> None:
    cell = run(how, guest(KVM_UNIT_TESTS, f"{name}.flat"), initrd=environment(tmp_path), append=Path(name).name, ram=128, budget=100_000_000,
               **expected.parameters)
    console, error = cell.get("console", ""), cell["error"]
    assert (error is None) if expected.error is None else expected.error in str(error), error
    assert len(lines(console, "PASS")) == expected.passes, console[-2000:]
    assert {line.strip() for line in (*lines(console, "FAIL"), *lines(console, "SKIP"))} == set(expected.others), console[-2000:]
    if name == "i386/taskswitch" and error is None:     # it reports by what it prints
        assert "error code 1234" in console and "post fault" in console


def test_there_are_enough_of_them() -> None:
    assert sum(expected.passes for expected in FAITHFUL.values()) == 454


# ---- vmexit prints cycles per operation where the time stamp counter shows what everything costs
OPERATIONS = [
    ("native", "haswell-2013", "inl_from_qemu", "machine.in"), ("nested", "k10-2007", "cpuid", "exit.cpuid"),
    ("shadow", "prescott-2005", "cpuid", "exit.cpuid"), ("shadow", "prescott-2005", "toggle_cr0_wp", None),
]


@pytest.mark.parametrize(("how", "profile", "operation", "counted"), OPERATIONS, ids=["-".join(case[:3]) for case in OPERATIONS])
def test_vmexit_prints_what_the_lab_prices(how: str, profile: str, operation: str, counted: str | None, tmp_path: Path) -> None:
    """The guest divides its last round's cycles by its iterations; the ledger's price divided by all iterations is the same to 1 %.

    (Rounds double until one takes 2³⁰ cycles; what the boot costs, and a first touch of pages, is in the ledger alone.)
    """
    cell = run(how, guest(KVM_UNIT_TESTS, "x86_64/vmexit.flat"), initrd=environment(tmp_path), append=f"vmexit {operation}", ram=128,
               clock=profile, budget=4_000_000_000)
    assert cell["status"] == "ok", cell["error"]
    printed = [int(line.split()[1]) for line in lines(cell["console"], operation)]
    assert len(printed) == 1
    price = costs.nominal(cell["events"], costs.load(profile), cell["platform"])
    assert isinstance(price, float)
    iterations = cell["events"][counted] if counted is not None else _iterations(printed[0])
    assert printed[0] == pytest.approx(price / iterations, rel=0.01)


def _iterations(cycles: int) -> int:
    """Of all rounds, where no event counts them: 64, and twice as many until a round takes 2³⁰ cycles."""
    last = 64
    while last * cycles < 1 << 30:
        last *= 2
    return 2 * last - 64


def test_every_technique_has_its_column() -> None:
    assert {how for how, _, _ in CASES} <= set(TECHNIQUES)
