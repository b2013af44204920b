"""Rows of ``run.py`` that start programs: the commands against ``python -c pass``, a guest's boot, experiments and sweeps."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rows import Row, row

ROOT = Path(__file__).resolve().parent.parent
#: Every verb but ``measure``, which takes as long as it is told to; RUN stands for a run of cli_heavy's reduced size.
_COMMANDS: tuple[tuple[str, ...], ...] = (
    ("--help",), ("--version",), ("list",), ("list", "events"), ("list", "profiles"), ("list", "claims"), ("list", "techniques"),
    ("explain", "hidden fault"), ("validate", "cli_heavy"), ("experiment", "cli_heavy", "--dry-run"), ("experiment", "--help"),
    ("run", "--help"), ("claims", "--help"), ("measure", "--help"), ("cite", "RUN"), ("exits", "RUN"), ("compare", "RUN", "RUN"),
    ("new", "strategy", "mine"), ("run", "cli_sti", "--technique", "native"),
    ("trace", "cli_sti", "--technique", "trap-and-emulate", "--limit", "20"),
    ("translate", "nano", "--workload", "cli_sti"), ("probe", "popf"), ("plot", "RUN", "--chart", "slowdown"), ("report", "RUN"),
    ("step", "cli"), ("answer", "paravirtual/batch-8"), ("demo",), ("doctor",))
#: Limits of the commands, in starts of Python; the others are only reported.
_LIMITS = {("--help",): 8.0}


def _seconds(arguments: Sequence[str], where: Path = ROOT) -> float:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)    # an installed lab is compiled
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=where, env=environment, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: exit status {done.returncode}: {done.stderr.decode(errors='replace')[-300:]}")
    return seconds


def commands(rounds: int, _scale: float, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """How long each command takes, in starts of Python."""
    chosen = [command for command in _COMMANDS if wanted(f"vmlab {' '.join(command)}")]
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / "run"
        if any("RUN" in command for command in chosen):
            _seconds(["-m", "vmlab", "experiment", "cli_heavy", "--quick", "--out", str(results)], Path(scratch))

        def seconds(*arguments: str) -> float:
            with tempfile.TemporaryDirectory(dir=scratch) as here:      # a command that writes a file refuses to overwrite one
                return _seconds([str(results) if word == "RUN" else word for word in arguments], Path(here))

        for command in chosen:
            seconds("-m", "vmlab", *command)    # compiled modules are there from now on
            ratios = []
            for _ in range(rounds):
                before = seconds("-c", "pass")
                mine = seconds("-m", "vmlab", *command)
                ratios.append(2 * mine / (before + seconds("-c", "pass")))
            yield row(f"vmlab {' '.join(command)}", ratios, _LIMITS.get(command), "lower", "× python -c pass")


def experiments(rounds: int, scale: float, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """Whole experiments and sweeps, in seconds and milliseconds of this host, and against themselves."""
    if wanted("cli_heavy on 2 cores, seconds"):
        seconds = []
        for _ in range((rounds + 1) // 2):
            with tempfile.TemporaryDirectory() as scratch:
                seconds.append(_seconds(["-m", "vmlab", "experiment", "cli_heavy", "--jobs", "2", "--no-reuse"], Path(scratch)))
        yield row("cli_heavy on 2 cores, seconds", seconds, 15, "lower")
    name = "cells that share their boot, against each from reset"
    if wanted(name):
        yield from _shared_boots((rounds + 1) // 2, max(int(20 * scale), 2), name)
    names = ("lab overhead of a small cell, ms", "the same sweep again, against the first", "two workers against one")
    if any(map(wanted, names)):
        yield from _sweep((rounds + 1) // 2, max(int(1000 * scale), 50), names)


def _sweep(rounds: int, cells: int, names: Sequence[str]) -> Iterator[Row]:
    """``cells`` small cells: with one worker, with two, and again from what is kept."""
    overhead, kept, speed_up = [], [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as scratch:
            config = Path(scratch) / "sweep.yaml"
            config.write_text(
                "name: sweep\nmatrix:\n  technique: [native, trap-and-emulate]\n  workload: cli_sti\n  density: 10\n"
                f"  iterations: [{', '.join(str(100 + i) for i in range(cells // 2))}]\ncharts: []\n", encoding="utf-8")
            one, two = (_clock_and_cpu(config, jobs, Path(scratch) / f"by{jobs}") for jobs in (1, 2))
            again = _clock_and_cpu(config, 2, Path(scratch) / "by2")
        overhead.append(1000 * one[1] / cells)
        kept.append(again[1] / two[1])
        speed_up.append(one[0] / two[0])
    yield row(names[0], overhead, 30, "lower", f"{cells} cells, all of their CPU time")
    yield row(names[1], kept, 0.05, "lower", "CPU time")
    yield row(names[2], speed_up, 1.7, "higher")


#: A kernel that computes for so many instructions, says "> " at the serial port, and then echoes what it is told there.
_BOOT = 20_000_000
_ECHO = bytes.fromhex("66baf803b03eeeb020ee 66bafd03eca80174f7 66baf803ec3c21740e3c3f7403eeebe7 b803000000eb0231c0 66baf400eff4")


def _booting(where: Path) -> Path:
    """The kernel: an ELF with a Multiboot header, at 1 MiB."""
    at = 0x100000
    code = struct.pack("<III", 0x1BADB002, 0, -0x1BADB002 & 0xFFFFFFFF) + b"\xb9" + struct.pack("<I", _BOOT // 2) + b"\x49\x75\xfd" + _ECHO
    head = struct.pack("<4s5B7xHHIIIIIHHHHHH", b"\x7fELF", 1, 1, 1, 0, 0, 2, 3, 1, at + 12, 52, 0, 0, 52, 32, 1, 0, 0, 0)
    image = where / "boots.elf"
    image.write_bytes(head + struct.pack("<8I", 1, 84, at, at, len(code), len(code), 7, 4) + code)
    return image


def _shared_boots(rounds: int, cells: int, name: str) -> Iterator[Row]:
    """Cells of one guest that differ in what they say at its prompt, each from the end of one boot, and each from reset."""
    ratios = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as scratch:
            config = Path(scratch) / "boots.yaml"
            scripts = "\n".join(f"    - expect '> ' send 'word{i} ' expect 'word{i} '" for i in range(cells))
            text = f"name: boots\nmatrix:\n  technique: native\n  guest: {_booting(Path(scratch))}\n  script:\n{scripts}\n"
            config.write_text(text, encoding="utf-8")
            clock = {how: _seconds(["-m", "vmlab", "experiment", str(config), "--jobs", "1", "--no-reuse", "--boots", how], Path(scratch))
                     for how in ("never", "auto")}
        ratios.append(clock["auto"] / clock["never"])
    yield row(name, ratios, 0.6 if cells >= 20 else None, "lower", f"{cells} cells, {_BOOT:,} instructions of boot")


def _clock_and_cpu(config: Path, jobs: int, where: Path) -> tuple[float, float]:
    """Seconds of the clock, and of the CPUs, that a run of the experiment takes with its results in ``where``."""
    where.mkdir(exist_ok=True)
    before = os.times()
    clock = _seconds(["-m", "vmlab", "experiment", str(config), "--jobs", str(jobs)], where)
    after = os.times()
    busy = after.children_user - before.children_user + after.children_system - before.children_system
    return clock, busy or clock     # some systems do not tell
