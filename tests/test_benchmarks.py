"""The benchmarks run, and what they compare is the same work. Their figures are the host's, and judged by nobody here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_rows_have_a_limit_and_a_direction(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, "benchmarks/run.py", "--rounds", "1", "--scale", "0.01", "--only", "port reads", "--json", str(out), "--table"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    [row] = json.loads(out.read_text(encoding="utf-8"))
    assert list(row) == ["name", "ratio", "limit", "better", "spread"]
    assert row["name"].startswith("port reads") and row["better"] == "higher" and row["limit"] is None
    assert row["spread"][0] <= row["ratio"] <= row["spread"][1]
    assert "| port reads" in done.stdout


def test_the_naive_way_sees_every_event() -> None:
    """Each of these ends the benchmark when the count is another."""
    import guests
    import naive

    assert naive.traps(guests.clis(50), 50) > 0
    assert naive.callouts(*guests.gated(50), 50) > 0
    assert naive.hypercalls(guests.hypercalls(50, guests.END), 50) > 0
    assert naive.exits(guests.cpuids(50), 50) > 0
    code, tables = guests.paging(2)
    assert naive.hidden_faults(code, tables, 2 * (guests.WINDOW_PAGES + 1) + 2) > 0
    with pytest.raises(SystemExit, match="instead of 49"):
        naive.traps(guests.clis(50), 49)


def test_a_limit_is_judged_in_its_direction() -> None:
    from rows import row, table

    fast, slow = row("a", [1.0, 2.0, 1.2], 1.25, "lower"), row("b", [9.0], 10, "higher")
    assert fast.met and slow.met is False and row("c", [1.0], None, "lower").met is None
    assert fast.spread == (1.0, 2.0) and fast.ratio == 1.2
    assert "| a | 1.20 | 1.00–2.00 | ≤ 1.25 | yes |" in table([fast, slow]) and "**no**" in table([slow])


def test_emulators_run_the_labs_guest_to_its_last_character() -> None:
    """One that prints something else ends the benchmark; one that is not installed is named."""
    import emulators

    guest = emulators._loop(2)
    seconds, console = guest.lab()
    assert console == b"." and seconds > 0
    for emulator in emulators.EMULATORS:
        if emulator.missing is None:
            started, theirs = emulator.run(guest.rom(), guest.memory, console)
            assert started > 0 and theirs > 0
            with pytest.raises(SystemExit, match=rf"{emulator.name}: the guest printed b'\.'"):
                emulator.run(guest.rom(), guest.memory, b"!")


def test_an_emulator_that_is_not_there_is_skipped_with_the_reason() -> None:
    done = subprocess.run([sys.executable, "benchmarks/run.py", "--rounds", "1", "--scale", "0.01", "--only", "forkwait against"],
                          cwd=ROOT, capture_output=True, text=True, check=False, timeout=120, env={**os.environ, "PATH": ""})
    assert done.returncode == 0, done.stderr
    assert "minios forkwait against QEMU TCG" in done.stdout and "skipped: bochs is not installed" in done.stdout


def test_a_guest_in_a_rom_is_the_one_that_the_labs_loader_starts() -> None:
    """Read as the CPU does: from the reset vector to the loader, whose table has every byte of the image."""
    import emulators

    from vmlab import guests
    from vmlab.guests import boot

    image = guests.load("minios")
    content = emulators.rom(image, "workload=compute", 32 << 20)
    base = (1 << 32) - len(content)
    jump = content[-16:-13]
    assert jump[0] == 0xE9 and (0xFFF3 + int.from_bytes(jump[1:], "little")) & 0xFFFF == emulators._STUB
    memory, at = bytearray(32 << 20), 0
    while size := int.from_bytes(content[at + 4:at + 8], "little"):
        to, source = (int.from_bytes(content[at + field:at + field + 4], "little") for field in (0, 8))
        memory[to:to + size] = content[source - base:source - base + size]
        at += 12
    for address, data in boot.start(image, "workload=compute", 32 << 20).pieces:
        assert 0xA0000 <= address < 0x100000 or memory[address:address + len(data)] == data


@pytest.mark.parametrize("name", ["computing", "call/return", "computing, 64 bits", "call/return, 64 bits"])
def test_translated_loops_execute_what_a_hand_counts(name: str) -> None:
    """Another number of instructions, natively or translated, ends the benchmark."""
    import translation

    line = translation.measure(name, "lookup in the cache, chained", 20, 1)
    assert line["instructions"] == 20 * translation.LOOPS[name].length + translation.LOOPS[name].around
