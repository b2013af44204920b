"""Runs that are saved and go on another time: the ledger is that of one run, whatever the file went through it is never a wrong one."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign
import pytest
from machinelab import PATHS
from test_cli_live import ECHO, elf

from vmlab import guests
from vmlab.cli.main import main as vm
from vmlab.errors import ConfigError, UnsupportedByStrategy
from vmlab.experiment import saved_run
from vmlab.experiment.cell import Run
from vmlab.experiment.lab import Lab
from vmlab.machine import saved
from vmlab.machine.pc import Machine, Stop, StopReason

MINIOS = str(Path(guests.__file__).resolve().parent / "minios" / "minios.elf")
#: Processes, a timer, pipes: interrupts fall everywhere.
BUSY = "workload=server iterations=6 processes=3 timer=20000"
TECHNIQUES = {
    "native": ["native"], "nested": ["hardware-assisted", "--set", "memory=nested"],
    "nested, large pages": ["hardware-assisted", "--set", "memory=nested", "--set", "nested_page=2m"],
    "lazy": ["hardware-assisted", "--set", "memory=lazy"], "tracing": ["hardware-assisted", "--set", "memory=tracing"],
    "type 2": ["hardware-assisted", "--set", "memory=nested", "--set", "hypervisor=type2"],
}


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("guest") / "echo.elf"
    path.write_bytes(elf(ECHO))
    return str(path)


@pytest.fixture
def cell(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    def run(*arguments: str) -> dict[str, Any]:
        capsys.readouterr()
        assert vm(["run", *arguments, "--json", "--profile", "haswell-2013"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return {key: value for key, value in found.items() if key not in ("host_seconds", "machine_path")}

    return run


Runner = Callable[..., dict[str, Any]]


# ---- the same ledger
@pytest.mark.parametrize("technique", TECHNIQUES.values(), ids=TECHNIQUES)
def test_a_saved_operating_system_goes_on_as_if_nothing_had_happened(technique: list[str], cell: Runner, tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved on one way into the machine, resumed on the other: phases, events, digests of the outcome, all of it."""
    file, start = str(tmp_path / "run"), [MINIOS, "--append", BUSY, "--technique", *technique]
    monkeypatch.setenv("VMLAB_MACHINE", PATHS[0])
    cell(*start, "--expect", "workload=", "--save", file)
    monkeypatch.setenv("VMLAB_MACHINE", PATHS[-1])
    on = cell("--from", file, "--expect", "forks")
    whole = cell(*start, "--expect", "workload=", "--expect", "forks")
    assert on == whole
    assert sum(phase["events"].get("interrupt.delivered", 0) for phase in on["phases"].values()) > 1 and on["status"] == "ok"


@pytest.mark.parametrize("technique", [["native"], TECHNIQUES["nested"], TECHNIQUES["lazy"]])
def test_a_run_may_be_saved_again_and_again(technique: list[str], echo: str, cell: Runner, tmp_path: Path) -> None:
    file = str(tmp_path / "run")
    words = ["one ", "two ", "three "]
    steps = [step for word in words for step in ("--send", word, "--expect", word)]
    cell(echo, "--technique", *technique, "--expect", "> ", "--save", file)
    for word in words:
        last = cell("--from", file, "--send", word, "--expect", word, "--save", file)
    assert last == cell(echo, "--technique", *technique, "--expect", "> ", *steps)
    assert last["console"].endswith("one two three ")


def test_two_runs_go_on_from_one_file(echo: str, cell: Runner, tmp_path: Path) -> None:
    file = str(tmp_path / "run")
    cell(echo, "--technique", "native", "--expect", "> ", "--save", file)
    consoles = [cell("--from", file, "--send", word, "--expect", word)["console"] for word in ("this", "that", "this")]
    assert consoles == ["> this", "> that", "> this"]


