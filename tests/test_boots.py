"""Cells that share a boot: each has the record of a run from reset, bit for bit, and none takes another along."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import foreign
import pytest
from test_cli_live import ECHO, elf

from vmlab import guests
from vmlab.experiment import boots, runner, schema, worker, workers, yamlfile
from vmlab.experiment.boots import Boots
from vmlab.experiment.cell import Run, run_cell
from vmlab.experiment.lab import Lab
from vmlab.experiment.matrix import Cell
from vmlab.experiment.worker import Record, run_one
from vmlab.experiment.workers import Pool
from vmlab.parameters import Value

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this host forks no processes; all cells run from reset")
Parameters = dict[str, Value]
MINIOS = str(Path(guests.__file__).resolve().parent / "minios" / "minios.elf")
#: Technique, what it is given, and whether minios can share a boot under it.
SCHEMES: dict[str, tuple[str, Parameters, bool]] = {
    "native": ("native", {}, True),
    "trapping, tracing": ("trap-and-emulate", {"memory": "tracing"}, True),
    "trapping, lazy, sensitive": ("trap-and-emulate", {"memory": "lazy", "sensitive": "trap"}, True),
    "translation, tracing": ("binary-translation", {"memory": "tracing"}, True),
    "translation, lazy": ("binary-translation", {"memory": "lazy"}, True),
    "paravirtual": ("paravirtualization", {"memory": "direct"}, False),
    "assisted, tracing": ("hardware-assisted", {"memory": "tracing"}, True),
    "assisted, lazy": ("hardware-assisted", {"memory": "lazy"}, True),
    "assisted, nested": ("hardware-assisted", {"memory": "nested"}, True),
    "assisted, nested, type 2": ("hardware-assisted", {"memory": "nested", "hypervisor": "type2"}, True),
}


@pytest.fixture
def booted() -> Iterator[Boots]:
    found = Boots(everything=True)
    yield found
    found.close()


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("guest") / "echo.elf"
    path.write_bytes(elf(ECHO))
    return str(path)


def cold(technique: str, parameters: Mapping[str, Value]) -> Record:
    """As it comes out of a worker, from reset."""
    found: Record = json.loads(json.dumps(run_one(run_cell, technique, dict(parameters))))
    return without_time(found)


def without_time(record: Record | None) -> Record:
    assert record is not None
    return {key: value for key, value in record.items() if key != "host_seconds"}


# ---- the same record
#: What is enough where all of them take too long; the slow test has all.
FEW = ("native", "trapping, tracing", "translation, tracing", "paravirtual", "assisted, lazy", "assisted, nested")


@pytest.mark.parametrize("scheme", FEW)
def test_workloads_of_nano_share_a_boot(booted: Boots, scheme: str) -> None:
    technique, chosen, _ = SCHEMES[scheme]
    for workload, iterations in (("cli_sti", 9), ("interrupt", 3), ("rdtsc", 12)):
        cell: Parameters = {"guest": "nano", "workload": workload, "iterations": iterations, "density": 200}
        cell |= {key: value for key, value in chosen.items() if key != "memory"}
        assert without_time(booted.run(technique, cell)) == cold(technique, cell)
    assert len(booted._booted) == 1 and None not in booted._booted.values()


@pytest.mark.parametrize("scheme", [scheme for scheme in FEW if "translation" not in scheme])
def test_workloads_of_minios_share_a_boot(booted: Boots, scheme: str) -> None:
    technique, chosen, shares = SCHEMES[scheme]
    for workload, more in (("forkwait", {"iterations": 2}), ("syscall", {"iterations": 5, "timer": 40_000}), ("io", {"iterations": 1})):
        cell: Parameters = {"guest": "minios", "workload": workload, **more, **chosen}
        found = booted.run(technique, cell)
        if shares:
            assert without_time(found) == cold(technique, cell)
        else:
            assert found is None
    assert len(booted._booted) == (2 if shares else 0)      # one with a disk is another machine


@pytest.mark.slow
@pytest.mark.parametrize(("technique", "chosen", "shares"), SCHEMES.values(), ids=SCHEMES)
def test_every_workload_of_every_guest_has_the_record_of_a_run_from_reset(booted: Boots, technique: str, chosen: Parameters, shares: bool) -> None:
    few = {"iterations": 3, "seeds": 2, "density": 300, "pages": 12}
    compared = 0
    for guest in ("nano", "hog", "minios", "minios64"):
        for name, workload in guests.workloads(guest).items():
            cell: Parameters = {"guest": guest, "workload": name, **{key: few[key] for key in few if key in workload.parameters}}
            cell |= {key: value for key, value in chosen.items() if guest != "nano" or key != "memory"}
            found = booted.run(technique, cell)
            if found is not None:
                assert without_time(found) == cold(technique, cell), (guest, name)
                compared += 1
    assert compared >= (8 if not shares else 50)


TECHNIQUES = [("native", {}), ("trap-and-emulate", {}), ("binary-translation", {}), ("hardware-assisted", {"memory": "nested"})]


@pytest.mark.parametrize(("technique", "chosen"), TECHNIQUES)
def test_scripts_share_what_comes_before_the_first_answer(echo: str, technique: str, chosen: Parameters) -> None:
    booted = Boots()
    for rest in ('send "one" expect "ne"', 'send "two" expect "w" send "x" expect "x"', 'expect "> never" send "!"', 'send "!"', 'send "?"'):
        cell: Parameters = {"guest": echo, "script": f'expect ">" {rest}', "budget": 40_000, **chosen}
        assert without_time(booted.run(technique, cell)) == cold(technique, cell)
    (only,) = booted._booted.values()
    assert only is not None and 0 < only.instructions < 100
    booted.close()


@pytest.mark.parametrize(("technique", "chosen"), [
    ("native", {}), ("trap-and-emulate", {"memory": "lazy"}), ("hardware-assisted", {"memory": "lazy"}),
])
def test_an_operating_system_from_a_file_goes_on_exactly(technique: str, chosen: Parameters) -> None:
    booted = Boots()
    for rest in ('expect "forks"', 'expect "faults"'):
        cell: Parameters = {"guest": MINIOS, "append": "workload=server iterations=4 timer=20000", "script": f'expect "minios" {rest}', **chosen}
        assert without_time(booted.run(technique, cell)) == cold(technique, cell)
    booted.close()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["native", "nested", "translation"])
def test_commands_of_xv6_share_its_boot(how: str) -> None:
    technique, chosen = foreign.TECHNIQUES[how]
    booted = Boots()
    for command in ("echo one", "wc README"):
        cell: Parameters = {"guest": foreign.guest(foreign.XV6, "kernelmemfs"), "ram": 240, **chosen,
                            "script": f"expect '$ ' send '{command}\\n' expect '$ '"}
        assert without_time(booted.run(technique, cell)) == cold(technique, cell)
    booted.close()


def test_what_cannot_share_a_boot_runs_from_reset(booted: Boots, echo: str) -> None:
    cell: Parameters = {"guest": "nano", "workload": "cli_sti", "iterations": 2, "density": 100}
    assert booted.run("mine.py:Mine", cell) is None
    assert booted.run("native", {**cell, "workload": "no such"}) is None
    assert booted.run("native", {"guest": echo}) is None
    assert booted.run("native", {"guest": echo, "script": 'expect ">"'}) is None
    assert Boots().run("native", cell) is None      # the lab's own boot in less time than a fork costs
    assert booted.run("native", {**cell, "budget": 1_000_000}) is not None
    assert booted.run("native", {**cell, "budget": 10}) is None     # it ends within the boot


def test_a_guest_that_does_not_come_to_the_end_of_its_boot_runs_once(echo: str) -> None:
    booted = Boots()
    for _ in range(2):
        cell: Parameters = {"guest": echo, "script": 'expect "never" send "x"', "budget": 3000}
        found = booted.run("native", cell)
        if found is not None:
            assert without_time(found) == cold("native", cell)
    assert list(booted._booted.values()) == [None]
    booted.close()


def test_only_so_many_boots_are_kept(booted: Boots, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boots, "MOST", 2)
    for ram in (16, 20, 24, 16):
        cell: Parameters = {"guest": "nano", "workload": "cli_sti", "iterations": 2, "density": 100, "ram": ram}
        assert without_time(booted.run("native", cell)) == cold("native", cell)
        assert len(booted._booted) <= 2
    assert all(_alive(one._process) for one in booted._booted.values() if one is not None)


# ---- what goes wrong
CELL: Parameters = {"guest": "nano", "workload": "cli_sti", "iterations": 2, "density": 100}


def test_a_fork_that_dies_fails_its_cell_alone(booted: Boots, monkeypatch: pytest.MonkeyPatch) -> None:
    become = Run.become

    def dies(self: Run, parameters: Mapping[str, Value]) -> None:
        if parameters["iterations"] == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        become(self, parameters)

    monkeypatch.setattr(Run, "become", dies)
    assert booted.run("native", {**CELL, "iterations": 13}) is not None
    found = booted.run("native", {**CELL, "iterations": 13})
    assert found is not None and found["status"] == "failed" and found["error"] == "the worker died (signal SIGKILL)"
    assert without_time(booted.run("native", CELL)) == cold("native", CELL)


def test_a_boot_that_is_killed_fails_one_cell_and_the_next_ones_run_from_reset(booted: Boots) -> None:
    booted.run("native", CELL)
    (process,) = booted._booted.values()
    assert process is not None
    os.kill(process._process, signal.SIGKILL)
    found = booted.run("native", CELL)
    assert found is not None and found["error"] == "the worker died (signal SIGKILL)"
    assert booted.run("native", CELL) is None


def test_a_wrong_parameter_is_the_same_sentence(booted: Boots) -> None:
    booted.run("native", CELL)
    wrong: Parameters = {**CELL, "iterations": -3}
    assert without_time(booted.run("native", wrong)) == cold("native", wrong)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_cell_that_hangs_is_ended_with_its_boot(echo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    kill = workers._kill

    def note(process: subprocess.Popen[str]) -> None:
        if process.returncode is None:
            ended.append(process.pid)
            assert len(_group(process.pid)) == 3        # the worker, the boot, and the cell
        kill(process)

    monkeypatch.setattr(workers, "_kill", note)
    endless: Parameters = {"guest": echo, "script": 'expect ">" expect "never" send "x"', "budget": 1 << 60}
    with Pool("vmlab.experiment.cell:run_cell", 1, seconds=5, boots="auto") as pool:
        (_, record), = pool.run([Cell("native", endless)])
    assert record["status"] == "failed" and "no answer for 5 s" in record["error"]
    deadline = time.monotonic() + 10
    while _group(ended[0]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _group(ended[0])


def _group(leader: int) -> list[str]:
    """The processes that still run in a group."""
    listed = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in listed if line.split()[0] == str(leader) and not line.split()[1].startswith("Z")]


def test_hosts_that_fork_no_processes_run_all_from_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    assert worker._boots({"boots": "always"}) is not None and worker._boots({"boots": "never"}) is None
    monkeypatch.delattr(os, "fork")
    assert worker._boots({"boots": "always"}) is None


def test_a_whole_experiment_is_the_same_with_shared_boots(tmp_path: Path) -> None:
    text = ("name: boots\nmatrix: {technique: [native, trap-and-emulate, paravirtualization], workload: [cli_sti, cpuid], iterations: [20, 40], "
            "density: 100}\nprofiles: [haswell-2013]\n")
    results = []
    for how in ("never", "always"):
        lab = Lab()
        options = runner.Options(jobs=2, out=tmp_path / how, reuse=False, boots=how)
        outcome = runner.Run(schema.load(yamlfile.parse(text, "f.yaml"), lab), lab, options).execute(lambda *_: None)
        results.append([{key: value for key, value in cell.items() if key != "host_seconds"} for cell in outcome.results["cells"]])
    assert results[0] == results[1] and all(cell["status"] == "ok" for cell in results[0])


def test_a_worker_that_is_killed_leaves_no_boot_behind(echo: str) -> None:
    """Whoever waited for jobs sees the end of them."""
    program = ("import sys, json; from vmlab.experiment.boots import Boots; b = Boots(True); "
               f"b.run('native', {CELL!r}); b.run('native', {dict(CELL, ram=16)!r}); "
               "print(json.dumps([one._process for one in b._booted.values()]), flush=True); sys.stdin.read()")
    child: subprocess.Popen[str] = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    processes: list[Any] = json.loads(child.stdout.readline())
    assert len(processes) == 2 and all(map(_alive, processes))
    child.kill()
    child.communicate()
    deadline = time.monotonic() + 10
    while any(map(_alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_running, processes))


def _running(process: int) -> bool:
    """Not even waiting for somebody to ask how it ended."""
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
