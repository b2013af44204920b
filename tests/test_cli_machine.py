"""The command line with the real machine: whole ways from a command to a file, and guests that misbehave."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vmlab
from vmlab import guests
from vmlab.cli.main import main

TEXT = """\
name: real
matrix: {technique: [native, trap-and-emulate], workload: [cli_sti, pushf_popf], iterations: 200, sensitive: [silent, trap]}
profiles: [prescott-2005, haswell-2013]
claims: [popf-silent, fidelity-all]
expect: {popf-silent: holds, fidelity-all: holds}
"""


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    Path("real.yaml").write_text(TEXT, encoding="utf-8")
    yield


def cells(directory: str) -> list[dict[str, Any]]:
    results = json.loads((Path(directory) / "results.json").read_text(encoding="utf-8"))
    for cell in results["cells"]:
        del cell["host_seconds"], cell["machine_path"]
    found: list[dict[str, Any]] = results["cells"]
    return found


def test_an_experiment_on_both_ways_into_the_machine_agrees(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VMLAB_MACHINE", "portable")
    assert main(["experiment", "real.yaml", "--out", "portable", "--strict", "--jobs", "2"]) == 0
    assert "popf-silent" in capsys.readouterr().out
    monkeypatch.setenv("VMLAB_MACHINE", "auto")
    assert main(["experiment", "real.yaml", "--out", "auto", "--strict", "--jobs", "2"]) == 0
    assert cells("portable") == cells("auto")
    assert (Path("auto") / "report.html").is_file() and list((Path("auto") / "plots").glob("*.svg"))


def test_run_for_notebooks_really_runs() -> None:
    cell = vmlab.run("trap-and-emulate", "cli_sti", iterations=40, density=100, profiles=["prescott-2005"])
    assert cell["status"] == "ok" and cell["work"] == {"operations": 80, "iterations": 40}
    assert cell["events"]["trap.gp"] == 80
    assert cell["fidelity"]["matches_native"] is True
    slow = cell["slowdown"]["prescott-2005"]
    assert 1 < slow["low"] <= slow["value"] <= slow["high"]


def test_a_guest_that_does_not_end_is_a_failed_cell(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "cli_sti", "--technique", "trap-and-emulate", "--set", "budget=3000"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "budget" in lines[0]


@pytest.mark.parametrize(("content", "says"), [(None, "no guest image"), (b"", ""), (b"\x7fELF", ""), ("cut", "")])
def test_a_missing_or_damaged_image_is_status_2_and_one_line(
    content: bytes | str | None, says: str, capsys: pytest.CaptureFixture[str],
) -> None:
    if content == "cut":
        content = (Path(guests.__file__).parent / "nano" / "nano.elf").read_bytes()[:5000]
    if isinstance(content, bytes):
        Path("kernel.elf").write_bytes(content)
    Path("real.yaml").write_text("name: x\nmatrix: {technique: native, guest: kernel.elf}\n", encoding="utf-8")
    assert main(["experiment", "real.yaml"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("vmlab: real.yaml:2: matrix.guest: ")
    assert says in lines[0] and "kernel.elf" in lines[0]
    assert not Path("results").exists()


def test_a_kernel_from_a_file_runs_without_a_workload(tmp_path: Path) -> None:
    nano = Path(guests.__file__).parent / "nano" / "nano.elf"
    Path("kernel.elf").write_bytes(nano.read_bytes())
    cell = vmlab.run("native", guest="kernel.elf", budget=200_000_000)
    assert cell["parameters"] == {"budget": 200_000_000, "guest": "kernel.elf"}
    assert cell["status"] == "ok"
    assert cell["work"] == {"operations": 2000, "iterations": 1000}  # what nano does when it is told nothing