@pytest.mark.slow
@pytest.mark.parametrize("timer", [20_000, 33_333, 50_021])
@pytest.mark.parametrize("workload", ["forkwait", "mmap", "ctxsw", "mixed", "random"])
@pytest.mark.parametrize("technique", TECHNIQUES.values(), ids=TECHNIQUES)
@pytest.mark.parametrize("guest", ["minios.elf", "minios64.elf"])
def test_saved_runs_of_many_kinds_go_on_exactly(guest: str, technique: list[str], workload: str, timer: int, cell: Runner, tmp_path: Path) -> None:
    file, last = str(tmp_path / "run"), "forks"
    start = [str(Path(MINIOS).with_name(guest)), "--append", f"workload={workload} iterations=3 seeds=2 timer={timer}", "--technique", *technique]
    cell(*start, "--expect", "minios", "--save", file)
    cell("--from", file, "--expect", "workload=", "--save", file)
    assert cell("--from", file, "--expect", last) == cell(*start, "--expect", "minios", "--expect", "workload=", "--expect", last)


@pytest.mark.slow
@pytest.mark.parametrize("technique", [["native"], TECHNIQUES["nested, large pages"], TECHNIQUES["lazy"]])
def test_xv6_goes_on_from_its_shell(technique: list[str], cell: Runner, tmp_path: Path) -> None:
    start = [foreign.guest(foreign.XV6, "kernelmemfs"), "--technique", *technique, "--ram", "240", "--expect", "$ "]
    file = str(tmp_path / "run")
    cell(*start, "--save", file)
    assert cell("--from", file, "--send", "ls\\n", "--expect", "$ ") == cell(*start, "--send", "ls\\n", "--expect", "$ ")


@pytest.mark.slow
@pytest.mark.parametrize("technique", [["native"], TECHNIQUES["nested, large pages"]])
def test_linux_goes_on_from_its_shell(technique: list[str], cell: Runner, tmp_path: Path) -> None:
    image, initrd = (foreign.guest(foreign.LINUX, name) for name in ("vmlinuz", "initrd.gz"))
    start = [image, "--initrd", initrd, "--append", foreign.LINUX_LINE, "--set", "protocol=pvh", "--technique", *technique, "--ram", "256",
             "--expect", "vmlab# "]
    file = str(tmp_path / "run")
    cell(*start, "--save", file)
    assert cell("--from", file, "--send", "uname -a\\n", "--expect", "vmlab# ") == cell(*start, "--send", "uname -a\\n", "--expect", "vmlab# ")


# ---- what is due keeps its moment and its order
def test_what_is_due_at_the_same_time_keeps_its_order() -> None:
    machine, other = Machine(1 << 20), Machine(1 << 20)
    for target in (machine, other):
        assert not target.timeline.pending()
    machine.clock.write(0, 1, 0x0B)
    machine.clock.write(1, 1, 0x32)             # update and alarm interrupts: both at the next second
    machine.lapic.write(0x320, 4, 0x30)
    machine.lapic.write(0x380, 4, 1_000_000_000)
    first, second = machine.timeline.pending()[:2]
    machine.timeline.reorder([second, first, *machine.timeline.pending()[2:]])
    before = saved.state(machine)
    saved.restore(other, before)
    assert saved.state(other)["due"] == before["due"] and len(before["due"]) >= 2


def test_what_is_overdue_is_still_due() -> None:
    machine, other = Machine(1 << 20), Machine(1 << 20)
    for offset, value in ((3, 0x30), (0, 100), (0, 0)):     # a one-shot of the interval timer
        machine.pit.write(offset, 1, value)
    due = machine.timeline.next_due
    assert due is not None
    machine.counter.time = due + 50_000
    saved.restore(other, saved.state(machine))
    assert other.timeline.next_due == due
    other.timeline.run_due()
    assert other.pic.master.irr & 1


def test_a_callback_of_nobody_s_is_refused() -> None:
    machine = Machine(1 << 20)
    machine.timeline.at(5, lambda: None)
    with pytest.raises(UnsupportedByStrategy, match="a little later"):
        saved.state(machine)


def test_armed_breakpoints_are_refused() -> None:
    machine = Machine(1 << 20)
    machine.cpu.load()
    machine.cpu.set_debug_register(7, 0x401)
    machine.cpu.store()
    with pytest.raises(UnsupportedByStrategy, match="breakpoints"):
        saved.state(machine)


# ---- files
@pytest.fixture
def file(echo: str, cell: Runner, tmp_path: Path) -> Path:
    path = tmp_path / "run.vmlab"
    cell(echo, "--technique", "native", "--expect", "> ", "--save", str(path))
    return path


