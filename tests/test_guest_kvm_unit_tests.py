"""kvm-unit-tests, unmodified, on the bare machine and under hardware assistance. Need their images (tests/foreign.py); slow.

docs/foreign-guests.md says why each test that fails or is skipped does so.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from foreign import KVM_UNIT_TESTS, environment, guest, lines, run

#: (image, PASS lines natively, PASS lines under nested paging, what else is printed: a text of each FAIL line).
TESTS = [
    ("x86_64/setjmp", 10, 10, []), ("x86_64/tsc", 3, 3, []), ("x86_64/rdpru", 1, 1, []), ("x86_64/rmap_chain", 1, 1, []),
    ("x86_64/memory", 5, 5, []), ("i386/cmpxchg8b", 1, 1, []), ("x86_64/smap", 18, 18, []), ("x86_64/umip", 11, 11, []),
    ("x86_64/ioapic", 19, 19, []), ("x86_64/eventinj", 13, 12, ["NMI"]), ("i386/taskswitch2", 12, 12, []),
    ("x86_64/realmode", 68, 68, ["rflags.rf"]),
]
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("how", ["native", "nested"])
@pytest.mark.parametrize(("name", "native", "nested", "fails"), TESTS, ids=[test[0] for test in TESTS])
def test_its_lines_pass(name: str, native: int, nested: int, fails: list[str], how: str, tmp_path: Path) -> None:
    cell = run(how, guest(KVM_UNIT_TESTS, f"{name}.flat"), initrd=environment(tmp_path), append=Path(name).name, ram=128, budget=100_000_000)
    console = cell["console"]
    assert len(lines(console, "PASS")) == (native if how == "native" else nested), console[-2000:]
    assert all(any(text in line for text in fails) for line in lines(console, "FAIL")), console[-2000:]


@pytest.mark.parametrize(("image", "native", "nested"), [("i386/emulator", 83, 77), ("x86_64/emulator", 141, 93)])
@pytest.mark.parametrize("how", ["native", "nested"])
def test_the_emulator_as_far_as_it_comes(image: str, native: int, nested: int, how: str, tmp_path: Path) -> None:
    cell = run(how, guest(KVM_UNIT_TESTS, f"{image}.flat"), initrd=environment(tmp_path), append="emulator", ram=128, budget=100_000_000)
    assert len(lines(cell["console"], "PASS")) >= (native if how == "native" else nested)
