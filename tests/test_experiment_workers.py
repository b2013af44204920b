"""Workers: one crash costs one cell, nothing outlives the pool, and answers cannot be forged by a print."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from vmlab.experiment.matrix import Cell
from vmlab.experiment.workers import Pool, exit_words

FUNCTION = "fake_lab:run_cell"


def cell(workload: str, technique: str = "trap-and-emulate", iterations: int = 3) -> Cell:
    return Cell(technique, {"workload": workload, "iterations": iterations})


def run(cells: list[Cell], jobs: int = 1, **options: Any) -> dict[str, dict[str, Any]]:
    with Pool(FUNCTION, jobs, **options) as pool:
        return {done.id: record for done, record in pool.run(cells)}


def test_workers_are_reused() -> None:
    records = run([cell("cli_sti", iterations=i) for i in range(1, 9)], jobs=2)
    assert [record["status"] for record in records.values()] == ["ok"] * 8
    assert 1 <= len({record["pid"] for record in records.values()}) <= 2


@pytest.mark.parametrize(("workload", "status", "says"), [
    ("abort", "failed", "the worker died"),
    ("exit", "failed", "the worker died (exit status 7)"),
    ("raise", "failed", "internal error: KeyError: 'a mistake' (fake_lab.py:"),
    ("triple", "failed", "triple fault at 0x1000"),
    ("unsupported", "unsupported", "this technique cannot do that"),
])
def test_one_mishap_costs_one_cell(workload: str, status: str, says: str) -> None:
    records = run([cell("cli_sti", iterations=1), cell(workload), cell("cli_sti", iterations=2)])
    assert sorted(record["status"] for record in records.values()) == sorted(["ok", "ok", status])
    assert says in records[cell(workload).id]["error"]


def test_a_cell_that_hangs_is_ended() -> None:
    started = time.monotonic()
    records = run([cell("hang"), cell("cli_sti")], seconds=1.5)
    assert "no answer for 2 s" in records[cell("hang").id]["error"]
    assert records[cell("cli_sti").id]["status"] == "ok"
    assert time.monotonic() - started < 30


def test_leaving_the_pool_ends_what_is_under_way() -> None:
    started = time.monotonic()
    with Pool(FUNCTION, 2) as pool:
        results = pool.run([cell("cli_sti"), cell("hang"), cell("hang", "binary-translation")])
        assert next(results)[1]["status"] == "ok"
        processes = [worker.process for worker in pool.workers if worker.process is not None]
    assert processes and all(process.returncode is not None for process in processes)
    assert not [thread for thread in threading.enumerate() if thread.name == "vmlab-worker"]
    assert time.monotonic() - started < 30


def test_a_cell_function_that_cannot_be_imported_is_a_failed_cell() -> None:
    with Pool("no_such_module:run", 1) as pool:
        (_, record), = pool.run([cell("cli_sti")])
    assert record["status"] == "failed"
    assert "the machine cannot be loaded: ModuleNotFoundError" in record["error"]


def test_a_worker_gets_its_environment() -> None:
    with Pool(FUNCTION, 1, {"VMLAB_MACHINE": "portable"}) as pool:
        (_, record), = pool.run([cell("environment")])
    assert record["console"] == "portable"


def test_exit_status_in_words() -> None:
    assert exit_words(-6) in ("signal SIGABRT", "signal 6")
    assert exit_words(-200) == "signal -200" or exit_words(-200) == "signal 200"
    assert exit_words(3) == "exit status 3"
    assert exit_words(0xC0000005) == "exit status 0xc0000005"