def refused(path: Path | str, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    capsys.readouterr()
    assert vm(["run", "--from", str(path), "--send", "x", "--expect", "x", *more]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "Traceback" not in captured.err and captured.out == ""
    return captured.err


def test_no_damaged_file_gives_a_number(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = file.read_bytes()
    for cut in (0, 5, 20, 60, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        assert "damaged" in (said := refused(file, capsys)) or "no saved run" in said or "another version" in said
    for at in range(18, len(whole), max(len(whole) // 40, 1)):
        file.write_bytes(whole[:at] + bytes((whole[at] ^ 0x10,)) + whole[at + 1:])
        refused(file, capsys)
    file.write_bytes(whole + b"more")
    assert "checksum" in refused(file, capsys)


def test_other_versions_and_other_code_are_refused(file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lab, "code", lambda self, more=(): "0123456789ab")
    assert "counts otherwise" in refused(file, capsys)
    file.write_bytes(file.read_bytes().replace(b"vmlab saved run 1", b"vmlab saved run 7", 1))
    assert "another version" in refused(file, capsys)


def test_what_is_no_saved_run_is_one_sentence(echo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no saved run" in refused(echo, capsys)
    assert "cannot be read" in refused(tmp_path, capsys)
    assert "cannot be read" in refused(tmp_path / "absent", capsys)


@pytest.mark.parametrize("wrong", [
    {"machine": {}}, {"machine": None}, {"vmm": []}, {"ram": 4096}, {"image": {"symbols": {}}}, {"marks": {"a": 3}}, {"parameters": 3},
])
def test_values_that_do_not_fit_together_are_refused(file: Path, wrong: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """With a right checksum, as somebody may make one on purpose."""
    found = saved_run.read(file, Lab().code())
    saved_run.write(file, {**found.values, **wrong}, ((number << 12, bytes(page)) for number, page in found.pages.items()))
    refused(file, capsys)


def test_a_full_disk_leaves_the_old_file(echo: str, file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = file.read_bytes()
    monkeypatch.setattr(saved_run.os, "fsync", full)
    assert vm(["run", "--from", str(file), "--send", "y", "--expect", "y", "--save", str(file)]) == 1
    assert "No space left on device; nothing was saved" in capsys.readouterr().err
    assert file.read_bytes() == before and [path.name for path in file.parent.iterdir()] == [file.name]


# ---- what cannot be saved
@pytest.mark.parametrize(("arguments", "said"), [
    (["--technique", "binary-translation"], "under binary-translation cannot be saved"),
    (["--technique", "native", "--set", "tlb=on"], "models the TLB"),
])
def test_a_run_that_cannot_be_saved_is_refused_before_it_begins(echo: str, arguments: list[str], said: str, tmp_path: Path,
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    assert vm(["run", echo, *arguments, "--expect", "> ", "--save", str(tmp_path / "run")]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.out == ""
    assert vm(["run", echo, "--technique", "native", "--expect", "> ", "--save", str(tmp_path / "no" / "run")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_a_guest_that_has_ended_is_not_saved(echo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vm(["run", echo, "--technique", "native", "--expect", "> ", "--send", "!", "--save", str(tmp_path / "run")]) == 1
    assert "the guest has ended" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_options_that_the_file_has_answered_are_refused(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "its own answer to --technique" in refused(file, capsys, "--technique", "native")
    assert "its own answer to --ram" in refused(file, capsys, "--ram", "64")
    assert "its own answer to --set" in refused(file, capsys, "--set", "a=1")


def test_a_technique_that_cannot_be_saved_says_so() -> None:
    run = Run("trap-and-emulate", {"workload": "cli_sti", "iterations": 1, "density": 1000})
    assert run.go() == Stop(StopReason.EXIT, 0)
    with pytest.raises(UnsupportedByStrategy, match="cannot be saved"):
        run.strategy.state()


def test_values_of_no_plain_kind_are_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="no plain value"):
        saved_run.write(tmp_path / "run", {"machine": object()}, [])
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="cannot be read"):
        saved_run.read(tmp_path / "run", "")
