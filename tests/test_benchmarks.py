"""The benchmarks run, and what they compare is the same work. Their figures are the host's, and judged by nobody here."""

from __future__ import annotations

import json
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
